"""What the benchmarks of sampling share: models with random weights, and samplers that draw a token at each call.

Weights are bfloat16 where oneDNN multiplies it, else float32, and images are guided, as in use. Boundaries are given,
at the paper's mean patch length; where an entropy model counts, it runs beside them for what it costs, because random
weights would cut anywhere.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import torch
from lockstep import Deciding, DPARDecoding, GPTDecoding
from model_sizes import DPARS, GPTS, codebook_size
from torch import Tensor, nn

from models.boundaries import Boundaries, EntropyBoundaries, GivenBoundaries, HeadBoundaries, NextTokens
from models.canvas import Canvas
from models.config import DPARConfig, EntropyHeadConfig, GPTConfig
from models.dpar import DPAR
from models.dpar_steps import GLOBAL, TOKEN, DPARSteps
from models.entropy_head import EntropyHead
from models.gpt import GPT
from models.gpt_steps import GPTSteps
from models.packed_linear import pack_linear_layers
from models.patching import PatchRule, patch_starts
from models.sampling import Sampling
from models.token_sampling import SamplingOptions, sample_token

CLASSES = 1000
GUIDED = SamplingOptions(cfg_scale=2.0)
DTYPE = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
_STRETCH, _WINDOW = 32, 8
_ROWS = 16
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
    return model.to(DTYPE).eval()


def dpar(size: str, grid: Grid | None = None) -> DPAR:
    """The same for DPAR."""
    grid = grid or grid_of(size)
    torch.manual_seed(0)
    config = DPARConfig(
        **asdict(DPARS[size]), codebook_size=codebook_size(size), num_tokens=grid.num_tokens, num_classes=CLASSES
    )
    model = DPAR(config)
    nn.init.normal_(model.output.weight, std=0.02)
    return model.to(DTYPE).eval()


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


def many_starts(batch: int, grid: Grid) -> Tensor:
    """The same for as many images as `OwnClocks` needs: twice a batch in flight, and those that come after them."""
    return ragged_starts(2 * batch + 2 * max(batch, _ROWS), grid)


class Watched(GivenBoundaries):
    """Given boundaries, beside sources that run as if they decided them; adds up what each takes."""

    def __init__(self, starts: Tensor, sources: Mapping[str, Boundaries] | None = None) -> None:
        super().__init__(starts)
        self.sources = dict(sources or {})
        self.seconds = dict.fromkeys(self.sources, 0.0)

    def begin(self, slots: int, num_images: int, num_tokens: int) -> None:
        """Start a batch."""
        super().begin(slots, num_images, num_tokens)
        for source in self.sources.values():
            source.begin(slots, num_images, num_tokens)

    def opens(self, tokens: NextTokens) -> Tensor:
        """The given answer, after those that were asked for."""
        for name, source in self.sources.items():
            start = time.perf_counter()
            source.opens(tokens)
            self.seconds[name] += time.perf_counter() - start
        return super().opens(tokens)

    def in_lockstep(self) -> Deciding:
        """The same for the lockstep sampler."""
        return WatchedInLockstep(self, self.sources)


class WatchedInLockstep(Deciding):
    """The given answer, after those of other sources."""

    def __init__(self, given: GivenBoundaries, sources: Mapping[str, Boundaries]) -> None:
        super().__init__(given)
        self._sources = [Deciding(source) for source in sources.values()]

    def opens(self, *asked: Any) -> Tensor:
        """The given answer."""
        for source in self._sources:
            source.opens(*asked)
        return super().opens(*asked)


def entropy_model(size: str, grid: Grid | None = None) -> EntropyBoundaries:
    """An entropy model as a source of boundaries."""
    grid = grid or grid_of(size)
    return EntropyBoundaries(packed(gpt(size, grid, conditional=False)), PatchRule(0.5, 4, True, grid.side))


def entropy_head(model: DPAR) -> HeadBoundaries:
    """An entropy head on the model's encoder as a source of boundaries."""
    torch.manual_seed(0)
    head = EntropyHead(EntropyHeadConfig.of(model.config, "block")).to(DTYPE).eval()
    pack_linear_layers(head)
    return HeadBoundaries(head, PatchRule(0.5, 4, True, model.config.grid))


def in_all(whole: float, deciding: Mapping[str, float]) -> dict[str, float]:
    """Seconds with boundaries given, and with each source that ran beside them alone."""
    given = whole - sum(deciding.values())
    return {"boundaries given": given, **{name: given + seconds for name, seconds in deciding.items()}}


class Decoder(Protocol):
    """Draws a token of each image of a batch at every step, or as many of others in flight.

    Attributes:
        repeats: Steps that are timed at each position.
        parts: Seconds that parts of all steps took, by name.
    """

    batch: int
    repeats: int
    parts: Mapping[str, float]

    def step(self) -> None:
        """Draw as many tokens as a batch has images."""

    def skip_to(self, position: int) -> None:
        """Go on at `position`, as if all before it had been drawn."""


