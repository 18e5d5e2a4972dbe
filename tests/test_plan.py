"""The size calculator against the memory that a real forward pass takes, and against itself."""

import dataclasses
import subprocess
import sys
from dataclasses import replace

import pytest

from lvssl.commands.main import main
from lvssl.plan import footprint, host_memory, hours, largest_batch, memory, plan, time_of
from lvssl.settings.start import PlanSettings, of_preset
from pipelines.errors import InputError

MIB = 2**20


def test_activations_are_what_a_process_grows_by():
    """200 views of 32 px through the small network, in a fresh process; only what is kept is still there."""
    script = (
        "import os, torch\n"
        "from lvssl.settings.pretrain import LatentSettings, ModelSettings\n"
        "from lvssl.latents.noise import keyed\n"
        "from lvssl.models.network import LVNet\n"
        "torch.set_num_threads(1)\n"
        "resident = lambda: int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')\n"
        "network = LVNet(ModelSettings('small', 256, 128), LatentSettings('none'), 32)\n"
        "network(torch.randn(8, 3, 32, 32), keyed(0, 8))\n"
        "images, noise = torch.randn(200, 3, 32, 32), keyed(0, 200)\n"
        "before = resident(); kept = network(images, noise); print(resident() - before)\n"
    )
    # Every block of memory is given back to the system at once, so that what is resident is what is held.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    settings = PlanSettings(backbone="small", resolution=32, precision="fp32", family="none", hidden=256)
    of = footprint(settings)
    assert 200 * (of.backbone + of.heads) == pytest.approx(int(done.stdout), rel=0.1)


def test_the_projector_by_hand():
    """Only the projector differs: 4 bytes for each hidden number before and after its normalisation."""
    narrow, wide = (
        footprint(PlanSettings(backbone="tiny", resolution=8, precision="fp32", family="none", hidden=hidden))
        for hidden in (100, 200)
    )
    # Linear keeps its input (ReLU's output), batch norm its input; ReLU works in place.
    assert wide.heads - narrow.heads == pytest.approx(2 * 4 * 100, rel=0.01)
    features, outputs = 128, 128
    assert wide.parameters - narrow.parameters == 100 * (features - 64 + outputs + 2)


def test_the_largest_batch_just_fits():
    settings = PlanSettings(backbone="resnet18", resolution=96, gpus=4, batch_size=4, memory=24)
    of = footprint(settings)
    most = largest_batch(settings, of)
    for batch, fits in ((most, True), (most + 4, False)):
        total = sum(
            memory(PlanSettings(backbone="resnet18", resolution=96, gpus=4, batch_size=batch), of).values()
        )
        assert (total <= 24 * 2**30) is fits
    assert most % 4 == 0 and most > 100


def test_bf16_needs_less():
    base = PlanSettings(backbone="resnet18", resolution=64)
    plain, half = (footprint(replace(base, precision=p)) for p in ("fp32", "bf16"))
    assert 0.4 < (half.backbone + half.heads) / (plain.backbone + plain.heads) < 0.75
    assert half.parameters == plain.parameters and half.casts > plain.casts >= 0


def test_the_loss_grows_with_the_batch_not_with_its_square():
    of = footprint(PlanSettings(backbone="tiny", resolution=8))
    sizes = [memory(PlanSettings(backbone="tiny", batch_size=b, gpus=8), of)["loss"] for b in (2**17, 2**18)]
    assert sizes[1] == 2 * sizes[0] < 500 * MIB


def test_a_preset_brings_its_own_optimiser(capsys):
    """LARS has one moment for each weight, AdamW two: 100 MB of a ResNet-50."""
    chosen = of_preset("simclr-imagenet-r50-100ep")
    assert (chosen.optimiser, chosen.batch_size, chosen.gpus, chosen.samples) == ("lars", 4096, 8, 4)
    small = dataclasses.replace(chosen, resolution=32, batch_size=64)
    of = footprint(small)
    lars, adamw = (
        memory(dataclasses.replace(small, optimiser=name), of)["optimiser"] for name in ("lars", "adamw")
    )
    assert adamw == 2 * lars and 100e6 < lars < 140e6
    assert main(["plan", "--preset", "cifar10-r18", "--batch-size", "64"]) == 0
    printed = capsys.readouterr().out
    assert "resnet18 at 32 px" in printed and "64 images per step" in printed
    with pytest.raises(InputError, match="unknown preset 'none-such'"):
        of_preset("none-such")


