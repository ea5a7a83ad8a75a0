"""Sampling: an image is a function of its seed, number and class; boundaries and models fit the tokens."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.sample import SampleConfig
from conf.schema import Settings
from models.boundaries import EntropyBoundaries, GivenBoundaries, HeadBoundaries, OwnEntropyBoundaries
from models.config import DPARConfig, GPTConfig, VQConfig
from models.dpar import DPAR
from models.gpt import GPT
from models.patching import PatchRule
from models.vq import VQModel
from stages.families import Model
from stages.patches.boundary_sources import entropy_sample
from stages.patches.calibration import Thresholds
from stages.patches.rule import IndexRule, SavedRule
from stages.runtime.errors import ArtifactError, InputError
from stages.runtime.progress import Progress
from stages.sampling.sampler import Sampler, prepare_for_decoding, warn_without_kernel
from stages.stores.tokens import TokenStore
from stages.weights.own import GPT_FAMILY, load_gpt, save_model, save_vq

CPU = torch.device("cpu")
SHAPE = {"codebook_size": 64, "num_tokens": 64}
IMAGES = 24


@pytest.fixture(scope="module")
def random_sampler() -> Callable[..., Sampler]:
    """Samplers with the same random weights, wide enough for batch sizes to round differently."""
    torch.manual_seed(0)
    size = {"dim": 128, "num_heads": 4, "encoder_layers": 1, "global_layers": 2, "decoder_layers": 1}
    model = DPAR(DPARConfig(**size, **SHAPE, num_classes=3)).eval()
    entropy_model = GPT(GPTConfig(dim=64, num_layers=2, num_heads=2, **SHAPE, num_classes=None)).eval()
    for head in (model.output, entropy_model.output):
        torch.nn.init.normal_(head.weight, std=0.1)
    vq = VQModel(
        VQConfig(channels=32, channel_multipliers=(1, 1, 1), num_res_blocks=1, z_channels=32, codebook_size=64)
    )
    rule = PatchRule(threshold=3.85, max_length=4, row_boundary=True, grid=8)

    def make(**settings: object) -> Sampler:
        config = SampleConfig(**{"image_size": 32, "precision": "float32"} | settings)
        return Sampler(
            config, Model("dpar", model, model.config), vq.eval(), EntropyBoundaries(entropy_model, rule), CPU
        )

    return make


def test_a_gpu_without_the_attention_kernel_is_told_why(
    random_sampler: Callable[..., Sampler], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, asked = random_sampler().model, list[tuple[torch.device, torch.dtype, int]]()

    def refusal(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
        asked.append((device, dtype, width))
        return None if len(asked) > 1 else "Triton is not installed"

    monkeypatch.setattr("stages.sampling.sampler.kernel_refusal", refusal)
    for device in ("cpu", "cuda", "cuda"):
        warn_without_kernel(model, torch.device(device))
    assert asked == [(torch.device("cuda"), torch.float32, 32)] * 2
    assert caplog.messages == ["sampling is slower than it could be: Triton is not installed, so plain torch attends"]


def sampled(sampler: Sampler, count: int, batch_size: int) -> dict[str, np.ndarray]:
    """The first `count` samples."""
    numbers = np.arange(count)
    parts = [
        sampler.sample(part, part % 3) for part in (numbers[i : i + batch_size] for i in range(0, count, batch_size))
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in ("tokens", "patch_starts", "images")}


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_units_come_whole_and_hold_the_samples_of_their_numbers(
    random_sampler: Callable[..., Sampler], tmp_path: Path
) -> None:
    sampler, labels = random_sampler(batch_size=2), np.arange(20) % 3
    units = [np.arange(3, 6), np.arange(9, 12), np.arange(18, 19)]  # a killed job has made the others
    progress = Progress(tmp_path, "images", 20, done=13)
    found = dict(sampler.sample_units(units, labels, progress))
    assert sorted(found) == [0, 1, 2]
    assert progress.done == 20
    num_changed = 0
    for unit, batch in found.items():
        alone = sampler.sample(units[unit], labels[units[unit]])
        assert np.array_equal(batch["labels"], alone["labels"])
        assert batch["images"].shape == alone["images"].shape
        changed = (batch["tokens"] != alone["tokens"]).any(axis=1)
        num_changed += int(changed.sum())
        assert np.array_equal(batch["patch_starts"][~changed], alone["patch_starts"][~changed])
        differences = np.abs(batch["images"][~changed].astype(int) - alone["images"][~changed])
        assert differences.max(initial=0) <= 1
    assert num_changed <= 1, f"{num_changed} images differ by more than float noise"


def test_no_units_are_no_samples(random_sampler: Callable[..., Sampler], tmp_path: Path) -> None:
    assert list(random_sampler().sample_units([], np.arange(3), Progress(tmp_path, "images", 3, done=3))) == []


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_batch_sizes_sample_the_same_images_but_for_float_noise(random_sampler: Callable[..., Sampler]) -> None:
    sampler, num_changed = random_sampler(), 0
    together = sampled(sampler, IMAGES, IMAGES)
    assert 1.1 < 64 / together["patch_starts"].sum(axis=1).mean() < 3, "entropies must decide boundaries here"
    for count, batch_size in ((4, 1), (6, 3), (IMAGES, 8)):
        found = sampled(sampler, count, batch_size)
        changed = (found["tokens"] != together["tokens"][:count]).any(axis=1)
        num_changed += int(changed.sum())
        same = {name: together[name][:count][~changed] for name in together}
        assert np.array_equal(found["patch_starts"][~changed], same["patch_starts"])
        differences = np.abs(found["images"][~changed].astype(int) - same["images"])
        assert differences.max() <= 1  # a rounding may fall to either side of a pixel value
        again = sampled(sampler, batch_size, batch_size)
        assert all(np.array_equal(again[name], found[name][:batch_size]) for name in found), "bitwise for one size"
    # A token changes where a uniform number lies within 1e-6 of the edge of its interval: about one in 10,000.
    assert num_changed <= 1, f"{num_changed} images differ"


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_a_sample_depends_on_its_number_and_seed_and_not_on_its_place(random_sampler: Callable[..., Sampler]) -> None:
    sampler, labels = random_sampler(), np.zeros(4, dtype=np.int64)
    first = sampler.sample(np.array([7, 1, 900_000, 2]), labels)["tokens"]
    moved = sampler.sample(np.array([2, 900_000, 1, 7]), labels)["tokens"]
    assert np.array_equal(moved, first[::-1])
    assert len(np.unique(first, axis=0)) == 4
    assert not np.array_equal(random_sampler(seed=1).sample(np.array([7, 1, 900_000, 2]), labels)["tokens"], first)


def test_pixels_are_made_as_published(random_sampler: Callable[..., Sampler]) -> None:
    """LlamaGen: bicubic on the decoder's floats, which may leave [-1, 1]; then 127.5 x + 128, clamped and cut."""
    sampler = random_sampler(image_size=24)
    tokens = torch.arange(64)[None]
    with torch.inference_mode():
        decoded = sampler.vq.decode(tokens) * 1.0
        smaller = torch.nn.functional.interpolate(decoded, size=(24, 24), mode="bicubic")
    published = torch.clamp(127.5 * smaller + 128.0, 0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    assert np.array_equal(sampler.decode(tokens), published)


def test_a_decoder_in_bfloat16_rounds_pixels_and_keeps_tokens(random_sampler: Callable[..., Sampler]) -> None:
    whole = random_sampler()
    vq = deepcopy(whole.vq)
    rounded = replace(whole, vq=vq)
    prepare_for_decoding(vq, SampleConfig(decoder_precision="bfloat16"))
    assert vq.decoder.conv_in.weight.dtype == torch.bfloat16
    tokens = torch.arange(64)[None]
    pixels, found = whole.decode(tokens), rounded.decode(tokens)
    difference = np.abs(pixels.astype(np.int64) - found)
    assert 0 < difference.mean() < 1
    assert torch.equal(rounded.encode(pixels), whole.encode(pixels))


def load(inputs: dict[str, Path], config: SampleConfig) -> Sampler:
    return Sampler.load(config, inputs, TokenStore.of(inputs), CPU)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("entropy_head", HeadBoundaries),
        ("entropy_model", EntropyBoundaries),
        ("own_entropy", OwnEntropyBoundaries),
    ],
)
def test_the_rule_is_the_sources_unless_the_settings_name_another(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, source: str, kind: type
) -> None:
    def rule(**changes: object) -> PatchRule:
        config = tiny_settings.sample.model_copy(update={"boundaries": source} | changes)
        boundaries = load(tiny_artifacts, config).boundaries
        assert isinstance(boundaries, kind)
        found: PatchRule = boundaries.rule
        return found

    thresholds = dict(Thresholds.of(tiny_artifacts).by_source)
    index_threshold = SavedRule.of(tiny_artifacts).threshold
    assert index_threshold is not None
    thresholds["entropy_model"] = index_threshold
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
    SavedRule.save(tmp_path, IndexRule.static(2.0), 2.0)
    inputs = {name: tiny_artifacts[name] for name in ("tokenizer", "tokenize", "train")} | {"patch_index": tmp_path}
    static = tiny_settings.sample.model_copy(update={"boundaries": "static"})
    boundaries = load(inputs, static).boundaries
    assert isinstance(boundaries, GivenBoundaries)
    assert boundaries.starts.tolist() == [True, *[position % 2 == 0 for position in range(1, 64)]]
    for name, value in {"threshold": 1.0, "max_length": 4, "target_mean_length": 2.0}.items():
        with pytest.raises(InputError, match=rf"sample\.{name} is set and patches are static"):
            load(inputs, static.model_copy(update={name: value}))
    with pytest.raises(InputError, match=r"sample\.boundaries is entropy_head and patch_index\.mode static"):
        load(inputs, tiny_settings.sample)
    with pytest.raises(InputError, match=r"sample\.boundaries is None and the model works on patches"):
        load(inputs, tiny_settings.sample.model_copy(update={"boundaries": None}))


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
    save_model(tmp_path, GPT_FAMILY, GPT(config), config)
    with pytest.raises(ArtifactError, match=f"entropy model in .* has {words}.*trained on these tokens"):
        load(
            tiny_artifacts | {"entropy_model": tmp_path},
            tiny_settings.sample.model_copy(update={"boundaries": "entropy_model"}),
        )


