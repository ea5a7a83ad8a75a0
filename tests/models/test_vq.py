"""The VQ tokenizer: LlamaGen's names and counts, normalised lookup, straight-through gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.config import VQConfig
from models.vq import VQModel

TINY = VQConfig(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, z_channels=32, codebook_size=64)


def meta(config: VQConfig) -> VQModel:
    with torch.device("meta"):
        return VQModel(config)


def test_vq16_has_llamagens_entries_and_parameters() -> None:
    model = meta(VQConfig())
    state = model.state_dict()
    assert len(state) == 344
    assert sum(p.numel() for p in model.parameters()) == 71_883_403
    assert sum(p.numel() for p in model.encoder.parameters()) == 29_298_176
    assert sum(p.numel() for p in model.decoder.parameters()) == 42_449_795
    assert state["decoder.conv_blocks.0.attn.2.proj_out.weight"].shape == (512, 512, 1, 1)
    assert state["encoder.conv_blocks.3.downsample.conv.weight"].shape == (256, 256, 3, 3)
    assert state["decoder.conv_blocks.3.res.0.nin_shortcut.weight"].shape == (128, 256, 1, 1)
    assert state["quantize.embedding.weight"].shape == (16384, 8)
    assert state["quantize.codebook_used"].shape == (65536,)


def test_shapes_follow_the_downsampling() -> None:
    model = VQModel(TINY)
    tokens = model.encode(torch.rand(2, 3, 16, 16))
    assert tokens.shape == (2, 64)
    assert tokens.dtype == torch.int64
    assert model.decode(tokens).shape == (2, 3, 16, 16)


def test_tokens_are_nearest_normalised_codes() -> None:
    torch.manual_seed(0)
    quantize = VQModel(TINY).quantize
    latents = torch.randn(2, 8, 3, 3)
    flat = F.normalize(latents.permute(0, 2, 3, 1).reshape(-1, 8), dim=-1)
    expected = torch.cdist(flat, F.normalize(quantize.embedding.weight, dim=-1)).argmin(dim=1)
    assert torch.equal(quantize.lookup(latents).flatten(), expected)
    assert torch.equal(quantize(latents).tokens.flatten(), expected)


def test_gradient_passes_straight_through_and_losses_pull_their_own_side() -> None:
    torch.manual_seed(0)
    quantize = VQModel(TINY).quantize
    latents = torch.randn(1, 8, 2, 2, requires_grad=True)
    weights = torch.randn(1, 8, 2, 2)
    (through,) = torch.autograd.grad((quantize(latents).latents * weights).sum(), latents)
    (direct,) = torch.autograd.grad((F.normalize(latents, dim=1) * weights).sum(), latents)
    torch.testing.assert_close(through, direct)
    quantize(latents).commitment_loss.backward()
    assert latents.grad is not None
    assert quantize.embedding.weight.grad is None
    quantize(latents.detach()).codebook_loss.backward()
    assert quantize.embedding.weight.grad is not None


def test_training_forward_decodes_the_tokens_it_reports() -> None:
    torch.manual_seed(0)
    model = VQModel(TINY).eval()
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        reconstruction, quantized = model(pixels)
        torch.testing.assert_close(model.decode(quantized.tokens), reconstruction, atol=1e-5, rtol=1e-4)
        assert torch.equal(model.encode(pixels), quantized.tokens)


def test_bad_sizes_name_both_sides() -> None:
    with pytest.raises(ValueError, match="expected a square number"):
        VQModel(TINY).decode(torch.zeros(1, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="channels is 48, expected a multiple of 32"):
        VQConfig(channels=48)
    with pytest.raises(ValueError, match="codebook_size is 65536"):
        VQConfig(codebook_size=65536)
