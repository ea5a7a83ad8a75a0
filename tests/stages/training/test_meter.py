"""Speed in the log: rates of what was trained on, the share of waiting, and the use of the device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hand_clock import HandClock
from toy_training import IMAGES, TOKENS, batch, dpar, gpt, objective, training

from conf.runtime import RuntimeConfig
from models.macs import dpar_cost, gpt_cost
from stages.runtime.distributed import World
from stages.training.costs import dpar_macs, gpt_macs
from stages.training.loop import train_model
from stages.training.meter import MEASURED, Meter, matmul_rate
from stages.training.stream import Part

CPU = torch.device("cpu")


def test_rates_count_all_processes_and_no_time_of_checkpoints() -> None:
    clock = HandClock()
    meter = Meter(World(0, 2, CPU), 1e9, clock)
    clock.now += 4
    with meter.paused():
        clock.now += 100
    found = meter.report({"images": 40, "tokens": 640, "patches": 300}, macs=1e6)
    assert found["images_per_second"] == 20
    assert found["tokens_per_second"] == 320
    assert found["patches_per_second"] == 150
    assert found["mfu"] == pytest.approx(40 * 3 * 2 * 1e6 / 4 / 1e9)  # of this process's device
    clock.now += 1
    assert meter.report({"images": 10}, macs=None)["images_per_second"] == 20
    assert found.keys() == MEASURED


def test_the_time_until_a_batch_comes_is_waiting() -> None:
    clock = HandClock()
    meter = Meter(World(0, 1, CPU), None, clock)

    def slow() -> Iterator[int]:
        for number in range(3):
            clock.now += 1
            yield number

    for _ in meter.waiting(slow()):
        clock.now += 3
    found = meter.report({"images": 3}, macs=1.0)
    assert found["waiting_for_data"] == pytest.approx(3 / 12)
    assert "mfu" not in found
    clock.now += 1
    assert meter.report({"images": 3}, macs=None)["waiting_for_data"] == 0


def test_the_rate_of_a_product_and_the_memory_are_of_this_machine() -> None:
    assert 1e7 < matmul_rate(CPU, torch.float32) < 1e15
    assert 1e-3 < Meter(World(0, 1, CPU), None).report({}, None)["memory_gb"] < 1e4


@pytest.mark.slow
def test_macs_are_those_that_dpar_flops_counts() -> None:
    config, patched = gpt().config, dpar().config
    cost = gpt_cost(config).forward
    assert gpt_macs(config) == cost.linear + cost.attention
    assert gpt_macs(config, side=2) < gpt_macs(config)
    cost = dpar_cost(patched, (TOKENS - 1) / 8).forward
    assert dpar_macs(patched, 8.2) == cost.linear + cost.attention
    assert dpar_macs(patched, 1.0) < dpar_macs(patched, 8.0) < dpar_macs(patched, 99.0)


def test_the_log_of_a_run_has_them(tmp_path: Path) -> None:
    run = training("dpar", objective("dpar"), steps=4, log_every=2)
    train_model(run, tmp_path, World(0, 1, CPU), RuntimeConfig(device="cpu"))
    lines = [json.loads(line) for line in (tmp_path / "record/metrics.jsonl").read_text().splitlines()]
    patches = [len(batch("dpar", step, Part(0, IMAGES)).patches.first) for step in range(4)]
    for line, counted in zip([line for line in lines if "loss" in line], (patches[:2], patches[2:]), strict=True):
        assert line["tokens_per_second"] / line["images_per_second"] == pytest.approx(TOKENS)
        wanted = sum(counted) / (2 * IMAGES)
        assert line["patches_per_second"] / line["images_per_second"] == pytest.approx(wanted)
        assert 0 <= line["waiting_for_data"] < 1
