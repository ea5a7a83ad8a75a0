"""What opens patches while a finished model draws: chosen by the settings, loaded from the artifacts that it needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from conf.schema import BoundarySource, SampleConfig
from models.boundaries import (
    Boundaries,
    EntropyBoundaries,
    EntropyHeadBoundaries,
    GivenBoundaries,
    OwnEntropyBoundaries,
)
from models.patching import PatchRule, static_patch_starts
from stages.artifact import read_json
from stages.calibration import ENTROPIES, HEAD, OWN, THRESHOLDS
from stages.errors import InputError
from stages.job import Inputs
from stages.readiness import ready_to_draw, require_fit
from stages.stores.entropies import EntropyStore
from stages.stores.tokens import TokenStore
from stages.thresholds import EntropySample
from stages.weights import load_entropy_head, load_gpt


@dataclass(frozen=True)
class Chosen:
    """A source of boundaries.

    Attributes:
        source: Its name.
        boundaries: What the sampler asks.
        rule: None where no rule opens patches.
        sample: Entropies of training images as the source finds them; None with the rule.
    """

    source: BoundarySource
    boundaries: Boundaries
    rule: PatchRule | None = None
    sample: EntropySample | None = None

    @property
    def described(self) -> dict[str, Any]:
        """For people and other programs."""
        return {"source": self.source, "rule": None if self.rule is None else asdict(self.rule)}


def choose_boundaries(config: SampleConfig, inputs: Inputs, store: TokenStore, device: torch.device) -> Chosen:
    """What opens patches while a DPAR draws. Nothing is read of a source that was not chosen.

    Raises:
        InputError: The settings ask for what the patch index, the model or its entropies cannot give.
        ArtifactError: An artifact is damaged, or the entropy model is not of these tokens.
    """
    saved = read_json(inputs["patch_index"] / "rule.json")
    if saved["mode"] == "static" or config.boundaries == "static":
        return _static(config, saved, store, device)
    if config.boundaries in ("auto", HEAD):
        head = load_entropy_head(inputs["entropy_head"], device)
        if head is not None:
            ready_to_draw(head, config.precision)
            rule, sample = _own_rule(config, saved, inputs, HEAD, store)
            return Chosen(HEAD, EntropyHeadBoundaries(head, rule), rule, sample)
        if config.boundaries == HEAD:
            raise InputError(
                f"sample.boundaries is {HEAD} and {inputs['entropy_head']} holds none, expected a model with a head: "
                "set train.entropy_head.kind, or entropy_head.source to train"
            )
    if config.boundaries == OWN:
        rule, sample = _own_rule(config, saved, inputs, OWN, store)
        return Chosen(OWN, OwnEntropyBoundaries(rule), rule, sample)
    return _by_entropy_model(config, saved, inputs, store, device)


def _static(config: SampleConfig, saved: dict[str, Any], store: TokenStore, device: torch.device) -> Chosen:
    """The patch index's static patches, or ones of the mean length of its patches by entropy."""
    if saved["mode"] == "static" and (config.own_rule or config.boundaries not in ("auto", "static")):
        asked = next(iter(config.own_rule), "boundaries")
        raise InputError(
            f"sample.{asked} is set and the patch index has static patches, expected one by entropy: its model was "
            "trained on patches that no entropy decides"
        )
    length = saved["static_length"] if saved["mode"] == "static" else saved["mean_length"]
    return Chosen("static", GivenBoundaries(static_patch_starts(length, store.num_tokens).to(device)))


def _by_entropy_model(
    config: SampleConfig, saved: dict[str, Any], inputs: Inputs, store: TokenStore, device: torch.device
) -> Chosen:
    model = load_gpt(inputs["entropy_model"], device)
    ready_to_draw(model, config.precision)
    require_fit("entropy model", model.config, inputs["entropy_model"], store)
    sample = EntropySample.of(EntropyStore.open(inputs["entropy_map"] / "entropies.zarr"))
    rule = _rule(config, saved, saved["threshold"], sample, store)
    return Chosen("entropy_model", EntropyBoundaries(model, rule), rule, sample)


def _own_rule(
    config: SampleConfig, saved: dict[str, Any], inputs: Inputs, source: str, store: TokenStore
) -> tuple[PatchRule, EntropySample]:
    """Of a source that the model has of its own, with the threshold that was found for it."""
    artifact = inputs["entropy_head"]
    with np.load(artifact / ENTROPIES) as entropies:
        sample = EntropySample.of_rows(entropies[source], store.codebook_size)
    return _rule(config, saved, read_json(artifact / THRESHOLDS)[source], sample, store), sample


def _rule(
    config: SampleConfig, saved: dict[str, Any], threshold: float, sample: EntropySample, store: TokenStore
) -> PatchRule:
    """The patch index's with the source's `threshold`, changed as the settings ask."""
    rule = PatchRule(
        threshold=threshold if config.threshold is None else config.threshold,
        max_length=saved["max_length"] if config.max_length is None else config.max_length,
        row_boundary=saved["row_boundary"],
        grid=store.grid,
    )
    if config.target_mean_length is None:
        return rule
    return replace(rule, threshold=sample.find_threshold(config.target_mean_length, rule, "sample"))
