"""Counts of multiply-accumulates: closed formulas, the backward pass, and the samplers that really draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.boundaries import EntropyBoundaries, GivenBoundaries, HeadBoundaries
from models.config import DPAR_SIZES, GPT_SIZES, DPARConfig, EntropyHeadConfig, GPTConfig, NextPatchSchedule
from models.dpar import DPAR
from models.entropy_head import EntropyHead
from models.gpt import GPT
from models.macs import dpar_cost, gpt_cost, head_sampling, npp_cost
from models.npp import next_patch_loss
from models.packed_patches import pack_patches
from models.patching import PatchRule, patch_starts
from models.sampling import sample_dpar, sample_gpt
from models.token_sampling import SamplingOptions

pytestmark = pytest.mark.usefixtures("without_shape_checks")  # they cost more than what is counted here

CODES = 16384
IMAGES, GRID, TOKENS = 8, 3, 9
PLAIN, GUIDED = SamplingOptions(), SamplingOptions(cfg_scale=2.5)
HIDDEN = {64: 256, 512: 1536, 768: 2048, 1024: 2816, 1280: 3584}
"""Hidden widths of LlamaGen's feed-forwards."""


def gpt_config(name: str, num_tokens: int, num_classes: int | None = 1000) -> GPTConfig:
    return GPTConfig(**asdict(GPT_SIZES[name]), codebook_size=CODES, num_tokens=num_tokens, num_classes=num_classes)


def dpar_config(name: str, num_tokens: int) -> DPARConfig:
    return DPARConfig(**asdict(DPAR_SIZES[name]), codebook_size=CODES, num_tokens=num_tokens, num_classes=1000)


def small_gpt(num_classes: int | None, num_tokens: int = TOKENS) -> GPTConfig:
    size = {"dim": 64, "num_layers": 2, "num_heads": 4}
    return GPTConfig(**size, codebook_size=40, num_tokens=num_tokens, num_classes=num_classes)


def small_dpar() -> DPARConfig:
    size = {"dim": 64, "num_heads": 4, "encoder_layers": 2, "global_layers": 3, "decoder_layers": 2}
    return DPARConfig(**size, codebook_size=40, num_tokens=TOKENS, num_classes=5)


def block(dim: int) -> int:
    """MACs of one position in the linear layers of a block."""
    return 4 * dim**2 + 3 * dim * HIDDEN[dim]


def dpar_linear(c: DPARConfig, patches: float) -> tuple[float, float]:
    """Linear MACs by formula: what knows no class, and the rest."""
    read, square = c.num_tokens - 1, c.dim**2
    pooling = 2 * square * patches + 2 * square * read
    encoder = c.encoder_layers * (block(c.dim) * read + pooling)
    stack = c.global_layers * block(c.dim) * (patches + 1)
    decoder = c.decoder_layers * (block(c.dim) * c.num_tokens + square * (patches + 1))
    return encoder, stack + decoder + c.codebook_size * c.dim * c.num_tokens


def weighted_rows(table: torch.Size, rows: torch.Size, *_: object, **__: object) -> int:
    """Floating-point operations of sums of weighted rows: on a CPU samplers attend by them."""
    return 2 * rows.numel() * table[1]


def counted(call: Callable[[], Any]) -> tuple[int, int]:
    """Linear and attention MACs of anything, as torch counts them."""
    bags = dict.fromkeys((torch.ops.aten._embedding_bag, torch.ops.aten._embedding_bag_forward_only), weighted_rows)
    with FlopCounterMode(display=False, custom_mapping=bags) as counter:
        call()
    by_op = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    linear = sum(flops for op, flops in by_op.items() if op in ("aten.mm", "aten.addmm"))
    return linear // 2, (sum(by_op.values()) - linear) // 2


