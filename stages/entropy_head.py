"""Stage `entropy_head`: a DPAR's own sources of boundaries made ready, so that no entropy model is needed to draw.

A head tells the entropy model's entropies, but less spread out, as every regression does: its values need a threshold
of their own. So do the entropies of the model's own predictions. Each is chosen on training images to give the mean
patch length of the patch index.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from conf.schema import EntropyHeadConfig, RuntimeConfig
from models.dpar import DPAR
from models.entropy_head import EntropyHead
from models.vq import VQModel
from stages.artifact import read_json, write_atomic, write_json
from stages.calibration import ENTROPIES, HEAD, OWN, THRESHOLDS, Calibration, Source
from stages.distributed import World, process_group
from stages.images import float_to_pixels
from stages.job import Inputs, main
from stages.own_entropies import StoredTokens
from stages.pictures import captioned_grid, patches_outlined
from stages.readiness import ready_to_draw
from stages.stores.entropies import EntropyStore
from stages.stores.patches import PatchIndex
from stages.stores.tokens import TokenStore
from stages.training.entropy_head import EntropyData, FrozenObjective, predict_with
from stages.training.loop import Training, train_model
from stages.training.stream import SampleStream
from stages.weights import load_model, load_vq, save_entropy_head

_SHOWN = 6  # images in patches.png


def entropy_head(config: EntropyHeadConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write the head, `thresholds.json` and the `entropies.npz` that they were chosen on, numbers and `patches.png`.

    On held-out images, `metrics.json` holds how each source's entropies correlate with those of the entropy model, and
    the share of tokens at which both open a patch or neither does. A model without patches, or with static ones, has
    no source: the files say so.
    """
    with process_group(runtime) as world:
        model = load_model(inputs["train"], world.device)
        rule = read_json(inputs["patch_index"] / "rule.json")
        if not isinstance(model, DPAR) or rule["mode"] == "static":
            if world.is_main:
                save_entropy_head(output, None)
                write_json(output / THRESHOLDS, {})
                write_json(output / "metrics.json", {})
            return
        data = _data(inputs)
        head = _train(config, model, data, output, world) if config.source == "train" else model.entropy_head
        if world.is_main:
            save_entropy_head(output, head)
            ready_to_draw(model, config.precision)
            calibration = Calibration(
                StoredTokens(model, data.store, config.batch_size), data, rule, config.calibration_images
            )
            sources = {OWN: calibration.of_predictions()}
            if head is not None:
                ready_to_draw(head, config.precision)
                sources = {HEAD: calibration.of_head(head)} | sources
            _write(output, sources, calibration)
            picture = _picture(sources, calibration, load_vq(inputs["tokenizer"], world.device))
            write_atomic(output / "patches.png", lambda file: picture.save(file, "PNG"))


def _data(inputs: Inputs) -> EntropyData:
    store = TokenStore.open(inputs["tokenize"] / "tokens.zarr")
    index = PatchIndex.open(inputs["patch_index"] / "patches.parquet", store.digest)
    entropies = EntropyStore.open(inputs["entropy_map"] / "entropies.zarr")
    index.require_entropies(entropies.digest)
    return EntropyData(store, index, entropies)


def _train(config: EntropyHeadConfig, model: DPAR, data: EntropyData, output: Path, world: World) -> EntropyHead:
    """A head of its own on the finished model, which stays as it is."""
    torch.manual_seed(config.seed)
    head = EntropyHead(config.kind, model.config.dim, model.config.codebook_size)
    stream = SampleStream(data.store.num_train, config.training.global_batch_size, config.seed)
    run = Training(
        model=head,
        objective=FrozenObjective(model, head),
        batch=lambda step: data.training_batch(stream, step, world),
        data_state=lambda steps: stream.state(steps) | data.digests,
        validate=lambda: data.heldout_fit(predict_with(head, model), world),
        config=config.training,
        seed=config.seed,
    )
    train_model(run, output, world)
    model.eval()
    return head.eval()


def _write(output: Path, sources: Mapping[str, Source], calibration: Calibration) -> None:
    write_json(output / THRESHOLDS, {name: source.threshold for name, source in sources.items()})
    entropies = {name: source.calibration for name, source in sources.items()}
    write_atomic(output / ENTROPIES, lambda file: np.savez(file, allow_pickle=False, **entropies))
    numbers: dict[str, float] = {}
    for name, source in sources.items():
        numbers |= calibration.numbers(name, source)
    write_json(output / "metrics.json", numbers)


@torch.inference_mode()
def _picture(sources: Mapping[str, Source], calibration: Calibration, vq: VQModel) -> Image.Image:
    """A row for each source, of the entropy model first: the patches it draws on the same images."""
    chosen = np.linspace(0, len(calibration.heldout) - 1, min(len(calibration.heldout), _SHOWN)).astype(np.int64)
    store, rows = calibration.data.store, calibration.heldout[chosen]
    tokens = torch.from_numpy(store.fetch(rows, np.zeros_like(rows)).astype(np.int64))
    images = float_to_pixels(vq.decode(tokens.to(next(vq.parameters()).device)))
    drawn = {"entropy_model": calibration.index_starts}
    drawn |= {name: source.heldout_starts for name, source in sources.items()}
    pictures, captions = [], []
    for name, starts in drawn.items():
        for image, place in zip(images, chosen, strict=True):
            pictures.append(patches_outlined(image, starts[place], store.grid))
            captions.append(f"{name}: {starts[place].sum()} patches")
    return captioned_grid(pictures, captions, columns=len(chosen))


if __name__ == "__main__":
    main(entropy_head, EntropyHeadConfig)
