"""Sampling from DPAR: token steps, and global steps where patches close.

A token step runs the decoder, draws a token, runs the encoder on it and decides whether the next token opens a patch.
If it does, the image waits for a global step. That pools the closed patch, runs the global stack on it and projects the
result for the decoder. So an image takes a global step for its class and for each patch but the last.

The encoder, the pooling and the boundaries do not read the class. With guidance they run once for both halves of the
batch; the global stack and the decoder run twice.

Source: DPAR (arXiv 2512.21867), section 3.2.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.boundaries import Boundaries, NextTokens
from models.canvas import Canvas
from models.clocks import DONE
from models.dpar import DPAR
from models.dpar_prefix import prefill
from models.dpar_state import DPARState

TOKEN, GLOBAL, PREFIX = range(3)


class DPARSteps:
    """The steps of images in slots; see `clocks.Steps`. Images wait for a global step first: that of their class."""

    kinds = 2

    def __init__(self, model: DPAR, canvas: Canvas, boundaries: Boundaries | None, slots: int) -> None:
        """Steps of as many images as there are slots, and of a spare slot.

        Raises:
            ValueError: The boundaries are for another number of images or tokens.
        """
        assert boundaries is not None  # the sampler loads boundaries for every family with patches
        self._model, self._canvas, self._boundaries = model, canvas, boundaries
        self.state = DPARState(model, canvas, slots)
        boundaries.begin(self.state.rows, canvas.num_images, canvas.num_tokens)
        if canvas.kept and not boundaries.reads_logits:
            self.kinds = 3  # images wait for their prefix first

    def step(self, kind: int, slots: Int[Tensor, " R"], images: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        """Run a step of some images: by a token, of the global stack, or through the whole prefix."""
        if kind == PREFIX:
            return self._prefix_step(slots, images)
        if kind == GLOBAL:
            return self._global_step(slots, images)
        if self._boundaries.reads_logits:
            return self._reading_step(slots, images)
        return self._token_step(slots, images)

    def _token_step(self, slots: Int[Tensor, " R"], images: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        position = self.state.position[slots]
        token = self._canvas.draw(self._decode(slots, position), images, position)
        state = self.state.before[slots] = self._encode(slots, position, token)
        after = position + 1
        opened = self._boundaries.opens(
            NextTokens(images, slots, after, token, state, open_lengths=after - self.state.first[slots])
        )
        return self._advance(slots, after, torch.where(opened, GLOBAL, TOKEN))

    def _reading_step(self, slots: Int[Tensor, " R"], images: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        """A token step of boundaries that read the token's logits.

        The decoder runs as if the open patch continued. Where the token opens a patch nothing is drawn: the image comes
        back after its global step, and the decoder runs again in the same position.
        """
        position, first, state = self.state.position[slots], self.state.first[slots], self.state.before[slots]
        logits = self._decode(slots, position)
        previous, conditional = self._canvas.tokens[images, position - 1], self._canvas.conditional(logits)
        tokens = NextTokens(images, slots, position, previous, state, position - first, conditional)
        opened = self._boundaries.opens(tokens) & (position > first)
        after = self._encode(slots, position, self._canvas.draw(logits, images, position))
        self.state.before[slots] = torch.where(opened[:, None], state, after)
        return self._advance(slots, torch.where(opened, position, position + 1), torch.where(opened, GLOBAL, TOKEN))

    def _prefix_step(self, slots: Int[Tensor, " R"], images: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        opened = prefill(self._model, self._canvas, self._boundaries, self.state, slots, images)
        return self._advance(slots, self.state.position[slots], torch.where(opened, GLOBAL, TOKEN))

    def _advance(
        self, slots: Int[Tensor, " R"], position: Int[Tensor, " R"], waits: Int[Tensor, " R"]
    ) -> Int[Tensor, " R"]:
        """Move images to a position. Finished ones leave their slots as those of new images are."""
        done = position == self._canvas.num_tokens
        self.state.position[slots] = torch.where(done, 0, position)
        self.state.global_rows[slots] = torch.where(done, 0, self.state.global_rows[slots])
        return torch.where(done, DONE, waits)

    def _decode(self, slots: Int[Tensor, " R"], position: Int[Tensor, " R"]) -> Float[Tensor, "R2 V"]:
        """Logits of the tokens at `position`, for both halves of a guided batch."""
        model, canvas = self._model, self._canvas
        start = model.decoder_start_embedding.weight
        hidden = canvas.twice(torch.where((position == 0)[:, None], start, self.state.before[slots]))
        rows, rope = self.state.halves(slots), canvas.twice(self.state.token_rope[position])
        attends = self.state.decoder_cache.step(rows, canvas.twice(position))
        for layer, context, attend in zip(
            model.local_decoder.layers, self.state.projections[:, rows], attends, strict=True
        ):
            hidden = layer(hidden + context, rope, attend)
        return model.output(model.norm(hidden)).float()

    def _encode(
        self, slots: Int[Tensor, " R"], position: Int[Tensor, " R"], token: Int[Tensor, " R"]
    ) -> Float[Tensor, "R D"]:
        """State of the encoder's last layer at the tokens at `position`."""
        state = self._model.tok_embeddings(token)
        rope = self.state.token_rope[position + 1]  # row 0 is the decoder's start
        attends = self.state.encoder_cache.step(slots, position)
        for layer, encoded, attend in zip(self._model.local_encoder.layers, self.state.encoded, attends, strict=True):
            state = layer(state, rope, attend)
            encoded[slots, position] = state
        return state

    def _global_step(self, slots: Int[Tensor, " R"], images: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        """Pool the open patches and run the global stack on them, or on the classes of images that have none yet."""
        canvas, model = self._canvas, self._model
        row, position = self.state.global_rows[slots], self.state.position[slots]
        pooled, rope = self._patches(slots, position, row)
        new = row == 0
        hidden = torch.where(
            canvas.twice(new)[:, None], model.cls_embedding(canvas.classes(images)), canvas.twice(pooled)
        )
        rope = canvas.twice(torch.where(new[:, None, None], 0.0, rope))
        rows = self.state.halves(slots)
        for layer, attend in zip(model.layers, self.state.global_cache.step(rows, canvas.twice(row)), strict=True):
            hidden = layer(hidden, rope, attend)
        for projections, projection in zip(self.state.projections, model.local_decoder.cross_attn_layers, strict=True):
            projections[rows] = projection(hidden).type_as(projections)
        canvas.starts[images, position] = True
        self.state.first[slots] = position
        self.state.global_rows[slots] = row + 1
        self.state.global_rows[-1:].zero_()  # the spare slot takes global steps without end
        return torch.full_like(slots, TOKEN)

    def _patches(
        self, slots: Int[Tensor, " R"], end: Int[Tensor, " R"], row: Int[Tensor, " R"]
    ) -> tuple[Float[Tensor, "R D"], Float[Tensor, "R F 2"]]:
        """Pooled states and rotations of the open patches, which end before the tokens at `end`."""
        first, last = self.state.first[slots], (end - 1).clamp(min=0)
        lengths = (end - first).clamp(min=1)
        offsets = torch.arange(self._longest(lengths), device=slots.device)
        places, valid = torch.minimum(first[:, None] + offsets, last[:, None]), offsets < lengths[:, None]
        states = [encoded[slots[:, None], places].flatten(0, 1) for encoded in self.state.encoded]
        numbers = torch.arange(places.numel(), device=slots.device).view_as(places)
        pooled = self._model.local_encoder.pool(states, numbers, valid)
        return pooled, self._model.patch_rope(first, last, row - 1)

    def _longest(self, lengths: Int[Tensor, " R"]) -> int:
        """Number of tokens that the pooling reads of each patch. A GPU is not asked how long the longest is."""
        if lengths.device.type == "cpu":
            return int(lengths.max())
        return self._boundaries.longest
