"""The sources that can decide where patches start in samples, as far as settings, graph and tables need to know them.

`stages.patches.boundary_sources` says how each decides, `pipeline.bench.boundary_costs` what it costs. All three tables
have the same entries, which is checked on import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator

Need = Literal["entropies", "head"]
_Entry = TypeVar("_Entry")


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """What people, the settings and the graph know of a source.

    Attributes:
        label: In tables and captions.
        meaning: One line on what it computes.
        needs: "entropies": patches of the model start by entropy, and a threshold decides. "head": an entropy head.
        reads: Stages whose artifacts it decides with, beside the patch index.
        reads_for_target: Stages that it reads too, to find the threshold of a `target_mean_length`.
    """

    label: str
    meaning: str
    needs: frozenset[Need]
    reads: frozenset[str]
    reads_for_target: frozenset[str]


# The first source whose needs are met is the default.
BOUNDARY_SOURCES: dict[str, SourceInfo] = {
    "entropy_head": SourceInfo(
        label="entropy head",
        meaning="a small head on DPAR's own encoder predicts the next token's entropy",
        needs=frozenset({"entropies", "head"}),
        reads=frozenset({"entropy_head"}),
        reads_for_target=frozenset(),
    ),
    "entropy_model": SourceInfo(
        label="entropy model",
        meaning="the model of stage entropy_model, run with a cache beside DPAR",
        needs=frozenset({"entropies"}),
        reads=frozenset({"entropy_model"}),
        reads_for_target=frozenset({"entropy_map"}),
    ),
    "own_entropy": SourceInfo(
        label="own entropy",
        meaning="the entropy of DPAR's own prediction with the open patch; where the patch closes, decoder and head "
        "run again",
        needs=frozenset({"entropies"}),
        reads=frozenset({"entropy_head"}),  # it holds the threshold
        reads_for_target=frozenset(),
    ),
    "static": SourceInfo(
        label="static",
        meaning="patches of one length, known before",
        needs=frozenset(),
        reads=frozenset(),
        reads_for_target=frozenset(),
    ),
}


def usable_sources(offered: frozenset[Need]) -> list[str]:
    """Sources whose needs are met by what a model offers, the default first."""
    return [name for name, source in BOUNDARY_SOURCES.items() if source.needs <= offered]


def by_entropy(source: str | None) -> bool:
    """Whether a threshold on entropies decides. None stands for a model without patches."""
    return source is not None and "entropies" in BOUNDARY_SOURCES[source].needs


def calibrated_sources() -> list[str]:
    """Sources that stage `entropy_head` calibrates: their thresholds are in its artifact."""
    return [name for name, source in BOUNDARY_SOURCES.items() if "entropy_head" in source.reads]


def for_every_source(table: Mapping[str, _Entry], *, calibrated: bool = False) -> dict[str, _Entry]:
    """The table, checked to have an entry for each source, or for each that is calibrated, and no other."""
    wanted = calibrated_sources() if calibrated else list(BOUNDARY_SOURCES)
    assert set(table) == set(wanted), f"the table has entries for {', '.join(table)}, expected {', '.join(wanted)}"
    return dict(table)


def _known(name: str) -> str:
    if name not in BOUNDARY_SOURCES:
        raise ValueError(f"the source of boundaries is {name!r}, expected one of {', '.join(BOUNDARY_SOURCES)}")
    return name


BoundarySource = Annotated[str, AfterValidator(_known)]
"""Name of a source."""
