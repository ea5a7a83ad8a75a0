"""SIGKILL at random times over a run, of each kind of process. The run is then started again and must end the same.

A row has the artifacts that an undisturbed run has at that time, and runs the stage that is being made then.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from random import Random

import psutil
from campaign.rows import Outcome, Row
from campaign.workplace import Run, Workplace

from pipeline.graph import STAGES
from pipeline.processes import free_port
from stages.runtime.artifact import read_json

KIND = "kills"
_POLL_S = 0.05
_TRIES = 3


def rows(place: Workplace, times: int, seed: int) -> Iterator[Row]:
    """Kills of the command, of a stage's process, of torchrun's agent, of the Prefect server and of MLflow's."""
    two = replace(place, folder=place.folder / "two-processes", processes=2)
    victims: dict[str, tuple[Workplace, Callable[[Run], psutil.Process | None]]] = {
        "command": (place, lambda run: psutil.Process(run.process.pid)),
        "stage": (place, lambda run: run.find("-m stages.", "--job")),
        "agent": (two, lambda run: run.find("stages.runtime.torchrun")),
        "prefect": (place, lambda run: run.find("prefect", "server") or run.find("uvicorn", "prefect")),
    }
    for victim, (where, find) in victims.items():
        random = Random(f"{seed} {victim}")
        for number in range(times):
            share = random.random()
            name = f"{victim} {number} at {share:.3f} of a run"
            yield Row(kind=KIND, name=name, run=lambda w=where, f=find, s=share, n=name: _killed(w, f, s, n))  # type: ignore[misc]
    random = Random(f"{seed} mlflow")
    for number in range(times):
        share = random.random()
        name = f"mlflow {number} at {share:.3f} of a run"
        yield Row(kind=KIND, name=name, run=lambda s=share, n=name: _mlflow_killed(place, s, n))  # type: ignore[misc]


def _killed(place: Workplace, find: Callable[[Run], psutil.Process | None], share: float, name: str) -> Outcome:
    """Kill in a run; once more in another one if it was too fast for the kill."""
    place.prepare()
    stage, within = place.moment(share)
    usual, at = place.seconds[stage], place.ending(stage)
    for _ in range(_TRIES):
        with _home_before(place, stage, name) as home:
            run = at.start("run", home=home)
            started = _begun(run, stage)
            struck = _strike(run, find, started + within * usual)
            code = run.wait(place.timeout_s)
            if struck:
                return _judged(at, home, run, code)
            usual = time.monotonic() - started
    raise RuntimeError(f"no such process was met in {_TRIES} runs")


def _home_before(place: Workplace, stage: str, name: str) -> AbstractContextManager[Path]:
    """A home with everything that is there before a stage: nothing at all before the first one."""
    if stage == place.stages[0]:
        return place.home(name)
    return place.home(name, source=place.reference, without=stage)


def _begun(run: Run, stage: str) -> float:
    """When the work on a stage began: for the first one, when the command was started."""
    while stage != next(iter(STAGES)) and run.process.poll() is None and run.find("-m stages.", "--job") is None:
        time.sleep(_POLL_S)
    return time.monotonic()


def _strike(run: Run, find: Callable[[Run], psutil.Process | None], when: float) -> bool:
    """Kill the process that `find` gives, at the first moment after a time at which there is one."""
    while run.process.poll() is None:
        if time.monotonic() >= when and (victim := find(run)) is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
                return True
        time.sleep(_POLL_S)
    return False


def _judged(place: Workplace, home: Path, run: Run, code: int | None) -> Outcome:
    """Whether all was there after another run, nothing was left behind, and a failed run said why."""
    ports, left = set(run.open_ports), run.left()
    said = run.said if code else "the run went on"
    if code is None:
        return Outcome(verdict="lost", said=f"it hung: {said}", open_ports=tuple(ports))
    if left:
        names = ", ".join(process.name() for process in left)
        run.kill_all()
        return Outcome(verdict="lost", said=f"processes outlived the run: {names}", open_ports=tuple(ports))
    again = place.finish(home)
    ports |= again.open_ports
    if differing := place.differing(home):
        return Outcome(verdict="lost", said=f"not as in an undisturbed run: {differing[0]}", open_ports=tuple(ports))
    silent = code > 0 and not said  # who is killed cannot say anything
    return Outcome(verdict="silent" if silent else "survived", said=said, open_ports=tuple(ports))


def _mlflow_killed(place: Workplace, share: float, name: str) -> Outcome:
    """Kill the MLflow server of `dpar up` during a run that records in it."""
    place.prepare()
    stage, within = place.moment(share)
    usual, place = place.seconds[stage], place.ending(stage)
    with _home_before(place, stage, name) as home:
        ports = {"runtime.prefect_port": free_port(), "runtime.mlflow_port": free_port()}
        up = place.start("up", home=home, settings=ports)
        if up.wait(place.timeout_s) != 0:
            return Outcome(verdict="lost", said=f"`dpar up` failed: {up.said}")
        try:
            victim = _service(home, "MLflow")
            address = {"DPAR_TRACKING_URI": f"http://127.0.0.1:{ports['runtime.mlflow_port']}"}
            run = place.start("run", home=home, settings=ports, environment=address)
            _strike(run, lambda _: victim, _begun(run, stage) + within * usual)
            code = run.wait(place.timeout_s)
        finally:
            place.start("down", home=home, settings=ports).wait(place.timeout_s)
        return _judged(place, home, run, code)


def _service(home: Path, name: str) -> psutil.Process:
    services = read_json(home / ".servers" / "state.json")["services"]
    return psutil.Process(next(service["pid"] for service in services if service["name"] == name))
