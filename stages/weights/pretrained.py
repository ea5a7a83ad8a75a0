"""Pretrained weights from other projects: LlamaGen's VQ tokenizers and transformers, and DPAR models."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from conf.sizes import dpar_size_name, gpt_size_name
from conf.weights import WeightsChoice
from models.config import DPARConfig, GPTConfig, VQConfig
from models.dpar import DPAR
from models.gpt import GPT
from models.vq import VQModel
from stages.runtime.artifact import RECORD, file_sha256, write_json
from stages.runtime.errors import InputError
from stages.weights.own import TOKENIZER_SHA256
from stages.weights.state_dict import StateDict, load_state, open_state_dict
from stages.weights.weights_file import Entry

logger = logging.getLogger(__name__)
Config = TypeVar("Config", GPTConfig, DPARConfig)
_CLASSES = "cls_embedding.embedding_table.weight"
_VQ, _DPAR, _GPT = "a VQ tokenizer", "a DPAR model", "LlamaGen's transformer"
_MARKS = (("local_encoder.", _DPAR), ("quantize.", _VQ), ("tok_embeddings.", _GPT))  # how names of models begin


def read_vq_checkpoint(path: Path | None, config: VQConfig, weights: WeightsChoice = "model") -> VQModel:
    """Import tokenizer weights: safetensors of any float type, or a LlamaGen `.pt` (weights under `model`).

    Args:
        path: The weights file.
        config: Config of the model.
        weights: Whether the model's weights or their moving average are taken.

    Raises:
        InputError: The file is missing or unreadable, or its state dict does not match `config`.
    """
    missing = (
        f"tokenizer.checkpoint is {path}, expected a file: give LlamaGen's vq_ds16_c2i.pt or one of your own, "
        "or train one with tokenizer.source=train"
    )
    if path is None:
        raise InputError(missing)
    with open_state_dict(path, "tokenizer.weights", weights, missing) as state:
        if (kind := _kind(state.tensors)) not in (None, _VQ):
            raise InputError(f"{path} does not fit tokenizer.model: it holds {kind}, expected {_VQ}")
        model = VQModel(config)
        state.tensors.setdefault("quantize.codebook_used", Entry.of(model.quantize.codebook_used))
        return load_state(model, state, "does not fit tokenizer.model: {}; set tokenizer.model to its sizes")


def read_gpt_checkpoint(
    path: Path,
    config: GPTConfig,
    *,
    section: str = "train",
    tokenizer: str | None = None,
    weights: WeightsChoice = "model",
) -> GPT:
    """Import the weights of a LlamaGen transformer, of any float type, trained at any image size.

    The number of tokens and the number of heads cannot be read from the weights. Rotary positions are recomputed. The
    table of a model trained without class dropout has no row for guidance: the model's config then says so.

    Args:
        path: A weights file: LlamaGen's, or `model.safetensors` of an artifact.
        config: Config of the model. Without classes, it is an entropy model.
        section: Section of the settings that names the file, for error messages.
        tokenizer: SHA-256 of the tokenizer that made the tokens. Files that name another one are refused.
        weights: Whether the model's weights or their moving average are taken.

    Raises:
        InputError: The file is missing or unreadable, its state dict does not match `config`, or it was trained on the
            tokens of another tokenizer.
    """
    example = "LlamaGen's weights, e.g. c2i_B_256.pt" if config.num_classes else "an artifact's model.safetensors"
    missing = f"{section}.checkpoint is {path}, expected a file: give {example}"
    with open_state_dict(path, f"{section}.weights", weights, missing) as state:
        config = _checked(state, config, section, tokenizer)
        with torch.device("meta"):
            model = GPT(config)
        return load_state(model, state, _misfit(section), assign=True)


def read_dpar_checkpoint(
    path: Path, config: DPARConfig, *, tokenizer: str | None = None, weights: WeightsChoice = "model"
) -> DPAR:
    """The same for a DPAR model: the authors' weights, whose names are ours, or `model.safetensors` of an artifact.

    Raises:
        InputError: See `read_gpt_checkpoint`.
    """
    missing = f"train.checkpoint is {path}, expected a file: give weights of DPAR, e.g. an artifact's model.safetensors"
    with open_state_dict(path, "train.weights", weights, missing) as state:
        config = _checked(state, config, "train", tokenizer)
        with torch.device("meta"):
            model = DPAR(config)
        return load_state(model, state, _misfit("train"), assign=True)


def write_source(output: Path, checkpoint: Path, weights: WeightsChoice) -> None:
    """Write `record/source.json` with the SHA-256 and the size of the file that an artifact's weights came from.

    It also names the file's format, which weights were taken and where they were in it, and the prefix that was removed
    from all names.
    """
    with open_state_dict(checkpoint, None, weights, f"{checkpoint} is gone") as state:
        origin = state.origin
    digest = file_sha256(checkpoint)
    logger.info("imported %s, sha256 %s: %s", checkpoint, digest, _sentence(origin))
    write_json(output / RECORD / "source.json", {"sha256": digest, "bytes": checkpoint.stat().st_size, **origin})


def _sentence(origin: dict[str, str]) -> str:
    place = f" under {origin['place']}" if origin["place"] else ""
    stripped = f", prefix {origin['stripped_prefix']} removed from all names" if origin["stripped_prefix"] else ""
    what = "weights of the model" if origin["weights"] == "model" else "moving average of weights (ema)"
    return f"{what}{place} ({origin['format']}){stripped}"


def _misfit(section: str) -> str:
    return f"does not fit {section}.model and these tokens: {{}}"


def _checked(state: StateDict, config: Config, section: str, tokenizer: str | None) -> Config:
    """The config that the weights have, after checks that name a difference better than the first tensor would.

    Raises:
        InputError: The weights belong to another tokenizer, or to another model.
    """
    path, trained_on = state.file.path, state.file.metadata.get(TOKENIZER_SHA256)
    if tokenizer is not None and trained_on not in (None, tokenizer):
        raise InputError(
            f"{path} was trained on tokens of the tokenizer with sha256 {trained_on}, expected {tokenizer}, which made "
            "these tokens: their codes mean different images"
        )
    if problem := _other_model(state.tensors, config, section):
        raise InputError(f"{path} {_misfit(section).format(problem)}")
    classes = state.tensors.get(_CLASSES)
    if classes is None or config.num_classes is None or classes.shape != (config.num_classes, config.dim):
        return config
    logger.warning(
        "%s has an embedding for each of %d classes and none for guidance: it was trained without class dropout, set "
        "sample.cfg_scale=1",
        path,
        config.num_classes,
    )
    state.tensors[_CLASSES] = _with_null_row(classes)
    return replace(config, class_dropout_prob=0.0)


def _with_null_row(classes: Entry) -> Entry:
    """The table with a row of zeros for the null class, which nothing reads: see `Sampler.load`."""
    rows, dim = classes.shape
    return replace(
        classes,
        shape=(rows + 1, dim),
        read=lambda: torch.cat([table := classes.read(), table.new_zeros(1, dim)]),
    )


def _kind(names: Iterable[str]) -> str | None:
    """The model that weights of these names belong to; None if unknown."""
    names = list(names)
    return next((kind for mark, kind in _MARKS if any(name.startswith(mark) for name in names)), None)


def _other_model(state: Mapping[str, Entry], config: GPTConfig | DPARConfig, section: str) -> str | None:
    """Description of the model in the file, if it explains a mismatch better than the first differing tensor does."""
    wanted = _DPAR if isinstance(config, DPARConfig) else _GPT
    if (kind := _kind(state)) not in (None, wanted):
        return f"it holds {kind}, expected {wanted}"
    tokens, classes = state.get("tok_embeddings.weight"), state.get(_CLASSES)
    if tokens is None or len(tokens.shape) != 2:
        return None
    if classes is None and config.num_classes is not None:
        return "it has no class embedding, expected the class-conditional transformer (c2i)"
    if classes is not None and config.num_classes is None:
        return "it has a class embedding, expected an entropy model, which has none"
    codes, dim = tokens.shape
    if problem := _other_size(state, dim, config):
        return f"{problem}: set {section}.model to {_size_name(state, dim) or 'that size'}"
    if codes != config.codebook_size:
        return f"it has {codes} codes, expected the tokens' {config.codebook_size}"
    if classes is not None and config.num_classes is not None and len(classes.shape) == 2:
        rows, wanted_classes = classes.shape[0], config.num_classes
        if rows not in (wanted_classes, wanted_classes + 1):
            return f"it has {rows - 1} classes, expected the tokens' {wanted_classes}"
    return None


def _other_size(state: Mapping[str, Entry], dim: int, config: GPTConfig | DPARConfig) -> str | None:
    found = _layers(state)
    if isinstance(config, GPTConfig):
        wanted: tuple[int, ...] = (config.num_layers,)
    else:
        wanted = (config.encoder_layers, config.global_layers, config.decoder_layers)
    if (dim, found) == (config.dim, wanted):
        return None
    has, expects = (" + ".join(map(str, layers)) for layers in (found, wanted))
    return f"it is {dim} wide with {has} layers, expected {config.dim} wide with {expects} layers"


def _layers(state: Iterable[str]) -> tuple[int, ...]:
    """Layers of each stack: one of LlamaGen, three of DPAR (encoder, global, decoder)."""
    names = list(state)
    stacks = ["local_encoder.layers.", "layers.", "local_decoder.layers."] if _kind(names) == _DPAR else ["layers."]
    return tuple(
        len({name.removeprefix(stack).partition(".")[0] for name in names if name.startswith(stack)})
        for stack in stacks
    )


def _size_name(state: Mapping[str, Entry], dim: int) -> str | None:
    layers = _layers(state)
    return gpt_size_name(dim, *layers) if len(layers) == 1 else dpar_size_name(dim, *layers)
