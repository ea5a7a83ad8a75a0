"""The cache under random sequences of what can happen to it, against a small model.

The stages run in this process, so that a sequence costs little.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from pipeline import upkeep
from pipeline.garbage import collect, find_garbage
from pipeline.plan import target
from stages.runtime.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from conftest import Tiny

    from pipeline.runner import StageResult

NAMES = ("alpha", "beta", "gamma")
VALUES = st.fixed_dictionaries({"alpha": st.integers(1, 2), "beta": st.integers(1, 4)})
STEPS = ("x + 1", "1 + x", "x + 2")  # the first two are other code with the same result
_number = itertools.count(1)


def run_here(stage: str, module: str, job: Any, runtime: Any, *, code_root: Path, **_: Any) -> None:
    """What the process of a stage would do; views are not drawn."""
    if module.startswith("stages.views"):
        return
    names: dict[str, Any] = {"__name__": f"machine_{next(_number)}"}
    for part in ("helper", "moved", stage):
        path = code_root / "stages" / f"{part}.py"
        text = path.read_text() if path.exists() else ""
        exec(text.replace("from stages.helper", "#").replace("from stages.moved", "#"), names)
    names[stage](names["Config"](**job.config), job.inputs, job.output, runtime)


def write(path: Path, text: str) -> None:
    """Write code, each time with another time: two edits can fall into one tick of the file system's clock."""
    path.write_text(text)
    os.utime(path, (next(_number),) * 2)


