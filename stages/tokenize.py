"""Stage `tokenize`: VQ tokens of every view of every image, in a Zarr store.

Processes share the row-blocks of the store. While a batch is encoded, threads decode the images of the next batches.
Each image is decoded once for all its views.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conf.runtime import RuntimeConfig
from conf.tokenize import TokenizeConfig
from models.vq import VQModel
from stages.images.decode import decode, view_names, views
from stages.images.tensors import pixels_to_float
from stages.runtime.arrays import PixelBatch
from stages.runtime.artifact import file_sha256
from stages.runtime.distributed import World, process_group
from stages.runtime.job import Inputs, main
from stages.runtime.prefetch import prefetch
from stages.runtime.progress import Progress
from stages.runtime.transfer import Download, one_behind
from stages.stores.image_index import CLASSES_FILE, ImageIndex
from stages.stores.layout import Array
from stages.stores.tokens import TokenFacts, TokenStore, token_writer
from stages.stores.writing import write_units
from stages.weights.own import VQ_FILE, load_vq

STORE = TokenStore.FILE


def tokenize(config: TokenizeConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `tokens.zarr` and the names of the classes.

    Raises:
        InputError: An image file is missing, or differs from the indexed file.
    """
    with process_group(runtime) as world:
        index = ImageIndex.open(inputs["dataset"])
        model = load_vq(inputs["tokenizer"], world.device)
        facts = _facts(config, index, model, inputs["tokenizer"])
        writer = token_writer(output / STORE, facts)
        reader = ViewReader(index, inputs["images"], config)
        encoder = Encoder(model, config, facts.num_views, world)
        pending = writer.pending(world.rank, world.size)
        images = (row for unit in pending for row in range(len(index))[writer.spec.rows(unit)])
        with reader.ahead(images) as pictures:

            def make(unit: int, progress: Progress) -> dict[str, Array]:
                rows = writer.spec.rows(unit)
                tokens = encoder.tokens(islice(pictures, rows.stop - rows.start), progress)
                return {"tokens": tokens, "labels": index.labels[rows]}

            write_units(writer, make, pending=pending, output=output, what="images", world=world)
    if world.is_main:
        writer.finish()
        shutil.copyfile(inputs["dataset"] / CLASSES_FILE, output / CLASSES_FILE)


@dataclass(frozen=True)
class ViewReader:
    """Reads images of an index as pixels of their views."""

    index: ImageIndex
    root: Path
    config: TokenizeConfig

    def views(self, image: int) -> PixelBatch:
        """All views of one image."""
        picture = decode(self.index.read(self.root, image))
        return np.stack(views(picture, self.config.image_size, self.config.views))

    def ahead(self, images: Iterable[int]) -> AbstractContextManager[Iterator[PixelBatch]]:
        """Views of each image, prepared in threads: two batches ahead, but at least two images per thread."""
        threads = torch.get_num_threads()
        a_batch = -(-self.config.batch_size // len(view_names(self.config.views)))
        return prefetch(self.views, images, threads=threads, depth=2 * max(threads, a_batch))


@dataclass(frozen=True)
class Encoder:
    """Encodes views of images to tokens."""

    model: VQModel
    config: TokenizeConfig
    num_views: int
    world: World

    @torch.inference_mode()
    def tokens(self, pictures: Iterable[PixelBatch], progress: Progress) -> NDArray[np.uint16]:
        """Tokens (images, A, T) of images, each given as its views (A, height, width, 3)."""
        done, views_done = progress.done, 0
        encoded: list[NDArray[np.uint16]] = []
        started = (Download(self.encode(batch)) for batch in batches(pictures, self.config.batch_size))
        for tokens in one_behind(started):
            encoded.append(tokens.numpy().astype(np.uint16))
            views_done += len(encoded[-1])
            progress.update(done + views_done // self.num_views)
        together = np.concatenate(encoded)
        return together.reshape(-1, self.num_views, together.shape[1])

    def encode(self, batch: PixelBatch) -> Tensor:
        """Tokens (B, T) of views, on the device. Does not wait for them."""
        pixels = pixels_to_float(batch, self.world.device)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            return self.model.encode(pixels)


def batches(pictures: Iterable[PixelBatch], batch_size: int) -> Iterator[PixelBatch]:
    """Views of successive images, regrouped into batches of `batch_size` views. The last batch may be smaller.

    The views of an image may be split between two batches. Batches depend on `pictures` only, so a row-block of the
    store is encoded in the same batches by any process, and gets the same tokens.
    """
    parts, missing = list[PixelBatch](), batch_size
    for picture in pictures:
        while len(picture):
            parts.append(picture[:missing])
            missing -= len(parts[-1])
            picture = picture[len(parts[-1]) :]
            if not missing:
                yield np.concatenate(parts)
                parts, missing = [], batch_size
    if parts:
        yield np.concatenate(parts)


def _facts(config: TokenizeConfig, index: ImageIndex, model: VQModel, tokenizer: Path) -> TokenFacts:
    grid = config.image_size // model.config.downsample
    names = view_names(config.views)
    return TokenFacts(
        num_images=len(index),
        num_train=index.num_train,
        num_classes=len(index.classes),
        num_views=len(names),
        num_tokens=grid * grid,
        grid=grid,
        chunk_rows=min(config.chunk_rows, len(index)),
        codebook_size=model.config.codebook_size,
        image_size=config.image_size,
        views=config.views,
        view_names=names,
        vq_sha256=file_sha256(tokenizer / VQ_FILE),
    )


if __name__ == "__main__":
    main(tokenize, TokenizeConfig)
