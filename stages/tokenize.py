"""Stage tokenize: VQ tokens of every view of every image, in a Zarr store.

Processes share the row-blocks of the store. While one batch is encoded, the images of the next are decoded in threads.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from conf.schema import RuntimeConfig, TokenizeConfig
from models.vq import VQModel
from stages.artifact import file_sha256, write_json
from stages.distributed import World, barrier, process_group
from stages.images import Pixels, decode, pixels_to_float, view_names, views
from stages.job import Inputs, main
from stages.progress import Progress
from stages.stores.files import CLASSES_FILE, ImageIndex
from stages.stores.tokens import TokenFacts, TokenStore, token_writer
from stages.weights import VQ_FILE, load_vq

STORE = "tokens.zarr"


def tokenize(config: TokenizeConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `tokens.zarr`, the names of the classes, and how the codebook is used.

    Raises:
        InputError: An image file is gone or no longer the one that was indexed.
    """
    with process_group(runtime) as world:
        index = ImageIndex.open(inputs["dataset"])
        model = load_vq(inputs["tokenizer"], world.device)
        writer = token_writer(output / STORE, _facts(config, index, model, inputs["tokenizer"]))
        encoder = Encoder(model, index, inputs["images"], config, world)
        pending = writer.pending(world.rank, world.size)
        total = writer.spec.count_rows(range(world.rank, writer.spec.num_units, world.size))
        done = total - writer.spec.count_rows(pending)
        progress = Progress(output, "images", total, done=done, enabled=world.is_main)
        for unit in pending:
            rows = writer.spec.rows(unit)
            writer.write(unit, tokens=encoder.tokens(rows, progress), labels=index.labels[rows])
        barrier()
        if world.is_main:
            writer.finish()
            shutil.copyfile(inputs["dataset"] / CLASSES_FILE, output / CLASSES_FILE)
            write_json(output / "metrics.json", _codebook_usage(TokenStore.open(output / STORE)))


@dataclass(frozen=True)
class Encoder:
    """Images of an index to tokens of their views."""

    model: VQModel
    index: ImageIndex
    root: Path
    config: TokenizeConfig
    world: World

    @torch.inference_mode()
    def tokens(self, rows: slice, progress: Progress) -> NDArray[np.uint16]:
        """Tokens (rows, A, T) of the views of a run of images."""
        done, parts = progress.done, []
        for pixels in self._batches(range(rows.start, rows.stop)):
            batch = pixels_to_float(pixels.reshape(-1, *pixels.shape[2:])).to(self.world.device)
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
                tokens = self.model.encode(batch)
            parts.append(tokens.reshape(*pixels.shape[:2], -1).cpu().numpy().astype(np.uint16))
            done += len(pixels)
            progress.update(done)
        return np.concatenate(parts)

    def _batches(self, images: range) -> Iterator[Pixels]:
        """Views (images, A, H, W, 3) of a few images at a time, about `batch_size` views together."""
        count = max(1, self.config.batch_size // len(view_names(self.config.views)))
        batches = [images[first : first + count] for first in range(0, len(images), count)]
        with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="decode") as pool:
            ahead = pool.map(self._views, batches[0])
            for following in (*batches[1:], range(0)):
                current, ahead = ahead, pool.map(self._views, following)  # starts to decode them
                yield np.stack(list(current))

    def _views(self, image: int) -> Pixels:
        picture = decode(self.index.read(self.root, image))
        return np.stack(views(picture, self.config.image_size, self.config.views))


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


def _codebook_usage(store: TokenStore) -> dict[str, float]:
    """Share of the codes that occur, and the entropy of their frequencies in nats: what knowing nothing else leaves."""
    counts = np.zeros(store.codebook_size, dtype=np.int64)
    for unit in range(store.num_units):
        for view in range(store.num_views):
            counts += np.bincount(store.read_block(unit, view).ravel(), minlength=store.codebook_size)
    shares = counts[counts > 0] / counts.sum()
    return {
        "num_images": store.num_images,
        "num_views": store.num_views,
        "num_tokens": store.num_tokens,
        "codebook_usage": float(np.mean(counts > 0)),
        "unigram_entropy": float(-(shares * np.log(shares)).sum()),
    }


if __name__ == "__main__":
    main(tokenize, TokenizeConfig)
