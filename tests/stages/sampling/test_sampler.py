"""Drawing: an image is a function of its seed, number and class; boundaries and models fit the tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.boundary_sources import BoundarySource
from conf.sample import SampleConfig
from conf.schema import Settings
from models.boundaries import EntropyBoundaries, GivenBoundaries, HeadBoundaries, OwnEntropyBoundaries
from models.config import DPARConfig, GPTConfig, VQConfig
from models.dpar import DPAR
from models.gpt import GPT
from models.patching import PatchRule
from models.vq import VQModel
from stages.patches.boundary_sources import entropy_sample
from stages.runtime.artifact import read_json, write_json
from stages.runtime.errors import ArtifactError, InputError
from stages.sampling.sampler import Drawer, resize
from stages.stores.tokens import TokenStore
from stages.weights.own import load_gpt, save_model

CPU = torch.device("cpu")
SHAPE = {"codebook_size": 64, "num_tokens": 64}
IMAGES = 24


@pytest.fixture(scope="module")
def random_drawer() -> Callable[..., Drawer]:
    """Drawers with the same random weights, wide enough for batch sizes to round differently."""
    torch.manual_seed(0)
    size = {"dim": 128, "num_heads": 4, "encoder_layers": 1, "global_layers": 3, "decoder_layers": 2}
    model = DPAR(DPARConfig(**size, **SHAPE, num_classes=3)).eval()
    entropy_model = GPT(GPTConfig(dim=64, num_layers=2, num_heads=2, **SHAPE, num_classes=None)).eval()
    for head in (model.output, entropy_model.output):
        torch.nn.init.normal_(head.weight, std=0.1)
    vq = VQModel(
        VQConfig(channels=32, channel_multipliers=(1, 1, 1), num_res_blocks=1, z_channels=32, codebook_size=64)
    )
    rule = PatchRule(threshold=3.85, max_length=4, row_boundary=True, grid=8)

    def make(**settings: object) -> Drawer:
        config = SampleConfig(**{"image_size": 32, "precision": "float32"} | settings)
        return Drawer(config, model, vq.eval(), EntropyBoundaries(entropy_model, rule), CPU)

    return make


def drawn(drawer: Drawer, batch_size: int) -> dict[str, np.ndarray]:
    numbers = np.arange(IMAGES)
    parts = [
        drawer.draw(part, part % 3) for part in (numbers[i : i + batch_size] for i in range(0, IMAGES, batch_size))
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in ("tokens", "patch_starts", "images")}


def test_batch_sizes_draw_the_same_images_but_for_float_noise(random_drawer: Callable[..., Drawer]) -> None:
    drawer = random_drawer()
    alone = drawn(drawer, 1)
    assert 1.1 < 64 / alone["patch_starts"].sum(axis=1).mean() < 3, "entropies must decide boundaries here"
    for batch_size in (3, 8, IMAGES):
        together = drawn(drawer, batch_size)
        changed = (together["tokens"] != alone["tokens"]).any(axis=1)
        # A token changes where a uniform number lies within 1e-6 of the edge of its interval: about one in 10,000.
        assert changed.sum() <= 1, f"batch size {batch_size}: {changed.sum()} of {IMAGES} images differ"
        assert np.array_equal(together["patch_starts"][~changed], alone["patch_starts"][~changed])
        differences = np.abs(together["images"][~changed].astype(int) - alone["images"][~changed])
        assert differences.max() <= 1  # a rounding may fall to either side of a pixel value
        again = drawn(drawer, batch_size)
        assert all(np.array_equal(again[name], together[name]) for name in together), "bitwise for one batch size"


def test_a_sample_depends_on_its_number_and_seed_and_not_on_its_place(random_drawer: Callable[..., Drawer]) -> None:
    drawer, labels = random_drawer(), np.zeros(4, dtype=np.int64)
    first = drawer.draw(np.array([7, 1, 900_000, 2]), labels)["tokens"]
    moved = drawer.draw(np.array([2, 900_000, 1, 7]), labels)["tokens"]
    assert np.array_equal(moved, first[::-1])
    assert len(np.unique(first, axis=0)) == 4
    assert not np.array_equal(random_drawer(seed=1).draw(np.array([7, 1, 900_000, 2]), labels)["tokens"], first)


def test_resizing_is_bicubic_without_antialiasing_and_nothing_at_equal_size() -> None:
    images = torch.rand(1, 3, 8, 8)
    assert resize(images, 8) is images
    expected = torch.nn.functional.interpolate(images, size=(6, 6), mode="bicubic", antialias=False)
    assert torch.equal(resize(images, 6), expected)


def test_pixels_are_made_as_published(random_drawer: Callable[..., Drawer]) -> None:
    """LlamaGen: bicubic on the decoder's floats, which may leave [-1, 1]; then 127.5 x + 128, clamped and cut."""
    drawer = random_drawer(image_size=24)
    tokens = torch.arange(64)[None]
    with torch.inference_mode():
        decoded = drawer.vq.decode(tokens) * 1.0
        smaller = torch.nn.functional.interpolate(decoded, size=(24, 24), mode="bicubic")
    published = torch.clamp(127.5 * smaller + 128.0, 0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    assert np.array_equal(drawer.decode(tokens), published)


def load(inputs: dict[str, Path], config: SampleConfig) -> Drawer:
    return Drawer.load(config, inputs, TokenStore.open(inputs["tokenize"] / "tokens.zarr"), CPU)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("entropy_head", HeadBoundaries),
        ("entropy_model", EntropyBoundaries),
        ("own_entropy", OwnEntropyBoundaries),
    ],
)
def test_the_rule_is_the_sources_unless_the_settings_name_another(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, source: BoundarySource, kind: type
) -> None:
    def rule(**changes: object) -> PatchRule:
        config = tiny_settings.sample.model_copy(update={"boundaries": source} | changes)
        boundaries = load(tiny_artifacts, config).boundaries
        assert isinstance(boundaries, kind)
        found: PatchRule = boundaries.rule
        return found

    thresholds = read_json(tiny_artifacts["entropy_head"] / "thresholds.json")
    thresholds["entropy_model"] = read_json(tiny_artifacts["patch_index"] / "rule.json")["threshold"]
    assert rule() == PatchRule(thresholds[source], 4, True, 8)
    assert rule(threshold=1.25, max_length=6) == PatchRule(1.25, 6, True, 8)
    wanted = rule(target_mean_length=2.5, max_length=6)
    sample = entropy_sample(source, tiny_artifacts)
    assert wanted.max_length == 6
    assert sample.mean_length(wanted) == pytest.approx(2.5, abs=0.01)
    with pytest.raises(InputError, match=r"sample\.target_mean_length is 4\.5, expected 1\.0+ to 3\.\d+"):
        rule(target_mean_length=4.5)


