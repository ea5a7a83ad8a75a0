"""Small models with everything that a training step needs, and their batches as a function of step and places."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch import nn

from conf.section import TrainingConfig
from conf.tokenizer import TokenizerConfig
from models.config import SMALLEST_JUDGED_IMAGE, DPARConfig, EntropyHeadConfig, GPTConfig, VQConfig
from models.discriminator import PatchDiscriminator
from models.dpar import DPAR
from models.entropy_head import EntropyHead
from models.gpt import GPT
from models.packed_patches import pack_patches
from models.patching import PatchRule, patch_starts
from models.vq import VQModel
from stages.training.data import GPTObjective, TokenBatch
from stages.training.entropies import EntropyBatch, HeadObjective, JointObjective
from stages.training.images import ImageBatch, VQObjective
from stages.training.loop import Training
from stages.training.next_patch import NextPatchBatch, NextPatchObjective
from stages.training.patched import DPARObjective, PatchedBatch
from stages.training.stream import Part

IMAGES, GRID, CODES, CLASSES = 8, 4, 64, 3
TOKENS = GRID * GRID
SHAPE: dict[str, Any] = {"codebook_size": CODES, "num_tokens": TOKENS, "dropout": 0.0}
VQ = VQConfig(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, z_channels=32, codebook_size=64)
OBJECTIVES = ("llamagen", "entropy_model", "npp", "dpar", "joint_head", "head", "tokenizer", "adversary")


def gpt(**changes: Any) -> GPT:
    shape = SHAPE | {"num_classes": CLASSES, "class_dropout_prob": 0.0} | changes
    return _with_output(GPT(GPTConfig(dim=32, num_layers=2, num_heads=2, **shape)))


def dpar(**changes: Any) -> DPAR:
    shape = SHAPE | {"num_classes": CLASSES, "class_dropout_prob": 0.0} | changes
    size = {"dim": 32, "num_heads": 2, "encoder_layers": 1, "global_layers": 2, "decoder_layers": 1}
    return _with_output(DPAR(DPARConfig(**size, **shape)))


def _with_output(model: Any) -> Any:
    """The head starts at zero, which would leave all other gradients at zero."""
    nn.init.normal_(model.output.weight, std=0.1)
    return model


def objective(name: str, **changes: Any) -> nn.Module:
    """The module that computes the loss of one of `OBJECTIVES`, with fresh weights."""
    torch.manual_seed(0)
    if name in ("llamagen", "entropy_model"):
        return GPTObjective(gpt(**({"num_classes": None} if name == "entropy_model" else {}) | changes))
    if name == "npp":
        return NextPatchObjective(gpt(**changes))
    if name == "dpar":
        return DPARObjective(dpar(**changes))
    if name in ("head", "joint_head"):
        model = dpar(**changes)
        head = EntropyHead(EntropyHeadConfig.of(model.config, "block"))
        return HeadObjective(model, head) if name == "head" else JointObjective(model, head, 0.5, stop_gradient=False)
    settings = TokenizerConfig(model=VQ, image_size=32, lpips_weight=0.0)
    return VQObjective(VQModel(VQ), None, PatchDiscriminator() if name == "adversary" else None, settings)


def batch(name: str, step: int, part: Part) -> Any:
    """The images at some places of a step's batch of `IMAGES`; with as many patches as it happens."""
    generator = torch.Generator().manual_seed(step)
    rows = slice(part.first, part.first + part.count)
    if name in ("tokenizer", "adversary"):
        side = SMALLEST_JUDGED_IMAGE if name == "adversary" else 8
        pixels = torch.rand(IMAGES, 3, side, side, generator=generator) * 2 - 1
        return ImageBatch(pixels[rows], adversarial=name == "adversary")
    tokens = torch.randint(CODES // 4, (IMAGES, TOKENS), generator=generator)[rows]
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)[rows]
    entropies = torch.rand(IMAGES, TOKENS, generator=generator)[rows]
    if name == "npp":
        return NextPatchBatch(tokens, labels, side=2)
    if name in ("llamagen", "entropy_model"):
        return TokenBatch(tokens, labels)
    patches = pack_patches(patch_starts(PatchRule(0.6, 4, True, GRID), entropies))
    if name == "dpar":
        return PatchedBatch(tokens, labels, patches)
    return EntropyBatch(tokens, labels, patches, entropies)


def training(name: str, module: nn.Module, **changes: Any) -> Training[Any]:
    """A run of 20 steps in which every step is logged."""
    config = {"steps": 20, "global_batch_size": IMAGES, "learning_rate": 1e-3, "precision": "float32", "log_every": 1}
    return Training(
        model=module.head if name == "head" else module.model,  # type: ignore[arg-type]
        objective=module,
        batch=lambda step, part: batch(name, step, part),
        data_state=lambda steps: {"samples_seen": steps * IMAGES},
        validate=dict[str, float],
        config=TrainingConfig.model_validate(config | changes),
        seed=5,
        auxiliary={"head": module.head} if name == "joint_head" else {},  # type: ignore[dict-item]
        samples=lambda step, part: {"images": [1000 * step + part.first + place for place in range(part.count)]},
        counts=lambda made: made.counts() if hasattr(made, "counts") else {},
    )


def interrupt(run: Training[Any], count: int) -> None:
    """Let the process get SIGTERM in the pass of `run` that comes after `count` passes."""
    inner, seen = run.objective.forward, []

    def forward(given: Any) -> Any:
        if len(seen) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(given)
        return inner(given)

    run.objective.forward = forward  # type: ignore[method-assign]
