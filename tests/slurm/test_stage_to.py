"""`stage_to`: the set is copied once a node before the ranks start, and the results are those without it."""

import json
import subprocess
from pathlib import Path

import pytest

from lvssl.runs import checkpoint

FILE = """
name = "tiny"
out = "out"
[data]
train = "{train}"
test = "{test}"
[cluster]
time = 30
warning = 20
environment = {{ OMP_NUM_THREADS = "1" }}
[pretrain]
preset = "digits"
epochs = 1
batch_size = 64
threads = 1
[pretrain.cluster]
{cluster}
"""


def trained(made, stage: str = "pretrain") -> dict:
    found = checkpoint.load_latest(made.task(stage).run / "checkpoints")
    assert found is not None
    return found[1]["network"]


def assert_same(made, reference) -> None:
    """The same weights, settings and digests, wherever the images were read."""
    one, other = trained(made), trained(reference)
    assert one.keys() == other.keys() and [name for name in one if not one[name].equal(other[name])] == []
    configs = [
        json.loads((each.task("pretrain").run / "config.json").read_text()) for each in (made, reference)
    ]
    for config in configs:
        config["settings"].pop("out")
    assert configs[0] == configs[1]
    assert made.task("pretrain").digest == reference.task("pretrain").digest


@pytest.mark.slow
def test_stage_to_without_slurm(chain, digits, tmp_path):
    (tmp_path / "disk").mkdir()
    two = 'tasks_per_node = 2\nstage_to = "$DISK"'
    plain = chain(FILE.format(**digits, cluster="tasks_per_node = 2"), "plain")
    plain.launch("--cluster", "local")
    made = chain(FILE.format(**digits, cluster=two), "staged")
    made.environment["DISK"] = str(tmp_path / "disk")
    made.launch("--cluster", "local")
    assert made.log("pretrain").count("staged ") == 1
    assert len(list((tmp_path / "disk").rglob("train-*.beton"))) == 1
    assert_same(made, plain)
    without = chain(FILE.format(**digits, cluster=two), "without")
    without.launch("--cluster", "local")
    assert without.log("pretrain").count("not staged to $DISK on") == 1
    assert_same(without, plain)


def test_stage_to_is_a_path_of_the_node(chain, digits):
    made = chain(FILE.format(**digits, cluster='stage_to = "scratch"'))
    done = made.run("launch", str(made.file), "--dry-run")
    assert (
        done.returncode == 2
        and "[pretrain.cluster] stage_to: 'scratch' is not an absolute path" in done.stderr
    )


def test_data_of_many_files_are_named_by_a_pattern(chain, digits, tmp_path):
    parts = {name: f"{Path(path).with_suffix('')}*.beton" for name, path in digits.items()}
    made = chain(FILE.format(**parts, cluster=""))
    assert "pretrain" in made.launch("--dry-run")
    one = made.task("pretrain").digest
    made.file.write_text(FILE.format(**digits, cluster=""))
    assert made.task("pretrain").digest == one  # it is what lies there that counts
    made.file.write_text(FILE.format(train="no-*.beton", test=digits["test"], cluster=""))
    done = made.run("launch", str(made.file), "--dry-run")
    assert done.returncode == 2 and "[data] train: " in done.stderr and "no name there fits" in done.stderr


@pytest.mark.slurm
def test_stage_to_on_two_nodes(slurm, chain, digits, tmp_path):
    """Two nodes with two ranks each and a disk of their own: two copies, and the weights of a run without."""
    spread = "nodes = 2\ntasks_per_node = 2"
    names = subprocess.run(["sinfo", "-h", "-N", "-o", "%N"], capture_output=True, text=True).stdout.split()
    if len({*names}) < 2:
        pytest.skip("this cluster has one node")
    for name in names:
        (tmp_path / name).mkdir(exist_ok=True)
    plain = chain(FILE.format(**digits, cluster=spread), "plain")
    plain.launch()
    plain.wait("pretrain", "done", "failed")
    to = f'stage_to = "{tmp_path}/$SLURMD_NODENAME"'
    made = chain(FILE.format(**digits, cluster=f"{spread}\n{to}"), "staged")
    made.launch()
    made.wait("pretrain", "done", "failed")
    assert made.state("pretrain") == "done", made.log("pretrain")
    assert made.log("pretrain").count("staged ") == 2
    copies = sorted(path.relative_to(tmp_path).parts[0] for path in tmp_path.glob("*/lvssl-*/train-*.beton"))
    assert len(copies) == len({*copies}) == 2
    assert_same(made, plain)
