"""Cost of a run before it starts: time, disk and memory of each stage."""
