"""Looking after the cache: verify names damage, gc keeps what is needed, accept re-stamps, why tells every change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pipeline.plan import explain
from pipeline.upkeep import accept, collect, garbage, verify
from stages.runtime.errors import InputError

if TYPE_CHECKING:
    from conftest import Tiny


def test_verify_finds_sizes_at_once_and_flipped_bits_when_deep(tiny: Tiny) -> None:
    tiny.run_all()
    path = tiny.run("beta").path / "number.json"
    assert [finding.damages for finding in verify(tiny.runtime, deep=True, project=tiny.project)] == [[]] * 3
    path.write_text("9")  # as long as what it was
    shallow = {finding.stage: finding.damages for finding in verify(tiny.runtime, project=tiny.project)}
    deep = {finding.stage: finding.damages for finding in verify(tiny.runtime, deep=True, project=tiny.project)}
    assert shallow["beta"] == []
    assert deep["beta"] == ["file number.json has other contents than when it was made"]
    path.unlink()
    missing = {finding.stage: finding.damages for finding in verify(tiny.runtime, project=tiny.project)}
    assert missing["beta"] == ["file number.json is missing"]


def test_gc_removes_what_nothing_needs_and_nothing_else(tiny: Tiny) -> None:
    tiny.run_all(beta=5)
    old = tiny.run("beta", beta=5).path
    tiny.run_all()
    newest = tiny.run("beta").path
    tiny.run("alpha", force=True)
    (tiny.home / ".work" / "beta-0000").mkdir(parents=True)
    found = garbage(tiny.settings(), tiny.runtime, tiny.project)
    assert {entry.path.name for entry in found if ".trash" not in entry.path.parts} == {
        old.name,
        "beta-0000",
        *(entry.path.name for entry in found if entry.path.name.startswith("gamma")),
    }
    collect(found)
    assert not old.exists()
    assert newest.exists()
    assert not list((tiny.home / ".trash").iterdir())
    assert tiny.run_all() == ["cached"] * 3


def test_gc_leaves_a_run_that_is_going_on_alone(tiny: Tiny) -> None:
    (tiny.home / ".work" / "beta-0000").mkdir(parents=True)
    with tiny.cache.lock("beta-0000"):
        assert garbage(tiny.settings(), tiny.runtime, tiny.project) == []
    assert len(garbage(tiny.settings(), tiny.runtime, tiny.project)) == 1


def test_gc_leaves_alone_what_a_run_has_taken_up_since_it_looked(tiny: Tiny) -> None:
    (tiny.home / ".work" / "beta-0000").mkdir(parents=True)
    found = garbage(tiny.settings(), tiny.runtime, tiny.project)
    with tiny.cache.lock("beta-0000"):
        collect(found)
    assert [entry.path.exists() for entry in found] == [True]
    collect(found)
    assert [entry.path.exists() for entry in found] == [False]


def test_accept_lets_an_artifact_stand_for_edited_code_and_says_so(tiny: Tiny) -> None:
    tiny.run_all()
    before = tiny.run("alpha").path / "number.json"
    tiny.edit("helper", "x + 1", "x + 2")
    assert tiny.plan()["alpha"].state == "stale"
    manifest, ignored = accept(tiny.module.GRAPH["alpha"], tiny.settings(), tiny.runtime, tiny.project)
    assert ignored == ["code stages.helper:increase was edited"]
    assert tiny.plan()["alpha"].state == "cached"
    assert tiny.plan()["alpha"].reason.startswith("accepted by ")
    assert "stages.helper:increase was edited" in (manifest.accepted or "")
    assert tiny.run_all() == ["cached"] * 3
    assert (tiny.run("alpha").path / "number.json").stat().st_ino == before.stat().st_ino
    tiny.edit("helper", "x + 2", "x + 1")  # the old key still stands
    assert tiny.run_all() == ["cached"] * 3


def test_accept_needs_something_whole_to_accept(tiny: Tiny) -> None:
    alpha = tiny.module.GRAPH["alpha"]
    with pytest.raises(InputError, match="alpha has no whole artifact to accept"):
        accept(alpha, tiny.settings(), tiny.runtime, tiny.project)
    with pytest.raises(InputError, match="beta reads a stage that is not finished"):
        accept(tiny.module.GRAPH["beta"], tiny.settings(), tiny.runtime, tiny.project)
    tiny.run("alpha")
    with pytest.raises(InputError, match="alpha is cached already"):
        accept(alpha, tiny.settings(), tiny.runtime, tiny.project)


def test_why_tells_every_change(tiny: Tiny) -> None:
    alpha, beta = tiny.module.GRAPH["alpha"], tiny.module.GRAPH["beta"]
    assert explain(alpha, tiny.settings(), tiny.runtime, tiny.project) == ["not made yet"]
    tiny.run_all()
    assert explain(alpha, tiny.settings(), tiny.runtime, tiny.project) == []
    tiny.edit("helper", "x + 1", "x + 2")
    lines = explain(alpha, tiny.settings(alpha=3), tiny.runtime, tiny.project)
    assert lines == ["setting value: 1 -> 3", "code stages.helper:increase was edited"]
    assert explain(beta, tiny.settings(alpha=3), tiny.runtime, tiny.project) == ["waits for alpha"]
    tiny.run("alpha", alpha=3)
    assert explain(beta, tiny.settings(alpha=3), tiny.runtime, tiny.project) == ["input alpha has other contents"]
