"""The scripts behind the speed tables: a missing peer is named, and no ratio is of less than it says."""

import argparse
import json
import multiprocessing
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
from PIL import Image

from benchmarks import augmentation, before, codes, conversion, engine, loader, loss, search, stages
from benchmarks.gpu_stages import predictions, times
from benchmarks.gpu_stages.run import LATE
from benchmarks.peers import PillowBlur
from lvssl.losses.ntxent import reference
from pipelines.errors import InputError


def views(**speeds: float) -> list[dict]:
    return [
        {"what": "views", "form": name.replace("_", "-"), "each": [value]} for name, value in speeds.items()
    ]


def test_the_fastest_peer_is_named_only_if_all_of_them_ran():
    some = views(numba=1000.0, torchvision_pil=50.0, torchvision_tensor=40.0, kornia=25.0)
    assert augmentation.ratios(some) == {"views_over_torchvision": 20.0, "views_over_kornia": 40.0}
    assert "views_over_fastest_peer" not in augmentation.ratios(some + views(albumentations=500.0))
    every = some + views(albumentations=500.0, pillow_blur=100.0)
    assert augmentation.ratios(every)["views_over_fastest_peer"] == 2.0


def test_a_form_whose_package_is_missing_is_absent_and_the_others_are_timed(monkeypatch):
    def missing(crops):
        import no_such_package  # type: ignore[import-not-found]

        return no_such_package

    ones = np.ones((augmentation.BATCH, 3, augmentation.SIDE, augmentation.SIDE), np.float32)
    ones[:, 0] = -1
    forms = {"kornia": missing, "numba": lambda crops: lambda: ones}
    monkeypatch.setattr(augmentation, "FORMS", forms)
    here, there = multiprocessing.Pipe()
    here.send(("numba", 0.0))
    here.send(None)
    augmentation.serve(there, ["kornia", "numba"])
    absent, speed = here.recv(), here.recv()
    assert absent == {"kornia": "No module named 'no_such_package'"} and speed > 0


def test_pillows_blur_is_near_torchvisions():
    crops = augmentation.photographs(2)
    for sigma in (0.5, 2.0):
        image = Image.fromarray(crops[0])
        theirs = np.asarray(T.functional.gaussian_blur(image, [23, 23], [sigma, sigma]), np.float32)
        ours = np.asarray(PillowBlur((sigma, sigma))(image), np.float32)
        unblurred = np.abs(np.asarray(image, np.float32) - theirs).mean()
        assert np.abs(ours - theirs).mean() < min(1.0, 0.5 * unblurred)


def test_a_process_that_dies_ends_the_benchmark():
    with pytest.raises(InputError, match="ended early"):
        augmentation.speeds(["no form of ours"], 1, 1, 0.01)


def test_the_better_of_two_of_dalis_forms_needs_both():
    seconds = {"two_views": [1.0], "dali_two_crops": [4.0], "torchvision": [5.0]}
    assert loader.ratios(seconds) == {"two_view_over_torchvision": 5.0}
    assert loader.ratios(seconds | {"dali_two_decodes": [3.0]})["two_view_over_dali"] == 3.0


def test_a_contender_waits_until_the_threads_of_the_one_before_are_idle():
    end = time.process_time() + 0.3

    def goes_on():
        while time.process_time() < end:
            pass

    thread = threading.Thread(target=goes_on)
    thread.start()
    loader.wait_until_idle()
    assert not thread.is_alive()


def test_each_tar_has_its_own_beton(tmp_path):
    for name, count in (("a", 1), ("b", 2)):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for i in range(count):
                Image.new("RGB", (16, 16)).save(tmp_path / "0.jpg")
                tar.add(tmp_path / "0.jpg", f"cat/{i}.jpg")
        _, files = loader.same_bytes(tmp_path / f"{name}.tar", tmp_path / "cache")
        assert len(list(files.rglob("*.jpg"))) == count


