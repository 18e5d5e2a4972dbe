"""`lvssl encode` and `lvssl search` with an untrained network: folders, betons, batches, reranking, kills."""

import base64
import csv
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from devices import on_cpu_and_gpu
from PIL import Image
from sklearn.covariance import LedoitWolf

from lvssl.codes.file import CodeFileError, open_codes, open_means, open_uncertainty
from lvssl.codes.search import hamming_distances
from lvssl.commands.main import main
from lvssl.evaluation.codes import search
from lvssl.evaluation.embedding import Embedding, embed
from lvssl.evaluation.encoder import Encoder, Searcher, holds_many, identity
from lvssl.evaluation.fitted import TrainingImages
from lvssl.evaluation.knn import weighted_knn
from lvssl.evaluation.outputs import network_outputs
from lvssl.evaluation.quantisers import code_of_length, stored_quantiser
from lvssl.runs.run import Run, load_run
from lvssl.settings.apply import SearchSettings
from pipelines.decode import open_reader
from pipelines.decode.images import ImageReader
from pipelines.errors import InputError
from pipelines.kernels.pack import pack_bits
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
    outputs = network_outputs(loaded.network, crops, loaded.settings.view)
    assert codes.count == len(source) and len(set(codes.names)) == codes.count
    assert np.array_equal(codes.rows, pack_bits(outputs.bits))
    assert np.allclose(open_means(codes), outputs.mean, atol=2e-3)
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
    assert next(search(SearchSettings(run, out, codes=out)))[1], "codes of the same making may be compared"
    other = tmp_path / "b.lvcodes"
    assert lvssl("encode", run, "--images", digits["test"], "--out", other) == 0
    assert open_codes(other).created_by == "lvssl encode, cpu bf16"
    assert next(search(SearchSettings(run, digits["test"], codes=other)))[1]


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
    for query, options in [(pictures, ["--symmetric"]), (out, ["--staged"]), (out, ["--rerank"])]:
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
        assert all(r["uncertainty"] == r["query_uncertainty"] for r in first)


def test_reranked_neighbours_keep_their_distances(run, pictures, tmp_path):
    out = tmp_path / "a.lvcodes"
    assert lvssl("encode", run, "--images", pictures, "--out", out, "--means") == 0
    codes, means = open_codes(out), np.asarray(open_means(open_codes(out)), np.float32)
    truth = hamming_distances(codes.rows, codes.rows)
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    place = {name: i for i, name in enumerate(codes.names)}
    for query, found in search(SearchSettings(run=run, query=out, codes=out, k=150, rerank=True)):
        at = [place[n.name] for n in found]
        assert [n.distance for n in found] == truth[place[query.name], at].tolist()
        similarity = np.array([n.similarity for n in found])
        assert np.allclose(similarity, unit[at] @ unit[place[query.name]], atol=1e-4)
        assert (np.diff(similarity) <= 1e-6).all()
    for query, found in search(SearchSettings(run=run, query=out, codes=out, k=3, rerank=True)):
        row = place[query.name]
        sure = truth[row] < np.sort(truth[row])[99]  # of the 100 nearest codes, whatever the order of ties
        best = np.sort(unit[sure] @ unit[row])[::-1][:3]
        assert (np.array([n.similarity for n in found]) >= best - 1e-4).all()


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


# --- uncertainty, codes of a chosen length -----------------------------------------------------------


def in_memory(run: Path, source) -> Embedding:
    loaded = load_run(run)
    return embed(loaded.network, source, loaded.settings.view)


