"""The cores that a process may use, also where the system can't say (macOS)."""

import os

import numpy as np
import pytest

from lvssl.codes.search import hamming_search
from lvssl.commands.doctor import check_cores
from pipelines.cores import cores


def test_those_of_the_process():
    assert cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("count", [4, None])
def test_search_and_doctor_work_where_the_system_has_no_affinity(monkeypatch, count):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert cores() == (count or 1)
    codes = np.random.default_rng(0).integers(0, 256, (50, 8), np.uint8)
    rows, distances = hamming_search(codes[:3], codes, 1)
    assert rows[:, 0].tolist() == [0, 1, 2] and not distances.any()
    assert f"of {count}" in check_cores().found
