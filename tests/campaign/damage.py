"""Damaged files of a finished and of an interrupted run: artifacts, work folders, journals, databases, memories.

A row runs until the stage that reads the damaged file, or that was interrupted.
Damage is found by `dpar verify --deep` or by the run itself, and the next run heals it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from random import Random

from campaign.rows import Outcome, Row
from campaign.workplace import NO_CONTENT, Workplace

from pipeline.graph import STAGES

KIND = "damage"
Damage = Callable[[Path, Random], None]


def flip(path: Path, random: Random) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, random: Random) -> None:
    """Cut off the end."""
    os.truncate(path, random.randrange(max(1, path.stat().st_size)))


def empty(path: Path, random: Random) -> None:
    """Leave no byte."""
    os.truncate(path, 0)


def remove(path: Path, random: Random) -> None:
    """Remove the file."""
    path.unlink()


DAMAGES: tuple[Damage, ...] = (flip, truncate, empty, remove)
PLACES: dict[str, tuple[bool, Callable[[Path], Iterable[Path]]]] = {
    "artifact": (True, lambda home: (path for stage in STAGES for path in (home / stage).glob("*/**/*"))),
    "work folder": (False, lambda home: (home / ".work").glob("**/*")),
    "journal": (False, lambda home: (home / ".servers" / "tracking").glob("**/*")),
    "database": (True, lambda home: (home / ".servers").glob("**/*.db")),
    "memory": (True, lambda home: home.glob(".*.json")),
}
"""Whether the home is that of a finished run or of an interrupted one, and the files there."""


def rows(place: Workplace, times: int, seed: int) -> Iterator[Row]:
    """Twice as many rows as `times`: places in turn, kinds of damage in turn, files and bits at random."""
    for number in range(2 * times):
        where = list(PLACES)[number % len(PLACES)]
        damage = DAMAGES[number // len(PLACES) % len(DAMAGES)]
        name = f"{where} {number} {damage.__name__}"
        run = partial(_damaged, place, name, where, damage, Random(f"{seed} {number}"))
        yield Row(kind=KIND, name=name, run=run)


def _damaged(place: Workplace, name: str, where: str, damage: Damage, random: Random) -> Outcome:
    place.prepare()
    finished, files = PLACES[where]
    if not finished:
        place.prepare_interrupted()
    with place.home(name, source=place.reference if finished else place.interrupted) as home:
        last = place.until if finished else next(each for each in place.stages if not any(home.glob(f"{each}/*")))
        found = sorted(path for path in files(home) if path.is_file())
        if not found:
            return Outcome(verdict="survived", said="such a run has no such file")
        chosen = random.choice(found)
        damage(chosen, random)
        return _judged(place.ending(last), home, chosen.relative_to(home))


def _judged(place: Workplace, home: Path, damaged: Path) -> Outcome:
    """Whether damage of contents was named, and never became a result: all later stages are made again."""
    content = damaged.parts[0] in STAGES and damaged.parts[2] not in NO_CONTENT
    if content:  # the stage after it reads it
        place = place.ending([*place.stages, place.until][place.stages.index(damaged.parts[0]) + 1])
    verify = place.start("verify", "--deep", home=home)
    code = verify.wait(place.timeout_s)
    if code not in (0, 1):
        return Outcome(verdict="lost", said=f"{damaged}: `dpar verify` ended with {code}: {verify.said}")
    named = verify.printed("damaged")
    if content:
        place.remove_after(home, damaged.parts[0])
    run = place.start("run", home=home)  # it may stop at the damage, which the next one then heals
    run.wait(place.timeout_s)
    again = place.finish(home)
    said, ports = named or run.said, tuple(verify.open_ports | run.open_ports | again.open_ports)
    # Nothing reads the last artifact: damage that leaves its size is named by `dpar verify` alone.
    differing = [name for name in place.differing(home) if not (named and name == str(damaged))]
    if differing:
        said = f"{damaged}: not as in an undisturbed run: {differing[0]}"
        return Outcome(verdict="lost", said=said, open_ports=ports)
    return Outcome(
        verdict="silent" if content and not named else "survived", said=f"{damaged}: {said}", open_ports=ports
    )
