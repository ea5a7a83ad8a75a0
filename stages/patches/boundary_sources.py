"""The sources that decide where patches start in samples: how each decides, and at which threshold.

`conf.boundary_sources` says what people and settings know of the same sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from conf.boundary_sources import BOUNDARY_SOURCES, for_every_source
from conf.entropy_head import EntropyHeadConfig
from conf.sample import SampleConfig
from models.boundaries import Boundaries, EntropyBoundaries, GivenBoundaries, HeadBoundaries, OwnEntropyBoundaries
from models.config import EntropyHeadConfig as HeadShape
from models.dpar import DPAR
from models.entropy_head import EntropyHead, entropies_of
from models.patching import PatchRule, static_patch_starts
from stages.patches.calibration import SourceEntropies, Thresholds
from stages.patches.own_entropy import own_entropies
from stages.patches.rule import SavedRule
from stages.patches.thresholds import EntropySample
from stages.runtime.errors import ArtifactError, InputError
from stages.runtime.job import Inputs
from stages.stores.entropies import EntropyStore
from stages.stores.tokens import TokenStore
from stages.weights.own import ModelConfig, load_gpt, load_head

Loaded = tuple[Boundaries, nn.Module | None]
"""What decides, and the network it decides with, beside the sampled model."""


@dataclass(frozen=True, kw_only=True)
class Materials:
    """What a source is loaded from."""

    inputs: Inputs
    store: TokenStore
    index_rule: SavedRule
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class EntropySource:
    """A source whose entropies are compared with a threshold."""

    load: Callable[[Materials, PatchRule], Loaded]
    threshold: Callable[[Materials], float]
    """Its own threshold, nats."""
    entropies: Callable[[Inputs], EntropySample]
    """What it says of training images: the threshold for a mean patch length is chosen by it."""

    def boundaries(self, config: SampleConfig, given: Materials) -> Loaded:
        """Load it with the patch index's rule at its own threshold, with what the settings change."""
        if given.index_rule.mode == "static":
            raise InputError(
                f"sample.boundaries is {config.boundaries} and patch_index.mode static, expected boundaries static"
            )
        rule = given.index_rule.patch_rule(given.store.grid)
        if config.max_length is not None:
            rule = replace(rule, max_length=config.max_length)
        if config.threshold is not None:
            threshold = config.threshold
        elif config.target_mean_length is not None:
            threshold = self.entropies(given.inputs).find_threshold(config.target_mean_length, rule, "sample")
        else:
            threshold = self.threshold(given)
        return self.load(given, replace(rule, threshold=threshold))


@dataclass(frozen=True, kw_only=True)
class GivenSource:
    """A source that knows all boundaries before sampling starts."""

    starts: Callable[[Materials], Tensor]
    """Patch starts (T,) or (B, T), bool."""

    def boundaries(self, config: SampleConfig, given: Materials) -> Loaded:
        """Load it; there is no threshold that the settings could change."""
        if config.own_rule:
            raise InputError(
                f"sample.{next(iter(config.own_rule))} is set and patches are {config.boundaries}, expected boundaries "
                "by entropy: here none decides"
            )
        return GivenBoundaries(self.starts(given).to(given.device)), None


def load_boundaries(config: SampleConfig, inputs: Inputs, store: TokenStore, device: torch.device) -> Loaded:
    """Load the source that the settings name. Artifacts of other sources are not read.

    Raises:
        ArtifactError: An artifact is damaged or of other tokens.
        InputError: The settings ask for boundaries that these artifacts cannot give.
    """
    if config.boundaries is None:
        raise InputError(
            f"sample.boundaries is None and the model works on patches, expected one of {', '.join(BOUNDARY_SOURCES)}"
        )
    given = Materials(inputs=inputs, store=store, index_rule=SavedRule.of(inputs), device=device)
    return SOURCES[config.boundaries].boundaries(config, given)


