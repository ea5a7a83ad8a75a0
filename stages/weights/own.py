"""Weights in artifacts: safetensors in float32, and the model's config as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.config import EntropyHeadConfig, GPTConfig, VQConfig
from models.entropy_head import EntropyHead
from models.gpt import GPT
from models.vq import VQModel
from stages.runtime.artifact import read_json, write_json
from stages.runtime.errors import ArtifactError

VQ_FILE = "vq.safetensors"
MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
HEAD_FILE, HEAD_CONFIG_FILE = "entropy_head.safetensors", "entropy_head.json"
TOKENIZER_SHA256 = "tokenizer_sha256"  # in the metadata of a weights file
GPT_FAMILY = "gpt"  # family of the unconditional entropy model; the other families are those of stage `train`
Module = TypeVar("Module", bound=nn.Module)


@runtime_checkable  # the test suite checks arguments at run time
class ModelConfig(Protocol):
    """Config of a token model: a dataclass, saved beside the weights."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def num_tokens(self) -> int:
        """Tokens per image."""

    @property
    def codebook_size(self) -> int:
        """Number of codes."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None for an unconditional model."""


def save_vq(artifact: Path, model: VQModel) -> None:
    """Write a tokenizer artifact's weights (float32) and config."""
    _save(artifact / VQ_FILE, model)
    write_json(artifact / CONFIG_FILE, asdict(model.config))


def load_vq(artifact: Path, device: torch.device | str = "cpu") -> VQModel:
    """The tokenizer of a finished artifact, in evaluation mode."""
    config = read_json(artifact / CONFIG_FILE)
    config["channel_multipliers"] = tuple(config["channel_multipliers"])
    return load_weights(VQModel(VQConfig(**config)), artifact / VQ_FILE).to(device).eval()


def save_model(
    artifact: Path, family: str, model: nn.Module, config: ModelConfig, tokenizer: str | None = None
) -> None:
    """Write a trained model's weights (float32) and config.

    Args:
        artifact: Folder of the artifact.
        family: That of stage `train`, or `GPT_FAMILY`.
        model: The model.
        config: Its config.
        tokenizer: SHA-256 of the tokenizer whose tokens it was trained on, kept in the weights file; None if unknown.
    """
    _save(artifact / MODEL_FILE, model, {} if tokenizer is None else {TOKENIZER_SHA256: tokenizer})
    write_json(artifact / CONFIG_FILE, {"family": family, "config": asdict(config)})


def saved_config(artifact: Path, families: Iterable[str]) -> tuple[str, dict[str, Any]]:
    """Family and config of a finished model.

    Raises:
        ArtifactError: The model's family is not among `families`.
    """
    saved = read_json(artifact / CONFIG_FILE)
    if saved["family"] not in families:
        raise ArtifactError(
            f"{artifact} holds a model of family {saved['family']}, expected {' or '.join(families)}: "
            "it is the artifact of another stage"
        )
    return saved["family"], saved["config"]


def tokenizer_sha256(weights: Path) -> str | None:
    """SHA-256 of the tokenizer whose tokens a model was trained on, from its weights file; None if it does not say.

    Raises:
        ArtifactError: The file is damaged.
    """
    if not weights.is_file():
        return None
    try:
        with safe_open(weights, framework="pt") as opened:
            return (opened.metadata() or {}).get(TOKENIZER_SHA256)
    except (SafetensorError, OSError) as error:
        raise _damaged(weights, error) from error


def load_gpt(artifact: Path, device: torch.device | str = "cpu") -> GPT:
    """The entropy model of a finished `entropy_model` artifact, in evaluation mode.

    Raises:
        ArtifactError: The artifact holds another kind of model, or is damaged.
    """
    _, config = saved_config(artifact, [GPT_FAMILY])
    return load_weights(GPT(GPTConfig(**config)), artifact / MODEL_FILE).to(device).eval()


def save_head(artifact: Path, head: EntropyHead) -> None:
    """Write an entropy head's weights (float32) and config."""
    _save(artifact / HEAD_FILE, head)
    write_json(artifact / HEAD_CONFIG_FILE, asdict(head.config))


def load_head(artifact: Path, device: torch.device | str = "cpu") -> EntropyHead:
    """The entropy head of a finished artifact, in evaluation mode.

    Raises:
        ArtifactError: The weights are damaged, or do not match the config.
    """
    head = EntropyHead(EntropyHeadConfig(**read_json(artifact / HEAD_CONFIG_FILE)))
    return load_weights(head, artifact / HEAD_FILE).to(device).eval()


class HasShape(Protocol):
    """A tensor, or what stands for one that is still to be read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its dimensions."""


def state_dict_mismatch(found: Mapping[str, HasShape], wanted: Mapping[str, Tensor]) -> str | None:
    """First mismatch between the names and shapes of two state dicts, and the number of further ones; None if equal."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not part of it" for name in found if name not in wanted]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return problems[0] + more if problems else None


def load_weights(model: Module, path: Path) -> Module:
    """Load the weights in a safetensors file of an artifact into `model`, and return it.

    Raises:
        ArtifactError: The file is damaged, or its state dict does not match the model.
    """
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    if problem := state_dict_mismatch(state, model.state_dict()):
        raise ArtifactError(f"{path} does not fit the model that {CONFIG_FILE} beside it describes: {problem}")
    model.load_state_dict(state)
    return model


def _damaged(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{path} is damaged: {' '.join(str(error).split())[:200]}")


def _save(path: Path, model: nn.Module, metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, partial, metadata)
    partial.replace(path)
