"""The artifact cache: commits, content digests, locks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.cache.manifest import key_of
from pipeline.cache.store import Cache

PARTS = {"schema": 2, "stage": "alpha", "settings": {}, "code": [], "inputs": {}, "packages": {}, "external": None}
KEY = key_of(PARTS)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "home")


def fill(cache: Cache, **files: str) -> None:
    """Write files into the work folder; `__` stands for "/"."""
    for name, text in {"number.json": "1", **files}.items():
        path = cache.work(KEY) / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_commit_is_found_under_its_key(cache: Cache) -> None:
    assert cache.lookup(KEY) is None
    fill(cache, store__chunk="abc")
    manifest = cache.commit(PARTS, 1.5)
    assert cache.lookup(KEY) == manifest
    assert set(manifest.files) == {"number.json", "store/chunk"}
    assert (cache.path(KEY) / "store/chunk").read_text() == "abc"
    assert not cache.work(KEY).exists()


def test_the_digest_is_of_names_and_contents_and_not_of_the_record(cache: Cache) -> None:
    fill(cache, record__units="first", record__log="first")
    first = cache.commit(PARTS, 1.0)
    fill(cache, record__units="second")
    again = cache.commit(PARTS, 2.0)
    fill(cache, other="1")
    more = cache.commit(PARTS, 2.0)
    fill(cache, **{"number.json": "2"})
    changed = cache.commit(PARTS, 2.0)
    assert again.digest == first.digest
    assert len({first.digest, more.digest, changed.digest}) == 3


def test_what_a_killed_attempt_left_half_written_is_no_part_of_the_artifact(cache: Cache) -> None:
    fill(cache)
    clean = cache.commit(PARTS, 1.0)
    leftovers = {".number.json.123.partial": "1", "store__c.0f.partial": "1", "record__progress.partial": "1"}
    fill(cache, **leftovers)
    after_kill = cache.commit(PARTS, 1.0)
    assert after_kill.files == clean.files
    assert not list(cache.path(KEY).rglob("*.partial"))


def test_a_manifest_left_by_a_kill_before_the_rename_is_written_anew(cache: Cache) -> None:
    fill(cache, **{"manifest.json": "{}"})
    assert cache.lookup(KEY) is None
    assert set(cache.commit(PARTS, 1.0).files) == {"number.json"}
    assert cache.lookup(KEY) is not None


def test_a_lock_makes_the_second_wait_and_says_so(cache: Cache) -> None:
    told, entered = threading.Event(), threading.Event()
    said: list[str] = []

    def wait(message: str) -> None:
        said.append(message)
        told.set()

    def second() -> None:
        with cache.lock(KEY, on_wait=wait):
            entered.set()

    with cache.lock(KEY):
        thread = threading.Thread(target=second)
        thread.start()
        assert told.wait(10)
        assert cache.is_locked(KEY)
        assert not entered.is_set()
    thread.join(10)
    assert entered.is_set()
    assert not cache.is_locked(KEY)
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    assert said == [f"stage {KEY.partition('-')[0]}: {holder} is making {KEY}, waiting for it"]


def test_a_lock_is_held_until_its_last_holder_closes_it(cache: Cache) -> None:
    with cache.lock(KEY) as descriptor:
        inherited = os.dup(descriptor)  # as inherited by a child process
    assert cache.is_locked(KEY)
    os.close(inherited)
    assert not cache.is_locked(KEY)


def test_who_waits_is_told_that_the_process_has_ended_and_left_the_lock_to_a_child(cache: Cache) -> None:
    program = (
        "import subprocess, sys\nfrom pathlib import Path\nfrom pipeline.cache.store import Cache\n"
        f"with Cache(Path({str(cache.home)!r})).lock({KEY!r}) as lock:\n"
        "    child = subprocess.Popen(['cat'], pass_fds=[lock])\n"
        "print(child.pid)\n"
    )
    said: list[str] = []
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as parent:
        assert parent.stdin is not None
        pid = parent.pid
        parent.wait(30)
        with pytest.raises(InterruptedError), cache.lock(KEY, on_wait=lambda message: stop(said, message)):
            raise AssertionError("the lock was free")
    assert said[0].startswith(f"stage alpha: a child of process {pid} on {socket.gethostname()}, which has ended, is")


def stop(said: list[str], message: str) -> None:
    said.append(message)
    raise InterruptedError


@pytest.mark.parametrize("text", ["", "12", "x y", "a file of an older version"])
def test_a_lock_that_names_nobody_is_held_by_another_process(cache: Cache, text: str) -> None:
    said: list[str] = []
    with cache.lock(KEY) as lock:
        os.ftruncate(lock, 0)
        os.pwrite(lock, text.encode(), 0)
        with pytest.raises(InterruptedError), cache.lock(KEY, on_wait=lambda message: stop(said, message)):
            raise AssertionError("the lock was free")
    assert said == [f"stage alpha: another process is making {KEY}, waiting for it"]
