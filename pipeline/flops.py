"""What the paper's models and their rivals cost, beside what the paper says. torch is imported only to count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from conf.model_stages import BoundarySource
from models.config import DPAR_SIZES, GPT_SIZES, DPARConfig, GPTConfig, NextPatchSchedule
from stages.errors import InputError

if TYPE_CHECKING:
    from models.macs import Cost, DPARCost, Macs, Sampling

CODEBOOK, CLASSES, PIXELS = 16384, 1000, 16  # of LlamaGen's tokenizer, of ImageNet, of a token's side
EPOCHS = 300  # of NPP's training: its levels end with whole ones
MODELS = (
    *(f"{family}-{name}" for family in ("llamagen", "npp") for name in GPT_SIZES),
    *(f"dpar-{name}" for name in DPAR_SIZES),
)
ENTROPY_MODELS = ("B", "T")
PAPER_LENGTHS = {256: 1.81, 384: 2.06}
EXTRAPOLATED_LENGTHS = {128: 1.38, 512: 2.24}  # by a straight line through the paper's over the logarithm of the size
IMAGE_SIZES = range(2 * PIXELS, 1024 + 1, PIXELS)
LengthSource = Literal["paper", "extrapolated", "given"]
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
"""Forward, linear layers alone, at the paper's mean lengths (supplement, table S1, there called GFLOPs)."""


@dataclass(frozen=True, kw_only=True)
class PatchCost:
    """What only a model on patches has.

    Attributes:
        mean_length: Tokens a patch.
        length_source: Whose number that is.
        boundaries: What each way to decide where patches start adds to the model's own sampling.
    """

    mean_length: float
    length_source: LengthSource
    boundaries: Mapping[BoundarySource, Sampling]


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """One model at one image size.

    Attributes:
        model: As in `MODELS`.
        image_size: Pixels of a side.
        cost: Of the model.
        llamagen: Cost of LlamaGen of the same size at the same image size; None for LlamaGen itself.
        patches: None for a model on tokens.
        paper_gmacs: The paper's number for the linear layers of a forward; None where it has none.
    """

    model: str
    image_size: int
    cost: Cost
    llamagen: Cost | None
    patches: PatchCost | None
    paper_gmacs: float | None

    @property
    def paper_difference_percent(self) -> float | None:
        """Of ours to the paper's number."""
        return None if self.paper_gmacs is None else 100 * (self.cost.forward.linear / (1e9 * self.paper_gmacs) - 1)

    @property
    def saved_percent(self) -> float | None:
        """Linear MACs of a forward that LlamaGen needs more, of LlamaGen's; None for LlamaGen itself."""
        return None if self.llamagen is None else _saved_percent(self.cost.forward, self.llamagen.forward)


@dataclass(frozen=True, kw_only=True)
class SamplingCost:
    """What it costs to draw one image with caches.

    Attributes:
        boundaries: What decides where patches start; static: nothing must be computed. None for a model on tokens.
        plain: Without guidance.
        guided: With classifier-free guidance.
        saved_percent: Linear MACs that LlamaGen needs more, both guided, of LlamaGen's; None for LlamaGen itself.
    """

    boundaries: BoundarySource | None
    plain: Macs
    guided: Macs
    saved_percent: float | None


