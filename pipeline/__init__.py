"""Orchestration: graph, cache, launch, Prefect, MLflow and the command line."""

import importlib.util
import sys
from pathlib import Path

# Our packages have common names. Others of these names, which PYTHONPATH may put first, must not stand for them.
_ROOT = Path(__file__).resolve().parent.parent
for _name in ("conf", "models", "stages"):
    _spec = importlib.util.find_spec(_name)
    if _spec is None or _spec.origin is None or not Path(_spec.origin).is_relative_to(_ROOT):
        sys.path.insert(0, str(_ROOT))
        break
