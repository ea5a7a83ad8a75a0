"""DPAR: a light encoder on tokens, a deep global transformer on patches, a light decoder on tokens.

The encoder reads x_0 .. x_{T-2} and pools each patch of them into one vector. The global transformer reads
[class, patch 0, patch 1, ...]; its output after patch k-1 serves every token of patch k. The decoder predicts x_j from
the encoder's state of x_{j-1} and the global output of the patch that x_j belongs to.

Source: DPAR (arXiv 2512.21867), section 3. Names of weights follow the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from models.attention import causal_attention, packed_causal_attention
from models.config import DPARConfig
from models.layers import Block, LabelEmbedder, RMSNorm, check_tokens, dynamic_rope, grid_rope, index_rope, init_weights
from models.loss import head_cross_entropy


@dataclass(frozen=True)
class PackedPatches:
    """The patches of a batch, laid out for the model. P patches over the encoder's T - 1 tokens of all images.

    Rows of the global sequence are packed image after image, the class row of each before its patches. Numbers are
    int32: half of what would have to go to the device.
    """

    global_lengths: list[int]
    """Rows of each image in the global sequence: its patches and one for the class. Numbers of the host."""
    tokens: Int[Tensor, "P L"]
    """Tokens of each patch as rows of the flattened encoder output; short patches repeat their last token."""
    valid: Bool[Tensor, "P L"]
    """Which of `tokens` are real."""
    first: Int[Tensor, " P"]
    """Position of a patch's first token in its image."""
    last: Int[Tensor, " P"]
    """Position of its last token."""
    number: Int[Tensor, " P"]
    """Number of the patch in its image."""
    global_order: Int[Tensor, " G"]
    """What stands in each global row: its place in [class of every image, all patches]."""
    target_rows: Int[Tensor, "B T"]
    """Global row whose output serves the prediction of each token."""

    def to(self, device: torch.device) -> PackedPatches:
        """The same patches with their tensors on `device`."""
        return self.map(lambda tensor: tensor.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedPatches:
        """The same patches with each tensor changed."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {k: change(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        return PackedPatches(**changed)


def pack_patches(starts: Bool[Tensor, "B T"]) -> PackedPatches:
    """Lay out patches for the model, on the CPU, from where they start in every image.

    The encoder's patches end at token T - 2; a last one cut short there is never read by a prediction.

    Raises:
        ValueError: The starts are not (images, tokens), or the first token of an image opens no patch.
    """
    if starts.ndim != 2 or starts.shape[1] < 2:
        raise ValueError(f"starts are {tuple(starts.shape)}, expected two tokens and more of each image: (images, T)")
    if not bool(starts[:, 0].all()):
        raise ValueError("the first token of an image opens no patch, expected every image to start one")
    marks = starts.numpy()
    batch, width = len(marks), marks.shape[1] - 1
    counts = marks[:, :-1].sum(axis=1, dtype=np.int32)
    before = np.cumsum(counts, dtype=np.int32) - counts  # patches of the images before
    class_rows = before + np.arange(batch, dtype=np.int32)
    flat = np.flatnonzero(marks[:, :-1]).astype(np.int32)
    lengths = np.diff(flat, append=np.int32(batch * width))
    first = flat - np.repeat(width * np.arange(batch, dtype=np.int32), counts)
    # Patch p of image i stands in global row p + i + 1 and in place B + p: the place is the row plus B - 1 - i.
    global_order = np.arange(batch + len(flat), dtype=np.int32)
    global_order += np.repeat(np.arange(batch, dtype=np.int32)[::-1], counts + 1)
    global_order[class_rows] = np.arange(batch)
    targets = marks.cumsum(axis=1, dtype=np.int32)
    targets += (class_rows - 1)[:, None]
    return PackedPatches(
        global_lengths=(counts + 1).tolist(),
        tokens=torch.from_numpy(_ranges(flat, lengths)),
        valid=torch.from_numpy(np.take(np.tri(lengths.max() + 1, lengths.max(), -1, dtype=np.bool_), lengths, axis=0)),
        first=torch.from_numpy(first),
        last=torch.from_numpy(first + lengths - 1),
        number=torch.from_numpy(np.arange(len(flat), dtype=np.int32) - np.repeat(before, counts)),
        global_order=torch.from_numpy(global_order),
        target_rows=torch.from_numpy(targets),
    )


def _ranges(first: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    """Rows (P, L) of `lengths` numbers counted up from `first`; short rows repeat their last number.

    Column by column: along its short rows numpy would pay for each of them.
    """
    last = first + lengths - 1
    rows = np.empty((len(first), lengths.max()), dtype=np.int32)
    for offset, column in enumerate(rows.T):
        np.minimum(first + np.int32(offset), last, out=column)
    return rows


class DPAR(nn.Module):
    """The three stacks around one token embedding and one output head, which starts at zero."""

    def __init__(self, config: DPARConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = LabelEmbedder(config.num_classes, config.dim, config.class_dropout_prob)
        self.tok_embeddings = nn.Embedding(config.codebook_size, config.dim)
        self.tok_dropout = nn.Dropout(config.dropout)
        self.local_encoder = Encoder(config)
        self.layers = nn.ModuleList(
            Block(config.dim, config.num_heads, config.dropout) for _ in range(config.global_layers)
        )
        self.decoder_start_embedding = nn.Embedding(1, config.dim)
        self.local_decoder = Decoder(config)
        self.norm = RMSNorm(config.dim)
        self.output = nn.Linear(config.dim, config.codebook_size, bias=False)
        self.apply(init_weights)
        nn.init.zeros_(self.output.weight)

    def forward(
        self, tokens: Int[Tensor, "B T"], labels: Int[Tensor, " B"], patches: PackedPatches
    ) -> Float[Tensor, "B T V"]:
        """Logits of every token, float32."""
        return self.output(self.features(tokens, labels, patches)).float()

    def features(
        self, tokens: Int[Tensor, "B T"], labels: Int[Tensor, " B"], patches: PackedPatches
    ) -> Float[Tensor, "B T D"]:
        """What the head makes the logits from."""
        return self.features_and_states(tokens, labels, patches)[0]

    def features_and_states(
        self, tokens: Int[Tensor, "B T"], labels: Int[Tensor, " B"], patches: PackedPatches
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B S D"]]:
        """The features, and the encoder's states of all tokens but the last, as `token_states` gives them."""
        if tokens.shape != patches.target_rows.shape or tokens.shape[1] != self.config.num_tokens:
            raise ValueError(
                f"tokens are {tuple(tokens.shape)} and patches are of {tuple(patches.target_rows.shape)}, "
                f"expected (images, {self.config.num_tokens}) of both"
            )
        check_tokens(tokens, self.config.codebook_size)
        embedded = self.tok_embeddings(tokens[:, :-1])  # (B, T - 1, D)
        states, pooled = self.local_encoder(embedded, patches, self.token_rope(tokens.device)[1:-1])
        context = self.global_context(pooled, labels, patches)
        start = self.decoder_start_embedding.weight.expand(len(tokens), 1, -1)
        known = torch.cat([start.type_as(states), states], dim=1)  # (B, T, D): row j knows x_0 .. x_{j-1}
        hidden = self.local_decoder(known, context, patches.target_rows, self.token_rope(tokens.device)[:-1])
        return self.norm(hidden), states

    def loss(self, tokens: Int[Tensor, "B T"], labels: Int[Tensor, " B"], patches: PackedPatches) -> Float[Tensor, ""]:
        """Mean cross-entropy of all tokens, nats."""
        return self.loss_and_states(tokens, labels, patches)[0]

    def loss_and_states(
        self, tokens: Int[Tensor, "B T"], labels: Int[Tensor, " B"], patches: PackedPatches
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "B S D"]]:
        """The loss, and the encoder's states of all tokens but the last, from the same pass."""
        features, states = self.features_and_states(tokens, labels, patches)
        return head_cross_entropy(features.flatten(0, 1), self.output.weight, tokens.reshape(-1, 1)), states

    def token_states(self, tokens: Int[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
        """What the encoder makes of each token and those before it; patches and class have no part in it."""
        check_tokens(tokens, self.config.codebook_size)
        rope = self.token_rope(tokens.device)[1 : tokens.shape[1] + 1]
        return self.local_encoder.states(self.tok_embeddings(tokens), rope)[-1]

    def global_context(
        self, pooled: Float[Tensor, "P D"], labels: Int[Tensor, " B"], patches: PackedPatches
    ) -> Float[Tensor, "G D"]:
        """Output of the global stack, packed: [class, patches] of each image."""
        rope = self.patch_rope(patches.first, patches.last, patches.number)
        rope = torch.cat([rope.new_zeros(len(labels), *rope.shape[1:]), rope])[patches.global_order]
        hidden = torch.cat([self.cls_embedding(labels), pooled]).index_select(0, patches.global_order)
        hidden = self.tok_dropout(hidden)
        attend = packed_causal_attention(patches.global_lengths, hidden.device)
        for layer in self.layers:
            hidden = layer(hidden, rope, attend)
        return hidden

    def patch_rope(
        self, first: Int[Tensor, " P"], last: Int[Tensor, " P"], number: Int[Tensor, " P"]
    ) -> Float[Tensor, "P R 2"]:
        """Rotations of patches in the global stack (section 3.3); the class position has zeros."""
        if self.config.position_embedding == "patch_index_1d":
            return index_rope(number, self.head_dim)
        redundant = self.config.position_embedding == "dynamic"
        return dynamic_rope(first, last, self.config.grid, self.head_dim, redundant=redundant)

    def token_rope(self, device: torch.device) -> Float[Tensor, "L R 2"]:
        """Rotations of [decoder start, x_0, ..., x_{T-1}]."""
        return grid_rope(self.config.grid, self.head_dim, device, class_row=True)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.config.dim // self.config.num_heads


class Encoder(nn.Module):
    """Causal blocks over tokens, each followed by a pooling of tokens into patches (section 3.2)."""

    def __init__(self, config: DPARConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Block(config.dim, config.num_heads, dropout=0.0) for _ in range(config.encoder_layers)
        )
        self.cross_attn_layers = nn.ModuleList(
            PatchPooling(config.dim, config.num_heads) for _ in range(config.encoder_layers)
        )

    def forward(
        self, embedded: Float[Tensor, "B S D"], patches: PackedPatches, rope: Float[Tensor, "S R 2"]
    ) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "P D"]]:
        """Token states for the decoder and patch states for the global stack."""
        layers = self.states(embedded, rope)
        return layers[-1], self.pool([rows.flatten(0, 1) for rows in layers], patches.tokens, patches.valid)

    def states(self, embedded: Float[Tensor, "B S D"], rope: Float[Tensor, "S R 2"]) -> list[Float[Tensor, "B S D"]]:
        """Token states after each layer."""
        states = [embedded]
        for layer in self.layers:
            states.append(layer(states[-1], rope, causal_attention))
        return states[1:]

    def pool(
        self, states: Sequence[Float[Tensor, "N D"]], tokens: Int[Tensor, "P L"], valid: Bool[Tensor, "P L"]
    ) -> Float[Tensor, "P D"]:
        """Patch states from each layer's token states; `tokens` names a patch's rows, repeated where not `valid`."""
        pooled = F.embedding(tokens, states[0]).amax(dim=1)  # the first query; repeated rows change no maximum
        for pooling, rows in zip(self.cross_attn_layers, states, strict=True):
            pooled = pooling(pooled, rows, tokens, valid)
        return pooled


