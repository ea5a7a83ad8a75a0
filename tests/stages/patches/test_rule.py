"""The saved rule and the calibration come back exactly, and damaged files are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.patching import PatchRule
from stages.patches.calibration import ENTROPIES_FILE, THRESHOLDS_FILE, SourceEntropies, Thresholds
from stages.patches.rule import RULE_FILE, IndexRule, SavedRule
from stages.runtime.artifact import read_json
from stages.runtime.errors import ArtifactError, InputError

THRESHOLD = float(np.float32(0.1))


def test_a_rule_by_entropy_comes_back_exactly(tmp_path: Path) -> None:
    rule = PatchRule(threshold=THRESHOLD, max_length=None, row_boundary=True, grid=16)
    SavedRule.save(tmp_path, IndexRule.by_entropy(rule), 1.81)
    saved = SavedRule.of({"patch_index": tmp_path})
    assert (saved.mode, saved.mean_length, saved.static_length) == ("entropy", 1.81, None)
    assert saved.patch_rule(16) == rule
    assert read_json(tmp_path / RULE_FILE) == {
        "mode": "entropy",
        "threshold": 0.10000000149011612,
        "threshold_hex": "0x1.99999a0000000p-4",
        "max_length": None,
        "row_boundary": True,
        "static_length": None,
        "mean_length": 1.81,
    }


def test_static_patches_have_a_length_and_no_threshold(tmp_path: Path) -> None:
    SavedRule.save(tmp_path, IndexRule.static(1.75), 1.7534)
    saved = SavedRule.of({"patch_index": tmp_path})
    assert (saved.mode, saved.static_length, saved.mean_length) == ("static", 1.75, 1.7534)
    with pytest.raises(ValueError, match="mode static and no threshold"):
        saved.patch_rule(16)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"mode": "entropy"}', '{"threshold_hex": null, "mode": "static"}'])
def test_a_damaged_rule_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / RULE_FILE).write_text(text)
    with pytest.raises(ArtifactError, match=r"rule\.json is missing or damaged .*run the patch_index stage again"):
        SavedRule.of({"patch_index": tmp_path})


def test_thresholds_and_entropies_come_back_exactly(tmp_path: Path) -> None:
    inputs = {"entropy_head": tmp_path}
    Thresholds({"own_entropy": THRESHOLD}).save(tmp_path)
    assert Thresholds.of(inputs)["own_entropy"] == THRESHOLD
    with pytest.raises(InputError, match=r"sample\.boundaries is entropy_head, expected own_entropy"):
        Thresholds.of(inputs)["entropy_head"]
    values = np.random.default_rng(0).random((3, 16), dtype=np.float32)
    SourceEntropies({"own_entropy": values}).save(tmp_path)
    assert np.array_equal(SourceEntropies.of(inputs).by_source["own_entropy"], values)
    (tmp_path / THRESHOLDS_FILE).write_text("3")
    (tmp_path / ENTROPIES_FILE).write_bytes(b"torn")
    for damaged in (Thresholds, SourceEntropies):
        with pytest.raises(ArtifactError, match=r"is missing or damaged .*run the entropy_head stage again"):
            damaged.of(inputs)
