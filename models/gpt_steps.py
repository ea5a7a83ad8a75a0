"""Sampling from a GPT: one kind of step, by which an image gains a token."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from models.boundaries import Boundaries
from models.cached_gpt import gpt_logits
from models.canvas import Canvas
from models.clocks import DONE
from models.gpt import GPT
from models.kv_cache import KVCache


class GPTSteps:
    """State of images that are sampled from a GPT, by slot; see `clocks.Steps`."""

    kinds = 1

    def __init__(self, model: GPT, canvas: Canvas, boundaries: Boundaries | None, slots: int) -> None:
        """State of as many images as there are slots, and of a spare slot. Every token counts as a patch."""
        self._model, self._canvas, self._rows = model, canvas, slots + 1
        self._position = torch.zeros(self._rows, dtype=torch.int64, device=canvas.tokens.device)
        canvas.starts.fill_(True)
        self._cache = KVCache(len(model.layers), self._rows * canvas.halves, canvas.num_tokens)

    def step(self, kind: int, slots: Int[Tensor, " R"], images: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        """Draw the next token of some images."""
        canvas, position = self._canvas, self._position[slots]
        previous = canvas.tokens[images, position - 1]  # not read at position 0
        hidden = torch.where(
            canvas.twice(position == 0)[:, None],
            self._model.cls_embedding(canvas.classes(images)),
            canvas.twice(self._model.tok_embeddings(previous)),
        )
        rows = torch.cat([slots + half * self._rows for half in range(canvas.halves)])
        logits = gpt_logits(self._model, hidden, rows, canvas.twice(position), self._cache)
        canvas.draw(logits, images, position)
        done = position == canvas.num_tokens - 1
        self._position[slots] = torch.where(done, 0, position + 1)
        return torch.where(done, DONE, 0)
