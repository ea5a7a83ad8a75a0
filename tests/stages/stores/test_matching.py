"""Networks and tokens that do not belong together are named in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from toy_facts import token_facts

from models.config import GPTConfig, VQConfig
from models.gpt import GPT
from models.vq import VQModel
from stages.runtime.artifact import file_sha256
from stages.runtime.errors import ArtifactError
from stages.stores.matching import require_fit, require_tokenizer
from stages.stores.tokens import TokenStore, token_writer
from stages.weights.own import GPT_FAMILY, MODEL_FILE, VQ_FILE, save_model, save_vq, tokenizer_sha256

CONFIG = GPTConfig(dim=32, num_layers=1, num_heads=2, codebook_size=50, num_tokens=16, num_classes=None)


def store(folder: Path, **changes: object) -> TokenStore:
    writer = token_writer(folder / TokenStore.FILE, token_facts(num_images=4, num_train=4, **changes))
    writer.write(0, tokens=np.zeros((4, 2, 16), np.uint16), labels=np.zeros(4, np.uint16))
    writer.finish()
    return TokenStore.open(folder / TokenStore.FILE)


def test_a_tokenizer_is_known_by_its_weights(tmp_path: Path) -> None:
    model = VQModel(VQConfig(channels=32, channel_multipliers=(1,), num_res_blocks=1, z_channels=32, codebook_size=50))
    save_vq(tmp_path, model)
    digest = file_sha256(tmp_path / VQ_FILE)
    require_tokenizer(tmp_path, store(tmp_path / "own", vq_sha256=digest))
    with pytest.raises(ArtifactError, match=f"has sha256 {digest}, expected {'0' * 64} as in .*: use the tokenizer"):
        require_tokenizer(tmp_path, store(tmp_path / "others"))


def test_weights_remember_the_tokenizer_of_their_tokens(tmp_path: Path) -> None:
    tokens = store(tmp_path)
    for name, tokenizer in (("unknown", None), ("own", "0" * 64), ("others", "1" * 64)):
        save_model(tmp_path / name, GPT_FAMILY, GPT(CONFIG), CONFIG, tokenizer)
        assert tokenizer_sha256(tmp_path / name / MODEL_FILE) == tokenizer
    require_fit("entropy model", CONFIG, tmp_path / "unknown", tokens)
    require_fit("entropy model", CONFIG, tmp_path / "own", tokens)
    with pytest.raises(
        ArtifactError, match=r"the entropy model in .* has tokenizer 1{64}, expected 0{64} as in"
    ) as error:
        require_fit("entropy model", CONFIG, tmp_path / "others", tokens)
    assert "\n" not in str(error.value)
    (tmp_path / "own" / MODEL_FILE).write_bytes(b"torn")
    with pytest.raises(ArtifactError, match="is damaged"):
        require_fit("entropy model", CONFIG, tmp_path / "own", tokens)
