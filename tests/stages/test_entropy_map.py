import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_facts import token_facts

from conf.entropy_map import EntropyMapConfig
from conf.runtime import RuntimeConfig
from conf.section import Section
from models.config import GPTConfig
from models.gpt import GPT
from stages.entropy_map import entropy_map
from stages.runtime.artifact import read_json
from stages.runtime.errors import ArtifactError
from stages.stores.entropies import EntropyStore
from stages.stores.tokens import TokenStore, token_writer
from stages.weights.own import GPT_FAMILY, load_gpt, save_model

N, A, T, V = 11, 2, 16, 40
CONFIG = EntropyMapConfig(batch_size=3, precision="float32")


def write_tokens(path: Path) -> None:
    generator = np.random.default_rng(0)
    facts = token_facts(num_images=N, num_classes=2, num_views=A, num_tokens=T, codebook_size=V)
    writer = token_writer(path, facts)
    tokens = generator.integers(0, V, (N, A, T)).astype(np.uint16)
    for unit in writer.pending():
        rows = writer.spec.rows(unit)
        writer.write(unit, tokens=tokens[rows], labels=np.zeros(N, np.uint16)[rows])
    writer.finish()


def write_model(folder: Path, num_tokens: int = T) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(dim=32, num_layers=2, num_heads=4, codebook_size=V, num_tokens=num_tokens, num_classes=None))
    with torch.no_grad():  # the head starts at zero, which makes every entropy the same
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    save_model(folder, GPT_FAMILY, model, model.config)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    write_tokens(folder / "tokenize" / "tokens.zarr")
    write_model(folder / "entropy_model")
    return {"tokenize": folder / "tokenize", "entropy_model": folder / "entropy_model"}


@pytest.fixture(scope="module")
def whole(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("entropy_map")
    entropy_map(CONFIG, inputs, output, RuntimeConfig(device="cpu", threads=1))
    return output


def content(output: Path) -> dict[str, bytes]:
    files = (path for path in output.rglob("*") if path.is_file())
    names = {path.relative_to(output).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in names.items() if not name.startswith("record/")}


def test_entropies_are_those_of_the_models_predictions(whole: Path, inputs: dict[str, Path]) -> None:
    store = EntropyStore.open(whole / "entropies.zarr")
    tokens = TokenStore.of(inputs)
    model = load_gpt(inputs["entropy_model"])
    images, views = np.arange(N).repeat(A), np.tile(np.arange(A), N)
    with torch.inference_mode():
        wanted = model.entropy(torch.from_numpy(tokens.fetch(images, views).astype(np.int64))).numpy()
    found = store.fetch(images, views)
    assert found.std() > 0.01
    assert np.abs(found - wanted).max() < 1e-4
    assert np.abs(found[:, 0] - math.log(V)).max() < 1e-6
    assert 0 <= found.min() <= found.max() <= math.log(V) + 1e-4


def test_the_store_says_what_it_was_made_from(whole: Path, inputs: dict[str, Path]) -> None:
    store = EntropyStore.open(whole / "entropies.zarr")
    assert store.tokens_digest == TokenStore.of(inputs).digest
    assert (store.num_train, store.grid, store.codebook_size, store.facts.chunk_rows) == (8, 4, V, 4)


def test_the_view_tells_mean_entropies(whole: Path, draw_view: Callable[[str, Section, dict[str, Path]], Path]) -> None:
    store = EntropyStore.open(whole / "entropies.zarr")
    predicted = store.fetch(np.arange(N).repeat(A), np.tile(np.arange(A), N))[:, 1:].astype(np.float64)
    assert read_json(draw_view("entropy_map", CONFIG, {"entropy_map": whole}) / "metrics.json") == {
        "mean_entropy": pytest.approx(predicted[: 8 * A].mean(), rel=1e-9),
        "heldout_mean_entropy": pytest.approx(predicted[8 * A :].mean(), rel=1e-9),
    }


def test_a_killed_run_is_continued_to_the_same_bytes(whole: Path, inputs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "killed")
    for name in ("record/units/entropies-000001.json", "entropies.zarr/entropy/c/1/0/0"):
        (tmp_path / "killed" / name).unlink()
    kept = tmp_path / "killed" / "entropies.zarr/entropy/c/2/1/0"
    before = kept.stat().st_mtime_ns
    entropy_map(CONFIG, inputs, tmp_path / "killed", RuntimeConfig(device="cpu", threads=1))
    assert content(tmp_path / "killed") == content(whole)
    assert kept.stat().st_mtime_ns == before


def test_a_model_for_other_tokens_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    write_model(tmp_path / "entropy_model", num_tokens=64)
    with pytest.raises(ArtifactError, match=r"the entropy model in .* has num_tokens 64, expected 16 as in"):
        entropy_map(CONFIG, inputs | {"entropy_model": tmp_path / "entropy_model"}, tmp_path / "out", RuntimeConfig())
