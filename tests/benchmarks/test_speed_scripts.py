"""The scripts behind the speed tables: a missing peer is named, and no ratio is of less than it says."""

import multiprocessing

import numpy as np
import pytest

from benchmarks import augmentation
from pipelines.errors import InputError


def views(**speeds: float) -> list[dict]:
    return [
        {"what": "views", "form": name.replace("_", "-"), "each": [value]} for name, value in speeds.items()
    ]


def test_the_fastest_peer_is_named_only_if_all_of_them_ran():
    some = views(numba=1000.0, torchvision_pil=50.0, torchvision_tensor=40.0, kornia=25.0)
    assert augmentation.ratios(some) == {"views_over_torchvision": 20.0, "views_over_kornia": 40.0}
    every = some + views(albumentations=500.0)
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


def test_a_process_that_dies_ends_the_benchmark():
    with pytest.raises(InputError, match="ended early"):
        augmentation.speeds(["no form of ours"], 1, 1, 0.01)
