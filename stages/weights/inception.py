"""The FID Inception (2015-12-05) from a weights file, through torch-fidelity."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.weights.state_dict import open_state_dict, read_state
from stages.weights.weights_file import Entry


def read_inception(weights: Path) -> nn.Module:
    """The network with the checked weights of the file: torch-fidelity would execute code in it.

    Raises:
        InputError: The file does not exist, is of another kind, or holds no state dict of this network.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    missing = f"evaluate.weights is {weights}, and there is no such file"
    with open_state_dict(weights, None, "model", missing) as state:

        class Network(FeatureExtractorInceptionV3):  # type: ignore[misc]
            def load_state_dict(self, *_: Any, **__: Any) -> None:
                """Take the checked weights. Files of old versions of torch lack the counts of batches."""
                for name, tensor in self.state_dict().items():
                    if name.endswith("num_batches_tracked"):
                        state.tensors.setdefault(name, Entry.of(tensor))
                super().load_state_dict(read_state(self, state, "does not fit the FID Inception: {}"))

        no_weights = BytesIO()
        torch.save({}, no_weights)
        no_weights.seek(0)
        network: nn.Module = Network("inception-v3-compat", ["2048", "logits_unbiased"], no_weights)
    return network
