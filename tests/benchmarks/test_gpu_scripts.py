"""The scripts for a GPU, without one: a failure costs a row and not the run, and a wrong kernel is seen."""

import dataclasses
import json
import platform
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
import triton_kernels

from benchmarks import gpu, gpu_study
from benchmarks.gpu_stages import commands, predictions, steps, study, suite
from benchmarks.gpu_stages.case import Setup
from benchmarks.gpu_stages.run import Report, Stage, processor, run_stages
from lvssl.settings.pretrain import PRESETS, EngineSettings
from pipelines.errors import InputError

HERE = Path(__file__).parent
CARD = {"card": "a card", "torch": "2", "triton": "3", "driver": "580"}


def stage(name: str, **options) -> Stage:
    return Stage(name, "gpu_cases", 1.0, environment={"PYTHONPATH": f"{gpu.ROOT}:{HERE}"}, options=options)


def rows_of(tmp_path: Path, stages: list[Stage], seconds: float) -> list[dict]:
    path = tmp_path / "rows.json"
    report = Report(path, CARD, {"head": 1}, keep=lambda row: row["stage"] == "kept")
    run_stages(stages, Setup("", "", "", device="cpu", scratch=str(tmp_path)), report, seconds)
    written = json.loads(path.read_text())
    assert written["head"] == 1 and all(row.items() >= CARD.items() for row in written["rows"])
    return written["rows"]


def test_a_processor_has_a_name_on_arm_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert processor() == platform.machine()  # no lscpu
    lines = "Architecture: aarch64", "Vendor ID: ARM", "  Model name:       Neoverse-V2", "    Model: 0"
    (tmp_path / "lscpu").write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    (tmp_path / "lscpu").chmod(0o755)
    assert processor() == "Neoverse-V2"


def test_what_fails_hangs_or_dies_costs_a_row(tmp_path):
    rows = {row["name"]: row for row in rows_of(tmp_path, [stage("trouble")], 60)}
    assert (
        rows["good"]["ok"]
        and rows["good"]["value"] == 1.5
        and rows["good"]["error"] == "nan"
        and rows["good again"]["ok"]
    )
    assert rows["raises"]["ok"] is False
    assert rows["raises"]["failed"] == "RuntimeError: CUDA error: an illegal memory access"
    assert rows["lacks a package"]["ok"] is None
    assert rows["lacks a package"]["failed"] == "missing: no_such_package"
    assert rows["before the end"]["ok"]  # what came before the process died
    dead = rows["several rows, then dead"]
    assert dead["ok"] is False and "status -9" in dead["failed"] and "the last words" in dead["failed"]
    assert rows["hangs"]["ok"] is False and "took too long" in rows["hangs"]["failed"]
    assert not running(int((tmp_path / "child").read_text()))