@pytest.mark.parametrize(("name", "num_tokens"), [("T", 64), ("B", 256), ("L", 576)])
@pytest.mark.parametrize("num_classes", [1000, None])
def test_a_gpt_costs_what_the_formula_says(name: str, num_tokens: int, num_classes: int | None) -> None:
    config = gpt_config(name, num_tokens, num_classes)
    cost = gpt_cost(config)
    positions = num_tokens - (num_classes is None)
    layers = config.num_layers
    assert cost.forward.linear == positions * (layers * block(config.dim) + CODES * config.dim)
    assert cost.forward.attention == 2 * layers * config.dim * positions**2
    drawn = cost.sampling.macs(guided=False)
    assert drawn.linear == cost.forward.linear
    assert drawn.attention == 2 * layers * config.dim * sum(range(positions + 1))
    guided = cost.sampling.macs(guided=True)
    assert guided == (drawn if num_classes is None else drawn * 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_tokens", "patches"), [("B", 256, 128), ("B", 64, 63), ("L", 576, 250), ("L-E3D2", 64, 40)]
)
def test_dpar_costs_what_the_formula_says(name: str, num_tokens: int, patches: int) -> None:
    config = dpar_config(name, num_tokens)
    length = (num_tokens - 1) / patches
    cost = dpar_cost(config, length)
    assert round(cost.forward.linear) == sum(dpar_linear(config, patches))
    squares = (
        config.encoder_layers * (num_tokens - 1) ** 2
        + config.global_layers * (patches + 1) ** 2
        + config.decoder_layers * num_tokens**2
    )
    assert round(cost.forward.attention) == 2 * config.dim * squares
    unclassed, classed = dpar_linear(config, num_tokens / length - 1)
    assert cost.sampling.macs(guided=False).linear == pytest.approx(unclassed + classed, rel=1e-12)
    assert cost.sampling.macs(guided=True).linear == pytest.approx(unclassed + 2 * classed, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [64, 256])
@pytest.mark.parametrize(
    ("schedule", "steps"),
    [(NextPatchSchedule(), 300), (NextPatchSchedule(levels=3, rate=0.4), 7), (NextPatchSchedule(levels=1), 5)],
)
def test_next_patch_prediction_costs_the_mean_of_its_steps(
    num_tokens: int, schedule: NextPatchSchedule, steps: int
) -> None:
    config = gpt_config("T", num_tokens)
    cost, llamagen = npp_cost(config, schedule, steps), gpt_cost(config)
    positions = [num_tokens // schedule.side(step, steps) ** 2 for step in range(steps)]
    one = config.num_layers * block(config.dim) + CODES * config.dim
    assert cost.forward.linear == pytest.approx(sum(positions) * one / steps, rel=1e-12)
    squares = sum(rows**2 for rows in positions)
    assert cost.forward.attention == pytest.approx(2 * config.num_layers * config.dim * squares / steps, rel=1e-12)
    assert (cost.parameters, cost.sampling) == (llamagen.parameters, llamagen.sampling)


def test_a_grid_without_blocks_of_the_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="a side that divides the grid of 3 x 3"):
        npp_cost(small_gpt(5), NextPatchSchedule(), 300)


@pytest.mark.slow
def test_parameters_are_those_of_the_published_sizes() -> None:
    assert gpt_cost(gpt_config("B", 64)).parameters == 110_888_448
    assert gpt_cost(gpt_config("B", 64, None)).parameters == 110_119_680
    assert dpar_cost(dpar_config("B", 64), 1.5).parameters == 115_021_824


@pytest.mark.slow
def test_a_patch_count_between_two_is_the_mean_of_images_that_have_them() -> None:
    config = small_dpar()
    cost = dpar_cost(config, (TOKENS - 1) / 5.25)
    low, high = (dpar_cost(config, (TOKENS - 1) / patches).forward for patches in (5, 6))
    assert cost.forward.linear == pytest.approx(0.75 * low.linear + 0.25 * high.linear, rel=1e-12)
    assert cost.forward.attention == pytest.approx(0.75 * low.attention + 0.25 * high.attention, rel=1e-12)


@pytest.mark.slow
def test_training_costs_what_its_backward_pass_really_multiplies() -> None:
    starts = torch.zeros(1, TOKENS, dtype=torch.bool)
    starts[0, torch.arange(0, TOKENS - 1, 2)] = True
    meta = torch.device("meta")
    tokens, labels = torch.empty(1, TOKENS, dtype=torch.int64, device=meta), torch.empty(1, dtype=torch.int64).to(meta)
    with meta:
        gpt, dpar = GPT(small_gpt(5)), DPAR(small_dpar())
    found = counted(lambda: gpt.loss(tokens, labels).backward())
    expected = gpt_cost(small_gpt(5)).training
    assert found == (expected.linear, expected.attention)
    found = counted(lambda: dpar.loss(tokens, labels, pack_patches(starts).to(meta)).backward())
    expected = dpar_cost(small_dpar(), 2.0).training
    assert found == (expected.linear, expected.attention)