class PatchPooling(nn.Module):
    """Cross-attention of one query a patch to the patch's own tokens, added to the query."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.cross_attn_norm_q = RMSNorm(dim)
        self.cross_attn_norm_kv = RMSNorm(dim)
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, dim, bias=False)
        self.wv = nn.Linear(dim, dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        pooled: Float[Tensor, "P D"],
        states: Float[Tensor, "N D"],
        tokens: Int[Tensor, "P L"],
        valid: Bool[Tensor, "P L"],
    ) -> Float[Tensor, "P D"]:
        """New patch states. Keys and values are made once a token and then gathered to its patch.

        Sums of products instead of matrix products: for one query and a few keys they are faster.
        """
        query = self.wq(self.cross_attn_norm_q(pooled)).unflatten(-1, (1, self.num_heads, -1))
        normed = self.cross_attn_norm_kv(states)
        keys, values = (F.embedding(tokens, w(normed)) for w in (self.wk, self.wv))  # (P, L, D)
        keys, values = (x.unflatten(-1, (self.num_heads, -1)) for x in (keys, values))  # (P, L, H, K)
        scores = (query * keys).sum(dim=-1) * keys.shape[-1] ** -0.5  # (P, L, H)
        weights = scores.masked_fill(~valid[..., None], -torch.inf).softmax(dim=1).type_as(values)
        mixed = (weights[..., None] * values).sum(dim=1)  # (P, H, K)
        return pooled + self.wo(mixed.flatten(1))


class Decoder(nn.Module):
    """Causal blocks over tokens; before each, the global output of a token's patch is normed, projected and added."""

    def __init__(self, config: DPARConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Block(config.dim, config.num_heads, dropout=0.0) for _ in range(config.decoder_layers)
        )
        self.cross_attn_layers = nn.ModuleList(ContextProjection(config.dim) for _ in range(config.decoder_layers))

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        context: Float[Tensor, "G D"],
        target_rows: Int[Tensor, "B T"],
        rope: Float[Tensor, "T R 2"],
    ) -> Float[Tensor, "B T D"]:
        """Features that the head reads. The projection acts on patches and is gathered to their tokens."""
        for projection, layer in zip(self.cross_attn_layers, self.layers, strict=True):
            hidden = hidden + F.embedding(target_rows, projection(context))
            hidden = layer(hidden, rope, causal_attention)
        return hidden


class ContextProjection(nn.Module):
    """What is left of cross-attention when there is one key: norm and linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cross_attn_norm_kv = RMSNorm(dim)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, context: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """What a patch's tokens get from the global stack."""
        return self.wo(self.cross_attn_norm_kv(context))
