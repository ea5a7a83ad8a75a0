"""What the cache needs to know of a project: its graph and where its code lies. Tests have small ones of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cache.fingerprint import Code
from pipeline.graph import COUNTED, NEUTRAL, STAGES, VIEWS, Stage


@dataclass(frozen=True)
class Project:
    """A graph of stages and the code that they run."""

    graph: Mapping[str, Stage]
    code_root: Path
    code: Code = field(init=False, repr=False, compare=False)
    """What decides a result."""
    view_code: Code = field(init=False, repr=False, compare=False)
    """What decides a result or shows it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "code", Code(self.code_root, frozenset(NEUTRAL), COUNTED))
        object.__setattr__(self, "view_code", Code(self.code_root, frozenset(NEUTRAL) - {VIEWS}, COUNTED))

    def has_view(self, stage: Stage) -> bool:
        """Whether something is drawn from a stage's artifacts."""
        return self.view_code.module(stage.view_entry[0]) is not None


DPAR = Project(STAGES, Path(__file__).resolve().parent.parent)
