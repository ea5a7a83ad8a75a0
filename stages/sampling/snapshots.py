"""Samples of a model while it trains, one picture at a time, in the record of its artifact.

All pictures of a run show the same samples: the same classes, random numbers and patches. Boundary sources are
calibrated on the finished model only, so patches are those of a real image of each sample's class.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray

from conf.sample import SampleConfig
from conf.train import TrainConfig
from models.boundaries import GivenBoundaries
from models.vq import VQModel
from stages.families import ARCHITECTURES, Model
from stages.runtime.artifact import RECORD
from stages.runtime.job import Inputs
from stages.sampling.preview import spread
from stages.sampling.sampler import Sampler, has_null_class, prepare_for_sampling
from stages.stores.tokens import TokenStore
from stages.training.data import TokenData
from stages.training.loop import Preview
from stages.training.patched import PatchedData
from stages.views.pictures import captioned_grid, enlarged, save_png
from stages.weights.own import load_vq

logger = logging.getLogger(__name__)
FOLDER = Path(RECORD) / "previews"
_IMAGES, _COLUMNS = 16, 4


def preview_of(
    config: TrainConfig, model: Model, data: TokenData, inputs: Inputs, output: Path, device: torch.device
) -> Preview | None:
    """Previews of `model` every `train.preview_every` steps; None without the setting, or without a tokenizer."""
    if config.preview_every is None:
        return None
    if "tokenizer" not in inputs:
        logger.warning("no previews: the tokenizer that decodes them is no longer in the cache")
        return None
    labels = spread(np.arange(data.store.num_classes), _IMAGES)
    boundaries = None
    if isinstance(data, PatchedData):
        images = _image_of_each(labels, data.store)
        boundaries = GivenBoundaries(torch.from_numpy(data.index.starts(images, np.zeros_like(images))).to(device))
    settings = SampleConfig(
        precision=config.training.precision, image_size=data.store.facts.image_size, seed=config.seed
    )
    if not has_null_class(model):
        settings = settings.model_copy(update={"cfg_scale": 1.0})
    vq = load_vq(inputs["tokenizer"], device)
    return Preview(config.preview_every, _Snapshots(settings, model, vq, boundaries, labels, output, device).draw)


@dataclass(frozen=True)
class _Snapshots:
    settings: SampleConfig
    model: Model
    vq: VQModel
    boundaries: GivenBoundaries | None
    labels: Int64[NDArray[np.int64], " n"]
    output: Path
    device: torch.device

    def draw(self, done: int) -> None:
        """Sample with the present weights and write the picture. Without memory for it, training goes on."""
        try:
            images = self._sampler().sample(np.arange(len(self.labels)), self.labels)["images"]
        except torch.OutOfMemoryError:
            logger.warning("no preview of step %d: the GPU has no memory left for it", done)
            return
        captions = [f"class {label}" for label in self.labels]
        picture = captioned_grid([enlarged(image) for image in images], captions, _COLUMNS)
        save_png(picture, self.output / FOLDER / f"step-{done:09d}.png")

    def _sampler(self) -> Sampler:
        """A sampler of a copy of the model: sampling changes the layout and the type of weights."""
        with torch.device("meta"):  # so that initial weights take no random numbers from the training
            module = ARCHITECTURES[self.model.family].module(self.model.config)
        weights = {name: weight.detach().clone() for name, weight in self.model.module.state_dict().items()}
        module.load_state_dict(weights, assign=True)
        prepare_for_sampling(module.eval(), self.settings)
        copy = Model(self.model.family, module, self.model.config)
        return Sampler(self.settings, copy, self.vq, self.boundaries, self.device)


def _image_of_each(labels: Int64[NDArray[np.int64], " n"], store: TokenStore) -> Int64[NDArray[np.int64], " n"]:
    """A training image of each class; any image for a class that has none."""
    known = store.labels[: store.num_train]
    return np.array([int(np.argmax(known == label)) for label in labels], dtype=np.int64)
