"""Sampling of a token: the distribution, the filters, agreement with float64, hostile rows, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_draw import reference_token
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.token_sampling import BLOCK, SamplingOptions, sample_token

PLAIN = SamplingOptions()
LARGEST = 1 - 2**-24  # the largest float32 below 1
ROUNDING = 2e-6
"""How far from the end of its interval a uniform number may lie where the token differs from float64's."""


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def check_agrees(logits: Tensor, uniforms: Tensor, options: SamplingOptions) -> Tensor:
    """The tokens, after a check that float64 gives them too, for uniform numbers within rounding of these.

    The token of a row grows with the uniform number. So it must lie between those of a slightly smaller and of a
    slightly larger one.
    """
    tokens = sample_token(logits, uniforms, options)
    assert tokens.dtype == torch.int64
    wide = uniforms.double()
    first = reference_token(logits, (wide - ROUNDING).clamp(min=0), options)
    last = reference_token(logits, (wide + ROUNDING).clamp(max=1 - 2**-53), options)
    assert ((first <= tokens) & (tokens <= last)).all()
    return tokens


def support(logits: Tensor, options: SamplingOptions) -> list[int]:
    """Tokens that are drawn for some uniform number."""
    uniforms = torch.linspace(0, LARGEST, 1000)
    return sorted(set(sample_token(logits.expand(1000, -1), uniforms, options).tolist()))


def test_a_uniform_number_draws_the_token_whose_interval_it_falls_in() -> None:
    probabilities = torch.tensor([0.25, 0.0, 0.5, 0.25])
    uniforms = torch.tensor([0.0, 0.2, 0.25, 0.5, 0.74, 0.76, LARGEST])
    logits = probabilities.log().expand(len(uniforms), -1)
    assert sample_token(logits, uniforms, PLAIN).tolist() == [0, 0, 2, 2, 2, 3, 3]


def test_drawn_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
    uniforms = (torch.arange(20_000) + 0.5) / 20_000
    tokens = sample_token(logits.expand(20_000, -1), uniforms, SamplingOptions(temperature=0.7))
    found = torch.bincount(tokens, minlength=4)
    torch.testing.assert_close(found / 20_000, (logits / 0.7).softmax(-1), atol=2e-4, rtol=0)


def test_of_evenly_spread_uniform_numbers_each_token_of_many_blocks_gets_its_share() -> None:
    vocabulary, draws = 500, 5000
    logits = 2.0 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))
    tokens = sample_token(logits.expand(draws, -1), (torch.arange(draws) + 0.5) / draws, PLAIN)
    expected = draws * logits.double().softmax(-1)
    assert ((torch.bincount(tokens, minlength=vocabulary) - expected).abs() < 1.1).all()


def test_random_draws_pass_a_chi_square_test() -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary, draws = 200, 20_000
    logits = torch.randn(vocabulary, generator=generator)
    tokens = sample_token(logits.expand(draws, -1), torch.rand(draws, generator=generator), PLAIN)
    expected = draws * logits.double().softmax(-1)
    statistic = float(((torch.bincount(tokens, minlength=vocabulary) - expected) ** 2 / expected).sum())
    freedom = vocabulary - 1
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5  # mean and standard deviation of the statistic


@pytest.mark.parametrize("vocabulary", [5, 64, BLOCK, BLOCK + 1, 1000, 16384])
@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "rounded to bfloat16"])
def test_tokens_are_those_of_float64_for_all_options(vocabulary: int, rounded: bool) -> None:
    """Logits that are rounded to bfloat16, as models make them, have many ties."""
    generator = torch.Generator().manual_seed(vocabulary)
    rows, differing, drawn = 8 if vocabulary > 1000 else 32, 0, 0
    for temperature, top_k, top_p, scale in product((1.0, 0.7), (0, 1, 3, 2000), (1.0, 0.9), (0.5, 3.0, 12.0)):
        options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
        logits = scale * torch.randn(rows, vocabulary, generator=generator)
        logits = logits.bfloat16().float() if rounded else logits
        uniforms = torch.rand(rows, generator=generator)
        tokens = check_agrees(logits, uniforms, options)
        differing += int((tokens != reference_token(logits, uniforms, options)).sum())
        drawn += rows
    assert differing <= 1e-3 * drawn


