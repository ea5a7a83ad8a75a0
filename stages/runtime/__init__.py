"""How a stage runs: its process, its files, its progress. Nothing here can change a result but `randomness`."""
