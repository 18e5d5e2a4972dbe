"""Operations of a backbone against published counts, and the share of a card's peak."""

import pytest
import torch

from lvssl.models import utilisation
from lvssl.training.distributed import World
from lvssl.training.loop import Loop


# Multiplications of a forward pass, in 10^9, by torchvision's documentation of its weights.
@pytest.mark.parametrize(("backbone", "published"), [("resnet18", 1.814), ("resnet50", 4.089)])
def test_operations_are_the_published_ones(backbone, published):
    """A multiplication and its addition are two, and a backward pass is two forward ones, less the gradient
    of the images, which nobody asks for; the classifier's product, 0.05 %, is not the backbone's."""
    counted = utilisation.operations(backbone, 224)
    assert 0.96 * 6e9 * published < counted < 6e9 * published


def test_what_a_card_can_do_at_best_is_found_by_its_name(monkeypatch):
    cuda = torch.device("cuda")
    known = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12}
    known |= {"NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA L40S": None, "NVIDIA GH200 480GB": 989e12}
    for name, flops in known.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert utilisation.peak_flops(cuda) == flops
    assert utilisation.peak_flops(torch.device("cpu")) is None


def test_no_share_of_a_peak_is_said_where_operations_were_not_counted():
    """Those of linear evaluation and fine-tuning: a share of 0 % would be a figure that nothing measured."""

    class Uncounted:
        operations, peak, world = 0.0, 989e12, World()

    class ThroughputMeter:
        def speed(self) -> dict[str, float]:
            return {"images_per_second": 1000.0}

    assert Loop.speed(Uncounted(), ThroughputMeter()) == {"images_per_second": 1000.0}
    Uncounted.operations = 989e9
    assert Loop.speed(Uncounted(), ThroughputMeter())["mfu_percent"] == pytest.approx(100)
