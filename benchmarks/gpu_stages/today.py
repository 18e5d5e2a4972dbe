"""The pipeline commonly used: torchvision's transforms on PIL images in a DataLoader with 16 workers,
lightly's loss, bf16 autocast, channels-last, and the same backbone and projector."""

import importlib
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_stages.case import Row, Setup

WORKERS = 16


class Pairs(torch.utils.data.Dataset):
    """Images uint8 [N, R, R, 3] in memory, two views of each, like torchvision's CIFAR10 with a transform."""

    def __init__(self, images: np.ndarray, length: int, view: Any) -> None:
        self.images, self.length, self.chain = images, length, chain(view)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import Image

        image = Image.fromarray(self.images[index % len(self.images)])
        return self.chain(image), self.chain(image)


def chain(view: Any) -> Any:
    T = importlib.import_module("torchvision.transforms")
    jitter = T.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    steps = [
        T.RandomResizedCrop(view.resolution, view.scale, view.ratio),
        T.RandomHorizontalFlip(view.flip),
        T.RandomApply([jitter], view.jitter),
        T.RandomGrayscale(view.grey),
    ]
    if view.blur:
        steps.append(T.RandomApply([T.GaussianBlur(view.kernel_size, view.sigma)], view.blur))
    return T.Compose([*steps, T.ToTensor(), T.Normalize(view.mean, view.std)])


def contrastive() -> tuple[Callable[[Tensor], Tensor], str]:
    """lightly's loss, or the matrix form if lightly isn't installed."""
    try:
        loss = importlib.import_module("lightly.loss").NTXentLoss(temperature=0.2)
    except ImportError:
        from lvssl.losses.ntxent import reference

        return lambda u: reference(u, 0.2), "matrix form (lightly is missing)"
    return lambda u: loss(*u.chunk(2)), "lightly"


def one_thread(_: int) -> None:
    torch.set_num_threads(1)


def pipeline(
    setup: Setup, work: Any, settings: Any, device: torch.device
) -> tuple[Callable[[list[Tensor]], Tensor], Generator[list[Tensor], None, None], Row]:
    """A step, the batches that it takes (closing them ends the workers), and a row's description of them."""
    from lvssl.models.backbone import build_backbone
    from lvssl.models.network import projector

    images = np.random.default_rng(setup.seed).integers(0, 256, (1024, work.side, work.side, 3), np.uint8)
    count = 1 if setup.dry else WORKERS
    loader = torch.utils.data.DataLoader(
        Pairs(images, 400 * work.batch, settings.view), work.batch, shuffle=True, num_workers=count,
        drop_last=True, pin_memory=setup.device == "cuda", worker_init_fn=one_thread,
    )  # fmt: skip
    backbone, width = build_backbone(work.backbone, work.side)
    network = torch.nn.Sequential(backbone, projector(width, settings.model))
    network = network.to(device).to(memory_format=torch.channels_last).train()
    torch.backends.cudnn.benchmark = True
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    loss_of, which = contrastive()

    def step(batch: list[Tensor]) -> Tensor:
        views = torch.cat([view.to(device, non_blocking=True) for view in batch])
        views = views.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=setup.device == "cuda"):
            projections = network(views)
        loss = loss_of(projections.float())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        return loss.detach()

    def batches() -> Generator[list[Tensor], None, None]:
        while True:
            yield from loader

    return step, batches(), {"workers": count, "loss": which}