class CacheMachine(RuleBasedStateMachine):
    """Runs, edits, moves, damage, kills, removals and acceptances in any order."""

    make: Callable[[Path], Tiny]

    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="machine-"))
        self.tiny = type(self).make(self.root)
        self.step, self.moved = STEPS[0], False
        self.made: set[tuple[str, ...]] = set()  # what was made and must still be there, by what decides it

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    def numbers(self, values: dict[str, int]) -> dict[str, int]:
        """What each stage must come to."""
        alpha = values["alpha"] + (2 if "2" in self.step else 1)
        beta = min(alpha, values["beta"])
        return {"alpha": alpha, "beta": beta, "gamma": beta * 10}

    def identity(self, name: str, values: dict[str, int]) -> tuple[str, ...]:
        """Everything that decides what a stage makes: settings, code, and contents of the input."""
        numbers = self.numbers(values)
        decides = {
            "alpha": (self.step, values["alpha"]),
            "beta": (numbers["alpha"], values["beta"]),
            "gamma": (numbers["beta"],),
        }
        return (name, *map(str, decides[name]))

    def run_one(self, name: str, values: dict[str, int], *, force: bool = False) -> StageResult:
        """Run a stage; where that finds an input damaged, make the stages before it again, as `dpar run` does."""
        for _ in range(4):  # each stage before it can be found damaged once
            try:
                return self.tiny.run(name, force=force, **values)
            except ArtifactError:
                for before in NAMES[: NAMES.index(name)]:
                    self.run_one(before, values)
        raise AssertionError(f"{name} does not heal")

    def is_whole(self, result: StageResult) -> bool:
        manifest = self.tiny.cache.read(result.path)
        return manifest is not None and not list(self.tiny.cache.damages(result.path, manifest, deep=True))

    @rule(values=VALUES, until=st.sampled_from(NAMES), force=st.booleans())
    def run(self, values: dict[str, int], until: str, force: bool) -> None:
        for name in NAMES[: NAMES.index(until) + 1]:
            forced = force and name == until
            result = self.run_one(name, values, force=forced)
            known = self.identity(name, values)
            if forced:
                assert result.state == "ran"
            elif known in self.made:
                assert result.state == "cached", known
            self.made.add(known)
            if result.state == "ran" or self.is_whole(result):
                number = json.loads((result.path / "number.json").read_text())
                assert number == self.numbers(values)[name]
        if until == "gamma":
            assert [status.state for status in self.tiny.plan(**values).values()] == ["cached"] * 3

    @rule(step=st.sampled_from(STEPS))
    def edit(self, step: str) -> None:
        path = self.tiny.root / "stages" / ("moved.py" if self.moved else "helper.py")
        write(path, path.read_text().replace(f"return {self.step}", f"return {step}"))
        self.step = step

    @rule()
    def move_a_definition(self) -> None:
        stages = self.tiny.root / "stages"
        here, there = ("moved", "helper") if self.moved else ("helper", "moved")
        write(stages / f"{there}.py", (stages / f"{here}.py").read_text())
        write(stages / f"{here}.py", '"""Nothing."""\n')
        alpha = stages / "alpha.py"
        write(alpha, alpha.read_text().replace(f"from stages.{here} import", f"from stages.{there} import"))
        self.moved = not self.moved

    @rule(data=st.data(), how=st.sampled_from(["another number", "cut", "lose", "manifest"]))
    def damage(self, data: st.DataObject, how: str) -> None:
        whole = [
            finding.path
            for finding in upkeep.verify(self.tiny.runtime, deep=True, project=self.tiny.project)
            if not finding.damages
        ]
        if not whole:
            return
        path = data.draw(st.sampled_from(whole))
        file = path / ("manifest.json" if how == "manifest" else "number.json")
        text = file.read_text()
        if how == "lose":
            file.unlink()
        else:  # the first keeps the size
            file.write_text(text[:-1] if how == "cut" else text.translate(str.maketrans("0123456789", "9876543210")))
        found = {
            each.path: each.damages for each in upkeep.verify(self.tiny.runtime, deep=True, project=self.tiny.project)
        }
        assert found[path]
        assert sum(map(bool, found.values())) == len(found) - len(whole) + 1
        self.made.clear()

    @rule(values=VALUES, name=st.sampled_from(NAMES[:2]))
    def damage_what_is_read_next(self, values: dict[str, int], name: str) -> None:
        """Damage that no size tells, and then a run that reads it."""
        after = NAMES[NAMES.index(name) + 1]
        self.run(values, after, False)
        result = self.run_one(name, values)
        if self.is_whole(result):
            (result.path / "number.json").write_text(str(9 - self.numbers(values)[name]))
            self.made.clear()
            again = self.run_one(after, values, force=True)
            assert json.loads((again.path / "number.json").read_text()) == self.numbers(values)[after]
            assert self.is_whole(self.run_one(name, values))

    @rule(values=VALUES, name=st.sampled_from(NAMES), junk=st.booleans())
    def kill(self, values: dict[str, int], name: str, junk: bool) -> None:
        """A run dies before it commits: its work folder stays, perhaps with files half written."""
        stage, chosen = self.tiny.module.GRAPH[name], self.tiny.settings(**values)
        wanted = target(stage, chosen, self.tiny.runtime, self.tiny.project)
        if not wanted.unmade:
            work = self.tiny.cache.begin(wanted.parts)
            if junk:
                (work / ".number.json.00.partial").write_text("1")
                (work / "number.json").write_text("777")

    @rule(values=VALUES)
    def gc(self, values: dict[str, int]) -> None:
        def cached() -> list[bool]:
            return [status.state == "cached" for status in self.tiny.plan(**values).values()]

        before, chosen = cached(), self.tiny.settings(**values)
        found = find_garbage(chosen, self.tiny.runtime, {}, older_than_s=-60.0, project=self.tiny.project)
        assert collect(self.tiny.home, found.garbage) == found.garbage
        assert not any(entry.path.exists() for entry in found.garbage)
        assert cached() == before
        assert find_garbage(chosen, self.tiny.runtime, {}, older_than_s=-60.0, project=self.tiny.project).garbage == []
        self.made.clear()

    @rule(values=VALUES, name=st.sampled_from(NAMES))
    def accept(self, values: dict[str, int], name: str) -> None:
        stage, chosen = self.tiny.module.GRAPH[name], self.tiny.settings(**values)
        try:
            manifest, ignored = upkeep.accept(stage, chosen, self.tiny.runtime, self.tiny.project)
        except InputError:
            return
        assert ignored
        assert all(line.startswith("code") for line in ignored)
        assert self.tiny.plan(**values)[name].state == "cached"
        assert manifest.parts["settings"] == {"value": values.get(name, 1)}
        shutil.rmtree(self.tiny.cache.path(manifest.key))  # its number may be that of other code

    @invariant()
    def a_finished_artifact_is_sealed(self) -> None:
        for path, manifest in [pair for name in NAMES for pair in self.tiny.cache.manifests(name)]:
            assert manifest.key == path.name
            assert set(manifest.files) == {"number.json"}


def check(
    make_tiny: Callable[[Path], Tiny],
    monkeypatch: pytest.MonkeyPatch,
    *,
    examples: int,
    steps: int,
    shrink: bool = True,
) -> None:
    for caller in ("runner", "views"):
        monkeypatch.setattr(f"pipeline.{caller}.launch", run_here)
    monkeypatch.setattr(
        "stages.runtime.artifact.os.fsync", lambda descriptor: None
    )  # the disk is not what is tried here
    monkeypatch.setattr("pipeline.cache.store._environment", dict)  # asks git: two processes a commit
    monkeypatch.setattr(CacheMachine, "make", staticmethod(make_tiny), raising=False)
    run_state_machine_as_test(
        CacheMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.slow
def test_any_sequence_ends_with_the_right_numbers(
    make_tiny: Callable[[Path], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, steps = os.environ.get("CACHE_MACHINE", "24x20").split("x")  # 100x30 for a change of the cache
    check(make_tiny, monkeypatch, examples=int(examples), steps=int(steps))


@pytest.mark.slow
def test_the_walk_notices_that_inputs_are_not_checked(
    make_tiny: Callable[[Path], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cache.input_checks.require_undamaged", lambda *_: None)
    with pytest.raises(AssertionError):
        check(make_tiny, monkeypatch, examples=12, steps=14, shrink=False)
