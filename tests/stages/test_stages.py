"""linear, knn and finetune on a real encoder of digits: what they leave, and what interrupts them."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from killed import interrupt_after, wait_for_a_checkpoint
from PIL import Image

from lvssl.commands.main import main
from lvssl.evaluation.embedding import embed
from lvssl.evaluation.finetune import best, finetune
from lvssl.evaluation.knn import weighted_knn
from lvssl.evaluation.linear import RIDGES, linear, ridge_probe
from lvssl.evaluation.nearest import knn
from lvssl.evaluation.stage import remove_work
from lvssl.runs import checkpoint, labels
from lvssl.runs.labels import LabelledDataset, open_pair
from lvssl.runs.run import load_run
from lvssl.settings.stages import FinetuneSettings, KnnSettings, LinearSettings
from lvssl.training import supervised
from lvssl.training.stopping import Interrupted
from pipelines.convert.conversion import Settings, convert
from pipelines.decode import open_reader
from pipelines.decode.beton import BetonReader
from pipelines.errors import InputError
from pipelines.parameters import draw_parameters
from pipelines.views import ViewSettings


def test_linear_knn_and_finetune_leave_results_that_can_be_trusted(run, digits, capsys):
    assert main(["linear", str(run)]) == 0
    assert main(["knn", str(run), "--k", "5"]) == 0
    digest = load_run(run).digest
    for name, representations in (("linear.json", {"features"}), ("knn.json", {"features", "code"})):
        result = json.loads((run / name).read_text())
        assert result["checkpoint"] == digest and set(result["results"]) == representations
        assert result["data"]["images"] == 1297 and result["data"]["test_images"] == 500
        for figures in result["results"].values():
            low, high = figures["top1_interval"]
            assert 50 < low < figures["top1"] < high < 100 and figures["top5"] > figures["top1"]
        assert result["seconds"] > 0 and result["versions"]["torch"] and str(run) in result["command"]
    known, asked = (
        embed(load_run(run).network, open_reader(digits[s]), load_run(run).settings.view)
        for s in ("train", "test")
    )
    expected = weighted_knn(known.features, known.labels, asked.features, asked.labels, k=5)
    assert result["results"]["features"]["top1"] == expected
    printed = capsys.readouterr().out
    assert f"top-1 {expected:.2f} %" in printed and "knn.json" in printed


def test_a_finished_stage_prints_its_result_and_others_are_refused(run, capsys):
    assert main(["linear", str(run)]) == 0
    first, stamp = capsys.readouterr().out, (run / "linear.json").stat().st_mtime_ns
    assert main(["linear", str(run), "--workers", "1"]) == 0
    assert capsys.readouterr().out == first and (run / "linear.json").stat().st_mtime_ns == stamp
    assert main(["linear", str(run), "--probe", "logistic", "--probe-epochs", "7", "--overwrite"]) == 2
    assert "--probe-epochs has no effect on the probe logistic" in capsys.readouterr().err
    assert main(["linear", str(run), "--seed", "1"]) == 2
    assert "seed: 0 -> 1" in (error := capsys.readouterr().err) and "--overwrite" in error
    assert (run / "linear.json").stat().st_mtime_ns == stamp
    other = ["linear", str(run), "--seed", "1", "--epochs", "7", "--out", str(run / "other.json")]
    assert main(other) == 0  # only now is it known which probe auto means
    assert "note: --epochs has no effect on the probe logistic" in capsys.readouterr().err
    assert main(["linear", str(run), "--seed", "1", "--overwrite"]) == 0
    assert json.loads((run / "linear.json").read_text())["settings"]["seed"] == 1
    state = checkpoint.load_latest(run / "checkpoints")[1]
    checkpoint.save(run / "checkpoints", state["step"] + 1, state | {"step": state["step"] + 1})
    assert main(["linear", str(run), "--probe", "logistic", "--probe-epochs", "7", "--overwrite"]) == 2
    assert "--probe-epochs has no effect on the probe logistic" in capsys.readouterr().err
    assert main(["linear", str(run), "--seed", "1"]) == 2
    assert "checkpoint" in capsys.readouterr().err, (
        "a result of an older checkpoint was taken for the newest's"
    )


def test_a_result_of_a_version_with_fewer_or_other_free_settings_stands(run):
    done = knn(KnnSettings(run, k=5)).done
    path = run / "knn.json"
    older = json.loads(path.read_text())
    del older["settings"]["temperature"], older["settings"]["on_error"]
    older["settings"]["workers"] = 9
    path.write_text(json.dumps(older))
    assert knn(KnnSettings(run, k=5)).done == older and done["results"] == older["results"]
    with pytest.raises(InputError, match="temperature: 0.0 -> 0.5"):
        knn(KnnSettings(run, k=5, temperature=0.5))


def test_the_published_protocol_leaves_the_encoder_alone_and_learns(run):
    settings = LinearSettings(run, probe="sgd", epochs=12, lr=0.5)
    encoder = load_run(run).network.state_dict()
    stage = linear(settings)
    assert stage.done["probe"] == "sgd" and stage.done["results"]["features"]["top1"] > 70
    assert stage.done["batch_size"] == 256 and stage.done["peak_lr"] == 0.5 and stage.done["steps"] == 12 * 5
    for name, value in stage.run.network.state_dict().items():
        assert torch.equal(value, encoder[name]), name
    saved = checkpoint.load_latest(run / "linear" / "checkpoints")[1]
    assert set(saved["model"]) == {"weight", "bias"}


def test_the_views_of_a_stage_are_crops_and_flips_alone(run, monkeypatch):
    seen = []
    step = supervised.SupervisedTrainer.train_step
    monkeypatch.setattr(
        supervised.SupervisedTrainer,
        "train_step",
        lambda self, batch: (seen.append(batch), step(self, batch))[1],
    )
    linear(LinearSettings(run, probe="sgd", epochs=1))
    batch = seen[0]
    assert batch.views.shape == (1, 256, 3, 8, 8) and batch.parameters.shape == (256, 1, 13)
    colours = batch.parameters[:, 0, 5:]
    assert torch.equal(colours[:, 1:4], torch.ones(256, 3)) and not colours[:, [0, 4, 5, 6, 7]].any()
    assert len(batch.parameters[:, 0, :4].unique(dim=0)) > 20
    view = supervised.plain(ViewSettings(jitter=1.0, grey=1.0, blur=1.0, solarise=1.0))
    colours = draw_parameters(view, 0, 0, *np.full((3, 9), 8))[:, 0, 5:]
    assert (colours[:, 1:4] == 1).all() and not colours[:, [0, 4, 5, 6, 7]].any()


def test_finetuning_chooses_on_held_out_images_and_reads_the_test_once(run, digits, monkeypatch):
    reads: dict[str, Counter] = {}
    crops = BetonReader.crops

    def counted(self, indices, *arguments):
        reads.setdefault(self.file.path.name, Counter()).update(indices.tolist())
        return crops(self, indices, *arguments)

    monkeypatch.setattr(BetonReader, "crops", counted)
    settings = FinetuneSettings(
        run, min_steps=0, label_fraction=0.1, epochs=3, lr=(1e-6, 0.1), weight_decay=(0.0, 1e-4)
    )
    stage = finetune(settings)
    assert stage.path == run / "finetune-0.1" / "result.json"
    assert reads["test.beton"] == Counter(range(500)), "a test image was read more or less than once"
    assert len(reads["train.beton"]) == 129, "other images than the labelled ones were read"
    result = stage.done
    assert result["data"]["images"] == 129 and len(result["trials"]) == 4
    assert result["chosen"]["lr"] == 0.1, "the rate that learns nothing was chosen"
    assert all(trial["held_out"]["count"] == 13 for trial in result["trials"])
    assert finetune(settings).done == result and reads["test.beton"] == Counter(range(500))


def test_through_the_latent_the_head_is_trained_too(run):
    before = load_run(run).network.state_dict()
    settings = FinetuneSettings(
        run,
        min_steps=0,
        label_fraction=0.1,
        representation="latent",
        epochs=2,
        lr=(0.05,),
        weight_decay=(0.0,),
    )
    stage = finetune(settings)
    assert stage.path.parent.name == "finetune-latent-0.1"
    saved = checkpoint.load_latest(stage.path.parent / "final" / "checkpoints")[1]["model"]
    changed = {name for name, value in before.items() if not torch.equal(saved[f"network.{name}"], value)}
    assert any(name.startswith("backbone") for name in changed)
    assert "head.normalise.running_mean" in changed and not any("projector" in name for name in changed)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_finetuning_computes_in_the_precision_asked_for_and_goes_on_in_it(run, monkeypatch, precision):
    """Training and test; fp16 with a loss scale that a resumed training has, too."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    represent, seen = supervised.represent, []

    def noted(network, images, *arguments):
        if len(images) > 1:  # one image: the width is found
            seen.append(
                torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
            )
        return represent(network, images, *arguments)

    monkeypatch.setattr(supervised, "represent", noted)
    options = {
        "label_fraction": 0.1,
        "min_steps": 0,
        "epochs": 4,
        "batch_size": 64,
        "lr": (0.05,),
        "weight_decay": (0.0,),
    }
    settings = FinetuneSettings(run, precision=precision, **options)
    finetune(dataclasses.replace(settings, out=run / "whole"))
    assert set(seen) == {dtype}
    interrupt_after(monkeypatch, supervised.SupervisedTrainer, 3)
    with pytest.raises(Interrupted):
        finetune(dataclasses.replace(settings, out=run / "broken"))
    assert (
        checkpoint.load_latest(run / "broken" / "final" / "checkpoints")[1]["scaler"] or precision == "bf16"
    )
    finetune(dataclasses.replace(settings, out=run / "broken"))
    assert_same(run / "whole" / "final", run / "broken" / "final")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_latest(folder / "checkpoints")[1]["model"]


