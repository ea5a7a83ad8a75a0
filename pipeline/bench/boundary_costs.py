"""MACs that each boundary source adds to sampling one image. torch is imported only when counting.

These costs are kept outside `stages`, where they would enter the keys of trained models and samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.boundary_sources import for_every_source
from models.config import DPARConfig

if TYPE_CHECKING:
    from models.macs import Cost, DPARCost, Sampling


@dataclass(frozen=True, kw_only=True)
class SampledModels:
    """The models of a sampling run.

    Attributes:
        config: Config of the DPAR.
        cost: Cost of the DPAR with boundaries given in advance.
        entropy_model: Cost of the entropy model.
    """

    config: DPARConfig
    cost: DPARCost
    entropy_model: Cost


def _nothing(sampled: SampledModels) -> Sampling:
    from models.macs import Sampling

    return Sampling()


def _head(sampled: SampledModels) -> Sampling:
    from models.macs import head_sampling

    return head_sampling(sampled.config)


BOUNDARY_COSTS: dict[str, Callable[[SampledModels], Sampling]] = for_every_source(
    {
        "static": _nothing,
        "entropy_head": _head,
        "entropy_model": lambda sampled: sampled.entropy_model.sampling,
        "own_entropy": lambda sampled: sampled.cost.own_entropy,
    }
)
"""MACs added by each source, in the order of the tables."""
