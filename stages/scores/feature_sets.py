"""What stage `evaluate` makes: the features of each image set, and the network that they are of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.runtime.artifact import read_arrays, read_json, write_atomic, write_json
from stages.runtime.errors import ArtifactError
from stages.scores.statistics import FeatureStats
from stages.scores.table import ExtractorName

Features = npt.NDArray[np.float32]
_FEATURES, _EXTRACTOR = "features.npz", "extractor.json"


@dataclass(frozen=True, kw_only=True)
class ExtractorInfo:
    """A network that gives features."""

    name: ExtractorName
    weights_sha256: str
    fid_inception: bool
    """Whether the weights are those of the Inception that FID is defined by."""
    input_size: int
    """Side that images are resized to, pixels."""


@dataclass(frozen=True, kw_only=True)
class FeatureSets:
    """Features of image sets.

    Attributes:
        extractor: The network.
        features: (n, D) of each set but the reference: `samples`, and the rungs of the ladder where there are any.
        samples_logits: (N, classes) of the samples.
        reference: Statistics of the training images.
        compared: Features of the training images that precision and recall compare with.
    """

    extractor: ExtractorInfo
    features: dict[str, Features]
    samples_logits: Features
    reference: FeatureStats
    compared: Features

    def write(self, artifact: Path) -> None:
        """Write both files."""
        arrays: dict[str, npt.NDArray[Any]] = {
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
            ArtifactError: It is missing or damaged.
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
