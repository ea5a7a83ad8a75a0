"""Work of the stages, from costs that `models.macs` counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conf.load import load_settings
from models.config import GPTConfig
from models.macs import gpt_cost
from pipeline.budget.costs import Costs
from pipeline.budget.images import ImageCount
from pipeline.budget.phases import Work
from pipeline.budget.shape import shape_of
from pipeline.budget.work import WORK

COUNT = ImageCount(100, 3, "test")


def costs(*overrides: str, ablation: str | None = None, devices: int = 1) -> Costs:
    settings, _ = load_settings("tiny", ablation, list(overrides))
    return Costs(settings, shape_of(settings, *COUNT), devices)


def flops(work: Work) -> float:
    return sum(phase.flops for phase in work.phases)


def test_a_training_is_three_forwards_of_every_image() -> None:
    config = GPTConfig(dim=32, num_layers=4, num_heads=2, codebook_size=64, num_tokens=64, num_classes=3)
    forward = gpt_cost(config).forward.total
    work = WORK["train"](costs("dataset.heldout_fraction=0", ablation="llamagen"))
    grid = costs().shape.tokens.num_tokens
    assert grid == 64
    assert work.images == 8 * 8
    assert work.tokens == 64 * 64
    assert flops(work) == 2 * 3 * forward * 64


def test_devices_share_the_work_but_not_the_steps() -> None:
    one, four = (WORK["entropy_model"](costs(devices=devices)) for devices in (1, 4))
    assert flops(four) == flops(one) / 4
    assert four.phases[0].calls == one.phases[0].calls == 8
    assert four.images == one.images


def test_views_are_tokenised_and_mapped() -> None:
    one, two = (costs(f"tokenize.views={views}") for views in ("center", "flip"))
    for name in ("tokenize", "entropy_map", "patch_index"):
        assert WORK[name](two).images == 2 * WORK[name](one).images == 200
    assert flops(WORK["tokenize"](two)) == 2 * flops(WORK["tokenize"](one))
    assert WORK["tokenize"](two).host_s < 2 * WORK["tokenize"](one).host_s, "an image is decoded once"


def test_losses_of_a_tokenizer_cost_only_if_they_are_used() -> None:
    plain = flops(WORK["tokenizer"](costs("tokenizer.adversarial_weight=0")))
    judged = flops(WORK["tokenizer"](costs()))
    perceptual = flops(WORK["tokenizer"](costs("tokenizer.adversarial_weight=0", "tokenizer.lpips_weight=1")))
    assert plain < judged < perceptual
    scored = WORK["tokenizer"](costs("tokenizer.source=checkpoint", "tokenizer.checkpoint=x"))
    assert scored.images == 20, "held-out images"


def test_patches_make_a_model_cheaper_and_its_sampler_start_more() -> None:
    patched, plain = costs(), costs(ablation="llamagen")
    assert flops(WORK["train"](patched)) < flops(WORK["train"](plain))
    steps = [WORK["sample"](each).phases[0] for each in (patched, plain)]
    assert steps[0].launches > steps[1].launches
    assert steps[0].calls == steps[1].calls == 3 * 64, "three batches of four samples"


def test_guidance_and_the_entropy_model_cost_more() -> None:
    plain, guided = (WORK["sample"](costs(f"sample.cfg_scale={scale}")).phases[0] for scale in (1.0, 2.0))
    assert plain.flops < guided.flops < 2 * plain.flops
    assert plain.moved < guided.moved
    by_model = WORK["sample"](costs("sample.cfg_scale=2.0", "sample.boundaries=entropy_model")).phases[0]
    assert (by_model.flops > guided.flops, by_model.launches > guided.launches) == (True, True)


def test_stages_without_work() -> None:
    assert WORK["entropy_head"](costs("entropy_head.kind=none", "sample.boundaries=entropy_model")).phases == ()
    imported = costs("train.family=llamagen", "train.source=checkpoint", "train.checkpoint=x")
    assert WORK["train"](imported).images == 20, "the held-out loss"
    foreign = costs("entropy_model.source=checkpoint", "entropy_model.checkpoint=x")
    assert WORK["entropy_model"](foreign).images == 20, "the held-out loss"
    assert WORK["dataset"](costs()).phases == ()


def test_the_ladder_is_scored_only_if_it_is_asked_for() -> None:
    with_ladder, without = (WORK["evaluate"](costs(f"evaluate.ladder={asked}")) for asked in ("true", "false"))
    assert with_ladder.images - without.images == 4 * 12
    assert with_ladder.serial_s > without.serial_s > 0


def test_every_boundary_source_has_a_cost() -> None:
    for source in ("entropy_head", "entropy_model", "own_entropy"):
        assert WORK["sample"](costs(f"sample.boundaries={source}")).phases[0].flops > 0
    static = replace(costs(ablation="static"))
    assert WORK["sample"](static).phases[0].flops > 0
    assert static.boundaries.macs(guided=True).total == pytest.approx(0)
