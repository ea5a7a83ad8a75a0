"""The sources that can decide where patches start in samples, as far as settings, graph and tables need to know them.

`stages.patches.boundary_sources` says how each decides. Both tables have the same entries, checked when it is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

BoundarySource = Literal["entropy_head", "entropy_model", "own_entropy", "static"]


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """What people and the graph know of a source.

    Attributes:
        label: In tables and captions.
        meaning: One line on what it computes.
        reads: Stages whose artifacts it decides with, beside the patch index.
    """

    label: str
    meaning: str
    reads: frozenset[str]


BOUNDARY_SOURCES: dict[BoundarySource, SourceInfo] = {
    "entropy_head": SourceInfo(
        label="entropy head",
        meaning="a small head on DPAR's own encoder predicts the next token's entropy",
        reads=frozenset({"entropy_head"}),
    ),
    "entropy_model": SourceInfo(
        label="entropy model",
        meaning="the model of stage entropy_model, run with a cache beside DPAR",
        reads=frozenset({"entropy_model"}),
    ),
    "own_entropy": SourceInfo(
        label="own entropy",
        meaning="the entropy of DPAR's own prediction with the open patch",
        reads=frozenset({"entropy_head"}),  # it holds the threshold
    ),
    "static": SourceInfo(
        label="static",
        meaning="patches of one length, known before",
        reads=frozenset(),
    ),
}
assert set(BOUNDARY_SOURCES) == set(get_args(BoundarySource))
