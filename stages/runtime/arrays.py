"""Array types that several modules share, with their shapes. The test suite checks them at every call.

The letters are those of models/__init__.py, and:

    N              images in a store, or samples
    n, m           images, views or vectors that a caller chose
    A              views of an image
    height, width  pixels
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Integer, UInt8
from numpy.typing import NDArray

Pixels = UInt8[NDArray[np.uint8], "height width 3"]
"""One RGB image."""
PixelBatch = UInt8[NDArray[np.uint8], "B height width 3"]
"""RGB images of one size."""
Indices = Integer[NDArray[np.integer[Any]], " n"]
"""Numbers of images, views or epochs. Two arguments of this type have the same length."""
Tokens = Integer[NDArray[np.integer[Any]], "n T"]
"""Codes of images in raster order."""
Entropies = Float32[NDArray[np.float32], "n T"]
"""Entropy of each token given those before it, nats."""
Starts = Bool[NDArray[np.bool_], "n T"]
"""True where a token opens a patch."""
Features = Float32[NDArray[np.float32], "n D"]
"""Feature vectors of images."""
FloatMatrix = Float[NDArray[np.floating[Any]], "n D"]
"""One vector a row, of any float type."""
DoubleMatrix = Float64[NDArray[np.float64], "n D"]
"""One vector a row."""
