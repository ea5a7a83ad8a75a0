"""Next Patch Prediction (NPP): LlamaGen's transformer, trained first on blocks of tokens and last on single tokens.

A block of p x p tokens is one position. Its embedding is the mean of its tokens' embeddings. One predicted distribution
is compared with all of its tokens. There are no new weights, and p = 1 is LlamaGen.

Source: Next Patch Prediction (arXiv 2412.15321).
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from models.gpt import GPT
from models.layers import check_tokens
from models.loss import head_cross_entropy


def next_patch_loss(model: GPT, tokens: Int[Tensor, "B T"], labels: Int[Tensor, " B"], side: int) -> Float[Tensor, ""]:
    """Mean cross-entropy, nats, of all tokens under the distribution predicted for their block.

    Args:
        model: A class-conditional GPT.
        tokens: Tokens in raster order.
        labels: Classes of the images.
        side: Side of a block, in tokens. Rotary positions count blocks.

    Raises:
        ValueError: The number of tokens is not the model's, or the side does not divide the grid.
    """
    grid = model.config.grid
    if tokens.shape[1] != model.config.num_tokens or grid % side:
        raise ValueError(
            f"{tokens.shape[1]} tokens an image and blocks of {side} x {side}, expected {model.config.num_tokens} "
            f"tokens and a side that divides the grid of {grid} x {grid}"
        )
    check_tokens(tokens, model.config.codebook_size)
    blocks = tokens_by_block(tokens, side)
    embedded = model.tok_embeddings(blocks[:, :-1]).mean(dim=2)  # the last block is never an input
    features = model.transform(embedded, labels, grid // side)
    return head_cross_entropy(features.flatten(0, 1), model.output.weight, blocks.flatten(0, 1))


def tokens_by_block(tokens: Int[Tensor, "B T"], side: int) -> Int[Tensor, "B S C"]:
    """The C = `side`^2 tokens of each block of a square grid. Blocks and tokens inside them are in raster order."""
    blocks = round(tokens.shape[1] ** 0.5) // side
    grid = tokens.unflatten(1, (blocks, side, blocks, side))
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)
