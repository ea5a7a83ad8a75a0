import pytest

from pipeline.runner import tally
from pipeline.text import duration, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (11_520, "3 h 12 min"),
        (16_893_060, "4,692 h 31 min"),
    ],
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(812, "812 B"), (3_400_000, "3.4 MB"), (250_000, "250 kB"), (0, "0 B")])
def test_sizes_are_in_the_unit_that_fits(count: int, text: str) -> None:
    assert size(count) == text


def test_words_are_counted_in_their_order() -> None:
    assert tally(["cached", "made", "cached"]) == "2 cached, 1 made"
    assert tally([]) == ""
