"""Images in class folders: root/<class>/<image>, or ImageNet's root/train/<class>/<image>.

Which folders are classes is never guessed. A layout that can be read in two ways is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stages.images.contents import HEAD_BYTES, is_image_head, kind_of_head
from stages.images.image_file import ImageFile, LeftOut
from stages.images.names import is_split_name, passed_over, require_usable, require_utf8, shown
from stages.runtime.errors import InputError
from stages.runtime.regular_file import open_if_regular

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_VEHICLES = ("train", "trains")  # the one name of a split that is a class in published data sets, too
_LISTED = 5  # names in an error


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which folder holds the class folders, and which folders these are."""

    root: Path
    split: str
    """Name of the folder below `dataset.root` that is the root, as `train`; empty if it is `dataset.root` itself."""
    classes: list[str]
    left_out: list[LeftOut]
    """What lies beside the class folders, and beside a split that was chosen; relative to `dataset.root`."""


def layout_of(root: Path) -> Layout:
    """The layout of an image folder.

    Raises:
        InputError: There are no class folders, a folder cannot be listed, a link below the root leads nowhere or around
            in a circle, or folders may be either classes or splits.
    """
    names, left_out = _top(root, "")
    splits = [name for name in names if is_split_name(name)]
    if not splits:
        return Layout(root=root, split="", classes=names, left_out=left_out)
    others = [name for name in names if name not in splits]
    with_images = [name for name in others if holds_image(root / name)]
    if "train" in splits and not with_images and _is_split(root / "train"):
        classes, beside = _top(root / "train", "train/")
        if guess := [name for name in classes if is_split_name(name)]:
            raise _refused(root / "train", guess, classes)
        left_out += [LeftOut(f"{name}/", "beside the split train") for name in names if name != "train"]
        return Layout(root=root / "train", split="train", classes=classes, left_out=left_out + beside)
    if (
        len(splits) == 1
        and splits[0].casefold() in _VEHICLES
        and with_images
        and _holds_images_directly(root / splits[0])
    ):
        return Layout(root=root, split="", classes=names, left_out=left_out)
    raise _refused(root, splits, names)


def class_files(layout: Layout) -> Iterator[ImageFile | LeftOut]:
    """Images class by class, each class sorted by path, and what is left out.

    Raises:
        InputError: A class holds no images, a folder cannot be listed, or the name of an image is not UTF-8.
    """
    if not layout.classes:
        raise InputError(f"{layout.root} holds no class folders, expected {layout.root}/<class>/<image>")
    require_usable(layout.classes, layout.root)
    yield from layout.left_out
    for class_name in layout.classes:
        images, reasons = list[str](), dict[str, str]()
        for relpath, reason in _walk(layout.root, class_name):
            if reason is None:
                require_utf8(layout.root, relpath)
                images.append(relpath)
            else:
                reasons[relpath] = reason
        if not images:
            found = "; ".join(f"{shown(path)} ({why})" for path, why in [*reasons.items()][:_LISTED])
            raise InputError(
                f"class folder {layout.root / class_name} holds no images, expected files in formats as JPEG or PNG: "
                f"fill the folder or remove it{found and f', left out {found}'}"
            )
        yield from (ImageFile(relpath, class_name) for relpath in sorted(images))
        yield from (LeftOut(relpath, reason) for relpath, reason in sorted(reasons.items()))


