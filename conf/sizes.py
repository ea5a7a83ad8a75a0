"""Names of model sizes in the settings."""

from __future__ import annotations

from typing import Any

from models.config import GPT_SIZES


def gpt_size_name(dim: int, num_layers: int) -> str | None:
    """What the settings call a transformer of this width and depth, None where they have no name for it."""
    names = (name for name, size in GPT_SIZES.items() if (size.dim, size.num_layers) == (dim, num_layers))
    return next(names, None)


def expand_size(data: Any, sizes: dict[str, Any]) -> Any:
    """Replace a size's name by the size, so that keys hold numbers and a new name changes no key."""
    if not isinstance(data, dict) or not isinstance(data.get("model"), str):
        return data
    name = data["model"]
    if name not in sizes:
        raise ValueError(f"model is {name!r}, expected one of {', '.join(sizes)} or the size itself")
    return data | {"model": sizes[name]}
