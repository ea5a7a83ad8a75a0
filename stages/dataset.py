"""Stage `dataset`: index of all images below a root that can be decoded, split into training and held-out images.

Every image is read and decoded once, so that no later stage finds a broken one. The sorted listing is cut into blocks.
Blocks that a killed run finished are not read again. The metadata of an image are a row of an array, so memory grows
by little more than the index itself.
"""

from __future__ import annotations

import errno
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from conf.dataset import DatasetConfig
from conf.runtime import RuntimeConfig
from stages.images.decode import DecodeError, decode
from stages.images.image_file import archive_path, read_image
from stages.images.listing import Listing, list_images
from stages.images.names import shown
from stages.images.sources import describe_layout
from stages.runtime.artifact import RECORD, read_arrays, write_atomic, write_json
from stages.runtime.cores import available_cores
from stages.runtime.errors import InputError
from stages.runtime.job import Inputs, main
from stages.runtime.progress import Progress
from stages.stores.image_index import FACTS, file_digest, write_index

logger = logging.getLogger(__name__)
BLOCK = 4096  # images per block, whose result is kept when the run is killed
_TASK = 32  # images per thread task
_NAMED = 5  # broken files named in an error


@dataclass(frozen=True)
class Checked:
    """Result of reading a block of images."""

    facts: NDArray[np.void]
    """Metadata, one row per image, dtype FACTS; zeros for broken images."""
    reasons: list[str]
    """Reason why each image is broken; empty if it decodes."""


