"""Finished models made ready to draw, once it is known that they fit the tokens."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from conf.schema import Precision
from models.config import DPARConfig, GPTConfig
from models.packed_linear import pack_linear_layers
from stages.errors import ArtifactError
from stages.stores.tokens import TokenStore


def ready_to_draw(model: nn.Module, precision: Precision) -> None:
    """Bring weights into the type and order that make steps fast. Logits are float32 whatever the type."""
    if precision == "bfloat16":
        model.bfloat16()
    pack_linear_layers(model)


def require_fit(name: str, config: GPTConfig | DPARConfig, artifact: Path, store: TokenStore) -> None:
    """Refuse a model of other tokens: it would draw, or judge, codes that mean something else."""
    wanted = {"num_tokens": store.num_tokens, "codebook_size": store.codebook_size}
    if config.num_classes is not None:
        wanted["num_classes"] = store.num_classes
    for field, value in wanted.items():
        if getattr(config, field) != value:
            raise ArtifactError(
                f"the {name} in {artifact} has {field} {getattr(config, field)}, expected {value} as {store.location}: "
                "use one that was trained on these tokens"
            )
