"""The process of a stage: its job, its error line and its exit code."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from stages.runtime.artifact import read_json, write_atomic, write_json
from stages.runtime.job import Job

BODY = """
import errno, sys
from conf.entropy_map import EntropyMapConfig
from stages.runtime.errors import InputError
from stages.runtime.job import main

def work(config, inputs, output, runtime):
    {body}

main(work, EntropyMapConfig)
"""

SAVE_TO_A_LIMIT = """
import resource, torch
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
with (output.parent / "large.pt").open("wb") as file:
    torch.save(torch.zeros(100_000), file)
"""


def run(tmp_path: Path, body: str, config: dict[str, object] | None = None) -> subprocess.CompletedProcess[str]:
    (tmp_path / "stage.py").write_text(BODY.format(body=textwrap.indent(body, "    ").strip()))
    job = Job(stage="x", config=config or {}, inputs={"a": tmp_path}, output=tmp_path / "out", runtime={})
    job.write(tmp_path / "job.json")
    command = [sys.executable, str(tmp_path / "stage.py"), "--job", str(tmp_path / "job.json")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    job = Job(stage="x", config={"a": 1}, inputs={"b": tmp_path}, output=tmp_path / "o", runtime={"device": "cpu"})
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job


def test_a_stage_gets_its_own_section(tmp_path: Path) -> None:
    done = run(tmp_path, "output.mkdir(); (output / 'x').write_text(str(config.batch_size))", {"batch_size": 3})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/x").read_text() == "3"


@pytest.mark.parametrize(("body", "code"), [("print('done')", 0), ("raise InputError('no')", 2)])
def test_nothing_after_the_work_can_make_it_fail(tmp_path: Path, body: str, code: int) -> None:
    done = run(tmp_path, f"import atexit, os; atexit.register(os.abort); {body}")
    assert done.returncode == code
    assert ("done" in done.stdout) == (code == 0), "what was printed is not lost"


@pytest.mark.slow
def test_a_process_whose_agent_died_while_it_loaded_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")  # its parent is this process and no agent of torchrun
    done = run(tmp_path, "output.mkdir()")
    assert (done.returncode, done.stderr) == (143, "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("raise InputError('root is /x, expected a folder')", 2, "root is /x, expected a folder"),
        ("raise ValueError('two\\nlines')", 1, "two lines"),
        ("raise KeyError('k')", 1, "KeyError: 'k'"),
        (f"raise OSError({errno.ENOSPC}, 'No space left on device')", 1, "disk full below"),
        (f"raise OSError({errno.EFBIG}, 'File too large')", 1, "a file below"),
        (SAVE_TO_A_LIMIT, 1, "a file below"),
    ],
)
def test_an_error_comes_back_as_one_line_with_its_code(tmp_path: Path, body: str, code: int, message: str) -> None:
    done = run(tmp_path, body)
    assert done.returncode == code
    error = read_json(tmp_path / "out/record/error.json")
    assert error["code"] == code
    assert error["message"].startswith(message)
    assert "\n" not in error["message"]
    assert "Traceback" in done.stdout  # the log keeps the whole story


def test_a_wrong_section_is_an_error_of_ours_not_a_silent_default(tmp_path: Path) -> None:
    done = run(tmp_path, "pass", {"batch_size": 0})
    assert done.returncode == 1
    assert "batch_size" in read_json(tmp_path / "out/record/error.json")["message"]


def test_an_atomic_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(ZeroDivisionError):
        write_atomic(path, lambda _: 1 // 0)
    assert json.loads(path.read_text()) == {"old": 1}
    assert [child.name for child in tmp_path.iterdir()] == ["a.json"]
