"""Loop that writes a store: each process writes its share of the units. One process then calls `UnitWriter.finish`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.runtime.distributed import World, barrier
from stages.runtime.progress import Progress
from stages.stores.units import UnitWriter


def write_units(
    writer: UnitWriter,
    make: Callable[[int, Progress], Mapping[str, Any]],
    *,
    pending: Iterable[int],
    output: Path,
    what: str,
    world: World,
    per_row: int = 1,
) -> None:
    """Write this process's units one after the other; see `write_as_made`. `make` computes the blocks of a unit."""

    def in_turn(units: Sequence[int], progress: Progress) -> Iterator[tuple[int, Mapping[str, Any]]]:
        return ((unit, make(unit, progress)) for unit in units)

    write_as_made(writer, in_turn, pending=pending, output=output, what=what, world=world, per_row=per_row)


def write_as_made(
    writer: UnitWriter,
    make: Callable[[Sequence[int], Progress], Iterable[tuple[int, Mapping[str, Any]]]],
    *,
    pending: Iterable[int],
    output: Path,
    what: str,
    world: World,
    per_row: int = 1,
) -> None:
    """Write this process's units in the order in which they are made, and wait for the other processes.

    Args:
        writer: Writer of the store.
        make: Computes the blocks of some units by array, each with its unit, and updates the progress.
        pending: Units of this process that are not written yet, from `writer.pending`.
        output: Folder of the artifact, where progress is written.
        what: Name of the things that progress counts.
        world: The process group. Progress covers the main process's share only.
        per_row: Number of counted things in one row of the store.
    """
    pending, spec = list(pending), writer.spec
    total = per_row * spec.count_rows(range(world.rank, spec.num_units, world.size))
    progress = Progress(output, what, total, done=total - per_row * spec.count_rows(pending), enabled=world.is_main)
    for unit, blocks in make(pending, progress):
        writer.write(unit, **blocks)
    barrier()