def test_logits_in_bfloat16_are_drawn_in_float32() -> None:
    logits = torch.randn(200, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    uniforms = torch.rand(200, generator=torch.Generator().manual_seed(1))
    check_agrees(logits, uniforms, PLAIN)
    assert torch.equal(sample_token(logits, uniforms, PLAIN), sample_token(logits.float(), uniforms, PLAIN))


def test_rows_that_lie_apart_in_memory_are_drawn_as_others_are() -> None:
    logits, uniforms = torch.randn(1024, 6), torch.rand(3, 6)[1]
    for rows in (logits.t(), torch.randn(6, 2048)[:, ::2], torch.randn(12, 1024)[::2]):
        for options in (PLAIN, SamplingOptions(top_k=5, top_p=0.7)):
            expected = sample_token(rows.contiguous(), uniforms, options)
            assert torch.equal(sample_token(rows, uniforms, options), expected)


def test_a_temperature_of_zero_draws_the_likeliest_token() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    tokens = check_agrees(logits, torch.linspace(0, LARGEST, 50), SamplingOptions(temperature=0.0))
    assert torch.equal(tokens, logits.argmax(dim=1))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (SamplingOptions(top_k=2), [1, 3]),
        (SamplingOptions(top_k=9), [0, 1, 2, 3]),
        (SamplingOptions(top_p=0.4), [1]),  # the likeliest stays although it alone exceeds p
        (SamplingOptions(top_p=0.6), [1, 3]),  # the one that reaches p stays
        (SamplingOptions(top_p=0.9), [0, 1, 3]),
        (SamplingOptions(top_k=3, top_p=0.6), [1, 3]),
    ],
)
def test_filters_keep_the_likeliest_tokens(options: SamplingOptions, kept: list[int]) -> None:
    assert support(torch.tensor([0.15, 0.5, 0.05, 0.3]).log(), options) == kept


def test_all_tokens_that_equal_the_kth_are_kept() -> None:
    logits = torch.full((400,), -1.0)
    logits[[7, 200, 201, 399]] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert support(logits, SamplingOptions(top_k=2)) == [7, 200, 201, 399]
    assert support(logits, SamplingOptions(top_k=1)) == [7]


def test_of_equally_likely_tokens_top_p_keeps_as_many_as_reach_p() -> None:
    assert len(support(torch.zeros(400), SamplingOptions(top_p=0.011))) == 5  # four have the probability 0.01


@settings(max_examples=100)
@given(
    vocabulary=st.sampled_from([1, 2, 5, 64, 127, 128, 129, 256, 1000]),
    uniform=st.sampled_from([0.0, 2**-24, 0.5, LARGEST]) | st.floats(0, LARGEST, width=32),
    options=st.builds(
        SamplingOptions, top_k=st.integers(0, 4), top_p=st.sampled_from([1.0, 0.5]), temperature=st.sampled_from([1, 3])
    ),
    data=st.data(),
)
def test_only_tokens_of_nonzero_probability_are_drawn(
    vocabulary: int, uniform: float, options: SamplingOptions, data: Any
) -> None:
    """Few tokens are possible, anywhere; one may outweigh the others by far."""
    places = data.draw(st.sets(st.integers(0, vocabulary - 1), min_size=1, max_size=4), label="possible tokens")
    logits = torch.full((1, vocabulary), -torch.inf)
    for place in places:
        logits[0, place] = data.draw(st.floats(-60, 60, width=32), label="logit")
    token = int(check_agrees(logits, torch.tensor([uniform]), options))
    assert token in places


