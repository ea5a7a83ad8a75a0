"""Stage `entropy_map`: entropies of all next-token predictions, in nats, in a Zarr store.

Source: paper, section 3.1: H(x_i | x_<i) under the unconditional entropy model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conf.entropy_map import EntropyMapConfig
from conf.runtime import RuntimeConfig
from models.gpt import GPT
from stages.runtime.artifact import file_sha256
from stages.runtime.distributed import World, process_group
from stages.runtime.job import Inputs, main
from stages.runtime.progress import Progress
from stages.runtime.transfer import Download, one_behind, to_device
from stages.stores.entropies import EntropyFacts, EntropyStore, entropy_writer
from stages.stores.matching import require_fit
from stages.stores.tokens import TokenStore
from stages.stores.writing import write_units
from stages.weights.own import MODEL_FILE, load_gpt

STORE = EntropyStore.FILE


def entropy_map(config: EntropyMapConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `entropies.zarr`.

    Raises:
        ArtifactError: The entropy model was trained on other tokens.
    """
    with process_group(runtime) as world:
        store = TokenStore.of(inputs)
        model = load_gpt(inputs["entropy_model"], world.device)
        require_fit("entropy model", model.config, inputs["entropy_model"], store)
        writer = entropy_writer(output / STORE, _facts(config, store, inputs["entropy_model"]))
        mapper = Mapper(model, store, config, world)
        write_units(
            writer,
            lambda unit, progress: {"entropy": mapper.entropies(unit, progress)},
            pending=writer.pending(world.rank, world.size),
            output=output,
            what="views",
            world=world,
            per_row=store.num_views,
        )
    if world.is_main:
        writer.finish()


@dataclass(frozen=True)
class Mapper:
    """Computes the entropies of a model's predictions of the tokens in a store."""

    model: GPT
    store: TokenStore
    config: EntropyMapConfig
    world: World

    @torch.inference_mode()
    def entropies(self, unit: int, progress: Progress) -> NDArray[np.float32]:
        """Entropies (rows, A, T) of one unit, in nats."""
        rows = self.store.rows(unit)
        out = np.empty((rows.stop - rows.start, self.store.num_views, self.store.num_tokens), dtype=np.float32)
        for view, first, entropies in one_behind(self._started(unit)):
            batch = entropies.numpy()
            out[first : first + len(batch), view] = batch
            progress.update(progress.done + len(batch))
        return out

    def _started(self, unit: int) -> Iterator[tuple[int, int, Download]]:
        """View, first row and entropies of each batch of a unit."""
        for view in range(self.store.num_views):
            block = self.store.read_block(unit, view)
            for first in range(0, len(block), self.config.batch_size):
                yield view, first, Download(self.batch(block[first : first + self.config.batch_size]))

    def batch(self, block: NDArray[np.uint16]) -> Tensor:
        """Entropies (B, T) of tokens, float32, on the device. Does not wait for them."""
        device = self.world.device
        tokens = to_device(torch.from_numpy(block.astype(np.int64)), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            return self.model.entropy(tokens).float()


def _facts(config: EntropyMapConfig, store: TokenStore, model: Path) -> EntropyFacts:
    return EntropyFacts(
        num_images=store.num_images,
        num_train=store.num_train,
        num_views=store.num_views,
        num_tokens=store.num_tokens,
        grid=store.grid,
        chunk_rows=store.facts.chunk_rows,
        codebook_size=store.codebook_size,
        tokens_digest=store.digest,
        model_sha256=file_sha256(model / MODEL_FILE),
        precision=config.precision,
    )


if __name__ == "__main__":
    main(entropy_map, EntropyMapConfig)
