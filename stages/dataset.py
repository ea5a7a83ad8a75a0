"""Stage dataset: from an image root to an index of every image that decodes, split into training and held-out images.

Every file is read and decoded once, so that hours later no stage meets a broken one. The work is cut into blocks of the
sorted listing; a block that a killed attempt has finished is not read again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from conf.schema import DatasetConfig, RuntimeConfig
from stages.artifact import RECORD, write_atomic, write_json
from stages.errors import InputError
from stages.images import DecodeError, decode
from stages.job import Inputs, main
from stages.progress import Progress
from stages.sources import ImageFile, list_images
from stages.stores.files import FACTS, file_digest, write_index

logger = logging.getLogger(__name__)
BLOCK = 4096  # images between two marks of progress that outlive a kill
_TASK = 32  # images handed to a thread at once
_MAX_CLASSES = 65535  # labels are stored as uint16, and its last value marks missing ones
_NAMED = 5  # broken files that an error names


@dataclass(frozen=True)
class Checked:
    """What reading a run of images showed."""

    facts: NDArray[np.void]
    """One row an image, dtype FACTS; zeros where it is broken."""
    reasons: list[str]
    """Why an image is broken; empty where it decodes."""


def dataset(config: DatasetConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Index the images below `inputs["images"]`.

    Raises:
        InputError: No usable source (see `stages.sources`), too many broken images, or a class without a whole one.
    """
    images = list_images(config)
    classes = sorted({image.class_name for image in images})
    if len(classes) > _MAX_CLASSES:
        raise InputError(f"{inputs['images']} holds {len(classes)} classes, expected at most {_MAX_CLASSES}")
    checked = _check_all(images, inputs["images"], output, runtime)
    broken = [
        {"relpath": image.relpath, "reason": reason}
        for image, reason in zip(images, checked.reasons, strict=True)
        if reason
    ]
    _refuse_broken(broken, len(images), config)

    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([label_of[image.class_name] for image in images], dtype=np.uint16)
    whole = np.flatnonzero([not reason for reason in checked.reasons])
    _refuse_empty_classes(labels[whole], classes)
    heldout = _heldout(images, labels, whole, config.heldout_fraction)
    order = np.concatenate([whole[~heldout], whole[heldout]])  # the listing is sorted, and so is each part
    num_train = int((~heldout).sum())

    write_json(output / "broken.json", broken)
    write_index(
        output,
        relpaths=[images[row].relpath for row in order],
        labels=labels[order],
        facts=checked.facts[order],
        classes=classes,
        num_train=num_train,
        source=config.source,
    )
    metrics = {
        "num_images": len(order),
        "num_train": num_train,
        "num_heldout": len(order) - num_train,
        "num_classes": len(classes),
        "num_broken": len(broken),
    }
    write_json(output / "metrics.json", metrics)
    logger.info("%d images of %d classes, %d held out", len(order), len(classes), len(order) - num_train)


def _check_all(images: Sequence[ImageFile], root: Path, output: Path, runtime: RuntimeConfig) -> Checked:
    """Read and decode every image, in threads: decoding releases the interpreter's lock."""
    facts = np.zeros(len(images), dtype=FACTS)
    reasons: list[str] = []
    progress = Progress(output, "images", len(images))
    pool = ThreadPoolExecutor(runtime.threads or os.cpu_count())
    try:
        for start in range(0, len(images), BLOCK):
            paths = [root / image.relpath for image in images[start : start + BLOCK]]
            path = output / RECORD / "units" / f"checked-{start // BLOCK:06d}.npz"
            stamp = _stamp(paths)
            block = _recall(path, stamp)
            if block is None:
                block = _check_block(paths, pool, progress)
                _remember(path, stamp, block)
            facts[start : start + BLOCK] = block.facts
            reasons += block.reasons
            progress.update(len(reasons))
    finally:
        pool.shutdown(cancel_futures=True)  # when stopped, do not first read the rest of the block
    return Checked(facts, reasons)


