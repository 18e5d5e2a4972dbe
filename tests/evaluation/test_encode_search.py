"""`lvssl encode` and `lvssl search` with an untrained network: folders, betons, batches, reranking, kills."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from devices import on_cpu_and_gpu
from PIL import Image

from lvssl.cli import main
from lvssl.codes.file import CodeFileError, open_codes, open_means
from lvssl.codes.search import hamming_distances
from lvssl.evaluation.codes import SearchSettings, codes_of, search
from lvssl.evaluation.embedding import embed
from lvssl.evaluation.knn import weighted_knn
from lvssl.runs.run import Run, load_run
from pipelines.decode import open_reader
from pipelines.loader import evaluation_crops


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(150):
        side = random.integers(8, 20, 2).tolist()
        image = Image.fromarray(random.integers(0, 256, (5, 5), dtype=np.uint8)).resize(tuple(side))
        (folder / "deep" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        image.save(folder / "deep" / str(i % 3) / f"{i:03d}.png")
    return folder


def lvssl(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_a_beton_gives_the_codes_of_its_images_under_their_names(run, digits, tmp_path):
    out = tmp_path / "digits.lvcodes"
    assert lvssl("encode", run, "--images", digits["test"], "--out", out, "--means") == 0
    codes, source, loaded = open_codes(out), open_reader(digits["test"]), load_run(run)
    crops = evaluation_crops(source, loaded.settings.view, np.arange(len(source)))
    expected, means = codes_of(loaded, crops)
    assert codes.count == len(source) and len(set(codes.names)) == codes.count
    assert np.array_equal(codes.rows, expected)
    assert np.allclose(open_means(codes), means, atol=2e-3)
    assert 0.2 < np.unpackbits(codes.rows).mean() < 0.8


def test_codes_of_another_arithmetic_are_not_compared(run, digits, tmp_path, monkeypatch):
    """A file says what computed it; queries that are encoded elsewhere, or less exactly, are refused."""
    out = tmp_path / "a.lvcodes"
    assert lvssl("encode", run, "--images", digits["test"], "--out", out) == 0
    assert open_codes(out).created_by == "lvssl encode, cpu fp32"

    def in_bf16(folder: Path) -> Run:
        loaded = load_run(folder)
        loaded.network.precision = torch.bfloat16
        return loaded

    monkeypatch.setattr("lvssl.evaluation.codes.load_encoder", in_bf16)
    with pytest.raises(
        CodeFileError, match=r"a.lvcodes: its codes were computed by cpu fp32, .* by cpu bf16"
    ):
        next(search(SearchSettings(run, digits["test"], codes=out)))
    assert next(search(SearchSettings(run, out, codes=out)))[0], "codes of the same making may be compared"
    other = tmp_path / "b.lvcodes"
    assert lvssl("encode", run, "--images", digits["test"], "--out", other) == 0
    assert open_codes(other).created_by == "lvssl encode, cpu bf16"
    assert next(search(SearchSettings(run, digits["test"], codes=other)))[0]


@on_cpu_and_gpu
def test_a_set_in_bf16_is_nearly_that_in_fp32(run, digits, device):
    """As a GPU embeds it: features to bf16's rounding, hardly a bit of the code, the same neighbours."""
    source, exact = open_reader(digits["test"]), load_run(run, torch.device("cpu"))
    fast = load_run(run, torch.device(device))
    assert exact.arithmetic == "cpu fp32" and (device == "cpu" or fast.arithmetic == "cuda bf16")
    fast.network.precision = torch.bfloat16
    wanted, found = (embed(r.network, source, r.settings.view) for r in (exact, fast))
    assert found.features.dtype == np.float32
    error = np.linalg.norm(found.features - wanted.features) / np.linalg.norm(wanted.features)
    assert 1e-5 < error < 0.02
    differing = np.bitwise_count(found.codes ^ wanted.codes).sum() / (len(found.codes) * found.bits)
    assert differing < 0.03
    accuracies = [weighted_knn(e.features, e.labels, e.features, e.labels, k=5) for e in (wanted, found)]
    assert abs(accuracies[0] - accuracies[1]) < 3