def test_static_patches_take_no_threshold(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, tmp_path: Path
) -> None:
    write_json(tmp_path / "rule.json", {"mode": "static", "static_length": 2.0})
    inputs = tiny_artifacts | {"patch_index": tmp_path}
    assert load(inputs, tiny_settings.sample).boundaries is not None
    for name, value in {"threshold": 1.0, "max_length": 4, "target_mean_length": 2.0}.items():
        with pytest.raises(InputError, match=rf"sample\.{name} is set and patches are static"):
            load(inputs, tiny_settings.sample.model_copy(update={name: value}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"codebook_size": 128}, "codebook_size 128, expected 64"), ({"num_tokens": 16}, "num_tokens 16, expected 64")],
)
def test_an_entropy_model_of_another_tokenizer_is_refused(
    tiny_artifacts: dict[str, Path],
    tiny_settings: Settings,
    tmp_path: Path,
    changes: dict[str, int],
    words: str,
) -> None:
    config = GPTConfig(**{"dim": 32, "num_layers": 1, "num_heads": 2, "num_classes": None} | SHAPE | changes)
    save_model(tmp_path, "gpt", GPT(config), config)
    with pytest.raises(ArtifactError, match=f"entropy model in .* has {words}.*trained on these tokens"):
        load(
            tiny_artifacts | {"entropy_model": tmp_path},
            tiny_settings.sample.model_copy(update={"boundaries": "entropy_model"}),
        )