@pytest.mark.parametrize("which", ["run", "control"])
def test_every_image_gets_its_uncertainty_without_labels(which, request, pictures, tmp_path, capsys):
    folder, out, table = request.getfixturevalue(which), tmp_path / "a.lvcodes", tmp_path / "a.csv"
    assert lvssl("encode", folder, "--images", pictures, "--out", out, "--csv", table) == 0
    loaded, codes = load_run(folder), open_codes(out)
    view, source = loaded.settings.view, ImageReader(pictures, labelled=False)
    asked = network_outputs(
        loaded.network, evaluation_crops(source, view, np.arange(len(source))), view
    ).stages
    train, distances = TrainingImages(loaded).sample("stages"), []
    for part in (slice(0, 16), slice(16, 48), slice(48, 112)):
        mean, scale = train[:, part].mean(axis=0), train[:, part].std(axis=0)
        covariance = LedoitWolf().fit((train[:, part] - mean) / scale).covariance_
        x = (asked[:, part] - mean) / scale
        distances.append(np.einsum("nd,de,ne->n", x, np.linalg.inv(covariance), x) / x.shape[1])
    distance = np.mean(distances, axis=0)
    found = np.asarray(open_uncertainty(codes))
    assert np.isfinite(found).all() and np.corrcoef(found, distance)[0, 1] > 0.999
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == list(codes.names)
    assert np.allclose([float(row["uncertainty"]) for row in rows], found, rtol=1e-5)
    capsys.readouterr()
    assert lvssl("search", folder, "--query", pictures / codes.names[7], "--codes", out, "--k", 3) == 0
    printed = capsys.readouterr().out.splitlines()
    assert f"(uncertainty {found[7]:.4g})" in printed[0] and "uncertainty" in printed[1]
    assert f"{found[7]:.4g}" in printed[2] and printed[2].endswith(codes.names[7]) and len(printed) == 5


@pytest.mark.parametrize(
    "options", [[], ["--bits", 9, "--code", "bits"], ["--bits", 12, "--code", "itq"], ["--bits", 16]]
)
def test_real_valued_queries_find_the_nearest_of_what_codes_stand_for(options, run, pictures, tmp_path):
    if options == ["--bits", 16]:
        pytest.importorskip("faiss", reason="the extra `faiss` isn't installed")
    out = tmp_path / "a.lvcodes"
    assert lvssl("encode", run, "--images", pictures, "--out", out, *options) == 0
    codes, loaded = open_codes(out), load_run(run)
    quantiser = stored_quantiser(loaded, codes)
    kind = "features" if codes.quantiser["code"] != "bits" else "locations"
    assert codes.bits == (options[1] if options else codes_bits(loaded))
    source = ImageReader(pictures, labelled=False)
    values = TrainingImages(loaded, pictures).sample(kind)
    exact = np.square(quantiser.project(values)[:, None] - quantiser.decode(codes.rows)[None]).sum(axis=2)
    at = {name: row for row, name in enumerate(codes.names)}
    for i, (query, found) in enumerate(search(SearchSettings(run, pictures, codes=out, k=5))):
        words = quantiser.decode(codes.rows[[at[n.name] for n in found]])
        x = quantiser.project(values[i : i + 1])[0]
        wanted = [w @ x / np.sqrt((w @ w) * (x @ x)) for w in words]
        assert np.allclose([n.similarity for n in found], wanted, atol=1e-5)
        assert query.name == source.names[i]
        assert np.allclose([n.distance for n in found], np.sort(exact[i])[:5], rtol=1e-3, atol=1e-3)
    symmetric = [found for _, found in search(SearchSettings(run, pictures, codes=out, k=5, symmetric=True))]
    of_codes = [found for _, found in search(SearchSettings(run, out, codes=out, k=5))]
    assert symmetric == of_codes and max(found[0].distance for found in of_codes) < 1e-3


def codes_bits(loaded: Run) -> int:
    return loaded.network.family.code_bits(loaded.network.dim)


def test_without_the_training_images_there_is_one_line_and_a_way_on(run, pictures, tmp_path, capsys):
    out, gone = tmp_path / "a.lvcodes", tmp_path / "gone.beton"
    arguments = ["encode", run, "--images", pictures, "--out", out]
    assert lvssl(*arguments, "--train", gone) == 2
    assert "gone.beton" in (said := capsys.readouterr().err) and "--no-fit" in said and not out.exists()
    assert lvssl(*arguments, "--train", gone, "--no-fit") == 0
    assert open_codes(out).quantiser is None and not (tmp_path / "a.lvcodes.uncertainty").exists()
    _, found = next(search(SearchSettings(run, pictures, codes=out, k=2)))
    assert isinstance(found[0].distance, int) and found[0].distance == 0 and found[0].uncertainty is None


