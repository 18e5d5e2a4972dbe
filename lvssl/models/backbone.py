"""Backbones: torchvision's ResNets and small ones for two CPU cores; the stem follows the resolution."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
import torchvision
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

# name: (width of the first block, number of basic blocks; each next block halves the side, doubles the width)
SMALL = {"tiny": (16, 3), "small": (32, 4)}
RESNETS = ("resnet18", "resnet50")
BACKBONES = (*SMALL, *RESNETS)
BLOCKS = (BasicBlock, Bottleneck)  # residual blocks: what `--recompute` computes again

CIFAR_STEM_UP_TO = 64  # pixels; above it the ImageNet stem


def build_backbone(name: str, resolution: int) -> tuple[nn.Module, int]:
    """A backbone [N, 3, R, R] -> features [N, D], and D."""
    if name in SMALL:
        return SmallResNet(*SMALL[name], stride=1 if resolution <= 16 else 2), feature_dim(name)
    return resnet(name, resolution), feature_dim(name)


def feature_dim(name: str) -> int:
    """Length of a backbone's feature vector."""
    if name in SMALL:
        width, blocks = SMALL[name]
        return width * 2 ** (blocks - 1)
    return {"resnet18": 512, "resnet50": 2048}[name]


def stage_widths(name: str) -> tuple[int, ...]:
    """Of each stage of a backbone (see `stage_means`): each is twice as wide as the one before."""
    stages = SMALL[name][1] if name in SMALL else 4
    return tuple(feature_dim(name) >> after for after in reversed(range(stages)))


@contextmanager
def stage_means(backbone: nn.Module) -> Iterator[list[Tensor]]:
    """While it is entered, the activations after each stage of a backbone's last call, averaged over the
    pixels: float32 [N, width] of each, the last of which are the features. A stage is a block of a small
    network, and what torchvision calls a layer."""
    stages = [module for module in backbone.children() if isinstance(module, BasicBlock | nn.Sequential)]
    means = [torch.empty(0)] * len(stages)

    def keep(number: int, activations: Tensor) -> None:
        means[number] = activations.mean(dim=(2, 3), dtype=torch.float32)

    hooks = [
        stage.register_forward_hook(lambda _, __, out, number=number: keep(number, out))
        for number, stage in enumerate(stages)
    ]
    try:
        yield means
    finally:
        for hook in hooks:
            hook.remove()


class SmallResNet(nn.Sequential):
    """Stem, basic blocks of doubling width, global average: 1.2 M parameters as `small`, 78 k as `tiny`."""

    def __init__(self, width: int, blocks: int, stride: int) -> None:
        stem = [nn.Conv2d(3, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        body = [BasicBlock(width, width)]
        for level in range(1, blocks):
            channels = width * 2**level
            shortcut = nn.Sequential(
                nn.Conv2d(channels // 2, channels, 1, 2, bias=False), nn.BatchNorm2d(channels)
            )
            body.append(BasicBlock(channels // 2, channels, stride=2, downsample=shortcut))
        super().__init__(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet(name: str, resolution: int) -> nn.Module:
    """torchvision's ResNet without its classifier; up to 64 px with a 3x3 stem, no max-pool (SimCLR, B.9)."""
    net = torchvision.models.get_model(name, weights=None)
    net.fc = nn.Identity()
    if resolution <= CIFAR_STEM_UP_TO:
        net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    return net
