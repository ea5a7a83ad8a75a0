"""What a model of each family costs for one image. torch is imported only to count.

Costs are in no table of `stages`: there they would be in the keys of trainings and samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from conf.train import for_every_family
from models.config import DPAR_SIZES, GPT_SIZES, DPARConfig, GPTConfig, NextPatchSchedule
from pipeline.bench.boundary_costs import BOUNDARY_COSTS, Sampled
from stages.runtime.errors import InputError

if TYPE_CHECKING:
    from models.macs import Cost, DPARCost, Sampling

CODEBOOK, CLASSES, PIXELS = 16384, 1000, 16  # of LlamaGen's tokenizer, of ImageNet, of a token's side
EPOCHS = 300  # of NPP's training: its levels end with whole ones
PAPER_LENGTHS = {256: 1.81, 384: 2.06}
EXTRAPOLATED_LENGTHS = {128: 1.38, 512: 2.24}  # by a straight line through the paper's over the logarithm of the size
LengthSource = Literal["paper", "extrapolated", "given"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is counted.

    Attributes:
        size: Name of the model's size.
        image_size: Pixels of a side.
        mean_length: Tokens a patch, for a model on patches; None for the paper's.
        entropy_model: Name of the entropy model's size.
    """

    size: str
    image_size: int
    mean_length: float | None
    entropy_model: str

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return int((self.image_size // PIXELS) ** 2)


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
    boundaries: Mapping[str, Sampling]


@dataclass(frozen=True, kw_only=True)
class FamilyCost:
    """How a family is counted.

    Attributes:
        sizes: Names of its sizes.
        baseline: Size of the LlamaGen that a size is compared with; None for LlamaGen itself.
        count: Cost of a model, and what it has only on patches.
        note: How to read its rows beside a training table; None where the general note says all.
    """

    sizes: tuple[str, ...]
    baseline: Callable[[str], str] | None
    count: Callable[[Question], tuple[Cost, PatchCost | None]]
    note: str | None


@cache
def gpt_cost(size: str, num_tokens: int, num_classes: int | None) -> Cost:
    """LlamaGen, or without classes the entropy model."""
    from models import macs

    return macs.gpt_cost(_gpt_config(size, num_tokens, num_classes))


def _llamagen(asked: Question) -> tuple[Cost, None]:
    return gpt_cost(asked.size, asked.num_tokens, CLASSES), None


def _npp(asked: Question) -> tuple[Cost, None]:
    from models.macs import npp_cost

    schedule = NextPatchSchedule()
    block = schedule.sides[0] * PIXELS
    if asked.image_size % block:
        raise InputError(
            f"image size is {asked.image_size}, expected a multiple of {block} pixels for NPP, the side of its largest "
            "blocks"
        )
    return npp_cost(_gpt_config(asked.size, asked.num_tokens, CLASSES), schedule, EPOCHS), None


def _dpar(asked: Question) -> tuple[DPARCost, PatchCost]:
    from models.macs import dpar_cost

    length, source = _length(asked)
    config = DPARConfig(**_of_tokens(asked.num_tokens), **asdict(DPAR_SIZES[asked.size]), num_classes=CLASSES)
    try:
        cost = dpar_cost(config, length)
    except ValueError as error:
        raise InputError(str(error)) from error
    sampled = Sampled(config=config, cost=cost, entropy_model=gpt_cost(asked.entropy_model, asked.num_tokens, None))
    boundaries = {name: added(sampled) for name, added in BOUNDARY_COSTS.items()}
    return cost, PatchCost(mean_length=length, length_source=source, boundaries=boundaries)


def _length(asked: Question) -> tuple[float, LengthSource]:
    size = asked.image_size
    if asked.mean_length is not None:
        return asked.mean_length, "given"
    if size in PAPER_LENGTHS:
        return PAPER_LENGTHS[size], "paper"
    if size in EXTRAPOLATED_LENGTHS:
        return EXTRAPOLATED_LENGTHS[size], "extrapolated"
    raise InputError(f"the mean patch length at {size} pixels is not known, expected one: add --mean-length")


def _gpt_config(size: str, num_tokens: int, num_classes: int | None) -> GPTConfig:
    return GPTConfig(**_of_tokens(num_tokens), **asdict(GPT_SIZES[size]), num_classes=num_classes)


def _of_tokens(num_tokens: int) -> dict[str, Any]:
    return {"codebook_size": CODEBOOK, "num_tokens": num_tokens}


# Notes are broken by hand: a pipe has no width to wrap them at, and 80 columns are the narrowest that the tables fit.
FAMILY_COSTS: dict[str, FamilyCost] = for_every_family(
    {
        "llamagen": FamilyCost(sizes=tuple(GPT_SIZES), baseline=None, count=_llamagen, note=None),
        "npp": FamilyCost(
            sizes=tuple(GPT_SIZES),
            baseline=lambda size: size,
            count=_npp,
            note="""\
npp: LlamaGen trained by Next Patch Prediction, half of its steps on blocks of
2 x 2 tokens; linear, attn: of its mean forward. Its own paper (arXiv 2412.15321)
says a training of about 0.6 of LlamaGen's, so about 40% saved.""",
        ),
        "dpar": FamilyCost(
            sizes=tuple(DPAR_SIZES), baseline=lambda size: size.partition("-")[0], count=_dpar, note=None
        ),
    }
)
"""In the order of the tables."""
