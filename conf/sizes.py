"""Names of model sizes in the settings. Keys hold the numbers, so that a new name changes no key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import GetCoreSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema

from models.config import DPAR_SIZES, GPT_SIZES, DPARSize


class FromFields:
    """Annotation of a field that holds a dataclass of `models.config`: its fields are as strict as a section's."""

    @classmethod
    def __get_pydantic_core_schema__(cls, kind: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Build the dataclass from a mapping first."""
        return core_schema.no_info_before_validator_function(lambda value: _built(kind, value), handler(kind))


def _built(kind: Any, value: Any) -> Any:
    """A dataclass from its fields, as JSON has them: lists for tuples. Anything but a mapping is left as it is."""
    return _adapter(kind).validate_json(json.dumps(value), strict=True) if isinstance(value, dict) else value


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def gpt_size_name(dim: int, num_layers: int) -> str | None:
    """What the settings call a transformer of this width and depth, None where they have no name for it."""
    names = (name for name, size in GPT_SIZES.items() if (size.dim, size.num_layers) == (dim, num_layers))
    return next(names, None)


def dpar_size_name(dim: int, encoder_layers: int, global_layers: int, decoder_layers: int) -> str | None:
    """The same for a DPAR model."""
    wanted = (dim, encoder_layers, global_layers, decoder_layers)
    sizes = DPAR_SIZES.items()
    names = (n for n, s in sizes if (s.dim, s.encoder_layers, s.global_layers, s.decoder_layers) == wanted)
    return next(names, None)


def named_size(size: Any, sizes: Mapping[str, Any]) -> Any:
    """The size that a name stands for; what is no name as it is.

    Raises:
        ValueError: No size has this name.
    """
    if not isinstance(size, str):
        return size
    if size not in sizes:
        raise ValueError(f"model is {size!r}, expected one of {', '.join(sizes)} or the size itself")
    return sizes[size]


def gpt_size(size: Any) -> Any:
    """The same for a GPT, where a DPAR size stands for the GPT of its width and of as many layers in all."""
    if isinstance(size, dict) and "global_layers" in size:
        size = _built(DPARSize, size)
    return size.as_gpt() if isinstance(size, DPARSize) else named_size(size, GPT_SIZES)
