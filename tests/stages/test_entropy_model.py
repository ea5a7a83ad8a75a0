"""Stage entropy_model: weights that another run trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from conf.entropy_model import EntropyModelConfig
from conf.runtime import RuntimeConfig
from conf.schema import Settings
from conf.section import Section
from stages.entropy_model import entropy_model
from stages.runtime.artifact import file_sha256, read_json
from stages.runtime.errors import InputError
from stages.stores.tokens import TokenStore
from stages.weights.own import MODEL_FILE, load_gpt, tokenizer_sha256

Run = Callable[[str, Section, dict[str, Path]], Path]


def importing(settings: Settings, path: Path, **changes: Any) -> EntropyModelConfig:
    fields = settings.entropy_model.model_dump() | {"source": "checkpoint", "checkpoint": path} | changes
    return EntropyModelConfig.model_validate(fields)


def lines(artifact: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (artifact / "record" / "metrics.jsonl").read_text().splitlines()]


def test_imported_weights_are_kept_and_scored_on_these_tokens(
    tiny_settings: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run
) -> None:
    trained = tiny_artifacts["entropy_model"]
    config = importing(tiny_settings, trained / MODEL_FILE, dropout=0.7, training={"steps": 5})
    imported = run_in_process("entropy_model", config, tiny_artifacts)
    assert (imported / MODEL_FILE).read_bytes() == (trained / MODEL_FILE).read_bytes()
    assert tokenizer_sha256(imported / MODEL_FILE) == TokenStore.of(tiny_artifacts).facts.vq_sha256
    assert [line["heldout_loss"] for line in lines(imported)] == [lines(trained)[-1]["heldout_loss"]]
    assert read_json(imported / "record" / "source.json")["sha256"] == file_sha256(trained / MODEL_FILE)
    assert not load_gpt(imported).training


@pytest.mark.parametrize(
    ("tokenizer", "changes", "words"),
    [
        ("f" * 64, {}, "was trained on tokens of the tokenizer with sha256 f{64}, expected .* different images"),
        (
            None,
            {"model": {"dim": 64, "num_layers": 1, "num_heads": 2}},
            r"expected 64 wide .* set entropy_model\.model",
        ),
        (None, {"checkpoint": Path("none.pt")}, r"entropy_model\.checkpoint is .*/none\.pt, .* artifact's model"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(
    tiny_settings: Settings,
    tiny_artifacts: dict[str, Path],
    tmp_path: Path,
    tokenizer: str | None,
    changes: dict[str, Any],
    words: str,
) -> None:
    metadata = None if tokenizer is None else {"tokenizer_sha256": tokenizer}
    save_file(load_file(tiny_artifacts["entropy_model"] / MODEL_FILE), tmp_path / MODEL_FILE, metadata)
    config = importing(tiny_settings, tmp_path / MODEL_FILE, **changes)
    with pytest.raises(InputError, match=words) as caught:
        entropy_model(config, {"tokenize": tiny_artifacts["tokenize"]}, tmp_path / "out", RuntimeConfig(device="cpu"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_class_conditional_model_is_no_entropy_model(
    tiny_settings: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run, tmp_path: Path
) -> None:
    state = load_file(tiny_artifacts["entropy_model"] / MODEL_FILE)
    state["cls_embedding.embedding_table.weight"] = state["norm.weight"].new_zeros(4, 32)
    save_file(state, tmp_path / "c2i.safetensors")
    with pytest.raises(InputError, match="it has a class embedding, expected an entropy model, which has none"):
        run_in_process("entropy_model", importing(tiny_settings, tmp_path / "c2i.safetensors"), tiny_artifacts)


def test_the_key_of_an_import_holds_the_shape_alone(tiny_settings: Settings) -> None:
    one, other = (importing(tiny_settings, Path(name), **changes) for name, changes in (("a", {}), ("b", {"seed": 9})))
    assert one.key_fields() == other.key_fields()
    assert set(one.key_fields()) == {"source", "model"}
    assert "dropout" in tiny_settings.entropy_model.key_fields()
