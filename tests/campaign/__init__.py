"""The campaign: kills, damage, hostile inputs and server faults against real runs of the preset `tiny`.

`python -m tests.campaign` runs it, see `--help`. It takes hours and resumes by row. It is no part of `make test`.
"""
