"""What the benchmarks of sampling share: models with random weights, and samplers that draw a token at each call.

bfloat16 weights and classifier-free guidance, as in use. Boundaries are given, at the paper's mean patch length; where
an entropy model counts, it runs beside them for what it costs, because random weights would cut anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
from model_sizes import DPARS, GPTS, codebook_size
from torch import Tensor, nn

from models.boundaries import Boundaries, EntropyBoundaries, GivenBoundaries, HeadBoundaries, NextToken
from models.config import DPARConfig, EntropyHeadConfig, GPTConfig
from models.dpar import DPAR
from models.entropy_head import EntropyHead
from models.gpt import GPT
from models.packed_linear import pack_linear_layers
from models.patching import PatchRule, patch_starts
from models.sampling import DPARDecoding, GPTDecoding
from models.token_sampling import SamplingOptions, sample_token

CLASSES = 1000
GUIDED = SamplingOptions(cfg_scale=2.0)
_STRETCH, _WINDOW = 32, 8
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
TINY_GRID = Grid(8, 1.81)


def grid_of(size: str) -> Grid:
    """Tokens of an image for a model of this size where nothing else is asked for: 256 pixels."""
    return TINY_GRID if size == "tiny" else GRIDS[256]


def gpt(size: str, grid: Grid | None = None, *, conditional: bool = True) -> GPT:
    """A transformer with random weights, its head too."""
    grid = grid or grid_of(size)
    torch.manual_seed(0)
    num_classes = CLASSES if conditional else None
    config = GPTConfig(
        **asdict(GPTS[size]), codebook_size=codebook_size(size), num_tokens=grid.num_tokens, num_classes=num_classes
    )
    model = GPT(config)
    nn.init.normal_(model.output.weight, std=0.02)
    return model.bfloat16().eval()


def dpar(size: str, grid: Grid | None = None) -> DPAR:
    """The same for DPAR."""
    grid = grid or grid_of(size)
    torch.manual_seed(0)
    config = DPARConfig(
        **asdict(DPARS[size]), codebook_size=codebook_size(size), num_tokens=grid.num_tokens, num_classes=CLASSES
    )
    model = DPAR(config)
    nn.init.normal_(model.output.weight, std=0.02)
    return model.bfloat16().eval()


def packed(model: Model) -> Model:
    """The model, ready to draw as stage `sample` makes it."""
    pack_linear_layers(model)
    return model


def ragged_starts(batch: int, grid: Grid) -> Tensor:
    """Boundaries (B, T) of the grid's mean patch length, other ones in each image."""
    entropies = torch.rand(batch, grid.num_tokens, generator=torch.Generator().manual_seed(0))
    candidates = (patch_starts(PatchRule(th / 500, 4, True, grid.side), entropies) for th in range(500))
    wanted = batch * (grid.num_tokens - 1) / grid.mean_length
    return min(candidates, key=lambda starts: abs(int(starts[:, :-1].sum()) - wanted))


class Watched:
    """Given boundaries, beside sources that run as if they decided them; adds up what each takes."""

    def __init__(self, starts: Tensor, sources: Mapping[str, Boundaries] | None = None) -> None:
        self.starts, self._sources = starts, dict(sources or {})
        self._given = GivenBoundaries(starts)
        self.seconds = dict.fromkeys(self._sources, 0.0)

    def begin(self, batch: int, num_tokens: int) -> None:
        """Start a batch."""
        for boundaries in (self._given, *self._sources.values()):
            boundaries.begin(batch, num_tokens)

    def opens(self, token: NextToken) -> Tensor:
        """The given answer, after those that were asked for."""
        for name, source in self._sources.items():
            start = time.perf_counter()
            source.opens(token)
            self.seconds[name] += time.perf_counter() - start
        return self._given.opens(token)


