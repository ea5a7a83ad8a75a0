"""What the benchmarks of sampling share: models with random weights, and samplers that draw a token at each call.

bfloat16 weights and classifier-free guidance, as in use. Boundaries are given, at the paper's mean patch length; where
an entropy model counts, it runs beside them for what it costs, because random weights would cut anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.config import DPAR_SIZES, GPT_SIZES, DPARConfig, GPTConfig
from models.dpar import DPAR
from models.gpt import GPT, token_entropy
from models.packed_linear import pack_linear_layers
from models.patching import PatchRule, patch_starts
from models.sampling import DPARDecoding, GivenBoundaries, GPTDecoding, SamplingOptions, draw

CODES, CLASSES = 16384, 1000
GUIDED = SamplingOptions(cfg_scale=2.0)
_GROWTH, _WINDOW = 32, 8
Model = TypeVar("Model", GPT, DPAR)


@dataclass(frozen=True)
class Grid:
    """Images of `side` x `side` tokens, and the paper's mean patch length for them."""

    side: int
    mean_length: float

    @property
    def num_tokens(self) -> int:
        """Of an image."""
        return self.side**2


GRIDS = {256: Grid(16, 1.81), 384: Grid(24, 2.06)}  # by pixels


def gpt(size: str, grid: Grid = GRIDS[256], *, conditional: bool = True) -> GPT:
    """A transformer with random weights, its head too."""
    torch.manual_seed(0)
    num_classes = CLASSES if conditional else None
    config = GPTConfig(
        **asdict(GPT_SIZES[size]), codebook_size=CODES, num_tokens=grid.num_tokens, num_classes=num_classes
    )
    model = GPT(config)
    nn.init.normal_(model.output.weight, std=0.02)
    return model.bfloat16().eval()


def dpar(size: str, grid: Grid = GRIDS[256]) -> DPAR:
    """The same for DPAR."""
    torch.manual_seed(0)
    config = DPARConfig(
        **asdict(DPAR_SIZES[size]), codebook_size=CODES, num_tokens=grid.num_tokens, num_classes=CLASSES
    )
    model = DPAR(config)
    nn.init.normal_(model.output.weight, std=0.02)
    return model.bfloat16().eval()


def packed(model: Model) -> Model:
    """The model, ready to draw as stage `sample` makes it."""
    pack_linear_layers(model)
    return model


def ragged_starts(batch: int, grid: Grid = GRIDS[256]) -> Tensor:
    """Boundaries (B, T) of the grid's mean patch length, other ones in each image."""
    entropies = torch.rand(batch, grid.num_tokens, generator=torch.Generator().manual_seed(0))
    candidates = (patch_starts(PatchRule(th / 500, 4, True, grid.side), entropies) for th in range(500))
    wanted = batch * (grid.num_tokens - 1) / grid.mean_length
    return min(candidates, key=lambda starts: abs(int(starts[:, :-1].sum()) - wanted))


class Watched:
    """Given boundaries, beside entropy models that run as if they decided them; adds up what each takes."""

    def __init__(self, starts: Tensor, models: Mapping[str, GPT]) -> None:
        self._given, self._models = GivenBoundaries(starts), dict(models)
        self._caches = {name: model.new_cache() for name, model in models.items()}
        self.seconds = dict.fromkeys(models, 0.0)

    def begin(self, batch: int, num_tokens: int) -> None:
        """Start a batch."""
        self._caches = {name: model.new_cache() for name, model in self._models.items()}
        self._given.begin(batch, num_tokens)

    def opens(self, position: int, previous: Tensor, open_lengths: Tensor) -> Tensor:
        """The given answer, after the entropies that were asked for."""
        for name, model in self._models.items():
            start = time.perf_counter()
            token_entropy(model.step(model.tok_embeddings(previous), position - 1, self._caches[name]))
            self.seconds[name] += time.perf_counter() - start
        return self._given.opens(position, previous, open_lengths)


class Decoder:
    """Draws the next token of every image at each step."""

    def __init__(self, decoding: GPTDecoding | DPARDecoding, starts: Tensor | None = None) -> None:
        self._decoding, self._starts = decoding, starts
        self.batch = len(decoding.labels) // 2
        self._uniforms = torch.rand(self.batch, decoding.model.config.num_tokens)
        self._last: Tensor | None = None

    def step(self) -> Tensor:
        """Tokens (B,)."""
        place = self._decoding.position
        self._last = draw(self._decoding.step(self._last), self._uniforms[:, place], GUIDED)
        return self._last

    def skip_to(self, position: int) -> None:
        """Go on at `position`, as if all before it had been drawn."""
        if self._last is None:
            self.step()
        self._decoding.position = position
        if isinstance(self._decoding, DPARDecoding):
            assert self._starts is not None
            before = self._starts[:, :position]
            self._decoding.num_patches = before.sum(dim=1) - 1
            self._decoding.open_lengths = position - before.long().cumsum(dim=1).argmax(dim=1)


def llamagen_decoder(model: GPT, batch: int) -> Decoder:
    """Of LlamaGen."""
    return Decoder(GPTDecoding(model, torch.arange(batch), GUIDED))


def dpar_decoder(model: DPAR, starts: Tensor, entropy_models: Mapping[str, GPT] | None = None) -> Decoder:
    """Of DPAR."""
    boundaries = Watched(starts, entropy_models or {})
    return Decoder(DPARDecoding(model, torch.arange(len(starts)), GUIDED, boundaries), starts)


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def seconds_an_image(decoders: Mapping[str, Decoder], num_tokens: int) -> dict[str, float]:
    """Seconds that each decoder takes for an image, from windows of positions, in turns at each.

    Every fourth position is timed, in windows of eight that lie evenly in the blocks of 32 by which caches grow: their
    growth counts as often as it happens. Between windows decoders are set ahead; what they would have drawn is zeros,
    which takes the same time.
    """
    seconds = dict.fromkeys(decoders, 0.0)
    blocks = range(0, num_tokens, _GROWTH)
    for number, block in enumerate(blocks, 1):
        first = block + number * _WINDOW % _GROWTH
        for decoder in decoders.values():
            decoder.skip_to(first - 1)
            decoder.step()
        for _ in range(_WINDOW):
            for name, decoder in decoders.items():
                seconds[name] += seconds_of(decoder.step)
    scale = num_tokens / (_WINDOW * len(blocks))
    return {name: scale * total / decoders[name].batch for name, total in seconds.items()}
