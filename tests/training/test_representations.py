"""What classifiers are trained on: as long as it is said to be, with samples of the run's temperature."""

import pytest
import torch

from lvssl.evaluation.outputs import network_outputs
from lvssl.latents import FAMILIES
from lvssl.latents.noise import keyed
from lvssl.models.network import LVNet
from lvssl.settings.pretrain import LatentSettings, ModelSettings
from lvssl.training.supervised import represent, width
from pipelines.views import ViewSettings

VIEW = ViewSettings(resolution=16)


@pytest.mark.parametrize("family", ["bernoulli", "categorical"])
@pytest.mark.parametrize("relaxation", [0.1, 1.5])
def test_stages_and_analyses_draw_at_the_runs_temperature(family, relaxation):
    torch.manual_seed(0)
    latent = LatentSettings(family=family, estimator="relaxed", relaxation=relaxation, samples=3)
    network = LVNet(ModelSettings(backbone="tiny", hidden=8, projection=8), latent, 16).eval()
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        _, posterior = network.encode(images)
        wanted, default = (posterior.sample(3, keyed(5, 4), *t) for t in ((relaxation,), ()))
        found = represent(network, images, "latent", keyed(5, 4))
    assert not torch.allclose(wanted, default)
    assert torch.allclose(found, wanted.mean(0))
    assert torch.allclose(
        torch.from_numpy(network_outputs(network, images, VIEW, samples=3, seed=5).samples), wanted
    )


STOCHASTIC = [name for name, kind in FAMILIES.items() if kind.stochastic]


@pytest.mark.parametrize(
    "family,site",
    [
        *((name, "repr") for name in (*FAMILIES, "bernoulli+gaussian")),
        *((name, "proj") for name in STOCHASTIC),
    ],
)
def test_the_length_is_known_without_an_image(family, site):
    latent = LatentSettings(family=family, site=site)
    # A transformer that takes images of its own resolution alone.
    model = ModelSettings(backbone="vit_tiny_patch16_224", hidden=8, projection=16)
    network = LVNet(model, latent, 32).eval()
    with torch.no_grad():
        for on in ("features", "latent", "code"):
            assert width(network, on) == represent(network, torch.zeros(2, 3, 32, 32), on).shape[1]
