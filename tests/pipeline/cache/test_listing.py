"""The digest of image files covers their metadata: swaps are noticed, and files that no stage reads do not count."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from pipeline.cache import listing
from pipeline.cache.listing import distrust, scan
from stages.runtime.errors import InputError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("cats/1.png", "cats/2.png", "dogs/1.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"x" * 10)
    return tmp_path / "images"


@pytest.fixture
def digest(tmp_path: Path) -> Callable[..., str]:
    def of(root: Path, *, source: str = "image_folder", deep: bool = True) -> str:
        return scan(root, source, tmp_path / "home", deep=deep).digest

    return of


def overwrite(path: Path, data: bytes) -> None:
    """Overwrite a file and restore its modification time; only the change time differs."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert path.stat().st_size == stat.st_size


def test_what_changes_below_the_root_changes_the_digest(images: Path, digest: Callable[..., str]) -> None:
    seen = [digest(images)]
    assert digest(images) == seen[0]
    (images / "cats/3.png").write_bytes(b"new")
    seen.append(digest(images))
    (images / "cats/3.png").rename(images / "dogs/3.png")
    seen.append(digest(images))
    (images / "dogs/3.png").rename(images / "dogs/4.png")
    seen.append(digest(images))
    os.utime(images / "dogs/4.png", (1, 1))
    seen.append(digest(images))
    overwrite(images / "dogs/4.png", b"old")
    seen.append(digest(images))
    (images / "empty").mkdir()
    seen.append(digest(images))
    assert len(set(seen)) == len(seen)
    (images / "empty").rmdir()
    (images / "dogs/4.png").unlink()
    assert digest(images) == seen[0]


def test_a_root_that_moves_keeps_its_digest_and_a_copy_has_another(images: Path, digest: Callable[..., str]) -> None:
    before = digest(images)
    shutil.copytree(images, images.with_name("copied"))  # with the original times
    assert digest(images.with_name("copied")) != before
    images.rename(images.with_name("moved"))
    assert digest(images.with_name("moved")) == before


def test_another_picture_under_a_link_is_noticed(images: Path, tmp_path: Path, digest: Callable[..., str]) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(name.encode())
        os.utime(tmp_path / name, (5, 5))
    link = images / "cats/link.png"
    link.symlink_to(tmp_path / "one")
    os.utime(link, (5, 5), follow_symlinks=False)
    before = digest(images)
    link.unlink()
    link.symlink_to(tmp_path / "two")
    os.utime(link, (5, 5), follow_symlinks=False)
    assert digest(images) != before
    (tmp_path / "two").unlink()
    assert digest(images) not in {before, ""}


def test_a_class_folder_may_be_a_link_and_a_folder_inside_it_may_not(
    images: Path, tmp_path: Path, digest: Callable[..., str]
) -> None:
    # As in stages.images.sources: links deeper down are ignored, since they could form a cycle.
    linked = tmp_path / "birds"
    linked.mkdir()
    seen = [digest(images)]
    (images / "birds").symlink_to(linked)
    seen.append(digest(images))
    (linked / "1.png").write_bytes(b"new")
    seen.append(digest(images))
    assert len(set(seen)) == 3
    (linked / "all").symlink_to(images)
    assert digest(images) == seen[-1]


def test_files_that_no_stage_reads_do_not_count(images: Path, digest: Callable[..., str]) -> None:
    before = digest(images)
    for name in (
        "cats/.DS_Store",
        "cats/Thumbs.db",
        "cats/@eaDir/1.png",
        "loose.png",
        ".cache/1.png",
        "__MACOSX/1.png",
    ):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_bytes(b"other")
    assert digest(images) == before