@pytest.mark.parametrize(
    ("changes", "read"),
    [
        ({"boundaries": "entropy_head"}, {"patch_index", "entropy_head"}),
        ({"boundaries": "entropy_head", "target_mean_length": 2.0}, {"patch_index", "entropy_head"}),
        ({"boundaries": "own_entropy"}, {"patch_index", "entropy_head"}),
        ({"boundaries": "own_entropy", "target_mean_length": 2.0}, {"patch_index", "entropy_head"}),
        ({"boundaries": "entropy_model"}, {"patch_index", "entropy_model"}),
        (
            {"boundaries": "entropy_model", "target_mean_length": 2.0},
            {"patch_index", "entropy_model", "entropy_map"},
        ),
        ({"boundaries": "static"}, {"patch_index"}),
    ],
)
def test_a_source_needs_only_the_artifacts_that_the_settings_say(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, changes: dict[str, object], read: set[str]
) -> None:
    config = tiny_settings.sample.model_copy(update=changes)
    deciding = {"entropy_model", "entropy_map", "patch_index", "entropy_head"}
    assert deciding - config.unread_inputs(tiny_settings) == read
    inputs = {name: tiny_artifacts[name] for name in {"tokenizer", "tokenize", "train"} | read}
    assert load(inputs, config).boundaries is not None


