"""A project as the cache sees it: its graph and its code. Tests define small projects of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cache.code_memory import CodeMemory
from pipeline.cache.fingerprint import Code, Fingerprint
from pipeline.graph import COUNTED, NEUTRAL, STAGES, VIEWS, Stage


@dataclass(frozen=True)
class Project:
    """A graph of stages and the code that they run."""

    graph: Mapping[str, Stage]
    code_root: Path
    code: Code = field(init=False, repr=False, compare=False)
    """Code that determines results."""
    view_code: Code = field(init=False, repr=False, compare=False)
    """Code that determines results or draws views."""
    _memories: dict[Path, CodeMemory] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "code", Code(self.code_root, frozenset(NEUTRAL), COUNTED))
        object.__setattr__(self, "view_code", Code(self.code_root, frozenset(NEUTRAL) - {VIEWS}, COUNTED))

    def fingerprint(self, stage: Stage, home: Path) -> Fingerprint:
        """Fingerprint of a stage's code; remembered in a file in `home`."""
        return self._memory(self.code, home).fingerprint(stage.entry)

    def view_fingerprint(self, stage: Stage, home: Path) -> Fingerprint:
        """Fingerprint of the code of a stage's view; remembered in a file in `home`."""
        return self._memory(self.view_code, home).fingerprint(stage.view_entry)

    def has_view(self, stage: Stage) -> bool:
        """Whether a stage has a view."""
        return self.view_code.file_of(stage.view_entry[0]) is not None

    def _memory(self, code: Code, home: Path) -> CodeMemory:
        path = home / (".code.json" if code is self.code else ".view_code.json")
        return self._memories.setdefault(path, CodeMemory(code, path))


DPAR = Project(STAGES, Path(__file__).resolve().parent.parent)
