"""Settings of the commands to start with: plan and demo."""

from dataclasses import dataclass, replace
from pathlib import Path

from lvssl.settings.pretrain import (
    OPTIMISERS,
    LatentSettings,
    PretrainSettings,
    at_least,
    choice,
    preset,
    require,
    require_backbone,
    require_blocks,
)

GPUS = ("A100", "H100", "H200", "L4")  # cards whose speed and memory are known


@dataclass(frozen=True)
class PlanSettings:
    """Estimate the memory of a batch on each GPU (activations, loss, optimiser), the largest batch that fits,
    and the time of a run."""

    batch_size: int = 4096
    """Images per step, over all GPUs."""
    gpus: int = 8
    """Number of GPUs."""
    backbone: str = "resnet50"
    """Architecture, as for `lvssl pretrain`."""
    memory: float = 0.0
    """Memory of one GPU in GiB; 0 means that of --gpu."""
    resolution: int = 224
    """Side of a view in pixels."""
    precision: str = "bf16"
    """bf16 (autocast) or fp32."""
    family: str = "bernoulli"
    """Distribution of the latent: none, sign, gaussian, bernoulli, categorical, beta, mixture,
    power_spherical, vmf or laplace."""
    hidden: int = 1024
    """Width of the projector's hidden layer."""
    projection: int = 128
    """Dimension of the projections that NT-Xent compares."""
    optimiser: str = "adamw"
    """adamw (two moments per weight), sgd or lars (one)."""
    samples: int = 4
    """Number of latent samples drawn for each view (K)."""
    chunk: int = 0
    """Number of views that the backbone processes at once on each GPU; 0 means all."""
    recompute: bool = False
    """Keep only the input of each residual block and compute the block again in the backward pass."""
    ema: bool = False
    """Keep a moving average of the weights."""
    images: int = 1_281_167
    """Number of training images, for the estimated time; ImageNet's by default."""
    epochs: int = 100
    """Number of epochs."""
    gpu: str = "H100"
    """GPU model, for time and memory: A100, H100, H200 or L4."""
    preset: str = ""
    """Preset of `lvssl pretrain` to start from; other options override its values."""

    def validate(self) -> None:
        """Raise InputError naming the first impossible value."""
        require_backbone(self.backbone)
        choice("precision", self.precision, ("bf16", "fp32"))
        LatentSettings(self.family).validate()
        at_least(self, gpus=1)
        batch, gpus = self.batch_size, self.gpus
        require(batch >= gpus, "batch_size", batch, "at least one image for each of --gpus")
        require(batch % gpus == 0, "batch_size", batch, f"a multiple of --gpus ({gpus})")
        require(0 <= self.memory < 10_000, "memory", self.memory, "at least 0 GiB")
        require(8 <= self.resolution <= 4096, "resolution", self.resolution, "pixels in [8, 4096]")
        at_least(self, hidden=1, projection=2)
        choice("optimiser", self.optimiser, OPTIMISERS)
        at_least(self, samples=1)
        choice("gpu", self.gpu, GPUS)
        at_least(self, images=1, epochs=1)
        require(self.chunk >= 0 and self.chunk != 1, "chunk", self.chunk, "0, or at least 2")
        if self.recompute:
            require_blocks(self.backbone)


def of_preset(name: str) -> PlanSettings:
    """Return the pretraining of a preset, as far as memory depends on it: a batch of thousands of images on
    eight GPUs, a smaller one on one. Raises InputError listing the known names."""
    chosen = preset(name)
    return replace(of_pretraining(chosen), gpus=8 if chosen.batch_size >= 4096 else 1, preset=name)


def of_pretraining(settings: PretrainSettings) -> PlanSettings:
    """Return what memory and time depend on, for one GPU."""
    model, engine = settings.model, settings.engine
    return PlanSettings(
        batch_size=settings.batch_size,
        gpus=1,
        backbone=model.backbone,
        resolution=settings.view.resolution,
        precision="fp32" if engine.precision == "fp32" else "bf16",
        family=settings.latent.family,
        hidden=model.hidden,
        projection=model.projection,
        optimiser=settings.optimiser.optimiser,
        samples=settings.latent.samples,
        chunk=engine.chunk,
        recompute=engine.recompute,
        ema=engine.ema > 0,
        epochs=settings.epochs,
    )


@dataclass(frozen=True)
class DemoSettings:
    """Run everything on Fashion-MNIST: convert it, pretrain a control and a Bernoulli model, evaluate and
    analyse them, and write the report page."""

    out: Path = Path("runs/demo")
    """Folder for everything. Steps that are finished there are not repeated."""
    max_images: int = 10_000
    """Number of training images."""
    epochs: int = 0
    """Number of epochs of each pretraining; 0 means that of the preset."""
    seed: int = 0
    """Random seed."""
    data: str = "auto"
    """auto (Fashion-MNIST from Debian's package or from torchvision's download, otherwise digits),
    fashion-mnist or digits."""
