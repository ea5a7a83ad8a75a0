"""Stage evaluate: the ladder, honest names, resume, and the networks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from conf.evaluate import EvaluateConfig
from conf.schema import Settings
from conf.section import Section
from models.vq import VQModel
from stages.evaluate import ImageSets
from stages.images.decode import center_crop, decode
from stages.runtime.artifact import read_json
from stages.runtime.distributed import World
from stages.runtime.errors import ArtifactError, InputError
from stages.scores.features import Inception, Lite0
from stages.scores.table import RUNGS, SCORES
from stages.stores.image_index import ImageIndex
from stages.stores.samples import SampleStore, sample_writer
from stages.weights.inception import read_inception
from stages.weights.own import save_vq

Run = Callable[[str, Section, dict[str, Path]], Path]


@pytest.fixture(scope="module")
def evaluated(tiny_settings: Settings, run_in_process: Run, tiny_artifacts: dict[str, Path]) -> Path:
    return run_in_process("evaluate", tiny_settings.evaluate, tiny_artifacts)


@pytest.fixture(scope="module")
def scored(tiny_settings: Settings, draw_view: Run, evaluated: Path) -> Path:
    """The view, which has the scores."""
    return draw_view("evaluate", tiny_settings.evaluate, {"evaluate": evaluated})


@pytest.mark.slow
def test_every_rung_is_scored_on_the_same_number_of_images(scored: Path) -> None:
    metrics = read_json(scored / "metrics.json")
    assert {f"fd_lite0_{rung}" for rung in RUNGS} <= set(metrics)
    counts = read_json(scored / "scores.json")["num_images"]
    assert counts["reference"] == 36
    assert counts["samples"] == 12
    assert {counts[rung] for rung in RUNGS if rung != "samples"} == {9}
    # Real images are nearer to real images than anything that eight steps of training make.
    assert metrics["fd_lite0_heldout"] == min(metrics[f"fd_lite0_{rung}"] for rung in RUNGS)
    assert metrics["ratio_to_random"] == pytest.approx(metrics["fd_lite0_samples"] / metrics["fd_lite0_random"])


def square_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def frechet(mean: np.ndarray, root: np.ndarray, features: np.ndarray) -> float:
    """|m - n|^2 + tr(A + B - 2 sqrt(A B)), with the last trace from the eigenvalues of the symmetric product.

    `root` is the root of A.
    """
    other = np.cov(features.astype(np.float64), rowvar=False)
    trace = np.sqrt(np.linalg.eigvalsh(root @ other @ root).clip(0)).sum()
    distance = np.square(mean - features.astype(np.float64).mean(axis=0)).sum()
    return float(distance + np.square(root).sum() + np.trace(other) - 2 * trace)


def balls(points: np.ndarray, neighbours: int) -> np.ndarray:
    """Distance of each point to its k-th nearest other one."""
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    return np.sort(distances, axis=1)[:, neighbours]


@pytest.mark.slow
def test_the_scores_are_those_of_the_features(evaluated: Path, scored: Path) -> None:
    metrics = read_json(scored / "metrics.json")
    with np.load(evaluated / "features.npz") as features:
        assert "reference" not in features, "of a large data set they would fill the disk"
        mean, root = features["reference_mean"], square_root(features["reference_covariance"])
        for rung in RUNGS:
            wanted = frechet(mean, root, features[rung][:9])
            assert metrics[f"fd_lite0_{rung}"] == pytest.approx(wanted, rel=1e-6)
        samples, real = features["samples"].astype(np.float64), features["reference_compared"].astype(np.float64)
        assert metrics["fd_lite0"] == pytest.approx(frechet(mean, root, samples), rel=1e-6)
    distances = np.linalg.norm(samples[:, None] - real[None], axis=-1)
    assert metrics["precision_lite0"] == (distances <= balls(real, 3)).any(axis=1).mean()
    assert metrics["recall_lite0"] == (distances <= balls(samples, 3)[:, None]).any(axis=0).mean()
    assert metrics["ratio_to_marginals"] == pytest.approx(
        metrics["fd_lite0_samples"] / metrics["fd_lite0_marginals"], rel=1e-12
    )


def test_every_set_has_images_of_the_samples_size(
    tiny_artifacts: dict[str, Path], image_root: Path, tmp_path: Path
) -> None:
    """Tokens of 32 px, samples resized to 24: reconstructions and random tokens are resized in the same way."""
    facts = replace(SampleStore.of(tiny_artifacts).facts, num_samples=2, image_size=24, chunk_rows=2)
    writer = sample_writer(tmp_path / SampleStore.FILE, facts)
    rows = np.zeros((2, facts.num_tokens))
    pixels, labels = np.zeros((2, 24, 24, 3), np.uint8), np.zeros(2, np.uint16)
    writer.write(0, images=pixels, labels=labels, tokens=rows.astype(np.uint16), patch_starts=rows.astype(np.bool_))
    writer.finish()
    inputs = tiny_artifacts | {"sample": tmp_path, "images": image_root}
    sets = ImageSets.open(EvaluateConfig(), inputs, World(0, 1, torch.device("cpu")))
    assert set(sets) == {"reference", *RUNGS}
    assert {images.make(images.rows[:2]).shape for images in sets.values()} == {(2, 24, 24, 3)}


def test_tokens_of_another_tokenizer_are_refused(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, run_in_process: Run, tmp_path: Path
) -> None:
    save_vq(tmp_path, VQModel(tiny_settings.tokenizer.model))
    with pytest.raises(ArtifactError, match=rf"the tokenizer in {tmp_path} has sha256 .*that made these tokens"):
        run_in_process("evaluate", tiny_settings.evaluate, tiny_artifacts | {"tokenizer": tmp_path})


def test_the_reference_is_the_training_images(
    evaluated: Path, tiny_artifacts: dict[str, Path], image_root: Path, tiny_settings: Settings
) -> None:
    index = ImageIndex.open(tiny_artifacts["dataset"])
    pixels = np.stack([center_crop(decode(index.read(image_root, row)), 32) for row in range(index.num_train)])
    wanted, _ = Lite0(tiny_settings.evaluate.input_size, torch.device("cpu")).extract(pixels)
    with np.load(evaluated / "features.npz") as features:
        assert int(features["reference_count"]) == 36
        np.testing.assert_allclose(features["reference_compared"], wanted, rtol=1e-3, atol=1e-4)
        wanted = wanted.astype(np.float64)
        np.testing.assert_allclose(features["reference_mean"], wanted.mean(axis=0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(features["reference_covariance"], np.cov(wanted, rowvar=False), rtol=1e-3, atol=1e-4)


def test_damaged_features_are_named(evaluated: Path, tiny_settings: Settings, draw_view: Run, tmp_path: Path) -> None:
    shutil.copytree(evaluated, tmp_path / "damaged")
    path = tmp_path / "damaged" / "features.npz"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ArtifactError, match=r"damaged holds no features .*: run stage evaluate again"):
        draw_view("evaluate", tiny_settings.evaluate, {"evaluate": tmp_path / "damaged"})


@pytest.mark.slow
def test_precision_looks_at_no_more_real_images_than_it_is_told_to(
    evaluated: Path,
    scored: Path,
    tiny_settings: Settings,
    run_in_process: Run,
    draw_view: Run,
    tiny_artifacts: dict[str, Path],
) -> None:
    config = tiny_settings.evaluate.model_copy(update={"compared": 8, "ladder": False})
    output = run_in_process("evaluate", config, tiny_artifacts)
    views = (scored, draw_view("evaluate", config, {"evaluate": output}))
    assert [read_json(view / "scores.json")["compared_reference"] for view in views] == [36, 8]
    distances = [read_json(view / "metrics.json")["fd_lite0"] for view in views]
    assert distances[0] == distances[1]
    with np.load(output / "features.npz") as few, np.load(evaluated / "features.npz") as all_:
        chosen = np.linspace(0, 35, 8).astype(int)
        assert np.array_equal(few["reference_compared"], all_["reference_compared"][chosen])


def test_without_the_ladder_only_the_samples_are_scored(
    tiny_settings: Settings, run_in_process: Run, draw_view: Run, tiny_artifacts: dict[str, Path]
) -> None:
    config = tiny_settings.evaluate.model_copy(update={"ladder": False, "max_reference": 10})
    inputs = {name: tiny_artifacts[name] for name in ("dataset", "sample")}  # no tokens and no tokenizer
    view = draw_view("evaluate", config, {"evaluate": run_in_process("evaluate", config, inputs)})
    assert set(read_json(view / "metrics.json")) == {
        *("fd_lite0", "is_lite0", "precision_lite0", "recall_lite0", "num_samples", "num_reference")
    }
    assert read_json(view / "metrics.json")["num_reference"] == 10
    assert read_json(view / "scores.json")["num_images"] == {"samples": 12, "reference": 10}


def test_no_score_is_called_fid() -> None:
    assert {name for score in SCORES.values() for name in score.names.values()} == {
        *("fd_lite0", "is_lite0", "precision_lite0", "recall_lite0"),
        *("fid_uncertified", "inception_score", "precision", "recall"),
    }


def test_lite0_gives_features_and_classes_and_knows_its_weights() -> None:
    extractor = Lite0(96, torch.device("cpu"))
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    features, logits = extractor.extract(images)
    assert features.shape == (3, 1280)
    assert logits.shape == (3, 1000)
    again, _ = extractor.extract(images[1:2])
    np.testing.assert_allclose(again[0], features[1], rtol=1e-3, atol=1e-4)


def test_missing_and_foreign_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        read_inception(tmp_path / "no.pth")
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match=r"does not fit the FID Inception: Conv2d_1a_3x3.conv.weight is missing \(and"):
        read_inception(tmp_path / "bad.pth")
    (tmp_path / "bad.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="is a Git LFS pointer"):
        read_inception(tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="expected a weights file with inception"):
        EvaluateConfig(extractor="inception")


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True])
def test_the_inception_takes_exactly_the_weights_of_its_file(tmp_path: Path, legacy: bool) -> None:
    """Against torch-fidelity's own loading; a file of an old version of torch has no counts of batches."""

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object, **__: object) -> None:
            pass

    torch.save({}, tmp_path / "nothing.pth")
    untrained = Untrained("inception-v3-compat", ["2048"], str(tmp_path / "nothing.pth"))
    torch.manual_seed(0)
    state = {name: torch.rand(t.shape) for name, t in untrained.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    network = read_inception(tmp_path / "a.pth")
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in state.items())
    found = Inception(network, "a digest", torch.device("cpu"))
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(tmp_path / "a.pth"))
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    features, logits = found.extract(images)
    wanted = theirs(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
    assert np.array_equal(features, wanted[0].numpy())
    assert np.array_equal(logits, wanted[1].numpy())
