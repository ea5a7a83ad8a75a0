"""What a run makes: one frozen section per stage. `conf.runtime` has the settings that never change a result.

A stage is handed its own section and nothing else, so a setting of another stage cannot reach it unnoticed. Every field
is in the stage's cache key, except fields marked `NOT_IN_KEY`.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, SerializeAsAny, model_validator

from conf.boundary_sources import Need, by_entropy, usable_sources
from conf.dataset import DatasetConfig
from conf.entropy_head import EntropyHeadConfig
from conf.entropy_map import EntropyMapConfig
from conf.entropy_model import EntropyModelConfig
from conf.evaluate import EvaluateConfig
from conf.patch_index import PatchIndexConfig
from conf.sample import SampleConfig
from conf.section import Section, Seed
from conf.tokenize import TokenizeConfig
from conf.tokenizer import TokenizerConfig
from conf.train import DPARSettings, TrainConfig


class Settings(Section):
    """Everything that decides what a run makes."""

    seed: Seed = Field(0, description="Seed of every section that sets none of its own; in no key itself.")
    dataset: DatasetConfig = Field(default_factory=DatasetConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    tokenize: TokenizeConfig = Field(default_factory=TokenizeConfig)
    entropy_model: EntropyModelConfig = Field(default_factory=EntropyModelConfig)
    entropy_map: EntropyMapConfig = Field(default_factory=EntropyMapConfig)
    patch_index: PatchIndexConfig = Field(default_factory=lambda: PatchIndexConfig(threshold=7.8))
    train: SerializeAsAny[TrainConfig] = Field(default_factory=DPARSettings)
    entropy_head: EntropyHeadConfig = Field(default_factory=EntropyHeadConfig)
    sample: SampleConfig = Field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)

    @model_validator(mode="after")
    def _share_seed(self) -> Self:
        """Give the run's seed to every section that sets none, so that keys and stages see numbers."""
        for name in type(self).model_fields:
            section = getattr(self, name)
            if isinstance(section, Section) and "seed" in type(section).model_fields.keys() - section.model_fields_set:
                self.__dict__[name] = section.model_copy(update={"seed": self.seed})  # the model is frozen
        return self

    @model_validator(mode="after")
    def _stages_agree(self) -> Self:
        downsample = self.tokenizer.model.downsample
        if self.tokenize.image_size % downsample:
            raise ValueError(
                f"tokenize.image_size is {self.tokenize.image_size}, expected a multiple of {downsample}, "
                "the downsampling of tokenizer.model"
            )
        if problem := self.train.grid_problem(self.tokenize.image_size // downsample):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _resolve_boundaries(self) -> Self:
        """Put the source of boundaries that null stands for into the settings, so that keys and stages know it."""
        if self.sample.boundaries is None and self.train.has_patches:
            source = usable_sources(self._offered)[0]
            self.__dict__["sample"] = self.sample.model_copy(update={"boundaries": source})  # the model is frozen
        return self

    @property
    def _offered(self) -> frozenset[Need]:
        """What the model offers to sources of boundaries, see `SourceInfo.needs`."""
        offered = set[Need]()
        if self.train.has_patches and self.patch_index.mode == "entropy":
            offered.add("entropies")
            if self.entropy_head.kind != "none" or self.train.trains_head:
                offered.add("head")
        return frozenset(offered)

    @model_validator(mode="after")
    def _sampling_agrees(self) -> Self:
        sample, num_tokens = self.sample, (self.tokenize.image_size // self.tokenizer.model.downsample) ** 2
        usable = usable_sources(self._offered) if self.train.has_patches else []
        found = (
            f"train.family is {self.train.family}, patch_index.mode {self.patch_index.mode} and sample.boundaries "
            f"{sample.boundaries}"
        )
        if sample.own_rule and not by_entropy(sample.boundaries):
            raise ValueError(
                f"sample.{next(iter(sample.own_rule))} is set, {found}, expected a family with patches, mode entropy "
                "and boundaries that are not static: only there do entropies say where patches start"
            )
        if sample.boundaries is not None and sample.boundaries not in usable:
            raise ValueError(
                f"{found}, expected boundaries of {' or '.join(usable) or 'none'}: see patch_index.mode, "
                "entropy_head.kind and train.entropy_head.kind"
            )
        if sample.cfg_scale > 1 and not self.train.can_be_guided:
            raise ValueError(
                f"train.class_dropout_prob is 0 and sample.cfg_scale {sample.cfg_scale:g}, expected class dropout or "
                "sample.cfg_scale=1: guidance compares with what the model predicts without the class"
            )
        if sample.cfg_interval is not None and sample.cfg_interval[1] > num_tokens:
            raise ValueError(
                f"sample.cfg_interval is {list(sample.cfg_interval)}, expected at most {num_tokens}, the tokens of an "
                "image"
            )
        return self
