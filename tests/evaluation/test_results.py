"""A measuring command's result says what it was made from: it is found again, and others don't replace it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from every_command import call
from PIL import Image

from lvssl.codes.controls import CONTROLS
from lvssl.commands.main import main
from lvssl.evaluation.evaluate import measure
from lvssl.evaluation.probe import linear_probe
from lvssl.evaluation.scorer import uncertainty
from lvssl.evaluation.sets import Sampling, Sets, embed_both, labelled_pair, with_defaults
from lvssl.runs import checkpoint
from lvssl.runs.labels import open_pair
from lvssl.runs.result import read_result
from lvssl.runs.rows import are_rows
from lvssl.runs.run import load_run, run_names
from lvssl.settings.measure import EvaluateSettings
from pipelines.errors import InputError

# By command: quick options, its files, and another setting.
COMMANDS = {
    "evaluate": ([], ("evaluation.json", "gallery.npz"), ["--control", "{other}"]),
    "analyse": (["--max-images", "40", "--samples", "1"], ("analysis.json", "bits.npz"), ["--seed", "1"]),
    "compression": (["--bits", "16"], ("compression.json", "compression.csv"), ["--top-n", "9"]),
}


@pytest.fixture
def runs(run, control, tmp_path) -> dict[str, Path]:
    return {
        name: Path(shutil.copytree(folder, tmp_path / name))
        for name, folder in (("run", run), ("control", control), ("other", control))
    }


def test_the_control_beside_a_run_is_found_from_within_and_through_a_link(runs, tmp_path, monkeypatch):
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper/link").symlink_to(runs["run"])
    monkeypatch.chdir(runs["run"])
    for folder in (Path(), Path("../run"), tmp_path / "deeper/link"):
        found = with_defaults(EvaluateSettings(folder), load_run(folder)).control
        assert found is not None and found.resolve() == runs["control"]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def read_digest(run: Path) -> str:
    return checkpoint.digest(checkpoint.paths(run / "checkpoints")[-1])


def later(run: Path) -> None:
    """One more step, with the same weights."""
    state = checkpoint.load_latest(run / "checkpoints")[1]
    checkpoint.save(run / "checkpoints", state["step"] + 1, state | {"step": state["step"] + 1})


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=pytest.mark.slow) if c == "analyse" else c for c in COMMANDS]
)
def test_a_result_is_found_again_and_no_other_takes_its_place_unasked(command, runs, capsys, monkeypatch):
    options, names, another = COMMANDS[command]
    run, files = runs["run"], [runs["run"] / name for name in names]
    another = [word.format(**runs) for word in another]

    def call(*words: object) -> tuple[int, str, str]:
        status = main([command, *map(str, (*words, *options))])
        return status, *capsys.readouterr()

    def stamps() -> list[int]:
        return [file.stat().st_mtime_ns for file in files]

    status, printed, _ = call(run)
    assert status == 0
    result, made = json.loads(files[0].read_text()), stamps()
    assert result["checkpoint"] == read_digest(run) and set(result["beside"]) == {str(runs["control"])}
    assert "overwrite" not in result["settings"] and result["settings"]["test"].endswith("test.beton")
    assert result["command"].startswith(f"lvssl {command} {run} --") and result["versions"]["torch"]
    monkeypatch.chdir(run.parent)
    assert call("run")[:2] == (0, printed.replace(str(run), "run")) and stamps() == made  # from any folder

    status, _, said = call(run, *another)
    assert status == 2 and len(said.splitlines()) == 1 and stamps() == made
    name = another[0].removeprefix("--").replace("-", "_")
    assert f"{files[0]} already holds a result for other settings ({name}: " in said
    assert "pass --overwrite to overwrite it" in said
    assert "--out to write elsewhere" in said
    assert call(run, *another, "--overwrite")[0] == 0 and stamps()[0] > made[0]
    assert str(json.loads(files[0].read_text())["settings"][name]) == another[1]


def test_a_result_of_older_checkpoints_or_without_all_of_its_files_is_not_taken(runs, capsys):
    run, result = runs["run"], runs["run"] / "evaluation.json"
    assert main(["evaluate", str(run)]) == 0
    made = result.stat().st_mtime_ns
    (run / "gallery.npz").unlink()
    assert main(["evaluate", str(run)]) == 0 and (run / "gallery.npz").exists()
    assert (made := result.stat().st_mtime_ns) > made - 1
    later(runs["control"])
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 2
    assert f" for other settings (checkpoint of {runs['control']}: " in capsys.readouterr().err
    assert result.stat().st_mtime_ns == made and main(["evaluate", str(run), "--overwrite"]) == 0
    later(run)
    assert main(["evaluate", str(run)]) == 2 and "(checkpoint: " in capsys.readouterr().err
    older = json.loads(result.read_text())
    older["versions"]["results"] -= 1
    result.write_text(json.dumps(older | {"checkpoint": read_digest(run)}))
    assert main(["evaluate", str(run)]) == 2 and "(results version: 1 -> 2)" in capsys.readouterr().err
    result.write_text(json.dumps({"run": {"linear": 1.0}}))  # of a version that named no checkpoint there
    assert main(["evaluate", str(run)]) == 2 and "(checkpoint: None -> " in capsys.readouterr().err
    nested = json.loads(json.dumps(older)) | {"rows": None}  # of a version before rows: measured again
    nested["versions"]["results"] += 1
    result.write_text(json.dumps(nested | {"checkpoint": read_digest(run)}))
    assert main(["evaluate", str(run)]) == 0 and are_rows(read_result(result)["rows"])
    capsys.readouterr()
    result.write_text("{")
    assert main(["evaluate", str(run)]) == 2 and f"{result}: not a result (" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--overwrite"]) == 0 and are_rows(read_result(result)["rows"])


def test_a_control_with_another_objective_is_said_to_have_one(run, control, tmp_path, capsys):
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in (run, control)]
    assert main(["evaluate", str(copies[0]), "--control", str(copies[1])]) == 0
    assert "trained with" not in capsys.readouterr().err
    config = json.loads((copies[1] / "config.json").read_text())
    config["settings"]["latent"]["objective"] = "ntxent-vc"
    (copies[1] / "config.json").write_text(json.dumps(config))
    assert main(["evaluate", str(copies[0]), "--control", str(copies[1]), "--overwrite"]) == 0
    assert f"{copies[1]} was trained with --objective ntxent-vc, {copies[0]} with ntxent: " in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("width", [32, 128])
def test_the_controls_codes_are_what_a_plain_probe_and_plain_neighbours_say(control, digits, width):
    loaded = load_run(control)
    train, test = embed_both(loaded, *open_pair(digits["train"], digits["test"]), workers=1)
    points, _, left_out = measure(train, test, loaded.network, [("ITQ", width), ("OPQ", width)])
    refused = ["ITQ of the control, 128 bits: 64 features"] * (width == 128)
    assert [line[:41] for line in left_out] == refused
    labels = train.labels, test.labels
    found = {method: figures for _, method, _, figures in points[1:]}
    assert set(found) == ({"ITQ", "OPQ"} if width == 32 else {"OPQ"})  # 64 features have no 128 components
    for method, figures in found.items():
        coder = CONTROLS[method](train.features, width)
        codes = coder.encode(train.features), coder.encode(test.features)
        x, test_x = (coder.decode(code) for code in codes)
        cosines = unit(test_x) @ unit(x).T
        votes = np.zeros((len(test_x), 10))
        for i, row in enumerate(cosines):
            at = np.sort(row)[-20]
            share = (20 - (row > at + 1e-6).sum()) / (abs(row - at) <= 1e-6).sum()
            weights = np.where(row > at + 1e-6, 1, share) * np.exp((row - 1) / 0.07)
            near = row > at - 1e-6
            votes[i] = np.bincount(labels[0][near], weights[near], 10)
        knn = 100 * (votes.argmax(1) == labels[1]).mean()
        assert figures["knn"] == pytest.approx(knn, abs=0.25)  # OPQ's ties go to the first image
        probe = linear_probe(x, labels[0], test_x, labels[1]).accuracy
        assert figures["linear"] == pytest.approx(probe, abs=0.25)


def test_without_faiss_a_line_says_what_the_strongest_control_may_be(runs, capsys, monkeypatch):
    monkeypatch.setattr("lvssl.evaluation.measures.has_faiss", lambda: False)
    assert main(["evaluate", str(runs["run"])]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "faiss" in line]
    assert len(said) == 1 and "OPQ of the control" in said[0] and "pip install 'lvssl[faiss]'" in said[0]
    content = read_result(runs["run"] / "evaluation.json")
    assert said[0] == f"note: {content['left_out'][0]}"
    methods = {row["method"] for row in content["rows"] if row["representation"] == "code"}
    assert methods == {"code", "sign", "PCA + sign", "ITQ", "LSH"}


def test_figures_that_are_no_numbers_are_shown_alike_when_found(runs, capsys):
    """JSON has no NaN: what was one when it was printed is null when it is found."""
    run = runs["run"]
    for command in ("analyse", "compression"):
        options, names, _ = COMMANDS[command]
        assert main([command, str(run), *options]) == 0
        path = run / names[0]
        result = json.loads(path.read_text())
        for row in result["rows"]:
            if row["metric"] in ("r_auroc", "ood noise", "map_over_hits"):
                row["value"] = None
        path.write_text(json.dumps(result))
        capsys.readouterr()
        assert main([command, str(run), *options]) == 0
        assert "nan" in capsys.readouterr().out


def test_runs_of_one_folder_name_are_told_apart_by_their_paths(runs, tmp_path):
    twin = Path(shutil.copytree(runs["control"], tmp_path / "deeper" / "run"))
    loaded = [load_run(path) for path in (runs["run"], runs["control"], twin)]
    assert run_names(loaded[:2]) == ["run", "control"]
    assert run_names(loaded) == [str(run.folder) for run in loaded]


def test_an_older_rate_curve_is_measured_again(runs):
    """Its rows had all metrics of a point side by side."""
    run = runs["run"]
    typed = ["compression", str(run), "--control", str(runs["control"]), *COMMANDS["compression"][0]]
    assert main(typed) == 0
    path = run / "compression.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"rows": [{"model": "run", "method": "code", "bits": 64}]}))
    assert main(["report", str(run)]) == 0 and 'id="bits-stored"' not in (run / "report.html").read_text()
    assert main(typed) == 0 and json.loads(path.read_text())["rows"] == result["rows"]


def of_stage(**results: object) -> str:
    return json.dumps({"stage": "knn", "results": results, "data": {"images": 1}, "command": ""})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "Expecting value"),
        ("[]", "an object is expected, not list"),
        ('{"settings": 3}', "settings: an object is expected, not int"),
        ('{"rows": {}}', "rows: a list is expected, not dict"),
        ("\xff", "codec can't decode"),
        (of_stage(code=3), "results.code: an object is expected, not int"),
        (of_stage(code={"top5": 3.0}), "results.code.top1: a number is expected, not NoneType"),
        (of_stage(code={"targets": "x"}), "results.code.targets: an object is expected, not str"),
        (of_stage(code={"targets": {"age": 3}}), "results.code.targets.age: an object is expected, not int"),
        (of_stage(code={"targets": {"age": {}}}), "targets.age.r2: a number is expected, not NoneType"),
    ],
)
def test_what_is_no_result_is_refused_in_one_line(tmp_path, content, said):
    path = tmp_path / "x.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError) as error:
        read_result(path, rows=list)
    assert str(error.value).startswith(f"{path}: not a result (") and said in str(error.value)
    for version in ('{"results": "x"}', '{"results": [2]}'):
        path.write_text(f'{{"versions": {version}}}')
        with pytest.raises(InputError, match=r"x\.json: versions\.results: a number is expected"):
            read_result(path)
    path.write_text('{"rows": null, "beside": {}}')
    assert read_result(path, rows=list, beside=dict) == {"rows": None, "beside": {}}


def test_weights_that_are_not_finite_end_each_command_in_one_line(runs, digits, capsys):
    for name in ("run", "control"):
        state = checkpoint.load_latest(runs[name] / "checkpoints")[1]
        for key in [key for key in state["network"] if key.startswith("backbone.")]:
            state["network"][key] = state["network"][key] * float("nan")
        checkpoint.save(runs[name] / "checkpoints", state["step"] + 1, state)
    for command, options in [
        ("evaluate", []), ("compression", ["--bits", "16"]), ("linear", []), ("knn", []),
        ("analyse", ["--max-images", "40", "--samples", "1"]), ("curate", []),
        ("encode", ["--images", str(digits["test"])]),
    ]:  # fmt: skip
        status, said = call([command, str(runs["run"]), *options], capsys)
        assert status == 1 and said.count("error: ") == 1 and "the training diverged" in said, said


def test_a_control_that_was_found_is_not_to_blame_for_labels_that_are_missing(runs, digits, tmp_path, capsys):
    """Beside the run lies another of the name `control`, which has a latent and isn't one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), 60 * i, np.uint8)).save(folder / f"{i}.png")
    shutil.rmtree(runs["control"])
    shutil.copytree(runs["run"], runs["control"])
    evaluate = ["evaluate", str(runs["run"])]
    status, said = call([*evaluate, "--train", str(folder), "--test", str(folder)], capsys)
    assert status == 2 and f"{folder}: its images have no labels" in said
    status, said = call(evaluate, capsys)
    assert (
        status == 2
        and "a control must be of family none or sign, not bernoulli; pass one with --control" in said
    )


