"""How a benchmark tells its results: one JSON object on standard output, which `dpar bench` shows as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from pipeline.bench.gates import Figures, Gate


def report(gates: Sequence[Gate], figures: Figures) -> None:
    """Print gates and figures; a figure stands in a column and a row."""
    print(json.dumps({"gates": [asdict(gate) for gate in gates], "figures": figures}))
