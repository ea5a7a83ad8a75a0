"""A project of three small stages that run as real processes. Tests can edit its code."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conf.load import load_settings
from conf.runtime import RuntimeConfig
from pipeline.cache.store import Cache
from pipeline.plan import StageStatus, plan
from pipeline.project import Project
from pipeline.runner import StageResult, run_stage

ROOT = Path(__file__).resolve().parent.parent.parent

# Three stages; each reads the number of the previous one. Files next to home make `alpha` slow or make it fail.
HELPER = '''"""Shared arithmetic."""


def increase(x):
    """One more."""
    return x + 1
'''
STAGE = """
import json, time
from pathlib import Path
from conf.section import Section
from stages.runtime.errors import InputError
from stages.runtime.job import main
{imports}


class Config(Section):
    value: int = 1


def {name}(config, inputs, output, runtime):
    gate = Path(runtime.home) / "gate-{name}"
    steps = output / "record" / "steps"
    while gate.exists():
        steps.open("a").write("x")
        time.sleep(0.02)
    if (Path(runtime.home) / "fail-{name}").exists():
        raise InputError("the test asked for it")
    x = {number}
    (output / "number.json").write_text(json.dumps(x))


if __name__ == "__main__":
    main({name}, Config)
"""
VIEW = """
import json
from pathlib import Path
from conf.section import Section
from stages.runtime.job import main


class Config(Section):
    value: int = 1


def alpha(config, inputs, output, runtime):
    if (Path(runtime.home) / "fail-view").exists():
        raise ValueError("the test asked for it")
    x = json.loads((inputs["alpha"] / "number.json").read_text())
    (output / "metrics.json").write_text(json.dumps({"x": x}))
    (output / "figure.png").write_bytes(b"drawn")


if __name__ == "__main__":
    main(alpha, Config)
"""
STAGES = {
    "alpha": STAGE.format(name="alpha", imports="from stages.helper import increase", number="increase(config.value)"),
    "beta": STAGE.format(
        name="beta", imports="", number='min(json.loads((inputs["alpha"] / "number.json").read_text()), config.value)'
    ),
    "gamma": STAGE.format(
        name="gamma", imports="", number='json.loads((inputs["beta"] / "number.json").read_text()) * 10'
    ),
}
PROJECT = """
import sys
from pathlib import Path
from types import SimpleNamespace
from conf.load import load_settings
from conf.section import Section
from pipeline.graph import Stage
from pipeline.project import Project
from pipeline.runner import run_stage


class Config(Section):
    value: int = 1


GRAPH = {
    "alpha": Stage(name="alpha", inputs=(), summary="", spmd=False, packages=()),
    "beta": Stage(name="beta", inputs=("alpha",), summary="", spmd=False, packages=()),
    "gamma": Stage(name="gamma", inputs=("beta",), summary="", spmd=False, packages=()),
}
HERE = Path(__file__).parent


def settings(**values):
    return SimpleNamespace(**{name: Config(value=values.get(name, 1)) for name in GRAPH})


def run(name, force=False, **values):
    _, runtime = load_settings(overrides=[f"runtime.home={HERE / 'home'}"])
    return run_stage(GRAPH[name], settings(**values), runtime, force=force, project=Project(GRAPH, HERE))


if __name__ == "__main__":
    print(run(sys.argv[1]).state)
"""


@dataclass
class Tiny:
    """A copy of the small project in its own folder."""

    root: Path
    module: ModuleType

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def runtime(self) -> RuntimeConfig:
        return load_settings(overrides=[f"runtime.home={self.home}"])[1]  # variables count too

    @property
    def project(self) -> Project:
        return Project(self.module.GRAPH, self.root)

    @property
    def cache(self) -> Cache:
        return Cache(self.home)

    def settings(self, **values: int) -> Any:
        return self.module.settings(**values)

    def run(self, name: str, *, force: bool = False, **values: int) -> StageResult:
        return run_stage(
            self.module.GRAPH[name], self.settings(**values), self.runtime, force=force, project=self.project
        )

    def run_all(self, **values: int) -> list[str]:
        """Run all stages and return their states."""
        return [self.run(name, **values).state for name in self.module.GRAPH]

    def plan(self, **values: int) -> dict[str, StageStatus]:
        return {status.stage: status for status in plan(self.settings(**values), self.runtime, self.project)}

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.root / "stages" / f"{name}.py"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def start(self, name: str) -> subprocess.Popen[str]:
        """Run a stage from another process."""
        command = [sys.executable, str(self.root / "project.py"), name]
        # Tests in a background job of a shell ignore SIGINT, and child processes would inherit that.
        return subprocess.Popen(
            command,
            env=os.environ | {"PYTHONSAFEPATH": "1"},  # the real runner, with the small stages
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def gate(self, name: str) -> Path:
        """The stage keeps running while this file exists."""
        self.home.mkdir(exist_ok=True)
        path = self.home / f"gate-{name}"
        path.touch()
        return path


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    """The small project with an empty cache."""
    return make_tiny_project(tmp_path)


@pytest.fixture
def finished(tmp_path: Path, once: Callable[[str, Callable[[Path], None]], Path]) -> Tiny:
    """A copy of the small project after a run of all stages."""

    def fill(folder: Path) -> None:
        assert make_tiny_project(folder).run_all() == ["ran"] * 3

    shutil.copytree(once("small-project", fill), tmp_path, dirs_exist_ok=True)
    return load_tiny_project(tmp_path)


@pytest.fixture
def make_tiny() -> Callable[[Path], Tiny]:
    """A function that creates the small project in an empty folder."""
    return make_tiny_project


def make_tiny_project(tmp_path: Path) -> Tiny:
    """Create the small project in a folder."""
    shutil.copytree(ROOT / "stages" / "runtime", tmp_path / "stages" / "runtime")
    shutil.copy(ROOT / "stages" / "__init__.py", tmp_path / "stages")
    (tmp_path / "stages" / "views").mkdir()
    (tmp_path / "stages" / "views" / "__init__.py").touch()
    (tmp_path / "stages" / "views" / "alpha.py").write_text(VIEW)
    (tmp_path / "stages" / "helper.py").write_text(HELPER)
    for name, text in STAGES.items():
        (tmp_path / "stages" / f"{name}.py").write_text(text)
    (tmp_path / "project.py").write_text(PROJECT)
    return load_tiny_project(tmp_path)


def load_tiny_project(tmp_path: Path) -> Tiny:
    """Open the small project in a folder that has it."""
    spec = importlib.util.spec_from_file_location("tiny_project", tmp_path / "project.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Tiny(tmp_path, module)


@pytest.fixture
def code_copy(tmp_path: Path) -> Path:
    """A copy of the real stages and models that tests can edit."""
    for package in ("stages", "models"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path
