"""Other libraries that ours is compared with: their versions, and their chains of SimCLR's augmentation,
without the crop."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from PIL import ImageFilter

from pipelines.views import ViewSettings


class PillowBlur:
    """Pillow's blur of a PIL image, with a random sigma: box filters that approximate a Gaussian."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Any) -> Any:
        sigma = torch.empty(1).uniform_(*self.sigma).item()
        return image.filter(ImageFilter.GaussianBlur(sigma))


def torchvision_chain(view: ViewSettings, *last: Any, blur: Any = None) -> Any:
    """torchvision v2's: images uint8 [3, R, R], or PIL images that `last` converts, to float32. `blur`: in
    place of torchvision's own."""
    T = importlib.import_module("torchvision.transforms.v2")
    jitter = T.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    return T.Compose([
        T.RandomHorizontalFlip(view.flip),
        T.RandomApply([jitter], view.jitter),
        T.RandomGrayscale(view.grey),
        T.RandomApply([blur or T.GaussianBlur(view.kernel_size, view.sigma)], view.blur),
        *last,
        T.ToDtype(torch.float32, scale=True),
        T.Normalize(view.mean, view.std),
    ])  # fmt: skip


def kornia_chain(view: ViewSettings) -> Any:
    """kornia's: a module for float batches [N, 3, R, R] in [0, 1], with random draws for each image."""
    K: Any = importlib.import_module("kornia.augmentation")  # only typed if it is installed
    ranges = [(max(0.0, 1 - s), 1 + s) for s in (view.brightness, view.contrast, view.saturation)]
    return torch.nn.Sequential(
        K.RandomHorizontalFlip(p=view.flip),
        K.ColorJitter(*ranges, (-view.hue, view.hue), p=view.jitter),
        K.RandomGrayscale(p=view.grey),
        K.RandomGaussianBlur((view.kernel_size,) * 2, view.sigma, p=view.blur),
        K.Normalize(torch.tensor(view.mean), torch.tensor(view.std)),
    )


def versions_of(*packages: str) -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
