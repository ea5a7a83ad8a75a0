"""MACs counted in the real modules, compared with the paper's numbers."""

from __future__ import annotations

import pytest

from pipeline.bench.macs import MODELS, PAPER_GMACS, CostRow, measure, sampling_costs
from stages.runtime.errors import InputError

Rows = dict[tuple[str, int], CostRow]
PAIRS = [(name, size) for name, size in PAPER_GMACS if name.startswith("dpar-")]
REDUCTION = {
    ("dpar-B", 256): 23.1,
    ("dpar-L", 256): 31.9,
    ("dpar-XL", 256): 34.9,
    ("dpar-B", 384): 27.2,
    ("dpar-L", 384): 37.1,
    ("dpar-XL", 384): 40.4,
    ("dpar-XXL", 384): 42.4,
}
"""The paper's last column, percent."""
SAVED_B = {"static": 27.7, "entropy_head": 27.2, "entropy_model": -22.1, "own_entropy": 8.7}
SAVED_XL = {"static": 36.7, "entropy_head": 36.6, "entropy_model": 30.2, "own_entropy": 27.7}


@pytest.fixture(scope="module")
def paper_rows() -> Rows:
    return {(row.model, row.image_size): row for row in measure()}


@pytest.mark.slow
def test_by_default_every_number_of_the_paper_is_counted(paper_rows: Rows) -> None:
    assert list(paper_rows) == list(PAPER_GMACS)
    assert len(PAIRS) == 7


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), PAPER_GMACS)
def test_the_forward_costs_what_the_paper_says(paper_rows: Rows, name: str, size: int) -> None:
    bound = 0.5 if name.endswith("XL") else 0.1
    difference = paper_rows[name, size].paper_difference_percent
    assert difference is not None
    assert abs(difference) <= bound


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), PAIRS)
def test_what_dpar_saves_is_what_the_paper_says(paper_rows: Rows, name: str, size: int) -> None:
    bound = 0.4 if name.endswith("XL") else 0.2  # DPAR's and LlamaGen's bounds above of what is left, and a rounding
    assert paper_rows[name, size].saved_percent == pytest.approx(REDUCTION[name, size], abs=bound)


@pytest.mark.slow
def test_only_the_entropy_model_costs_more_than_the_smallest_dpar_saves_in_sampling(paper_rows: Rows) -> None:
    saved = {
        pair: {cost.boundaries: cost.saved_percent for cost in sampling_costs(paper_rows[pair])}
        for pair in (("dpar-B", 256), ("dpar-XL", 256))
    }
    smallest, larger = (pytest.approx(figures, abs=0.1) for figures in (SAVED_B, SAVED_XL))
    assert saved == {("dpar-B", 256): smallest, ("dpar-XL", 256): larger}


@pytest.mark.slow
def test_layers_are_called_for_tokens_or_for_patches(paper_rows: Rows) -> None:
    patches = 256 / 1.81  # with the class and without the last, which is not closed
    llamagen, dpar = (sampling_costs(paper_rows[name, 256]) for name in ("llamagen-L", "dpar-L"))
    assert [cost.layer_calls for cost in llamagen] == [256 * 24]
    alone = 256 * (1 + 4) + patches * 19
    assert {cost.boundaries: cost.layer_calls for cost in dpar} == {
        "static": pytest.approx(alone),
        "entropy_head": pytest.approx(alone + 255),
        "entropy_model": pytest.approx(alone + 255 * 12),
        "own_entropy": pytest.approx(alone + (patches - 1) * 4),
    }


@pytest.mark.slow
@pytest.mark.parametrize("size", [256, 384])
def test_next_patch_prediction_saves_three_eighths_of_llamagens_training_and_no_sampling(size: int) -> None:
    (row,) = measure(["npp-B"], [size])
    assert row.saved_percent == pytest.approx(37.5)
    assert (row.paper_gmacs, row.patches) == (None, None)
    (sampling,) = sampling_costs(row)
    assert (sampling.boundaries, sampling.saved_percent) == (None, 0.0)


def test_next_patch_prediction_needs_whole_blocks() -> None:
    with pytest.raises(InputError, match="image size is 48, expected a multiple of 32 pixels for NPP"):
        measure(["npp-T"], [48])


@pytest.mark.slow
def test_the_papers_number_is_shown_only_at_its_own_patch_length() -> None:
    given, own = (measure(["dpar-B"], [256], length)[0] for length in (2.5, 1.81))
    assert given.paper_gmacs is None
    assert given.paper_difference_percent is None
    assert own.paper_gmacs == 19.21
    assert given.cost.forward.linear < own.cost.forward.linear


@pytest.mark.slow
def test_a_model_alone_is_counted_at_the_papers_sizes() -> None:
    rows = measure(["llamagen-T", "dpar-B", "llamagen-T"])
    assert [(row.model, row.image_size) for row in rows] == [
        ("llamagen-T", 256),
        ("dpar-B", 256),
        ("llamagen-T", 384),
        ("dpar-B", 384),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpar-L-E2D3", "dpar-L-E3D2", "dpar-L-E4D1"])
def test_variants_are_held_against_llamagen_of_their_size(name: str) -> None:
    assert name in MODELS
    (row,) = measure([name], [128])
    assert row.llamagen is not None
    assert row.llamagen.parameters == 342_910_976


def test_an_image_size_without_a_known_patch_length_needs_one_for_dpar_alone() -> None:
    assert measure(["llamagen-T"], [64])[0].cost.forward.linear > 0
    with pytest.raises(InputError, match=r"mean patch length at 64 pixels is not known, .*--mean-length"):
        measure(["dpar-B"], [64])