def test_what_is_left_out_of_the_training_images_is_said_once(run, pictures, tmp_path, capsys):
    images = shutil.copytree(pictures / "deep" / "0", tmp_path / "images")
    (images / "list.txt").touch()
    copy = shutil.copytree(run, tmp_path / "run")
    assert lvssl("encode", copy, "--images", images, "--train", images, "--out", tmp_path / "a.lvcodes") == 0
    assert capsys.readouterr().err.count("list.txt") == 1


def test_impossible_codes_are_refused_before_any_work(run, pictures, tmp_path, capsys, monkeypatch):
    own = codes_bits(load_run(run))
    for options, message in [
        (["--bits", -1], "--bits must be at least 0"),
        (["--code", "itq"], "--code itq needs --bits"),
        (["--code", "lsh"], "code"),
        (["--bits", own + 1, "--code", "bits"], f"at most {own:,} bits"),
        (["--bits", 9, "--code", "opq"], "--bits 16 instead of 9"),
        (["--bits", 8, "--code", "pca", "--no-fit"], "leave out --no-fit"),
        (["--csv", tmp_path / "no" / "a.csv"], "no such folder to write a.csv to"),
    ]:
        assert lvssl("encode", run, "--images", pictures, "--out", tmp_path / "a.lvcodes", *options) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr("lvssl.evaluation.quantisers.has_faiss", lambda: False)
    arguments = ["encode", run, "--images", pictures, "--out", tmp_path / "a.lvcodes", "--bits", 8]
    assert lvssl(*arguments, "--faiss", tmp_path / "a.faiss") == 2 and lvssl(*arguments, "--code", "opq") == 2
    assert "pip install 'lvssl[faiss]'" in capsys.readouterr().err
    assert lvssl(*arguments) == 0
    assert "note: using itq instead of opq" in capsys.readouterr().err
    assert open_codes(tmp_path / "a.lvcodes").quantiser["code"] == "itq"


def test_auto_takes_what_so_few_images_can_be_fitted_on(capsys):
    assert code_of_length(64, "auto", features=512, own=256, images=255) == "itq"
    assert (
        "note: using itq instead of opq, which needs 256 training images or more" in capsys.readouterr().err
    )
    assert code_of_length(64, "itq", 512, 256, 255) == "itq"
    assert not capsys.readouterr().err
    if importlib.util.find_spec("faiss"):
        assert {code_of_length(64, "auto", 512, 256, images) for images in (256, None)} == {"opq"}


def test_codes_of_another_quantiser_are_not_compared(run, pictures, tmp_path):
    a, b = tmp_path / "a.lvcodes", tmp_path / "b.lvcodes"
    for out, bits in ((a, 8), (b, 16)):
        assert lvssl("encode", run, "--images", pictures, "--out", out, "--bits", bits, "--code", "pca") == 0
    with pytest.raises(CodeFileError, match=r"b.lvcodes has 16 bits by pca .*: encode both in the same way"):
        next(search(SearchSettings(run, b, codes=a)))
    assert lvssl("encode", run, "--images", pictures, "--out", b, "--bits", 8, "--code", "pca",
                 "--train", pictures) == 0  # fmt: skip
    with pytest.raises(CodeFileError, match="a.lvcodes: its quantiser is neither"):
        next(search(SearchSettings(run, pictures, codes=a)))
    with pytest.raises(CodeFileError, match=r"a.lvcodes has 8 bits by pca .*: encode both in the same way"):
        next(search(SearchSettings(run, a, codes=b)))


