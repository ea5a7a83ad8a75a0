"""What each source of boundaries adds to the sampling of one image. torch is imported only to count.

Costs are in no table of `stages`: there they would be in the keys of trainings and samples.
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
class Sampled:
    """The models that a source can add work to.

    Attributes:
        config: The sampled DPAR.
        cost: What it costs with boundaries known before.
        entropy_model: What the entropy model costs.
    """

    config: DPARConfig
    cost: DPARCost
    entropy_model: Cost


def _nothing(sampled: Sampled) -> Sampling:
    from models.macs import Sampling

    return Sampling()


def _head(sampled: Sampled) -> Sampling:
    from models.macs import head_sampling

    return head_sampling(sampled.config)


BOUNDARY_COSTS: dict[str, Callable[[Sampled], Sampling]] = for_every_source(
    {
        "static": _nothing,
        "entropy_head": _head,
        "entropy_model": lambda sampled: sampled.entropy_model.sampling,
        "own_entropy": lambda sampled: sampled.cost.own_entropy,
    }
)
"""In the order of the tables."""
