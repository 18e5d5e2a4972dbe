"""Backbones: torchvision's ResNets, small ResNets for two CPU cores, and every timm model by its name there.

The stem of a ResNet depends on the resolution; timm's models keep their architecture at any that they take.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from threading import get_ident
from typing import Any

import torch
import torch.nn as nn
import torchvision
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from pipelines.errors import InputError, first_line

# name: (width of the first block, number of blocks); each further block halves the side, doubles the width
SMALL = {"tiny": (16, 3), "small": (32, 4)}
RESNETS = {"resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet101": 2048, "resnet152": 2048}
BLOCKS = (BasicBlock, Bottleneck)  # residual blocks, which `--recompute` computes again

CIFAR_STEM_UP_TO = 64  # pixels; above it, the ImageNet stem is used


def build_backbone(name: str, resolution: int) -> tuple[nn.Module, int]:
    """Build a backbone, [N, 3, R, R] -> features [N, D], and return D. InputError: not at this resolution."""
    if name in SMALL:
        return SmallResNet(*SMALL[name], stride=1 if resolution <= 16 else 2), feature_dim(name)
    if name in RESNETS:
        return resnet(name, resolution), feature_dim(name)
    require_resolution(name, resolution)
    return timms(name, resolution), feature_dim(name)


@cache
def feature_dim(name: str) -> int:
    """Length of a backbone's feature vector."""
    if name in SMALL:
        width, blocks = SMALL[name]
        return width * 2 ** (blocks - 1)
    if name in RESNETS:
        return RESNETS[name]
    net = unmade(name)
    return next(int(getattr(net, n)) for n in ("head_hidden_size", "num_features") if hasattr(net, n))


def timms(name: str, resolution: int | None, pretrained: bool = False) -> nn.Module:
    """Create timm's model without its classifier; one of fixed resolution (a transformer) gets this one."""
    import timm  # takes seconds

    def made(**sized: Any) -> nn.Module:
        return timm.create_model(name, pretrained, num_classes=0, **sized)

    # Models compute numbers while they are made, which fake tensors can't provide.
    with unset_fake_temporarily() as fake, torch.device("meta") if fake else nullcontext():
        try:
            net = made(img_size=resolution) if resolution else made()
        except TypeError:  # it takes any resolution, and has no such option
            net = made()
    return net._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype)) if fake else net


def of_layers(name: str) -> bool:
    """Whether a backbone normalises each image by itself, as transformers and ConvNeXt do, and never over the
    batch."""
    kinds = {type(module).__mro__ for module in unmade(name).modules()}
    batch, layer = (any(kind in mro for mro in kinds) for kind in (_BatchNorm, nn.LayerNorm))
    return layer and not batch


def patch(name: str) -> int:
    """Side of a transformer's patches in pixels, which divides its resolutions; 1 for any other backbone."""
    proj = getattr(getattr(unmade(name), "patch_embed", None), "proj", None)
    if isinstance(proj, nn.Conv2d) and proj.kernel_size == proj.stride:  # other patches overlap
        return max(proj.stride)
    return 1


@cache
def unmade(name: str) -> nn.Module:
    """Create a timm model without allocating its weights; other backbones give an empty module."""
    if name in SMALL or name in RESNETS:
        return nn.Identity()
    with torch.device("meta"):
        return timms(name, None)


@cache
def require_resolution(name: str, resolution: int) -> None:
    """Raise InputError if a timm model doesn't take images of this side, or only a part of them."""
    if resolution % patch(name):
        raise InputError(
            f"--backbone {name} needs images whose side is a multiple of its patch size, {patch(name)} px, "
            f"not {resolution}: choose another --resolution"
        )
    try:
        with torch.device("meta"):
            timms(name, resolution).eval()(torch.empty(1, 3, resolution, resolution))
    except Exception as error:  # each model has its own: an assertion, a shape that becomes zero
        raise InputError(
            f"--backbone {name} doesn't take images of {resolution} px ({first_line(error)}): choose another "
            "--resolution (for a transformer, a multiple of its patch size)"
        ) from error


def stage_widths(name: str) -> tuple[int, ...]:
    """Widths of a backbone's stages (see `stage_means`), each twice the one before; timm's are one stage."""
    stages = SMALL[name][1] if name in SMALL else 4 if name in RESNETS else 1
    return tuple(feature_dim(name) >> after for after in reversed(range(stages)))


@contextmanager
def stage_means(backbone: nn.Module) -> Iterator[list[Tensor]]:
    """Context that keeps the activations after each stage of this thread's last call of a backbone, averaged
    over the pixels: float32 [N, width] for each, the last being the features. A stage is a block of a small
    network, or what torchvision calls a layer; for a timm model there are the features alone."""
    stages: list[nn.Module] = [backbone]
    if isinstance(backbone, SmallResNet | ResNet):
        stages = [child for child in backbone.children() if isinstance(child, BasicBlock | nn.Sequential)]
    means, here = [torch.empty(0)] * len(stages), get_ident()

    def keep(number: int, activations: Tensor) -> None:
        if get_ident() != here:  # the hooks see the calls of other threads, too
            return
        pixels = activations.dim() == 4
        means[number] = activations.mean(dim=(2, 3), dtype=torch.float32) if pixels else activations.float()

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
    """Stem, basic blocks of doubling width, global average: 1.2 M parameters as `small`, 77 k as `tiny`."""

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