@pytest.mark.parametrize("options", [[], ["--bits", "8", "--code", "pca"]])
def test_codes_of_a_run_that_cannot_be_written_are_found_again(options, run, pictures, tmp_path, capsys):
    """As from a colleague's run: what is fitted isn't kept there, but nothing is lost."""
    theirs, out = tmp_path / "theirs", tmp_path / "a.lvcodes"
    shutil.copytree(run, theirs, ignore=shutil.ignore_patterns("quantisers", "density*", "*.lvcodes*"))
    (theirs / "quantisers").symlink_to("nowhere")  # no folder can be made there
    encoded = ["encode", theirs, "--images", pictures, "--out", out, *options]
    assert lvssl(*encoded) == 0
    assert "quantisers/" in capsys.readouterr().err
    first = next(search(SearchSettings(theirs, pictures, codes=out, k=3)))
    linked = tmp_path / "elsewhere" / "b.lvcodes"
    linked.parent.mkdir()
    linked.symlink_to(out)
    assert next(search(SearchSettings(theirs, pictures, codes=linked, k=3))) == first  # with uncertainties
    shutil.copy(out, tmp_path / "alone.lvcodes")
    with pytest.raises(CodeFileError, match=r"nor \S+/alone.lvcodes.quantiser; encode"):
        next(search(SearchSettings(theirs, pictures, codes=tmp_path / "alone.lvcodes")))
    if options:  # only a fitted quantiser is kept beside the codes
        beside = tmp_path / "a.lvcodes.quantiser"
        beside.write_bytes(beside.read_bytes()[:-1])
        with pytest.raises(InputError, match=r"a.lvcodes.quantiser: .*; remove it and encode the images"):
            next(search(SearchSettings(theirs, pictures, codes=out)))
        beside.unlink()
        assert (
            lvssl(*encoded) == 0 and next(search(SearchSettings(theirs, pictures, codes=out, k=3))) == first
        )
    (theirs / "quantisers").unlink()
    assert lvssl(*encoded) == 0 and not (tmp_path / "a.lvcodes.quantiser").exists()
    assert next(search(SearchSettings(theirs, pictures, codes=out, k=3))) == first


def test_a_loaded_searcher_answers_again(run, pictures, tmp_path):
    out = tmp_path / "a.lvcodes"
    assert lvssl("encode", run, "--images", pictures, "--out", out) == 0
    wanted = {query.name: found for query, found in search(SearchSettings(run, pictures, codes=out, k=2))}
    searcher, names = Searcher(load_run(run), out), list(wanted)
    for some in (names[:3], names[3:5]):
        found = searcher.images([pictures / name for name in some], k=2)
        assert [[n.name for n in near] for near in found] == [[n.name for n in wanted[name]] for name in some]


def test_faiss_reads_what_encode_writes(run, pictures, tmp_path):
    faiss = pytest.importorskip("faiss", reason="the extra `faiss` isn't installed")
    out, index = tmp_path / "a.lvcodes", tmp_path / "a.faiss"
    assert lvssl("encode", run, "--images", pictures, "--out", out, "--bits", 16, "--faiss", index) == 0
    read = faiss.read_index(str(index))
    features = in_memory(run, ImageReader(pictures, labelled=False)).features
    distances, _ = read.search(features, 5)
    found = [[n.distance for n in near] for _, near in search(SearchSettings(run, pictures, codes=out, k=5))]
    assert np.allclose(distances, found, rtol=1e-2, atol=1e-2)


