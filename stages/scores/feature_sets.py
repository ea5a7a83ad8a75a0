"""The artifact of stage `evaluate`: features of each image set, and the network that computed them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from stages.runtime.arrays import Features
from stages.runtime.artifact import read_arrays, read_json, write_atomic, write_json
from stages.runtime.errors import ArtifactError
from stages.scores.statistics import FeatureStats
from stages.scores.table import ExtractorName

_FEATURES, _EXTRACTOR = "features.npz", "extractor.json"


@dataclass(frozen=True, kw_only=True)
class ExtractorInfo:
    """A feature network."""

    name: ExtractorName
    weights_sha256: str
    fid_inception: bool
    """Whether the weights are those of the Inception network that defines FID."""
    input_size: int
    """Side to which images are resized, pixels."""


@dataclass(frozen=True, kw_only=True)
class FeatureSets:
    """Features of image sets.

    Attributes:
        extractor: The network.
        features: Features of each set but the reference: `samples`, and the rungs of the ladder if there are any.
            Sets differ in their number of images.
        samples_logits: Class logits of the samples.
        reference: Statistics of the training images.
        compared: Features of the training images that precision and recall use.
    """

    extractor: ExtractorInfo
    features: dict[str, Float32[NDArray[np.float32], "_ D"]]
    samples_logits: Float32[NDArray[np.float32], "N classes"]
    reference: FeatureStats
    compared: Features

    def write(self, artifact: Path) -> None:
        """Write both files."""
        arrays: dict[str, NDArray[Any]] = {
            **self.features,
            "samples_logits": self.samples_logits,
            "reference_count": np.array(self.reference.n),
            "reference_mean": self.reference.mean,
            "reference_covariance": self.reference.covariance,
            "reference_compared": self.compared,
        }
        write_json(artifact / _EXTRACTOR, asdict(self.extractor))
        write_atomic(artifact / _FEATURES, lambda file: np.savez(file, allow_pickle=False, **arrays))

    @classmethod
    def open(cls, artifact: Path) -> FeatureSets:
        """Read a finished artifact of stage `evaluate`.

        Raises:
            ArtifactError: The artifact is missing or damaged.
        """
        try:
            arrays, extractor = read_arrays(artifact / _FEATURES), read_json(artifact / _EXTRACTOR)
            if arrays is None:
                raise ValueError(f"no whole {_FEATURES}")
            count, mean = int(arrays.pop("reference_count")), arrays.pop("reference_mean")
            return cls(
                extractor=ExtractorInfo(**extractor),
                samples_logits=arrays.pop("samples_logits"),
                reference=FeatureStats(count, mean, arrays.pop("reference_covariance") * (count - 1)),
                compared=arrays.pop("reference_compared"),
                features=arrays,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{artifact} holds no features ({error}): run stage evaluate again") from error
