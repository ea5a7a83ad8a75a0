"""Pictures, pixel by pixel: where outlines lie, which colours stand for which entropies, what stands in which place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageDraw

from stages.views.pictures import captioned_grid, enlarged, patch_picture, patches_outlined, sample_grid

RED, GREY, WHITE, NO_PREDICTION = (214, 39, 40), (200, 200, 200), (255, 255, 255), (200, 200, 200)
LOWEST, HIGHEST = (68, 1, 84), (253, 231, 37)
Texts = list[tuple[str, float]]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Texts]:
    """What is written into pictures, with the size of the letters."""
    written: Texts = []
    write = ImageDraw.ImageDraw.text

    def remember(pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, **options: object) -> None:
        written.append((text, options["font"].size))  # type: ignore[attr-defined]
        write(pen, place, text, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", remember)
    return written


def plain(colour: tuple[int, int, int], side: int = 8) -> np.ndarray:
    return np.full((side, side, 3), colour, np.uint8)


def patch_numbers(starts: np.ndarray, grid: int) -> list[list[int]]:
    """The patch of each token, row by row."""
    number, numbers = 0, []
    for start in starts:
        number += bool(start)
        numbers.append(number)
    return [numbers[row * grid : (row + 1) * grid] for row in range(grid)]


@pytest.mark.parametrize("grid", [4, 5, 8])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_outlines_lie_between_tokens_of_different_patches_and_nowhere_else(grid: int, share: float) -> None:
    starts = np.random.default_rng(grid).random(grid * grid) < share
    starts[0] = True
    picture = np.asarray(patches_outlined(plain(WHITE), starts, grid))
    assert picture.shape == (192, 192, 3)
    is_red, token, patch = (picture == RED).all(axis=-1), 192 / grid, patch_numbers(starts, grid)
    assert ((picture == WHITE).all(axis=-1) | is_red).all()
    near = 4  # a line is at most so thick
    for row, column in itertools.product(range(grid), range(grid)):
        top, left = round(row * token), round(column * token)
        bottom, right = round((row + 1) * token), round((column + 1) * token)
        assert not is_red[top + near : bottom - near, left + near : right - near].any(), "inside of a token"
        if column + 1 < grid:
            edge = is_red[top + near : bottom - near, right - near : right + near]
            assert edge.any(axis=1).all() if patch[row][column] != patch[row][column + 1] else not edge.any()
        if row + 1 < grid:
            edge = is_red[bottom - near : bottom + near, left + near : right - near]
            assert edge.any(axis=0).all() if patch[row][column] != patch[row + 1][column] else not edge.any()
    for side in (is_red[0], is_red[-1], is_red[:, 0], is_red[:, -1]):
        assert side.all(), "a frame around everything"


def test_what_is_outlined_is_faded() -> None:
    starts = np.eye(1, 16, dtype=bool)[0]
    picture = patches_outlined(plain((0, 100, 200)), starts, 4)
    found = np.array(picture.getpixel((96, 96)))
    assert np.abs(found - (0.65 * np.array([0, 100, 200]) + 0.35 * 255)).max() <= 1


@pytest.mark.parametrize(("side", "wanted"), [(8, 192), (32, 192), (100, 200), (192, 192), (256, 256)])
def test_an_image_is_enlarged_by_a_whole_number_until_it_can_be_seen(side: int, wanted: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    found = np.asarray(enlarged(image))
    assert found.shape == (wanted, wanted, 3)
    times = wanted // side
    assert np.array_equal(found, image.repeat(times, axis=0).repeat(times, axis=1)), "pixels stay squares"


SIDE, MARGIN, HEAD, STEP, ROW_STEP = 4 * 24, 6, 15 + 12, 96 + 12, 96 + 13 + 12  # of a patch picture of 4 x 4 tokens


def shown(picture: Image.Image, row: int, column: int) -> np.ndarray:
    """One square of a patch picture."""
    top, left = HEAD + row * ROW_STEP, MARGIN + column * STEP
    return np.asarray(picture)[top : top + SIDE, left : left + SIDE]


def entropies() -> np.ndarray:
    """Of two images of 16 tokens: the highest is the last of the second, the lowest the one after the first."""
    values = np.linspace(1.0, 3.0, 32, dtype=np.float32).reshape(2, 16)
    values[0, 1], values[1, 0] = 0.5, 9.0
    return values


def test_the_heat_map_goes_from_the_lowest_to_the_highest_entropy_of_all_images(texts: Texts) -> None:
    starts = np.ones((2, 16), dtype=bool)
    picture = patch_picture(np.stack([plain(WHITE)] * 2), starts, entropies(), 4)
    first, second = (shown(picture, row, 2)[12::24, 12::24].reshape(16, 3) for row in range(2))
    assert tuple(first[0]) == tuple(second[0]) == NO_PREDICTION
    assert tuple(first[1]) == LOWEST
    assert tuple(second[15]) == HIGHEST
    assert HIGHEST not in {tuple(colour) for colour in first}
    brightness = second[1:].astype(int).sum(axis=1)
    assert (np.diff(brightness) > 0).all(), "lighter where it is higher"
    for row, squares in ((0, first), (1, second)):
        assert np.array_equal(shown(picture, row, 2), squares.reshape(4, 4, 3).repeat(24, axis=0).repeat(24, axis=1))
    bar = np.asarray(picture)[HEAD : HEAD + SIDE, MARGIN + 3 * STEP + 2]
    assert (tuple(bar[0]), tuple(bar[-1])) == (HIGHEST, LOWEST)
    assert [text for text, _ in texts][-3:] == ["0.5", "1.8", "3.0"]


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (4.14, 4.17, ["4.140", "4.155", "4.170"]),
        (2.0, 2.5, ["2.00", "2.25", "2.50"]),
        (0.0, 9.7, ["0.0", "4.8", "9.7"]),
        (4.0, 4.0, ["4.000"] * 3),
    ],
)
def test_the_labels_of_the_scale_differ(texts: Texts, low: float, high: float, labels: list[str]) -> None:
    values = np.linspace(low, high, 16, dtype=np.float32)[None]
    values[0, 1] = low
    patch_picture(plain(WHITE)[None], np.ones((1, 16), dtype=bool), values, 4)
    assert [text for text, _ in texts][-3:] == labels


def test_a_patch_picture_shows_the_image_and_its_patches_beside_each_other(texts: Texts) -> None:
    images = np.stack([plain((0, 100, 200)), plain((10, 20, 30))])
    starts = np.zeros((2, 16), dtype=bool)
    starts[:, 0], starts[1, ::2] = True, True
    picture = patch_picture(images, starts, None, 4)
    for row, image in enumerate(images):
        assert (shown(picture, row, 0) == image[0, 0]).all()
        assert (shown(picture, row, 1)[0] == RED).all()
    assert (np.asarray(picture)[HEAD - 1, MARGIN : MARGIN + SIDE] == GREY).all(), "a frame, as an image may be white"
    assert picture.width == 2 * STEP + MARGIN, "no place for entropies that there are not"
    assert [text for text, _ in texts] == [
        *("image", "patches"),
        *("1 patches, mean length 16.00", "8 patches, mean length 2.00"),
    ]


def test_pictures_stand_in_a_grid_row_by_row() -> None:
    colours = [(40 * number, 0, 90) for number in range(5)]
    picture = captioned_grid([Image.new("RGB", (50, 30), colour) for colour in colours], [""] * 5, columns=2)
    pixels = np.asarray(picture)
    assert picture.size == (2 * (50 + 6) + 6, 3 * (30 + 13 + 12) + 6)
    for number, colour in enumerate(colours):
        top, left = 6 + number // 2 * (30 + 13 + 12), 6 + number % 2 * (50 + 6)
        assert (pixels[top : top + 30, left : left + 50] == colour).all()
        around = pixels[top - 1 : top + 31, left - 1 : left + 51].copy()
        around[1:-1, 1:-1] = GREY
        assert (around == GREY).all(), "a frame, as a picture may be white"
    last = pixels[6 + 2 * 55 - 1 :, 6 + 56 - 1 :]
    assert (last == WHITE).all(), "the sixth place stays empty"


def test_a_long_caption_shrinks_until_it_fits_below_its_picture(texts: Texts) -> None:
    pictures = [Image.new("RGB", (100, 20), (0, 0, 90))] * 2
    pixels = np.asarray(captioned_grid(pictures, ["a dog", "a caption of many words"], columns=2))
    (short, large), (long, small) = texts
    assert (short, long) == ("a dog", "a caption of many words")
    assert large == 13
    assert 7 <= small < 13
    below = pixels[6 + 20 + 1 :].min(axis=-1)
    ink = np.flatnonzero((below < 150).any(axis=0))
    assert ink.max() < 6 + 106 + 100, "it ends with its picture"
    assert not (below[:, 6 + 100 : 6 + 106] < 150).any(), "nothing between the two"


def test_a_row_of_samples_for_each_class(texts: Texts) -> None:
    samples = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    picture = sample_grid({"cat": samples[:3], "none": samples[:0], "a bird": samples[3:]}, image_size=16, columns=2)
    pixels, step = np.asarray(picture), 3 * 16 + 6
    left = picture.width - 2 * step
    assert picture.height == 3 * step + 6
    for row, column, image in ((0, 0, samples[0]), (0, 1, samples[1]), (2, 0, samples[3])):
        top, begin = 6 + row * step, left + column * step
        assert np.array_equal(pixels[top : top + 48 : 3, begin : begin + 48 : 3], image)
    assert (pixels[6 + step : 2 * step, left:] == WHITE).all(), "a class without samples"
    assert [text for text, _ in texts] == ["cat", "none", "a bird"]
    assert (pixels[:, left - 3 : left - 1] == WHITE).all(), "names end before the images"


def test_large_samples_keep_their_size() -> None:
    samples = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), dtype=np.uint8)
    picture = sample_grid({"cat": samples}, image_size=256, columns=1)
    left = picture.width - 262
    assert np.array_equal(np.asarray(picture)[6 : 6 + 256, left : left + 256], samples[0])


@pytest.mark.parametrize(
    "name", ["[red]b[/red]", "<b>", ":smile:", "two\nlines", "\x1b[31m", "W" * 255, "名前", "$x^2$", " "]
)
def test_any_name_of_a_class_is_drawn_in_one_line_and_bounded_space(name: str) -> None:
    samples = np.zeros((1, 16, 16, 3), dtype=np.uint8)
    picture = sample_grid({name: samples, "cat": samples}, image_size=16, columns=1)
    assert picture.height == 2 * (3 * 16 + 6) + 6
    assert picture.width < 30 * 14 + 3 * 6 + 54 + 6
    assert captioned_grid([Image.new("RGB", (100, 20))], [name], columns=1).size == (112, 20 + 13 + 12 + 6)


def test_the_end_of_a_caption_that_never_fits_is_cut_off(texts: Texts) -> None:
    captioned_grid([Image.new("RGB", (100, 20))], ["n" * 255], columns=1)
    ((text, size),) = texts
    assert size == 7
    assert text == "n" * (len(text) - 3) + "..."
