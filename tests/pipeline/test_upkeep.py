"""Cache maintenance: verify reports damage, accept re-stamps an artifact, why lists all changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pipeline.plan import explain
from pipeline.upkeep import accept, verify
from stages.runtime.errors import InputError

if TYPE_CHECKING:
    from conftest import Tiny


def test_verify_finds_sizes_at_once_and_flipped_bits_when_deep(finished: Tiny) -> None:
    path = finished.run("beta").path / "number.json"
    assert [finding.damages for finding in verify(finished.runtime, deep=True, project=finished.project)] == [[]] * 3
    path.write_text("9")  # as long as what it was
    shallow = {finding.stage: finding.damages for finding in verify(finished.runtime, project=finished.project)}
    deep = {finding.stage: finding.damages for finding in verify(finished.runtime, deep=True, project=finished.project)}
    assert shallow["beta"] == []
    assert deep["beta"] == ["file number.json has other contents than when it was made"]
    path.unlink()
    missing = {finding.stage: finding.damages for finding in verify(finished.runtime, project=finished.project)}
    assert missing["beta"] == ["file number.json is missing"]


@pytest.mark.slow
def test_accept_makes_an_artifact_valid_for_edited_code_and_records_it(finished: Tiny) -> None:
    before = finished.run("alpha").path / "number.json"
    finished.edit("helper", "x + 1", "x + 2")
    assert finished.plan()["alpha"].state == "stale"
    manifest, ignored = accept(finished.module.GRAPH["alpha"], finished.settings(), finished.runtime, finished.project)
    assert ignored == ["code stages.helper:increase was edited"]
    assert manifest == finished.cache.lookup(manifest.key)
    assert finished.plan()["alpha"].state == "cached"
    assert finished.plan()["alpha"].reason.startswith("accepted by ")
    assert "stages.helper:increase was edited" in (manifest.accepted or "")
    assert finished.run_all() == ["cached"] * 3
    assert (finished.run("alpha").path / "number.json").stat().st_ino == before.stat().st_ino
    finished.edit("helper", "x + 2", "x + 1")  # the old key is still valid
    assert finished.run_all() == ["cached"] * 3


@pytest.mark.slow
def test_accept_needs_an_undamaged_artifact(tiny: Tiny) -> None:
    alpha = tiny.module.GRAPH["alpha"]
    with pytest.raises(InputError, match="alpha has no undamaged artifact to accept"):
        accept(alpha, tiny.settings(), tiny.runtime, tiny.project)
    with pytest.raises(InputError, match="beta reads alpha, which is not finished"):
        accept(tiny.module.GRAPH["beta"], tiny.settings(), tiny.runtime, tiny.project)
    tiny.run("alpha")
    with pytest.raises(InputError, match="alpha is already cached"):
        accept(alpha, tiny.settings(), tiny.runtime, tiny.project)


@pytest.mark.slow
def test_accept_ignores_code_and_packages_and_nothing_else(tiny: Tiny) -> None:
    graph = tiny.module.GRAPH

    def refused(name: str, **values: int) -> str:
        with pytest.raises(InputError) as caught:
            accept(graph[name], tiny.settings(**values), tiny.runtime, tiny.project)
        return str(caught.value)

    tiny.run_all(beta=7)
    tiny.edit("helper", "x + 1", "x + 2")
    assert refused("alpha", alpha=3) == (
        "no artifact of alpha differs only in code and packages; the nearest also differs in: setting value: 1 -> 3; "
        "run it with `dpar stage alpha`"
    )
    tiny.run("alpha")  # other contents
    assert "the nearest also differs in: input alpha has other contents; run it" in refused("beta", beta=7)
    assert tiny.plan(beta=7)["beta"].state == "stale"


@pytest.mark.slow
def test_accept_takes_the_newest_acceptable_artifact_and_not_the_newest(tiny: Tiny) -> None:
    alpha = tiny.module.GRAPH["alpha"]
    first = tiny.run("alpha")
    tiny.edit("helper", "x + 1", "x + 2")
    second = tiny.run("alpha")
    tiny.run("alpha", alpha=8)  # newer, with other settings
    tiny.edit("helper", "x + 2", "x + 3")
    manifest, _ = accept(alpha, tiny.settings(), tiny.runtime, tiny.project)
    assert manifest.digest == second.digest
    assert f"made as {second.key}" in str(manifest.accepted)
    (second.path / "number.json").write_text("4")  # same size: found by reading. A link: the accepted one too
    tiny.edit("helper", "x + 3", "x + 4")
    manifest, _ = accept(alpha, tiny.settings(), tiny.runtime, tiny.project)
    assert manifest.digest == first.digest


@pytest.mark.slow
def test_why_compares_with_the_nearest_artifact_also_while_an_input_is_missing(tiny: Tiny) -> None:
    beta = tiny.module.GRAPH["beta"]

    def why(**values: int) -> list[str]:
        return explain(beta, tiny.settings(**values), tiny.runtime, tiny.project)

    tiny.run_all(beta=5)
    tiny.edit("beta", "    x = ", "    x = 0 + ")
    tiny.run("beta", beta=9)
    tiny.edit("beta", "    x = 0 + ", "    x = ")  # near is now the older one
    assert why(beta=6) == ["setting value: 5 -> 6"]
    assert tiny.plan(beta=6)["beta"].reason == "setting value: 5 -> 6"
    assert why(beta=6, alpha=2) == ["setting value: 5 -> 6", "waits for alpha"]
    assert tiny.plan(beta=6, alpha=2)["beta"].reason == "setting value: 5 -> 6 (and 1 more: dpar why beta)"
    assert tiny.plan(beta=6, alpha=2)["gamma"].reason == "waits for beta"


def test_why_names_the_damage_of_an_artifact_with_the_right_key(finished: Tiny) -> None:
    path = finished.run("alpha").path
    (path / "number.json").write_text("")
    alpha = finished.module.GRAPH["alpha"]
    damaged = ["file number.json has 0 bytes, expected 1"]
    assert explain(alpha, finished.settings(), finished.runtime, finished.project) == damaged


@pytest.mark.slow
def test_why_lists_every_change(tiny: Tiny) -> None:
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
