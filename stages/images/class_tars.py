"""Images in class tars: ImageNet's tar of <class>.tar files, or a folder of them. Nothing is unpacked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from stages.images.archives import Member, Span, entries, whole
from stages.images.class_folders import EXTENSIONS, holds_image, is_image, list_folder
from stages.images.contents import HEAD_BYTES, is_image_head, kind_of_head
from stages.images.image_file import ImageFile, LeftOut
from stages.images.names import is_split_name, passed_over, require_usable, require_utf8
from stages.runtime.errors import InputError
from stages.runtime.regular_file import open_regular

_COMPRESSED = re.compile(r"\.(?:tar\.\w+|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_LONGEST_PATH = 4096  # of Linux
_ENDINGS = ", ".join(sorted(EXTENSIONS))


def class_tars(root: Path) -> Iterator[ImageFile | LeftOut]:
    """Images class by class, each class sorted by name, and what is left out.

    Args:
        root: A tar of class tars, or a folder of class tars.

    Raises:
        InputError: There are no class tars, one holds no images, two have the same name, a name cannot be used, or a
            tar is damaged or unreadable.
    """
    seen = set[str]()
    for file_name, found in _of_tar(root) if root.is_file() else _of_folder(root):
        if isinstance(found, LeftOut):
            yield found
            continue
        name = file_name[: -len(".tar")]
        require_usable([name], root)
        if is_split_name(name):
            raise InputError(
                f"{root} holds {file_name}, expected a tar for each class: its name may mean a split or a class, so "
                "move it elsewhere or rename it"
            )
        if name in seen:
            raise InputError(f"{root} holds two class tars called {file_name}, expected one for each class: rename one")
        seen.add(name)
        yield from _class_tar(file_name, found)
    require_usable(sorted(seen), root)
    if not seen:
        raise InputError(f"{root} holds no class tars, expected <class>.tar with images, e.g. n01440764.tar")


def _of_tar(root: Path) -> Iterator[tuple[str, Span | LeftOut]]:
    with open_regular(root) as file:
        archive = whole(file, root)
        for member, kind in entries(archive):
            _require_inside(archive, member.name)
            name = member.name.rpartition("/")[2]
            reason = _passed_over(member.name) or kind or _no_class_tar(root, name)
            yield name, archive.inside(member) if reason is None else LeftOut(member.name, reason)


def _of_folder(root: Path) -> Iterator[tuple[str, Span | LeftOut]]:
    for entry in list_folder(root):
        path, name = root / entry.name, entry.name
        reason = passed_over(name) or _no_class_tar(root, name)
        if reason is None:
            with open_regular(path) as file:
                yield name, whole(file, path)
        elif path.is_dir() and passed_over(name) is None and holds_image(path):
            raise InputError(
                f"{path} is a folder with images beside class tars, expected one layout: move it elsewhere"
            )
        else:
            yield name, LeftOut(name + ("/" if path.is_dir() else ""), reason)


def _no_class_tar(root: Path, name: str) -> str | None:
    """Why a file is no class tar; None if it is one.

    Raises:
        InputError: It is a compressed one: to leave it out would lose a class.
    """
    if _COMPRESSED.search(name):
        raise InputError(f"{root} holds {name}, which is compressed, expected uncompressed class tars: uncompress it")
    return None if name.lower().endswith(".tar") else "no class tar"


def _class_tar(name: str, archive: Span) -> Iterator[ImageFile | LeftOut]:
    images, left_out = list[Member](), list[LeftOut]()
    for member, kind in entries(archive):
        _require_inside(archive, member.name)
        reason = _passed_over(member.name) or kind or _no_image(archive, member)
        if reason is None:
            images.append(member)
        else:
            left_out.append(LeftOut(f"{name}/{member.name}", reason))
    if not images:
        raise InputError(f"class tar {archive.title} holds no images, expected files ending in {_ENDINGS}")
    for member in sorted(images):
        relpath = f"{name}/{member.name}"
        require_utf8(archive.title, relpath)
        yield ImageFile(relpath, name[: -len(".tar")], member.offset, member.size)
    yield from sorted(left_out)


def _passed_over(name: str) -> str | None:
    """Why a member is never read: its own name, or that of a folder that it lies in."""
    reasons = (passed_over(part) for part in name.split("/") if part != ".")
    return next((reason for reason in reasons if reason is not None), None)


def _no_image(archive: Span, member: Member) -> str | None:
    """What a member is whose name is none of an image; None if it is an image."""
    if is_image(member.name.rpartition("/")[2]):
        return None
    archive.file.seek(member.offset)
    head = archive.file.read(min(HEAD_BYTES, member.size))
    return None if is_image_head(head) else kind_of_head(head)


def _require_inside(archive: Span, name: str) -> None:
    """Refuse names that no folder could hold, and those that lead out of it: such a tar was made to do harm."""
    if len(name) > _LONGEST_PATH:
        raise InputError(
            f"{archive.title} holds a name of {len(name)} characters, expected at most {_LONGEST_PATH}: make the tar "
            "again without it"
        )
    if name.startswith("/") or ".." in name.split("/"):
        raise InputError(
            f"{archive.title} holds {name!r}, expected names below a folder: make the tar again without it"
        )
