"""Checks of the folder that holds the artifacts: writable, free space, locks, clock, kind of file system."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from pipeline.budget.budget import free_disk
from pipeline.doctor.finding import Finding, blocker, ok, warning
from pipeline.text import size

_SMALL_DISK = 2e9  # bytes; the demo and its servers fit
_SKEW_S = 2.0
_NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "fuse.sshfs", "9p")
_LOCKED = 3  # exit code of the child if the lock is held
_TRY_LOCK = (
    "import fcntl, sys\n"
    "try:\n"
    "    fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
    "except BlockingIOError:\n"
    f"    sys.exit({_LOCKED})\n"
)


def check_home(home: Path, mounts: Path = Path("/proc/mounts")) -> Iterator[Finding]:
    """Findings on the folder, or on the folder that it will be made in."""
    place = next(folder for folder in (home.absolute(), *home.absolute().parents) if folder.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as probe:
            path = Path(probe.name)
            now = time.time()
            probe.write(b"x")
            probe.flush()
            yield check_disk(home, free_disk(place))
            yield check_locks(path)
            yield check_clock(path.stat().st_mtime - now)
    except OSError as error:
        yield blocker("home", f"{home} is not writable ({error.strerror})", "set DPAR_HOME to a folder of yours")
        return
    yield check_file_system(file_system(place, mounts))


def check_disk(home: Path, free: int) -> Finding:
    """Free space."""
    found = f"{home}: {size(free)} free"
    if free < _SMALL_DISK:
        return warning("home", found, "free some space, or set DPAR_HOME; `dpar gc` lists what can be removed")
    return ok("home", found)


def check_locks(path: Path) -> Finding:
    """Whether a lock that this process holds keeps another process out: else two runs write the same artifact."""
    with path.open() as held:
        try:
            flock(held, LOCK_EX | LOCK_NB)
        except OSError as error:
            return blocker("locks", f"flock does not work ({error.strerror})", "set DPAR_HOME to another file system")
        command = [sys.executable, "-I", "-S", "-c", _TRY_LOCK, str(path)]
        code = subprocess.run(command, capture_output=True, check=False).returncode
    if code != _LOCKED:
        return blocker("locks", "flock lets two processes in", "set DPAR_HOME to another file system")
    return ok("locks", "flock keeps other processes out")


def check_clock(skew_s: float) -> Finding:
    """Difference of the file system's clock from this machine's."""
    if abs(skew_s) > _SKEW_S:
        return warning(
            "clock", f"times of files differ from the clock by {skew_s:+.0f} s", "synchronise the clocks (NTP)"
        )
    return ok("clock", "times of files agree with the clock")


def check_file_system(kind: str) -> Finding:
    """Kind of the file system."""
    if kind.startswith(_NETWORK):
        return warning(
            "file system",
            f"home is on {kind}: SQLite databases of Prefect and MLflow may be damaged there",
            "set DPAR_TRACKING_URI and PREFECT_API_URL to servers, or DPAR_HOME to a local disk",
        )
    return ok("file system", kind)


def file_system(place: Path, mounts: Path) -> str:
    """Kind of the file system that holds a folder, from the table of mounts."""
    kind, longest = "unknown", -1
    for line in mounts.read_text(encoding="utf-8").splitlines() if mounts.exists() else []:
        _, point, found, *_ = line.split()
        if place.is_relative_to(point) and len(point) >= longest:
            kind, longest = found, len(point)
    return kind
