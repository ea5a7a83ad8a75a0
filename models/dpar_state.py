"""State of images that are sampled from a DPAR model, by slot."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from models.canvas import Canvas
from models.dpar import DPAR
from models.kv_cache import KVCache


class DPARState:
    """What the steps of DPAR keep of as many images as there are slots, and of a spare slot.

    Attributes:
        rows: Slots, with the spare one.
        position: Of each slot's next token, (rows,).
        first: First token of the open patch, (rows,).
        global_rows: Rows that the global stack has taken: the class and the closed patches, (rows,).
        before: State of the encoder's last layer at the token before, (rows, D).
        encoded: States of all tokens after each layer of the encoder, for the pooling, (layers, rows, T, D).
        projections: The context of the open patch for each layer of the decoder, (layers, rows of both halves, D).
        token_rope: Rotations of [decoder start, x_0, ..., x_{T-1}].
    """

    def __init__(self, model: DPAR, canvas: Canvas, slots: int) -> None:
        """All slots are as before the first token of an image."""
        like, num_tokens, dim = model.tok_embeddings.weight, canvas.num_tokens, model.config.dim
        self.rows = rows = slots + 1
        self._halves = canvas.halves
        self.position = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self.first, self.global_rows = torch.zeros_like(self.position), torch.zeros_like(self.position)
        self.before = like.new_zeros(rows, dim)
        self.encoded = like.new_zeros(len(model.local_encoder.layers), rows, num_tokens, dim)
        self.projections = like.new_zeros(len(model.local_decoder.layers), rows * canvas.halves, dim)
        self.encoder_cache = KVCache(len(model.local_encoder.layers), rows, num_tokens)
        self.global_cache = KVCache(len(model.layers), rows * canvas.halves, num_tokens)
        self.decoder_cache = KVCache(len(model.local_decoder.layers), rows * canvas.halves, num_tokens)
        self.token_rope = model.token_rope(like.device)

    def halves(self, slots: Int[Tensor, " R"]) -> Int[Tensor, " R2"]:
        """Rows of slots in both halves of a guided batch."""
        return torch.cat([slots + half * self.rows for half in range(self._halves)])
