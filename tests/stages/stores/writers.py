"""Run by test_writers.py as a program: many processes that write one store, and are killed while they do."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from stages.stores.tokens import TokenFacts, token_writer

UNITS, ROWS, VIEWS, TOKENS, CODEBOOK = 300, 16, 2, 64, 1000
NUM_IMAGES = UNITS * ROWS - 5
FACTS = TokenFacts(
    num_images=NUM_IMAGES,
    num_train=NUM_IMAGES,
    num_classes=10,
    num_views=VIEWS,
    num_tokens=TOKENS,
    grid=8,
    chunk_rows=ROWS,
    codebook_size=CODEBOOK,
    image_size=128,
    views="flip",
    view_names=["center", "mirrored/center"],
    vq_sha256="0" * 64,
)


def write(store: Path, rank: int = 0, size: int = 1) -> None:
    """Write the pending units of one process; what a unit holds depends on its number alone."""
    writer = token_writer(store, FACTS)
    for unit in writer.pending(rank, size):
        generator = np.random.default_rng(unit)
        rows = writer.spec.count_rows([unit])
        tokens = generator.integers(0, CODEBOOK, (rows, VIEWS, TOKENS), dtype=np.uint16)
        writer.write(unit, tokens=tokens, labels=generator.integers(0, 10, rows, dtype=np.uint16))


def start(store: Path, size: int) -> list[int]:
    """Fork writers, and return their ids."""
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                write(store, rank, size)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return children


def exits(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def count_units(store: Path) -> int:
    return len(list((store.parent / "record" / "units").glob("tokens-*.json")))


def kill_and_resume(store: Path, kills: int, size: int) -> dict[str, int]:
    """Kill all writers `kills` times, each time at a random moment after a random number of units; then finish."""
    generator = random.Random(3)
    killed = 0
    for _ in range(kills):
        children = start(store, size)
        wanted = min(count_units(store) + generator.randrange(5), UNITS)
        while count_units(store) < wanted:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.005))
        for child in children:
            os.kill(child, signal.SIGKILL)
        killed += sum(code == -signal.SIGKILL for code in exits(children))
    before = count_units(store)
    failed = sum(code != 0 for code in exits(start(store, size)))
    token_writer(store, FACTS).finish()
    return {"killed": killed, "units_before": before, "failed": failed}


def fill_up(store: Path) -> dict[str, object]:
    """Write until the disk is full, make room, and finish."""
    try:
        write(store)
    except OSError as error:
        full = {"errno": errno.errorcode[error.errno or 0], "partials": len(list(store.rglob("*.partial")))}
    before = {path: path.stat().st_mtime_ns for path in store.glob("*/c/**/*") if path.is_file()}
    done = UNITS - len(token_writer(store, FACTS).pending())
    subprocess.run(["mount", "-o", "remount,size=20m", store.parent], check=True)
    write(store)
    kept = sum(path.stat().st_mtime_ns == changed for path, changed in before.items())
    return full | {"done": done, "kept": kept, "digest": token_writer(store, FACTS).finish()}


if __name__ == "__main__":
    task, path = sys.argv[1], Path(sys.argv[2])
    json.dump(kill_and_resume(path, 12, 8) if task == "kill" else fill_up(path), sys.stdout)
