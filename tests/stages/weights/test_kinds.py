"""What is given as weights and is none is called what it is, in one line with what to do, whatever its name."""

from __future__ import annotations

import os
import re
import socket
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from weights_files import OTHER_KINDS, WHOLE, torch_bytes

from stages.runtime.errors import InputError
from stages.weights import kinds
from stages.weights.kinds import require_weights_file
from stages.weights.state_dict import open_state_dict

MISSING = "there is no such file"


def problem(path: Path) -> str:
    with pytest.raises(InputError) as caught, open_state_dict(path, "tokenizer.weights", "model", MISSING):
        pass
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < len(str(path)) + 500
    return message


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("name", ["vq.pt", "vq.safetensors", "vq"])
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path: Path, kind: str, name: str) -> None:
    content, words = OTHER_KINDS[kind]
    path = tmp_path / name
    path.write_bytes(content())
    message = problem(path)
    assert message.startswith(str(path))
    assert re.search(words, message), message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.onnx", "an ONNX model"),
        ("frozen.pb", "a graph of TensorFlow"),
        ("model.ckpt.data-00000-of-00001", "a part of a TensorFlow checkpoint"),
        ("model.ckpt.index", "a part of a TensorFlow checkpoint"),
        ("flax_model.msgpack", "a file of Flax"),
        ("vq.pt.crdownload", r"an unfinished download \(.crdownload\)"),
    ],
)
def test_formats_without_a_mark_are_known_by_name(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(bytes(range(150, 250)))
    assert re.search(words, problem(tmp_path / name))


def test_weights_are_weights_whatever_their_name(tmp_path: Path) -> None:
    header_like_gzip = save({"a": torch.zeros(4)}, {"note": "x" * (0x8B1F - 72 - len('{"__metadata__":{"note":""},'))})
    for name in ("weights.onnx", "weights.part", "weights.json", "weights.safetensors"):
        for content in (WHOLE, save({"weight": torch.arange(4.0)}), torch_bytes({"a": torch.zeros(2)}, legacy=True)):
            (tmp_path / name).write_bytes(content)
            require_weights_file(tmp_path / name, "tokenizer.checkpoint")
    (tmp_path / "any").write_bytes(header_like_gzip)
    require_weights_file(tmp_path / "any", "tokenizer.checkpoint")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "a folder without files"),
        (["README.md"], "a folder with README.md, .*give a weights file"),
        (["config.json", "model.safetensors"], "a folder with model.safetensors, .*give one of its files"),
        (["model.safetensors.index.json", "m-1.safetensors"], "a folder with a checkpoint in several files"),
        ([".metadata", "__0_0.distcp"], "a folder with a checkpoint of torch.distributed.*format_utils"),
        (["saved_model.pb", "fingerprint.pb"], "a folder with a SavedModel of TensorFlow"),
    ],
)
def test_a_folder_is_called_by_what_is_in_it(tmp_path: Path, files: list[str], words: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert re.search(f"{tmp_path} is {words}", problem(tmp_path))


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    fifo, link = tmp_path / "fifo", tmp_path / "link.pt"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    for path in (fifo, link):
        assert re.search("is a FIFO, expected a regular file", problem(path))
    assert re.search("is a device", problem(Path("/dev/zero")))
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "socket"))
        assert re.search("is a socket", problem(tmp_path / "socket"))


def test_a_missing_file_and_a_link_that_leads_nowhere_are_told_apart(tmp_path: Path) -> None:
    assert problem(tmp_path / "none.pt") == MISSING
    (tmp_path / "link.pt").symlink_to("elsewhere.pt")
    assert problem(tmp_path / "link.pt").endswith(
        "a link to elsewhere.pt, which does not exist: get the file that it leads to"
    )
    (tmp_path / "annexed.pt").symlink_to(".git/annex/objects/x/SHA256E-s1--4d7a.pt")
    assert problem(tmp_path / "annexed.pt").endswith("run `git annex get` on it")
    with pytest.raises(InputError, match=r"tokenizer.checkpoint is .*none.pt, but there is no such file"):
        require_weights_file(tmp_path / "none.pt", "tokenizer.checkpoint")


def test_a_zip_archive_of_too_many_members_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "many.pt", "w") as archive:
        for number in range(3000):
            archive.writestr(f"archive/data/{number}", b"")
    monkeypatch.setattr(kinds, "_MOST_DIRECTORY", 2**16)
    monkeypatch.setattr(zipfile, "ZipFile", None)  # is not asked
    assert re.search("its directory has .* bytes, expected at most 65536", problem(tmp_path / "many.pt"))
