"""PIPELINE.toml: a mistake is named before anything is submitted, a change reaches what hangs on it."""
# ruff: noqa: E501 (rows of a table)

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from chains import CONVERTED  # type: ignore[import-not-found]

from lvssl.commands.chain import chain_starts
from lvssl.commands.main import main
from lvssl.runs.run import create_run
from lvssl.settings.fields import flat_hints, replaced, runtime
from lvssl.settings.pretrain import PRESETS, PretrainSettings
from lvssl.settings.stages import FinetuneSettings, KnnSettings, LinearSettings
from pipelines.amounts import size_text
from pipelines.convert.command import parser
from pipelines.errors import InputError
from slurm.dry_run import folder_size
from slurm.launch import as_launched, launch, plan
from slurm.pipeline import MEASURING, ImageSource, minutes_of, read_pipeline
from slurm.records import (
    Record,
    claimed,
    fingerprints,
    last_error,
    last_row,
    read_jobs,
    read_record,
    stands,
    write_json,
    write_record,
)
from slurm.stages import build_stages, digest
from slurm.status import standings
from slurm.sweep import write_table
from slurm.work import awaited, executor

GOLDEN = Path(__file__).with_name("golden_sbatch.txt")
FILE = f"""
name = "tiny"
out = "out"
[cluster]
time = "01:00:00"
memory = "4G"
{CONVERTED}[pretrain]
preset = "digits"
epochs = 3
[evaluate]
"""


def write(folder: Path, text: str = FILE) -> Path:
    path = folder / "pipeline.toml"
    path.write_text(text)
    return path


