"""The latent-variable network: backbone, posterior head, latent, projector, and online probes.

site repr: images [N, 3, R, R] -> h [N, F] -> q(z | x) -> K samples [K, N, D] -> projector -> u [N, P]
site proj: images -> h -> projector -> q(z | x) -> K samples, which are u
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lvssl.latents import Family, fused
from lvssl.latents.noise import Noise
from lvssl.latents.posterior import Posterior
from lvssl.models.backbone import build_backbone, feature_dim
from lvssl.settings.pretrain import LatentSettings, ModelSettings
from pipelines.errors import InputError


@dataclass(frozen=True)
class Outputs:
    """What a training step needs from a batch of N = 2B views: tensors, and how to read them."""

    features: Tensor  # h, [N, F]
    parameters: Tensor  # of the N posteriors, [N, family.parameter_count(D)], fp32
    projections: Tensor  # u of the sampled path, [N, P]; [K, N, P] where each sample has a loss
    clean_projections: Tensor | None  # u of the clean path, if there is one
    family: Family
    match_parameters: Tensor | None = None  # [2], which the objective `hib` learns
    kl: Tensor | None = None  # of the posteriors in nats, [N], if drawing has computed it already

    @cached_property
    def posterior(self) -> Posterior:
        return self.family.posterior(self.parameters)


class LVNet(nn.Module):
    """See the module's docstring. `classes` = 0 leaves out the online probes.

    Attributes:
        precision: of `encode` and `features`; a setting and not state. It is float32, unless a run is loaded
            onto a GPU.
    """

    precision: torch.dtype = torch.float32

    def __init__(
        self, model: ModelSettings, latent: LatentSettings, resolution: int, classes: int = 0
    ) -> None:
        super().__init__()
        self.backbone, features = build_backbone(model.backbone, resolution)
        self.feature_dim = features
        self.family = latent.distribution
        self.latent = latent
        self.dim = latent_dim(model, latent)
        if error := self.family.validation_error(self.dim):
            raise InputError(f"--dim must be {error}, got {self.dim}")
        at_projection = latent.site == "proj"
        self.head = Head(latent, model.projection if at_projection else features, self.dim)
        self.projector = projector(features if at_projection else self.dim, model)
        has_clean = latent.clean_path_weight > 0 and self.family.stochastic
        self.clean_projector = projector(features, model) if has_clean else None
        self.match_parameters = nn.Parameter(torch.zeros(2)) if latent.objective == "hib" else None
        self.probes: nn.ModuleDict | None = None
        if classes:
            widths = {"features": features, "code": self.family.code_bits(self.dim)}
            self.probes = nn.ModuleDict({name: nn.Linear(of, classes) for name, of in widths.items()})

    def encode(self, images: Tensor) -> tuple[Tensor, Posterior]:
        """Return features h [N, F] (in the precision's type) and the posterior (fp32)."""
        features = self.features(images)
        with self.computing(images.device):
            return features, self.family.posterior(self.posterior_parameters(features))

    def features(self, images: Tensor) -> Tensor:
        """Return h alone, [N, F], in the precision's type."""
        with self.computing(images.device):
            return self.backbone(images)

    def computing(self, device: torch.device) -> AbstractContextManager[Any]:
        """Context of `encode`; if the precision is fp32, the caller's."""
        exact = self.precision == torch.float32
        return nullcontext() if exact else torch.autocast(device.type, self.precision)

    def forward(self, images: Tensor, noise: Noise, fraction: float = 1.0) -> Outputs:
        """Return what `objective` needs, from images [N, 3, R, R]; arguments as for `heads`."""
        return self.heads(self.backbone(images), noise, fraction)

    def heads(self, features: Tensor, noise: Noise, fraction: float = 1.0) -> Outputs:
        """Compute everything after the backbone.

        Args:
            features: h [N, F], first views, then second views.
            noise: of the latent, for these N views, on the features' device.
            fraction: share of the training that is done, in [0, 1]; annealed values depend on it.
        """
        progress = self.progress(fraction)
        parameters = self.posterior_parameters(features, progress)
        kl = None
        if self.latent.reduction == "samples" and fused.usable(self.family, parameters):
            drawn = fused.draw(self.family, parameters, self.latent.samples, noise.key, noise.rows)
            samples, kl = drawn.sample[None], drawn.kl
        else:
            temperature = self.latent.relaxation
            if (start := self.latent.relaxation_start) is not None:
                temperature = geometric(start, temperature, progress)
            posterior = self.family.posterior(parameters)
            samples = posterior.sample(self.latent.samples, noise, temperature)
        projections = self.project(samples)
        clean = self.clean_projector(features) if self.clean_projector is not None else None
        return Outputs(features, parameters, projections, clean, self.family, self.match_parameters, kl)

    def progress(self, fraction: float) -> float:
        """Progress of the annealing, in [0, 1], when `fraction` of the training is done."""
        return min(1.0, fraction / self.latent.anneal)

    def posterior_parameters(self, features: Tensor, progress: float = 1.0) -> Tensor:
        """Apply the head to features h [N, F] at this progress of the annealing; never below fp32."""
        given = self.head_input(features)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(given.to(torch.promote_types(given.dtype, torch.float32)), progress)

    def head_input(self, features: Tensor) -> Tensor:
        return self.projector(features) if self.latent.site == "proj" else features

    def project(self, samples: Tensor) -> Tensor:
        """Project samples [K, N, D] for the objective: [N, P], or [K, N, P] where each sample has a loss."""
        average = self.latent.reduction
        if self.latent.site == "proj":
            return samples if average == "losses" else samples.mean(dim=0)
        if average == "samples":
            return self.projector(samples.mean(dim=0))
        projected = self.projector(samples.flatten(0, 1)).unflatten(0, samples.shape[:2])
        return projected if average == "losses" else projected.mean(dim=0)

    @torch.no_grad()
    def calibrate(self, features: Tensor) -> None:
        """As `Head.calibrate`, from features h [N, F]."""
        with self.computing(features.device):
            inputs = self.head_input(features)
        self.head.calibrate(inputs)

    def probe_logits(self, outputs: Outputs) -> dict[str, Tensor]:
        """Class logits of the online probes, on detached features and codes."""
        if self.probes is None:
            return {}
        dtype = next(self.probes.parameters()).dtype
        code = outputs.posterior.code().to(dtype) * 2 - 1
        return {
            "features": self.probes["features"](outputs.features.detach().to(dtype)),
            "code": self.probes["code"](code.detach()),
        }


class Head(nn.Module):
    """Map h to the posterior's parameters, in units of the batch.

    The locations (logits, means) are batch-normalised without a learnt scale and multiplied by the
    init_scale. A linear layer comes first, unless there is one location for each feature. The scale, if a
    family has one, starts constant and is learnt or kept. Without normalisation, logits start near 0, the
    noise drowns the gradient, and few bits are ever used.
    """

    def __init__(self, latent: LatentSettings, features: int, dim: int) -> None:
        super().__init__()
        self.family = family = latent.distribution
        locations, scales = family.location_count(dim), family.scale_count(dim)
        factor, offset = family.initial_head(dim, latent.init_scale)
        start = latent.init_scale_start
        first = family.initial_head(dim, start)[0] if start else None
        # Settings, not state: a checkpoint doesn't hold them.
        self.register_buffer("factor", factor, persistent=False)
        self.register_buffer("first_factor", first, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.linear = nn.Linear(features, locations, bias=False) if locations != features else nn.Identity()
        self.normalise = nn.BatchNorm1d(locations, affine=False)
        self.scale = None
        if family.stochastic and scales and latent.posterior_scale == "learnt":
            self.scale = nn.Linear(features, scales)
            nn.init.zeros_(self.scale.weight)
            with torch.no_grad():
                self.scale.bias.copy_(offset)

    def forward(self, features: Tensor, progress: float = 1.0) -> Tensor:
        """Return the parameters. `progress`, in [0, 1], takes the init_scale to its final value."""
        location = self.linear(features)
        normalised = self.normalise(location)
        if not self.family.stochastic:  # h is passed on; its running mean is the threshold of its sign bits
            return torch.cat([location, self.running("mean").expand_as(location)], dim=1)
        factor, first = self.get_buffer("factor"), self._buffers["first_factor"]
        if first is not None and progress < 1:
            factor = geometric(first, factor, progress)
        rows = features.shape[0]  # not len(), which an export would fix to the example's
        offset = self.get_buffer("offset").expand(rows, -1)
        scale = self.scale(features) if self.scale is not None else offset
        return torch.cat([normalised * factor, scale], dim=1)

    @torch.no_grad()
    def calibrate(self, features: Tensor) -> None:
        """Set the normalisation to the exact statistics of these features [N, F], N >= 2.

        The running statistics are those of the last augmented batches. Deployed images are not augmented, and
        the code thresholds the normalised values, so it needs exact ones.
        """
        location = self.linear(features.float())
        self.running("mean").copy_(location.mean(dim=0))
        self.running("var").copy_(location.var(dim=0))

    def running(self, name: str) -> Tensor:
        """The normalisation's running mean or var, [D]."""
        return self.normalise.get_buffer(f"running_{name}")


def latent_dim(model: ModelSettings, latent: LatentSettings) -> int:
    """Number of latent dimensions: as set, or one for each number at the latent's site."""
    return latent.dim or (model.projection if latent.site == "proj" else feature_dim(model.backbone))


def geometric(start: Any, end: Any, progress: float) -> Any:
    """Interpolate from start to end in equal ratios."""
    return start ** (1 - progress) * end**progress


def projector(inputs: int, model: ModelSettings) -> nn.Sequential:
    """Build SimCLR's two-layer projector, [N, inputs] -> [N, P]. Batch normalisation follows the first layer
    and, if set, the second, there scaled but not shifted (google-research/simclr, model_util.py)."""
    layers = [
        nn.Linear(inputs, model.hidden, bias=False),
        nn.BatchNorm1d(model.hidden),
        nn.ReLU(inplace=True),
        nn.Linear(model.hidden, model.projection, bias=not model.projector_norm),
    ]
    if model.projector_norm:
        normalise = nn.BatchNorm1d(model.projection)
        normalise.register_parameter("bias", None)
        layers.append(normalise)
    return nn.Sequential(*layers)
