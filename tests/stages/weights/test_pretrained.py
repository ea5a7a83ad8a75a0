"""Weights made elsewhere: what loads, and what is refused with a line that says why."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.config import DPARConfig, GPTConfig, VQConfig
from models.dpar import DPAR
from models.gpt import GPT
from models.vq import VQModel
from stages.runtime.artifact import file_sha256, read_json
from stages.runtime.errors import InputError
from stages.weights.pretrained import read_dpar_checkpoint, read_gpt_checkpoint, read_vq_checkpoint, write_source

TINY = VQConfig(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, z_channels=32, codebook_size=64)
DPAR_TINY = DPARConfig(dim=32, num_heads=2, encoder_layers=1, global_layers=2, decoder_layers=1,
                       codebook_size=64, num_tokens=16, num_classes=5)  # fmt: skip
GPT_TINY = GPTConfig(dim=32, num_layers=2, num_heads=2, codebook_size=64, num_tokens=16, num_classes=5)


@pytest.fixture
def gpt_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = GPT(GPT_TINY).state_dict()
    return {name: torch.randn_like(tensor) for name, tensor in state.items()}


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(VQModel(TINY).state_dict())


def test_a_llamagen_file_with_its_command_line_loads(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    del state["quantize.codebook_used"]  # older files lack it
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4), "steps": 7}, tmp_path / "vq.pt")
    loaded = read_vq_checkpoint(tmp_path / "vq.pt", TINY).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_half_precision_safetensors_load_as_float32(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.half() for name, tensor in state.items()}, tmp_path / "vq.safetensors")
    loaded = read_vq_checkpoint(tmp_path / "vq.safetensors", TINY).state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in loaded.values())
    assert torch.equal(loaded["quant_conv.weight"], state["quant_conv.weight"].half().float())


def test_another_size_names_the_first_tensor_and_the_setting(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, tmp_path / "vq.safetensors")
    bigger = VQConfig(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, z_channels=32, codebook_size=128)
    with pytest.raises(InputError, match=r"quantize.embedding.weight has shape \(64, 8\).*set tokenizer.model"):
        read_vq_checkpoint(tmp_path / "vq.safetensors", bigger)


def test_a_missing_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    for missing in (None, tmp_path / "no.pt"):
        with pytest.raises(InputError, match=r"tokenizer.checkpoint is .*, expected a file: give LlamaGen's"):
            read_vq_checkpoint(missing, TINY)


@pytest.mark.parametrize("container", ["model", "module", "state_dict", None])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_released_transformers_load_as_float32_from_any_container(
    tmp_path: Path, gpt_state: dict[str, torch.Tensor], container: str | None, kind: torch.dtype
) -> None:
    stored = {name: tensor.to(kind) for name, tensor in gpt_state.items()}
    extras = {"args": argparse.Namespace(gpt_model="GPT-B"), "steps": 7}
    old = stored | {"freqs_cis": torch.zeros(17, 8, 2)}
    torch.save(old if container is None else {container: old} | extras, tmp_path / "gpt.pt")
    model = read_gpt_checkpoint(tmp_path / "gpt.pt", GPT_TINY)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == dict.fromkeys(stored, torch.float32)
    assert all(torch.equal(model.state_dict()[name], tensor.float()) for name, tensor in stored.items())
    tokens, labels = torch.randint(64, (2, 16)), torch.tensor([0, 4])
    expected = GPT(GPT_TINY).eval()
    expected.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    assert torch.equal(model.eval()(tokens, labels), expected(tokens, labels))
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


def test_a_transformer_serves_every_image_size(tmp_path: Path, gpt_state: dict[str, torch.Tensor]) -> None:
    save_file(gpt_state, tmp_path / "gpt.safetensors")
    larger = read_gpt_checkpoint(tmp_path / "gpt.safetensors", replace(GPT_TINY, num_tokens=36))
    assert larger(torch.randint(64, (1, 36)), torch.tensor([0])).shape == (1, 36, 64)


def test_the_released_b_under_settings_of_l_says_which_size_to_set(tmp_path: Path) -> None:
    shapes = {"codebook_size": 16384, "num_tokens": 256, "num_classes": 1000}
    config = GPTConfig(dim=1024, num_layers=24, num_heads=16, **shapes)
    names = [name for i in range(12) for name in (f"layers.{i}.attention.wo.weight", f"layers.{i}.ffn_norm.weight")]
    state = {name: torch.zeros(1) for name in names}
    state["tok_embeddings.weight"] = torch.zeros(1, 1).expand(16384, 768)
    state["cls_embedding.embedding_table.weight"] = torch.zeros(1, 1).expand(1001, 768)
    torch.save({"model": state}, tmp_path / "c2i_B_256.pt")
    words = r"c2i_B_256.pt .*768 wide with 12 layers, expected 1024 wide with 24 layers: set train.model to B$"
    with pytest.raises(InputError, match=words):
        read_gpt_checkpoint(tmp_path / "c2i_B_256.pt", config)


def test_other_models_are_refused_by_what_they_are(
    tmp_path: Path, state: dict[str, torch.Tensor], gpt_state: dict[str, torch.Tensor]
) -> None:
    dpar = DPARConfig(dim=32, num_heads=2, encoder_layers=1, global_layers=1, decoder_layers=1,
                      codebook_size=64, num_tokens=16, num_classes=5)  # fmt: skip
    without_norm = {name: tensor for name, tensor in gpt_state.items() if name != "norm.weight"}
    classless = {name: tensor for name, tensor in gpt_state.items() if not name.startswith("cls_")}
    cases: list[tuple[dict[str, torch.Tensor], GPTConfig, str]] = [
        (dict(DPAR(dpar).state_dict()), GPT_TINY, "holds a DPAR model, expected LlamaGen's transformer"),
        (state, GPT_TINY, "holds a VQ tokenizer, expected LlamaGen's transformer"),
        (classless, GPT_TINY, "no class embedding, expected the class-conditional"),
        (gpt_state, replace(GPT_TINY, codebook_size=128), "has 64 codes, expected the tokens' 128"),
        (gpt_state, replace(GPT_TINY, num_classes=9), "has 5 classes, expected the tokens' 9"),
        (
            gpt_state,
            replace(GPT_TINY, num_layers=3),
            "2 layers, expected 32 wide with 3 layers: set train.model to that size",
        ),
        (without_norm, GPT_TINY, "norm.weight is missing"),
        (gpt_state | {"extra": torch.zeros(1)}, GPT_TINY, "extra is not part of it"),
        (gpt_state | {"norm.weight": torch.zeros(8)}, GPT_TINY, r"norm.weight has shape \(8,\), expected \(32,\)"),
        (gpt_state | {"norm.weight": torch.full((32,), float("nan"))}, GPT_TINY, "has 32 values in norm.weight"),
        ({}, GPT_TINY, "holds no weights"),
    ]
    for number, (tensors, config, words) in enumerate(cases):
        path = tmp_path / f"{number}.pt"
        torch.save({"model": tensors}, path)
        with pytest.raises(InputError, match=words) as caught:
            read_gpt_checkpoint(path, config)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_missing_transformer_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train.checkpoint is .*no.pt, expected a file: .*c2i_B_256.pt"):
        read_gpt_checkpoint(tmp_path / "no.pt", GPT_TINY)


def random_dpar() -> DPAR:
    torch.manual_seed(0)
    model = DPAR(DPAR_TINY)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    return model


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_weights_of_dpar_import_bit_for_bit(tmp_path: Path, prefix: str) -> None:
    """The authors save with accelerate: safetensors of the bare names, or of a wrapped model."""
    wanted = random_dpar().state_dict()
    save_file({prefix + name: tensor for name, tensor in wanted.items()}, tmp_path / "model.safetensors")
    found = read_dpar_checkpoint(tmp_path / "model.safetensors", DPAR_TINY)
    assert found.config == DPAR_TINY
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.state_dict().items())
    assert found.state_dict().keys() == wanted.keys()


def test_what_is_no_dpar_of_this_size_is_told(tmp_path: Path, gpt_state: dict[str, torch.Tensor]) -> None:
    state, path = dict(random_dpar().state_dict()), tmp_path / "model.safetensors"
    deeper = replace(DPAR_TINY, global_layers=3)
    for tensors, config, words in (
        (gpt_state, DPAR_TINY, "it holds LlamaGen's transformer, expected a DPAR model"),
        (state, deeper, r"32 wide with 1 \+ 2 \+ 1 layers, expected 32 wide with 1 \+ 3 \+ 1 layers: set train.model"),
        (state, replace(DPAR_TINY, codebook_size=128), "it has 64 codes, expected the tokens' 128"),
        (state, replace(DPAR_TINY, num_classes=9), "it has 5 classes, expected the tokens' 9"),
    ):
        save_file(tensors, path)
        with pytest.raises(InputError, match=words):
            read_dpar_checkpoint(path, config)
    with pytest.raises(InputError, match=r"train.checkpoint is .*no.pt, expected a file: give weights of DPAR"):
        read_dpar_checkpoint(tmp_path / "no.pt", DPAR_TINY)


def test_the_published_size_of_a_dpar_is_named(tmp_path: Path) -> None:
    config = DPARConfig(dim=1024, num_heads=16, encoder_layers=1, global_layers=19, decoder_layers=4,
                        codebook_size=16384, num_tokens=256, num_classes=1000)  # fmt: skip
    stacks = {"local_encoder.layers": 1, "layers": 8, "local_decoder.layers": 3}
    state = {f"{stack}.{n}.norm.weight": torch.zeros(1) for stack, count in stacks.items() for n in range(count)}
    state["tok_embeddings.weight"] = torch.zeros(1, 1).expand(16384, 768)
    state["cls_embedding.embedding_table.weight"] = torch.zeros(1, 1).expand(1001, 768)
    torch.save(state, tmp_path / "dpar.pt")
    with pytest.raises(InputError, match=r"768 wide with 1 \+ 8 \+ 3 layers, expected 1024 .*: set train.model to B$"):
        read_dpar_checkpoint(tmp_path / "dpar.pt", config)


def test_the_moving_average_of_llamagen_is_taken_if_the_settings_say_so(
    tmp_path: Path, gpt_state: dict[str, torch.Tensor]
) -> None:
    average = {name: tensor + 1 for name, tensor in gpt_state.items()}
    torch.save({"model": gpt_state, "ema": average, "args": argparse.Namespace(ema=True)}, tmp_path / "gpt.pt")
    for weights, wanted in (("model", gpt_state), ("ema", average)):
        found = read_gpt_checkpoint(tmp_path / "gpt.pt", GPT_TINY, weights=weights).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_table_without_a_null_class_imports_for_sampling_without_guidance(
    tmp_path: Path, gpt_state: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    table = "cls_embedding.embedding_table.weight"
    rows = gpt_state[table][:5]
    torch.save({"ema": gpt_state | {table: rows}}, tmp_path / "gpt.pt")
    with caplog.at_level(logging.WARNING):
        model = read_gpt_checkpoint(tmp_path / "gpt.pt", GPT_TINY, weights="ema")
    assert "for each of 5 classes and none for guidance: it was trained without class dropout" in caplog.text
    assert model.config == replace(GPT_TINY, class_dropout_prob=0.0)
    assert torch.equal(model.cls_embedding.embedding_table.weight[:5], rows)
    guided = GPT(GPT_TINY)
    guided.load_state_dict(gpt_state)
    tokens, labels = torch.randint(64, (2, 16)), torch.tensor([0, 4])
    assert torch.equal(model.eval()(tokens, labels), guided.eval()(tokens, labels))
    state = dict(random_dpar().state_dict())
    torch.save(state | {table: state[table][:5].clone()}, tmp_path / "dpar.pt")
    assert read_dpar_checkpoint(tmp_path / "dpar.pt", DPAR_TINY).config.class_dropout_prob == 0


def test_the_record_says_what_was_imported_and_how(
    tmp_path: Path, gpt_state: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "gpt.pt"
    torch.save({"model": {}, "ema": {f"module.{name}": tensor for name, tensor in gpt_state.items()}}, path)
    with caplog.at_level(logging.INFO):
        write_source(tmp_path / "out", path, "ema")
    assert read_json(tmp_path / "out/record/source.json") == {
        "sha256": file_sha256(path),
        "bytes": path.stat().st_size,
        "format": "torch zip",
        "weights": "ema",
        "place": "ema",
        "stripped_prefix": "module.",
    }
    words = "moving average of weights (ema) under ema (torch zip), prefix module. removed from all names"
    assert caplog.text.rstrip().endswith(words)


def test_a_safetensors_file_under_another_name_still_knows_its_tokenizer(
    tmp_path: Path, gpt_state: dict[str, torch.Tensor]
) -> None:
    save_file(gpt_state, tmp_path / "weights.pt", {"tokenizer_sha256": "f" * 64})
    with pytest.raises(InputError, match=r"trained on tokens of the tokenizer with sha256 f{64}, expected e{64}"):
        read_gpt_checkpoint(tmp_path / "weights.pt", GPT_TINY, tokenizer="e" * 64)
    assert read_gpt_checkpoint(tmp_path / "weights.pt", GPT_TINY, tokenizer="f" * 64).config == GPT_TINY


def test_other_models_are_no_tokenizer(tmp_path: Path, gpt_state: dict[str, torch.Tensor]) -> None:
    save_file(gpt_state, tmp_path / "gpt.safetensors")
    with pytest.raises(InputError, match=r"tokenizer.model: it holds LlamaGen's transformer, expected a VQ tokenizer"):
        read_vq_checkpoint(tmp_path / "gpt.safetensors", TINY)
