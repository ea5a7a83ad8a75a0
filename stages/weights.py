"""Weights of our own artifacts: safetensors in float32, with the model's config as JSON beside them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from models.config import DPARConfig, GPTConfig, VQConfig
from models.dpar import DPAR
from models.gpt import GPT
from models.vq import VQModel
from stages.artifact import read_json, write_json
from stages.errors import ArtifactError

VQ_FILE = "vq.safetensors"
MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
Module = TypeVar("Module", bound=nn.Module)


def save_vq(artifact: Path, model: VQModel) -> None:
    """Write a tokenizer artifact's weights (float32) and config."""
    _save(artifact / VQ_FILE, model)
    write_json(artifact / CONFIG_FILE, asdict(model.config))


def load_vq(artifact: Path, device: torch.device | str = "cpu") -> VQModel:
    """The tokenizer of a finished artifact, in evaluation mode."""
    config = read_json(artifact / CONFIG_FILE)
    config["channel_multipliers"] = tuple(config["channel_multipliers"])
    return _fill(VQModel(VQConfig(**config)), artifact / VQ_FILE).to(device).eval()


def save_model(artifact: Path, family: str, model: nn.Module, config: GPTConfig | DPARConfig) -> None:
    """Write a trained model's weights (float32) and config; `family` is "gpt", "llamagen" or "dpar"."""
    _save(artifact / MODEL_FILE, model)
    write_json(artifact / CONFIG_FILE, {"family": family, "config": asdict(config)})


def load_model(artifact: Path, device: torch.device | str = "cpu") -> GPT | DPAR:
    """The class-conditional model of a finished `train` artifact, in evaluation mode."""
    saved = read_json(artifact / CONFIG_FILE)
    if saved["family"] != "dpar":
        return load_gpt(artifact, device)
    return _fill(DPAR(DPARConfig(**saved["config"])), artifact / MODEL_FILE).to(device).eval()


def load_gpt(artifact: Path, device: torch.device | str = "cpu") -> GPT:
    """A GPT, e.g. the entropy model of a finished `entropy_model` artifact, in evaluation mode.

    Raises:
        ArtifactError: It holds another kind of model, or is damaged.
    """
    saved = read_json(artifact / CONFIG_FILE)
    if saved["family"] not in {"gpt", "llamagen"}:
        raise ArtifactError(f"{artifact} holds a model of family {saved['family']}, expected a GPT")
    return _fill(GPT(GPTConfig(**saved["config"])), artifact / MODEL_FILE).to(device).eval()


def _save(path: Path, model: nn.Module) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, partial)
    partial.replace(path)


def _fill(model: Module, path: Path) -> Module:
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ArtifactError(f"{path} is damaged or of another model: {' '.join(str(error).split())[:200]}") from error
    return model