def _check_block(paths: list[Path], pool: ThreadPoolExecutor, progress: Progress) -> Checked:
    parts = []
    for part in pool.map(_check, [paths[start : start + _TASK] for start in range(0, len(paths), _TASK)]):
        parts.append(part)
        progress.update(progress.done + len(part.reasons))
    reasons = [reason for part in parts for reason in part.reasons]
    return Checked(np.concatenate([part.facts for part in parts]), reasons)


def _check(paths: list[Path]) -> Checked:
    facts = np.zeros(len(paths), dtype=FACTS)
    reasons = [""] * len(paths)
    for row, path in enumerate(paths):
        try:
            data = path.read_bytes()
            width, height = decode(data).size
        except OSError as error:
            reasons[row] = f"cannot be read: {error.strerror}"
        except DecodeError as error:
            reasons[row] = str(error)
        else:
            facts[row] = (len(data), width, height, file_digest(data))
    return Checked(facts, reasons)


def _stamp(paths: list[Path]) -> NDArray[np.uint8]:
    """Digest of the files' names, sizes and times: a block counts as read only while its files stay untouched."""
    digest = blake2b(digest_size=16)
    for path in paths:
        try:
            status = path.stat()
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        except OSError:
            digest.update(f"{path}\0missing\0".encode())
    return np.frombuffer(digest.digest(), np.uint8)


def _recall(path: Path, stamp: NDArray[np.uint8]) -> Checked | None:
    """What a killed attempt found out about these files, if it came that far."""
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as saved:
        if not np.array_equal(saved["stamp"], stamp):
            return None
        facts = saved["facts"].view(FACTS).ravel()
        return Checked(facts, saved["reasons"].tolist())


def _remember(path: Path, stamp: NDArray[np.uint8], block: Checked) -> None:
    facts = block.facts.view(np.uint8).reshape(len(block.facts), -1)
    write_atomic(path, lambda file: np.savez(file, stamp=stamp, facts=facts, reasons=np.array(block.reasons)))


def _refuse_broken(broken: list[dict[str, str]], total: int, config: DatasetConfig) -> None:
    for entry in broken[:_NAMED]:
        logger.warning("left out %s: %s", entry["relpath"], entry["reason"])
    if len(broken) > config.max_broken_fraction * total:
        first = "; ".join(f"{entry['relpath']} ({entry['reason']})" for entry in broken[:_NAMED])
        raise InputError(
            f"{len(broken)} of {total} images are broken, expected at most {config.max_broken_fraction:.2%} "
            f"(dataset.max_broken_fraction): repair or remove them, first {first}"
        )


def _refuse_empty_classes(labels: NDArray[np.uint16], classes: list[str]) -> None:
    missing = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if len(missing):
        raise InputError(f"class {classes[missing[0]]} holds no image that decodes: repair its images or remove it")


def _heldout(
    images: Sequence[ImageFile], labels: NDArray[np.uint16], whole: NDArray[np.intp], fraction: float
) -> NDArray[np.bool_]:
    """Which of the whole images are held out: of each class, the share that comes first by hash of the file name.

    The hash makes the choice independent of the root and of the order of names; few change sides when images come.
    """
    heldout = np.zeros(len(whole), dtype=bool)
    if fraction == 0:
        return heldout
    names = (PurePosixPath(images[row].relpath).name for row in whole)
    hashes = np.frombuffer(b"".join(blake2b(name.encode(), digest_size=8).digest() for name in names), ">u8")
    order = np.lexsort((hashes, labels[whole]))
    counts = np.bincount(labels[whole])
    for first, count in zip(np.cumsum(counts) - counts, counts, strict=True):
        heldout[order[first : first + round(fraction * int(count))]] = True
    return heldout


if __name__ == "__main__":
    main(dataset, DatasetConfig)