def running(process: int) -> bool:
    """Whether it still does anything; a container's init may not collect the dead."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_deadline_keeps_what_was_measured_and_leaves_time_for_the_next_stage(tmp_path):
    started = time.monotonic()
    rows = rows_of(tmp_path, [stage("first", endless=True), stage("second")], 10)
    assert time.monotonic() - started < 40
    first = {row["name"]: row for row in rows if row["stage"] == "first"}
    assert first["row 0"]["ok"] and first["row 1"]["ok"]
    assert first["endless"]["ok"] is None and "deadline" in first["endless"]["failed"]
    assert any(row["stage"] == "second" and row["name"] == "good" for row in rows)


def test_commands_that_a_deadline_cuts_off_are_named(tmp_path):
    """A row for each comes before the first is run; the dry run below sees that the results replace them."""
    setup = Setup("commands", "", "", device="cpu", dry=True, scratch=str(tmp_path))
    waiting = list(islice(commands.commands(setup), 3 * commands.IN_A_DRY_RUN))
    assert len({row["name"] for row in waiting}) == 6
    assert all(row["ok"] is None and row["failed"] == commands.WAITING for row in waiting)


def test_other_stages_rows_stay(tmp_path):
    earlier = {"rows": [{"stage": "kept", "name": "a", **CARD}, {"stage": "trouble", "name": "b", **CARD}]}
    (tmp_path / "rows.json").write_text(json.dumps(earlier))
    rows = rows_of(tmp_path, [], 1)
    assert [row["name"] for row in rows] == ["a"]


def test_a_stage_that_cannot_start_is_a_row(tmp_path):
    broken = Stage("broken", "no_such_module", 1.0)
    (row,) = rows_of(tmp_path, [broken], 30)
    assert row["ok"] is False and "ModuleNotFoundError" in row["failed"]


@pytest.fixture(scope="module")
def interpreted() -> list[dict]:
    pytest.importorskip("triton", reason="torch's CUDA builds bring triton; a CPU build does not")
    triton_kernels.run("interpreted_loop.py", TRITON_INTERPRET="1")  # skips where the interpreter can't
    lines = triton_kernels.run("benchmarks/gpu_planted.py", TRITON_INTERPRET="1")
    return [json.loads(line) for line in lines]


def test_a_wrong_kernel_turns_its_row_red(interpreted):
    assert len(interpreted) == 8 + 1
    for plant in interpreted[:8]:
        assert all(verdict is True for verdict in plant["before"]), plant
        assert False in plant["with"], plant


def test_every_kernel_is_repeated_and_sanitized(interpreted):
    found = interpreted[8]
    assert len(found["there"]) == 12 and found["there"] == found["launched"] == found["named"]


def test_each_test_is_a_row(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\npytestmark = pytest.mark.gpu\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no card')\ndef test_left(): pass\n"
    )
    setup = Setup("tests", "", str(tmp_path / "rows"), device="cpu", options={"files": [str(file)]})
    rows = {row["name"].rpartition("::")[2]: row for row in suite.tests(setup)}
    assert rows["test_good"]["ok"] is True and rows["test_bad"]["ok"] is False
    assert "1 == 2" in rows["test_bad"]["failed"]
    assert rows["test_left"]["ok"] is None and "no card" in rows["test_left"]["failed"]
    total = rows["all tests marked gpu"]
    assert total["ok"] is False and total["counts"] == "1 passed, 1 failed, 1 skipped"


def test_overlapping_kernels_count_once():
    events = [{"ts": 0, "dur": 4}, {"ts": 2, "dur": 4}, {"ts": 8, "dur": 2}]
    assert steps.busy(events, 3) == {"launches": 1.0, "busy": 0.8}


def test_files_are_named_by_the_card():
    assert gpu.default_path("NVIDIA H100 80GB HBM3", False).name == "gpu-h100.json"
    assert gpu.default_path("NVIDIA RTX A6000", False).name == "gpu-a6000.json"
    assert gpu_study.study_path("NVIDIA H200", False).name == "gpu-study-h200.json"


def test_arms_share_the_time():
    options = gpu_study.parsed(["--data", "x", "--minutes", "9"])
    speed = [{"stage": "speed", "ok": True, "seconds_an_epoch": 4.0}]
    epochs = gpu_study.epochs_that_fit(options, speed, 500)
    assert 3 * (4 * epochs + gpu_study.START + gpu_study.MEASURING) <= 500 < 3 * (4 * (epochs + 1) + 47)
    assert gpu_study.epochs_that_fit(options, speed, 10) == 1
    assert gpu_study.epochs_that_fit(options, [], 500) == 1
    slow = {"stage": "speed", "ok": True, "seconds_an_epoch": 40.0}
    assert gpu_study.epochs_that_fit(options, [slow, *speed], 1500) < epochs  # that of the slowest


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "name the images"),
        (["--train", "a.beton"], "go together"),
        (["--data", "x", "--every", "0"], "--every"),
    ],
)
def test_the_study_refuses_what_cannot_be(arguments, said):
    with pytest.raises(InputError, match=said):
        gpu_study.parsed(arguments)


def test_predictions_stand_beside_measurements(tmp_path):
    rows = [
        {"stage": "times", "name": "ours, 224 px, bf16, blur 0.5", "us_per_view": 1.25},
        {"stage": "times", "name": "kornia, 224 px, blur 0.5", "us_per_view": 25.0},
        {"stage": "exact", "name": "luma", "ok": False},
    ]
    card = {"card": "NVIDIA H100 80GB HBM3"}
    (tmp_path / "gpu-h100.json").write_text(json.dumps({"rows": [row | card for row in rows]}))
    page = tmp_path / "gpu.md"
    page.write_text(f"before\n{gpu.BEGIN}\nold\n{gpu.END}\nafter\n")
    gpu.document(page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(f"{gpu.END}\nafter\n") and "old" not in text
    assert "| augmentation, 224 px, bf16, blur 0.5 | us/view | 1.4-1.7 | 1.25 |" in text
    assert "| augmentation, 224 px: kornia's time over ours | at least 10 | 20 (reached) |" in text
    assert "| kernels that fail against fp64 or differ between repeats | 0 | 1 (missed) |" in text
    assert predictions.NOT_YET in text


def test_the_page_shows_what_the_files_hold(tmp_path):
    docs = gpu.ROOT / "docs"
    for path in [docs / "gpu.md", *docs.glob("gpu-*.json")]:
        (tmp_path / path.name).write_text(path.read_text())
    gpu.document(tmp_path / "gpu.md")
    assert (tmp_path / "gpu.md").read_text() == (docs / "gpu.md").read_text(), (
        "run python -m benchmarks.gpu --doc"
    )


@pytest.mark.slow
def test_the_proof_goes_through_every_stage_on_a_cpu(tmp_path):
    path = tmp_path / "dry.json"
    patient = ["--minutes", "120"]  # however busy the machine is
    assert gpu.main(["--dry-run", *patient, "--json", str(path), "--cache", str(tmp_path / "cache")]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["stage"] for row in rows} == {stage.name for stage in gpu.STAGES}
    assert not [row for row in rows if row["ok"] is False or row.get("failed") == commands.WAITING]
    named = {row["name"]: row for row in rows}
    for how in ("eager", "recorded", "compiled", "compiled and recorded", "deterministic"):
        for source in ("synthetic", "loader"):
            assert named[f"engine, {source}, {how}, tiny, 16 px, 16 images"]["images_per_second"] > 0
    assert named["what people have today, tiny, 16 px, 16 images"]["images_per_second"] > 0


@pytest.mark.slow
def test_the_study_goes_through_every_stage_on_a_cpu(tmp_path):
    path = tmp_path / "study.json"
    places = ["--json", str(path), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path)]
    common = ["--dry-run", "--minutes", "120", *places]
    named = [word for arm in gpu_study.ARMS for word in ("--only", arm)]
    assert gpu_study.main([*common, *named]) == 0
    arms = [row for row in json.loads(path.read_text())["rows"] if row["stage"] in gpu_study.ARMS]
    assert [row["arm"] for row in arms] == list(gpu_study.ARMS)
    timed = [row["name"] for row in json.loads(path.read_text())["rows"] if row["stage"] == "speed"]
    assert timed == [f"speed, {arm}" for arm in gpu_study.ARMS]
    for row in arms:
        assert all(0 <= row[name] <= 100 for name in ("linear", "knn", "code_knn", "tuned_1", "tuned_all"))
    assert gpu_study.main([*common, "--to-knn", "20", "--every", "1"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert sum(row["stage"] in gpu_study.ARMS for row in rows) == len(gpu_study.ARMS)  # the table grows
    assert any(row["stage"] == "to-knn" and row["seconds"] > 0 for row in rows)


def test_a_network_in_training_is_evaluated_in_its_precision(digits, tmp_path):
    """Encoding takes the precision from the network, not from a surrounding autocast."""
    chosen = dataclasses.replace(
        PRESETS["digits"], data=digits["train"], out=tmp_path, engine=EngineSettings(precision="bf16")
    )
    trainer, loader = study.trainer_of(chosen, torch.device("cpu"))
    seen = set()
    trainer.network.backbone.register_forward_hook(lambda _, __, features: seen.add(features.dtype))
    with loader:
        setup = Setup("", "", "", device="cpu", options={k: str(path) for k, path in digits.items()})
        assert 20 < study.knn_so_far(setup, trainer) < 100  # untrained
    assert seen == {torch.bfloat16} and trainer.network.training


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so():
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=gpu.ROOT)
    assert done.returncode == 1 and done.stderr.startswith("error: no CUDA device is usable here: --dry-run")


@pytest.mark.slow
def test_no_file_with_gpu_tests_is_left_out():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    collected = subprocess.run([*command, "tests"], cwd=suite.ROOT, capture_output=True, text=True).stdout
    files = {str(suite.ROOT / line.split("::")[0]) for line in collected.splitlines() if "::" in line}
    assert files and files <= set(suite.marked(suite.ROOT / "tests"))
