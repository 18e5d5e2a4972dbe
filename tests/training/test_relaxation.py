"""Relaxed samples have the run's temperature wherever they are drawn, not in pretraining alone."""

import pytest
import torch

from lvssl.evaluation.reading import read
from lvssl.latents.noise import keyed
from lvssl.models.network import LVNet
from lvssl.settings.pretrain import LatentSettings, ModelSettings
from lvssl.training.supervised import represent
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
    assert torch.allclose(torch.from_numpy(read(network, images, VIEW, samples=3, seed=5).samples), wanted)
