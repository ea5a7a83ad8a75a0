"""Previews while a model trains: pictures by the real sampler, and the same weights as without them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conf.runtime import RuntimeConfig
from conf.sample import SampleConfig
from conf.schema import Settings
from models.boundaries import GivenBoundaries
from stages.families import Model
from stages.sampling import snapshots
from stages.sampling.sampler import Sampler
from stages.sampling.snapshots import FOLDER
from stages.train import train
from stages.weights.own import MODEL_FILE

RUNTIME = RuntimeConfig(device="cpu", threads=2)


def inputs(artifacts: dict[str, Path], *names: str) -> dict[str, Path]:
    return {name: artifacts[name] for name in ("tokenize", "patch_index", *names)}


@pytest.mark.usefixtures("without_shape_checks")
def test_pictures_come_at_their_steps_and_change_no_weight(
    tiny_settings: Settings, tiny_artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[tuple[Sampler, np.ndarray]] = []
    original = Sampler.sample

    def sample(self: Sampler, numbers: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        made = original(self, numbers, labels)
        sampled.append((self, made["tokens"]))
        return made

    monkeypatch.setattr(Sampler, "sample", sample)
    config = tiny_settings.train.model_copy(update={"preview_every": 4})
    assert config.key_fields() == tiny_settings.train.key_fields()
    train(config, inputs(tiny_artifacts, "tokenizer"), tmp_path, RUNTIME)
    made = sorted(path.name for path in (tmp_path / FOLDER).iterdir())
    assert made == ["step-000000004.png", "step-000000008.png"]
    with Image.open(tmp_path / FOLDER / made[0]) as picture:
        assert picture.width > 4 * 32
    assert (tmp_path / MODEL_FILE).read_bytes() == (tiny_artifacts["train"] / MODEL_FILE).read_bytes()
    assert not np.array_equal(sampled[0][1], sampled[1][1])
    # The last one shows what the finished model samples.
    last, tokens = sampled[-1]
    assert isinstance(last.boundaries, GivenBoundaries)
    finished = Sampler(
        SampleConfig(precision="float32", image_size=32, seed=config.seed),
        Model.load(tmp_path),
        last.vq,
        last.boundaries,
        last.device,
    )
    classes = np.arange(16) % 3
    assert np.array_equal(original(finished, np.arange(16), classes)["tokens"], tokens)


@pytest.mark.usefixtures("without_shape_checks")
def test_without_a_tokenizer_or_memory_training_goes_on(
    tiny_settings: Settings,
    tiny_artifacts: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.WARNING)
    config = tiny_settings.train.model_copy(update={"preview_every": 8})
    train(config, inputs(tiny_artifacts), tmp_path / "without", RUNTIME)
    assert "no previews: the tokenizer that decodes them is no longer in the cache" in caplog.text

    def no_memory(*_: object) -> None:
        raise snapshots.torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Sampler, "sample", no_memory)
    train(config, inputs(tiny_artifacts, "tokenizer"), tmp_path / "full", RUNTIME)
    assert "no preview of step 8: the GPU has no memory left for it" in caplog.text
    for run in ("without", "full"):
        assert not (tmp_path / run / FOLDER).exists()
        assert (tmp_path / run / MODEL_FILE).exists()
