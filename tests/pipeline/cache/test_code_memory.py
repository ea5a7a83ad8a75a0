"""Remembered fingerprints are used while no file has changed, and recomputed afterwards."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cache import module_code
from pipeline.cache.code_memory import CodeMemory
from pipeline.cache.fingerprint import Code
from stages.runtime.artifact import read_json, write_json

ENTRY = ("stages.stage", "run")
STAGE = "from stages.helper import limit\n\n\ndef run():\n    return limit()\n"
HELPER = "def limit():\n    return 3\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The code of a stage, in two modules."""
    (tmp_path / "code/stages").mkdir(parents=True)
    (tmp_path / "code/stages/__init__.py").touch()
    (tmp_path / "code/stages/stage.py").write_text(STAGE)
    (tmp_path / "code/stages/helper.py").write_text(HELPER)
    return tmp_path / "code"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that the test has parsed so far."""
    module_code._parse.cache_clear()
    names: list[str] = []

    def parse(text: bytes, filename: str) -> ast.Module:
        names.append(Path(filename).name)
        return ast.parse(text, filename=filename)

    monkeypatch.setattr(module_code, "ast", Parser(parse))
    return names


class Parser:
    """`ast` with another `parse`."""

    def __init__(self, parse: Callable[[bytes, str], ast.Module]) -> None:
        self.parse = parse

    def __getattr__(self, name: str) -> object:
        return getattr(ast, name)


def fresh(root: Path) -> CodeMemory:
    """The memory as a new process opens it."""
    return CodeMemory(Code(root), root.parent / "code.json")


def parsed_anew(root: Path, parsed: list[str]) -> tuple[list[str], list[str]]:
    """Digests that a new process gets, and the files it parses for them."""
    module_code._parse.cache_clear()
    parsed.clear()
    digests = fresh(root).fingerprint(ENTRY).digests
    return digests, sorted(parsed)


def test_unchanged_files_are_not_parsed_again(root: Path, parsed: list[str]) -> None:
    first = fresh(root).fingerprint(ENTRY)
    assert sorted(parsed) == ["__init__.py", "helper.py", "stage.py"]
    assert first == Code(root).fingerprint(ENTRY)
    assert parsed_anew(root, parsed) == (first.digests, [])
    assert fresh(root).fingerprint(ENTRY) == first, "what is shown to people is remembered too"


def test_a_file_is_parsed_again_if_another_thread_disturbed_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module_code._parse.cache_clear()
    expected = Code(root).fingerprint(ENTRY)
    module_code._parse.cache_clear()
    disturbed = iter([True, True, False, True, False, False])

    def parse(text: bytes, filename: str) -> ast.Module:
        if next(disturbed):
            raise SystemError("AST constructor recursion depth mismatch (before=78, after=77)")
        return ast.parse(text, filename=filename)

    monkeypatch.setattr(module_code, "ast", Parser(parse))
    assert Code(root).fingerprint(ENTRY) == expected


def test_an_edit_of_a_file_that_was_read_is_seen(root: Path, parsed: list[str]) -> None:
    before = fresh(root).fingerprint(ENTRY).digests
    (root / "stages/helper.py").write_text(HELPER.replace("3", "40"))
    after, files = parsed_anew(root, parsed)
    assert files == ["__init__.py", "helper.py", "stage.py"]
    assert after == Code(root).fingerprint(ENTRY).digests != before
    assert parsed_anew(root, parsed) == (after, [])


def test_an_edit_that_keeps_size_and_modification_time_is_seen(root: Path, parsed: list[str]) -> None:
    before = fresh(root).fingerprint(ENTRY).digests
    helper = root / "stages/helper.py"
    times = helper.stat()
    new = root / "stages/new"
    new.write_text(HELPER.replace("3", "4"))
    os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    new.replace(helper)
    now = helper.stat()
    assert (now.st_size, now.st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    after, files = parsed_anew(root, parsed)
    assert "helper.py" in files
    assert after != before


def test_an_edit_in_place_that_puts_the_modification_time_back_is_seen(root: Path, parsed: list[str]) -> None:
    before = fresh(root).fingerprint(ENTRY).digests
    helper = root / "stages/helper.py"
    times = helper.stat()
    while helper.stat().st_ctime_ns == times.st_ctime_ns:  # two changes can fall into one tick of the clock
        helper.write_text(HELPER.replace("3", "4"))
        os.utime(helper, ns=(times.st_atime_ns, times.st_mtime_ns))
    now = helper.stat()
    assert (now.st_size, now.st_mtime_ns, now.st_ino) == (times.st_size, times.st_mtime_ns, times.st_ino)
    assert parsed_anew(root, parsed)[0] != before


def test_a_file_that_nothing_read_may_change(root: Path, parsed: list[str]) -> None:
    before = fresh(root).fingerprint(ENTRY).digests
    (root / "stages/other.py").write_text("def unused():\n    return 1\n")
    assert parsed_anew(root, parsed) == (before, [])


def test_a_module_that_was_missing_and_is_there_now_is_seen(root: Path, parsed: list[str]) -> None:
    (root / "stages/stage.py").write_text(
        "try:\n    from stages.fast import limit\nexcept ImportError:\n    from stages.helper import limit\n"
        "\n\ndef run():\n    return limit()\n"
    )
    before = fresh(root).fingerprint(ENTRY)
    assert "stages.fast:limit" not in before.definitions
    (root / "stages/fast.py").write_text("def limit():\n    return 30\n")
    after, files = parsed_anew(root, parsed)
    assert "fast.py" in files
    assert after != before.digests
    assert "stages.fast:limit" in fresh(root).fingerprint(ENTRY).definitions


def test_a_module_that_is_gone_is_seen(root: Path, parsed: list[str]) -> None:
    before = fresh(root).fingerprint(ENTRY).digests
    (root / "stages/helper.py").unlink()
    assert parsed_anew(root, parsed)[0] != before


@pytest.mark.parametrize("damage", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe", None])
def test_a_damaged_or_lost_memory_costs_time_alone(root: Path, parsed: list[str], damage: bytes | None) -> None:
    before = fresh(root).fingerprint(ENTRY).digests
    memory = root.parent / "code.json"
    if damage is None:
        memory.unlink()
    else:
        memory.write_bytes(damage)
    after, files = parsed_anew(root, parsed)
    assert after == before
    assert files == ["__init__.py", "helper.py", "stage.py"]
    assert len(read_json(memory)) == 1, "what was found is remembered again"
    assert parsed_anew(root, parsed) == (before, [])


@pytest.mark.parametrize("entry", [{}, None, 3, {"modules": {}}, {"modules": 3, "digests": []}])
def test_a_damaged_entry_costs_time_alone(root: Path, parsed: list[str], entry: object) -> None:
    before = fresh(root).fingerprint(ENTRY).digests
    memory = root.parent / "code.json"
    write_json(memory, dict.fromkeys(read_json(memory), entry))
    assert parsed_anew(root, parsed)[0] == before


def test_other_rules_have_an_entry_of_their_own(root: Path, parsed: list[str]) -> None:
    both = fresh(root).fingerprint(ENTRY)
    path = root.parent / "code.json"
    neutral = CodeMemory(Code(root, frozenset({"stages.helper"})), path).fingerprint(ENTRY)
    assert neutral != both
    assert len(read_json(path)) == 2
    assert parsed_anew(root, parsed) == (both.digests, [])
