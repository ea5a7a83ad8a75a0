"""A family is an entry in the tables: a bigram model, added here, goes from settings to a loss, weights and samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from conf.load import load_settings
from conf.schema import Settings
from conf.section import Section
from conf.train import FAMILIES, TrainConfig, for_every_family
from models.boundaries import Boundaries
from models.canvas import Canvas
from models.clocks import DONE
from pipeline.bench.family_costs import FAMILY_COSTS
from pipeline.graph import STAGES, inputs_read
from stages.families import ARCHITECTURES, RECIPES, Architecture, Objective, Recipe
from stages.runtime.randomness import Purpose, stream
from stages.sampling.sampler import Sampler
from stages.stores.tokens import TokenStore
from stages.training.data import TokenBatch, TokenData
from stages.weights.own import MODEL_FILE

Run = Callable[[str, Section, dict[str, Path]], Path]
CODES, TOKENS = 64, 64


@dataclass(frozen=True, kw_only=True)
class BigramConfig:
    num_tokens: int
    codebook_size: int
    num_classes: int
    smoothing: float


class Bigram(nn.Module):
    """Logits of a token from the token before it; row V stands for the start of an image."""

    def __init__(self, config: BigramConfig) -> None:
        super().__init__()
        self.config = config
        self.table = nn.Parameter(torch.zeros(config.codebook_size + 1, config.codebook_size))

    def forward(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        start = torch.full_like(batch.tokens[:, :1], self.config.codebook_size)
        logits = self.table[torch.cat([start, batch.tokens[:, :-1]], dim=1)]
        loss = F.cross_entropy(logits.flatten(0, 1), batch.tokens.flatten(), label_smoothing=self.config.smoothing)
        return loss, {}


class BigramSteps:
    """Draws the next token of some images."""

    kinds = 1

    def __init__(self, model: Bigram, canvas: Canvas, boundaries: Boundaries | None, slots: int) -> None:
        self._model, self._canvas = model, canvas
        self._position = torch.zeros(slots + 1, dtype=torch.int64)
        canvas.starts.fill_(True)

    def step(self, kind: int, slots: Tensor, images: Tensor) -> Tensor:
        position = self._position[slots]
        previous = torch.where(position == 0, CODES, self._canvas.tokens[images, position - 1])
        self._canvas.draw(self._canvas.twice(self._model.table[previous]), images, position)
        done = position == TOKENS - 1
        self._position[slots] = torch.where(done, 0, position + 1)
        return torch.where(done, DONE, 0)


class BigramSettings(TrainConfig):
    family: Literal["bigram"] = "bigram"
    smoothing: float = 0.0


def bigram_config(settings: BigramSettings, store: TokenStore) -> BigramConfig:
    return BigramConfig(
        num_tokens=store.num_tokens,
        codebook_size=store.codebook_size,
        num_classes=store.num_classes,
        smoothing=settings.smoothing,
    )


@pytest.fixture
def bigram(monkeypatch: pytest.MonkeyPatch, image_root: Path) -> Settings:
    """The tables with one more family, and settings that name it over a preset of DPAR."""
    monkeypatch.setitem(FAMILIES, "bigram", BigramSettings)
    architecture = Architecture(config=BigramConfig, module=Bigram, steps=BigramSteps)
    monkeypatch.setitem(ARCHITECTURES, "bigram", architecture)
    recipe = Recipe(
        config=bigram_config,
        batches=lambda settings, store, inputs: TokenData(store),
        objective=lambda settings, model, data: Objective(model),
        pretrained=None,
    )
    monkeypatch.setitem(RECIPES, "bigram", recipe)
    training = {"steps": 2, "log_every": 1, "learning_rate": 0.5, "weight_decay": 0.0}
    changes = ["train.family=bigram", *(f"train.training.{name}={value}" for name, value in training.items())]
    return load_settings("tiny", None, [f"dataset.root={image_root}", *changes])[0]


def test_settings_and_keys_know_only_what_the_family_has(bigram: Settings) -> None:
    assert isinstance(bigram.train, BigramSettings)
    assert set(bigram.train.key_fields()) == {"family", "training", "seed", "smoothing"}
    assert set(bigram.model_dump()["train"]) == {"family", "training", "preview_every", "seed", "smoothing"}
    assert inputs_read(STAGES["train"], bigram) == ("tokenize",)
    assert bigram.sample.boundaries is None
    assert not {"patch_index", "entropy_head"} & set(inputs_read(STAGES["sample"], bigram))
    assert TrainConfig.model_validate(bigram.train.model_dump(mode="json")) == bigram.train


def test_from_loss_to_samples(bigram: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run) -> None:
    artifact = run_in_process("train", bigram.train, {"tokenize": tiny_artifacts["tokenize"]})
    lines = [json.loads(line) for line in (artifact / "record/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] == pytest.approx(math.log(CODES)), "an empty table knows nothing"
    assert losses[1] < losses[0]
    table = load_file(artifact / MODEL_FILE)["table"].double()
    assert table.shape == (CODES + 1, CODES)

    inputs = {name: tiny_artifacts[name] for name in ("tokenizer", "tokenize")} | {"train": artifact}
    store = TokenStore.of(inputs)
    sampler = Sampler.load(bigram.sample, inputs, store, torch.device("cpu"))
    found: Any = sampler.sample(np.array([5, 0]), np.array([1, 2]))
    assert found["images"].shape == (2, 32, 32, 3)
    assert found["patch_starts"].all()
    cumulative = table.softmax(-1).cumsum(-1).numpy()
    for tokens, number in zip(found["tokens"], (5, 0), strict=True):
        uniforms = stream(0, Purpose.TOKENS, number).random(TOKENS)
        rows = cumulative[[CODES, *tokens[:-1]]]
        low = np.where(tokens > 0, rows[range(TOKENS), tokens.astype(int) - 1], 0.0)
        assert (low - 1e-5 <= uniforms).all(), "each token is where its number lies in the distribution"
        assert (uniforms <= rows[range(TOKENS), tokens] + 1e-5).all()


def test_a_family_without_an_entry_in_some_table_fails_where_the_table_is_made(bigram: Settings) -> None:
    assert set(for_every_family(ARCHITECTURES)) == set(for_every_family(RECIPES)) == set(FAMILIES)
    with pytest.raises(AssertionError, match="bigram"):
        for_every_family(FAMILY_COSTS)
    with pytest.raises(TypeError, match="steps"):
        Architecture(config=BigramConfig, module=Bigram)  # type: ignore[call-arg]
