"""Sizes that the settings and the number of images decide: images, views, tokens, classes, patches."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import Settings
from models.config import DPARSize, GPTSize
from pipeline.bench.family_costs import EXTRAPOLATED_LENGTHS, FAMILY_COSTS, PAPER_LENGTHS
from stages.images.decode import view_names

_USUAL_LENGTH = 1.81  # tokens, the paper's at 256 px


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenShape:
    """Tokens of an image as models know them."""

    codebook_size: int
    num_tokens: int
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a run.

    Attributes:
        images: Images of the data set.
        origin: Where their number is from, in words.
        heldout: Images that are held out.
        views: Views of each image.
        tokens: Tokens of a view.
        mean_length: Mean patch length, tokens.
        length_origin: Where the mean length is from, in words.
    """

    images: int
    origin: str
    heldout: int
    views: int
    tokens: TokenShape
    mean_length: float
    length_origin: str

    @property
    def train_images(self) -> int:
        """Images that models are trained on."""
        return self.images - self.heldout

    @property
    def num_views(self) -> int:
        """Views of all images."""
        return self.images * self.views

    def reference_images(self, settings: Settings) -> int:
        """Training images that samples are compared with."""
        return min(self.train_images, settings.evaluate.max_reference or self.train_images)

    def ladder_images(self, settings: Settings) -> int:
        """Images of the ladder's rungs besides the samples, four of equal size."""
        return 4 * self.rung_images(settings)

    def rung_images(self, settings: Settings) -> int:
        """Images of one rung of the ladder."""
        return min(self.heldout, settings.sample.num_samples) if settings.evaluate.ladder else 0


def shape_of(settings: Settings, images: int, num_classes: int, origin: str) -> Shape:
    """Sizes of a run over some number of images, known from `origin`."""
    grid = settings.tokenize.image_size // settings.tokenizer.model.downsample
    length, length_origin = _mean_length(settings)
    return Shape(
        images=images,
        origin=origin,
        heldout=round(images * settings.dataset.heldout_fraction),
        views=len(view_names(settings.tokenize.views)),
        tokens=TokenShape(
            codebook_size=settings.tokenizer.model.codebook_size, num_tokens=grid * grid, num_classes=num_classes
        ),
        mean_length=min(max(length, 1.0), max(1.0, grid * grid / 2)),
        length_origin=length_origin,
    )


def model_size(settings: Settings) -> GPTSize | DPARSize:
    """Width and depth of the class-conditional model."""
    return FAMILY_COSTS[settings.train.family].size(settings.train)


def _mean_length(settings: Settings) -> tuple[float, str]:
    """Mean patch length in tokens: the one that the settings ask for, else the paper's at this image size."""
    index, size = settings.patch_index, settings.tokenize.image_size
    if index.target_mean_length is not None:
        return index.target_mean_length, "patch_index.target_mean_length"
    if index.static_length is not None:
        return index.static_length, "patch_index.static_length"
    if size in PAPER_LENGTHS:
        return PAPER_LENGTHS[size], f"the paper at {size} px"
    if size in EXTRAPOLATED_LENGTHS:
        return EXTRAPOLATED_LENGTHS[size], f"extrapolated from the paper to {size} px"
    return _USUAL_LENGTH, "assumed: the paper's at 256 px"