def test_with_a_head_the_entropy_model_is_not_read(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, tmp_path: Path
) -> None:
    without = tiny_artifacts | {"entropy_model": tmp_path / "none"}
    drawer = load(without, tiny_settings.sample)
    assert isinstance(drawer.boundaries, HeadBoundaries), "of its own accord"
    drawn = drawer.draw(np.arange(2), np.array([0, 2]))
    assert np.array_equal(
        drawn["tokens"], load(tiny_artifacts, tiny_settings.sample).draw(np.arange(2), np.array([0, 2]))["tokens"]
    )


def test_a_source_that_the_model_lacks_is_refused(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, tmp_path: Path
) -> None:
    write_json(tmp_path / "thresholds.json", {"own_entropy": 1.0})
    without = tiny_artifacts | {"entropy_head": tmp_path}
    assert isinstance(load(without, tiny_settings.sample).boundaries, EntropyBoundaries)
    with pytest.raises(
        InputError, match=r"sample\.boundaries is entropy_head, expected own_entropy or entropy_model or st"
    ):
        load(without, tiny_settings.sample.model_copy(update={"boundaries": "entropy_head"}))


def test_static_patches_of_a_model_by_entropy_have_its_mean_length(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings
) -> None:
    drawer = load(tiny_artifacts, tiny_settings.sample.model_copy(update={"boundaries": "static"}))
    assert isinstance(drawer.boundaries, GivenBoundaries)
    wanted = read_json(tiny_artifacts["patch_index"] / "rule.json")["mean_length"]
    assert 64 / int(drawer.boundaries.starts.sum()) == pytest.approx(wanted, rel=0.03)


def test_a_model_of_other_classes_and_a_tokenizer_of_another_codebook_are_refused(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, tmp_path: Path
) -> None:
    config = GPTConfig(dim=32, num_layers=1, num_heads=2, num_classes=7, **SHAPE)
    save_model(tmp_path / "train", "llamagen", GPT(config), config)
    with pytest.raises(ArtifactError, match=r"model in .* has num_classes 7, expected 3"):
        load(tiny_artifacts | {"train": tmp_path / "train"}, tiny_settings.sample)
    shutil.copytree(tiny_artifacts["tokenize"], tmp_path / "tokenize")
    metadata = tmp_path / "tokenize" / "tokens.zarr" / "zarr.json"
    attributes = json.loads(metadata.read_text())
    attributes["attributes"]["dpar"]["codebook_size"] = 100
    metadata.write_text(json.dumps(attributes))
    with pytest.raises(ArtifactError, match=r"codebook_size 64, expected 100|codebook of 64, .* 100"):
        load(tiny_artifacts | {"tokenize": tmp_path / "tokenize"}, tiny_settings.sample)


def test_a_model_without_patches_needs_no_entropy_model(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, tmp_path: Path
) -> None:
    config = GPTConfig(dim=32, num_layers=1, num_heads=2, num_classes=3, **SHAPE)
    save_model(tmp_path, "llamagen", GPT(config), config)
    drawer = load(tiny_artifacts | {"train": tmp_path, "entropy_model": tmp_path / "none"}, tiny_settings.sample)
    assert drawer.boundaries is None
    assert drawer.draw(np.arange(2), np.array([0, 2]))["patch_starts"].all()
    with pytest.raises(ArtifactError, match="holds a model of family llamagen, expected gpt"):
        load_gpt(tmp_path)
