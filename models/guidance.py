"""Scale of classifier-free guidance at each token of an image. Nothing here imports torch."""

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
    """Scale of the guidance at the token at `position` of `num_tokens`. Scale 1 is no guidance.

    Args:
        position: Raster order, from 0.
        num_tokens: Tokens of an image.
        scale: Largest scale.
        schedule: "constant" is `scale` at every token. "linear" rises from 1 at the first token to `scale` at the last:
            the first tokens decide the content, and without guidance they keep samples diverse.
        interval: Only tokens first .. last - 1 are guided. The schedule still spans the whole image. LlamaGen's
            `cfg_interval` of c is (0, c + 2): it counts from the first cached step, which samples the second token.

    Source: LlamaGen's sampler for "constant" and the interval; Muse (arXiv 2301.00704), section 2.7, for "linear";
        arXiv 2404.07724 for guidance in an interval.
    """
    if interval is not None and not interval[0] <= position < interval[1]:
        return 1.0
    if schedule == "constant":
        return scale
    return 1.0 + (scale - 1.0) * position / max(num_tokens - 1, 1)
