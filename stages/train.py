"""Stage `train`: the class-conditional model, DPAR on patches, or a rival on tokens: LlamaGen, or LlamaGen by NPP.

A rival's weights can be imported instead: LlamaGen's were released.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conf.schema import RuntimeConfig
from conf.train import JointHeadConfig, TrainConfig
from models.config import DPARConfig, EntropyHeadConfig, GPTConfig
from models.dpar import DPAR
from models.entropy_head import EntropyHead
from models.gpt import GPT
from stages.runtime.artifact import read_json
from stages.runtime.distributed import World, process_group
from stages.runtime.job import Inputs, main
from stages.runtime.randomness import Purpose, seed_torch
from stages.stores.entropies import EntropyStore
from stages.stores.patches import PatchIndex
from stages.stores.tokens import TokenStore
from stages.training.compiled import compile_blocks
from stages.training.data import GPTObjective, TokenData
from stages.training.entropies import EntropyData, JointObjective
from stages.training.log import MetricLog
from stages.training.loop import train_model
from stages.training.next_patch import NextPatchData, NextPatchObjective
from stages.training.patched import DPARObjective, PatchedData
from stages.training.validation import heldout_loss
from stages.weights.own import save_head, save_model
from stages.weights.pretrained import read_gpt_checkpoint, write_source


def train(config: TrainConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `model.safetensors` and its config; an entropy head that was trained with the model lies beside them.

    The record holds the held-out loss, the mean over all T positions with each image's own class, and, of imported
    weights, `source.json` with the SHA-256 of the file that they came from.
    """
    with process_group(runtime) as world:
        store = TokenStore.open(inputs["tokenize"] / "tokens.zarr")
        if config.source == "checkpoint":
            assert config.checkpoint is not None
            model = _import(config, config.checkpoint, store, output, world)
            if world.is_main:
                write_source(output, config.checkpoint)
        else:
            model, head = _train(config, store, inputs, output, world, compiled=runtime.compile)
            if head is not None and world.is_main:
                save_head(output, head)
        if world.is_main:
            save_model(output, config.family, model, model.config)


def _import(config: TrainConfig, checkpoint: Path, store: TokenStore, output: Path, world: World) -> GPT | DPAR:
    """Released weights; their held-out loss goes to the record."""
    shape = GPTConfig(
        **asdict(config.model),
        codebook_size=store.codebook_size,
        num_tokens=store.num_tokens,
        num_classes=store.num_classes,
    )
    model = read_gpt_checkpoint(checkpoint, shape).to(world.device).eval()
    with torch.no_grad():
        loss = heldout_loss(TokenData(store), GPTObjective(model), world)
    MetricLog(output, 0, enabled=world.is_main).write(0, loss)
    return model


def _train(
    config: TrainConfig, store: TokenStore, inputs: Inputs, output: Path, world: World, *, compiled: bool
) -> tuple[GPT | DPAR, EntropyHead | None]:
    """A model trained from the start, or from where a killed run was, and the head beside it."""
    seed_torch(config.seed, Purpose.WEIGHTS)
    job = _job(config, store, inputs)
    if compiled:
        compile_blocks(job.model)
    run = job.data.training(
        job.model,
        job.objective,
        config.training,
        config.seed,
        world,
        restarts=config.restarts,
        companions={} if job.head is None else {"entropy_head": job.head},
    )
    train_model(run, output, world)
    return job.model, job.head


@dataclass(frozen=True)
class _Job:
    """A fresh model, its loss, the batches it reads, and the head that learns beside it."""

    model: GPT | DPAR
    objective: nn.Module
    data: TokenData
    head: EntropyHead | None = None


def _job(config: TrainConfig, store: TokenStore, inputs: Inputs) -> _Job:
    size = asdict(config.model)
    common: dict[str, Any] = {
        "codebook_size": store.codebook_size,
        "num_tokens": store.num_tokens,
        "num_classes": store.num_classes,
        "dropout": config.dropout,
        "class_dropout_prob": config.class_dropout_prob,
    }
    if config.family == "dpar":
        shape = DPARConfig(**size, **common, position_embedding=config.position_embedding)
        return _dpar_job(shape, config.entropy_head, store, inputs)
    gpt = GPT(GPTConfig(**size, **common))
    if config.family == "npp":
        return _Job(gpt, NextPatchObjective(gpt), NextPatchData(store, config.npp, config.training.steps))
    return _Job(gpt, GPTObjective(gpt), TokenData(store))


def _dpar_job(shape: DPARConfig, joint: JointHeadConfig, store: TokenStore, inputs: Inputs) -> _Job:
    """With a head, entropies are read too. No entropy opens static patches: beside them a head has nothing to say."""
    model = DPAR(shape)
    index = PatchIndex.open(inputs["patch_index"] / "patches.parquet", store.digest)
    if joint.kind == "none" or read_json(inputs["patch_index"] / "rule.json")["mode"] == "static":
        return _Job(model, DPARObjective(model), PatchedData(store, index))
    entropies = EntropyStore.open(inputs["entropy_map"] / "entropies.zarr")
    head = EntropyHead(EntropyHeadConfig.of(shape, joint.kind))  # after the model, whose first weights it leaves alone
    objective = JointObjective(model, head, joint.weight, stop_gradient=joint.stop_gradient)
    return _Job(model, objective, EntropyData(store, index, entropies), head)


if __name__ == "__main__":
    main(train, TrainConfig)
