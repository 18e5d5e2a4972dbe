"""The size calculator against the memory that a real forward walk takes, and against itself."""

import subprocess
import sys

import pytest

from lvssl.plan import PlanSettings, footprint, largest_batch, memory
from pipelines.errors import InputError

MIB = 2**20


def test_activations_are_what_a_process_grows_by():
    """200 views of 32 px through the small network, in a fresh process; only what is kept is still there."""
    script = (
        "import os, torch\n"
        "from lvssl.config import LatentSettings, ModelSettings\n"
        "from lvssl.models.network import LVNet\n"
        "torch.set_num_threads(1)\n"
        "resident = lambda: int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')\n"
        "network = LVNet(ModelSettings('small', 256, 128), LatentSettings('none'), 32)\n"
        "network(torch.randn(8, 3, 32, 32))\n"
        "images = torch.randn(200, 3, 32, 32)\n"
        "before = resident(); kept = network(images); print(resident() - before)\n"
    )
    # Every block of memory is given back to the system at once, so that what is resident is what is held.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    settings = PlanSettings(model="small", resolution=32, precision="fp32", family="none", hidden=256)
    assert 200 * footprint(settings).activations == pytest.approx(int(done.stdout), rel=0.1)


def test_the_projector_by_hand():
    """Only the projector differs: 4 bytes for each hidden number before and after its normalisation."""
    narrow, wide = (
        footprint(PlanSettings(model="tiny", resolution=8, precision="fp32", family="none", hidden=hidden))
        for hidden in (100, 200)
    )
    # Linear keeps its input (ReLU's output), batch norm its input; ReLU works in place.
    assert wide.activations - narrow.activations == pytest.approx(2 * 4 * 100, rel=0.01)
    features, outputs = 128, 128
    assert wide.parameters - narrow.parameters == 100 * (features - 64 + outputs + 2)


def test_the_largest_batch_just_fits():
    settings = PlanSettings(model="resnet18", resolution=96, gpus=4, batch=4, memory=24)
    of = footprint(settings)
    most = largest_batch(settings, of)
    for batch, fits in ((most, True), (most + 4, False)):
        total = sum(memory(PlanSettings(model="resnet18", resolution=96, gpus=4, batch=batch), of).values())
        assert (total <= 24 * 2**30) is fits
    assert most % 4 == 0 and most > 100


def test_bf16_needs_less():
    plain, half = (footprint(PlanSettings(resolution=64, precision=p)) for p in ("fp32", "bf16"))
    assert 0.4 * plain.activations < half.activations < 0.75 * plain.activations
    assert half.parameters == plain.parameters and half.casts > plain.casts >= 0


def test_the_loss_grows_with_the_batch_not_with_its_square():
    of = footprint(PlanSettings(model="tiny", resolution=8))
    sizes = [memory(PlanSettings(model="tiny", batch=b, gpus=8), of)["loss"] for b in (2**17, 2**18)]
    assert sizes[1] == 2 * sizes[0] < 500 * MIB


@pytest.mark.parametrize("options, culprit", [
    ({"batch": 100}, "--batch must be a multiple"), ({"gpus": 0}, "--gpus"), ({"batch": 2}, "--batch"),
    ({"memory": float("nan")}, "--memory"), ({"model": "vgg"}, "unknown model"), ({"resolution": 7}, "--res"),
    ({"precision": "fp8"}, "unknown prec"), ({"projection": 1}, "--projection"), ({"hidden": 0}, "--hidden"),
])  # fmt: skip
def test_impossible_settings_are_named(options, culprit):
    with pytest.raises(InputError, match=culprit):
        PlanSettings(**options).validate()


def test_the_command(lvssl):
    done = lvssl("plan", "--batch", 64, "--gpus", 1, "--model", "tiny", "--resolution", 32)
    assert done.returncode == 0 and "Largest batch that fits" in done.stdout, done.stderr
    bad = lvssl("plan", "--batch", 7, "--gpus", 2)
    assert bad.returncode == 2 and "error: --batch must be a multiple of --gpus (2), got 7" in bad.stderr
