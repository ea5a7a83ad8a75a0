"""Fixtures for every test: real images in class folders, and the finished artifacts of a tiny run over them."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads take a busy machine's cores from each other
for name, value in (
    ("DO_NOT_TRACK", "true"),
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ("PREFECT_SERVER_ANALYTICS_ENABLED", "false"),
):
    os.environ[name] = value

import importlib
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from PIL import Image

from conf.load import load_settings
from conf.schema import RuntimeConfig, Settings
from conf.section import Section
from pipeline.graph import STAGES

hypothesis.settings.register_profile("dpar", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("dpar")
CLASSES = ("discs", "squares", "stripes")


def draw(kind: str, number: int, size: int = 40) -> Image.Image:
    """A coloured shape on white: enough structure for a tokenizer to find."""
    generator = np.random.default_rng([CLASSES.index(kind), number])
    y, x = np.mgrid[:size, :size] / size
    cx, cy, r = generator.uniform(0.3, 0.7), generator.uniform(0.3, 0.7), generator.uniform(0.15, 0.3)
    inside = {
        "discs": (x - cx) ** 2 + (y - cy) ** 2 < r * r,
        "squares": np.maximum(abs(x - cx), abs(y - cy)) < r,
        "stripes": ((x + cx) * 8).astype(int) % 2 == 0,
    }[kind]
    pixels = np.full((size, size, 3), 255, np.uint8)
    pixels[inside] = generator.integers(0, 200, 3)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 15 PNG images of 40 px."""
    root = tmp_path_factory.mktemp("images")
    for kind in CLASSES:
        (root / kind).mkdir()
        for number in range(15):
            draw(kind, number).save(root / kind / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def tiny_settings(image_root: Path) -> Settings:
    """Settings of the preset `tiny` over `image_root`."""
    return load_settings("tiny", None, [f"dataset.root={image_root}"])[0]


@pytest.fixture(scope="session")
def run_in_process(
    image_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Section, dict[str, Path]], Path]:
    """Call a stage's function directly, in a fresh folder, on the artifacts given."""

    def run(name: str, config: Section, inputs: dict[str, Path]) -> Path:
        output = tmp_path_factory.mktemp(name)
        module, function = STAGES[name].entry
        getattr(importlib.import_module(module), function)(
            config, inputs | {"images": image_root}, output, RuntimeConfig(device="cpu", threads=2)
        )
        return output

    return run


@pytest.fixture(scope="session")
def tiny_artifacts(
    tiny_settings: Settings, run_in_process: Callable[[str, Section, dict[str, Path]], Path]
) -> dict[str, Path]:
    """Finished artifacts of all stages up to `sample`, made one after the other. Tests must not write to them."""
    artifacts: dict[str, Path] = {}
    for stage in STAGES.values():
        if stage.name != "evaluate":
            inputs = {name: artifacts[name] for name in stage.inputs}
            artifacts[stage.name] = run_in_process(stage.name, getattr(tiny_settings, stage.name), inputs)
    return artifacts
