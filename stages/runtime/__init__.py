"""How a stage runs: its process, its files, its progress. Only `randomness` can change a result."""
