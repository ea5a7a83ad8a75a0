"""Sampling from a GPT: token steps, and one step for a prefix."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from models.boundaries import Boundaries
from models.cached_gpt import gpt_logits, prefilled
from models.canvas import Canvas
from models.clocks import DONE
from models.gpt import GPT
from models.kv_cache import KVCache

TOKEN, PREFIX = range(2)


class GPTSteps:
    """State of images that are sampled from a GPT, by slot; see `clocks.Steps`."""

    kinds = 1

    def __init__(self, model: GPT, canvas: Canvas, boundaries: Boundaries | None, slots: int) -> None:
        """State of as many images as there are slots, and of a spare slot. Every token counts as a patch."""
        self._model, self._canvas, self._rows = model, canvas, slots + 1
        self._position = torch.zeros(self._rows, dtype=torch.int64, device=canvas.tokens.device)
        canvas.starts.fill_(True)
        self._cache = KVCache(len(model.layers), self._rows * canvas.halves, canvas.num_tokens)
        if canvas.kept:
            self.kinds = 2  # images wait for their prefix first

    def step(self, kind: int, slots: Int[Tensor, " R"], images: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        """Draw the next token of some images, or read their whole prefix."""
        if kind == PREFIX:
            return self._prefix_step(slots, images)
        canvas, position = self._canvas, self._position[slots]
        previous = canvas.tokens[images, position - 1]  # not read at position 0
        hidden = torch.where(
            canvas.twice(position == 0)[:, None],
            self._model.cls_embedding(canvas.classes(images)),
            canvas.twice(self._model.tok_embeddings(previous)),
        )
        logits = gpt_logits(self._model, hidden, self._halves(slots), canvas.twice(position), self._cache)
        canvas.draw(logits, images, position)
        return self._advance(slots, position + 1)

    def _prefix_step(self, slots: Int[Tensor, " R"], images: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        """Read the class and the prefix but its last token, as the steps of its tokens would."""
        canvas = self._canvas
        classes = self._model.cls_embedding(canvas.classes(images))[:, None]
        tokens = self._model.tok_embeddings(canvas.tokens[images, : canvas.kept - 1])
        prefilled(self._model, torch.cat([classes, canvas.twice(tokens)], dim=1), self._halves(slots), self._cache)
        return self._advance(slots, torch.full_like(slots, canvas.kept))

    def _advance(self, slots: Int[Tensor, " R"], position: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        done = position == self._canvas.num_tokens
        self._position[slots] = torch.where(done, 0, position)
        return torch.where(done, DONE, TOKEN)

    def _halves(self, slots: Int[Tensor, " R"]) -> Int[Tensor, " R2"]:
        """Rows of slots in both halves of a guided batch."""
        return torch.cat([slots + half * self._rows for half in range(self._canvas.halves)])