def measure(
    models: Sequence[str] = (),
    image_sizes: Sequence[int] = (),
    mean_length: float | None = None,
    entropy_model: str = "B",
) -> list[CostRow]:
    """Count models at image sizes; by default those that the paper has numbers of.

    Args:
        models: Of `MODELS`; none for those of the paper.
        image_sizes: Pixels; none for those of the paper.
        mean_length: Tokens a patch; None for the paper's, or at 128 and 512 px one extrapolated from them.
        entropy_model: Of `ENTROPY_MODELS`.

    Raises:
        InputError: A name that is not there, or a size or length that is not possible.
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
    """Sampling; of a model on patches, by each way to decide where they start."""
    drawn = row.cost.sampling
    if row.patches is None:
        return [_sampling_cost(row, None, drawn)]
    return [_sampling_cost(row, source, drawn + added) for source, added in row.patches.boundaries.items()]


def as_json(row: CostRow) -> dict[str, Any]:
    """The row as plain numbers: MACs an image, percent."""
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


def _sampling_cost(row: CostRow, boundaries: BoundarySource | None, sampling: Sampling) -> SamplingCost:
    guided, llamagen = sampling.macs(guided=True), row.llamagen
    return SamplingCost(
        boundaries=boundaries,
        plain=sampling.macs(guided=False),
        guided=guided,
        saved_percent=None if llamagen is None else _saved_percent(guided, llamagen.sampling.macs(guided=True)),
    )


def _saved_percent(macs: Macs, of: Macs) -> float:
    return 100 * (1 - macs.linear / of.linear)


def _row(name: str, size: int, mean_length: float | None, entropy_model: str) -> CostRow:
    family, _, kind = name.partition("-")
    num_tokens = (size // PIXELS) ** 2
    llamagen = _gpt(kind.partition("-")[0], num_tokens, CLASSES)
    paper = PAPER_GMACS.get((name, size))
    if family == "llamagen":
        return CostRow(model=name, image_size=size, cost=llamagen, llamagen=None, patches=None, paper_gmacs=paper)
    if family == "npp":
        cost = _npp(kind, size)
        return CostRow(model=name, image_size=size, cost=cost, llamagen=llamagen, patches=None, paper_gmacs=paper)
    length, source = _length(size, mean_length)
    dpar = _dpar(kind, num_tokens, length)
    patches = PatchCost(
        mean_length=length,
        length_source=source,
        boundaries=_boundaries(dpar, _dpar_config(kind, num_tokens), _gpt(entropy_model, num_tokens, None)),
    )
    if length != PAPER_LENGTHS.get(size):
        paper = None  # it is one at the paper's patch length
    return CostRow(model=name, image_size=size, cost=dpar, llamagen=llamagen, patches=patches, paper_gmacs=paper)


def _boundaries(dpar: DPARCost, config: DPARConfig, entropy_model: Cost) -> dict[BoundarySource, Sampling]:
    from models.macs import Sampling, head_sampling

    return {
        "static": Sampling(),
        "entropy_head": head_sampling(config),
        "entropy_model": entropy_model.sampling,
        "own_entropy": dpar.own_entropy,
    }


def _length(size: int, given: float | None) -> tuple[float, LengthSource]:
    if given is not None:
        return given, "given"
    if size in PAPER_LENGTHS:
        return PAPER_LENGTHS[size], "paper"
    if size in EXTRAPOLATED_LENGTHS:
        return EXTRAPOLATED_LENGTHS[size], "extrapolated"
    raise InputError(f"the mean patch length at {size} pixels is not known, expected one: add --mean-length")


@cache
def _gpt(kind: str, num_tokens: int, num_classes: int | None) -> Cost:
    from models.macs import gpt_cost

    return gpt_cost(_gpt_config(kind, num_tokens, num_classes))


def _npp(kind: str, image_size: int) -> Cost:
    from models.macs import npp_cost

    schedule = NextPatchSchedule()
    block = schedule.sides[0] * PIXELS
    if image_size % block:
        raise InputError(
            f"image size is {image_size}, expected a multiple of {block} pixels for NPP, the side of its largest blocks"
        )
    return npp_cost(_gpt_config(kind, (image_size // PIXELS) ** 2, CLASSES), schedule, EPOCHS)


def _gpt_config(kind: str, num_tokens: int, num_classes: int | None) -> GPTConfig:
    size = asdict(GPT_SIZES[kind])
    return GPTConfig(**size, codebook_size=CODEBOOK, num_tokens=num_tokens, num_classes=num_classes)


def _dpar_config(kind: str, num_tokens: int) -> DPARConfig:
    size = asdict(DPAR_SIZES[kind])
    return DPARConfig(**size, codebook_size=CODEBOOK, num_tokens=num_tokens, num_classes=CLASSES)


def _dpar(kind: str, num_tokens: int, mean_length: float) -> DPARCost:
    from models.macs import dpar_cost

    try:
        return dpar_cost(_dpar_config(kind, num_tokens), mean_length)
    except ValueError as error:
        raise InputError(str(error)) from error