def entropy_sample(source: str, inputs: Inputs) -> EntropySample:
    """What a source by entropy says of training images: what its threshold is chosen by."""
    found = SOURCES[source]
    assert isinstance(found, EntropySource), f"{source} has no entropies"
    return found.entropies(inputs)


def require_fit(name: str, config: ModelConfig | HeadShape, artifact: Path, store: TokenStore) -> None:
    """Refuse a network of other tokens: it would sample, or evaluate, codes that mean something else."""
    wanted = {"num_tokens": store.num_tokens, "codebook_size": store.codebook_size}
    if getattr(config, "num_classes", None) is not None:
        wanted["num_classes"] = store.num_classes
    for field, value in wanted.items():
        if getattr(config, field) != value:
            raise ArtifactError(
                f"the {name} in {artifact} has {field} {getattr(config, field)}, expected {value} as {store.location}: "
                "use one that was trained on these tokens"
            )


def _load_head(given: Materials, rule: PatchRule) -> Loaded:
    head = load_head(given.inputs["entropy_head"], given.device)
    require_fit("entropy head", head.config, given.inputs["entropy_head"], given.store)
    return HeadBoundaries(head, rule), head


def _load_entropy_model(given: Materials, rule: PatchRule) -> Loaded:
    model = load_gpt(given.inputs["entropy_model"], given.device)
    require_fit("entropy model", model.config, given.inputs["entropy_model"], given.store)
    return EntropyBoundaries(model, rule), model


def _static_starts(given: Materials) -> Tensor:
    """Patches of one length: the patch index's own, or its mean where it has others."""
    length = given.index_rule.static_length or given.index_rule.mean_length
    return static_patch_starts(length, given.store.num_tokens)


def _calibrated_threshold(source: str, given: Materials) -> float:
    return Thresholds.of(given.inputs)[source]


def _calibrated_entropies(source: str, inputs: Inputs) -> EntropySample:
    entropies = SourceEntropies.of(inputs).by_source[source]
    return EntropySample.of_array(entropies, TokenStore.of(inputs).codebook_size)


SOURCES: dict[str, EntropySource | GivenSource] = for_every_source(
    {
        "entropy_head": EntropySource(
            load=_load_head,
            threshold=partial(_calibrated_threshold, "entropy_head"),
            entropies=partial(_calibrated_entropies, "entropy_head"),
        ),
        "entropy_model": EntropySource(
            load=_load_entropy_model,
            threshold=lambda given: given.index_rule.patch_rule(given.store.grid).threshold,
            entropies=lambda inputs: EntropySample.of(EntropyStore.of(inputs)),
        ),
        "own_entropy": EntropySource(
            load=lambda given, rule: (OwnEntropyBoundaries(rule), None),
            threshold=partial(_calibrated_threshold, "own_entropy"),
            entropies=partial(_calibrated_entropies, "own_entropy"),
        ),
        "static": GivenSource(starts=_static_starts),
    }
)


@dataclass(frozen=True)
class KnownImages:
    """Tokens (B, T) of some images, their labels (B,), and where their patches start (B, T)."""

    tokens: Tensor
    labels: Tensor
    starts: Tensor


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How stage `entropy_head` asks a source about known images, to find its threshold."""

    limit: Callable[[EntropyHeadConfig], int]
    """Training views that it is asked about, at most."""
    entropies: Callable[[DPAR, EntropyHead | None, KnownImages], Tensor]
    """What it says of each token given those before it, nats, (B, T)."""


def _head_entropies(model: DPAR, head: EntropyHead | None, batch: KnownImages) -> Tensor:
    assert head is not None  # the source is asked only where there is one
    return entropies_of(model, head, batch.tokens)


CALIBRATIONS: dict[str, Calibration] = for_every_source(
    {
        "entropy_head": Calibration(limit=lambda config: config.calibrated_on, entropies=_head_entropies),
        "own_entropy": Calibration(
            limit=lambda config: config.own_entropy_on,
            entropies=lambda model, head, batch: own_entropies(model, batch.tokens, batch.labels, batch.starts),
        ),
    },
    calibrated=True,
)
