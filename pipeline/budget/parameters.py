"""Numbers of parameters in closed form, so that memory and disk are planned without torch.

The tests hold each to the number of the real module.
"""

from __future__ import annotations

from itertools import pairwise

from models.config import DPARSize, GPTSize, VQConfig
from pipeline.budget.shape import TokenShape


def transformer_parameters(size: GPTSize | DPARSize, tokens: TokenShape, *, conditional: bool) -> int:
    """Parameters of a GPT or a DPAR: embeddings, blocks, final norm, head, and DPAR's pooling and projections."""
    dim = size.dim
    embeddings = 2 * tokens.codebook_size * dim  # of the tokens, and the head
    classes = (tokens.num_classes + 1) * dim if conditional else 0
    blocks = num_layers(size) * block_parameters(dim)
    if isinstance(size, GPTSize):
        return embeddings + classes + blocks + dim
    pooling = size.encoder_layers * (4 * dim * dim + 2 * dim)
    projections = size.decoder_layers * (dim * dim + dim)
    start = dim
    return embeddings + classes + blocks + dim + pooling + projections + start


def block_parameters(dim: int) -> int:
    """Parameters of one transformer block: attention, SwiGLU and two norms."""
    hidden = -(-int(2 * 4 * dim / 3) // 256) * 256
    return 4 * dim * dim + 3 * dim * hidden + 2 * dim


def num_layers(size: GPTSize | DPARSize) -> int:
    """Transformer blocks in all stacks together."""
    return (size.as_gpt() if isinstance(size, DPARSize) else size).num_layers


def vq_parameters(config: VQConfig) -> int:
    """Parameters of a VQ model: encoder, decoder, codebook and the convolutions around it."""
    widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
    first, last, latent = config.channels, widths[-1], config.z_channels
    encoder = _convolution(3, first, 3) + _levels([first, *widths], config.num_res_blocks, attended=len(widths))
    decoder = _convolution(latent, last, 3) + _levels([last, *reversed(widths)], config.num_res_blocks + 1, attended=1)
    middle = 2 * _residual(last, last) + _attention(last)
    ends = _norm(last) + _convolution(last, latent, 3) + _norm(widths[0]) + _convolution(widths[0], 3, 3)
    codes = config.codebook_size * config.codebook_dim
    codes += _convolution(latent, config.codebook_dim, 1) + _convolution(config.codebook_dim, latent, 1)
    return encoder + decoder + 2 * middle + ends + codes


def _levels(widths: list[int], num_blocks: int, *, attended: int) -> int:
    """Levels from one width to the next. Level number `attended` has attention; all but the last change the size."""
    total = 0
    for number, (before, width) in enumerate(pairwise(widths), 1):
        total += _residual(before, width) + (num_blocks - 1) * _residual(width, width)
        total += num_blocks * _attention(width) if number == attended else 0
        total += _convolution(width, width, 3) if number < len(widths) - 1 else 0
    return total


def _residual(before: int, width: int) -> int:
    shortcut = _convolution(before, width, 1) if before != width else 0
    return _norm(before) + _convolution(before, width, 3) + _norm(width) + _convolution(width, width, 3) + shortcut


def _attention(width: int) -> int:
    return _norm(width) + 4 * _convolution(width, width, 1)


def _convolution(before: int, width: int, side: int) -> int:
    return before * width * side * side + width


def _norm(width: int) -> int:
    return 2 * width
