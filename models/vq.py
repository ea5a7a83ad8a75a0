"""The VQ tokenizer of LlamaGen (VQ-16, VQ-8): encodes an image as a square grid of tokens, and decodes it.

Names and shapes of the state dict are LlamaGen's, so that its released weights load. Encoder and decoder are
convolutional, with single-head attention at the lowest resolution. The quantiser finds the nearest L2-normalised code.

Shapes: E channels of a code, Z channels of the encoder's output.

Source: LlamaGen (arXiv 2406.06525), section 2.1; Taming Transformers (arXiv 2012.09841).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.config import VQConfig
from models.layers import check_tokens

_RECORDED_TOKENS = 65536


class Quantized(NamedTuple):
    """Output of the quantiser for a batch of latents."""

    latents: Float[Tensor, "B E h w"]
    """Normalised codes. The gradient passes straight through to the encoder."""
    tokens: Int[Tensor, "B T"]
    codebook_loss: Float[Tensor, ""]
    """Mean squared distance whose gradient moves the codes towards the latents."""
    commitment_loss: Float[Tensor, ""]
    """The same distance, whose gradient moves the latents towards their codes. Not weighted."""


class VQModel(nn.Module):
    """Encoder, codebook and decoder. VQ-16 holds 71,883,403 parameters in 343 tensors, plus one buffer."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config.codebook_size, config.codebook_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    def forward(self, pixels: Float[Tensor, "B 3 height width"]) -> tuple[Float[Tensor, "B 3 height width"], Quantized]:
        """Reconstruction (not clamped) and quantisation of images in [-1, 1], for training.

        Raises:
            ValueError: A side of the images is not a multiple of the downsampling.
        """
        self._check_size(pixels)
        quantized = self.quantize(self.quant_conv(self.encoder(pixels)))
        return self.decoder(self.post_quant_conv(quantized.latents)), quantized

    def encode(self, pixels: Float[Tensor, "B 3 height width"]) -> Int[Tensor, "B T"]:
        """Tokens of images in [-1, 1], in raster order, int64.

        Pixels are cast to the dtype of the weights. In bfloat16 some tokens are others than in float32.

        Raises:
            ValueError: A side of the images is not a multiple of the downsampling.
        """
        self._check_size(pixels)
        return self.quantize.lookup(self.quant_conv(self.encoder(pixels.type_as(self.encoder.conv_in.weight))))

    def decode(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B 3 height width"]:
        """Images of tokens, roughly in [-1, 1]: the decoder does not clamp.

        Raises:
            ValueError: The number of tokens is not square, or a token is outside the codebook.
        """
        grid = round(tokens.shape[1] ** 0.5)
        if grid * grid != tokens.shape[1]:
            raise ValueError(f"{tokens.shape[1]} tokens an image, expected a square number")
        check_tokens(tokens, self.config.codebook_size)
        latents = self.quantize.codes()[tokens].type_as(self.post_quant_conv.weight)  # (B, T, E)
        latents = latents.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(latents))

    def _check_size(self, pixels: Float[Tensor, "B 3 height width"]) -> None:
        height, width = pixels.shape[-2:]
        if height % self.config.downsample or width % self.config.downsample:
            raise ValueError(f"images of {height} x {width} pixels, expected multiples of {self.config.downsample}")


