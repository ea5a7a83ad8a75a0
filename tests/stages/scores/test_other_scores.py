"""Inception score, precision and recall, unigram: closed forms, brute force and known traps."""

from __future__ import annotations

import numpy as np
import pytest

from stages.scores.inception_score import inception_score
from stages.scores.precision_recall import precision_recall
from stages.scores.unigram import best_unigram_loss, sample_marginals

RNG = np.random.default_rng(0)


def test_certain_and_even_classes_give_their_number_and_uncertain_ones_one() -> None:
    sure = np.where(np.eye(10)[np.arange(1000) % 10] > 0, 0.0, -1e4)
    assert inception_score(sure, splits=1)[0] == pytest.approx(10, rel=1e-9)
    assert inception_score(np.zeros((100, 10)), splits=1)[0] == pytest.approx(1, abs=1e-12)


def test_half_sure_classes_have_a_closed_form() -> None:
    share, classes = 0.6, 1000
    p = np.full((classes, classes), (1 - share) / (classes - 1))
    np.fill_diagonal(p, share)
    entropy = -share * np.log(share) - (1 - share) * np.log((1 - share) / (classes - 1))
    assert inception_score(np.log(p), splits=1)[0] == pytest.approx(classes * np.exp(-entropy), rel=1e-9)
    assert classes * np.exp(-entropy) == pytest.approx(32.2024230755763, rel=1e-3)


def test_samples_sorted_by_class_score_as_shuffled_ones_do() -> None:
    labels = np.repeat(np.arange(20), 100)
    logits = np.where(np.eye(20)[labels] > 0, 3.0, 0.0)
    whole = inception_score(logits, splits=1)[0]
    split = inception_score(logits, splits=10)[0]
    assert split == pytest.approx(whole, rel=0.1)  # unshuffled parts would hold two classes each
    with pytest.raises(ValueError, match="3 splits of 2 samples"):
        inception_score(logits[:2], splits=3)


def brute_force(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    def inside(points: np.ndarray, centres: np.ndarray) -> float:
        hits = 0
        for point in points:
            for centre in centres:
                radius = sorted(((centre - other) ** 2).sum() for other in centres)[k]
                if ((point - centre) ** 2).sum() <= radius:
                    hits += 1
                    break
        return hits / len(points)

    return inside(generated, real), inside(real, generated)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_precision_and_recall_are_their_definition(offset: float) -> None:
    real = RNG.normal(size=(40, 4)) + offset
    generated = RNG.normal(size=(30, 4)) * 0.7 + 0.5 + offset
    assert precision_recall(real, generated, neighbours=3) == pytest.approx(brute_force(real, generated, 3))


def test_a_collapsed_generator_is_precise_and_recalls_nothing() -> None:
    real = RNG.normal(size=(200, 8))
    collapsed = real[:1] + RNG.normal(size=(200, 8)) * 1e-3
    precision, recall = precision_recall(real, collapsed, neighbours=3)
    assert precision == 1.0
    assert recall <= 0.01
    assert precision_recall(real, real + 100.0, neighbours=3) == (0.0, 0.0)
    with pytest.raises(ValueError, match="more than 3 neighbours"):
        precision_recall(real, real[:3], neighbours=3)


def test_the_unigram_loss_of_skewed_tokens_is_their_entropy() -> None:
    p = np.array([0.5, 0.25, 0.125, 0.125])
    train = RNG.choice(4, size=(20_000, 3), p=p)
    heldout = RNG.choice(4, size=(20_000, 3), p=p)
    blocks = [train[:7000], train[7000:]]
    assert best_unigram_loss(blocks, [heldout], 4) == pytest.approx(-(p * np.log(p)).sum(), abs=0.01)
    train[:, 0], heldout[:, 0] = 1, 1
    assert best_unigram_loss(blocks, [heldout], 4) < best_unigram_loss(
        [train], [heldout[:5], heldout[5:]], 4, first_position=1
    )


def test_marginal_samples_keep_each_positions_distribution_and_break_what_joins_them() -> None:
    train = np.repeat(np.array([[0, 0, 5], [1, 1, 5]]), 500, axis=0)
    drawn = sample_marginals([train[:300], train[300:]], 1000, 3, 4000, seed=0)
    assert (drawn[:, 2] == 5).all()
    assert abs(drawn[:, 0].mean() - 0.5) < 0.05
    assert abs((drawn[:, 0] == drawn[:, 1]).mean() - 0.5) < 0.05
    assert np.array_equal(drawn, sample_marginals([train], 1000, 3, 4000, seed=0))
