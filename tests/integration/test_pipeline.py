"""All stages from a folder of images to a score, as a person runs them, and again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from listening import Listening, watched
from odd_names import ODD_NAME

from pipeline.graph import STAGES
from pipeline.processes import HOST
from pipeline.servers.commands import PREFECT_APP

pytestmark = pytest.mark.slow


def dpar(*words: str, home: Path, images: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    settings = ["--set", f"dataset.root={images}", "--set", f"runtime.home={home}"]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli.main", *words, "--preset", "tiny", *settings],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory, image_root: Path) -> tuple[Path, Listening]:
    """The home of a finished run, and what listened meanwhile."""
    home = tmp_path_factory.mktemp("home") / ODD_NAME
    with watched() as listening:
        done = dpar("run", home=home, images=image_root)
    assert "fd_lite0" in done.stdout
    return home, listening


@pytest.fixture(scope="module")
def home(first_run: tuple[Path, Listening]) -> Path:
    """The home of a finished run."""
    return first_run[0]


@pytest.mark.timeout(600)
def test_a_run_opens_one_port_that_of_its_own_server_on_loopback(first_run: tuple[Path, Listening]) -> None:
    _, listening = first_run
    assert {name for name in STAGES if any(f"-m stages.{name} " in each for each in listening.processes)} == {*STAGES}
    assert listening.of("-m stages.") == set()
    assert {address for _, address in listening.found} == {HOST}
    assert all(PREFECT_APP in command for command, _ in listening.found)


def states(home: Path, images: Path, *words: str) -> dict[str, str]:
    status = json.loads(dpar("status", "--json", *words, home=home, images=images).stdout)
    return {stage["stage"]: stage["state"] for stage in status["stages"]}


@pytest.mark.timeout(600)
def test_a_second_run_is_all_cached_and_rewrites_nothing(home: Path, image_root: Path) -> None:
    def files() -> dict[Path, tuple[int, int]]:
        found = [path for path in home.glob("[!.]*/**/*") if path.is_file()]
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}

    before = files()
    assert before
    dpar("run", home=home, images=image_root)
    assert files() == before
    assert set(states(home, image_root).values()) == {"cached"}


def test_a_setting_makes_stale_what_depends_on_it_and_nothing_else(home: Path, image_root: Path) -> None:
    after = states(home, image_root, "--set", "patch_index.target_mean_length=2.2")
    assert {name for name, state in after.items() if state != "cached"} == {
        "patch_index",
        "train",
        "entropy_head",
        "sample",
        "evaluate",
    }


def test_the_artifacts_open_with_the_ordinary_libraries(home: Path) -> None:
    import pyarrow.parquet as pq
    import zarr

    (tokens,) = home.glob("tokenize/*/tokens.zarr")
    assert zarr.open_group(tokens, mode="r")["tokens"].shape == (45, 2, 64)
    (index,) = home.glob("patch_index/*/patches.parquet")
    assert pq.read_table(index).num_rows == 90
    (manifest,) = home.glob("evaluate/*/manifest.json")
    assert json.loads(manifest.read_text())["stage"] == "evaluate"


def test_no_artifact_holds_a_path_of_this_machine(home: Path, image_root: Path) -> None:
    for path in home.glob("[!.]*/*/**/*"):
        if path.is_file() and path.suffix in {".json", ".parquet"} and "record" not in path.parts:
            data = path.read_bytes()
            assert str(home).encode() not in data, path
            assert str(image_root).encode() not in data, path


def test_a_stage_alone_uses_the_same_cache(home: Path, image_root: Path) -> None:
    done = dpar("stage", "patch_index", home=home, images=image_root)
    assert "cached" in done.stdout + done.stderr


def test_broken_images_are_listed_and_too_many_of_them_stop_the_run(
    home: Path, image_root: Path, tmp_path: Path
) -> None:
    for kind in image_root.iterdir():
        (tmp_path / "images" / kind.name).mkdir(parents=True)
        for image in kind.iterdir():
            (tmp_path / "images" / kind.name / image.name).write_bytes(image.read_bytes())
    (tmp_path / "images/discs/broken.png").write_bytes(b"no image")
    arguments = {"home": tmp_path / "home", "images": tmp_path / "images", "check": False}
    done = dpar("stage", "dataset", **arguments)  # type: ignore[arg-type]
    assert done.returncode == 2
    assert "broken.png" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    done = dpar("stage", "dataset", "--set", "dataset.max_broken_fraction=0.05", **arguments)  # type: ignore[arg-type]
    assert done.returncode == 0
    (listed,) = (tmp_path / "home").glob("dataset/*/record/broken.json")
    assert [entry["relpath"] for entry in json.loads(listed.read_text())] == ["discs/broken.png"]
