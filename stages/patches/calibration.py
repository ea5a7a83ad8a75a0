"""Results of stage `entropy_head`: threshold of each boundary source, and the entropies from which it was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from stages.runtime.artifact import read_json, write_atomic, write_json
from stages.runtime.errors import ArtifactError, InputError

THRESHOLDS_FILE = "thresholds.json"
ENTROPIES_FILE, HELDOUT_FILE = "entropies.npz", "heldout.npz"


@dataclass(frozen=True)
class Thresholds:
    """Threshold of each calibrated source, nats. Empty for a model without sources of its own."""

    by_source: Mapping[str, float]

    @classmethod
    def of(cls, inputs: Mapping[str, Path]) -> Thresholds:
        """Read the thresholds of the `entropy_head` artifact among `inputs`.

        Raises:
            ArtifactError: The file is missing or damaged.
        """
        path = inputs["entropy_head"] / THRESHOLDS_FILE
        try:
            return cls({str(source): float(value) for source, value in read_json(path).items()})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} is missing or damaged ({error}): run the entropy_head stage again") from error

    def save(self, artifact: Path) -> None:
        """Write `thresholds.json`."""
        write_json(artifact / THRESHOLDS_FILE, self.by_source)

    def __getitem__(self, source: str) -> float:
        """Threshold of a source.

        Raises:
            InputError: The source was not calibrated.
        """
        if source not in self.by_source:
            raise InputError(
                f"sample.boundaries is {source}, expected {' or '.join(self.by_source) or 'another source'}: stage "
                "entropy_head calibrated nothing else, see entropy_head.kind"
            )
        return self.by_source[source]


@dataclass(frozen=True)
class SourceEntropies:
    """Entropies of some views by each source, nats. The number of views may differ between sources."""

    by_source: Mapping[str, Float32[NDArray[np.float32], "_ T"]]

    @classmethod
    def of(cls, inputs: Mapping[str, Path], file: str = ENTROPIES_FILE) -> SourceEntropies:
        """Read one of the two files of the `entropy_head` artifact among `inputs`.

        Raises:
            ArtifactError: The file is missing or damaged.
        """
        path = inputs["entropy_head"] / file
        try:
            # NumPy leaves a file open that it opened itself and that turns out to be damaged.
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as saved:
                return cls(dict(saved))
        except Exception as error:  # on damaged bytes zipfile and NumPy raise almost anything
            raise ArtifactError(f"{path} is missing or damaged ({error}): run the entropy_head stage again") from error

    def save(self, artifact: Path, file: str = ENTROPIES_FILE) -> None:
        """Write the file into an artifact."""
        write_atomic(artifact / file, lambda stream: np.savez(stream, allow_pickle=False, **self.by_source))