def test_many_queries_from_everywhere_find_themselves(run, pictures, tmp_path, capsys):
    out = tmp_path / "a.lvcodes"
    assert lvssl("encode", run, "--images", pictures, "--out", out, "--means", "--workers", 3) == 0
    codes = open_codes(out)
    assert list(codes.names) == sorted(str(p.relative_to(pictures)) for p in pictures.rglob("*.png"))
    capsys.readouterr()
    for query, options in [(pictures, []), (out, ["--staged"]), (out, ["--rerank"])]:
        table = tmp_path / "found.csv"
        arguments = ["--query", query, "--codes", out, "--k", 4, "--csv", table, *options]
        assert lvssl("search", run, *arguments) == 0
        assert "150 queries" in capsys.readouterr().out
        with open(table, newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 600 and [r["rank"] for r in rows[:5]] == ["1", "2", "3", "4", "1"]
        first = [r for r in rows if r["rank"] == "1"]
        assert all(r["distance"] == "0" for r in first)
        assert all(bool(r["similarity"]) == ("--rerank" in options) for r in rows)
        assert {r["query"] for r in rows} == set(codes.names)


def test_reranked_neighbours_keep_their_distances(run, pictures, tmp_path):
    out = tmp_path / "a.lvcodes"
    assert lvssl("encode", run, "--images", pictures, "--out", out, "--means") == 0
    codes, means = open_codes(out), np.asarray(open_means(open_codes(out)), np.float32)
    truth = hamming_distances(codes.rows, codes.rows)
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    place = {name: i for i, name in enumerate(codes.names)}
    for query, found in search(SearchSettings(run=run, query=out, codes=out, k=150, rerank=True)):
        at = [place[n.name] for n in found]
        assert [n.distance for n in found] == truth[place[query], at].tolist()
        similarity = np.array([n.similarity for n in found])
        assert np.allclose(similarity, unit[at] @ unit[place[query]], atol=1e-4)
        assert (np.diff(similarity) <= 1e-6).all()


def test_damaged_images_are_left_out_where_asked(run, pictures, digits, tmp_path, capsys):
    (tmp_path / "set").mkdir()
    for i, path in enumerate(sorted(pictures.rglob("*.png"))[:6]):
        (tmp_path / "set" / f"{i}.png").write_bytes(path.read_bytes() if i != 3 else b"\x89PNG broken")
    arguments = ["encode", run, "--images", tmp_path / "set", "--out", tmp_path / "a.lvcodes"]
    assert lvssl(*arguments) == 2
    assert "3.png" in capsys.readouterr().err and not (tmp_path / "a.lvcodes").exists()
    assert lvssl(*arguments, "--on-error", "skip") == 0
    assert "left out" in capsys.readouterr().err
    assert list(open_codes(tmp_path / "a.lvcodes").names) == [f"{i}.png" for i in (0, 1, 2, 4, 5)]


def test_a_truncated_index_and_a_query_file_of_another_run_are_errors(run, pictures, tmp_path, capsys):
    out, other = tmp_path / "a.lvcodes", tmp_path / "b.lvcodes"
    assert lvssl("encode", run, "--images", pictures, "--out", out) == 0
    content = out.read_bytes()
    digest = open_codes(out).checkpoint.encode()
    other.write_bytes(content.replace(digest, b"0" * len(digest)))
    capsys.readouterr()
    for arguments, message in [
        (["--query", other, "--codes", out], "b.lvcodes: made by checkpoint 000000000000"),
        (["--query", out, "--codes", other], "b.lvcodes: made by checkpoint 000000000000"),
        (["--query", out, "--codes", out, "--rerank"], "encode --means"),
        (["--query", tmp_path / "no.png", "--codes", out], "no.png"),
    ]:
        assert lvssl("search", run, *arguments) == 2
        assert message in capsys.readouterr().err
    out.write_bytes(content[:5000])
    assert lvssl("search", run, "--query", out, "--codes", out) == 2
    assert "truncated at byte 5000" in capsys.readouterr().err


KILLED = """
import sys, time
from lvssl.codes.writer import CodeWriter
from lvssl.cli import main
append = CodeWriter.append
def slow(self, *rest):
    append(self, *rest)
    time.sleep(0.2)
CodeWriter.append = slow
sys.exit(main(sys.argv[1:]))
"""


def test_kill_9_in_mid_encode_and_the_same_command_again(run, digits, tmp_path, capsys):
    whole, out = tmp_path / "whole.lvcodes", tmp_path / "a.lvcodes"
    arguments = ["encode", run, "--images", digits["train"], "--means", "--out"]
    assert lvssl(*arguments, whole) == 0
    command = [sys.executable, "-c", KILLED, *map(str, arguments), str(out)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    part = tmp_path / ".a.lvcodes.names.part"
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    capsys.readouterr()
    assert lvssl(*arguments, out) == 0
    assert "going on after" in capsys.readouterr().err
    assert list(open_codes(out).names) == list(open_codes(whole).names)
    # Threads of the killed process may differ, and with them the rounding of a logit near 0.
    assert np.bitwise_count(open_codes(out).rows ^ open_codes(whole).rows).sum() <= 2
    assert {p.name for p in tmp_path.iterdir()} == {
        "whole.lvcodes", "whole.lvcodes.means", "a.lvcodes", "a.lvcodes.means"
    }  # fmt: skip