def entropy_model(size: str, grid: Grid | None = None) -> EntropyBoundaries:
    """An entropy model as a source of boundaries."""
    grid = grid or grid_of(size)
    return EntropyBoundaries(packed(gpt(size, grid, conditional=False)), PatchRule(0.5, 4, True, grid.side))


def entropy_head(model: DPAR) -> HeadBoundaries:
    """An entropy head on the model's encoder as a source of boundaries."""
    torch.manual_seed(0)
    head = EntropyHead(EntropyHeadConfig.of(model.config, "block")).bfloat16().eval()
    pack_linear_layers(head)
    return HeadBoundaries(head, PatchRule(0.5, 4, True, model.config.grid))


class Decoder:
    """Draws the next token of every image at each step.

    Its caches have all their memory before the first step that is timed: what a system takes to hand out gigabytes
    differs from one to the next by a factor of six.
    """

    def __init__(self, decoding: GPTDecoding | DPARDecoding) -> None:
        self.batch, self.draw_seconds = len(decoding.labels) // 2, 0.0
        self._decoding = decoding
        self._uniforms = torch.rand(self.batch, decoding.model.config.num_tokens)
        self._last: Tensor | None = None
        self.skip_to(decoding.model.config.num_tokens - 1)
        self.step()
        self._start_again()

    def step(self) -> Tensor:
        """Tokens (B,)."""
        uniforms = self._uniforms[:, self._decoding.position]
        logits = self._decoding.step(self._last)
        start = time.perf_counter()
        self._last = sample_token(logits, uniforms, GUIDED)
        self.draw_seconds += time.perf_counter() - start
        return self._last

    def skip_to(self, position: int) -> None:
        """Go on at `position`, as if all before it had been drawn."""
        if self._last is None:
            self.step()
        self._decoding.position = position
        if isinstance(self._decoding, DPARDecoding):
            assert isinstance(self._decoding.boundaries, Watched)
            before = self._decoding.boundaries.starts[:, :position]
            self._decoding.num_patches = before.sum(dim=1) - 1
            self._decoding.open_lengths = position - before.long().cumsum(dim=1).argmax(dim=1)

    def _start_again(self) -> None:
        self._last, self._decoding.position = None, 0
        if isinstance(self._decoding, DPARDecoding):
            self._decoding.num_patches = torch.zeros_like(self._decoding.num_patches)
            self._decoding.open_lengths = torch.zeros_like(self._decoding.open_lengths)


def llamagen_decoder(model: GPT, batch: int) -> Decoder:
    """Of LlamaGen."""
    return Decoder(GPTDecoding(model, torch.arange(batch), GUIDED))


def dpar_decoder(model: DPAR, boundaries: Watched) -> Decoder:
    """Of DPAR."""
    return Decoder(DPARDecoding(model, torch.arange(len(boundaries.starts)), GUIDED, boundaries))


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def windows(decoders: Collection[Decoder], num_tokens: int) -> Iterator[None]:
    """Every fourth position, in windows of eight; the decoders stand before it.

    Each lies elsewhere in its stretch of 32, so that starts of rows, where all patches close, count as often as they
    happen. Between windows decoders are set ahead: what they would have drawn is zeros, which takes the same time.
    """
    for number, first in enumerate(range(0, num_tokens, _STRETCH), 1):
        for decoder in decoders:
            decoder.skip_to(first + number * _WINDOW % _STRETCH - 1)
            decoder.step()
        for _ in range(_WINDOW):
            yield


def seconds_an_image(decoders: Mapping[str, Decoder], num_tokens: int) -> dict[str, float]:
    """Seconds that each decoder takes for an image, in turns at every position that is timed."""
    seconds, timed = dict.fromkeys(decoders, 0.0), 0
    for _ in windows(decoders.values(), num_tokens):
        timed += 1
        for name, decoder in decoders.items():
            seconds[name] += seconds_of(decoder.step)
    return {name: num_tokens * total / timed / decoders[name].batch for name, total in seconds.items()}
