"""Fixtures for every test: real images in class folders, and the finished artifacts of a tiny run over them."""

from __future__ import annotations

import os

ALONE = "PYTEST_XDIST_WORKER" not in os.environ
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads take a busy machine's cores from each other
for name, value in (
    ("DO_NOT_TRACK", "true"),
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ("PREFECT_SERVER_ANALYTICS_ENABLED", "false"),
):
    os.environ[name] = value

import jaxtyping
from jaxtyping import install_import_hook

# In these modules, an array whose shape or type differs from the signature is an error at every call; an int may be a
# float. pytest's option --jaxtyping-packages takes only one package before a type checker with arguments.
CHECKED = (
    "models",
    "stages.images.decode",
    "stages.images.from_tokens",
    "stages.images.tensors",
    "stages.patches",
    "stages.sampling",
    "stages.scores",
    "stages.stores.entropies",
    "stages.stores.patches",
    "stages.stores.samples",
    "stages.stores.tokens",
    "stages.training.data",
    "stages.training.entropies",
    "stages.training.images",
    "stages.training.next_patch",
    "stages.training.patched",
    "stages.training.stream",
)
install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import fcntl
import gc
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image

from conf.load import load_settings
from conf.runtime import RuntimeConfig
from conf.schema import Settings
from conf.section import Section
from pipeline.graph import STAGES, inputs_read
from pipeline.views import view_inputs

hypothesis.settings.register_profile("dpar", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("dpar")
CLASSES = ("discs", "squares", "stripes")
RUNTIME = RuntimeConfig(device="cpu", threads=2)  # sums depend on the number of threads in their last bits
Run = Callable[[str, Section, dict[str, Path]], Path]
"""Takes the name of a stage, its settings, and artifacts by name; gives the folder that was filled."""
Once = Callable[[str, Callable[[Path], None]], Path]
"""Takes the name of a folder that all workers share and a function that fills it; gives the folder."""


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
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """A function that fills a folder in the first worker that asks for it; the others wait and share it."""
    base = tmp_path_factory.getbasetemp()
    shared = base if ALONE else base.parent

    def once(name: str, fill: Callable[[Path], None]) -> Path:
        folder, unfinished = shared / name, shared / f"{name}.unfinished"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                fill(unfinished)
                unfinished.rename(folder)
        return folder

    return once


@pytest.fixture(scope="session")
def image_root(once: Once) -> Path:
    """Three classes of 15 PNG images of 40 px. Tests must not write to them."""

    def fill(root: Path) -> None:
        for kind in CLASSES:
            (root / kind).mkdir()
            for number in range(15):
                draw(kind, number).save(root / kind / f"{number:02d}.png")

    return once("images", fill)


@pytest.fixture(scope="session")
def tiny_settings(image_root: Path) -> Settings:
    """Settings of the preset `tiny` over `image_root`."""
    return load_settings("tiny", None, [f"dataset.root={image_root}"])[0]


@pytest.fixture(scope="session")
def run_in_process(tiny_settings: Settings, image_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Call a stage's function directly, in a fresh folder.

    Of the artifacts given it finds those that it reads under these settings, and the images only if it says so: what is
    read and not declared is missing.
    """

    def run(name: str, config: Section, inputs: dict[str, Path]) -> Path:
        output = tmp_path_factory.mktemp(name)
        _run(_with_section(tiny_settings, name, config), name, {"images": image_root} | inputs, output)
        return output

    return run


@pytest.fixture(scope="session")
def draw_view(tiny_settings: Settings, image_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Draw the view of the finished artifact `inputs[name]` into a fresh folder, given what the pipeline gives it."""

    def draw_view(name: str, config: Section, inputs: dict[str, Path]) -> Path:
        stage, output = STAGES[name], tmp_path_factory.mktemp(f"{name}-view")
        read = view_inputs(stage, _with_section(tiny_settings, name, config), inputs)
        read |= {name: inputs[name], "images": inputs.get("images", image_root)}
        _call(stage.view_entry, config, read, output)
        return output

    return draw_view


def _with_section(settings: Settings, name: str, config: Section) -> Settings:
    return settings.model_copy(update={name: config})


def _run(settings: Settings, name: str, inputs: dict[str, Path], output: Path) -> None:
    stage = STAGES[name]
    read = [*inputs_read(stage, settings), *(["images"] if stage.reads_images else [])]
    _call(stage.entry, getattr(settings, name), {source: inputs[source] for source in read}, output)


def _call(entry: tuple[str, str], config: Section, inputs: dict[str, Path], output: Path) -> None:
    module, function = entry
    threads = torch.get_num_threads()
    try:
        getattr(importlib.import_module(module), function)(config, inputs, output, RUNTIME)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_artifacts(tiny_settings: Settings, image_root: Path, once: Once) -> dict[str, Path]:
    """Finished artifacts of all stages up to `sample`, made one after the other. Tests must not write to them."""
    names = [name for name in STAGES if name != "evaluate"]

    def fill(root: Path) -> None:
        for name in names:
            (root / name).mkdir()
            made = {source: root / source for source in names}
            _run(tiny_settings, name, made | {"images": image_root}, root / name)

    root = once("artifacts", fill)
    return {name: root / name for name in names}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Give each worker one thread. It inherits that: numpy, which a plugin imports, has counted when this file runs."""
    os.environ |= {"OMP_NUM_THREADS": "1", "DPAR_THREADS": "1"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Call all tests of the tiny run slow: its artifacts take twenty seconds."""
    for item in items:
        if "tiny_artifacts" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking again and again through a million objects of imported modules."""
    gc.freeze()


@pytest.fixture
def without_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls as in production, where a wrong shape meets the function's own check."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
