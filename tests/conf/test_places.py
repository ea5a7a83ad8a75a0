"""Paths in settings: absolute, with homes expanded, or one line."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path

import pytest

from conf.load import SettingsError, load_settings
from conf.places import CONF_DIR, absolute


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~", "HOME"),
        ("~/", "HOME"),
        ("~/a b", "HOME/a b"),
        ("a", "HERE/a"),
        ("./~", "HERE/~"),
        ("a/~/b", "HERE/a/~/b"),
        ("a~", "HERE/a~"),
        (".", "HERE"),
        ("../a", "HERE/../a"),
        (" a ", "HERE/ a "),
        ("/a/b/", "/a/b"),
        ("/a ?#%&;[]{}'\"$!*\\", "/a ?#%&;[]{}'\"$!*\\"),
        ("/ä/\U0001f600", "/ä/\U0001f600"),
        ("null", "HERE/null"),
        ("C:x", "HERE/C:x"),
        ("conf:demo/vq.safetensors", f"{CONF_DIR}/demo/vq.safetensors"),
    ],
)
def test_a_path_is_absolute_from_the_start(
    text: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "person"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert str(absolute(text)) == path.replace("HOME", str(home)).replace("HERE", str(tmp_path))


def test_another_persons_home_is_found_without_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    assert absolute("~root/data") == Path(pwd.getpwnam("root").pw_dir) / "data"
    assert str(absolute("~")).startswith("/")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected a path"),
        ("~nobody-here/x", "no home of ~nobody-here"),
        ("s3://bucket/x", "an address, expected the path"),
        ("file:///data", "an address, expected the path"),
        ("a\nb", "without control characters"),
        ("a\0b", "without control characters"),
        ("a\x7f", "without control characters"),
        (os.fsdecode(b"/a\xff"), "in UTF-8"),
        ("a" * 5000, "at most 4095 bytes"),
    ],
)
def test_what_is_no_path_of_this_machine_is_one_line(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        absolute(text)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_a_removed_current_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(ValueError, match="a current folder that was removed"):
        absolute("a")
    assert absolute("/a") == Path("/a")


@pytest.mark.parametrize(
    ("address", "text"),
    [
        *(("dataset.root", "~/x"), ("tokenizer.checkpoint", "~/x"), ("entropy_model.checkpoint", "~/x")),
        *(("evaluate.weights", "~/x"), ("runtime.lpips_weights", "~/x"), ("runtime.home", "~/x")),
        ("runtime.kubernetes.claims.data", "~/x"),
    ],
)
def test_every_path_of_the_settings_is_expanded(address: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/person")
    more = ["evaluate.extractor=inception"] if address.startswith("evaluate") else []
    settings, runtime = load_settings(overrides=[f"{address}={text}", *more])
    tree = settings.model_dump() | {"runtime": runtime.model_dump()}
    for name in address.split("."):
        tree = tree[name]
    assert tree == Path("/person/x")


@pytest.mark.parametrize("inside", ["", "x", "x/y"])
@pytest.mark.parametrize("kind", ["file", "broken link", "device"])
def test_a_home_that_can_be_no_folder_is_one_line(kind: str, inside: str, tmp_path: Path) -> None:
    place = {"file": tmp_path / "file", "broken link": tmp_path / "link", "device": Path(os.devnull)}[kind]
    if kind == "file":
        place.write_text("")
    elif kind == "broken link":
        place.symlink_to(tmp_path / "nowhere")
    with pytest.raises(SettingsError, match=f"^runtime.home: .*expected a folder: {place} is none$"):
        load_settings(overrides=[f"runtime.home={place / inside}"])


def test_a_home_lies_where_sqlite_can_open_a_database(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 230) / ("d" * 200)
    (tmp_path / "link").symlink_to(deep)
    deep.mkdir(parents=True)
    for home in (deep / ("x" * 40), tmp_path / "link" / ("x" * 40)):
        with pytest.raises(SettingsError, match="expected at most 470: SQLite"):
            load_settings(overrides=[f"runtime.home={home}"])


def test_a_home_may_be_a_link_to_a_folder_and_need_not_exist(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for place in (tmp_path / "link", tmp_path / "link" / "a" / "b"):
        assert load_settings(overrides=[f"runtime.home={place}"])[1].home == place
