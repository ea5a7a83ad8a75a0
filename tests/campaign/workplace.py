"""Where the campaign works: images, the home of an undisturbed run, and runs of `dpar` as a user starts them."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from pipeline.graph import STAGES
from pipeline.processes import parent_death_hook
from stages.runtime.artifact import file_sha256

ROOT = Path(__file__).resolve().parents[2]
NO_CONTENT = {"record", "views", "damage.json"}  # parts of an artifact that describe it
_DIE_WITH_CAMPAIGN = parent_death_hook()
_POLL_S, _PORTS_S = 0.2, 1.0
_ENDED_S = 60.0  # after a kill, until all processes of the run have to be gone
_IMAGES = 15  # of each class
_INTERRUPTED_AT = 0.5  # share of a run


@dataclass
class Run:
    """A started command, and what was seen of its processes.

    Attributes:
        process: The command itself.
        open_ports: Ports that its processes opened beyond loopback, as "name address".
    """

    process: subprocess.Popen[bytes]
    output: Path
    errors: Path
    open_ports: set[str] = field(default_factory=set)
    _known: dict[int, psutil.Process] = field(default_factory=dict)
    _watch: threading.Thread | None = None

    def watch(self) -> None:
        """Look at the processes of the run, again and again, until the command ends."""
        self._watch = threading.Thread(target=self._look_on, daemon=True)
        self._watch.start()

    def find(self, *words: str) -> psutil.Process | None:
        """A living process of the run whose command line has all the words."""
        for process in list(self._known.values()):
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline())
                if process.is_running() and all(word in command for word in words):
                    return process
        return None

    def wait(self, timeout_s: float) -> int | None:
        """Exit code of the command; None if it did not end in time, and was killed with all its processes."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill_all()
            self.process.wait()
            return None
        finally:
            if self._watch is not None:
                self._watch.join()

    @property
    def said(self) -> str:
        """The last line on stderr that is no progress bar."""
        lines = [line.strip() for line in self.errors.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""

    def printed(self, start: str) -> str:
        """The first line on stdout that begins with `start`; empty without one."""
        lines = self.output.read_text(errors="replace").splitlines()
        return next((line[:300] for line in lines if line.startswith(start)), "")

    def left(self) -> list[psutil.Process]:
        """Processes of the run that are still alive a while after its command has ended."""
        deadline = time.monotonic() + _ENDED_S
        while (alive := [each for each in self._known.values() if _alive(each)]) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return alive

    def kill_all(self) -> None:
        """Kill every process of the run."""
        for process in [*self._known.values(), psutil.Process(self.process.pid)]:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _look_on(self) -> None:
        looked = 0.0
        while self.process.poll() is None:
            with contextlib.suppress(psutil.Error):
                command = psutil.Process(self.process.pid)
                for process in [command, *command.children(recursive=True)]:
                    self._known.setdefault(process.pid, process)
            if time.monotonic() - looked > _PORTS_S:
                looked = time.monotonic()
                for process in list(self._known.values()):
                    with contextlib.suppress(psutil.Error):
                        self.open_ports |= set(_open_ports(process))
            time.sleep(_POLL_S)


@dataclass(frozen=True)
class Workplace:
    """A folder with images and the home of an undisturbed run.

    Attributes:
        folder: Where everything lies.
        until: Last stage of the runs.
        timeout_s: Longest time of one command.
        processes: Processes of a stage; with several, torchrun starts them.
    """

    folder: Path
    until: str
    timeout_s: float
    processes: int = 1

    @property
    def images(self) -> Path:
        """Three classes of images."""
        return self.folder / "images"

    @property
    def reference(self) -> Path:
        """Home of the undisturbed run. Rows work on copies."""
        return self.folder / "reference"

    @property
    def interrupted(self) -> Path:
        """Home of a run that was killed in its midst."""
        return self.folder / "interrupted"

    def prepare_interrupted(self) -> None:
        """Make the run that is killed in its midst, unless a campaign before this one has."""
        if not self.interrupted.exists():
            with self.home("interrupted", source=None) as home:
                run = self.start("run", home=home)
                time.sleep(_INTERRUPTED_AT * sum(self.seconds.values()))
                run.process.kill()
                run.wait(self.timeout_s)
                run.left()
                shutil.copytree(home, self.interrupted, symlinks=True)

    @property
    def last_but_one(self) -> str:
        """Stage before the last one."""
        return self.stages[max(0, len(self.stages) - 2)]

    @property
    def stages(self) -> list[str]:
        """All stages of the runs."""
        return list(STAGES)[: list(STAGES).index(self.until) + 1]

    def ending(self, stage: str) -> Workplace:
        """The same with runs that end after a stage, or after the last one if that comes earlier."""
        return replace(self, until=stage if stage in self.stages else self.until)

    def draw_images(self) -> None:
        """Draw the images, unless they are there."""
        for kind in range(3):
            (self.images / f"stripes{kind}").mkdir(parents=True, exist_ok=True)
            for number in range(_IMAGES):
                path = self.images / f"stripes{kind}" / f"{number:02d}.png"
                if not path.exists():
                    _stripes(kind, number).save(path)

    def prepare(self) -> None:
        """Draw the images and make the undisturbed run, unless a campaign before this one has."""
        self.draw_images()
        seconds = self.folder / "seconds.json"
        if not seconds.exists():
            started = time.time()
            run = self.start("run", home=self.reference)
            if (code := run.wait(self.timeout_s)) != 0:
                raise RuntimeError(f"the undisturbed run ended with {code}: {run.said}")
            shutil.copy(run.errors, self.folder / "usual.stderr")
            ends = [next((self.reference / stage).glob("*/manifest.json")).stat().st_mtime for stage in self.stages]
            lasted = [end - begin for begin, end in pairwise([started, *ends])]
            seconds.write_text(json.dumps(dict(zip(self.stages, lasted, strict=True))))

    def unusual_line(self, run: Run) -> str:
        """The last line on stderr that the undisturbed run has not; empty without one. Numbers count as equal."""

        def lines(path: Path) -> list[str]:
            return [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]

        usual = {re.sub(r"\d+", "", line) for line in lines(self.folder / "usual.stderr")}
        unusual = [line for line in lines(run.errors) if re.sub(r"\d+", "", line) not in usual]
        return unusual[-1][:300] if unusual else ""

    @property
    def seconds(self) -> dict[str, float]:
        """Time that the undisturbed run took to the end of each stage, from that of the stage before."""
        found: dict[str, float] = json.loads((self.folder / "seconds.json").read_text())
        return {stage: found[stage] for stage in self.stages}

    def moment(self, share: float) -> tuple[str, float]:
        """A moment of the undisturbed run, as a share of its time: the stage, and a share of that stage's time."""
        left = share * sum(self.seconds.values())
        for stage, seconds in self.seconds.items():
            if left < seconds or stage == self.until:
                return stage, min(1.0, left / seconds)
            left -= seconds
        raise AssertionError("a run has stages")

    @contextlib.contextmanager
    def home(self, name: str, *, source: Path | None = None, without: str | None = None) -> Iterator[Path]:
        """A home of its own for a row, removed at its end.

        Args:
            name: Name of the folder.
            source: Home that it is a copy of; None for an empty one.
            without: Stage whose artifacts, and those after it, are removed from the copy.
        """
        home = self.folder / "homes" / "".join(letter if letter.isalnum() else "-" for letter in name)
        shutil.rmtree(home, ignore_errors=True)
        if source is not None:
            shutil.copytree(source, home, symlinks=True)
        else:
            home.mkdir(parents=True)
        if without is not None:
            shutil.rmtree(home / without, ignore_errors=True)
            self.remove_after(home, without)
        try:
            yield home
        finally:
            shutil.rmtree(home, ignore_errors=True)

    def remove_after(self, home: Path, stage: str) -> None:
        """Remove the artifacts of all stages after `stage`."""
        for later in list(STAGES)[list(STAGES).index(stage) + 1 :]:
            shutil.rmtree(home / later, ignore_errors=True)

    def start(
        self,
        *words: str,
        home: Path,
        settings: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> Run:
        """Start `dpar`. Commands that run stages get the preset `tiny` and the last stage.

        Args:
            words: Command and options.
            home: Home of the run.
            settings: More settings, by address.
            environment: More environment variables.
            before: Called in the new process before the command.
        """
        command = [sys.executable, "-m", "pipeline.cli.main", *words, "--set", f"runtime.home={home}"]
        if words[0] in {"run", "stage"}:
            command += ["--preset", "tiny", "--set", f"dataset.root={self.images}"]
        if words == ("run",):
            command += ["--until", self.until]
        for address, value in (settings or {}).items():
            command += ["--set", f"{address}={value}"]
        output, errors = (self.folder / f"{home.name}.{stream}" for stream in ("stdout", "stderr"))
        with output.open("wb") as stdout, errors.open("wb") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=os.environ | self._environment | dict(environment or {}),
                cwd=self.folder,
                start_new_session=True,
                preexec_fn=lambda: _begin(before),
            )
        run = Run(process, output, errors)
        run.watch()
        return run

    @property
    def _environment(self) -> dict[str, str]:
        return {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DPAR_PROCESSES": str(self.processes)}

    def finish(self, home: Path, settings: Mapping[str, object] | None = None) -> Run:
        """Run again without a fault, to the end.

        Raises:
            RuntimeError: The run failed, or did not end in time.
        """
        run = self.start("run", home=home, settings=settings)
        code = run.wait(self.timeout_s)
        if code != 0:
            how = "a time-out" if code is None else f"exit code {code}"
            raise RuntimeError(f"the run after the fault ended with {how}: {run.said}")
        return run

    def differing(self, home: Path) -> list[str]:
        """Files of artifacts that are not as in the undisturbed run; see `contents`.

        Raises:
            RuntimeError: The code has changed since, and with it the keys.
        """
        wanted, found = contents(self.reference, self.stages), contents(home, self.stages)
        keys, others = ({tuple(Path(name).parts[:2]) for name in names} for names in (wanted, found))
        if others - keys:
            raise RuntimeError(f"the code has changed since the undisturbed run: remove {self.folder}")
        return sorted(name for name in wanted if found.get(name) != wanted[name])


def contents(home: Path, stages: list[str]) -> dict[str, str]:
    """SHA-256 of every file of the stages' artifacts that is part of their content, by path."""
    found = {}
    for stage in stages:
        for path in sorted((home / stage).glob("*/**/*")):
            inside = path.relative_to(home).parts[2:]
            if path.is_file() and inside[0] not in {*NO_CONTENT, "manifest.json"}:
                found[str(path.relative_to(home))] = file_sha256(path)
    return found


def _stripes(kind: int, number: int) -> Image.Image:
    """Coloured stripes whose width is the class."""
    generator = np.random.default_rng([kind, number])
    colours = generator.integers(0, 256, (2, 3), dtype=np.uint8)
    x = (np.arange(40) + generator.integers(40)) // (3 * (kind + 1)) % 2
    return Image.fromarray(np.broadcast_to(colours[x], (40, 40, 3)).copy())


def _begin(before: Callable[[], None] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job of a shell ignores it
    if _DIE_WITH_CAMPAIGN is not None:
        _DIE_WITH_CAMPAIGN()
    if before is not None:
        before()


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _open_ports(process: psutil.Process) -> Iterator[str]:
    for connection in process.net_connections("inet"):
        address = connection.laddr
        if connection.status == psutil.CONN_LISTEN and address and not ipaddress.ip_address(address.ip).is_loopback:
            yield f"{process.name()} {address.ip}"