def test_a_chunk_bounds_what_the_backbone_keeps():
    """The heads and the loss still see the whole batch."""
    settings = PlanSettings(backbone="tiny", resolution=8, batch_size=512, gpus=1, family="none")
    of = footprint(settings)
    sizes = {
        chunk: memory(dataclasses.replace(settings, chunk=chunk), of)["activations"]
        for chunk in (0, 128, 1024, 5000)
    }
    assert sizes[0] == sizes[1024] == sizes[5000]
    assert sizes[0] - sizes[128] == pytest.approx((1024 - 128) * of.backbone)
    assert of.heads > 0


def test_recomputation_keeps_inputs_and_one_block():
    """Of a ResNet-18's eight blocks the first are the largest; what follows the backbone keeps as much."""
    plain, less = (
        footprint(PlanSettings(backbone="resnet18", resolution=64, precision="fp32", recompute=recompute))
        for recompute in (False, True)
    )
    assert 0.3 * plain.backbone < less.backbone < 0.65 * plain.backbone and less.heads == plain.heads


def test_an_average_is_a_second_network():
    settings = PlanSettings(backbone="tiny", resolution=8)
    of = footprint(settings)
    parts = memory(dataclasses.replace(settings, ema=True), of)
    assert parts["average"] == parts["weights"] and "average" not in memory(settings, of)


def test_more_samples_keep_more_where_each_is_kept():
    one, four = (
        footprint(PlanSettings(backbone="tiny", resolution=8, family="gaussian", samples=k)) for k in (1, 4)
    )
    assert four.heads > one.heads and four.backbone == one.backbone


def test_time_is_that_of_the_measured_steps():
    """Through the loader, us a view (docs/gpu-h100.json, docs/gpu-h200.json)."""
    for gpu, backbone, resolution, images, measured in (
        ("H100", "resnet50", 224, 10**5, 249), ("H100", "resnet18", 32, 10**6, 17.8),
        ("H200", "resnet50", 224, 10**5, 208.6), ("H200", "resnet18", 32, 10**6, 15.9),
        ("H200", "resnet50", 224, 10**6, 148.9),  # worth compiling
    ):  # fmt: skip
        one = PlanSettings(gpus=1, gpu=gpu, backbone=backbone, resolution=resolution, images=images, epochs=1)
        assert hours(one) * 3600 == pytest.approx(2e-6 * images * measured, rel=0.03)
        assert "measured on this card" in time_of(one)
    more = replace(one, epochs=3, gpus=2)
    eager = replace(one, images=10**5)
    assert hours(more) == pytest.approx(1.5 * 10 * hours(eager)) and "extrapolated" in time_of(more)
    assert hours(replace(eager, chunk=2 * eager.batch_size)) == pytest.approx(hours(eager))  # in one piece
    assert hours(replace(eager, chunk=eager.batch_size)) == pytest.approx(4 / 3 * hours(eager))
    assert hours(replace(eager, recompute=True)) == pytest.approx(4 / 3 * hours(eager))
    assert "about a minute on" in time_of(replace(eager, images=100, epochs=1))


def test_a_time_says_if_its_speed_is_a_guess():
    """ViT-S on 5 tokens: its minutes for 100 epochs of ImageNet seemed to be measured."""
    vit = PlanSettings(backbone="vit_small_patch16_224", resolution=32)
    assert "(a guess: 10 % of the peak, as no step of this backbone was measured)" in time_of(vit)
    assert "(extrapolated from one H100 and one H200)" in time_of(replace(vit, backbone="resnet50"))