def test_a_source_that_was_not_calibrated_is_refused(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, tmp_path: Path
) -> None:
    Thresholds({"own_entropy": 1.0}).save(tmp_path)
    with pytest.raises(InputError, match=r"sample\.boundaries is entropy_head, expected own_entropy: stage"):
        load(tiny_artifacts | {"entropy_head": tmp_path}, tiny_settings.sample)


def test_static_patches_of_a_model_by_entropy_have_its_mean_length(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings
) -> None:
    sampler = load(tiny_artifacts, tiny_settings.sample.model_copy(update={"boundaries": "static"}))
    assert isinstance(sampler.boundaries, GivenBoundaries)
    wanted = SavedRule.of(tiny_artifacts).mean_length
    assert 64 / int(sampler.boundaries.starts.sum()) == pytest.approx(wanted, rel=0.03)


def test_a_model_of_other_classes_or_tokens_is_refused(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, tmp_path: Path
) -> None:
    config = GPTConfig(dim=32, num_layers=1, num_heads=2, num_classes=7, **SHAPE)
    save_model(tmp_path / "train", "llamagen", GPT(config), config)
    with pytest.raises(ArtifactError, match=r"model in .* has num_classes 7, expected 3"):
        load(tiny_artifacts | {"train": tmp_path / "train"}, tiny_settings.sample)
    config = replace(config, num_classes=3)
    save_model(tmp_path / "train", "llamagen", GPT(config), config, tokenizer="f" * 64)
    with pytest.raises(ArtifactError, match=r"model in .* has tokenizer ffff.* trained on these tokens"):
        load(tiny_artifacts | {"train": tmp_path / "train"}, tiny_settings.sample)


def test_a_tokenizer_that_did_not_make_the_tokens_is_refused(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, tmp_path: Path
) -> None:
    """It has the same shape: only its weights differ."""
    save_vq(tmp_path, VQModel(tiny_settings.tokenizer.model))
    with pytest.raises(ArtifactError, match=rf"the tokenizer in {tmp_path} has sha256 .*that made these tokens"):
        load(tiny_artifacts | {"tokenizer": tmp_path}, tiny_settings.sample)


def test_a_model_without_patches_needs_no_entropy_model(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, tmp_path: Path
) -> None:
    config = GPTConfig(dim=32, num_layers=1, num_heads=2, num_classes=3, **SHAPE)
    save_model(tmp_path, "llamagen", GPT(config), config)
    sampler = load(tiny_artifacts | {"train": tmp_path, "entropy_model": tmp_path / "none"}, tiny_settings.sample)
    assert sampler.boundaries is None
    assert sampler.sample(np.arange(2), np.array([0, 2]))["patch_starts"].all()
    with pytest.raises(ArtifactError, match="holds a model of family llamagen, expected gpt"):
        load_gpt(tmp_path)
