"""Sources of patch boundaries in samples: how each decides, and at which threshold.

`conf.boundary_sources` holds the names and descriptions of the same sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from conf.boundary_sources import BOUNDARY_SOURCES, for_every_source
from conf.entropy_head import EntropyHeadConfig
from conf.sample import SampleConfig
from models.boundaries import Boundaries, EntropyBoundaries, GivenBoundaries, HeadBoundaries, OwnEntropyBoundaries
from models.dpar import DPAR
from models.entropy_head import EntropyHead, entropies_of
from models.patching import PatchRule, static_patch_starts
from stages.patches.calibration import SourceEntropies, Thresholds
from stages.patches.own_entropy import own_entropies
from stages.patches.rule import SavedRule
from stages.patches.thresholds import EntropySample
from stages.runtime.errors import InputError
from stages.runtime.job import Inputs
from stages.stores.entropies import EntropyStore
from stages.stores.matching import require_fit
from stages.stores.tokens import TokenStore
from stages.weights.own import load_gpt, load_head

Loaded = tuple[Boundaries, nn.Module | None]
"""The boundaries, and the network that they use besides the sampled model, if any."""


@dataclass(frozen=True, kw_only=True)
class Materials:
    """Everything a source is loaded from."""

    inputs: Inputs
    store: TokenStore
    index_rule: SavedRule
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class EntropySource:
    """A source that compares entropies with a threshold."""

    load: Callable[[Materials, PatchRule], Loaded]
    threshold: Callable[[Materials], float]
    """The source's own threshold, nats."""
    entropies: Callable[[Inputs], EntropySample]
    """Entropies of training images by this source. They determine the threshold for a mean patch length."""

    def boundaries(self, config: SampleConfig, given: Materials) -> Loaded:
        """Load the source with the patch index's rule and the source's threshold; settings override both.

        Raises:
            InputError: The patch index is static.
        """
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
    """A source whose boundaries are known before sampling starts."""

    starts: Callable[[Materials], Bool[Tensor, " T"] | Bool[Tensor, "B T"]]
    """Patch starts."""

    def boundaries(self, config: SampleConfig, given: Materials) -> Loaded:
        """Load the source.

        Raises:
            InputError: The settings change a rule, which this source does not have.
        """
        if config.own_rule:
            raise InputError(
                f"sample.{next(iter(config.own_rule))} is set and patches are {config.boundaries}, expected boundaries "
                "by entropy: remove the setting or choose another sample.boundaries"
            )
        return GivenBoundaries(self.starts(given).to(given.device)), None


def load_boundaries(config: SampleConfig, inputs: Inputs, store: TokenStore, device: torch.device) -> Loaded:
    """Load the source that the settings name. Artifacts of other sources are not read.

    Raises:
        ArtifactError: An artifact is damaged, or belongs to other tokens.
        InputError: The artifacts cannot give the boundaries that the settings ask for.
    """
    if config.boundaries is None:
        raise InputError(
            f"sample.boundaries is None and the model works on patches, expected one of {', '.join(BOUNDARY_SOURCES)}"
        )
    given = Materials(inputs=inputs, store=store, index_rule=SavedRule.of(inputs), device=device)
    return SOURCES[config.boundaries].boundaries(config, given)


def entropy_sample(source: str, inputs: Inputs) -> EntropySample:
    """Entropies of training images by one source, from which its threshold is chosen."""
    found = SOURCES[source]
    assert isinstance(found, EntropySource), f"{source} has no entropies"
    return found.entropies(inputs)


def _load_head(given: Materials, rule: PatchRule) -> Loaded:
    head = load_head(given.inputs["entropy_head"], given.device)
    require_fit("entropy head", head.config, given.inputs["entropy_head"], given.store)
    return HeadBoundaries(head, rule), head


def _load_entropy_model(given: Materials, rule: PatchRule) -> Loaded:
    model = load_gpt(given.inputs["entropy_model"], given.device)
    require_fit("entropy model", model.config, given.inputs["entropy_model"], given.store)
    return EntropyBoundaries(model, rule), model


def _static_starts(given: Materials) -> Bool[Tensor, " T"]:
    """Patches of one length: that of a static patch index, or the mean length of another one."""
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
    """Real images with their labels and patch starts."""

    tokens: Int[Tensor, "B T"]
    labels: Int[Tensor, " B"]
    starts: Bool[Tensor, "B T"]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How stage `entropy_head` evaluates a source on real images to find its threshold."""

    limit: Callable[[EntropyHeadConfig], int]
    """Largest number of training views to evaluate."""
    entropies: Callable[[DPAR, EntropyHead | None, KnownImages], Float[Tensor, "B T"]]
    """Entropy of each token given those before it, nats."""


def _head_entropies(model: DPAR, head: EntropyHead | None, batch: KnownImages) -> Float[Tensor, "B T"]:
    assert head is not None  # the caller skips this source if there is no head
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