@pytest.mark.parametrize("vocabulary", [5, 1000, 16384])
def test_the_smallest_and_the_largest_uniform_number_draw_the_first_and_the_last_possible_token(
    vocabulary: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, vocabulary, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < torch.rand(200, 1, generator=generator)] = -torch.inf
    logits[:, vocabulary // 2] = 3.0
    possible = logits.isfinite().long()
    first = sample_token(logits, torch.zeros(200), PLAIN)
    assert torch.equal(first, possible.argmax(dim=1))
    last = sample_token(logits, torch.full((200,), 1 - 2**-53, dtype=torch.float64), PLAIN)
    assert torch.equal(last, vocabulary - 1 - possible.flip(1).argmax(dim=1))


def test_at_the_edge_of_a_block_rounding_draws_no_token_of_zero_probability() -> None:
    """Each block has one possible token, in its middle; uniform numbers lie within a few roundings of block edges."""
    num_blocks, roundings = 40, range(-3, 4)
    logits = torch.full((num_blocks, BLOCK), -torch.inf)
    logits[:, BLOCK // 2] = 10 * torch.randn(num_blocks, generator=torch.Generator().manual_seed(0))
    edges = logits.flatten().softmax(-1).view(num_blocks, BLOCK).sum(-1).double().cumsum(0)
    uniforms = torch.cat([edges / edges[-1] + rounding * 2**-53 for rounding in roundings]).clamp(0, 1 - 2**-53)
    tokens = sample_token(logits.view(1, -1).expand(len(uniforms), -1), uniforms, PLAIN)
    assert (tokens % BLOCK == BLOCK // 2).all()


@pytest.mark.parametrize("vocabulary", [5, 1000, 1024])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf])
def test_a_row_without_a_distribution_gives_some_token_and_leaves_other_rows_alone(
    vocabulary: int, value: float
) -> None:
    """Slots without an image have such rows, and an index outside of the vocabulary would end a CUDA process."""
    logits, uniforms = torch.randn(4, vocabulary), torch.tensor([0.0, 0.3, 0.6, LARGEST])
    expected = sample_token(logits, uniforms, PLAIN)
    logits[[0, 3]] = value
    for options in (PLAIN, SamplingOptions(top_k=3), SamplingOptions(top_p=0.5), SamplingOptions(temperature=0.5)):
        tokens = sample_token(logits, uniforms, options)
        assert ((tokens >= 0) & (tokens < vocabulary)).all()
    assert torch.equal(sample_token(logits, uniforms, PLAIN)[1:3], expected[1:3])


@pytest.mark.parametrize("options", [PLAIN, SamplingOptions(top_k=50), SamplingOptions(temperature=0.9, top_p=0.8)])
def test_a_row_gives_the_same_token_in_every_batch(options: SamplingOptions) -> None:
    logits, uniforms = 2 * torch.randn(70, 16384), torch.rand(70)
    whole = sample_token(logits, uniforms, options)
    for size in (1, 3, 16):
        parts = zip(logits.split(size), uniforms.split(size), strict=True)
        assert torch.equal(torch.cat([sample_token(*part, options) for part in parts]), whole)


class Recorded(TorchDispatchMode):
    """Records the names of operations, and the elements of the largest float64 tensor that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        for made in result if isinstance(result, tuple) else (result,):
            if made.dtype == torch.float64:
                self.largest = max(self.largest, made.numel())
        return result


def test_without_filters_nothing_is_sorted_and_no_float64_row_is_as_long_as_the_vocabulary() -> None:
    logits, uniforms = torch.randn(3, 16384), torch.rand(3)
    with Recorded() as plain:
        sample_token(logits, uniforms, PLAIN)
    assert not {"sort", "topk"} & set(plain.names)
    assert plain.largest <= 3 * BLOCK
    with Recorded() as filtered:
        sample_token(logits, uniforms, SamplingOptions(top_k=9, top_p=0.5))
    assert {"sort", "topk"} <= set(filtered.names)
    assert filtered.largest <= 3 * BLOCK
