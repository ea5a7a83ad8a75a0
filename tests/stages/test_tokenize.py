import json
import math
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stages.tokenize
from conf.dataset import DatasetConfig
from conf.runtime import RuntimeConfig
from conf.section import Section
from conf.tokenize import TokenizeConfig
from models.config import VQConfig
from models.vq import VQModel
from stages.dataset import dataset
from stages.images.decode import decode, view_names, views
from stages.images.tensors import pixels_to_float
from stages.runtime.artifact import read_json
from stages.runtime.errors import InputError
from stages.stores.image_index import ImageIndex
from stages.stores.tokens import TokenStore
from stages.tokenize import batches, tokenize
from stages.weights.own import save_vq

CONFIG = TokenizeConfig(image_size=32, views="flip", batch_size=6, chunk_rows=8)


@pytest.fixture(scope="module")
def inputs(image_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    config = DatasetConfig(root=image_root, heldout_fraction=0.2)
    dataset(config, {"images": image_root}, folder / "dataset", RuntimeConfig(threads=1))
    torch.manual_seed(0)
    model = VQModel(
        VQConfig(channels=32, channel_multipliers=(1, 1, 1), num_res_blocks=1, z_channels=32, codebook_size=64)
    )
    save_vq(folder / "tokenizer", model)
    return {"dataset": folder / "dataset", "tokenizer": folder / "tokenizer", "images": image_root}


@pytest.fixture(scope="module")
def few(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same with 12 images, for tests that take many views of each."""
    folder = tmp_path_factory.mktemp("few")
    for kind in sorted(inputs["images"].iterdir()):
        for image in sorted(kind.iterdir())[:4]:
            (folder / "images" / kind.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(image, folder / "images" / kind.name)
    config = DatasetConfig(root=folder / "images", heldout_fraction=0.2)
    dataset(config, {"images": folder / "images"}, folder / "dataset", RuntimeConfig(threads=1))
    return inputs | {"dataset": folder / "dataset", "images": folder / "images"}


@pytest.fixture(scope="module")
def whole(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tokenize")
    tokenize(CONFIG, inputs, output, RuntimeConfig(device="cpu", threads=1))
    return output


def content(output: Path) -> dict[str, bytes]:
    files = (path for path in output.rglob("*") if path.is_file())
    names = {path.relative_to(output).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in names.items() if not name.startswith("record/")}


def test_tokens_are_the_encoders_of_each_view(whole: Path, inputs: dict[str, Path]) -> None:
    store, index = TokenStore.open(whole / "tokens.zarr"), ImageIndex.of(inputs)
    model = stages.tokenize.load_vq(inputs["tokenizer"])
    for image in (0, 9, len(index) - 1):
        pixels = np.stack(views(decode(index.read(inputs["images"], image)), 32, "flip"))
        with torch.inference_mode():
            wanted = model.encode(pixels_to_float(pixels)).numpy()
        found = store.fetch(np.array([image, image]), np.array([0, 1]))
        assert (found == wanted).mean() > 0.98  # another batch may move a tie between two codes
    assert np.array_equal(store.labels, index.labels)


def test_the_store_says_what_it_was_made_from(whole: Path, inputs: dict[str, Path]) -> None:
    facts = TokenStore.open(whole / "tokens.zarr").facts
    index = ImageIndex.of(inputs)
    assert (facts.num_images, facts.num_train, facts.num_classes) == (45, index.num_train, 3)
    assert (facts.num_views, facts.grid, facts.num_tokens, facts.codebook_size) == (2, 8, 64, 64)
    assert (facts.view_names, facts.image_size) == (["center", "mirrored/center"], 32)
    assert json.loads((whole / "classes.json").read_text()) == index.classes


def test_the_view_counts_the_codes(whole: Path, draw_view: Callable[[str, Section, dict[str, Path]], Path]) -> None:
    tokens = TokenStore.open(whole / "tokens.zarr").fetch(np.arange(45).repeat(2), np.tile(np.arange(2), 45))
    occurring, counts = np.unique(tokens, return_counts=True)
    assert 1 < len(occurring) < 64
    entropy = sum(-count / tokens.size * math.log(count / tokens.size) for count in counts.tolist())
    assert read_json(draw_view("tokenize", CONFIG, {"tokenize": whole}) / "metrics.json") == {
        "num_images": 45,
        "num_views": 2,
        "num_tokens": 64,
        "codebook_usage": len(occurring) / 64,
        "unigram_entropy": pytest.approx(entropy, rel=1e-12),
    }


def test_a_killed_run_is_continued_to_the_same_bytes(whole: Path, inputs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "killed")
    for name in ("classes.json", "record/units/tokens-000003.json", "tokens.zarr/tokens/c/3/1/0"):
        (tmp_path / "killed" / name).unlink()
    kept = tmp_path / "killed" / "tokens.zarr/tokens/c/2/0/0"
    before = kept.stat().st_mtime_ns
    tokenize(CONFIG, inputs, tmp_path / "killed", RuntimeConfig(device="cpu", threads=1))
    assert content(tmp_path / "killed") == content(whole)
    assert kept.stat().st_mtime_ns == before


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("views", ["center", "ten_crop_x2"])
@pytest.mark.parametrize("batch_size", [7, 20, 64])
def test_batches_are_full_but_the_last_of_a_chunk_and_hold_every_view_once(
    few: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: str, batch_size: int
) -> None:
    sizes: list[int] = []
    encode = VQModel.encode

    def spy(model: VQModel, pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pixels))
        return encode(model, pixels)

    monkeypatch.setattr(VQModel, "encode", spy)
    config = TokenizeConfig(image_size=16, views=views, batch_size=batch_size, chunk_rows=8)
    tokenize(config, few, tmp_path, RuntimeConfig(device="cpu", threads=2))
    num_views = len(view_names(views))
    wanted = []
    for rows in (8, 4):
        whole, rest = divmod(rows * num_views, batch_size)
        wanted += [batch_size] * whole + [rest] * (rest > 0)
    assert sizes == wanted


@pytest.mark.usefixtures("without_shape_checks")
def test_an_image_is_read_and_decoded_once_whatever_the_number_of_views(
    few: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []

    def spy(data: bytes) -> Image.Image:
        decoded.append(data)
        return decode(data)

    monkeypatch.setattr(stages.tokenize, "decode", spy)
    config = TokenizeConfig(image_size=16, views="ten_crop_x2", batch_size=7, chunk_rows=5)
    tokenize(config, few, tmp_path, RuntimeConfig(device="cpu", threads=2))
    index = ImageIndex.of(few)
    assert len(index) == 12
    assert sorted(decoded) == sorted(index.read(few["images"], image) for image in range(len(index)))


def test_batches_cut_a_stream_of_views_anywhere() -> None:
    pictures = np.arange(7 * 3 * 2 * 2 * 3, dtype=np.uint8).reshape(7, 3, 2, 2, 3)
    for batch_size in (1, 2, 3, 5, 21, 100):
        found = list(batches(iter(pictures), batch_size))
        assert [len(batch) for batch in found[:-1]] == [batch_size] * (len(found) - 1)
        assert np.array_equal(np.concatenate(found), pictures.reshape(21, 2, 2, 3))
    assert list(batches(iter(()), 4)) == []


def test_tokens_of_a_tar_are_those_of_its_files(whole: Path, inputs: dict[str, Path], tmp_path: Path) -> None:
    for folder in inputs["images"].iterdir():
        with tarfile.open(tmp_path / f"{folder.name}.tar", "w") as tar:
            for image in sorted(folder.iterdir()):
                tar.add(image, image.name)
    config = DatasetConfig(source="imagenet_tar", root=tmp_path, heldout_fraction=0.2)
    dataset(config, {"images": tmp_path}, tmp_path / "dataset", RuntimeConfig(threads=1))
    changed = inputs | {"images": tmp_path, "dataset": tmp_path / "dataset"}
    tokenize(CONFIG, changed, tmp_path / "out", RuntimeConfig(device="cpu", threads=2))
    assert content(tmp_path / "out") == content(whole)


def test_an_image_changed_after_indexing_is_named(inputs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(inputs["images"], tmp_path / "images")
    (tmp_path / "images" / "discs" / "03.png").write_bytes((tmp_path / "images" / "discs" / "04.png").read_bytes())
    with pytest.raises(InputError, match=r"discs/03\.png is not the file that the dataset stage indexed"):
        tokenize(
            CONFIG, inputs | {"images": tmp_path / "images"}, tmp_path / "out", RuntimeConfig(device="cpu", threads=1)
        )
