"""gc keeps artifacts that are needed, recent or in use, and never touches files that the cache did not make."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.cache.manifest import key_of
from pipeline.garbage import DAY_S, Found, collect, find_garbage
from pipeline.plan import target
from stages.runtime.errors import InputError

if TYPE_CHECKING:
    from conftest import Tiny

OTHER = "beta-0123456789abcdef0123"


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make everything in a test 100 days old for gc."""
    clock = time.time
    monkeypatch.setattr("pipeline.garbage.now", lambda: clock() + 100 * DAY_S)


def find(tiny: Tiny, *, days: float = 30, presets: dict[str, int] | None = None, **values: int) -> Found:
    """Find garbage. Each preset is given as a value of beta."""
    known = {name: tiny.settings(beta=value) for name, value in (presets or {}).items()}
    return find_garbage(tiny.settings(**values), tiny.runtime, known, older_than_s=days * DAY_S, project=tiny.project)


def names(found: Found) -> set[str]:
    return {entry.path.name for entry in found.garbage}


@pytest.mark.slow
@pytest.mark.usefixtures("later")
def test_what_no_settings_need_is_removed_and_nothing_else(tiny: Tiny) -> None:
    old = [tiny.run(name, beta=5) for name in tiny.module.GRAPH]
    new = [tiny.run(name) for name in tiny.module.GRAPH]
    tiny.run("alpha", force=True)
    assert names(find(tiny, days=101)) == {path.name for path in (tiny.home / ".trash").iterdir()}
    found = find(tiny, presets={"near": 4, "far": 1})
    by_path = {entry.path: entry for entry in found.garbage}
    assert set(by_path) == {old[1].path, old[2].path, *(tiny.home / ".trash").iterdir()}
    assert by_path[old[1].path].why == "no kept artifact was made from it"
    assert by_path[old[1].path].belongs == "preset near with value=5"
    assert by_path[old[2].path].belongs == "preset near, far"
    assert by_path[old[1].path].bytes == sum(f.stat().st_size for f in old[1].path.rglob("*") if f.is_file())
    assert collect(tiny.home, found.garbage) == found.garbage
    assert [result.path.exists() for result in (*old, *new)] == [True, False, False, True, True, True]
    assert list((tiny.home / ".trash").iterdir()) == []
    assert tiny.run_all() == ["cached"] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("later")
def test_what_a_preset_needs_is_kept_with_its_sources(tiny: Tiny) -> None:
    kept = [tiny.run(name, beta=5).path.name for name in tiny.module.GRAPH]
    tiny.run("alpha", alpha=8)
    found = find(tiny, presets={"one": 5}, alpha=9, beta=9, gamma=9)
    assert not names(found) & set(kept)
    assert len(found.garbage) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("later")
