"""Export of samples for other programs: one .npz for ADM's evaluator, or a folder of PNG files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO
from zipfile import ZipFile, ZipInfo

import numpy as np
from PIL import Image

from stages.runtime.arrays import Pixels
from stages.runtime.artifact import write_atomic
from stages.runtime.cores import available_cores
from stages.runtime.errors import InputError
from stages.stores.samples import SampleStore

OnProgress = Callable[[int, int], None]
"""Called with the number of images written so far, and the number of all images."""


def export_npz(store: SampleStore, path: Path, on_progress: OnProgress) -> None:
    """Write all images in order as `arr_0`, uint8 (N, height, width, 3). An existing file is replaced.

    Blocks are copied from the store into the archive one by one, so memory does not grow with the number of images.
    The same samples give the same bytes.
    """
    write_atomic(path, lambda file: _write_npz(store, file, on_progress))


def export_png(store: SampleStore, folder: Path, on_progress: OnProgress) -> None:
    """Write each image as `<number>.png`, with six digits. The folder appears once all images are written.

    Raises:
        InputError: The folder exists and is not empty. Files of two sets must not mix.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty, expected a new or an empty folder: choose another or remove it")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted export
    partial.mkdir(parents=True)
    done = 0
    with ThreadPoolExecutor(available_cores()) as pool:  # Pillow releases the GIL while it compresses
        for block in store.blocks():
            paths = [partial / f"{number:06d}.png" for number in range(done, done + len(block))]
            list(pool.map(_write_png, paths, block))
            done += len(block)
            on_progress(done, len(store))
    partial.replace(folder)


def _write_npz(store: SampleStore, file: IO[bytes], on_progress: OnProgress) -> None:
    size = store.facts.image_size
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(store), size, size, 3)}
    member = ZipInfo("arr_0.npy")  # has a fixed date, so that the bytes are reproducible
    done = 0
    with ZipFile(file, "w", allowZip64=True) as archive, archive.open(member, "w", force_zip64=True) as array:
        np.lib.format.write_array_header_1_0(array, header)
        for block in store.blocks():
            array.write(block.data)
            done += len(block)
            on_progress(done, len(store))


def _write_png(path: Path, image: Pixels) -> None:
    Image.fromarray(image).save(path)
