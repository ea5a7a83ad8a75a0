"""Which source decides where patches open while drawing, at which threshold, and the entropies it was calibrated on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from conf.boundary_sources import BoundarySource
from conf.sample import SampleConfig
from models.boundaries import Boundaries, EntropyBoundaries, GivenBoundaries, HeadBoundaries, OwnEntropyBoundaries
from models.config import DPARConfig, EntropyHeadConfig, GPTConfig
from models.patching import PatchRule, static_patch_starts
from stages.patches.thresholds import EntropySample
from stages.runtime.artifact import read_json
from stages.runtime.errors import ArtifactError, InputError
from stages.runtime.job import Inputs
from stages.stores.entropies import EntropyStore
from stages.stores.tokens import TokenStore
from stages.weights.own import load_gpt, load_head

THRESHOLDS = "thresholds.json"
SAMPLES = "entropies.npz"
HELDOUT_SAMPLES = "heldout.npz"


def chosen_source(config: SampleConfig, inputs: Inputs) -> BoundarySource:
    """The source that the settings name.

    Raises:
        InputError: This model has no such source.
    """
    known = ["static"]
    if read_json(inputs["patch_index"] / "rule.json")["mode"] != "static":
        own = list(read_json(inputs["entropy_head"] / THRESHOLDS)) if "entropy_head" in inputs else []
        known += [*own, "entropy_model"]
    if config.boundaries is None or config.boundaries not in known:
        raise InputError(
            f"sample.boundaries is {config.boundaries}, expected {' or '.join(known)}: nothing else can decide for "
            "this model, see patch_index.mode and entropy_head.kind"
        )
    return config.boundaries


def load_boundaries(
    config: SampleConfig, inputs: Inputs, store: TokenStore, device: torch.device
) -> tuple[Boundaries, nn.Module | None]:
    """What decides, and the network it decides with. A network of another source is not read.

    Raises:
        ArtifactError: An artifact is damaged or of other tokens.
        InputError: The settings ask for boundaries that these artifacts cannot give.
    """
    source, saved = chosen_source(config, inputs), read_json(inputs["patch_index"] / "rule.json")
    if source == "static":
        return GivenBoundaries(_static(config, saved, store).to(device)), None
    rule = _rule(config, source, saved, inputs, store)
    if source == "own_entropy":
        return OwnEntropyBoundaries(rule), None
    if source == "entropy_head":
        head = load_head(inputs["entropy_head"], device)
        require_fit("entropy head", head.config, inputs["entropy_head"], store)
        return HeadBoundaries(head, rule), head
    model = load_gpt(inputs["entropy_model"], device)
    require_fit("entropy model", model.config, inputs["entropy_model"], store)
    return EntropyBoundaries(model, rule), model


def require_fit(
    name: str, config: GPTConfig | DPARConfig | EntropyHeadConfig, artifact: Path, store: TokenStore
) -> None:
    """Refuse a network of other tokens: it would draw, or judge, codes that mean something else."""
    wanted = {"num_tokens": store.num_tokens, "codebook_size": store.codebook_size}
    if not isinstance(config, EntropyHeadConfig) and config.num_classes is not None:
        wanted["num_classes"] = store.num_classes
    for field, value in wanted.items():
        if getattr(config, field) != value:
            raise ArtifactError(
                f"the {name} in {artifact} has {field} {getattr(config, field)}, expected {value} as {store.location}: "
                "use one that was trained on these tokens"
            )


def entropy_sample(source: BoundarySource, inputs: Inputs) -> EntropySample:
    """What the source says of training images: what its threshold is chosen by."""
    if source == "entropy_model":
        return EntropySample.of(EntropyStore.open(inputs["entropy_map"] / "entropies.zarr"))
    store = TokenStore.open(inputs["tokenize"] / "tokens.zarr")
    with np.load(inputs["entropy_head"] / SAMPLES) as saved:
        return EntropySample.of_array(saved[source], store.codebook_size)


def patch_rule(saved: dict[str, Any], grid: int) -> PatchRule:
    """The rule of a patch index by entropy, as its `rule.json` has it."""
    return PatchRule(
        threshold=saved["threshold"], max_length=saved["max_length"], row_boundary=saved["row_boundary"], grid=grid
    )


def _rule(
    config: SampleConfig, source: BoundarySource, saved: dict[str, Any], inputs: Inputs, store: TokenStore
) -> PatchRule:
    """The patch index's rule at the source's threshold, with what the settings change."""
    rule = patch_rule(saved, store.grid)
    if source != "entropy_model":
        rule = replace(rule, threshold=read_json(inputs["entropy_head"] / THRESHOLDS)[source])
    if config.max_length is not None:
        rule = replace(rule, max_length=config.max_length)
    if config.threshold is not None:
        return replace(rule, threshold=config.threshold)
    if config.target_mean_length is None:
        return rule
    found = entropy_sample(source, inputs).find_threshold(config.target_mean_length, rule, "sample")
    return replace(rule, threshold=found)


def _static(config: SampleConfig, saved: dict[str, Any], store: TokenStore) -> torch.Tensor:
    """Patches of one length: the patch index's own, or its mean where it has others."""
    if config.own_rule:
        raise InputError(
            f"sample.{next(iter(config.own_rule))} is set and patches are static, expected boundaries by entropy: "
            "here none decides"
        )
    return static_patch_starts(saved["static_length"] or saved["mean_length"], store.num_tokens)
