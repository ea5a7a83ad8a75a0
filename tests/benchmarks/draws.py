"""Sampling of a token beside the same in float64 over the whole vocabulary: how often tokens differ, and the time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from report import report
from timing import interleaved
from torch import Tensor

from models.gpt import token_entropy
from models.token_sampling import SamplingOptions, sample_token
from pipeline.bench.gates import Figures, Gate, gate

sys.path.append(str(Path(__file__).parents[1]))
from reference_draw import reference_token

PLAIN = SamplingOptions()
TIMED = {
    "plain": PLAIN,
    "temperature 0.9": SamplingOptions(temperature=0.9),
    "top_k 2000": SamplingOptions(top_k=2000),
    "top_p 0.9": SamplingOptions(top_p=0.9),
    "top_k 2000, top_p 0.9": SamplingOptions(top_k=2000, top_p=0.9),
}
DIFFERING_BOUND, TIME_BOUND = 1e-4, 0.8
ROWS, TIMED_NATS = 64, 6.0
AT_ONCE = 4  # larger float64 arrays cost the reference several times as long a draw
_HALVINGS = 30


def logits_of(nats: float, rows: int, vocabulary: int) -> Tensor:
    """Normal logits (rows, vocabulary), scaled to this mean entropy."""
    logits = torch.randn(rows, vocabulary)
    low, high = 0.0, 100.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if float(token_entropy(middle * logits).mean()) < nats else (middle, high)
    return low * logits


def differing(nats: float, draws: int, vocabulary: int) -> float:
    """Share of draws whose token is not the float64 one, with logits of this entropy and float32 uniform numbers."""
    found, drawn, logits = 0, 0, logits_of(nats, ROWS, vocabulary)
    while drawn < draws:
        logits = logits.roll(1, dims=1)  # other tokens share a block, at the same entropy
        for rows in logits.split(AT_ONCE):
            uniforms = torch.rand(len(rows))
            found += int((sample_token(rows, uniforms, PLAIN) != reference_token(rows, uniforms, PLAIN)).sum())
        drawn += ROWS
    return found / drawn


def time_figures(batches: Sequence[int], vocabulary: int, rounds: int) -> Figures:
    """Microseconds of a batch of draws, and the ratio to float64's; a column for each set of options."""
    figures: Figures = {}
    for batch in batches:
        logits, uniforms = logits_of(TIMED_NATS, batch, vocabulary), torch.rand(batch)
        for name, options in TIMED.items():
            contenders = {"ours": sample_token, "float64": reference_token}
            calls = {who: partial(draw, logits, uniforms, options) for who, draw in contenders.items()}
            seconds = interleaved(calls, rounds)
            figures.setdefault(f"{name}, microseconds", {})[f"batch {batch}"] = 1e6 * seconds["ours"]
            figures.setdefault(f"{name}, time / float64's", {})[f"batch {batch}"] = seconds["ours"] / seconds["float64"]
    return figures


def gates_of(shares: dict[str, float], ratios: dict[str, float]) -> list[Gate]:
    """The mean share of tokens that differ, and the time without filters where more than one row is drawn.

    One row takes what its 30 calls of torch take, about as long as a float64 row.
    """
    mean = sum(shares.values()) / len(shares)
    return [
        gate("tokens that float64 draws otherwise, share", mean, "<", DIFFERING_BOUND),
        *(
            gate(f"a draw / float64's, time, {batch}", ratio, "<", TIME_BOUND)
            for batch, ratio in ratios.items()
            if batch != "batch 1"
        ),
    ]


@torch.inference_mode()
def main() -> None:
    """Measure and print what was found."""
    parser = argparse.ArgumentParser(description="Sampling of a token beside float64.")
    parser.add_argument("--draws", type=int, default=1_000_000, help="In all, equally many at each entropy.")
    parser.add_argument("--entropies", type=float, nargs="+", default=[1, 2, 3, 4, 5, 6, 7, 8, 9], metavar="NATS")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    torch.manual_seed(0)
    each = -(-options.draws // len(options.entropies))
    shares = {f"entropy {nats:g} nats": differing(nats, each, options.vocabulary) for nats in options.entropies}
    figures = time_figures(options.batches, options.vocabulary, options.rounds)
    gates = gates_of(shares, figures["plain, time / float64's"])
    report(gates, {"tokens that float64 draws otherwise, share": shares} | figures)


if __name__ == "__main__":
    main()
