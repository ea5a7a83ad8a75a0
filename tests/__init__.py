"""Tests of every package, and programs beside them: the campaign and the benchmarks."""
