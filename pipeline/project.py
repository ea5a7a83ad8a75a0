"""What the cache needs to know of a project: its graph and where its code lies. Tests have small ones of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cache.fingerprint import Code
from pipeline.graph import COUNTED, NEUTRAL, STAGES, Stage


@dataclass(frozen=True)
class Project:
    """A graph of stages and the code that they run."""

    graph: Mapping[str, Stage]
    code_root: Path
    code: Code = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "code", Code(self.code_root, frozenset(NEUTRAL), COUNTED))


DPAR = Project(STAGES, Path(__file__).resolve().parent.parent)
