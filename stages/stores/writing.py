"""How a stage writes a store together: each process its share of the units, the main process the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
    """Write this process's units, wait for the others, and declare the store complete.

    Args:
        writer: Of the store.
        make: Gives the blocks of a unit by array, and counts its work as progress.
        pending: Units of this process that are not written yet, from `writer.pending`.
        output: Folder of the artifact, where progress is written.
        what: Things that progress counts.
        world: This process among the others; progress is that of the main one's share.
        per_row: Things in one row of the store.
    """
    pending, spec = list(pending), writer.spec
    total = per_row * spec.count_rows(range(world.rank, spec.num_units, world.size))
    progress = Progress(output, what, total, done=total - per_row * spec.count_rows(pending), enabled=world.is_main)
    for unit in pending:
        writer.write(unit, **make(unit, progress))
    barrier()
    if world.is_main:
        writer.finish()
