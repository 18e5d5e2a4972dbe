"""Crops of bytes -> what a network sees: the one place that says with which roundings.

A bit of a code is a threshold on a sum of these numbers, so whoever rounds otherwise may get another code.
The compiled augmentation (`pipelines.augment.cpu`) ends with the same two operations on the same constants:
a crop that it leaves as it is has the bits of `normalise`. On a GPU `normalise` gives these bits too; the
augmentation there (`pipelines.augment.gpu`) rounds otherwise.
"""

import numpy as np
import torch
from torch import Tensor

from pipelines.views import ViewSettings

LEVEL = np.float32(1 / 255)


def normalise(crops: Tensor, view: ViewSettings) -> Tensor:
    """(x / 255 - mean) / std of each channel of crops uint8 [N, R, R, 3]: float32 [N, 3, R, R], channels-last
    in memory, on the crops' device.

    Computed as x * LEVEL * scale + shift, each product and the sum rounded to fp32.
    """
    scale, shift = (torch.tensor(numbers.tolist(), device=crops.device) for numbers in scale_and_shift(view))
    return crops.float().mul_(float(LEVEL)).mul_(scale).add_(shift).permute(0, 3, 1, 2)


def scale_and_shift(view: ViewSettings) -> tuple[np.ndarray, np.ndarray]:
    """1 / std and -mean / std of the normalisation, float32 [3] each."""
    mean, std = np.asarray(view.mean, np.float32), np.asarray(view.std, np.float32)
    return np.float32(1) / std, -mean / std