def is_image(name: str) -> bool:
    """Whether a file with this name is taken for an image unseen: it has one of EXTENSIONS and is not passed over."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and passed_over(name) is None


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, sorted by name.

    Raises:
        InputError: It cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(
            f"folder {folder} cannot be listed ({error.strerror}), expected images in it: make it readable or remove it"
        ) from error


def holds_image(folder: Path) -> bool:
    """Whether a folder, or one below it, holds an image."""
    waiting = [folder]
    while waiting:
        entries = list_folder(waiting.pop())
        if any(_may_be_image(entry) for entry in entries):
            return True
        waiting += [
            Path(entry.path)
            for entry in entries
            if entry.is_dir(follow_symlinks=False) and passed_over(entry.name) is None
        ]
    return False


def _top(root: Path, prefix: str) -> tuple[list[str], list[LeftOut]]:
    """Folders below a root, and what lies beside them. Names that are left out start with `prefix`."""
    folders, left_out = list[str](), list[LeftOut]()
    for entry in list_folder(root):
        reason = passed_over(entry.name)
        if reason is not None:
            left_out.append(LeftOut(prefix + entry.name + ("/" if _is_folder(entry) else ""), reason))
        elif _is_folder(entry):
            if entry.is_symlink():
                _refuse_circle(root, entry.path)
            require_utf8(root, entry.name)
            folders.append(entry.name)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            raise InputError(
                f"{entry.path} is a link that leads nowhere, expected a class folder: restore what it leads to, or "
                "remove it"
            )
        else:
            left_out.append(LeftOut(prefix + entry.name, "in no class folder"))
    return sorted(folders), sorted(left_out)


def _walk(root: Path, class_name: str) -> Iterator[tuple[str, str | None]]:
    """Relative paths below a class folder, folders inside it included, and why each is left out; None for an image.

    Links to folders are not followed: they may lead around in a circle.
    """
    waiting = [class_name]
    while waiting:
        below = waiting.pop()
        splits = []
        for entry in list_folder(root / below):
            relpath = f"{below}/{entry.name}"
            reason = passed_over(entry.name)
            if entry.is_dir(follow_symlinks=False):
                if reason is None:
                    waiting.append(relpath)
                    splits += [entry.name] if is_split_name(entry.name) else []
                else:
                    yield f"{relpath}/", reason
            elif reason is None and entry.is_symlink() and _is_folder(entry):
                yield f"{relpath}/", "a link to a folder, which is not followed"
            else:
                yield relpath, reason or (None if is_image(entry.name) else _no_image(entry.path))
        if len(splits) > 1:
            raise _refused(root / below, sorted(splits), [])


def _no_image(path: str) -> str | None:
    """What a file is whose name is none of an image; None if it is an image, or cannot be read."""
    try:
        with open_if_regular(path) as file:
            head = file.read(HEAD_BYTES)
    except OSError:  # the stage reads it again, and lists it among the broken images with the reason
        return None
    return None if is_image_head(head) else kind_of_head(head)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circle of links
        return False


def _refuse_circle(root: Path, link: str) -> None:
    target, place = os.path.realpath(link), os.path.realpath(root)
    if os.path.commonpath([target, place]) == target:
        raise InputError(f"{link} is a link to a folder that contains it, expected a class folder: remove it")


def _is_split(folder: Path) -> bool:
    """True for ImageNet's `train`, false for a class with this name. A split holds folders and no images."""
    folders, _ = _top(folder, "")
    return bool(folders) and not _holds_images_directly(folder)


def _holds_images_directly(folder: Path) -> bool:
    return any(_may_be_image(entry) for entry in list_folder(folder))


def _may_be_image(entry: os.DirEntry[str]) -> bool:
    if passed_over(entry.name) is not None or _is_folder(entry):
        return False
    return is_image(entry.name) or _no_image(entry.path) is None


def _refused(root: Path, splits: list[str], names: list[str]) -> InputError:
    """Error for folders whose names are those of splits."""
    beside = [name for name in names if name not in splits]
    also = f" beside {', '.join(map(shown, beside[:_LISTED]))}" if beside else ""
    first = root / next((name for name in splits if name.casefold().startswith("train")), splits[0])
    return InputError(
        f"{root} holds {', '.join(f'{shown(name)}/' for name in splits[:_LISTED])}{also}, expected class folders "
        "alone, or train/ with class folders and no images in train/ itself: the names may mean splits or classes. "
        f"Set dataset.root to the folder that holds the class folders (as {first}), or rename those that are classes"
    )