def test_a_preset_is_planned_for_the_gpus_that_its_batch_is_for():
    """ "folder-r50" says that it is for one."""
    assert [of_preset(name).gpus for name in ("folder-r50", "cifar10-r18", "digits")] == [1, 1, 1]
    assert of_preset("bernoulli-imagenet-r50-800ep").gpus == 8


def test_one_epoch_is_one():
    small = PlanSettings(backbone="tiny", resolution=32, batch_size=64, gpus=1, epochs=1, images=50_000)
    assert "\n1 epoch of 50,000 images: " in plan(small)
    assert "\n2 epochs of 50,000 images: " in plan(replace(small, epochs=2))


def test_the_card_has_the_memory_that_its_name_says():
    assert "of 140: fits" in plan(PlanSettings(gpu="H200", gpus=1, batch_size=256))
    assert "of 40: fits" in plan(PlanSettings(gpu="H200", gpus=1, batch_size=256, memory=40))


@pytest.mark.parametrize("options, culprit", [
    ({"batch_size": 100}, "--batch-size must be a multiple"), ({"gpus": 0}, "--gpus"),
    ({"batch_size": 2}, "--batch-size"),
    ({"memory": float("nan")}, "--memory"), ({"backbone": "vgg"}, "unknown backbone"),
    ({"resolution": 7}, "--res"),
    ({"gpu": "V100"}, "unknown gpu"), ({"epochs": 0}, "--epochs"), ({"images": 0}, "--images"),
    ({"optimiser": "adam"}, "unknown optimiser"), ({"samples": 0}, "--samples"), ({"chunk": 1}, "--chunk"),
    ({"backbone": "vit_tiny_patch16_224", "recompute": True}, "--recompute only supports ResNets, not vit_"),
    ({"precision": "fp8"}, "unknown prec"), ({"projection": 1}, "--projection"), ({"hidden": 0}, "--hidden"),
])  # fmt: skip
def test_impossible_settings_are_named(options, culprit):
    with pytest.raises(InputError, match=culprit):
        PlanSettings(**options).validate()


def test_the_command(capsys):
    small = ["--backbone", "tiny", "--resolution", "32"]
    assert main(["plan", "--batch-size", "64", "--gpus", "1", *small]) == 0
    assert "Largest batch that fits" in capsys.readouterr().out
    assert main(["plan", "--batch-size", "7", "--gpus", "2"]) == 2
    assert "error: --batch-size must be a multiple of --gpus (2), got 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cgroup", "job", "names"),
    [
        ("0::/slurm/job_7/step_0\n", "slurm/job_7", ("memory.max", "memory.current", "inactive_file")),
        (
            "9:name=systemd:/x\n4:memory:/slurm/job_7/step_0\n0::/\n",
            "memory/slurm/job_7",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
        ("0::/slurm/job_7/step_0\n", "", ("memory.max", "memory.current", "inactive_file")),  # a container's
    ],
    ids=["cgroups 2", "cgroups 1", "namespace"],
)
def test_the_limit_of_a_job_is_what_the_machine_has(tmp_path, cgroup, job, names):
    """Slurm limits a job, and this process is in a step of it; the machine has 64 GiB, 60 of them free."""
    for name, text in {
        "proc/meminfo": f"MemTotal: {64 << 20} kB\nMemAvailable: {60 << 20} kB\n",
        "proc/self/cgroup": cgroup,
        f"sys/fs/cgroup/{job}/{names[0]}": f"{8 << 30}\n",
        f"sys/fs/cgroup/{job}/{names[1]}": f"{7 << 30}\n",
        f"sys/fs/cgroup/{job}/memory.stat": f"anon 1\n{names[2]} {5 << 30}\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert host_memory(tmp_path) == (8 << 30, 6 << 30)
    (tmp_path / "sys/fs/cgroup" / job / names[0]).write_text("max\n")
    assert host_memory(tmp_path) == (64 << 30, 60 << 30)