def assert_same(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("on", ["features", "latent"])
def test_interrupted_and_resumed_a_stage_is_the_undisturbed_one(run, tmp_path, monkeypatch, on):
    whole = FinetuneSettings(
        run,
        min_steps=0,
        label_fraction=0.25,
        representation=on,
        epochs=2,
        lr=(0.01, 0.1),
        weight_decay=(1e-4,),
        batch_size=64,
    )
    parts = dataclasses.replace(whole, out=tmp_path / "parts")
    expected = finetune(whole)
    for steps in (3, 7, 9):  # in the first trial, in the second, in the last training
        with monkeypatch.context() as patch:
            interrupt_after(patch, supervised.SupervisedTrainer, steps)
            with pytest.raises(Interrupted, match="SIGTERM: stopped at step"):
                finetune(parts)
    found = finetune(parts)
    assert found.path == tmp_path / "parts" / "result.json"
    assert_same(expected.path.parent / "final", found.path.parent / "final")
    assert found.done["results"] == expected.done["results"]
    assert [t["held_out"] for t in found.done["trials"]] == [t["held_out"] for t in expected.done["trials"]]


@pytest.mark.slow
def test_killed_at_any_moment_linear_ends_as_the_undisturbed_one(run, tmp_path):
    whole = LinearSettings(run, probe="sgd", epochs=40, threads=1)
    expected = linear(whole).done
    options = [
        "linear",
        run,
        "--probe",
        "sgd",
        "--epochs",
        "40",
        "--threads",
        "1",
        "--out",
        tmp_path / "k.json",
    ]
    command = [sys.executable, "-m", "lvssl", *map(str, options), "--checkpoint-minutes", "0.0001"]
    generator = random.Random(0)
    for _ in range(2):
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        wait_for_a_checkpoint(tmp_path / "k", process)
        time.sleep(generator.uniform(0, 0.05))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it was over before it was killed"
    found = linear(dataclasses.replace(whole, out=tmp_path / "k.json")).done
    assert_same(run / "linear", tmp_path / "k")
    assert found["results"] == expected["results"]


def test_a_stage_that_is_told_to_stop_saves_and_ends_with_143(run, monkeypatch, capsys):
    interrupt_after(monkeypatch, supervised.SupervisedTrainer, 2, signal.SIGUSR2)
    assert main(["finetune", str(run), "--epochs", "500", "--lr", "0.01", "0.1"]) == 143
    assert "SIGUSR2: stopped at step 2" in capsys.readouterr().err
    assert checkpoint.load_latest(run / "finetune-1.0/trial-0/checkpoints")[1]["step"] == 2


def test_few_labels_still_make_as_many_steps_as_are_asked_for(run):
    settings = FinetuneSettings(
        run, label_fraction=0.1, epochs=1, min_steps=25, lr=(0.1,), weight_decay=(0.0,)
    )
    result = finetune(settings).done
    assert result["steps"] == 25 and result["batch_size"] == 129
    final = run / "finetune-0.1" / "final"
    assert checkpoint.paths(final / "checkpoints")[-1].name == "step-000000025.pt"
    one_by_one = dataclasses.replace(settings, batch_size=50, out=run / "others")  # two steps an epoch
    assert finetune(one_by_one).done["steps"] == 25


def test_work_under_other_settings_is_not_gone_on_with(run, monkeypatch):
    settings = FinetuneSettings(
        run, min_steps=0, label_fraction=0.1, epochs=2, lr=(0.05,), weight_decay=(0.0,)
    )
    with monkeypatch.context() as patch:
        interrupt_after(patch, supervised.SupervisedTrainer, 1)
        with pytest.raises(Interrupted):
            finetune(settings)
    two, record = dataclasses.replace(settings, lr=(0.05, 0.1), out=run / "two"), run / "two" / "trials.json"
    with monkeypatch.context() as patch:
        interrupt_after(patch, supervised.SupervisedTrainer, 1)
        with pytest.raises(Interrupted):
            finetune(two)
    for damaged in ("[{", "{}", '[{"lr": 0.05}]', "[3]"):
        record.write_text(damaged)
        with pytest.raises(InputError, match=r"two/trials.json: not a (result|record)") as error:
            finetune(two)
        assert "remove it" in str(error.value) and "\n" not in str(error.value)
    other = dataclasses.replace(settings, epochs=3)
    with pytest.raises(InputError, match="finetune-0.1 contains .* .epochs: 2 -> 3.; --overwrite"):
        finetune(other)
    assert finetune(dataclasses.replace(other, overwrite=True)).done["steps"] == 3
    begun = run / "finetune-0.1"
    kept = [
        begun / "thesis.tex",
        begun / "final" / "plot.png",
        begun / "checkpoints" / "mine.pt",
        begun / "a/b",
    ]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    later = dataclasses.replace(other, epochs=1, overwrite=True)
    assert finetune(later).done["steps"] == 1 and all(path.exists() for path in kept)
    assert [p.name for p in checkpoint.paths(begun / "final" / "checkpoints")] == ["step-000000001.pt"]
    remove_work(begun)  # all but those
    assert sorted(p for p in begun.rglob("*") if p.is_file()) == sorted(kept)
    (run / "mine").mkdir()
    (run / "mine" / "thesis.tex").touch()
    with pytest.raises(InputError, match="mine exists but is not a stage's folder"):
        finetune(dataclasses.replace(settings, out=run / "mine", overwrite=True))
    assert (run / "mine" / "thesis.tex").exists()


def test_a_training_that_diverged_leaves_nothing_that_stays_in_the_way(run):
    out = run / "diverged"
    settings = FinetuneSettings(
        run, min_steps=0, label_fraction=0.2, epochs=4, lr=(1e20,), weight_decay=(0.0,)
    )
    with pytest.raises(FloatingPointError, match="non_finite_batch.npy"):
        finetune(dataclasses.replace(settings, out=out))
    assert (out / "final" / "non_finite_batch.npy").exists()
    remove_work(out)  # as --overwrite does
    assert not out.exists()


def test_a_diverging_trial_is_not_chosen_and_too_few_labels_take_the_middle(run, capsys):
    settings = FinetuneSettings(
        run, min_steps=0, label_fraction=0.2, epochs=4, lr=(1e20, 0.05), weight_decay=(0.0,)
    )
    result = finetune(settings).done
    assert "not finite" in result["trials"][0]["diverged"]
    assert result["chosen"]["lr"] == 0.05
    few = FinetuneSettings(
        run,
        min_steps=0,
        label_fraction=0.01,
        epochs=1,
        lr=(0.01, 0.05, 0.25),
        weight_decay=(0.0,),
        validation_fraction=0.01,
    )
    assert finetune(few).done["chosen"]["lr"] == 0.05
    assert "too few labels to hold any out" in capsys.readouterr().err


def test_numbers_are_regressed(run, digits, tmp_path):
    """An image's mean grey level, from a table of paths and numbers: every stage must find some of it."""
    sets = {}
    for split in ("train", "test"):
        source, rows = open_reader(digits[split]), []
        (tmp_path / split).mkdir()
        for i in range(300 if split == "train" else 100):
            pixels = source.encoded(0, i)
            Image.fromarray(pixels).save(tmp_path / split / f"{i}.png")
            rows.append(f"{split}/{i}.png,{pixels.mean():.4f},{pixels[:4].mean():.4f}")
        table = tmp_path / f"{split}.csv"
        table.write_text("path,ink,top\n" + "\n".join(rows) + "\n")
        sets[split] = tmp_path / f"{split}.beton"
        convert(str(table), sets[split], Settings(targets=["ink", "top"]))
    data = {"train": sets["train"], "test": sets["test"]}
    with pytest.raises(InputError, match="its images have no labels.*its float targets: ink, top"):
        linear(LinearSettings(run, **data))
    with pytest.raises(InputError, match=r"with --train and --test$"):
        open_pair(sets["train"], sets["test"])  # of a command that has no --target
    ridge = linear(LinearSettings(run, target="all", **data)).done
    assert ridge["probe"] == "ridge" and set(ridge["results"]["features"]["targets"]) == {"ink", "top"}
    assert ridge["results"]["features"]["r2"] > 0.4
    sgd = LinearSettings(run, target="ink", probe="sgd", epochs=50, lr=0.01, out=run / "s.json", **data)
    by_sgd = linear(sgd).done
    assert by_sgd["results"]["features"]["r2"] > 0.1
    near = knn(KnnSettings(run, target="ink", **data)).done
    assert near["results"]["features"]["r2"] > 0.05 and np.isfinite(near["results"]["code"]["r2"])
    tuned = FinetuneSettings(
        run, min_steps=0, target="ink", epochs=8, batch_size=32, lr=(0.02, 0.1), weight_decay=(0.0,), **data
    )
    result = finetune(tuned).done
    print(f"fine-tuned R2 {result['results']['features']['r2']:.3f}")
    assert result["results"]["features"]["r2"] > 0.3
    assert result["chosen"] in [{"lr": 0.02, "weight_decay": 0.0}, {"lr": 0.1, "weight_decay": 0.0}]
    with pytest.raises(InputError, match="--probe logistic can't predict numbers; use ridge"):
        linear(LinearSettings(run, target="ink", probe="logistic", out=run / "t.json", **data))


def test_the_ridge_probe_is_ridge_regression():
    """Against the normal equations, with the strength that is best on the images held out."""
    random = np.random.default_rng(0)
    scales = np.geomspace(0.1, 10, 30)
    x, test_x = (random.normal(3, scales, (count, 30)) for count in (60, 40))
    y = np.stack([(x / scales)[:, :9].sum(axis=1), 100 * x[:, 20]], axis=1)
    y += random.normal(size=y.shape) * [2, 300]
    train = LabelledDataset(Path("train.beton"), None, torch.from_numpy(y).float(), 2, ("a", "b"))
    found, chosen = ridge_probe(x.astype(np.float32), train, test_x.astype(np.float32), seed=0)
    z, test_z = ((each - x.mean(axis=0)) / x.std(axis=0) for each in (x, test_x))
    mean, deviation = y.mean(axis=0), y.std(axis=0)
    standard = (y - mean) / deviation

    def predicted(rows: np.ndarray, strength: float, of: np.ndarray) -> np.ndarray:
        centre, level = z[rows].mean(axis=0), standard[rows].mean(axis=0)
        a, b = z[rows] - centre, standard[rows] - level
        return (of - centre) @ np.linalg.solve(a.T @ a + len(rows) * strength * np.eye(30), a.T @ b) + level

    fitted, held = labels.split(train, 0.15, 0)
    errors = [((predicted(fitted, s, z[held]) - standard[held]) ** 2).mean() for s in RIDGES]
    assert chosen == RIDGES[np.argmin(errors)] and RIDGES[0] < chosen < RIDGES[-1]
    expected = predicted(np.arange(60), chosen, test_z) * deviation + mean
    assert np.allclose(found.numpy(), expected, rtol=1e-3, atol=1e-2)


def test_of_two_trials_as_accurate_the_surer_one_is_chosen():
    trials = [
        {"lr": lr, "weight_decay": 0.0, "held_out": {"top1": top1, "cross_entropy": entropy}}
        for lr, top1, entropy in ((1.0, 80.0, 0.7), (2.0, 80.0, 0.6), (3.0, 80.0, None), (4.0, 79.0, 0.1))
    ]
    assert best(trials)["lr"] == 2.0


def test_knn_has_no_preset(run, capsys):
    assert main(["knn", str(run), "--preset", "imagenet-linear"]) == 2
    said = capsys.readouterr().err
    assert "no option --preset" in said and "known: " not in said


def test_mistakes_are_one_line(run, tmp_path, capsys):
    for arguments, culprit in [
        (["linear", tmp_path / "none"], "no such run"),
        (["linear", run, "--test", tmp_path / "no.beton"], "no.beton"),
        (["linear", run, "--probe", "svm"], "unknown probe 'svm'; known: auto"),
        (["linear", run, "--preset", "imagenet-finetune"], "unknown preset 'imagenet-finetune'"),
        (["linear", run, "--representation", "dreams"], "unknown representation 'dreams'"),
        (["finetune", run, "--representation", "code"], "a code has no gradient"),
        (["finetune", run, "--label-fraction", 1.5], "--label-fraction must be in (0, 1]"),
        (["finetune", run, "--lr", 0.1, "nan"], "--lr"),
        (["finetune", run, "--lr", 0], "--lr must be one or more numbers, all above 0, got (0.0,)"),
        (["finetune", run, "--weight-decay", -1], "--weight-decay"),
        (["knn", run, "--temperature", -1], "--temperature"),
        (["knn", run, "--target", "age"], "no float target 'age'"),
    ]:
        assert main([str(a) for a in arguments]) == 2, arguments
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and culprit in lines[0], lines
    assert sorted(p.name for p in run.iterdir()) == sorted(
        [".lock", "checkpoints", "config.json", "metrics.jsonl", "tensorboard"]
    )
