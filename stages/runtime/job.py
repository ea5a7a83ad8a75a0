"""The process of a stage, `python -m stages.<name> --job job.json`: its job file, and its error report.

The launcher writes the job file, and the stage's function does the work. An error is reported as one line in
`record/error.json`, because the exit code of torchrun only says that a process failed.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from conf.runtime import RuntimeConfig
from conf.section import Section
from stages.runtime.artifact import RECORD, read_json, write_json
from stages.runtime.errors import InputError, Interrupted

logger = logging.getLogger(__name__)
Inputs = Mapping[str, Path]
Config = TypeVar("Config", bound=Section)
StageFunction = Callable[[Config, Inputs, Path, RuntimeConfig], None]
ERROR_FILE = Path(RECORD) / "error.json"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of one stage.

    `inputs` maps the name of a stage to its finished artifact, and "images" to the root of the images. `output` is the
    work directory. It becomes the artifact when the stage succeeds.
    """

    stage: str
    config: dict[str, Any]
    inputs: dict[str, Path]
    output: Path
    runtime: dict[str, Any]

    def write(self, path: Path) -> None:
        """Write the job as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read a job from its JSON file."""
        fields = read_json(path)
        inputs = {name: Path(value) for name, value in fields.pop("inputs").items()}
        return cls(**fields | {"inputs": inputs, "output": Path(fields["output"])})


def main(function: StageFunction[Config], config_type: type[Config]) -> None:
    """Run `function` as the process of a stage. Every stage calls this from `__main__`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", type=Path, required=True)
    job = Job.read(parser.parse_args().job)
    runtime = RuntimeConfig.model_validate(job.runtime)
    rank = int(os.environ.get("RANK", "0"))
    _configure_logging(rank, runtime)
    _die_with_parent()
    # SIGUSR1 comes before the time limit of a Slurm job. A stage that can save in between sets its own handlers.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: sys.exit(143))
    code = 0
    try:
        function(config_type.model_validate(job.config), job.inputs, job.output, runtime)
    except Interrupted as stop:
        code = 128 + stop.number
        logger.warning("%s", stop)
        _write_error(job, stop, 1, rank)
    except Exception as error:
        code = 2 if isinstance(error, InputError) else 1
        logger.error("%s", traceback.format_exc())
        _write_error(job, error, code, rank)
    _end(code)


def _end(code: int) -> NoReturn:
    """End this process now: its work is on disk, and all that Python would still do could only fail.

    Python's own end destroys C++ objects while threads that use them may run. A rank of a finished training aborted
    there once, and its stage counted as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _write_error(job: Job, error: Exception, code: int, rank: int) -> None:
    """Write the first error of any process for the launcher. If the disk is full, the error only goes to the log."""
    path = job.output / ERROR_FILE
    try:
        if not path.exists():
            kind = type(error).__name__
            write_json(path, {"message": _one_line(error, job), "kind": kind, "code": code, "rank": rank})
    except OSError:
        logger.error("%s", _one_line(error, job))


def _one_line(error: Exception, job: Job) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"disk full below {job.output}: free some space and run again; finished units and checkpoints are kept"
    if _is_cut_file(error):
        return (
            f"a file below {job.output} cannot be written whole, the disk is full or the size of files is limited "
            "(`ulimit -f`): make room and run again; finished units and checkpoints are kept"
        )
    text = " ".join(str(error).split()) or "no message"
    known = isinstance(error, (ValueError, RuntimeError)) and not isinstance(error, UnicodeError)
    return text if known else f"{type(error).__name__}: {text}"


def _is_cut_file(error: Exception) -> bool:
    """Whether a file could not be written whole. torch.save tells it by the words of a RuntimeError alone."""
    if isinstance(error, OSError):
        return error.errno == errno.EFBIG
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("PytorchStreamWriter failed", "unexpected pos")
    )


def _configure_logging(rank: int, runtime: RuntimeConfig) -> None:
    level = runtime.log_level.upper() if rank == 0 else "WARNING"
    logging.basicConfig(
        level=level, stream=sys.stdout, format=f"%(asctime)s [{rank}] %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )


def _die_with_parent() -> None:
    """Ask Linux to stop this process when its parent dies, so that a killed launcher leaves no orphans.

    The agent of torchrun may have died before, while this process was loading its modules. Other parents ask for it
    themselves when they fork.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if "TORCHELASTIC_RUN_ID" in os.environ and not _is_agent(os.getppid()):
        sys.exit(143)


def _is_agent(process: int) -> bool:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
    return b"torch.distributed.run" in command or b"torchrun" in command
