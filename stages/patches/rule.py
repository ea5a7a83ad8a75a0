"""The rule of a finished patch index, stored in its artifact as `rule.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from models.patching import PatchRule
from stages.runtime.artifact import read_json, write_json
from stages.runtime.errors import ArtifactError

RULE_FILE = "rule.json"


@dataclass(frozen=True, kw_only=True)
class IndexRule:
    """The rule that opens patches. A static rule has a `static_length` and no other field set."""

    mode: Literal["entropy", "static"]
    threshold: float | None
    """Nats; representable in float32."""
    max_length: int | None
    """Longest patch, tokens; None for no limit."""
    row_boundary: bool
    """A patch opens at the start of each row of the token grid."""
    static_length: float | None
    """Tokens in a static patch."""

    @classmethod
    def by_entropy(cls, rule: PatchRule) -> IndexRule:
        """Rule of patches by entropy."""
        return cls(
            mode="entropy",
            threshold=rule.threshold,
            max_length=rule.max_length,
            row_boundary=rule.row_boundary,
            static_length=None,
        )

    @classmethod
    def static(cls, length: float) -> IndexRule:
        """Rule of patches of one length, in tokens."""
        return cls(mode="static", threshold=None, max_length=None, row_boundary=False, static_length=length)

    def fields(self) -> dict[str, Any]:
        """Fields for JSON. The threshold is also given in hexadecimal, for exact comparison by people."""
        exact = None if self.threshold is None else self.threshold.hex()
        first = {"mode": self.mode, "threshold": self.threshold, "threshold_hex": exact}
        return first | asdict(self)


@dataclass(frozen=True, kw_only=True)
class SavedRule(IndexRule):
    """The rule of a finished patch index, and the mean patch length that it gave."""

    mean_length: float
    """Tokens per patch, averaged over the patches of all views of the training images."""

    @classmethod
    def of(cls, inputs: Mapping[str, Path]) -> SavedRule:
        """Read the rule of the patch index among `inputs`.

        Raises:
            ArtifactError: The file is missing or damaged.
        """
        path = inputs["patch_index"] / RULE_FILE
        try:
            fields = read_json(path)
            fields.pop("threshold_hex")
            return cls(**fields)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} is missing or damaged ({error}): run the patch_index stage again") from error

    @classmethod
    def save(cls, artifact: Path, rule: IndexRule, mean_length: float) -> None:
        """Write the rule of a patch index and its mean patch length."""
        write_json(artifact / RULE_FILE, cls(**asdict(rule), mean_length=mean_length).fields())

    def patch_rule(self, grid: int) -> PatchRule:
        """The rule for images of `grid` x `grid` tokens.

        Raises:
            ValueError: The rule is static and has no threshold.
        """
        if self.threshold is None:
            raise ValueError(f"the patch index has mode {self.mode} and no threshold, expected mode entropy")
        return PatchRule(self.threshold, self.max_length, self.row_boundary, grid)
