"""Report on a patch index: patch lengths, causes of patch starts, and correlation with image complexity.

The paper compares the number of patches with the size of an image's PNG file, a rough measure of complexity. It reports
a correlation of 0.54 on ImageNet.
"""

from __future__ import annotations

import io
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.images.decode import Views, decode, views
from stages.patches.rule import SavedRule
from stages.runtime.arrays import Entropies, Pixels
from stages.runtime.artifact import write_json
from stages.runtime.cores import available_cores
from stages.runtime.errors import InputError
from stages.runtime.job import Inputs
from stages.stores.entropies import EntropyStore
from stages.stores.image_index import ImageIndex
from stages.stores.patches import PatchIndex
from stages.stores.tokens import TokenStore
from stages.views.patch_figures import PatchHistograms, draw_scatter
from stages.views.pictures import patch_picture, save_png

MAX_IMAGES = 4000  # gives the correlation a standard error of about 0.015
EXTREMES = 3  # images in the picture with the fewest patches; as many have the most


@dataclass(frozen=True, kw_only=True)
class PatchReport:
    """Numbers over the first view of some images. A number that is undefined for the rule is None."""

    images: int
    mean_length: float
    """Tokens per patch, averaged over the patches."""
    share_at_limit: float | None
    """Share of the patches that have the maximal length."""
    share_by_row: float | None
    """Share of the patches that open at the start of a grid row although the entropy is not above the threshold."""
    png_correlation: float | None
    """Pearson correlation of the number of patches and the PNG size; None if either is constant."""
    entropy_correlation: float | None = None
    """Pearson correlation of the entropies and those of another map, over predicted tokens; None if none is given."""


def patch_report(inputs: Inputs, output: Path, compared: Path | None = None) -> PatchReport:
    """Write `histograms.png`, `png_size.png`, `extremes.png` and `report.json`, and return the numbers.

    At most MAX_IMAGES evenly spread images are evaluated. Reads the artifacts of dataset, tokenize, patch_index and,
    unless patches are static, entropy_map, and the images. `compared` is another entropy_map artifact, whose entropies
    are compared with these.

    Raises:
        ArtifactError: An artifact is damaged, or the artifacts do not belong together.
        InputError: An image is missing, or differs from the indexed file; or `compared` holds no entropies of these
            tokens; or patches are static, and there is nothing to compare.
    """
    tokens = TokenStore.of(inputs)
    index = PatchIndex.of(inputs, tokens)
    rule = SavedRule.of(inputs)
    rows = np.linspace(0, len(tokens) - 1, min(len(tokens), MAX_IMAGES)).astype(np.int64)
    first_view = np.zeros_like(rows)
    starts, entropy = index.starts(rows, first_view), _entropies(inputs, index, rows)
    histograms = PatchHistograms(tokens.num_tokens, math.log(tokens.codebook_size))
    histograms.add(starts, entropy)
    histograms.draw(rule.threshold, output / "histograms.png")
    crops = Crops(ImageIndex.of(inputs), inputs["images"], tokens)
    png_bytes, num_patches = crops.png_bytes(rows), starts.sum(axis=1)
    correlation = _correlation(png_bytes, num_patches)
    draw_scatter(png_bytes, num_patches, correlation, output / "png_size.png")
    chosen = _extremes(num_patches)
    images = np.stack([crops.pixels(row) for row in rows[chosen]])
    picture = patch_picture(images, starts[chosen], None if entropy is None else entropy[chosen], tokens.grid)
    save_png(picture, output / "extremes.png")
    report = PatchReport(
        images=len(rows),
        mean_length=histograms.mean_length,
        share_at_limit=_share_at_limit(histograms.lengths, rule),
        share_by_row=_share_by_row(starts, entropy, tokens.grid, rule),
        png_correlation=correlation,
        entropy_correlation=None if compared is None else _entropy_correlation(entropy, compared, tokens, rows),
    )
    write_json(output / "report.json", vars(report))
    return report


@dataclass(frozen=True)
class Crops:
    """Reads the first tokenised view of each image."""

    index: ImageIndex
    root: Path
    tokens: TokenStore

    def pixels(self, image: np.int64) -> Pixels:
        """First view of one image."""
        kind = cast(Views, self.tokens.facts.views)
        return views(decode(self.index.read(self.root, int(image))), self.tokens.facts.image_size, kind)[0]

    def png_bytes(self, images: NDArray[np.int64]) -> NDArray[np.int64]:
        """Size of each image as a PNG file, bytes. Threads help, because Pillow releases the GIL."""
        with ThreadPoolExecutor(available_cores()) as pool:
            return np.array(list(pool.map(self._png_bytes, images)))

    def _png_bytes(self, image: np.int64) -> int:
        file = io.BytesIO()
        Image.fromarray(self.pixels(image)).save(file, "PNG")
        return len(file.getvalue())


def _entropies(inputs: Inputs, index: PatchIndex, rows: NDArray[np.int64]) -> Entropies | None:
    """Entropies of the first view of some images, nats; None for static patches, which were made from none."""
    if not index.facts.entropies_digest:
        return None
    store = EntropyStore.of(inputs)
    index.require_entropies(store.digest)
    return store.fetch(rows, np.zeros_like(rows))


def _entropy_correlation(
    entropies: Entropies | None, compared: Path, tokens: TokenStore, rows: NDArray[np.int64]
) -> float:
    """Correlation with the entropies in another artifact of the same tokens, without the first token of an image."""
    if entropies is None:
        raise InputError(f"patches are static and were made from no entropies to compare with those in {compared}")
    if not (compared / EntropyStore.FILE).is_dir():
        raise InputError(f"{compared} holds no {EntropyStore.FILE}, expected a finished artifact of stage entropy_map")
    other = EntropyStore.of({"entropy_map": compared})
    if other.tokens_digest != tokens.digest:
        raise InputError(
            f"{other.location} belongs to the tokens {other.tokens_digest[:12]}, expected {tokens.digest[:12]}: only "
            f"entropies of the tokens in {tokens.location} can be compared"
        )
    found = other.fetch(rows, np.zeros_like(rows))
    return float(np.corrcoef(entropies[:, 1:].ravel(), found[:, 1:].ravel())[0, 1])


def _correlation(first: NDArray[np.int64], second: NDArray[np.int64]) -> float | None:
    if first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _extremes(num_patches: NDArray[np.int64]) -> NDArray[np.intp]:
    """Positions of the images with the fewest and with the most patches, fewest first."""
    order = np.argsort(num_patches, kind="stable")
    return order if len(order) <= 2 * EXTREMES else np.concatenate([order[:EXTREMES], order[-EXTREMES:]])


def _share_at_limit(lengths: NDArray[np.int64], rule: SavedRule) -> float | None:
    limit = rule.max_length
    return None if limit is None else float(lengths[limit : limit + 1].sum() / lengths.sum())


def _share_by_row(starts: NDArray[np.bool_], entropies: Entropies | None, grid: int, rule: SavedRule) -> float | None:
    if entropies is None or not rule.row_boundary or rule.threshold is None:
        return None
    calm = entropies[:, grid::grid] <= np.float32(rule.threshold)
    return float(calm.sum() / starts.sum())
