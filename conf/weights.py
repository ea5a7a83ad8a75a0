"""Settings of models that are trained here, or whose weights are imported from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from conf.places import Place
from conf.section import NOT_IN_KEY, Section

WeightsChoice = Literal["model", "ema"]


class ImportableModel(Section):
    """A model that is trained, or whose weights are imported from a file."""

    imported_key: ClassVar[tuple[str, ...]] = ("source", "model")
    """Settings in the key of an import: it depends on the weights (by digest) and their shape, not on training."""
    file_wanted: ClassVar[tuple[str, str] | None] = None
    """Name of the section, and the file that it must name to import one; None if the file may be named later."""

    source: Literal["train", "checkpoint"] = Field(
        "train", description="Train the model, or import its weights from a file."
    )
    checkpoint: Place | None = Field(
        None,
        description="Weights to import, safetensors or a .pt of torch.save; not read when training.",
        json_schema_extra=NOT_IN_KEY,
    )
    weights: WeightsChoice = Field(
        "model",
        description="Weights to take from a file that has both: the model's, or their moving average (ema).",
        json_schema_extra=NOT_IN_KEY,
    )

    @model_validator(mode="after")
    def _has_weights_to_import(self) -> Self:
        if self.source == "checkpoint" and self.checkpoint is None and self.file_wanted is not None:
            section, file = self.file_wanted
            raise ValueError(f"{section}.source is checkpoint and {section}.checkpoint None, expected {file}")
        return self

    @property
    def imported(self) -> Path | None:
        """The file that the weights are imported from; None where the model is trained."""
        return self.checkpoint if self.source == "checkpoint" else None

    def key_fields(self) -> dict[str, Any]:
        """An import depends on the shape of the model and on which weights are taken."""
        fields = super().key_fields()
        if self.source == "train":
            return fields
        kept = {name: fields[name] for name in self.imported_key}
        return kept if self.weights == "model" else kept | {"weights": self.weights}
