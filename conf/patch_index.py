"""Settings of stage `patch_index`."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from conf.section import Section


class PatchIndexConfig(Section):
    """Where patches start (paper, Algorithm 1)."""

    mode: Literal["entropy", "static"] = Field(
        "entropy", description="What starts patches: the entropy of the next token, or a fixed length."
    )
    threshold: float | None = Field(None, description="Entropy above which a token opens a patch, nats.")
    target_mean_length: float | None = Field(
        None, ge=1.0, description="Mean patch length, tokens, to find the threshold for; instead of a threshold."
    )
    static_length: float | None = Field(
        None, ge=1.0, description="Mean length of static patches, tokens; may be fractional."
    )
    max_length: PositiveInt | None = Field(4, description="Longest patch, tokens; null for no limit.")
    row_boundary: bool = Field(True, description="Whether each row of the token grid opens a patch.")

    def unread_inputs(self, settings: Any) -> frozenset[str]:
        """Static patches are made from the number of tokens alone, others from the entropies alone."""
        return frozenset({"entropy_map" if self.mode == "static" else "tokenize"})

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        given = {name: getattr(self, name) for name in ("threshold", "target_mean_length", "static_length")}
        wanted = {"entropy": ("threshold", "target_mean_length"), "static": ("static_length",)}[self.mode]
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1 or named[0] not in wanted:
            raise ValueError(
                f"patch_index.mode {self.mode} was given {', '.join(named) or 'nothing'}, "
                f"expected exactly one of {', '.join(wanted)}"
            )
        return self
