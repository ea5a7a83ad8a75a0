"""Whether networks and tokens belong together: with another tokenizer or codebook, the same codes mean other images."""

from __future__ import annotations

from pathlib import Path

from models.config import EntropyHeadConfig
from stages.runtime.artifact import file_sha256
from stages.runtime.errors import ArtifactError
from stages.stores.tokens import TokenStore
from stages.weights.own import MODEL_FILE, VQ_FILE, ModelConfig, tokenizer_sha256


def require_fit(name: str, config: ModelConfig | EntropyHeadConfig, artifact: Path, store: TokenStore) -> None:
    """Check that a network was trained on the tokens of this store.

    Raises:
        ArtifactError: The number of tokens, the codebook, the classes or the tokenizer differ.
    """
    wanted: dict[str, object] = {"num_tokens": store.num_tokens, "codebook_size": store.codebook_size}
    if getattr(config, "num_classes", None) is not None:
        wanted["num_classes"] = store.num_classes
    found = {field: getattr(config, field) for field in wanted}
    trained_on = tokenizer_sha256(artifact / MODEL_FILE)
    if trained_on is not None:
        found["tokenizer"], wanted["tokenizer"] = trained_on, store.facts.vq_sha256
    for field, value in wanted.items():
        if found[field] != value:
            raise ArtifactError(
                f"the {name} in {artifact} has {field} {found[field]}, expected {value} as in {store.location}: use "
                "one that was trained on these tokens"
            )


def require_tokenizer(artifact: Path, store: TokenStore) -> None:
    """Check that the tokens of a store were made by this tokenizer.

    Raises:
        ArtifactError: They were made by another one.
    """
    found = file_sha256(artifact / VQ_FILE)
    if found != store.facts.vq_sha256:
        raise ArtifactError(
            f"the tokenizer in {artifact} has sha256 {found}, expected {store.facts.vq_sha256} as in {store.location}: "
            "use the tokenizer that made these tokens"
        )