def test_a_peer_that_is_installed_but_broken_is_absent(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("libnvimgcodec.so: cannot open shared object file\nmore")

    monkeypatch.setattr(loader, "dali", broken)
    monkeypatch.setattr(loader, "BetonReader", lambda path: path)
    monkeypatch.setattr(loader, "ours", lambda *_, **__: lambda: 0)
    options = argparse.Namespace(workers=1, batch_size=2, only=["dali_two_crops"])
    contenders, absent = loader.prepare(options, tmp_path, tmp_path)
    assert list(contenders) == ["two_views"] and "cannot open" in absent["dali_two_crops"]
    monkeypatch.setattr(loader, "ours", broken)
    with pytest.raises(RuntimeError):
        loader.prepare(options, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        (augmentation, "--rounds 0", "at least 1"),
        (before, ". --data x --rounds 1", "at least 2"),
        (codes, "run --test x --limit 1000", "above 1,000"),
        (conversion, "--images no/such", "no such folder or tar"),
        (conversion, "--repeats 0", "at least 1"),
        (engine, "--rounds 1", "at least 2"),
        (loader, "--workers 0", "at least 1"),
        (search, "--count 5 --k 10", "above --count"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(script, arguments, said):
    with pytest.raises(InputError, match=said):
        script.main(arguments.split())


def test_a_missing_package_of_the_loss_is_named_and_the_others_are_timed(monkeypatch, tmp_path, capsys):
    def missing():
        raise ModuleNotFoundError("No module named 'lightly'")

    monkeypatch.setitem(loss.FORMS, "lightly", missing)
    threads = torch.get_num_threads()
    words = (
        f"--forms ours lightly --sizes 64 --largest 0 --seconds 0 --threads 1 --json={tmp_path / 'x.json'}"
    )
    loss.main(words.split())
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "x.json").read_text())
    assert [row["form"] for row in found["rows"]] == ["ours"] and found["rows"][0]["rounds"] >= 3
    assert found["absent"] == {"lightly": "No module named 'lightly'"}
    assert "absent: No module named 'lightly'" in capsys.readouterr().out


def test_each_part_of_the_engines_file_says_how_it_was_made(tmp_path):
    there = {"matrix": [1], "made": {"matrix": {"settings": {"batch": "8"}, "versions": {"torch": "1"}}}}
    options = argparse.Namespace(threads=1, batch=128, json=tmp_path / "x.json", part=["overhead"])
    found = engine.with_part(there, "overhead", {"x": 2}, options)
    assert found["matrix"] == [1] and found["overhead"] == {"x": 2}
    assert found["made"]["matrix"] == there["made"]["matrix"]
    assert found["made"]["overhead"]["settings"] == {"threads": "1", "batch": "128"}


def test_the_seconds_of_a_stage_are_those_of_all_calls(tmp_path):
    row, kept = {"arm": "none", "seed": 0, "stage": "knn"}, tmp_path / "out" / "seconds.json"

    def interrupted():
        time.sleep(0.05)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.in_all_calls(kept, row, interrupted)
    figures, seconds = stages.in_all_calls(kept, row, lambda: [{"figures": None}])
    assert figures == [{"figures": None}] and seconds >= 0.05
    assert stages.in_all_calls(kept, row | {"seed": 1}, lambda: [])[1] < 0.05


def test_the_matrix_form_in_bf16_is_the_definition():
    u = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    u[32:] = 0.7 * u[:32] + 0.7 * u[32:]
    assert abs(times.matrix_in_bf16(u, 0.2) - reference(u, 0.2)) < 0.01


def test_a_kernel_check_that_was_cut_off_reaches_no_goal():
    rows = {"a": {"stage": "exact", "name": "a", "ok": True}}
    assert predictions.wrong(rows) == 0
    late = {"stage": "exact", "name": "b", "ok": None, "failed": LATE}
    assert predictions.wrong(rows | {"b": late}) is None