def test_runs_trained_without_labels_stand_beside_a_control_with_them(runs):
    run, control = load_run(runs["run"]), load_run(runs["control"])
    pair = run.settings.data, run.settings.data.with_name("test.beton")
    labelled_pair(replace(run, classes=[]), replace(control, classes=["a", "b"]), *pair)
    with pytest.raises(InputError, match="other classes"):
        labelled_pair(replace(run, classes=["a"]), replace(control, classes=["a", "b"]), *pair)


def test_a_full_disk_is_named(runs, small_disk, fill, capsys):
    out, run = small_disk / "out", str(runs["run"])
    assert main(["report", run, "--out", str(out)]) == 0
    assert main(["evaluate", run, "--workers", "1"]) == 0
    capsys.readouterr()
    (runs["run"] / "evaluation.json").rename(runs["run"] / "was.json")
    fill()
    for command in ("evaluate", "report"):
        status, said = call([command, run, "--out", str(out)], capsys)
        last = said.splitlines()[-1]
        assert status == 1 and last.startswith(f"error: {out}/")
        assert last.endswith(": No space left on device")


def test_sets_of_foreign_images_with_one_name_are_all_measured(run, digits, tmp_path):
    """Nor do they take the place of the sets that are always there, or of the counts for the test images."""
    paths = [digits["test"]]
    for name in ("a/test.beton", "b/noise.beton", "b/others.beton"):
        paths.append(tmp_path / name)
        paths[-1].parent.mkdir(exist_ok=True)
        shutil.copy(digits["test"], paths[-1])
    loaded, sources = load_run(run), open_pair(digits["train"], digits["test"])
    found = Sets.of(Sampling(40, ood=(*paths, paths[0])), loaded, *sources)
    own = {"noise", "textures", "digits"}
    assert set(found.out_of_distribution) == own | {*map(str, paths[:3]), "others"}
    assert np.array_equal(found.out_of_distribution[str(paths[1])], found.test)
    assert not np.array_equal(found.out_of_distribution["noise"], found.test)
    assert list(found.skipped)[:2] == ["train", "test"] and len(found.skipped) == 2 + len(paths)


def test_a_class_that_the_sampled_training_images_lack_counts_as_wrong(run, digits):
    """As a rare class of a large set, of which a few thousand training images are measured."""
    loaded, sampling = load_run(run), Sampling(40, samples=1)
    sets = Sets.of(sampling, loaded, *open_pair(digits["train"], digits["test"]))
    rare = sets.train_labels == 9
    fewer = replace(sets, train=sets.train[~rare], train_labels=sets.train_labels[~rare])
    assert (sets.test_labels == 9).any()
    probes = uncertainty(loaded, fewer, sampling)[0]["probes"]
    for probe in probes.values():
        assert probe["accuracy"] <= 100 * (sets.test_labels != 9).mean() and np.isfinite(probe["nll"])
