"""metrics.jsonl: significant digits, and JSON in every line."""

import json
import math
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from lvssl.runs import progress
from lvssl.runs.progress import Metrics, ThroughputMeter, read_metrics
from lvssl.training.health import alarms


@pytest.fixture
def lines(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.write({"step": 10, "epoch": 1.0, "lr": 3.2e-9, "loss": 5.5634567891, "rate_bits": math.nan})
    metrics.write({"step": 20, "epoch": 2.0, "lr": 0.0, "loss": math.inf, "units": math.nan})
    metrics.close()
    return tmp_path / "metrics.jsonl"


def test_a_small_rate_is_not_0_and_what_is_not_finite_is_null(lines):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    first, second = (json.loads(line, parse_constant=refuse) for line in lines.read_text().splitlines())
    assert first == {"step": 10, "epoch": 1.0, "lr": 3.2e-9, "loss": 5.5634568, "rate_bits": None}
    assert second == {"step": 20, "epoch": 2.0, "lr": 0.0, "loss": None, "units": None}


def test_readers_find_no_figure_where_there_was_none(lines):
    rows = read_metrics(lines)
    assert [set(row) for row in rows] == [{"step", "epoch", "lr", "loss"}, {"step", "epoch", "lr"}]
    assert not alarms(rows[1], 1.0)


def test_speed_and_waiting_are_those_since_the_last_look(monkeypatch):
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=count(0, 2).__next__))
    loader = SimpleNamespace(waited=7.0)
    meter = ThroughputMeter(100, torch.device("cpu"), loader)
    for steps, waited in ((3, 0.5), (5, 1.0)):  # each in 2 s
        meter.steps, loader.waited = meter.steps + steps, loader.waited + waited
        found = meter.speed()
        assert (found["images_per_second"], found["data_percent"]) == (50 * steps, 50 * waited)
        assert 0.01 < found["memory_gib"] < 1000
