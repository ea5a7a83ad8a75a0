"""MACs of each model family for one image. torch is imported only when counting.

These costs are kept outside `stages`, where they would enter the keys of trained models and samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from conf.train import DPARSettings, LlamaGenSettings, NPPSettings, for_every_family
from models.config import (
    DPAR_SIZES,
    GPT_SIZES,
    DPARConfig,
    DPARSize,
    GPTConfig,
    GPTSize,
    NextPatchSchedule,
)
from pipeline.bench.boundary_costs import BOUNDARY_COSTS, SampledModels
from stages.runtime.errors import InputError

if TYPE_CHECKING:
    from models.macs import Cost, DPARCost, Sampling

CODEBOOK, CLASSES, PIXELS = 16384, 1000, 16  # LlamaGen's tokenizer; ImageNet; side of a token
EPOCHS = 300  # of NPP's training; each level is a whole number of epochs
PAPER_LENGTHS = {256: 1.81, 384: 2.06}
EXTRAPOLATED_LENGTHS = {128: 1.38, 512: 2.24}  # line through the paper's two, over log size
LengthSource = Literal["paper", "extrapolated", "given"]


@dataclass(frozen=True, kw_only=True)
class CostRequest:
    """A model and an image size to count.

    Attributes:
        size: Name of the model size.
        image_size: Side of the image, pixels.
        mean_length: Mean patch length in tokens; None for the paper's. Models on tokens ignore it.
        entropy_model: Name of the size of the entropy model.
    """

    size: str
    image_size: int
    mean_length: float | None
    entropy_model: str

    @property
    def num_tokens(self) -> int:
        """Tokens per image."""
        return int((self.image_size // PIXELS) ** 2)


@dataclass(frozen=True, kw_only=True)
class PatchCost:
    """Costs that only a model on patches has.

    Attributes:
        mean_length: Mean patch length, tokens.
        length_source: Origin of `mean_length`.
        boundaries: Sampling cost added by each boundary source.
    """

    mean_length: float
    length_source: LengthSource
    boundaries: Mapping[str, Sampling]


@dataclass(frozen=True, kw_only=True)
class FamilyCost:
    """How to count the models of a family.

    Attributes:
        sizes: Names of its model sizes.
        baseline: Maps a size to the LlamaGen size it is compared with; None for LlamaGen itself.
        count: Returns the cost of a model, and the costs of patches if it has patches.
        size: Returns width and depth of the model in a family's section of the settings; its memory follows from them.
        trained: Returns the cost of the model in a family's section of the settings. Further arguments: codebook size,
            tokens of an image and number of classes by name, and the mean patch length.
        note: Note on its rows in the training table; None if the general note is enough.
    """

    sizes: tuple[str, ...]
    baseline: Callable[[str], str] | None
    count: Callable[[CostRequest], tuple[Cost, PatchCost | None]]
    size: Callable[[Any], GPTSize | DPARSize]
    trained: Callable[[Any, Mapping[str, int], float], Cost]
    note: str | None


@cache
def gpt_cost(size: str, num_tokens: int, num_classes: int | None) -> Cost:
    """Cost of LlamaGen, or of the entropy model if `num_classes` is None."""
    from models import macs

    return macs.gpt_cost(_gpt_config(size, num_tokens, num_classes))


def _llamagen(request: CostRequest) -> tuple[Cost, None]:
    return gpt_cost(request.size, request.num_tokens, CLASSES), None


def _npp(request: CostRequest) -> tuple[Cost, None]:
    from models.macs import npp_cost

    schedule = NextPatchSchedule()
    block = schedule.sides[0] * PIXELS
    if request.image_size % block:
        raise InputError(
            f"image size is {request.image_size}, expected a multiple of {block} pixels for NPP, the side of its "
            "largest blocks"
        )
    return npp_cost(_gpt_config(request.size, request.num_tokens, CLASSES), schedule, EPOCHS), None


def _dpar(request: CostRequest) -> tuple[DPARCost, PatchCost]:
    from models.macs import dpar_cost

    length, source = _length(request)
    config = DPARConfig(**_token_fields(request.num_tokens), **asdict(DPAR_SIZES[request.size]), num_classes=CLASSES)
    try:
        cost = dpar_cost(config, length)
    except ValueError as error:
        raise InputError(str(error)) from error
    sampled = SampledModels(
        config=config, cost=cost, entropy_model=gpt_cost(request.entropy_model, request.num_tokens, None)
    )
    boundaries = {name: added(sampled) for name, added in BOUNDARY_COSTS.items()}
    return cost, PatchCost(mean_length=length, length_source=source, boundaries=boundaries)


def _size(config: LlamaGenSettings | DPARSettings) -> GPTSize | DPARSize:
    return config.model


def _trained_llamagen(config: LlamaGenSettings, tokens: Mapping[str, int], length: float) -> Cost:
    from models import macs

    return macs.gpt_cost(GPTConfig(**asdict(config.model), **tokens))


def _trained_npp(config: NPPSettings, tokens: Mapping[str, int], length: float) -> Cost:
    from models.macs import npp_cost

    return npp_cost(GPTConfig(**asdict(config.model), **tokens), config.npp, config.training.steps)


def _trained_dpar(config: DPARSettings, tokens: Mapping[str, int], length: float) -> Cost:
    from models.macs import dpar_cost

    shape = DPARConfig(**asdict(config.model), position_embedding=config.position_embedding, **tokens)
    return dpar_cost(shape, length)


def _length(request: CostRequest) -> tuple[float, LengthSource]:
    size = request.image_size
    if request.mean_length is not None:
        return request.mean_length, "given"
    if size in PAPER_LENGTHS:
        return PAPER_LENGTHS[size], "paper"
    if size in EXTRAPOLATED_LENGTHS:
        return EXTRAPOLATED_LENGTHS[size], "extrapolated"
    raise InputError(f"the mean patch length at {size} pixels is not known, expected a value: add --mean-length")


def _gpt_config(size: str, num_tokens: int, num_classes: int | None) -> GPTConfig:
    return GPTConfig(**_token_fields(num_tokens), **asdict(GPT_SIZES[size]), num_classes=num_classes)


def _token_fields(num_tokens: int) -> dict[str, Any]:
    return {"codebook_size": CODEBOOK, "num_tokens": num_tokens}


# Notes are wrapped by hand at 80 columns, the width of the tables.
FAMILY_COSTS: dict[str, FamilyCost] = for_every_family(
    {
        "llamagen": FamilyCost(
            sizes=tuple(GPT_SIZES), baseline=None, count=_llamagen, size=_size, trained=_trained_llamagen, note=None
        ),
        "npp": FamilyCost(
            sizes=tuple(GPT_SIZES),
            baseline=lambda size: size,
            count=_npp,
            size=_size,
            trained=_trained_npp,
            note="""\
npp: LlamaGen trained by Next Patch Prediction, half of its steps on blocks of
2 x 2 tokens. linear, attn: mean over its training steps. Its paper (arXiv
2412.15321) reports about 0.6 of LlamaGen's training cost, i.e. 40% saved.""",
        ),
        "dpar": FamilyCost(
            sizes=tuple(DPAR_SIZES),
            baseline=lambda size: size.partition("-")[0],
            count=_dpar,
            size=_size,
            trained=_trained_dpar,
            note=None,
        ),
    }
)
"""How each family is counted, in the order of the tables."""