class VectorQuantizer(nn.Module):
    """Nearest code of each latent, both L2-normalised at every use."""

    codebook_used: Tensor

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        with torch.no_grad():
            self.embedding.weight.uniform_(-1.0 / codebook_size, 1.0 / codebook_size)
            self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))
        # The last tokens of the training, newest at the end. Float as in released weights; float32 is exact for every
        # token. Until the buffer is full, its zeros count as uses of code 0.
        self.register_buffer("codebook_used", torch.zeros(_RECORDED_TOKENS))

    def codes(self) -> Float[Tensor, "V E"]:
        """The normalised codebook, float32."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def lookup(self, latents: Float[Tensor, "B E h w"]) -> Int[Tensor, "B T"]:
        """Token of each position: the code at the smallest squared distance."""
        return self._nearest(self._flatten(latents), self.codes())

    def forward(self, latents: Float[Tensor, "B E h w"]) -> Quantized:
        """Quantise with straight-through gradients. Losses and distances are float32 for every input dtype.

        In training mode `codebook_used` records the tokens. With several processes each of them has the record of the
        first process plus its own newest tokens, as in LlamaGen, because buffers are broadcast from the first process.
        """
        height, width = latents.shape[-2:]
        flat, codes = self._flatten(latents), self.codes()
        tokens = self._nearest(flat.detach(), codes.detach())
        chosen = codes[tokens]  # (B, T, E)
        codebook_loss = F.mse_loss(chosen, flat.detach())
        commitment_loss = F.mse_loss(flat, chosen.detach())
        straight = flat + (chosen - flat).detach()
        if self.training:
            self._record(tokens)
        straight = straight.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return Quantized(straight, tokens, codebook_loss, commitment_loss)

    def codebook_usage(self) -> Float[Tensor, ""]:
        """Share of the codebook that occurs among the recorded tokens."""
        used = torch.zeros(self.embedding.num_embeddings, device=self.codebook_used.device)
        used[self.codebook_used.long()] = 1.0
        return used.mean()

    def _record(self, tokens: Int[Tensor, "B T"]) -> None:
        newest = tokens.flatten()[-_RECORDED_TOKENS:].to(self.codebook_used.dtype)
        self.codebook_used.copy_(torch.cat([self.codebook_used[len(newest) :], newest]))

    @staticmethod
    def _flatten(latents: Float[Tensor, "B E h w"]) -> Float[Tensor, "B T E"]:
        return F.normalize(latents.float().flatten(2).transpose(1, 2), dim=-1)

    @staticmethod
    def _nearest(flat: Float[Tensor, "B T E"], codes: Float[Tensor, "V E"]) -> Int[Tensor, "B T"]:
        # The nearest unit vector has the largest inner product. The product is float32 even under autocast: a token
        # must not depend on the precision of the rest of the network.
        with torch.autocast(flat.device.type, enabled=False):
            return (flat @ codes.T).argmax(dim=-1)


class Encoder(nn.Module):
    """Maps images to latents. Halves the resolution after every level but the last."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        width = config.channels
        last = len(config.channel_multipliers) - 1
        for level, multiplier in enumerate(config.channel_multipliers):
            out = config.channels * multiplier
            resample = None if level == last else "downsample"
            self.conv_blocks.append(
                Level(width, out, config.num_res_blocks, attention=level == last, resample=resample)
            )
            width = out
        self.mid = nn.ModuleList([ResBlock(width, width), AttnBlock(width), ResBlock(width, width)])
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, config.z_channels, 3, padding=1)

    def forward(self, pixels: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B Z h w"]:
        """Latents before quantisation."""
        hidden = self.conv_in(pixels)
        for level in self.conv_blocks:
            hidden = level(hidden)
        for block in self.mid:
            hidden = block(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Decoder(nn.Module):
    """Maps latents to images. `conv_blocks.0` is the lowest resolution. Levels have one more ResBlock than above."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        width = config.channels * config.channel_multipliers[-1]
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid = nn.ModuleList([ResBlock(width, width), AttnBlock(width), ResBlock(width, width)])
        self.conv_blocks = nn.ModuleList()
        last = len(config.channel_multipliers) - 1
        for level, multiplier in enumerate(reversed(config.channel_multipliers)):
            out = config.channels * multiplier
            resample = None if level == last else "upsample"
            self.conv_blocks.append(
                Level(width, out, config.num_res_blocks + 1, attention=level == 0, resample=resample)
            )
            width = out
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, latents: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B 3 height width"]:
        """Images, not clamped."""
        hidden = self.conv_in(latents)
        for block in self.mid:
            hidden = block(hidden)
        for level in self.conv_blocks:
            hidden = level(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Level(nn.Module):
    """ResBlocks of one resolution, with optional attention after each, then a change of resolution."""

    def __init__(
        self, width_in: int, width: int, num_blocks: int, *, attention: bool, resample: str | None = None
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResBlock(width_in if i == 0 else width, width) for i in range(num_blocks))
        self.attn = nn.ModuleList(AttnBlock(width) for _ in range(num_blocks if attention else 0))
        self.resample = resample
        if resample is not None:  # under its name in the released weights
            self.add_module(resample, {"downsample": Downsample, "upsample": Upsample}[resample](width))

    def forward(self, hidden: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h2 w2"]:
        """Features at the resolution of the next level."""
        for index, block in enumerate(self.res):
            hidden = block(hidden)
            if len(self.attn):
                hidden = self.attn[index](hidden)
        return hidden if self.resample is None else self.get_submodule(self.resample)(hidden)


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions and a shortcut."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = _norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = _norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if width_in != width:
            self.nin_shortcut = nn.Conv2d(width_in, width, 1)

    def forward(self, hidden: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        """Sum of the convolutions and the shortcut."""
        shortcut = self.nin_shortcut(hidden) if hasattr(self, "nin_shortcut") else hidden
        hidden = self.conv1(F.silu(self.norm1(hidden)))
        return shortcut + self.conv2(F.silu(self.norm2(hidden)))


class AttnBlock(nn.Module):
    """Single-head attention over all positions of a feature map, with 1x1 convolutions as projections."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, hidden: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Residual attention with scale C^-0.5."""
        normed = self.norm(hidden)
        q, k, v = (conv(normed).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # (B, hw, C)
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return hidden + self.proj_out(attended.transpose(1, 2).unflatten(2, hidden.shape[-2:]))


class Downsample(nn.Module):
    """Halves the resolution. Pads zeros on the right and bottom only, as in the training of the released weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, hidden: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h//2 w//2"]:
        """Features at half the resolution."""
        return self.conv(F.pad(hidden, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution: repeats each position, then convolves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C 2*h 2*w"]:
        """Features at twice the resolution."""
        return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)
