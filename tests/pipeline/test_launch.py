"""A stage's process, alone and under a real torchrun: messages of failures, and nothing outlives a cancellation."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from conf.runtime import RuntimeConfig
from pipeline.graph import Stage
from pipeline.launch import StageFailed, launch
from pipeline.launchers import local
from stages.runtime.errors import InputError
from stages.runtime.job import Job

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent
STAGE = Stage(name="alpha", inputs=(), summary="", spmd=True)
MODULE = """
import os, signal, time
{imports}
from conf.section import Section
from stages.runtime.errors import InputError
from stages.runtime.job import main
from stages.runtime.progress import Progress


def alpha(config, inputs, output, runtime):
    rank = int(os.environ["RANK"])
    print("the last thing it said", flush=True)
    {body}


if __name__ == "__main__":
    main(alpha, Section)
"""
# Ignores SIGTERM, like a worker that hangs in a GPU call; its progress shows that it runs.
DEAF = """signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Progress(output, str(os.getpid()), 1)
    time.sleep(600)"""
Run = Callable[..., None]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Launch a stage whose function has the given body."""
    shutil.copytree(ROOT / "stages" / "runtime", tmp_path / "stages" / "runtime")
    shutil.copy(ROOT / "stages" / "__init__.py", tmp_path / "stages")
    lock = os.open(tmp_path / "lock", os.O_CREAT)

    def run(
        body: str,
        *,
        imports: str = "",
        processes: int = 1,
        nodes: int = 1,
        on_progress: Callable[[Any], None] = id,
    ) -> None:
        (tmp_path / "stages/alpha.py").write_text(MODULE.format(body=body, imports=imports))
        runtime = RuntimeConfig(home=tmp_path, processes=processes, nodes=nodes, device="cpu")
        settings = runtime.model_dump(mode="json")
        job = Job(stage="alpha", config={}, inputs={}, output=tmp_path / "work", runtime=settings)
        launch(
            STAGE.name,
            STAGE.entry[0],
            job,
            runtime,
            code_root=tmp_path,
            locks=(lock,),
            spmd=STAGE.spmd,
            on_progress=on_progress,
        )

    yield run
    os.close(lock)


@pytest.fixture(autouse=True)
def conf_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the real `conf` on the path: the small project has no settings of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"ended by SIGKILL, possibly out of memory"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"ended by SIGSEGV"),
        ("os._exit(7)", r"exit code 7, last line: the last thing it said"),
    ],
)
def test_the_error_of_a_worker_is_reported_and_not_the_one_of_torchrun(run: Run, body: str, message: str) -> None:
    with pytest.raises(StageFailed, match=message) as caught:
        run(body)
    assert caught.value.code == 1


def test_a_module_that_cannot_be_imported_is_named(run: Run) -> None:
    with pytest.raises(StageFailed, match=r"exit code 1, last line: ModuleNotFoundError: No module named 'nowhere'"):
        run("pass", imports="import nowhere")


def test_the_line_and_the_code_of_an_error_come_through(run: Run, tmp_path: Path) -> None:
    with pytest.raises(StageFailed) as caught:
        run('raise InputError("the weights are not there")')
    assert (caught.value.message, caught.value.code) == ("the weights are not there", 2)
    assert "Traceback" in caught.value.log.read_text()
    run("pass")
    assert not (tmp_path / "work/record/error.json").exists()


def test_a_killed_worker_is_the_cause_and_not_the_error_it_gives_another(run: Run) -> None:
    # As in a collective: the other process only sees that its peer is gone.
    body = """if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    try:
        time.sleep(600)
    finally:
        raise RuntimeError("Connection closed by peer")"""
    with pytest.raises(StageFailed, match=r"ended by SIGKILL"):
        run(body, processes=2)


def test_no_worker_outlives_a_cancel_even_if_it_ignores_sigterm(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "GRACE_S", 0.3)
    workers: list[psutil.Process] = []

    def cancel(progress: dict[str, Any]) -> None:
        workers.append(psutil.Process(int(progress["what"])))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(DEAF, on_progress=cancel)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert len(workers) == 1
    assert alive == []


LOOKED_UP = """import socket
from pathlib import Path


def slow(*name):
    Path(__file__).with_name("looked_up").write_text(str(name))
    raise OSError


socket.gethostbyaddr = socket.gethostbyname = slow
"""


def test_processes_of_one_machine_meet_where_a_killed_launcher_was_and_need_no_host_name_and_no_port(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reaches a port of torchrun's store runs code as this user. gloo's own sockets listen on the loopback.

    A look-up of a host name that does not resolve takes seconds to minutes.
    """
    (tmp_path / "sitecustomize.py").write_text(LOOKED_UP)  # every process imports it
    for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PET_NNODES", "GROUP_RANK"):
        monkeypatch.setenv(name, "3")
    (tmp_path / "work/record/torchrun").mkdir(parents=True)
    for name in ("agents", "ranks"):  # files of a rendezvous that never ended
        (tmp_path / "work/record/torchrun" / name).write_bytes(b"old")
    body = """import psutil, torch
    from stages.runtime.distributed import all_reduce_sum, barrier, process_group
    with process_group(runtime) as world:
        assert all_reduce_sum(torch.ones(1)).item() == world.size == 2
        assert os.environ["GROUP_RANK"] == "0"
        assert not {"SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PET_NNODES"} & set(os.environ)
        if world.is_main:
            family = [psutil.Process().parent(), *psutil.Process().parent().children()]
            sockets = [socket for each in family for socket in each.net_connections() if socket.status == "LISTEN"]
            (output / "listening").write_text(" ".join(sorted({socket.laddr.ip for socket in sockets})))
        barrier()"""
    run(body, processes=2)
    assert (tmp_path / "work/listening").read_text() == "127.0.0.1"
    assert not (tmp_path / "looked_up").exists()


def test_one_process_is_alone_whatever_started_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("SLURM_PROCID", "3")
    run('assert (os.environ["RANK"], os.environ["WORLD_SIZE"], "SLURM_PROCID" in os.environ) == ("0", "1", False)')


def test_the_allocator_of_the_user_stays(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run('assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"')
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    run('assert os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"')


def test_two_machines_need_a_cluster(run: Run) -> None:
    with pytest.raises(InputError, match=r"runtime.nodes is 2 and runtime.launcher is local: set runtime.nodes=1, or"):
        run("pass", nodes=2)


@pytest.mark.parametrize("body", ["pass", "os._exit(7)"])
def test_a_run_leaves_nothing_but_its_log(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    with contextlib.suppress(StageFailed):
        run(body)
    assert [path.name for path in (tmp_path / "work").rglob("*")] == ["record", "log.txt"]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_code_of_the_project_comes_before_any_other_of_its_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other/stages").mkdir(parents=True)
    (tmp_path / "other/stages/__init__.py").write_text("raise RuntimeError('the wrong stages')")
    (tmp_path / "other/only_here.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "other"), str(ROOT)]))
    run("(output / 'from').write_text(sys.modules['stages'].__file__)", imports="import sys, only_here")
    assert (tmp_path / "work/from").read_text() == str(tmp_path / "stages/__init__.py")
