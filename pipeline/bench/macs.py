"""MACs of the paper's models and their baselines, compared with the paper's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeline.bench.family_costs import (
    CLASSES,
    FAMILY_COSTS,
    PAPER_LENGTHS,
    PIXELS,
    CostRequest,
    PatchCost,
    gpt_cost,
)
from stages.runtime.errors import InputError

if TYPE_CHECKING:
    from models.macs import Cost, Macs, Sampling

MODELS = tuple(f"{family}-{size}" for family, cost in FAMILY_COSTS.items() for size in cost.sizes)
ENTROPY_MODELS = ("B", "T")
IMAGE_SIZES = range(2 * PIXELS, 1024 + 1, PIXELS)
PAPER_GMACS = {
    ("llamagen-B", 256): 24.98,
    ("dpar-B", 256): 19.21,
    ("llamagen-L", 256): 83.26,
    ("dpar-L", 256): 56.74,
    ("llamagen-XL", 256): 192.69,
    ("dpar-XL", 256): 125.52,
    ("llamagen-B", 384): 56.21,
    ("dpar-B", 384): 40.92,
    ("llamagen-L", 384): 187.35,
    ("dpar-L", 384): 117.92,
    ("llamagen-XL", 384): 433.57,
    ("dpar-XL", 384): 258.53,
    ("llamagen-XXL", 384): 797.59,
    ("dpar-XXL", 384): 459.63,
}
"""GMACs of a forward, linear layers only, at the paper's mean lengths (supplement, table S1, there called GFLOPs)."""


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """One model at one image size.

    Attributes:
        model: Name, one of `MODELS`.
        image_size: Side of the image, pixels.
        cost: Cost of the model.
        llamagen: Cost of LlamaGen of the same size at the same image size; None for LlamaGen itself.
        patches: Costs of patches; None for a model on tokens.
        paper_gmacs: The paper's number for the linear layers of a forward; None if the paper has none.
    """

    model: str
    image_size: int
    cost: Cost
    llamagen: Cost | None
    patches: PatchCost | None
    paper_gmacs: float | None

    @property
    def paper_difference_percent(self) -> float | None:
        """Difference of our count from the paper's number; None if the paper has none."""
        return None if self.paper_gmacs is None else 100 * (self.cost.forward.linear / (1e9 * self.paper_gmacs) - 1)

    @property
    def saved_percent(self) -> float | None:
        """Share of LlamaGen's linear MACs of a forward that the model saves; None for LlamaGen itself."""
        return None if self.llamagen is None else _saved_percent(self.cost.forward, self.llamagen.forward)


@dataclass(frozen=True, kw_only=True)
class SamplingCost:
    """Cost of sampling one image with caches.

    Attributes:
        boundaries: Boundary source; None for a model on tokens.
        plain: MACs without guidance.
        guided: MACs with classifier-free guidance.
        layer_calls: Calls of transformer layers, with and without guidance.
        saved_percent: Share of LlamaGen's linear MACs saved, both with guidance; None for LlamaGen itself.
    """

    boundaries: str | None
    plain: Macs
    guided: Macs
    layer_calls: float
    saved_percent: float | None


def measure(
    models: Sequence[str] = (),
    image_sizes: Sequence[int] = (),
    mean_length: float | None = None,
    entropy_model: str = "B",
) -> list[CostRow]:
    """Count the MACs of models at image sizes; by default those in the paper's table.

    Args:
        models: Names in `MODELS`; empty for those of the paper.
        image_sizes: Sides in pixels; empty for those of the paper.
        mean_length: Mean patch length in tokens; None for the paper's, extrapolated at 128 and 512 px.
        entropy_model: Name in `ENTROPY_MODELS`.

    Raises:
        InputError: A name is unknown, or a size or length is not possible.
    """
    for what, given, known in (("model", models, MODELS), ("entropy model", [entropy_model], ENTROPY_MODELS)):
        for name in given:
            if name not in known:
                raise InputError(f"{what} is {name!r}, expected one of {', '.join(known)}")
    for size in image_sizes:
        if size not in IMAGE_SIZES:
            raise InputError(f"image size is {size}, expected a multiple of {PIXELS} in 32 .. {IMAGE_SIZES[-1]} pixels")
    pairs = list(PAPER_GMACS)
    if models or image_sizes:
        names = models or [name for name, _ in pairs]
        pairs = [(name, size) for size in image_sizes or PAPER_LENGTHS for name in names]
    return [_row(name, size, mean_length, entropy_model) for name, size in dict.fromkeys(pairs)]


def sampling_costs(row: CostRow) -> list[SamplingCost]:
    """Sampling costs of a model: one, or one per boundary source for a model on patches."""
    alone = row.cost.sampling
    if row.patches is None:
        return [_sampling_cost(row, None, alone)]
    return [_sampling_cost(row, source, alone + added) for source, added in row.patches.boundaries.items()]


def as_json(row: CostRow) -> dict[str, Any]:
    """The row as JSON: MACs per image, and percentages."""
    patches = row.patches
    return {
        "model": row.model,
        "image_size": row.image_size,
        "mean_length": patches and patches.mean_length,
        "mean_length_source": patches and patches.length_source,
        "parameters": row.cost.parameters,
        "forward": asdict(row.cost.forward),
        "saved_percent": row.saved_percent,
        "training": asdict(row.cost.training),
        "paper_gmacs": row.paper_gmacs,
        "paper_difference_percent": row.paper_difference_percent,
        "sampling": [asdict(sampling) for sampling in sampling_costs(row)],
    }


def _sampling_cost(row: CostRow, boundaries: str | None, sampling: Sampling) -> SamplingCost:
    guided, llamagen = sampling.macs(guided=True), row.llamagen
    return SamplingCost(
        boundaries=boundaries,
        plain=sampling.macs(guided=False),
        guided=guided,
        layer_calls=sampling.layer_calls,
        saved_percent=None if llamagen is None else _saved_percent(guided, llamagen.sampling.macs(guided=True)),
    )


def _saved_percent(macs: Macs, of: Macs) -> float:
    return 100 * (1 - macs.linear / of.linear)


def _row(name: str, image_size: int, mean_length: float | None, entropy_model: str) -> CostRow:
    family, _, size = name.partition("-")
    request = CostRequest(size=size, image_size=image_size, mean_length=mean_length, entropy_model=entropy_model)
    counted = FAMILY_COSTS[family]
    cost, patches = counted.count(request)
    baseline = None if counted.baseline is None else gpt_cost(counted.baseline(size), request.num_tokens, CLASSES)
    has_paper_length = patches is None or patches.mean_length == PAPER_LENGTHS.get(image_size)
    return CostRow(
        model=name,
        image_size=image_size,
        cost=cost,
        llamagen=baseline,
        patches=patches,
        paper_gmacs=PAPER_GMACS.get((name, image_size)) if has_paper_length else None,
    )
