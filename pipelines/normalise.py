"""Convert crops of bytes to network input; this alone defines the rounding.

A bit of a code is a threshold on a sum of these numbers, so different rounding may give a different code. The
compiled augmentation (`pipelines.augment.cpu`) ends with the same two operations on the same constants: a
crop that it doesn't change has the bits of `normalise`. `normalise` also gives these bits on a GPU, where the
augmentation (`pipelines.augment.gpu`) rounds differently.
"""

import numpy as np
import torch
from torch import Tensor

from pipelines.views import ViewSettings

LEVEL = np.float32(1 / 255)


def normalise(crops: Tensor, view: ViewSettings) -> Tensor:
    """(x / 255 - mean) / std for each channel of crops uint8 [N, R, R, 3]: float32 [N, 3, R, R],
    channels-last in memory, on the crops' device.

    It is computed as x * LEVEL * scale + shift, where each product and the sum are rounded to fp32.
    """
    scale, shift = (torch.tensor(numbers.tolist(), device=crops.device) for numbers in scale_and_shift(view))
    return crops.float().mul_(float(LEVEL)).mul_(scale).add_(shift).permute(0, 3, 1, 2)


def scale_and_shift(view: ViewSettings) -> tuple[np.ndarray, np.ndarray]:
    """1 / std and -mean / std, float32 [3] each."""
    mean, std = np.asarray(view.mean, np.float32), np.asarray(view.std, np.float32)
    return np.float32(1) / std, -mean / std
