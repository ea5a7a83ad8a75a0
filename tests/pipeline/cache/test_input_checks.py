"""Damaged inputs: a stage refuses to read them, and the next run makes them again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from conf.load import load_settings
from conf.runtime import RuntimeConfig
from conf.schema import Settings
from pipeline import runner
from pipeline.cache.input_checks import is_chunk
from pipeline.cache.keys import key_parts
from pipeline.cache.manifest import key_of
from pipeline.graph import STAGES
from pipeline.launch import StageFailed
from pipeline.plan import plan, target
from pipeline.project import DPAR
from pipeline.runner import StageResult, run_stage
from stages.runtime.errors import ArtifactError, InputError, StaleIndexError
from stages.stores.image_index import ImageIndex

if TYPE_CHECKING:
    from conftest import Tiny

CHUNK = "store.zarr/a/c/0"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def test_chunks_are_distinguished_from_other_files() -> None:
    assert is_chunk("tokens.zarr/tokens/c/0/1/0")
    assert is_chunk("deep/tokens.zarr/c/0")
    for name in ("tokens.zarr/tokens/zarr.json", "tokens.zarr/zarr.json", "c/0", "record/c/0", "a.zarr.bak/x/c/0"):
        assert not is_chunk(name)


@pytest.mark.slow
def test_a_flipped_bit_stops_the_stage_that_reads_it_and_the_next_run_heals(finished: Tiny) -> None:
    whole = finished.run("gamma")
    alpha = finished.run("alpha").path
    flip(alpha / "number.json")
    with pytest.raises(ArtifactError) as caught:
        finished.run("beta", beta=9)
    assert str(caught.value) == (
        "beta reads alpha, which is damaged: file number.json has other contents than when it was made "
        f"(in {alpha}): make alpha again with `dpar run`"
    )
    wanted = target(finished.module.GRAPH["beta"], finished.settings(beta=9), finished.runtime, finished.project)
    assert wanted.unmade == ("alpha",)
    assert len(finished.cache.manifests("beta")) == 1
    assert finished.plan()["alpha"].state == "stale"
    assert finished.plan()["alpha"].reason == "file number.json has other contents than when it was made"
    assert finished.run_all(beta=9) == ["ran", "ran", "ran"]
    assert finished.run_all() == ["cached"] * 3
    assert finished.run("gamma").digest == whole.digest


def with_chunks(tiny: Tiny, then: str) -> None:
    """Alpha writes a chunk; beta fails unless the chunk holds what alpha wrote."""
    written = f'(output / "{CHUNK}").parent.mkdir(parents=True)\n    (output / "{CHUNK}").write_text("abc")\n    x = '
    tiny.edit("alpha", "x = ", written)
    read = f'chunk = inputs["alpha"] / "{CHUNK}"\n    if chunk.read_text() != "abc" or {then}:\n        '
    tiny.edit("beta", "x = ", f'{read}raise ArtifactError(f"chunk {{chunk}} is damaged")\n    x = ')
    tiny.edit("beta", "import InputError", "import ArtifactError")


@pytest.mark.slow
def test_a_chunk_that_a_stage_finds_damaged_is_made_again(tiny: Tiny) -> None:
    with_chunks(tiny, "False")
    alpha = tiny.run("alpha").path
    flip(alpha / CHUNK)
    with pytest.raises(StageFailed, match="is damaged") as caught:
        tiny.run("beta")
    assert caught.value.code == 1
    assert tiny.plan()["alpha"].reason == f"file {CHUNK} has other contents than when it was made"
    tiny.edit("beta", 'raise InputError("the test asked for it")', "pass")
    assert tiny.run_all() == ["ran", "ran", "ran"]


@pytest.mark.slow
def test_an_artifact_is_not_blamed_for_an_error_that_only_names_it(tiny: Tiny) -> None:
    with_chunks(tiny, "True")
    tiny.run("alpha")
    with pytest.raises(StageFailed, match="is damaged"):
        tiny.run("beta")
    assert tiny.plan()["alpha"].state == "cached"


@pytest.mark.slow
def test_an_input_that_is_made_again_with_other_contents_meanwhile_commits_nothing(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    alpha = tiny.run("alpha")
    launch = runner.launch

    def replaced_meanwhile(*given: Any, **more: Any) -> None:
        launch(*given, **more)
        (tiny.cache.begin(tiny.cache.manifests("alpha")[0][1].parts) / "number.json").write_text("7")
        tiny.cache.commit(tiny.cache.manifests("alpha")[0][1].parts, 1.0)

    monkeypatch.setattr(runner, "launch", replaced_meanwhile)
    with pytest.raises(InputError, match="beta reads alpha, which was made again with other contents in the meantime"):
        tiny.run("beta")
    assert tiny.cache.manifests("beta") == []
    assert tiny.run("alpha").digest != alpha.digest


@pytest.fixture
def images(tmp_path: Path, image_root: Path) -> Path:
    """Uncompressed pictures, where any byte can be another."""
    for path in sorted(image_root.rglob("*.png")):
        copy = tmp_path / "images" / path.relative_to(image_root).with_suffix(".ppm")
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(copy)
    return tmp_path / "images"


@pytest.fixture
def run(tmp_path: Path, images: Path) -> Callable[..., StageResult]:
    """Run a stage of the real project on a private copy of the images."""

    def run_one(name: str, *overrides: str, root: Path = images) -> StageResult:
        settings, runtime = given(root, tmp_path, *overrides)
        return run_stage(STAGES[name], settings, runtime)

    return run_one


SHORT = ("tokenizer.training.steps=1",)


def given(root: Path, tmp_path: Path, *overrides: str) -> tuple[Settings, RuntimeConfig]:
    places = [f"dataset.root={root}", f"runtime.home={tmp_path / 'home'}", "runtime.device=cpu"]
    return load_settings("tiny", None, [*places, *overrides])


@pytest.mark.slow
def test_equal_pictures_elsewhere_are_indexed_again_and_nothing_after_that_changes(
    run: Callable[..., StageResult], images: Path, tmp_path: Path
) -> None:
    first = run("dataset")
    elsewhere = Path(shutil.copytree(images, tmp_path / "elsewhere"))
    for number, path in enumerate(sorted(elsewhere.rglob("*.ppm"))):
        os.utime(path, (number, number))
    second = run("dataset", root=elsewhere)
    assert second.state == "ran"
    assert second.key != first.key
    assert second.digest == first.digest
    keys = []
    for root in (images, elsewhere):
        settings, runtime = given(root, tmp_path)
        keys.append(
            key_of(
                key_parts(
                    STAGES["tokenizer"],
                    settings,
                    runtime.home,
                    {"dataset": second.digest},
                    DPAR.fingerprint(STAGES["tokenizer"], runtime.home),
                )
            )
        )
    assert keys[0] == keys[1]
    assert run("dataset").state == "cached"


@pytest.mark.slow
def test_other_pictures_under_the_same_names_sizes_and_times_are_indexed_again(
    run: Callable[..., StageResult], images: Path
) -> None:
    first = run("dataset")
    swap_bytes(images / "discs/00.ppm")
    second = run("dataset")
    assert second.state == "ran"
    assert second.digest != first.digest


def swap_bytes(path: Path) -> None:
    """Replace the bytes of a file; size and modification time stay the same."""
    stat = path.stat()
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.slow
def test_a_stage_that_meets_other_bytes_makes_the_next_run_index_again(
    run: Callable[..., StageResult], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Simulates a flipped bit on disk: the contents change, the metadata do not.
    monkeypatch.setattr("pipeline.cache.listing._metadata", lambda stat: f"{stat.st_size} {stat.st_mtime_ns}")
    first = run("dataset")
    for path in images.rglob("*.ppm"):
        swap_bytes(path)
    assert run("dataset").state == "cached"
    with pytest.raises(StageFailed, match="is not the file that the dataset stage indexed") as caught:
        run("tokenizer", *SHORT)
    assert (caught.value.code, caught.value.kind) == (2, "StaleIndexError")
    again = run("dataset")
    assert again.state == "ran"
    assert again.digest != first.digest
    index = ImageIndex.open(again.path)
    assert index.read(images, 0) == (images / index.relpaths[0]).read_bytes()
    with pytest.raises(StaleIndexError, match="run again to index the changed images"):
        ImageIndex.open(first.path).read(images, 0)
    assert run("tokenizer", *SHORT).state == "ran"


@pytest.mark.slow
def test_a_stale_index_makes_the_dataset_stale(
    run: Callable[..., StageResult], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("dataset")

    def meets_other_bytes(stage: str, module: str, job: Any, *_: object, **__: object) -> None:
        raise StageFailed(stage, "image x is not the file", 2, job.output, "StaleIndexError")

    with monkeypatch.context() as patched:
        patched.setattr(runner, "launch", meets_other_bytes)
        with pytest.raises(StageFailed):
            run("tokenizer")
    status = plan(*given(images, tmp_path))[0]
    assert (status.stage, status.state) == ("dataset", "stale")
    assert run("dataset").state == "ran"


@pytest.mark.slow
def test_weights_that_change_while_a_stage_runs_make_nothing(
    run: Callable[..., StageResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("dataset")
    weights = tmp_path / "vq.safetensors"
    weights.write_bytes(b"first")
    chosen = ["tokenizer.source=checkpoint", f"tokenizer.checkpoint={weights}"]
    monkeypatch.setattr(runner, "launch", lambda *_, **__: weights.write_bytes(b"other"))
    with pytest.raises(InputError, match=r"tokenizer.checkpoint .*vq.safetensors has changed while tokenizer ran"):
        run("tokenizer", *chosen)
    assert not (tmp_path / "home" / "tokenizer").exists()
    monkeypatch.setattr(runner, "launch", lambda *_, **__: weights.touch())  # new modification time, same bytes
    assert run("tokenizer", *chosen).state == "ran"


@pytest.mark.slow
def test_weights_are_read_again_when_a_stage_starts(
    run: Callable[..., StageResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("dataset")
    weights = tmp_path / "vq.safetensors"
    weights.write_bytes(b"first")
    chosen = ["tokenizer.source=checkpoint", f"tokenizer.checkpoint={weights}"]
    plan(*given(tmp_path / "images", tmp_path, *chosen))
    memory = tmp_path / "home" / ".digests.json"
    real = memory.read_text()
    (digest,) = {word for word in real.split('"') if len(word) == 64}
    memory.write_text(real.replace(digest, "0" * 64))  # simulates changed bytes with unchanged metadata
    monkeypatch.setattr(runner, "launch", lambda *_, **__: None)
    with pytest.raises(InputError, match=r"vq.safetensors has changed since it was last read: .* run again"):
        run("tokenizer", *chosen)
    assert run("tokenizer", *chosen).state == "ran"
