"""Numbers that a change of the code must not move, unless it means to: loss curves, random numbers, a tiny run.

What is made of integers alone is held exactly, on every machine. Floats differ between processors in their last bits,
as torch and its libraries choose other kernels: they are held to a tolerance everywhere, and exactly where processor
and packages are those that the numbers were written with.

After a change that is meant to move them, write them anew and look at the difference:

    RENEW_GOLDENS=1 pytest tests/integration/test_golden.py && git diff tests/golden
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from conf.load import CONF_DIR, load_settings
from conf.runtime import RuntimeConfig
from conf.schema import Settings
from stages.entropy_model import entropy_model
from stages.images.tensors import pixels_to_float
from stages.patch_index import patch_index
from stages.runtime.artifact import RECORD, read_json
from stages.runtime.randomness import Purpose, choices, stream, torch_seed
from stages.stores.entropies import EntropyFacts, EntropyStore, entropy_writer
from stages.stores.image_index import ImageIndex
from stages.stores.patches import PatchIndex
from stages.stores.samples import SampleStore
from stages.stores.tokens import TokenFacts, TokenStore, token_writer
from stages.train import train
from stages.weights.pretrained import read_vq_checkpoint

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
RUNTIME = RuntimeConfig(device="cpu", threads=1)
IMAGES, TRAINING, VIEWS, TOKENS, GRID, CODEBOOK, CLASSES = 40, 32, 2, 64, 8, 64, 3
STEPS = 20


def machine() -> str:
    """What decides about the last bits of floats beside the code: the processor and the versions of packages."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [platform.processor()]
    names = sorted({line for line in lines if line.startswith(("model name", "flags", "Features")) or len(lines) == 1})
    versions = [version(name) for name in ("torch", "numpy", "pillow", "pyarrow", "zarr", "numcodecs")]
    text = "\n".join([*names, torch.backends.cpu.get_cpu_capability(), *versions])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def golden(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The numbers stored under `name`; those found are stored first if they are to be renewed."""
    path = GOLDEN / f"{name}.json"
    if os.environ.get("RENEW_GOLDENS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"machine": machine()} | found, indent=1) + "\n")
    stored: dict[str, Any] = json.loads(path.read_text())
    return stored


def scrambled(*shape: int) -> NDArray[np.uint64]:
    """Integers that look random: the same everywhere, and made without the code under test."""
    words = np.arange(1, np.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((words ^ (words >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(24)).reshape(shape)


def hexdigest(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stores of tokens with something to learn, of entropies, and the patch index that follows from these."""
    folder = tmp_path_factory.mktemp("given")
    labels = (np.arange(IMAGES) % CLASSES).astype(np.uint16)
    row, column = np.divmod(np.arange(TOKENS), GRID)
    plain = labels[:, None] * 20 + (row * labels[:, None] + column * (CLASSES - labels[:, None])) // 2
    tokens = ((plain[:, None] + scrambled(IMAGES, VIEWS, TOKENS) % 4) % CODEBOOK).astype(np.uint16)
    entropies = (scrambled(IMAGES, VIEWS, TOKENS) % 2**22).astype(np.float32) / 2**20  # exact; 0 to 4 nats
    sizes: dict[str, Any] = {
        "num_images": IMAGES,
        "num_train": TRAINING,
        "num_views": VIEWS,
        "num_tokens": TOKENS,
        "grid": GRID,
        "chunk_rows": 16,
        "codebook_size": CODEBOOK,
    }
    made_from: dict[str, Any] = {"image_size": 32, "views": "flip", "view_names": ["a", "b"], "vq_sha256": "0" * 64}
    writer = token_writer(folder / "tokens.zarr", TokenFacts(**sizes, **made_from, num_classes=CLASSES))
    for unit in writer.pending():
        rows = writer.spec.rows(unit)
        writer.write(unit, tokens=tokens[rows], labels=labels[rows])
    digests = {"tokens_digest": writer.finish(), "model_sha256": "0" * 64}
    writer = entropy_writer(folder / "entropies.zarr", EntropyFacts(**sizes, **digests, precision="float32"))
    for unit in writer.pending():
        writer.write(unit, entropy=entropies[writer.spec.rows(unit)])
    writer.finish()
    inputs = dict.fromkeys(("tokenize", "entropy_map", "patch_index"), folder)
    patch_index(load_settings("tiny")[0].patch_index, inputs, folder, RUNTIME)
    return inputs


def loss_curve(family: str, given: dict[str, Path], output: Path) -> list[float]:
    """Loss of each of the first steps, float32. Dropout is 0: its masks come from MKL, where torch has it."""
    stage = "entropy_model" if family == "entropy_model" else "train"
    changes = {"steps": STEPS, "log_every": 1, "checkpoint_every": STEPS}
    overrides = [f"{stage}.training.{name}={value}" for name, value in changes.items()]
    overrides += [f"{stage}.dropout=0"] + ([] if stage == "entropy_model" else [f"train.family={family}"])
    settings, _ = load_settings("tiny", "npp" if family == "npp" else None, overrides)
    if stage == "entropy_model":
        entropy_model(settings.entropy_model, given, output, RUNTIME)
    else:
        train(settings.train, given, output, RUNTIME)
    lines = [json.loads(line) for line in (output / RECORD / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_loss_curves_are_those_that_were_written_down(given: dict[str, Path], tmp_path: Path) -> None:
    families = ("dpar", "llamagen", "npp", "entropy_model")
    found = {family: loss_curve(family, given, tmp_path / family) for family in families}
    stored = golden("losses", found)
    for family in families:
        assert len(found[family]) == STEPS
        assert found[family] == pytest.approx(stored[family], rel=1e-4), family
        if stored["machine"] == machine():
            assert found[family] == stored[family], f"{family}: same processor and packages, other bits"


def test_random_numbers_are_those_that_were_written_down() -> None:
    found: dict[str, Any] = {
        purpose.name: [
            stream(seed, purpose, index, part).integers(2**64, dtype=np.uint64).item()
            for seed, index, part in ((0, 0, 0), (2**63 - 1, 5, 0), (3, 2**40, 7))
        ]
        for purpose in Purpose
    }
    found["views"] = choices(3, Purpose.VIEWS, np.arange(10**6, 10**6 + 20), 10).tolist()
    found["epoch"] = stream(3, Purpose.EPOCHS, 2).permutation(20).tolist()
    found["torch_seed"] = torch_seed(3, Purpose.TRAINING_STEP, 1000, 3)
    stored = golden("random_numbers", found)
    assert found == {name: value for name, value in stored.items() if name != "machine"}


def test_patches_of_given_entropies_are_those_that_were_written_down(given: dict[str, Path]) -> None:
    digest = TokenStore.open(given["tokenize"] / "tokens.zarr").digest
    images, views = np.divmod(np.arange(IMAGES * VIEWS), VIEWS)
    rule = read_json(given["patch_index"] / "rule.json")
    starts = PatchIndex.open(given["patch_index"] / "patches.parquet", digest).starts(images, views)
    found = {"starts": hexdigest(starts), "threshold_hex": rule["threshold_hex"], "mean_length": rule["mean_length"]}
    stored = golden("patches", found)
    assert found == {name: stored[name] for name in found}


def test_tokens_of_given_weights_are_those_that_were_written_down() -> None:
    """An image's token changes only where two codes are equally near but for rounding."""
    settings, _ = load_settings("demo")
    model = read_vq_checkpoint(CONF_DIR / "demo" / "vq.safetensors", settings.tokenizer.model).eval()
    y, x = np.mgrid[:64, :64]
    red = [(x * (number + 1) * 3) % 256 for number in range(4)]
    green = [np.where((x - 32) ** 2 + (y - 20 - 5 * number) ** 2 < 300, 230, 40) for number in range(4)]
    blue = [(y * 4 + number * 40) % 256 for number in range(4)]
    pixels = np.stack([np.stack(planes, axis=1) for planes in (red, green, blue)], axis=-1).astype(np.uint8)
    pixels = pixels.reshape(4, 64, 64, 3)
    with torch.inference_mode():
        tokens = model.encode(pixels_to_float(pixels)).flatten().tolist()
    stored = golden("tokens", {"tokens": tokens})
    same = sum(one == other for one, other in zip(tokens, stored["tokens"], strict=True))
    assert same == len(tokens) if stored["machine"] == machine() else same >= 0.99 * len(tokens)


def test_a_tiny_runs_artifacts_are_those_that_were_written_down(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings
) -> None:
    """Floats decide what every stage after `dataset` holds: elsewhere a few numbers of each are compared."""
    index = ImageIndex.open(tiny_artifacts["dataset"])
    samples = SampleStore.open(tiny_artifacts["sample"] / "samples.zarr")
    entropies = EntropyStore.open(tiny_artifacts["entropy_map"] / "entropies.zarr")
    rows = np.arange(len(index))
    exact = {
        "num_train": index.num_train,
        "classes": list(index.classes),
        "labels": np.bincount(samples.labels, minlength=len(index.classes)).tolist(),
    }
    near = {
        **{f"{stage}_loss": last_loss(tiny_artifacts[stage]) for stage in ("tokenizer", "entropy_model", "train")},
        "mean_entropy": float(entropies.fetch(rows, np.zeros_like(rows)).mean()),
        "mean_patch_length": read_json(tiny_artifacts["patch_index"] / "rule.json")["mean_length"],
        "mean_sampled_pixel": float(samples.images(np.arange(len(samples))).mean()),
    }
    digests = {stage: content(path) for stage, path in tiny_artifacts.items()}
    stored = golden("tiny_run", {"exact": exact, "near": near, "digests": digests})
    assert exact == stored["exact"]
    assert near == pytest.approx(stored["near"], rel=0.02)
    if stored["machine"] == machine():
        assert digests == stored["digests"]
    assert set(digests) == {name for name, _ in tiny_settings if name not in ("seed", "evaluate")}


def last_loss(artifact: Path) -> float:
    lines = [json.loads(line) for line in (artifact / RECORD / "metrics.jsonl").read_text().splitlines()]
    return [float(line["loss"]) for line in lines if "loss" in line][-1]


def content(artifact: Path) -> str:
    """Digest of what an artifact holds: its record, and what is drawn for people, are left out."""
    digest = hashlib.sha256()
    for path in sorted(artifact.rglob("*")):
        place = path.relative_to(artifact)
        if path.is_file() and place.parts[0] != RECORD and path.suffix != ".png" and path.name != "metrics.json":
            digest.update(f"{place} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
