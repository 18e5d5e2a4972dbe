"""The latent-variable network: backbone, posterior head, latent, projector, and online probes.

images [N, 3, R, R] -> h [N, F] -> q(z | x) -> K samples, averaged [N, D] -> u [N, P]
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn as nn
from torch import Generator, Tensor

from lvssl.config import LatentSettings, ModelSettings
from lvssl.latents import FAMILIES, Posterior
from lvssl.models.backbone import build_backbone, feature_dim


@dataclass(frozen=True)
class Outputs:
    """What a training step needs of a batch of N = 2B views: tensors, and how to read them."""

    features: Tensor  # h, [N, F]
    parameters: Tensor  # of the N posteriors, [N, family.parameter_count(D)], fp32
    projections: Tensor  # u of the sampled path, [N, P]
    clean_projections: Tensor | None  # u of the clean path beside it, if there is one
    family: type[Posterior]

    @cached_property
    def posterior(self) -> Posterior:
        return self.family(self.parameters)


class LVNet(nn.Module):
    """See the module's head. `classes` = 0 leaves the online probes out."""

    def __init__(
        self, model: ModelSettings, latent: LatentSettings, resolution: int, classes: int = 0
    ) -> None:
        super().__init__()
        self.backbone, features = build_backbone(model.backbone, resolution)
        self.family = FAMILIES[latent.family]
        self.samples = latent.samples
        self.dim = latent_dim(model, latent)
        self.head = Head(self.family, features, self.dim, latent.sharpness)
        self.projector = projector(self.dim, model.hidden, model.projection)
        has_clean = latent.clean > 0 and self.family.stochastic
        self.clean_projector = projector(features, model.hidden, model.projection) if has_clean else None
        code_bits = self.family.code_bits(self.dim)
        self.probes = (
            nn.ModuleDict({"features": nn.Linear(features, classes), "code": nn.Linear(code_bits, classes)})
            if classes
            else None
        )

    def encode(self, images: Tensor) -> tuple[Tensor, Posterior]:
        """Features h [N, F] (the autocast's type) and the posterior (fp32)."""
        features = self.backbone(images)
        return features, self.family(self.posterior_parameters(features))

    def forward(self, images: Tensor, generator: Generator | None = None, fraction: float = 1.0) -> Outputs:
        """What `objective` needs, of images [N, 3, R, R]; arguments as of `heads`."""
        return self.heads(self.backbone(images), generator, fraction)

    def heads(
        self,
        features: Tensor,
        generator: Generator | None = None,
        fraction: float = 1.0,
        rank: int = 0,
        ranks: int = 1,
    ) -> Outputs:
        """All that follows the backbone.

        Args:
            features: h [N, F], first views then second.
            generator: source of the latent's noise, on the features' device.
            fraction: of the training that is done, in [0, 1]; what is annealed depends on it.
            rank, ranks: which of equal parts of the batch these N views are.
        """
        parameters = self.posterior_parameters(features)
        sampled = self.draw(parameters, generator, rank, ranks).mean(dim=0)
        clean = self.clean_projector(features) if self.clean_projector is not None else None
        return Outputs(features, parameters, self.projector(sampled), clean, self.family)

    def posterior_parameters(self, features: Tensor) -> Tensor:
        """The head on features h [N, F], in fp32 whatever the autocast."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float())

    def calibrate(self, features: Tensor) -> None:
        """As `Head.calibrate`, of features h [N, F]."""
        self.head.calibrate(features)

    def draw(self, parameters: Tensor, generator: Generator | None, rank: int, ranks: int) -> Tensor:
        """K samples, [K, N, D]. Every rank draws for the whole batch, with the same noise, and keeps its own
        part, so that an image's noise depends on its place in the batch and not on the ranks."""
        if ranks == 1:
            return self.family(parameters).sample(self.samples, generator)
        views = parameters.unflatten(0, (2, -1))
        everyone = [views.detach()] * ranks  # what stands in the other ranks' rows must only be valid
        everyone[rank] = views
        drawn = self.family(torch.cat(everyone, dim=1).flatten(0, 1)).sample(self.samples, generator)
        return drawn.unflatten(1, (2, ranks, -1))[:, :, rank].flatten(1, 2)

    def probe_logits(self, outputs: Outputs) -> dict[str, Tensor]:
        """Class logits of the online probes, on detached features and codes."""
        if self.probes is None:
            return {}
        code = outputs.posterior.code().float() * 2 - 1
        return {
            "features": self.probes["features"](outputs.features.detach().float()),
            "code": self.probes["code"](code.detach()),
        }


class Head(nn.Module):
    """h -> the posterior's parameters, in units of the batch.

    The location (logits, means) is batch-normalised, without learnt scale, and times the sharpness: one
    latent a feature needs no layer between; another length takes a linear layer first. The spread, where a
    family has one, starts constant and is learnt. Without normalisation logits start near 0, the noise
    drowns the gradient and few bits are ever used.
    """

    def __init__(self, family: type[Posterior], features: int, dim: int, sharpness: float) -> None:
        super().__init__()
        self.family = family
        self.scale, offset = family.head_scale(sharpness)
        self.linear = nn.Linear(features, dim, bias=False) if dim != features else nn.Identity()
        self.normalise = nn.BatchNorm1d(dim, affine=False)
        self.spread = None
        if family.stochastic and family.parameter_count(dim) == 2 * dim:
            self.spread = nn.Linear(features, dim)
            nn.init.zeros_(self.spread.weight)
            nn.init.constant_(self.spread.bias, offset)

    def forward(self, features: Tensor) -> Tensor:
        location = self.linear(features)
        normalised = self.normalise(location)
        if not self.family.stochastic:  # h itself goes on; the running mean is the threshold of its sign bits
            return torch.cat([location, self.running("mean").expand_as(location)], dim=1)
        if self.spread is None:
            return normalised * self.scale
        return torch.cat([normalised * self.scale, self.spread(features)], dim=1)

    @torch.no_grad()
    def calibrate(self, features: Tensor) -> None:
        """Set the normalisation to the exact statistics of these features [N, F], N >= 2.

        The running statistics are those of the last augmented batches. Deployed images are not augmented,
        and the code is a threshold on the normalised value, so a code is worth an exact one.
        """
        location = self.linear(features.float())
        self.running("mean").copy_(location.mean(dim=0))
        self.running("var").copy_(location.var(dim=0))

    def running(self, name: str) -> Tensor:
        """The normalisation's running mean or var, [D]."""
        return self.normalise.get_buffer(f"running_{name}")


def latent_dim(model: ModelSettings, latent: LatentSettings) -> int:
    """Latent dimensions: as set, or one for each feature."""
    return latent.dim or feature_dim(model.backbone)


def projector(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """SimCLR's two-layer projector with batch normalisation."""
    return nn.Sequential(
        nn.Linear(inputs, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs),
    )