def keys(path: Path) -> dict[str, str]:
    return {
        task.name: task.key
        for stage in build_stages(read_pipeline(path, chain_starts()))
        for task in stage.tasks
    }


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("epochs = 3", "epoch = 3", "[pretrain] epoch: no such key; did you mean 'epochs'?"),
        ("epochs = 3", "epochs = 0", "[pretrain] --epochs must be at least 1"),
        ("epochs = 3", 'epochs = "3"', "[pretrain] epochs: must be a whole number, got '3'"),
        ("epochs = 3", "epochs = true", "[pretrain] epochs: must be a whole number, got True"),
        ("epochs = 3", 'out = "x"', "[pretrain] out: this is set by the pipeline itself"),
        ("epochs = 3", "relaxation_start = 2.0", "[pretrain] --relaxation-start has no effect: leave it out, or pass"),
        ("epochs = 3", "sweep.grid.lr = [1]", "[pretrain.sweep]"),
        ('preset = "digits"', 'preset = "digit"', "[pretrain] unknown preset 'digit'"),
        ("[evaluate]", "[evaluation]", "evaluation: no such key; did you mean 'evaluate'?"),
        ("[evaluate]", "[knn]\nsweep.list = [{wrkers = 1}]", "[knn.sweep] wrkers: no such key"),
        ("[evaluate]", "[knn]\nsweep.list = []", "[knn.sweep] has no point"),
        ("[evaluate]", "[knn]\nsweep = {grid = {workers = 1}}", "[knn.sweep.grid] workers: must be a list"),
        ("[evaluate]", "[knn]\nsweep = {}", "takes either `grid` or `list`"),
        ("[evaluate]", "[evaluate]\nsweep.grid = {workers = [1]}", "[evaluate.sweep]: its result always goes to the run's folder"),
        ("[evaluate]", "[finetune]\nsweep.grid = {label_fraction = [0.1, 2.0]}", "[finetune.sweep] --label-fraction must be in (0, 1], got 2.0"),
        ("[evaluate]", '[linear]\npreset = "imagenet-finetune"', "[linear] unknown preset 'imagenet-finetune'; known: imagenet-linear"),
        ("[evaluate]", "[linear]\nruns = 1", "[linear] runs: no such key"),
        ("[evaluate]", "[evaluate.cluster]\nnodes = 2", "[evaluate.cluster] nodes: only pretrain, linear, finetune can use several nodes"),
        ("[cluster]", "[clusters]", "clusters: no such key; did you mean 'cluster'?"),
        ("[cluster]", "[cluster]\nnodes = 2", "[cluster] nodes: not every stage"),
        ("[cluster]", '[cluster]\npartitoin = "gpu"', "[cluster] partitoin: no such key; did you mean 'partition'?"),
        ("[cluster]", "[cluster]\nenvironment = { A = 1 }", "[cluster] environment: must be"),
        ("[cluster]", '[cluster]\nmodules = "cuda"', "[cluster] modules: must be"),
        ("[cluster]", "[cluster]\ngpus = -1", "[cluster] gpus: must be at least 0, got -1"),
        ('"4G"', '"4 gigs"', "[cluster] memory: '4 gigs' is not a size"),
        ('"01:00:00"', '"an hour"', "[cluster] time: 'an hour' is not a time"),
        ('"01:00:00"', "10", "[pretrain.cluster] time: 10 is no longer than the 10 minutes between checkpoints"),
        ('"01:00:00"', "2", "[cluster] time: 2 is no longer than the warning"),
        ('"sklearn:digits"\n[convert.test]', '"photos/"\n[convert.test]', "[convert.train] source: photos/: no such file"),
        ("shards = 1", "sahrds = 1", "[convert.test] sahrds: no such key; did you mean 'shards'?"),
        ("shards = 1", "shards = 0", "[convert.test] shards: must be at least 1"),
        ("shards = 1", 'on_error = "refuse"', "[convert.test] --on-error refuse: must be raise or skip"),
        ("[convert.test]", "[convert.tset]", "[convert] tset: no such key"),
        ("[pretrain]", '[data]\ntrain = "a.beton"\n[pretrain]', "either [convert]"),
        (CONVERTED, '[data]\ntest = "a.beton"\n', '[data] train is missing, such as train = "train.beton"'),
        ('out = "out"', 'out = "100%"', "has a character"),
        ('out = "out"', "out = 1", "out: must be a text, got 1"),
        ('name = "tiny"', 'name = "tiny', "not TOML"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_and_nothing_written(tmp_path, capsys, old, new, named):
    assert old in FILE
    path = write(tmp_path, FILE.replace(old, new, 1))
    assert main(["launch", str(path), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named in error and str(path) in error, error
    assert error.count("\n") == 1 and list(tmp_path.iterdir()) == [path]


def test_no_file_no_slurm_no_such_cluster(tmp_path, monkeypatch, capsys):
    assert main(["launch", str(tmp_path / "none.toml")]) == 2
    assert "none.toml: cannot be read" in capsys.readouterr().err
    assert main(["status", str(tmp_path)]) == 2
    assert "is a folder; name the pipeline's file" in capsys.readouterr().err
    path = write(tmp_path)
    assert main(["launch", str(path), "--cluster", "cloud"]) == 2
    assert "unknown --cluster 'cloud'; known: slurm, local, debug" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", str(path)]) == 2
    assert "no Slurm here" in capsys.readouterr().err
    assert read_jobs(tmp_path / "out") == {} and not (tmp_path / "out" / "code").exists()


def test_times():
    times = {"90": 90, "1:30": 2, "12:00:00": 720, "2-00": 2880, "1-02:03": 1563, "1-02:03:01": 1564}
    assert {text: minutes_of(text) for text in times} == times
    for wrong in ("", "1h", "1-2-3", "1:2:3:4"):
        with pytest.raises(ValueError):
            minutes_of(wrong)


def test_a_changed_setting_reaches_what_hangs_on_it_and_only_that(tmp_path):
    before = keys(write(tmp_path))

    def changed(old: str, new: str, text: str = FILE) -> set[str]:
        assert old in text
        after = keys(write(tmp_path, text.replace(old, new, 1)))
        assert after.keys() == before.keys()
        return {name for name in before if before[name] != after[name]}

    everything = set(before)
    train = {"convert-train-001", "convert-train-002", "merge-train"}
    assert changed("epochs = 3", "epochs = 4") == {"pretrain", "evaluate", "report"}
    assert changed("[convert.test]", "[convert.test]\nsubset = 9") == {"convert-test", "evaluate", "report"}
    assert changed("[convert.train]", "[convert.train]\nsubset = 9") == everything - {"convert-test"}
    assert changed("[convert]", "[convert]\nmax_resolution = 9") == everything
    assert changed("[evaluate]", '[evaluate]\ncontrol = "x"') == {"evaluate", "report"}
    stages = {s.name: s for s in build_stages(read_pipeline(write(tmp_path), chain_starts()))}
    assert (
        "--overwrite" in stages["evaluate"].tasks[0].arguments
    )  # the other's result takes the first one's place
    assert "--resume" in stages["pretrain"].tasks[0].arguments  # a job starts again after a time limit
    assert changed("shards = 2", "shards = 2\nworkers = 1") == set()
    assert changed("epochs = 3", "epochs = 3\nworkers = 1\nthreads = 1") == set()
    assert changed('"4G"', '"8G"') == set()
    assert changed("epochs = 3", "epochs = 3\nseed = 0") == set()  # the default, spelt out
    elsewhere = "compile = 'on'\nkeep = 3\nchannels_last = false\nnon_finite_steps = 9"
    assert changed("epochs = 3", f'epochs = 3\n{elsewhere}\nsource = "beton"\ntimeout_minutes = 1') == set()
    assert train < everything


def test_what_may_change_is_one_list_for_runs_stages_and_chains(tmp_path):
    """A step that ran out of memory says "or --recompute": neither `pretrain --resume` nor the chain starts over."""
    settings = PretrainSettings(out=tmp_path / "run")
    free = {name.rpartition(".")[2] for name in runtime(settings)}
    assert {"out", "preset", "source", "workers", "device", "compile", "recompute", "keep"} < free
    for stage in (LinearSettings, FinetuneSettings):  # what the two have in common is the same to both
        named = set(flat_hints(stage)) & set(flat_hints(PretrainSettings))
        assert runtime(stage(tmp_path)) & named == free & named
    create_run(settings, 10, resume=False)
    other = {
        "augmentation": "numba",
        "graph": "off",
        "compile": "off",
        "log": ("tensorboard", "wandb"),
        "source": "ffcv",
        "device": "cpu",
        "preset": "digits",
        "out": settings.out,
    }
    for name in free:
        value = next(v for k, v in flat(settings).items() if k == name)
        changed = not value if isinstance(value, bool) else other.get(name) or value + 1
        with_it = replaced(settings, {name: changed})
        create_run(with_it, 10, resume=True)
        assert digest("pretrain", with_it) == digest("pretrain", settings), name
    for name, changed in {"seed": 1, "temperature": 0.3, "chunk": 64, "ema": 0.9, "dim": 32}.items():
        with_it = replaced(settings, {name: changed})
        with pytest.raises(InputError, match=f"other settings .*{name}: "):
            create_run(with_it, 10, resume=True)
        assert digest("pretrain", with_it) != digest("pretrain", settings), name


def flat(settings) -> dict:
    pairs = [(f.name, getattr(settings, f.name)) for f in dataclasses.fields(settings)]
    groups = [flat(value) for _, value in pairs if dataclasses.is_dataclass(value)]
    return {k: v for k, v in pairs if not dataclasses.is_dataclass(v)} | {
        k: v for group in groups for k, v in group.items()
    }


def test_the_table_of_a_stage_has_the_last_word(tmp_path):
    text = FILE.replace("[cluster]", '[cluster]\ngpus = 4\nenvironment = { A = "1", B = "1" }')
    text = text.replace("[convert.train]", "max_resolution = 9\n[convert.train]\nmax_resolution = 5")
    made = read_pipeline(
        write(tmp_path, text + '[pretrain.cluster]\nenvironment = { A = "2" }\n'), chain_starts()
    )
    assert [made.convert[name].max_resolution for name in ("train", "test")] == [5, 9]
    clusters = {name: table.cluster for name, table in made.stages.items()}
    assert clusters["pretrain"].environment == {"A": "2", "B": "1"}
    assert clusters["evaluate"].environment == {"A": "1", "B": "1"}
    gpus = {name: (cluster.gpus, cluster.ranks_per_node) for name, cluster in clusters.items()}
    assert gpus == {"convert": (0, 1), "pretrain": (4, 4), "evaluate": (4, 1), "report": (0, 1)}


def test_a_setting_that_a_later_version_adds_changes_no_digest():
    later = dataclasses.make_dataclass("Later", [("new", int, 7)], bases=(KnnSettings,), frozen=True)
    now, same, other = KnnSettings(Path("run"), k=5), later(Path("run"), k=5), later(Path("run"), k=5, new=8)
    assert digest("knn", now, "x") == digest("knn", same, "x") != digest("knn", other, "x")


def test_a_source_that_changes_changes_the_digest(tmp_path):
    photos = tmp_path / "photos"
    (photos / "a").mkdir(parents=True)
    path = write(tmp_path, FILE.replace('"sklearn:digits"', '"photos"', 1))
    before = keys(path)
    assert keys(path) == before
    (photos / "a" / "new.jpg").write_bytes(b"x")
    os.utime(photos / "a", (1, 1))
    after = keys(path)
    assert after["merge-train"] != before["merge-train"] and after["convert-test"] == before["convert-test"]
    assert (
        folder_size(photos) == 1
        and folder_size(photos / "a" / "new.jpg") == 1
        and folder_size(Path("x:y")) is None
    )


def test_a_file_that_a_pattern_of_a_source_gains_changes_the_digest(tmp_path):
    path = write(tmp_path, FILE.replace('"sklearn:digits"', '"tars/train-*.tar"', 1))
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "train-0.tar").write_bytes(b"x")
    before = keys(path)
    assert keys(path) == before
    (tmp_path / "tars" / "train-1.tar").write_bytes(b"y")
    after = keys(path)
    assert after["merge-train"] != before["merge-train"] and after["convert-test"] == before["convert-test"]


SWEEP = "[finetune]\nepochs = 2\n[finetune.sweep]\ngrid = { label_fraction = [0.1, 1.0], lr = [[0.1], [0.2, 0.3]] }\n"


def test_a_sweep_is_an_array_whose_points_stand_alone(tmp_path):
    path = write(tmp_path, FILE + SWEEP)
    (stage,) = (s for s in build_stages(read_pipeline(path, chain_starts())) if s.name == "finetune")
    assert [task.label for task in stage.tasks] == [
        "label_fraction=0.1, lr=[0.1]", "label_fraction=0.1, lr=[0.2, 0.3]", "label_fraction=1.0, lr=[0.1]", "label_fraction=1.0, lr=[0.2, 0.3]",
    ]  # fmt: skip
    arguments = " ".join(stage.tasks[1].arguments)
    assert "--epochs 2 --label-fraction 0.1 --lr 0.2 0.3 --out" in arguments and "--test" in arguments
    assert len({task.outputs for task in stage.tasks}) == 4
    knn = FILE + "[knn.sweep]\ngrid = { k = [1, 5] }\n[linear]\n"
    stages = {s.name: s for s in build_stages(read_pipeline(write(tmp_path, knn), chain_starts()))}
    assert len({task.outputs for task in stages["knn"].tasks}) == 2
    assert {*stages["report"].after} == {"linear", "knn", "evaluate"}  # it shows all of them
    write(tmp_path, FILE + SWEEP)
    before = keys(path)
    after = keys(write(tmp_path, FILE + SWEEP.replace("1.0", "0.5")))
    assert {n for n in before if before[n] != after[n]} == {"finetune-03", "finetune-04", "report"}
    listed = SWEEP[: SWEEP.index("grid")] + "list = [{ label_fraction = 0.1, lr = [0.1] }, { seed = 1 }]\n"
    assert keys(write(tmp_path, FILE + listed))["finetune-01"] == before["finetune-01"]  # the same point
    (latent,) = (
        task.outputs[0].name
        for stage in build_stages(
            read_pipeline(write(tmp_path, FILE + '[linear]\nrepresentation = "latent"\n'), chain_starts())
        )
        for task in stage.tasks
        if task.name == "linear"
    )
    assert latent == "linear-latent.json"  # where `lvssl linear --representation latent` writes
    with_preset = FILE + '[linear]\npreset = "imagenet-linear"\nbatch_size = 4096\nprobe = "sgd"\n'
    plain = with_preset.replace('preset = "imagenet-linear"\n', "")
    assert keys(write(tmp_path, with_preset))["linear"] == keys(write(tmp_path, plain))["linear"]


def test_the_table_of_a_sweep_grows_as_its_points_end(tmp_path):
    path = write(tmp_path, FILE + SWEEP)
    (stage,) = (s for s in build_stages(read_pipeline(path, chain_starts())) if s.name == "finetune")
    result = stage.tasks[2].outputs[0]
    result.parent.mkdir(parents=True)
    result.write_text('{"results": {"features": {"top1": 61.25, "top1_interval": [60, 62], "n": 3}}}')
    assert write_table(tmp_path, stage.tasks).read_text().splitlines() == [
        "| point | settings | features top1 | features n |",
        "| --- | --- | --- | --- |",
        "| finetune-01 | label_fraction=0.1, lr=[0.1] | - | - |",
        "| finetune-02 | label_fraction=0.1, lr=[0.2, 0.3] | - | - |",
        "| finetune-03 | label_fraction=1.0, lr=[0.1] | 61.25 | 3 |",
        "| finetune-04 | label_fraction=1.0, lr=[0.2, 0.3] | - | - |",
    ]


def finish(out: Path, task) -> None:
    """Leaves what the job of a task leaves."""
    for path in task.outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(task.key)
    write_record(out, task, Record(task.name, task.digest, "done", outputs=fingerprints(task.outputs)))


def test_what_stands_is_not_done_again(tmp_path):
    path = write(tmp_path)
    stages = build_stages(read_pipeline(path, chain_starts()))
    out = tmp_path / "out"

    def todo() -> list[str]:
        return [task.name for work in plan(out, stages) for task in work.tasks]

    tasks = {task.name: task for stage in stages for task in stage.tasks}
    assert todo() == list(tasks)
    finish(out, tasks["convert-train-001"])
    assert todo() == [name for name in tasks if name != "convert-train-001"]
    for task in tasks.values():
        finish(out, task)
    assert todo() == []
    for name in ("convert-train-001", "convert-train-002"):  # merged, then removed
        for part in tasks[name].outputs:
            part.unlink()
    assert todo() == []
    result = tasks["evaluate"].outputs[0]
    for content in ("of another setting", tasks["evaluate"].key[::-1]):  # also one of the same length
        result.write_text(content)
        assert not stands(out, tasks["evaluate"]) and todo() == ["evaluate"]
    record = read_record(out, tasks["evaluate"])
    assert record is not None
    write_record(out, tasks["evaluate"], dataclasses.replace(record, job="7"))
    (found,) = standings(out, stages)["evaluate"]
    assert (found.state, found.error) == ("not run", "its result was removed or replaced since")
    finish(out, tasks["evaluate"])
    record = read_record(out, tasks["evaluate"])
    assert record is not None and stands(out, tasks["evaluate"])
    write_record(out, tasks["evaluate"], dataclasses.replace(record, state="running"))  # it was begun again
    assert todo() == ["evaluate"]
    finish(out, tasks["evaluate"])
    shutil.rmtree(tasks["merge-train"].outputs[0].parent)
    assert todo() == []  # nothing that isn't done needs the images
    tasks["evaluate"].outputs[0].unlink()  # it reads them
    assert todo() == ["convert-train-001", "convert-train-002", "merge-train", "evaluate"]
    works = plan(out, stages)
    assert [awaited(work, works) for work in works if work.tasks] == [[], ["convert"], ["merge", "pretrain"]]
    finish(out, tasks["evaluate"])
    tasks["pretrain"].outputs[0].unlink()
    assert todo() == ["convert-train-001", "convert-train-002", "merge-train", "pretrain"]


def test_what_stands_stands_after_a_move_of_the_folder(tmp_path):
    """It used to be made again, which failed at the files that were there."""
    (tmp_path / "here").mkdir()
    path = write(tmp_path / "here")
    tasks = [t for stage in build_stages(read_pipeline(path, chain_starts())) for t in stage.tasks]
    for task in tasks:
        finish(tmp_path / "here" / "out", task)
    (tmp_path / "here").rename(tmp_path / "there")
    stages = build_stages(read_pipeline(tmp_path / "there" / "pipeline.toml", chain_starts()))
    out = tmp_path / "there" / "out"
    assert not [task for work in plan(out, stages) for task in work.tasks]
    changed = stages[-1].tasks[0].outputs[0]
    changed.write_text("another's")
    assert [task.name for work in plan(out, stages) for task in work.tasks] == [stages[-1].tasks[0].name]


def test_stages_after_a_move_read_the_images_where_they_are(tmp_path):
    """They used to fail: the run's config.json names the images where they were in pretraining."""
    text = FILE + "".join(f"[{name}]\n" for name in MEASURING if name != "evaluate")

    def measuring(folder: Path):
        stages = build_stages(read_pipeline(folder / "pipeline.toml", chain_starts()))
        return [task for stage in stages if stage.name in MEASURING for task in stage.tasks]

    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    write(here, text)
    before = measuring(here)
    assert before[0].run is not None
    create_run(PretrainSettings(data=before[0].reads[0], out=before[0].run), classes=10, resume=False)
    assert measuring(here) == before and not [task for task in before if "--train" in task.arguments]
    here.rename(there)
    after = measuring(there)
    assert [task.key for task in after] == [task.key for task in before]
    for task in after:
        given = task.arguments[task.arguments.index("--train") + 1]
        assert given == str(task.reads[0]) and task.reads[0].is_relative_to(there)
    there.rename(here)
    (tmp_path / "link").symlink_to(here)  # another name of the same place
    assert not [task for task in measuring(tmp_path / "link") if "--train" in task.arguments]


def test_every_stage_behind_a_failed_one_names_it(tmp_path):
    path = write(tmp_path)
    stages = build_stages(read_pipeline(path, chain_starts()))
    out, failed = tmp_path / "out", stages[0].tasks[0]
    out.mkdir()
    write_record(out, failed, Record(failed.name, failed.digest, "failed", job="7", error="bad"))
    found = {name: each[-1] for name, each in standings(out, stages).items()}
    assert [(name, s.state, s.error) for name, s in found.items() if name != "convert"] == [
        (name, "not run", "convert failed") for name in ("merge", "pretrain", "evaluate", "report")
    ]


def test_a_conversion_that_fails_for_an_added_stage_is_not_called_done(tmp_path):
    """Its images were removed after pretraining, and are needed again."""
    path, out = write(tmp_path), tmp_path / "out"
    stages = build_stages(read_pipeline(path, chain_starts()))
    tasks = {task.name: task for stage in stages for task in stage.tasks}
    for task in tasks.values():
        finish(out, task)
    for name, task in tasks.items():
        for beton in task.outputs if name.startswith(("convert", "merge")) else ():
            beton.unlink()

    def states() -> dict[str, list[str]]:
        return {name: [s.state for s in each] for name, each in standings(out, stages).items()}

    done = {stage.name: ["done"] * len(stage.tasks) for stage in stages}
    assert states() == done
    failed = tasks["convert-train-001"]
    write_record(out, failed, Record(failed.name, failed.digest, "failed", job="7", error="disk full"))
    assert states() == done  # no stage needs it any more
    tasks["evaluate"].outputs[0].unlink()
    found = standings(out, stages)
    assert [s.state for s in found["convert"]] == ["failed", "done", "done"]
    assert [s.state for s in found["pretrain"]] == ["done"] and found["evaluate"][0].error == "convert failed"


def test_only_one_launch_at_a_time(tmp_path):
    path = write(tmp_path)
    with claimed(tmp_path / "out"), pytest.raises(InputError, match="is locked by another `lvssl launch`"):
        launch(path, chain_starts(), cluster="local")


def test_a_refused_launch_leaves_the_preset_of_the_last_one(tmp_path, monkeypatch):
    path = write(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch there
    with pytest.raises(InputError, match="no Slurm here"):
        launch(path, chain_starts(), preset="fashion-mnist")
    assert as_launched(path, chain_starts())[1] is None
    write_json(tmp_path / "out" / "launch.json", {"preset": "fashion-mnist"})  # as one that isn't refused
    pipeline, preset = as_launched(path, chain_starts())
    made = pipeline.stages["pretrain"].points[0].settings
    assert preset == "fashion-mnist" and made.view == PRESETS["fashion-mnist"].view != PRESETS["digits"].view


def test_torchvisions_downloads_are_not_in_the_copy_of_the_code(tmp_path):
    """A job's working folder is the copy of the code, which differs after every change."""
    given = FILE.replace('source = "sklearn:digits"', 'source = "torchvision:CIFAR10"')
    stages = build_stages(read_pipeline(write(tmp_path, given), chain_starts()))
    tasks = [task for task in stages[0].tasks if task.name.startswith("convert")]
    assert len(tasks) == 3
    for task in tasks:
        assert task.arguments[task.arguments.index("--root") + 1] == str(tmp_path / "data")
    given = given.replace("[convert]", '[convert]\nroot = "/elsewhere"')
    stages = build_stages(read_pipeline(write(tmp_path, given), chain_starts()))
    assert stages[0].tasks[0].arguments.count("--root") == 1 and "/elsewhere" in stages[0].tasks[0].arguments


def test_a_link_that_leads_nowhere_beside_the_images_stops_no_launch(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/gone.jpg").symlink_to("nowhere.jpg")
    given = FILE.replace('source = "sklearn:digits"', 'source = "photos"', 1)
    assert build_stages(read_pipeline(write(tmp_path, given), chain_starts()))


def test_options_of_convert_beton_are_its_own():
    known = {action.dest for action in parser()._actions}
    assert {f.name for f in dataclasses.fields(ImageSource)} - {"shards"} <= known
    assert "shard" in known and "merge" in known


def test_golden_sbatch(tmp_path):
    """After a wanted change: LVSSL_RENEW_GOLDEN=1 python -m pytest tests/slurm -k golden"""
    odd = tmp_path / """it's "odd"; echo foo"""
    odd.mkdir()
    text = FILE.replace(
        "[pretrain]",
        "[pretrain.cluster]\nnodes = 2\ngpus = 8\noptions = { gpus-per-node = 'a100:8' }\n[pretrain]",
    ).replace(
        "[cluster]",
        '[cluster]\npartition = "gpu"\naccount = "lab"\nconstraint = "a100&nvlink"\ncpus = 12\nmodules = ["cuda/13"]\n'
        'setup = ["ulimit -n 65536"]\nenvironment = { NCCL_SOCKET_IFNAME = "ib0", TITLE = "it\'s" }\n'
        'options = { "mail-type" = "FAIL" }\npython = "/opt/python 3/bin/python"\nwarning = 90\nconcurrency = 2',
    )
    pipeline = read_pipeline(write(odd, text), chain_starts())
    stages = {stage.name: stage for stage in build_stages(pipeline)}
    scripts = []
    for name, after in (("convert", []), ("pretrain", ["17", "18"])):
        made = executor(pipeline, stages[name], pipeline.out / "code" / "abc", after)
        scripts.append(made.script(len(stages[name].tasks)))
    text = "\n".join(scripts).replace(str(tmp_path), "/FOLDER")
    if os.environ.get("LVSSL_RENEW_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), (
        f"{GOLDEN.name} is no longer what is generated; if that is wanted: "
        + (test_golden_sbatch.__doc__ or "")
    )


def test_the_status_of_a_chain_that_was_never_launched_says_so(tmp_path, capsys):
    path = write(tmp_path)
    assert main(["status", str(path)]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == f"not launched yet: lvssl launch {path}"
    assert "failed" not in text and list(tmp_path.iterdir()) == [path]


def test_dry_run_shows_graph_scripts_and_costs_and_writes_nothing(tmp_path, capsys):
    path = write(tmp_path, FILE + "[pretrain.cluster]\nnodes = 2\ngpus = 4\n")
    assert main(["launch", str(path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "pretrain   after merge: 1 of 1 tasks, 2 nodes x 4, at most 01:00:00" in text
    assert text.count("#!/bin/bash") == 5 and "#SBATCH --dependency=afterok:JOB-OF-MERGE" in text
    assert "GPU-hours: at most 8.0" in text
    parameters = int(re.search(r"checkpoints of ([\d,]+) parameters", text).group(1).replace(",", ""))
    assert 90_000 < parameters < 100_000  # the tiny network of preset digits
    assert list(tmp_path.iterdir()) == [path]


def test_dry_run_expects_gpu_hours_from_measured_rates(tmp_path, digits, capsys):
    (tmp_path / "ILSVRC2012_img_train.tar").touch()
    made = FILE.replace("sklearn:digits", "ILSVRC2012_img_train.tar", 1).replace('"digits"', '"PRESET"')
    made = made.replace("epochs = 3", "epochs = 100").replace("PRESET", "bernoulli-imagenet-r50-100ep")
    there = f'out = "out"\n[data]\ntrain = "{digits["train"]}"\ntest = "{digits["test"]}"\n'
    for text, said in (
        (made, r"about 17.5 GPU-hours for 1,281,167 images, 100 epochs, on H100s at the rate measured"),
        (there + '[pretrain]\npreset = "digits"\n', "GPU-hours for 1,297 images, .* at the guessed rate"),
    ):
        path = write(tmp_path, text + "[pretrain.cluster]\ngpus = 2\n")
        assert main(["launch", str(path), "--dry-run"]) == 0
        assert re.search(f"pretrain: .*{said}", capsys.readouterr().out)
    pipeline = read_pipeline(path, chain_starts())
    settings = pipeline.stages["pretrain"].points[0].settings
    (run,) = (
        task.run for stage in build_stages(pipeline) for task in stage.tasks if stage.name == "pretrain"
    )
    run.mkdir(parents=True)
    row = {"step": 50, "epoch": settings.epochs / 2, "images_per_second": 50 * settings.batch_size / 1800}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["launch", str(path), "--dry-run"]) == 0
    said = (
        f"pretrain: 30 min left, 1.0 GPU-hours, at its rate of {row['images_per_second']:,.0f} img/s so far"
    )
    assert said in capsys.readouterr().out


def test_dry_run_gives_disk_from_measured_rates(tmp_path, capsys):
    chain = 'out = "out"\n[convert.train]\nsource = "ILSVRC2012_img_train.tar"\nmax_resolution = 500\n'
    chain += '[convert.test]\nsource = "ILSVRC2012_img_val.tar"\nmax_resolution = 400\n'
    for name in ("train", "val"):
        (tmp_path / f"ILSVRC2012_img_{name}.tar").touch()
    path = write(tmp_path, chain + '[pretrain]\npreset = "bernoulli-imagenet-r50-100ep"\n[evaluate]\n[knn]\n')
    assert main(["launch", str(path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    images = 1_281_167 + 50_000
    beton, features = 1_281_167 * 102_716 + 50_000 * 35_483, images * (4 * 2048 + 2048 // 8 + 16)
    for size, what in (
        (beton, "betons"),
        (features, "features and codes, 8,464 bytes per image"),
        (images * 8192, "features of the untrained network, while evaluate runs"),
    ):
        assert f"{size_text(size)} {what}" in text
    without = path.read_text().replace("[evaluate]\n[knn]\n", "")
    path.write_text(without + '[pretrain.cluster]\nstage_to = "$TMPDIR"\n')
    assert main(["launch", str(path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "features and codes" not in text and "on each node, in $TMPDIR" in text


def test_the_example_in_the_docs(tmp_path, capsys):
    text = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    example = text.split("```toml\n")[1].split("```")[0]
    for name in re.findall(r"/data/(\S+)\"", example):
        (tmp_path / name).write_bytes(b"")
    path = write(tmp_path, example.replace("/data/", f"{tmp_path}/"))
    assert main(["launch", str(path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "--array=0-8%4" in text and "--array=0-16%8" in text and "--gpus-per-node=8" in text
    assert set(read_pipeline(path, chain_starts()).stages) == {"convert", "pretrain", *MEASURING, "report"}


def test_the_last_row_is_the_last_that_is_whole(tmp_path):
    """The training may be writing another."""
    path = tmp_path / "metrics.jsonl"
    assert last_row(path) == {}
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null}\n{"step": 3, "lo')
    assert last_row(path) == {"step": 2}


def test_last_error_line(tmp_path):
    log = tmp_path / "log"
    noise = "srun: error: n1: task 0: Exited\nslurmstepd-n1: error: *** JOB\npipeline: rank 0\n"
    for text, line in {
        "": "",
        "step 1\nstep 2\n" + noise: "step 2",
        "error: no such run\nstep 3\n" + noise: "error: no such run",
        "Traceback (most recent call last):\n  x\nValueError: bad\n" + noise: "ValueError: bad",
        "torch.OutOfMemoryError: CUDA\n": "torch.OutOfMemoryError: CUDA",
    }.items():
        log.write_text(text)
        assert last_error(log) == line
    assert last_error(tmp_path / "none") == ""