class OwnClocks:
    """Images at different positions, as in the midst of a long run, with twice as many in flight as a batch holds.

    Its caches have all their memory before the first step that is timed: what a system takes to hand out gigabytes
    differs from one to the next by a factor of six. With few rows many steps are timed, because the number of patches
    that close in one varies.
    """

    def __init__(self, model: DPAR, boundaries: Watched, batch: int, parts: Mapping[str, float] | None = None) -> None:
        self.batch, num_tokens = batch, model.config.num_tokens
        self.repeats, self.parts = max(1, _ROWS // batch), boundaries.seconds if parts is None else parts
        images = len(boundaries.starts)
        generator = torch.Generator().manual_seed(0)
        labels, uniforms = torch.arange(images) % CLASSES, torch.rand(images, num_tokens, generator=generator)
        canvas = Canvas(labels, uniforms, GUIDED, CLASSES, None)
        self._sampling = Sampling(canvas, DPARSteps, model, boundaries, batch=batch)
        self._owed, self._drawn = 0, 0
        for kind in (GLOBAL, TOKEN):
            self._sampling._tick(kind)
        self._spread(boundaries.starts, generator)

    def step(self) -> None:
        """Tick until a batch of tokens more is drawn, on average over the steps."""
        clocks = self._sampling._clocks
        self._owed += self.batch
        while self._drawn < self._owed:
            kind = clocks.fullest(clocks.waiting.tolist())
            assert kind is not None, "too few images for so many steps"
            images, _ = self._sampling._tick(kind)
            self._drawn += len(images) if kind == TOKEN else 0

    def skip_to(self, position: int) -> None:
        """Do nothing: images are at all positions at all times."""

    def _spread(self, starts: Tensor, generator: torch.Generator) -> None:
        """Put the images in flight at random positions."""
        steps, clocks = self._sampling._steps, self._sampling._clocks
        assert isinstance(steps, DPARSteps)
        slots = len(clocks.images) - 1
        position = torch.randint(1, starts.shape[1], (slots,), generator=generator)
        reached = starts[clocks.images[:-1]] & (torch.arange(starts.shape[1]) <= position[:, None])
        steps.state.position[:-1], steps.state.global_rows[:-1] = position, reached.sum(dim=1)
        steps.state.first[:-1] = torch.where(reached, torch.arange(starts.shape[1]), 0).amax(dim=1)
        clocks._waits[:-1] = TOKEN
        clocks.waiting[TOKEN], clocks.waiting[GLOBAL] = slots, 0


class LlamaGenDecoder:
    """LlamaGen by the sampler: all images are at the same position."""

    def __init__(self, model: GPT, batch: int) -> None:
        self.batch, self.repeats, self.parts = batch, 1, dict[str, float]()
        labels, uniforms = torch.arange(2 * batch) % CLASSES, torch.rand(2 * batch, model.config.num_tokens)
        self._sampling = Sampling(Canvas(labels, uniforms, GUIDED, CLASSES, None), GPTSteps, model, None, batch=batch)
        self.step()
        self.skip_to(0)

    def step(self) -> None:
        """Draw the next token of all images."""
        self._sampling._tick(0)

    def skip_to(self, position: int) -> None:
        """Go on at `position`, as if all before it had been drawn."""
        steps = self._sampling._steps
        assert isinstance(steps, GPTSteps)
        steps._position.fill_(position)


class Lockstep:
    """The sampler that draws all images in lockstep."""

    def __init__(self, decoding: GPTDecoding | DPARDecoding, starts: Tensor) -> None:
        self.batch, self.repeats, self.parts = len(decoding.labels) // 2, 1, dict[str, float]()
        self._decoding, self._starts = decoding, starts[: self.batch]
        self._uniforms = torch.rand(self.batch, decoding.model.config.num_tokens)
        self._last: Tensor | None = None
        self.skip_to(decoding.model.config.num_tokens - 1)
        self.step()
        self._start_again()

    def step(self) -> None:
        """Draw the next token of all images."""
        uniforms = self._uniforms[:, self._decoding.position]
        self._last = sample_token(self._decoding.step(self._last), uniforms, GUIDED)

    def skip_to(self, position: int) -> None:
        """Go on at `position`, as if all before it had been drawn."""
        if self._last is None:
            self.step()
        self._decoding.position = position
        if isinstance(self._decoding, DPARDecoding):
            before = self._starts[:, :position]
            self._decoding.num_patches = before.sum(dim=1) - 1
            self._decoding.open_lengths = position - before.long().cumsum(dim=1).argmax(dim=1)

    def _start_again(self) -> None:
        self._last, self._decoding.position = None, 0
        if isinstance(self._decoding, DPARDecoding):
            self._decoding.num_patches = torch.zeros_like(self._decoding.num_patches)
            self._decoding.open_lengths = torch.zeros_like(self._decoding.open_lengths)


def lockstep_decoder(model: DPAR, boundaries: Watched, batch: int) -> Lockstep:
    """DPAR in lockstep, on the first of the images that have boundaries."""
    first = Watched(boundaries.starts[:batch], boundaries.sources)
    return Lockstep(DPARDecoding(model, torch.arange(batch), GUIDED, first.in_lockstep()), first.starts)


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
    """Seconds that each decoder and its parts take for an image; decoders in turns at every position that is timed."""
    seconds: Counter[str] = Counter()
    timed = 0
    for _ in windows(decoders.values(), num_tokens):
        timed += 1
        for name, decoder in decoders.items():
            steps, before = decoder.repeats * decoder.batch, dict(decoder.parts)
            seconds[name] += sum(seconds_of(decoder.step) for _ in range(decoder.repeats)) / steps
            seconds.update({part: (total - before[part]) / steps for part, total in decoder.parts.items()})
    return {name: num_tokens * total / timed for name, total in seconds.items()}
