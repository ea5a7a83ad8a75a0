"""Hostile inputs: images, tars, weights and settings that would block, fill memory, run code or garble the terminal.

Each must end soon: refused with exit code 2 and one line that says why, or carried out with a line about it.
"""

from __future__ import annotations

import io
import os
import socket
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

from campaign.rows import Outcome, Row
from campaign.workplace import Workplace
from weights_files import OTHER_KINDS, RAN, malicious

KIND = "hostile"
_LIMIT_S = 600.0  # beside others on a busy machine; alone they take seconds
_LONGEST_LINE = 2000
_DATASET = ("stage", "dataset")


@dataclass(frozen=True)
class Trial:
    """Settings that name something hostile, which `fill` makes in an empty folder, and the command that reads it."""

    name: str
    fill: Callable[[Path], dict[str, object]]
    words: tuple[str, ...] = ("run", "--until", "tokenizer")


def rows(place: Workplace, times: int, seed: int) -> Iterator[Row]:
    """As many rows as `times`, of all sorts in turn, begun at a random one."""
    trials = [*_images(), *_weights(), *_settings()]
    Random(seed).shuffle(trials)
    for trial in islice(trials, times):
        yield Row(kind=KIND, name=trial.name, run=partial(_tried, place, trial))


def _tried(place: Workplace, trial: Trial) -> Outcome:
    place.draw_images()
    with place.home(trial.name) as folder:
        home, goal = folder / "home", folder / "inputs"
        goal.mkdir()
        run = place.start(*trial.words, home=home, settings=trial.fill(goal))
        code = run.wait(min(_LIMIT_S, place.timeout_s))
        ports, text = tuple(run.open_ports), run.errors.read_text(errors="replace")
        # A run that ends at once may also warn that Prefect's server was still starting.
        lines = [line for line in text.splitlines() if not line.startswith("warning: Prefect")]
        if (goal / RAN).exists():
            return Outcome(verdict="lost", said="code in the file was executed", open_ports=ports)
        if code is None:
            return Outcome(verdict="lost", said=f"it did not end: {run.said}", open_ports=ports)
        plain = run.said.isprintable() and len(run.said) < _LONGEST_LINE
        if code == 2 and len(lines) == 1 and plain:
            return Outcome(verdict="survived", said=run.said, open_ports=ports)
        if code in (0, 1) and plain:
            return Outcome(verdict="survived" if run.said else "silent", said=run.said, open_ports=ports)
        said = f"exit code {code} and {len(lines)} lines: {run.said}"
        return Outcome(verdict="lost" if code != 2 else "silent", said=said, open_ports=ports)


def _images() -> Iterator[Trial]:
    def root(make: Callable[[Path], object], folder: Path) -> dict[str, object]:
        """An image folder with two good images of a class, and what `make` puts into the class."""
        for number in range(2):
            path = folder / "images" / "a" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_png(8, 8))
        make(folder / "images" / "a")
        return {"dataset.root": folder / "images"}

    def tar(members: Callable[[tarfile.TarFile], object], folder: Path) -> dict[str, object]:
        with tarfile.open(folder / "train.tar", "w") as archive:
            members(archive)
        return {"dataset.source": "imagenet_tar", "dataset.root": folder / "train.tar"}

    folders: dict[str, Callable[[Path], object]] = {
        "FIFO among images": lambda at: os.mkfifo(at / "x.png"),
        "socket among images": _socket,
        "link to /dev/zero among images": lambda at: (at / "x.png").symlink_to("/dev/zero"),
        "folder that contains itself": lambda at: (at / "again").symlink_to(at.parent),
        "image of four billion pixels": lambda at: (at / "x.png").write_bytes(_png(65000, 65000)),
        "image that is cut off": lambda at: (at / "x.png").write_bytes(_png(8, 8)[:40]),
        "name that clears the screen": lambda at: (at / "\x1b[2J\n.png").write_bytes(b"no image"),
    }
    for name, make in folders.items():
        yield Trial(name, partial(root, make), _DATASET)
    tars: dict[str, Callable[[tarfile.TarFile], object]] = {
        "tar with a path that climbs": lambda tar: tar.addfile(_member("../../n00000001.tar", 0)),
        "tar with a FIFO": lambda tar: tar.addfile(_member("n00000001.tar", 0, tarfile.FIFOTYPE)),
        "tar without members": lambda tar: None,
        "tar in a tar that is none": lambda tar: tar.addfile(_member("n00000001.tar", 9), io.BytesIO(b"no tar at")),
    }
    for name, members in tars.items():
        yield Trial(name, partial(tar, members), _DATASET)
    as_tar: dict[str, object] = {"dataset.source": "imagenet_tar"}
    yield Trial("FIFO as the tar", lambda folder: _fifo(folder, "dataset.root") | as_tar, _DATASET)
    yield Trial("/dev/zero as the tar", lambda folder: as_tar | {"dataset.root": "/dev/zero"}, _DATASET)


def _weights() -> Iterator[Trial]:
    def weights(content: Callable[[Path], bytes], folder: Path) -> dict[str, object]:
        path = folder / "vq.pt"
        path.write_bytes(content(folder))
        return {"tokenizer.source": "checkpoint", "tokenizer.checkpoint": path}

    for kind in ("git lfs", "html", "cut off zip", "TorchScript", "optimiser", "index of shards"):
        yield Trial(f"weights: {kind}", partial(weights, lambda folder, kind=kind: OTHER_KINDS[kind][0]()))  # type: ignore[misc]
    for kind in ("zip, system", "legacy, mkdir", "keys that take forever", "deflated members", "header of a gigabyte"):
        yield Trial(f"weights: {kind}", partial(weights, lambda folder, kind=kind: malicious(folder)[kind]()))  # type: ignore[misc]
    source: dict[str, object] = {"tokenizer.source": "checkpoint"}
    yield Trial("weights: FIFO", lambda folder: _fifo(folder, "tokenizer.checkpoint") | source)
    yield Trial("weights: /dev/zero", lambda folder: {"tokenizer.checkpoint": "/dev/zero"} | source)


def _settings() -> Iterator[Trial]:
    bomb = "[&a [x,x,x,x,x,x,x,x]" + "".join(f",&{b} [{','.join(['*' + a] * 8)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)) + "]"  # fmt: skip  # noqa: E501
    settings: dict[str, dict[str, object]] = {
        "YAML that grows": {"tokenizer.model": bomb},
        "YAML that makes an object": {"seed": "!!python/object/apply:os.system ['true']"},
        "number that is none": {"train.training.learning_rate": ".nan"},
        "number of a thousand digits": {"seed": "9" * 1000},
        "text that clears the screen": {"dataset.source": '"\\e[2J\\n"'},
        "setting that does not exist": {"train.nosuch": 1},
        "list of ten thousand": {"dataset.root": "[" + "a," * 10_000 + "]"},
        "null byte in a path": {"dataset.root": '"a\\0b"'},
    }
    for name, values in settings.items():
        yield Trial(f"settings: {name}", lambda folder, values=values: dict(values))  # type: ignore[misc]


def _png(width: int, height: int) -> bytes:
    """A black PNG of any size: a few bytes, whatever its sides."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * ((width * 3 + 1) * min(height, 1000)))
    header = struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member


def _fifo(folder: Path, address: str) -> dict[str, object]:
    os.mkfifo(folder / "fifo")
    return {address: folder / "fifo"}


def _socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket has at most 107 characters
        try:
            opened.bind("x.png")
        finally:
            os.chdir(here)