@pytest.mark.slow
def test_training_by_next_patch_prediction_costs_what_its_steps_really_multiply() -> None:
    schedule, steps = NextPatchSchedule(levels=2, rate=0.3), 10
    config = small_gpt(5, 16)
    meta = torch.device("meta")
    tokens, labels = torch.empty(1, 16, dtype=torch.int64, device=meta), torch.empty(1, dtype=torch.int64).to(meta)
    with meta:
        model = GPT(config)

    def train(side: int) -> None:
        next_patch_loss(model, tokens, labels, side).backward()

    found = [counted(partial(train, schedule.side(step, steps))) for step in range(steps)]
    assert len(set(found)) == 2, "both levels"
    expected = npp_cost(config, schedule, steps).training
    linear, attention = (sum(counts) / steps for counts in zip(*found, strict=True))
    assert (expected.linear, expected.attention) == (pytest.approx(linear), pytest.approx(attention))


@pytest.fixture(autouse=True)
def caches_that_grow_by_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samplers attend over whole blocks of their caches: what is counted here is what is needed."""
    monkeypatch.setattr("models.kv_cache._PAGE", 1)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Labels, uniform numbers and ragged starts."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(5, (IMAGES,), generator=generator)
    uniforms = torch.rand(IMAGES, TOKENS, generator=generator)
    starts = patch_starts(PatchRule(0.6, 4, False, GRID), torch.rand(IMAGES, TOKENS, generator=generator))
    assert len(set(starts.sum(1).tolist())) > 2, "the batch must be ragged"
    return labels, uniforms, starts


def drawn_dpar(starts: Tensor, options: SamplingOptions) -> float:
    """Linear MACs of drawing images one at a time, by the cost of their mean length.

    That takes keys and values of the pooling for all tokens that are read. The sampler makes none for the last patch.
    It encodes the last token and pools a token in place of the class, which nobody reads.
    """
    config, images = small_dpar(), len(starts)
    closed = int(torch.where(starts, torch.arange(TOKENS), 0).amax(1).sum())
    cost = dpar_cost(config, images * TOKENS / int(starts.sum()))
    square = config.encoder_layers * config.dim**2
    pooling = 2 * square * (closed - images * (TOKENS - 1)) + 4 * square * images
    last_token = config.encoder_layers * block(config.dim) * images
    return images * cost.sampling.macs(guided=options.guided).linear + pooling + last_token


@pytest.mark.parametrize("options", [PLAIN, GUIDED])
@torch.no_grad()
def test_sampling_llamagen_costs_what_the_sampler_really_multiplies(options: SamplingOptions) -> None:
    labels, uniforms, _ = batch()
    model = GPT(small_gpt(5)).eval()
    linear, attention = counted(lambda: sample_gpt(model, labels, uniforms, options))
    expected = gpt_cost(small_gpt(5)).sampling.macs(guided=options.guided) * IMAGES
    assert (linear, attention) == (expected.linear, expected.attention)


@pytest.mark.slow
@pytest.mark.parametrize("options", [PLAIN, GUIDED])
@torch.no_grad()
def test_sampling_dpar_costs_what_the_sampler_really_multiplies(options: SamplingOptions) -> None:
    labels, uniforms, starts = batch()
    model = DPAR(small_dpar()).eval()
    linear, _ = counted(lambda: sample_dpar(model, labels, uniforms, options, GivenBoundaries(starts), batch=1))
    assert linear == round(drawn_dpar(starts, options))


@pytest.mark.parametrize("options", [PLAIN, GUIDED])
@pytest.mark.parametrize("image", range(3))
@torch.no_grad()
def test_attention_of_a_drawn_image_meets_only_what_came_before(options: SamplingOptions, image: int) -> None:
    # One image: in a ragged batch short ones attend over the padding of long ones.
    labels, uniforms, starts = (rows[image : image + 1] for rows in batch())
    model = DPAR(small_dpar()).eval()
    _, attention = counted(lambda: sample_dpar(model, labels, uniforms, options, GivenBoundaries(starts)))
    expected = dpar_cost(small_dpar(), TOKENS / int(starts.sum())).sampling.macs(guided=options.guided)
    last_token = 2 * model.config.encoder_layers * model.config.dim * TOKENS
    assert attention == round(expected.attention) + last_token


@pytest.mark.slow
@pytest.mark.parametrize("options", [PLAIN, GUIDED])
@torch.no_grad()
def test_an_entropy_model_that_decides_boundaries_runs_once_an_image(options: SamplingOptions) -> None:
    labels, uniforms, _ = batch()
    torch.manual_seed(0)
    model, entropy_model = DPAR(small_dpar()).eval(), GPT(small_gpt(None)).eval()
    torch.nn.init.normal_(entropy_model.output.weight, std=0.3)
    threshold = float(entropy_model.entropy((uniforms * 40).long())[:, 1:].median())
    boundaries = EntropyBoundaries(entropy_model, PatchRule(threshold, 4, True, GRID))
    starts: list[Tensor] = []
    linear, _ = counted(lambda: starts.append(sample_dpar(model, labels, uniforms, options, boundaries, batch=1)[1]))
    assert len(set(starts[0].sum(1).tolist())) > 1, "the batch must be ragged"
    entropy_model_cost = gpt_cost(small_gpt(None)).sampling.macs(guided=options.guided)
    a_token = TOKENS / (TOKENS - 1)  # it reads the last token too
    assert linear == round(drawn_dpar(starts[0], options) + IMAGES * entropy_model_cost.linear * a_token)


class Predicted(GivenBoundaries):
    """Given boundaries that cost what those by the model's own entropy cost."""

    reads_logits = True


