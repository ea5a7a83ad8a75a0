import os
import socket
from pathlib import Path

import pytest

from stages.runtime.errors import InputError
from stages.runtime.regular_file import open_if_regular, open_regular, require_regular


def test_a_regular_file_and_a_link_to_one_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"bytes")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"bytes"


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_refused_at_once_and_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "to_fifo").symlink_to("fifo")
    kinds = {"fifo": "a FIFO", "to_fifo": "a FIFO", "folder": "a folder", "zero": "a device"}
    for name, kind in kinds.items():
        with pytest.raises(InputError, match=f"{name} is {kind}, expected a regular file"):
            open_regular(tmp_path / name)


def test_a_socket_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(InputError, match="socket is a socket"):
            open_regular(tmp_path / "socket")


def test_a_path_that_leads_nowhere_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    for name in ("missing", "loop", "dangling", "x" * 300):
        with pytest.raises(InputError, match="cannot be opened"):
            open_regular(tmp_path / name)
    with pytest.raises(InputError, match="is no path"):
        open_regular(tmp_path / "null\0byte")


def test_a_fifo_that_takes_a_files_place_after_the_look_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, fifo = tmp_path / "file", tmp_path / "fifo"
    file.write_bytes(b"bytes")
    os.mkfifo(fifo)
    status = os.stat(file)
    require_regular(status)
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "stat", lambda path: status)
    with pytest.raises(OSError, match="a FIFO"):
        open_if_regular(fifo)
    assert len(os.listdir("/proc/self/fd")) == before
