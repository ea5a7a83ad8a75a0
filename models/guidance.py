"""How strongly classifier-free guidance acts at each token of an image. Nothing here imports torch."""

from __future__ import annotations

from typing import Literal

Schedule = Literal["constant", "linear"]


def guidance_scale(
    position: int,
    num_tokens: int,
    scale: float,
    schedule: Schedule = "constant",
    interval: tuple[int, int] | None = None,
) -> float:
    """Scale of the guidance at the token drawn at `position` of `num_tokens`; 1 is no guidance.

    "linear" rises from 1 at the first token to `scale` at the last. Rising, because the first tokens decide what the
    image becomes: drawn as the model learned them, samples stay varied, and the later tokens that guidance sharpens
    only work that choice out.

    Args:
        position: In raster order, from 0.
        num_tokens: Of an image.
        scale: Largest scale.
        schedule: "constant" is `scale` throughout.
        interval: Tokens first .. last - 1 alone are guided; the schedule still spans the whole image. LlamaGen's
            `cfg_interval` of c is (0, c + 2): it counts from its first cached step, which draws the second token.

    Source: LlamaGen's sampler (constant, interval); Muse (arXiv 2301.00704), section 2.7, for the rise; guidance in
        an interval is of arXiv 2404.07724.
    """
    if interval is not None and not interval[0] <= position < interval[1]:
        return 1.0
    if schedule == "constant":
        return scale
    return 1.0 + (scale - 1.0) * position / max(num_tokens - 1, 1)
