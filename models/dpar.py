"""DPAR: a light encoder on tokens, a deep global transformer on patches, a light decoder on tokens.

The encoder reads x_0 .. x_{T-2} and pools each patch into one vector. The global transformer reads
[class, patch 0, patch 1, ...]. Its output after patch k-1 is the context of every token of patch k. The decoder
predicts x_j from the encoder's state of x_{j-1} and the context of the patch that x_j belongs to.

Source: DPAR (arXiv 2512.21867), section 3. Names of weights follow the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from models.attention import causal_attention, packed_causal_attention
from models.config import DPARConfig
from models.layers import Block, LabelEmbedder, RMSNorm, check_tokens, dynamic_rope, grid_rope, index_rope, init_weights
from models.loss import head_cross_entropy
from models.packed_patches import PackedPatches


class DPAR(nn.Module):
    """The three stacks with one token embedding and one output head.

    The head starts at zero, so the first loss is exactly ln(codebook size).
    """

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
        """Logits of every token, float32.

        Raises:
            ValueError: See `features_and_states`.
        """
        return self.output(self.features(tokens, labels, patches)).float()

    def features(
        self, tokens: Int[Tensor, "B T"], labels: Int[Tensor, " B"], patches: PackedPatches
    ) -> Float[Tensor, "B T D"]:
        """Normed output of the decoder, the input of the head.

        Raises:
            ValueError: See `features_and_states`.
        """
        return self.features_and_states(tokens, labels, patches)[0]

    def features_and_states(
        self, tokens: Int[Tensor, "B T"], labels: Int[Tensor, " B"], patches: PackedPatches
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B S D"]]:
        """The features, and the encoder's states of all tokens but the last (S = T - 1), equal to `token_states`.

        Raises:
            ValueError: Tokens and patches are not of the same images, the number of tokens is not the model's, or a
                token is outside the codebook.
        """
        if tokens.shape != patches.target_rows.shape or tokens.shape[1] != self.config.num_tokens:
            raise ValueError(
                f"tokens are {tuple(tokens.shape)} and patches are of {tuple(patches.target_rows.shape)}, "
                f"expected (images, {self.config.num_tokens}) for both"
            )
        check_tokens(tokens, self.config.codebook_size)
        embedded = self.tok_embeddings(tokens[:, :-1])  # (B, T - 1, D)
        states, pooled = self.local_encoder(embedded, patches, self.token_rope(tokens.device)[1:-1])
        context = self.global_context(pooled, labels, patches)
        start = self.decoder_start_embedding.weight.expand(len(tokens), 1, -1)
        known = torch.cat([start.type_as(states), states], dim=1)  # (B, T, D): row j depends on x_0 .. x_{j-1}
        hidden = self.local_decoder(known, context, patches.target_rows, self.token_rope(tokens.device)[:-1])
        return self.norm(hidden), states

    def loss(self, tokens: Int[Tensor, "B T"], labels: Int[Tensor, " B"], patches: PackedPatches) -> Float[Tensor, ""]:
        """Mean cross-entropy of all tokens, nats.

        Raises:
            ValueError: See `features_and_states`.
        """
        return self.loss_and_states(tokens, labels, patches)[0]

    def loss_and_states(
        self, tokens: Int[Tensor, "B T"], labels: Int[Tensor, " B"], patches: PackedPatches
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "B S D"]]:
        """The loss, and the encoder's states of all tokens but the last (S = T - 1), from one pass.

        Raises:
            ValueError: See `features_and_states`.
        """
        features, states = self.features_and_states(tokens, labels, patches)
        return head_cross_entropy(features.flatten(0, 1), self.output.weight, tokens.reshape(-1, 1)), states

    def token_states(self, tokens: Int[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
        """State of the encoder's last layer at each of the first S tokens. Depends on neither patches nor class.

        Raises:
            ValueError: A token is outside the codebook.
        """
        check_tokens(tokens, self.config.codebook_size)
        rope = self.token_rope(tokens.device)[1 : tokens.shape[1] + 1]
        return self.local_encoder.states(self.tok_embeddings(tokens), rope)[-1]

    def global_context(
        self, pooled: Float[Tensor, "P D"], labels: Int[Tensor, " B"], patches: PackedPatches
    ) -> Float[Tensor, "G D"]:
        """Output of the global stack, packed as [class, patches] of each image."""
        rope = self.patch_rope(patches.first, patches.last, patches.number)
        rope = torch.cat([rope.new_zeros(len(labels), *rope.shape[1:]), rope])[patches.global_order]
        hidden = torch.cat([self.cls_embedding(labels), pooled]).index_select(0, patches.global_order)
        hidden = self.tok_dropout(hidden)
        attend = packed_causal_attention(patches.global_lengths, hidden.device, self.head_dim)
        for layer in self.layers:
            hidden = layer(hidden, rope, attend)
        return hidden

    def patch_rope(
        self, first: Int[Tensor, " P"], last: Int[Tensor, " P"], number: Int[Tensor, " P"]
    ) -> Float[Tensor, "P F 2"]:
        """Rotations of patches in the global stack (section 3.3).

        A patch spans tokens `first` to `last` and has a `number` in its image. The class row has zeros instead.
        """
        if self.config.position_embedding == "patch_index_1d":
            return index_rope(number, self.head_dim)
        redundant = self.config.position_embedding == "dynamic"
        return dynamic_rope(first, last, self.config.grid, self.head_dim, redundant=redundant)

    def token_rope(self, device: torch.device) -> Float[Tensor, "S F 2"]:
        """Rotations of [decoder start, x_0, ..., x_{T-1}]."""
        return grid_rope(self.config.grid, self.head_dim, device, class_row=True)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.config.dim // self.config.num_heads


class Encoder(nn.Module):
    """Causal blocks over tokens, each followed by pooling of tokens into patches (section 3.2)."""

    def __init__(self, config: DPARConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Block(config.dim, config.num_heads, dropout=0.0) for _ in range(config.encoder_layers)
        )
        self.cross_attn_layers = nn.ModuleList(
            PatchPooling(config.dim, config.num_heads) for _ in range(config.encoder_layers)
        )

    def forward(
        self, embedded: Float[Tensor, "B S D"], patches: PackedPatches, rope: Float[Tensor, "S F 2"]
    ) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "P D"]]:
        """States of tokens for the decoder and of patches for the global stack."""
        layers = self.states(embedded, rope)
        return layers[-1], self.pool([rows.flatten(0, 1) for rows in layers], patches.tokens, patches.valid)

    def states(self, embedded: Float[Tensor, "B S D"], rope: Float[Tensor, "S F 2"]) -> list[Float[Tensor, "B S D"]]:
        """States of tokens after each layer."""
        states = [embedded]
        for layer in self.layers:
            states.append(layer(states[-1], rope, causal_attention))
        return states[1:]

    def pool(
        self, states: Sequence[Float[Tensor, "N D"]], tokens: Int[Tensor, "P L"], valid: Bool[Tensor, "P L"]
    ) -> Float[Tensor, "P D"]:
        """States of patches from the states of tokens after each layer.

        `tokens` are the rows of each patch in `states`. Where not `valid` they repeat the patch's last row.
        """
        pooled = F.embedding(tokens, states[0]).amax(dim=1)  # the first query; repeated rows do not change the maximum
        for pooling, rows in zip(self.cross_attn_layers, states, strict=True):
            pooled = pooling(pooled, rows, tokens, valid)
        return pooled


class PatchPooling(nn.Module):
    """Cross-attention of one query per patch to the patch's own tokens, with a residual connection (section 3.2)."""

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
        """New states of patches. Keys and values are computed once per token, then gathered by patch.

        With one query and few keys, element-wise products and sums are faster than matrix products.
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
    """Causal blocks over tokens. Before each, the context of a token's patch is normed, projected and added."""

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
        rope: Float[Tensor, "T F 2"],
    ) -> Float[Tensor, "B T D"]:
        """Features before the final norm. The context is projected once per patch, then gathered to the tokens."""
        for projection, layer in zip(self.cross_attn_layers, self.layers, strict=True):
            hidden = hidden + F.embedding(target_rows, projection(context))
            hidden = layer(hidden, rope, causal_attention)
        return hidden


class ContextProjection(nn.Module):
    """Cross-attention to a single key, which reduces to norm and linear layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cross_attn_norm_kv = RMSNorm(dim)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, context: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Projected context of each patch."""
        return self.wo(self.cross_attn_norm_kv(context))