def test_a_preset_that_cannot_be_resolved_keeps_artifacts_of_its_settings(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.run_all(beta=5)
    tiny.run("beta", beta=1)  # other contents than those of 5

    def no_root(*_: object) -> None:
        raise InputError("dataset.root is not set")

    monkeypatch.setattr("pipeline.garbage.plan", no_root)
    found = find(tiny, presets={"one": 5}, beta=7)
    assert [entry.belongs for entry in found.garbage] == ["preset one with value=1"]


@pytest.mark.slow
@pytest.mark.usefixtures("later")
def test_what_an_edit_has_made_stale_is_kept_until_it_is_made_again(tiny: Tiny) -> None:
    old = tiny.run("alpha").path
    tiny.edit("helper", "x + 1", "1 + x")
    assert names(find(tiny)) == set()
    tiny.run("alpha")
    assert names(find(tiny)) == {old.name}


@pytest.mark.slow
def test_what_was_made_or_tracked_lately_is_kept_with_its_sources(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [tiny.run(name, alpha=3, beta=5) for name in tiny.module.GRAPH]
    tiny.run_all()
    assert names(find(tiny)) == set()
    clock = time.time
    monkeypatch.setattr("pipeline.garbage.now", lambda: clock() + 31 * DAY_S)
    assert len(names(find(tiny))) == 3
    assert names(find(tiny, days=32)) == set()
    run = tiny.home / ".servers/runs" / f"{results[1].key}.json"
    run.parent.mkdir(parents=True)
    run.write_text("{}")
    os.utime(run, (clock() + 5 * DAY_S,) * 2)
    assert names(find(tiny)) == {results[2].key}  # beta was tracked recently; alpha is its source


@pytest.mark.slow
def test_unfinished_work_is_kept_for_a_while_with_what_it_reads(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    alpha = tiny.run("alpha", alpha=3)
    wanted = target(tiny.module.GRAPH["beta"], tiny.settings(alpha=3, beta=5), tiny.runtime, tiny.project)
    work = tiny.cache.begin(wanted.parts)
    clock = time.time
    monkeypatch.setattr("pipeline.garbage.now", lambda: clock() + 31 * DAY_S)
    found = find(tiny)
    assert names(found) == {alpha.key, work.name}
    assert {entry.why for entry in found.garbage} == {
        "no kept artifact was made from it",
        "left by an unfinished run",
    }
    (work / "checkpoint").write_text("newer")
    os.utime(work / "checkpoint", (clock() + 5 * DAY_S,) * 2)
    assert names(find(tiny)) == set()
    # Work folders of the current settings are kept at any age.
    assert names(find(tiny, days=1, alpha=3, beta=5)) == set()


@pytest.mark.slow
@pytest.mark.usefixtures("later")
def test_what_a_process_holds_is_neither_listed_nor_removed(tiny: Tiny) -> None:
    made = tiny.run("alpha", alpha=3)
    (tiny.home / ".work" / OTHER).mkdir(parents=True)
    listed = find(tiny).garbage
    assert {entry.key for entry in listed} == {made.key, OTHER}
    with tiny.cache.reading([made.key]), tiny.cache.lock(OTHER):
        assert find(tiny).garbage == []
        assert collect(tiny.home, listed) == []
    with tiny.cache.reading([made.key]) as held:
        child = os.dup(held[0])  # a stage's process inherits it
    assert names(find(tiny)) == {OTHER}
    os.close(child)
    assert len(collect(tiny.home, listed)) == 2
    assert not made.path.exists()
    assert not (tiny.home / ".work" / OTHER).exists()


@pytest.mark.slow
def test_a_running_stage_holds_its_inputs_and_a_forced_run_of_them_goes_on(tiny: Tiny) -> None:
    alpha = tiny.run("alpha")
    gate = tiny.gate("beta")
    runner = tiny.start("beta")
    deadline = time.monotonic() + 100
    while not list((tiny.home / ".work").glob("beta-*/record/steps")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert tiny.cache.is_busy(alpha.key)
    assert not tiny.cache.is_locked(alpha.key)
    assert tiny.run("alpha", force=True).state == "ran"
    gate.unlink()
    assert runner.communicate()[0].strip() == "ran"
    assert not tiny.cache.is_busy(alpha.key)


@pytest.mark.slow
@pytest.mark.usefixtures("later")
def test_files_that_the_cache_did_not_make_are_never_listed(tiny: Tiny) -> None:
    own = tiny.run("alpha", alpha=3)
    outside = tiny.root / "outside"
    pictures = tiny.home / "alpha" / "pictures"
    for folder in (outside / "a", pictures, tiny.home / "alpha" / "alpha-holiday", tiny.home / "gamma" / "photos"):
        folder.mkdir(parents=True)
        (folder / "1.jpg").write_text("mine")
    # A linked artifact folder, a linked stage folder, and a folder without a manifest.
    elsewhere = Path(shutil.copytree(own.path, outside / own.path.name))
    linked = tiny.home / "alpha" / "alpha-00000000000000000000"
    linked.symlink_to(elsewhere)
    (outside / "beta").mkdir()
    shutil.copytree(own.path, outside / "beta" / OTHER)
    (tiny.home / "beta").symlink_to(outside / "beta")
    bare = tiny.home / "gamma" / "gamma-00000000000000000000"
    bare.mkdir()
    linked_manifest = tiny.home / "gamma" / "gamma-11111111111111111111"
    linked_manifest.mkdir()
    (linked_manifest / "manifest.json").symlink_to(own.path / "manifest.json")
    for hidden in (".trash", ".work"):
        (tiny.home / hidden).mkdir(exist_ok=True)
        (tiny.home / hidden / "mine").mkdir()
        (tiny.home / hidden / f"{OTHER}.1").symlink_to(outside)
        (tiny.home / hidden / OTHER).symlink_to(outside)
    found = find(tiny)
    assert [entry.path for entry in found.garbage] == [own.path]
    assert [path for path, _ in found.left_alone] == [bare, linked_manifest]
    before = {path for path in tiny.root.rglob("*") if own.path not in (path, *path.parents)}
    collect(tiny.home, found.garbage)
    after = set(tiny.root.rglob("*"))
    assert {path for path in before - after if ".locks" not in path.parts} == set()
    assert not own.path.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("later")
def test_a_damaged_manifest_is_named_and_left_alone(tiny: Tiny) -> None:
    path = tiny.run("alpha", alpha=3).path
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"settings": {', '"settings": {"other": 1,'))
    found = find(tiny)
    assert found.garbage == []
    assert found.left_alone == [(path, "manifest.json: key does not match parts")]


@pytest.mark.slow
@pytest.mark.usefixtures("later")
def test_a_removal_that_is_cut_short_leaves_nothing_in_the_place_of_an_artifact(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny.run("alpha", alpha=3)
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.garbage.shutil.rmtree", lambda path: (path / "manifest.json").unlink())
        collect(tiny.home, find(tiny).garbage)
    assert not made.path.exists()
    found = find(tiny)
    assert [entry.path.parent.name for entry in found.garbage] == [".trash"]
    collect(tiny.home, found.garbage)
    assert list((tiny.home / ".trash").iterdir()) == []
    assert key_of(target(tiny.module.GRAPH["alpha"], tiny.settings(alpha=3), tiny.runtime, tiny.project).parts) == (
        made.key
    )
