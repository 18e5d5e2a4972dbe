"""Augmentation in plain torch: the definition that every fast backend is tested against.

The semantics are those of torchvision.transforms.v2.functional on float images: factor ranges, clamping
after each colour operation, contrast relative to the grey mean, hue in HSV, reflected borders for the blur.
Values stay float between operations, whereas torchvision on uint8 rounds after each and loses precision.
"""

from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.parameters import BRIGHTNESS, CONTRAST, FLIP, GREY, HUE, ORDER, SATURATION, SIGMA, SOLARISE
from pipelines.views import ViewSettings

# For each order, the operations: brightness 0, contrast 1, saturation 2, hue 3.
ORDERS = np.array(list(permutations(range(4))), np.int64)
GREY_WEIGHTS = (0.2989, 0.587, 0.114)


def augment(crops: Tensor, table: Tensor, view: ViewSettings, dtype: torch.dtype = torch.float32) -> Tensor:
    """Augment and normalise on the crops' device.

    Args:
        crops: uint8 [N, R, R, 3].
        table: float [N, P], columns as in `pipelines.parameters.COLUMNS`.
        dtype: dtype of the result; float64 is computed in float64, all others in float32.

    Returns:
        [N, 3, R, R], channels-last in memory.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    images = [
        augment_one(crop.permute(2, 0, 1).to(exact) / 255, row, view.kernel_size)
        for crop, row in zip(crops, table, strict=True)
    ]
    batch = torch.stack(images) if images else crops.permute(0, 3, 1, 2).to(exact)
    mean, std = (
        torch.tensor(value, device=batch.device, dtype=exact).view(3, 1, 1) for value in (view.mean, view.std)
    )
    return ((batch - mean) / std).to(dtype).contiguous(memory_format=torch.channels_last)


def augment_one(image: Tensor, row: Tensor, kernel_size: int) -> Tensor:
    """Apply the whole chain except the normalisation to one image, float [3, H, W] in [0, 1]."""
    p = row.tolist()
    if p[FLIP]:
        image = image.flip(-1)
    for operation in ORDERS[int(p[ORDER])]:
        if operation == 0 and p[BRIGHTNESS] != 1:
            image = brightness(image, p[BRIGHTNESS])
        elif operation == 1 and p[CONTRAST] != 1:
            image = contrast(image, p[CONTRAST])
        elif operation == 2 and p[SATURATION] != 1:
            image = saturation(image, p[SATURATION])
        elif operation == 3 and p[HUE] != 0:
            image = shift_hue(image, p[HUE])
    if p[GREY]:
        image = grey(image).expand(3, -1, -1)
    if p[SIGMA] > 0:
        image = blur(image, p[SIGMA], kernel_size)
    if p[SOLARISE]:
        image = solarise(image)
    return image


def grey(image: Tensor) -> Tensor:
    """Luma [1, H, W] of an RGB image [3, H, W]."""
    red, green, blue = image
    return (GREY_WEIGHTS[0] * red + GREY_WEIGHTS[1] * green + GREY_WEIGHTS[2] * blue)[None]


def brightness(image: Tensor, factor: float) -> Tensor:
    return (image * factor).clamp(0, 1)


def contrast(image: Tensor, factor: float) -> Tensor:
    return (factor * image + (1 - factor) * grey(image).mean()).clamp(0, 1)


def saturation(image: Tensor, factor: float) -> Tensor:
    return (factor * image + (1 - factor) * grey(image)).clamp(0, 1)


def shift_hue(image: Tensor, shift: float) -> Tensor:
    """Rotate the hue in HSV by `shift` of a full turn."""
    red, green, blue = image
    value, low = image.max(0).values, image.min(0).values
    spread = value - low
    safe = torch.where(spread == 0, 1, spread)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = (hue / 6 + shift) % 1.0
    offset = torch.tensor([5.0, 3.0, 1.0], device=image.device, dtype=image.dtype).view(3, 1, 1)
    k = (offset + hue * 6) % 6  # HSV -> RGB in closed form: v - spread * clamp(min(k, 4 - k), 0, 1)
    return value - spread * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(image: Tensor, sigma: float, kernel_size: int) -> Tensor:
    """Separable Gaussian blur with reflected borders (the edge pixel isn't repeated)."""
    radius = kernel_size // 2
    if radius == 0:
        return image
    taps = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (taps / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    padded = F.pad(image[:, None], (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel), kernel.transpose(2, 3))[:, 0]


def solarise(image: Tensor) -> Tensor:
    return torch.where(image >= 128 / 255, 1 - image, image)
