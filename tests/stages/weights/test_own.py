"""Weights of our own artifacts: what was saved comes back, and another model's files are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.config import DPARConfig, GPTConfig
from models.dpar import DPAR
from models.gpt import GPT
from stages.families import load_model
from stages.runtime.artifact import read_json, write_json
from stages.runtime.errors import ArtifactError
from stages.weights.own import CONFIG_FILE, GPT_FAMILY, MODEL_FILE, load_gpt, save_model

SHAPE = {"codebook_size": 40, "num_tokens": 16, "num_classes": 5}
GPT_CONFIG = GPTConfig(dim=32, num_layers=1, num_heads=2, **SHAPE)
DPAR_CONFIG = DPARConfig(dim=32, num_heads=2, encoder_layers=1, global_layers=1, decoder_layers=1, **SHAPE)


def saved(folder: Path, family: str) -> Path:
    model = DPAR(DPAR_CONFIG) if family == "dpar" else GPT(GPT_CONFIG)
    save_model(folder, family, model, model.config)
    return folder


@pytest.mark.parametrize(("family", "kind"), [("dpar", DPAR), ("llamagen", GPT), ("npp", GPT)])
def test_every_family_comes_back_ready_to_use(tmp_path: Path, family: str, kind: type[GPT | DPAR]) -> None:
    model = load_model(saved(tmp_path, family))
    assert isinstance(model, kind)
    assert not model.training
    assert model.config in {GPT_CONFIG, DPAR_CONFIG}


def test_an_artifact_of_another_stage_is_refused_by_its_family(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"of family gpt, expected dpar or llamagen or npp: .*another stage"):
        load_model(saved(tmp_path / "entropy_model", GPT_FAMILY))
    for family in ("dpar", "llamagen", "npp"):
        with pytest.raises(ArtifactError, match=f"of family {family}, expected gpt"):
            load_gpt(saved(tmp_path / family, family))


def test_weights_that_are_not_of_the_config_beside_them_name_the_first_tensor(tmp_path: Path) -> None:
    artifact = saved(tmp_path, "llamagen")
    config = read_json(artifact / CONFIG_FILE)
    for change, words in (
        ({"dim": 64}, r"cls_embedding.embedding_table.weight has shape \(6, 32\), expected \(6, 64\) \(and 10 more\)"),
        ({"num_layers": 2}, r"layers.1.attention.wqkv.weight is missing \(and 6 more\)"),
        ({"num_classes": None}, "cls_embedding.embedding_table.weight is not part of it$"),
    ):
        write_json(artifact / CONFIG_FILE, config | {"config": config["config"] | change})
        with pytest.raises(ArtifactError, match=words) as caught:
            load_model(artifact)
        assert "\n" not in str(caught.value)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    artifact = saved(tmp_path, "dpar")
    save_file({"norm.weight": torch.zeros(32)}, artifact / MODEL_FILE)
    with pytest.raises(ArtifactError, match="is missing"):
        load_model(artifact)
    (artifact / MODEL_FILE).write_bytes(b"torn")
    with pytest.raises(ArtifactError, match=f"{MODEL_FILE} is damaged"):
        load_model(artifact)
