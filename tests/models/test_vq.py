"""The VQ tokenizer: LlamaGen's names and counts, normalised lookup, straight-through gradients."""

from __future__ import annotations

import copy

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


def parameters(config: VQConfig) -> int:
    """Weights and biases, counted by hand from the architecture."""

    def conv(width_in: int, width: int, side: int) -> int:
        return width_in * width * side * side + width

    def res(width_in: int, width: int) -> int:
        shortcut = conv(width_in, width, 1) if width_in != width else 0
        return 2 * width_in + conv(width_in, width, 3) + 2 * width + conv(width, width, 3) + shortcut

    def attention(width: int) -> int:
        return 2 * width + 4 * conv(width, width, 1)

    widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
    deepest, blocks = widths[-1], config.num_res_blocks
    mid = 2 * res(deepest, deepest) + attention(deepest)
    total = conv(3, widths[0], 3) + mid + 2 * deepest + conv(deepest, config.z_channels, 3)
    for width_in, width in zip([widths[0], *widths], widths, strict=False):
        total += res(width_in, width) + (blocks - 1) * res(width, width)
    total += blocks * attention(deepest) + sum(conv(width, width, 3) for width in widths[:-1])
    total += conv(config.z_channels, deepest, 3) + mid + 2 * widths[0] + conv(widths[0], 3, 3)
    for width_in, width in zip([deepest, *widths[::-1]], widths[::-1], strict=False):
        total += res(width_in, width) + blocks * res(width, width)
    total += (blocks + 1) * attention(deepest) + sum(conv(width, width, 3) for width in widths[1:])
    total += config.codebook_size * config.codebook_dim
    return total + conv(config.z_channels, config.codebook_dim, 1) + conv(config.codebook_dim, config.z_channels, 1)


def test_vq8_is_vq16_without_its_second_level() -> None:
    assert parameters(VQConfig()) == 71_883_403
    config = VQConfig(channel_multipliers=(1, 2, 2, 4))
    vq8, vq16 = meta(config), meta(VQConfig())
    assert config.downsample == 8
    assert sum(p.numel() for p in vq8.parameters()) == parameters(config)
    # Two ResBlocks of the encoder and three of the decoder, 8 entries each, and one convolution each to resample.
    assert len(vq8.state_dict()) == len(vq16.state_dict()) - 5 * 8 - 2 * 2
    assert vq8.encoder(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 256, 8, 8)


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


def test_bfloat16_weights_decode_nearly_the_same_images() -> None:
    torch.manual_seed(0)
    model = VQModel(TINY).eval()
    tokens = torch.randint(64, (2, 64))
    with torch.no_grad():
        exact = model.decode(tokens)
        rounded = model.bfloat16().decode(tokens)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)


def test_bfloat16_weights_encode_float32_pixels_to_nearly_the_same_tokens() -> None:
    torch.manual_seed(0)
    model = VQModel(TINY).eval()
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        exact = model.encode(pixels)
        rounded = copy.deepcopy(model).bfloat16().encode(pixels)
    assert (rounded == exact).float().mean() > 0.8


def test_the_last_tokens_of_training_are_remembered() -> None:
    torch.manual_seed(0)
    quantize = VQModel(TINY).quantize
    memory = [0] * 65536
    for batch in (1, 3, 70):  # the last one overfills the memory by itself
        tokens = quantize(torch.randn(batch, 8, 32, 32)).tokens
        memory = (memory + tokens.flatten().tolist())[-65536:]
        assert quantize.codebook_used.tolist() == memory
        assert float(quantize.codebook_usage()) == len(set(memory)) / 64
    quantize.eval()
    quantize(torch.zeros(1, 8, 32, 32))
    assert quantize.codebook_used.tolist() == memory


def test_usage_is_a_share_of_the_codebook() -> None:
    quantize = VQModel(TINY).quantize
    assert float(quantize.codebook_usage()) == 1 / 64
    quantize.codebook_used[:8] = torch.arange(8) + 1
    assert float(quantize.codebook_usage()) == 9 / 64


def test_bad_sizes_name_both_sides() -> None:
    with pytest.raises(ValueError, match="16 x 17 pixels, expected multiples of 2"):
        VQModel(TINY).encode(torch.zeros(1, 3, 16, 17))
    with pytest.raises(ValueError, match="15 x 16 pixels, expected multiples of 2"):
        VQModel(TINY)(torch.zeros(1, 3, 15, 16))
    for token in (64, -1):
        with pytest.raises(ValueError, match=rf"tokens from {min(token, 0)} to {max(token, 0)}, expected 0 to 63"):
            VQModel(TINY).decode(torch.tensor([[0, 0, token, 0]]))
    with pytest.raises(ValueError, match="expected a square number"):
        VQModel(TINY).decode(torch.zeros(1, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="channels is 48, expected a multiple of 32"):
        VQConfig(channels=48)
    with pytest.raises(ValueError, match="codebook_size is 65536"):
        VQConfig(codebook_size=65536)
