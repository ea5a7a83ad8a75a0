"""Bytes that each stage writes below the home of the artifacts, in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from conf.boundary_sources import by_entropy
from conf.schema import Settings
from conf.section import TrainingConfig
from pipeline.budget.parameters import transformer_parameters, vq_parameters
from pipeline.budget.shape import Shape, model_size
from pipeline.graph import STAGES

WEIGHT, MOMENTS = 4, 8  # bytes of a parameter: float32, and AdamW's two moments
_INDEX_ROW, _FEATURES = 100, 4 * (1280 + 1000)  # bytes of an image: row of the index; features and logits
_TOKEN, _ENTROPY = 2, 4  # bytes of a token: uint16, float32
_Entry = TypeVar("_Entry")


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes of a stage.

    Attributes:
        kept: Bytes of the finished artifact.
        extra: Bytes needed in addition while the stage runs.
    """

    kept: float
    extra: float = 0


def for_every_stage(table: Mapping[str, _Entry]) -> dict[str, _Entry]:
    """The table, checked to have an entry for each stage and no other."""
    assert set(table) == set(STAGES), f"entries {sorted(table)}, stages {sorted(STAGES)}"
    return dict(table)


def _trained(parameters: float, training: TrainingConfig | None) -> Disk:
    """Weights, and the last checkpoint of a training; a spare checkpoint while it runs. None: imported weights."""
    if training is None:
        return Disk(kept=parameters * WEIGHT)
    average = 0 if training.ema_decay is None else WEIGHT
    checkpoint = parameters * (WEIGHT + MOMENTS + average)
    return Disk(kept=parameters * WEIGHT + checkpoint, extra=checkpoint)


def _tokenizer(settings: Settings, shape: Shape) -> Disk:
    config = settings.tokenizer
    return _trained(vq_parameters(config.model), config.training if config.source == "train" else None)


def _entropy_model(settings: Settings, shape: Shape) -> Disk:
    config = settings.entropy_model
    parameters = transformer_parameters(config.model, shape.tokens, conditional=False)
    return _trained(parameters, config.training if config.imported is None else None)


def _train(settings: Settings, shape: Shape) -> Disk:
    config = settings.train
    parameters = transformer_parameters(model_size(settings), shape.tokens, conditional=True)
    return _trained(parameters, config.training if config.imported is None else None)


def _entropy_head(settings: Settings, shape: Shape) -> Disk:
    views = 2 * settings.entropy_head.calibrated_on if by_entropy(settings.sample.boundaries) else 0
    return Disk(kept=views * shape.tokens.num_tokens * _ENTROPY)


def _sample(settings: Settings, shape: Shape) -> Disk:
    config = settings.sample
    return Disk(kept=config.num_samples * (3 * config.image_size**2 + shape.tokens.num_tokens * (_TOKEN + 1)))


def _per_token(bytes_: float) -> Callable[[Settings, Shape], Disk]:
    return lambda settings, shape: Disk(kept=shape.num_views * shape.tokens.num_tokens * bytes_)


def _evaluate(settings: Settings, shape: Shape) -> Disk:
    images = shape.reference_images(settings) + settings.sample.num_samples + shape.ladder_images(settings)
    return Disk(kept=images * _FEATURES)


DISKS: dict[str, Callable[[Settings, Shape], Disk]] = for_every_stage(
    {
        "dataset": lambda settings, shape: Disk(kept=shape.images * _INDEX_ROW),
        "tokenizer": _tokenizer,
        "tokenize": _per_token(_TOKEN),
        "entropy_model": _entropy_model,
        "entropy_map": _per_token(_ENTROPY),
        "patch_index": _per_token(1 / 8),
        "train": _train,
        "entropy_head": _entropy_head,
        "sample": _sample,
        "evaluate": _evaluate,
    }
)
"""Bytes that each stage writes."""