def test_files_that_are_images_by_their_contents_count(images: Path, digest: Callable[..., str]) -> None:
    seen = [digest(images)]
    for name in ("cats/notes.txt", "cats/deep/no_ending"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_bytes(b"text, or the bytes of an image")
        seen.append(digest(images))
    assert len(set(seen)) == 3


def test_the_digest_of_a_folder_of_images_alone_is_what_it_was(images: Path, tmp_path: Path) -> None:
    """Held to the rule written down once more: another digest would index every image set again."""
    folders = {"": ""}
    for name in ("cats", "dogs"):
        stats = [(path.name, path.stat()) for path in sorted((images / name).iterdir())]
        folders[name] = "".join(
            f"{file}\0{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}\0" for file, stat in stats
        )
    lines = [f"{name}\0{sha256(text.encode()).hexdigest()}\0" for name, text in sorted(folders.items())]
    whole = sha256(f"image_folder 0\0{''.join(lines)}".encode()).hexdigest()
    assert scan(images, "image_folder", tmp_path / "home", deep=True).digest == whole


@pytest.mark.timeout(20)
def test_fifos_and_circles_of_links_are_looked_at_and_not_opened(images: Path, digest: Callable[..., str]) -> None:
    before = digest(images)
    os.mkfifo(images / "cats/fifo.png")
    (images / "cats/loop.png").symlink_to("loop.png")
    (images / "dogs/up").symlink_to("..")
    assert digest(images) != before


def test_a_folder_whose_name_is_no_utf8_is_refused(images: Path, digest: Callable[..., str]) -> None:
    os.mkdir(os.fsencode(images) + b"/cats/\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        digest(images)


def test_class_tars_and_a_single_tar_are_known_by_their_metadata(
    images: Path, tmp_path: Path, digest: Callable[..., str]
) -> None:
    (images / "n01.tar").write_bytes(b"tar")
    before = digest(images, source="imagenet_tar")
    (images / "cats/3.png").write_bytes(b"no class tar")
    (images / ".n02.tar").write_bytes(b"hidden")
    assert digest(images, source="imagenet_tar") == before
    overwrite(images / "n01.tar", b"rat")
    assert digest(images, source="imagenet_tar") != before
    single = tmp_path / "all.tar"
    single.write_bytes(b"tar")
    before = digest(single, source="imagenet_tar")
    assert digest(single, source="imagenet_tar", deep=False) == before
    overwrite(single, b"rat")
    assert digest(single, source="imagenet_tar", deep=False) != before


def test_a_shallow_scan_trusts_unchanged_folders_and_says_since_when(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setattr("pipeline.cache.listing.time.time", lambda: 1000.0)
    assert scan(images, "image_folder", home, deep=False).trusted_since is None  # nothing is remembered yet
    monkeypatch.setattr("pipeline.cache.listing.time.time", lambda: 2000.0)
    before = scan(images, "image_folder", home, deep=False)
    assert before.trusted_since == 1000.0
    listed: list[str] = []
    read_folder = listing._read_folder

    def spy(folder: Path, taken: Callable[[str], bool]) -> listing.Entry:
        listed.append(folder.name)
        return read_folder(folder, taken)

    monkeypatch.setattr(listing, "_read_folder", spy)
    overwrite(images / "cats/1.png", b"y" * 10)
    assert scan(images, "image_folder", home, deep=False) == before
    assert listed == []
    deep = scan(images, "image_folder", home, deep=True)
    assert sorted(listed) == ["cats", "dogs", "images"]
    assert deep.digest != before.digest
    assert deep.trusted_since is None
    listed.clear()
    assert scan(images, "image_folder", home, deep=False) == (deep.digest, 1000.0)
    (images / "dogs/2.png").write_bytes(b"new")
    assert scan(images, "image_folder", home, deep=False).digest != deep.digest
    assert listed == ["dogs"]


def test_a_scan_that_finds_nothing_new_writes_nothing(images: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    scan(images, "image_folder", home, deep=True)
    before = (home / ".listings.json").stat()
    scan(images, "image_folder", home, deep=True)
    scan(images, "image_folder", home, deep=False)
    assert (home / ".listings.json").stat() == before


def test_a_distrusted_root_has_another_digest_for_good(
    images: Path, tmp_path: Path, digest: Callable[..., str]
) -> None:
    other = Path(shutil.copytree(images, tmp_path / "other"))
    first, unconcerned = digest(images), digest(other)
    distrust(images, tmp_path / "home")
    second = digest(images)
    distrust(images, tmp_path / "home")
    assert len({first, second, digest(images)}) == 3
    assert digest(images) == digest(images, deep=False)
    assert digest(other) == unconcerned


@pytest.mark.parametrize("memory", ["{broken", "[]", "null", '"folders"', "damaged entries"])
def test_a_damaged_memory_costs_only_time(
    images: Path, tmp_path: Path, digest: Callable[..., str], memory: str
) -> None:
    first = digest(images)
    path = tmp_path / "home" / ".listings.json"
    if memory == "damaged entries":
        known = json.loads(path.read_text())
        known[str(images)]["folders"]["cats"] = {"stat": 3}
        known[str(images)]["generation"] = "many"
        memory = json.dumps(known)
    path.write_text(memory)
    assert digest(images, deep=False) == first
    assert digest(images) == first