KILLED = """
import sys, time
from lvssl.codes.writer import CodeWriter
from lvssl.commands.main import main
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
    assert "resuming after" in capsys.readouterr().err
    assert list(open_codes(out).names) == list(open_codes(whole).names)
    # Threads of the killed process may differ, and with them the rounding of a logit near 0.
    assert np.bitwise_count(open_codes(out).rows ^ open_codes(whole).rows).sum() <= 2
    assert {p.name for p in tmp_path.iterdir()} == {
        f"{name}.lvcodes{end}" for name in ("whole", "a") for end in ("", ".means", ".uncertainty")
    }  # fmt: skip


def test_an_encoding_is_gone_on_with_only_if_every_code_would_be_the_same(run, digits, tmp_path):
    class Fitted(NamedTuple):
        digest: str

    images, names = Path(shutil.copy(digits["test"], tmp_path)), ["0", "1"]
    one = Encoder(load_run(run), 8)

    def told(encoder: Encoder = one, names: list[str] = names, on_error: str = "raise") -> str:
        return identity(encoder, images, names, on_error)

    assert told() == told()
    found = [told(), told(names=["0", "2"]), told(on_error="skip"), told(replace(one, bits=7))]
    found += [told(replace(one, **{part: Fitted("1")})) for part in ("quantiser", "density")]
    found += [told(replace(one, quantiser=Fitted("2")))]
    os.utime(images, ns=(0, 0))
    assert len({*found, told()}) == 8


def test_the_page_of_a_search_shows_queries_and_neighbours(run, pictures, tmp_path, capsys):
    out, page = tmp_path / "a.lvcodes", tmp_path / "found.html"
    assert lvssl("encode", run, "--images", pictures, "--out", out) == 0
    assert f"next: lvssl search {run} --codes {out} --query IMAGE" in capsys.readouterr().out
    one = next(pictures.rglob("*.png"))
    for query, count in ((one, 1), (pictures, 60), (out, 60)):
        options = ["--query", query, "--codes", out, "--k", 3, "--page", page, "--images", pictures]
        assert lvssl("search", run, *options) == 0
        assert capsys.readouterr().out == f"{page}\n"
        text = page.read_text()
        assert text.count("<details") == count and text.count("<img") == 4 * count
        found = re.findall(r'<img src="([^"]+)" alt="(?:Query ([^"]+)|([^"]+) at distance [^"]+)"', text)
        named = {(asked or near, source) for source, asked, near in found}
        assert len(found) == 4 * count and len(named) == len({name for name, _ in named})
        assert count == 1 or {asked for _, asked, _ in found} & {near for _, _, near in found} - {""}
    assert lvssl("search", run, "--query", one, "--codes", out, "--page", page) == 2
    assert "pass the images that were encoded, by --images" in capsys.readouterr().err


def test_an_output_that_would_be_dropped_or_has_no_folder_is_refused(run, tmp_path, capsys):
    query = ["search", run, "--query", tmp_path]
    assert lvssl(*query, "--csv", tmp_path / "a.csv", "--page", tmp_path / "a.html") == 2
    assert "error: --csv and --page each write" in capsys.readouterr().err
    assert lvssl(*query, "--images", tmp_path) == 2
    assert capsys.readouterr().err.startswith("error: --images are those that --page shows")
    assert lvssl(*query, "--page", tmp_path / "no" / "a.html") == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'no'}: no such folder to write a.html to\n"


def test_no_output_replaces_what_is_read_or_another_output(run, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part in ("part-1.beton", "part-2.beton"):
        shutil.copy(digits["test"], part)
    codes, made = Path("codes.lvcodes"), ["encode", run, "--images", "part-1.beton", "--out"]
    assert lvssl(*made, codes) == 0
    Path("part-1.beton.json").write_text("its manifest")
    Path("list.txt").write_text("part-1.beton\n")
    Path("in").mkdir()
    Image.new("RGB", (8, 8)).save("in/a.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    os.mkfifo("pipe")
    (tmp_path / "link.lvcodes").symlink_to(codes)
    for arguments, said in [
        ([*made, "part-1.beton"], "--out part-1.beton: this file is read"),
        ([*made, "part-2.beton"], "part-2.beton: exists and isn't a code file"),
        (
            [*made, "new", "--train", "part-*.beton", "--csv", "part-2.beton"],
            "--csv part-2.beton: this file is",
        ),
        ([*made, codes, "--csv", tmp_path / codes], "--out writes the same file"),
        ([*made, codes, "--csv", "link.lvcodes"], "--out writes the same file"),
        (["search", run, "--codes", codes, "--query", "part-1.beton", "--csv", codes], "this file is read"),
        (["search", run, "--codes", codes, "--query", "part-1.beton", "--page", "part-1.beton"], "is read"),
        ([*made, "new", "--csv", "part-1.beton.json"], "--csv part-1.beton.json: this file is read"),
        (["encode", run, "--images", "list.txt", "--out", "new", "--csv", "list.txt"], "this file is read"),
        (
            ["encode", run, "--images", "in", "--out", "new", "--csv", "in/a.png"],
            "in/a.png: exists and isn't a",
        ),
        *(
            [(["encode", run, "--images", "in", "--out", "new", "--faiss", "in/a.png"], "isn't an index")]
            if importlib.util.find_spec("faiss")
            else []
        ),
        ([*made, "new", "--csv", "new.uncertainty"], "--out writes the same file"),
        ([*made, "new", "--csv", "new.quantiser"], "--out writes the same file"),
        ([*made, "new", "--csv", "pipe"], "pipe: is not a regular file"),
        ([*made, "pipe"], "pipe: is not a regular file"),
        (
            ["search", run, "--codes", codes, "--query", "in", "--page", "list.txt"],
            "list.txt: exists and isn't",
        ),
        (
            ["search", run, "--codes", codes, "--query", "in", "--csv", f"{codes}.uncertainty"],
            "exists and isn't",
        ),
    ]:
        assert lvssl(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1, error
    (tmp_path / "link.lvcodes").unlink()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for again in range(2):  # an earlier result of the same kind is replaced
        Path("part-1.beton.json").unlink(missing_ok=True)
        assert lvssl(*made, codes, "--csv", "a.csv") == 0, again
        search = ["search", run, "--codes", codes, "--query", "part-1.beton"]
        paged = ["--page", "a.html", "--images", "part-1.beton", "--k", 1]
        assert lvssl(*search, "--csv", "a.csv") == 0 and lvssl(*search, *paged) == 0
    Path("empty").touch()  # as mktemp makes it
    assert lvssl(*made, "empty") == 0 and open_codes(Path("empty")).count == open_codes(codes).count


def test_large_images_are_shown_in_more_pixels_than_the_network_sees(run, tmp_path):
    """A query and its neighbour are the same image: the same picture by either way, of at most 96 pixels."""
    sizes, random = {"large": (300, 200), "middle": (70, 90), "small": (5, 7)}, np.random.default_rng(0)
    assert run.is_dir() and load_run(run).settings.view.resolution < 70
    shown = {}
    for name, size in sizes.items():
        folder = tmp_path / name
        folder.mkdir()
        for i in range(2):
            image = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            image.resize(size).save(folder / f"{i}.png")
        out, page = tmp_path / f"{name}.lvcodes", tmp_path / f"{name}.html"
        assert lvssl("encode", run, "--images", folder, "--out", out) == 0
        options = ["--query", folder / "0.png", "--codes", out, "--k", 1, "--page", page, "--images", folder]
        assert lvssl("search", run, *options) == 0
        query, near = re.findall(r'<img src="data:image/\w+;base64,([^"]+)"', page.read_text())
        assert query == near
        shown[name] = Image.open(io.BytesIO(base64.b64decode(query))).size
    side = load_run(run).settings.view.resolution
    assert shown == {"large": (96, 96), "middle": (70, 70), "small": (side, side)}


@pytest.mark.parametrize("name", ["a.tar", "a.TAR", "a.arrow", "a.TSV", "a.Beton", "a.txt", "a.lvcodes"])
def test_a_query_of_many_images_is_known_by_its_ending(name):
    assert holds_many(Path(name)) and not holds_many(Path(f"{name}.jpg"))


def test_a_set_that_has_a_name_can_be_the_query(run, pictures, tmp_path):
    out, page = tmp_path / "a.lvcodes", tmp_path / "found.html"
    assert lvssl("encode", run, "--images", pictures, "--out", out) == 0
    given = ["--codes", out, "--query", "sklearn:digits", "--k", 1]
    assert lvssl("search", run, *given, "--images", pictures, "--page", page) == 0 and page.is_file()


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss isn't installed")
def test_auto_counts_the_images_that_are_fitted_on(run, pictures, tmp_path):
    """The run has more than 256, the folder 150; an export knows what was fitted, and its own set no more."""
    out = tmp_path / "a.lvcodes"
    assert lvssl("encode", run, "--images", pictures, "--out", out, "--bits", 8, "--train", pictures) == 0
    assert open_codes(out).quantiser["code"] == "itq"
    exported = tmp_path / "exported"
    assert lvssl("export", run, "--out", exported, "--bits", 8, "--no-onnx") == 0
    shutil.rmtree(run / "quantisers")
    out = tmp_path / "b.lvcodes"
    assert lvssl("encode", exported, "--images", pictures, "--out", out, "--bits", 8) == 0
    assert open_codes(out).quantiser["code"] == "itq"


def test_a_length_that_only_opq_has_is_refused_for_few_images():
    with pytest.raises(
        InputError, match="--bits 1024: codes of this length need opq.* 256 training images or more, not 60"
    ):
        code_of_length(1024, "auto", features=512, own=256, images=60)