def dataset(config: DatasetConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Index the images below `inputs["images"]`.

    Raises:
        InputError: The source is not usable (see `stages.images.listing`), too many images are broken, a class has no
            image that decodes, or there are too few images to hold some out.
    """
    images = list_images(config)
    _tell_layout(images, config, output)
    facts, reasons = _check_all(images, inputs["images"], output, runtime, config.max_pixels)
    broken = [{"relpath": str(images.relpaths[row]), "reason": reason} for row, reason in reasons.items()]
    write_json(output / RECORD / "broken.json", broken)  # in the record: broken images are not part of the data
    _refuse_broken(broken, len(images), config)

    is_whole = np.ones(len(images), dtype=bool)
    is_whole[list(reasons)] = False
    whole = np.flatnonzero(is_whole)
    _refuse_empty_classes(images.labels[whole], images.classes)
    heldout = _heldout(images, whole, config.heldout_fraction)
    _require_heldout(heldout, images.labels[whole], images.classes, config)
    order = np.concatenate([whole[~heldout], whole[heldout]])  # the listing is sorted, and so is each part
    num_train = int((~heldout).sum())

    write_index(output, images=images, facts=facts, order=order, num_train=num_train, source=config.source)
    logger.info("%d images of %d classes, %d held out", len(order), len(images.classes), len(order) - num_train)


def _tell_layout(images: Listing, config: DatasetConfig, output: Path) -> None:
    """Log and record what is read, what a class is, and what is left out and why."""
    layout = describe_layout(config)
    left_out = {
        reason: {"count": files.count, "first": files.first} for reason, files in sorted(images.left_out.items())
    }
    write_json(output / RECORD / "layout.json", layout | {"num_classes": len(images.classes)})
    write_json(output / RECORD / "left_out.json", left_out)
    first = ", ".join(images.classes[:_NAMED])
    logger.info("root is %s, classes are %s: %d (first %s)", *layout.values(), len(images.classes), first)
    told = [f"{files.count} {reason} (first {files.first[0]})" for reason, files in images.left_out.items()]
    if told:
        logger.warning("left out, see record/left_out.json: %s", "; ".join(told))


def _check_all(
    images: Listing, root: Path, output: Path, runtime: RuntimeConfig, max_pixels: int
) -> tuple[NDArray[np.void], dict[int, str]]:
    """Read and decode every image, in threads: decoding releases the GIL.

    Returns:
        Metadata (dtype FACTS), one row per image, zeros for broken images; and the reason for each broken image, by
        its row.
    """
    facts = np.zeros(len(images), dtype=FACTS)
    reasons: dict[int, str] = {}
    progress = Progress(output, "images", len(images))
    pool = ThreadPoolExecutor(runtime.threads or available_cores())
    try:
        for start in range(0, len(images), BLOCK):
            listed = images[start : start + BLOCK]
            path = output / RECORD / "units" / f"checked-{start // BLOCK:06d}.npz"
            stamp = _stamp(root, listed)
            block = _recall(path, stamp)
            if block is None:
                block = _check_block(root, listed, pool, progress, max_pixels)
                _remember(path, stamp, block)
            facts[start : start + BLOCK] = block.facts
            reasons |= {start + row: reason for row, reason in enumerate(block.reasons) if reason}
            progress.update(start + len(listed))
    finally:
        pool.shutdown(cancel_futures=True)  # when interrupted, do not read the rest of the block
    return facts, reasons


def _check_block(root: Path, images: Listing, pool: ThreadPoolExecutor, progress: Progress, max_pixels: int) -> Checked:
    parts = []
    tasks = [images[start : start + _TASK] for start in range(0, len(images), _TASK)]
    for part in pool.map(lambda task: _check(root, task, max_pixels), tasks):
        parts.append(part)
        progress.update(progress.done + len(part.reasons))
    reasons = [reason for part in parts for reason in part.reasons]
    return Checked(np.concatenate([part.facts for part in parts]), reasons)


def _check(root: Path, images: Listing, max_pixels: int) -> Checked:
    facts = np.zeros(len(images), dtype=FACTS)
    reasons = [""] * len(images)
    for row, image in enumerate(images):
        try:
            data = read_image(root, image.relpath, image.offset, image.size)
            width, height = decode(data, max_pixels).size
        except OSError as error:
            lost = (root / image.relpath).is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP)
            reasons[row] = f"cannot be read: {'a link that leads nowhere' if lost else error.strerror}"
        except DecodeError as error:
            reasons[row] = str(error)
        else:
            facts[row] = (len(data), width, height, file_digest(data))
    return Checked(facts, reasons)


def _stamp(root: Path, images: Listing) -> NDArray[np.uint8]:
    """Digest of the files' names, sizes, times and inodes. A saved block is valid only while its stamp is the same.

    The change time and the inode reveal a file that was replaced by one of the same size and modification time. Links
    are followed.
    """
    digest = blake2b(digest_size=16)
    for relpath, _, offset, size in images:
        path = archive_path(root, relpath) if offset else root / relpath
        digest.update(f"{path}\0{relpath}\0{offset}\0{size}\0".encode())
        try:
            status = path.stat()
            fields = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
            digest.update("".join(f"{field}\0" for field in fields).encode())
        except OSError:
            digest.update(b"missing\0")
    return np.frombuffer(digest.digest(), np.uint8)


def _recall(path: Path, stamp: NDArray[np.uint8]) -> Checked | None:
    """Result of an earlier run for these files; None if there is none, or its record is damaged."""
    saved = read_arrays(path)
    if saved is None:
        return None
    if saved.keys() != {"stamp", "facts", "reasons"}:
        logger.warning("%s is damaged (it holds %s): made again", path, sorted(saved))
        return None
    if not np.array_equal(saved["stamp"], stamp):
        return None
    return Checked(saved["facts"].view(FACTS).ravel(), saved["reasons"].tolist())


def _remember(path: Path, stamp: NDArray[np.uint8], block: Checked) -> None:
    facts = block.facts.view(np.uint8).reshape(len(block.facts), -1)
    write_atomic(path, lambda file: np.savez(file, stamp=stamp, facts=facts, reasons=np.array(block.reasons)))


def _refuse_broken(broken: list[dict[str, str]], total: int, config: DatasetConfig) -> None:
    for entry in broken[:_NAMED]:
        logger.warning("left out %s: %s", shown(entry["relpath"]), entry["reason"])
    if len(broken) > config.max_broken_fraction * total:
        first = "; ".join(f"{shown(entry['relpath'])} ({entry['reason']})" for entry in broken[:_NAMED])
        raise InputError(
            f"{len(broken)} of {total} images are broken, expected at most {config.max_broken_fraction:.2%} "
            f"(dataset.max_broken_fraction): repair or remove them, all in record/broken.json, first {first}"
        )


def _refuse_empty_classes(labels: NDArray[np.uint16], classes: list[str]) -> None:
    missing = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if len(missing):
        raise InputError(f"class {classes[missing[0]]} holds no image that decodes: repair its images or remove it")


def _heldout(images: Listing, whole: NDArray[np.intp], fraction: float) -> NDArray[np.bool_]:
    """Mask of the held-out images among the whole ones: in each class, the first `fraction` by hash of the file name.

    The hash makes the choice independent of the root and of the order of names. When images are added, few others move
    between the two parts.
    """
    heldout = np.zeros(len(whole), dtype=bool)
    if fraction == 0:
        return heldout
    hashes = np.fromiter((_name_hash(images.relpaths[row]) for row in whole), np.uint64, len(whole))
    order = np.lexsort((hashes, images.labels[whole]))
    counts = np.bincount(images.labels[whole])
    for first, count in zip(np.cumsum(counts) - counts, counts, strict=True):
        heldout[order[first : first + round(fraction * int(count))]] = True
    return heldout


def _require_heldout(
    heldout: NDArray[np.bool_], labels: NDArray[np.uint16], classes: list[str], config: DatasetConfig
) -> None:
    """Refuse a share that holds no image out: scores would silently lack everything that is compared with them."""
    if config.heldout_fraction == 0:
        return
    largest = int(np.bincount(labels).max())
    if not heldout.any():
        raise InputError(
            f"dataset.heldout_fraction is {config.heldout_fraction:g} and the largest class has {largest} images, so "
            "none is held out, expected at least one: raise the share, set it to 0, or add images"
        )
    without = np.flatnonzero(np.bincount(labels[heldout], minlength=len(classes)) == 0)
    if len(without):
        first = ", ".join(classes[label] for label in without[:_NAMED])
        logger.warning("%d classes are too small to hold an image out (first %s)", len(without), first)


def _name_hash(relpath: str) -> int:
    name = relpath.rpartition("/")[2]
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")


if __name__ == "__main__":
    main(dataset, DatasetConfig)
