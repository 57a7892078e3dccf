"""How alike two pictures are: PSNR and SSIM from scikit-image, and VIF.

VIF is the pixel-domain visual information fidelity of Sheikh and Bovik ("Image information and
visual quality", IEEE Transactions on Image Processing 15(2), 2006) on luma, four scales.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float64]

NOISE_VARIANCE = 2.0  # of the eye, in levels squared, as in the authors' code
SMALL = 1e-10


def psnr(reference: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal pictures."""
    from skimage.metrics import peak_signal_noise_ratio

    first, second = np.asarray(reference), np.asarray(other)
    if np.array_equal(first, second):
        return math.inf
    return float(peak_signal_noise_ratio(first, second, data_range=255))


def ssim(reference: Image.Image, other: Image.Image) -> float:
    """Mean structural similarity over the colour channels, 1 for equal pictures."""
    from skimage.metrics import structural_similarity

    first, second = np.asarray(reference), np.asarray(other)
    return float(structural_similarity(first, second, channel_axis=2, data_range=255))


def vif(reference: Image.Image, other: Image.Image) -> float:
    """Share of the reference's visual information that the other keeps, 1 for equal pictures.

    Both at least 64 pixels wide and high.
    """
    from scipy.ndimage import gaussian_filter

    first, second = (
        np.asarray(picture.convert("L"), dtype=np.float64) for picture in (reference, other)
    )
    kept = there = 0.0
    for scale in range(4):
        sigma = (2 ** (4 - scale) + 1) / 5.0

        def blur(values: Floats, sigma: float = sigma) -> Floats:
            # the window of the authors' code is 5 sigma wide, edges are cut off
            radius = round(sigma * 5) // 2
            blurred: Floats = gaussian_filter(values, sigma, radius=radius)
            return blurred[radius : -radius or None, radius : -radius or None]

        if scale:
            first, second = blur(first)[::2, ::2], blur(second)[::2, ::2]
        mean_first, mean_second = blur(first), blur(second)
        var_first = np.maximum(blur(first * first) - mean_first**2, 0)
        var_second = np.maximum(blur(second * second) - mean_second**2, 0)
        covariance = blur(first * second) - mean_first * mean_second
        gain = covariance / (var_first + SMALL)
        rest = var_second - gain * covariance
        flat = var_first < SMALL
        gain[flat], rest[flat], var_first[flat] = 0, var_second[flat], 0
        empty = var_second < SMALL
        gain[empty], rest[empty] = 0, 0
        opposite = gain < 0
        rest[opposite], gain[opposite] = var_second[opposite], 0
        rest = np.maximum(rest, SMALL)
        kept += float(np.sum(np.log10(1 + gain**2 * var_first / (rest + NOISE_VARIANCE))))
        there += float(np.sum(np.log10(1 + var_first / NOISE_VARIANCE)))
    return kept / there if there else 1.0