@pytest.mark.slow
@pytest.mark.parametrize("options", [PLAIN, GUIDED])
@pytest.mark.parametrize("opening", [(1, 8), (3, 6), (2, 4, 5, 7), range(1, TOKENS)])  # mirrored, so spread evenly
@torch.no_grad()
def test_own_entropy_costs_a_prediction_more_where_a_patch_closes(
    options: SamplingOptions, opening: Sequence[int]
) -> None:
    labels, uniforms = (rows[:1] for rows in batch()[:2])
    starts = torch.zeros(1, TOKENS, dtype=torch.bool)
    starts[0, [0, *opening]] = True
    model = DPAR(small_dpar()).eval()
    known, found = (
        counted(lambda source=source: sample_dpar(model, labels, uniforms, options, source(starts)))
        for source in (GivenBoundaries, Predicted)
    )
    config = model.config
    own = dpar_cost(config, TOKENS / int(starts.sum())).own_entropy.macs(guided=options.guided)
    more = found[0] - known[0], found[1] - known[1]
    # The encoder reads a token there that is not kept.
    encoder = config.encoder_layers * block(config.dim) * len(opening)
    reads = 2 * config.encoder_layers * config.dim * sum(position + 1 for position in opening)
    assert more == (pytest.approx(own.linear + encoder, rel=1e-12), pytest.approx(own.attention + reads, rel=1e-12))


@pytest.mark.slow
@torch.no_grad()
def test_an_entropy_head_costs_its_narrow_block_once_a_token() -> None:
    labels, uniforms, _ = batch()
    torch.manual_seed(0)
    model = DPAR(small_dpar()).eval()
    head = EntropyHead(EntropyHeadConfig.of(model.config, "block")).eval()
    torch.nn.init.normal_(head.output.weight, std=0.3)
    boundaries = HeadBoundaries(head, PatchRule(1.8, 4, True, GRID))
    starts: list[Tensor] = []
    linear, _ = counted(lambda: starts.append(sample_dpar(model, labels, uniforms, GUIDED, boundaries, batch=1)[1]))
    of_head = linear - round(drawn_dpar(starts[0], GUIDED))
    a_token = 64 * 64 + block(64) + 64
    assert IMAGES * head_sampling(model.config).macs(guided=True).linear == IMAGES * (TOKENS - 1) * a_token
    assert of_head == IMAGES * TOKENS * a_token, "it reads the last token too"


@pytest.mark.parametrize("length", [0.99, 4.6, float("nan")])
def test_a_mean_length_that_images_cannot_have_is_refused(length: float) -> None:
    with pytest.raises(ValueError, match=r"mean patch length is .*, expected 1 \.\. 4\.5 of 9 tokens"):
        dpar_cost(small_dpar(), length)
