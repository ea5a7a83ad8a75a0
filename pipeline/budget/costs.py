"""Costs of the models of a run, counted by `models.macs` on the modules that train and sample."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from conf.schema import Settings
from models.config import DPARConfig, DPARSize, GPTConfig, GPTSize
from pipeline.bench.boundary_costs import BOUNDARY_COSTS, SampledModels
from pipeline.bench.family_costs import FAMILY_COSTS
from pipeline.budget.shape import Shape, model_size

if TYPE_CHECKING:
    from models.macs import Cost, ImageCost, Sampling


@dataclass(frozen=True)
class Costs:
    """Settings and sizes of a run on a number of devices, and the costs of its models, each counted once."""

    settings: Settings
    shape: Shape
    devices: int

    @cached_property
    def image(self) -> ImageCost:
        """The tokenizer and the networks of its losses, at the size of the tokenised images."""
        from models.macs import image_cost

        return image_cost(self.settings.tokenizer.model, self.settings.tokenize.image_size)

    @cached_property
    def entropy_model(self) -> Cost:
        """The entropy model."""
        from models.macs import gpt_cost

        config = asdict(self.shape.tokens) | asdict(self.settings.entropy_model.model) | {"num_classes": None}
        return gpt_cost(GPTConfig(**config))

    @cached_property
    def model(self) -> Cost:
        """The class-conditional model."""
        train = self.settings.train
        return FAMILY_COSTS[train.family].trained(train, asdict(self.shape.tokens), self.shape.mean_length)

    @property
    def size(self) -> GPTSize | DPARSize:
        """Size of the class-conditional model."""
        return model_size(self.settings)

    @cached_property
    def boundaries(self) -> Sampling:
        """What the source of boundaries adds to sampling."""
        from models.macs import DPARCost, Sampling

        source = self.settings.sample.boundaries
        if source is None or not isinstance(self.model, DPARCost) or not isinstance(self.size, DPARSize):
            return Sampling()
        config = DPARConfig(**asdict(self.size), **asdict(self.shape.tokens))
        sampled = SampledModels(config=config, cost=self.model, entropy_model=self.entropy_model)
        return BOUNDARY_COSTS[source](sampled)

    def share(self, count: float) -> float:
        """Part of one device."""
        return count / self.devices
