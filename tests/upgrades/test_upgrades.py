"""What each version has written (make.py), read by this one: the same numbers, or refused by name."""

import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from make import begin
from safetensors import safe_open
from safetensors.numpy import save_file

import lvssl
from lvssl.codes.file import CodeFileError, open_codes, open_uncertainty
from lvssl.codes.index import Index
from lvssl.commands.main import main
from lvssl.evaluation import embedding
from lvssl.evaluation.embedding import embed, embedded
from lvssl.evaluation.quantisers import stored_quantiser
from lvssl.runs.identity import describe_set
from lvssl.runs.listing import Listed
from lvssl.runs.progress import read_metrics
from lvssl.runs.run import load_run
from pipelines.convert.command import main as convert_beton
from pipelines.decode import open_reader

ARCHIVES = sorted(Path(__file__).parent.glob("*.tar.xz"))


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def made(request, tmp_path, one_thread) -> Path:
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_beton_tars_and_their_manifests(made):
    assert convert_beton(["--verify", str(made / "set.beton")]) == 0
    known = json.loads((made / "run/config.json").read_text())["data"]
    for name in ("set.beton", "tars", "images"):
        found = describe_set(open_reader(made / name))
        assert found["images"] == 40 and found["classes"] == known["classes"]
        assert name == "images" or found["digest"] == known["digest"]


def test_an_interrupted_run_goes_on_to_the_same_losses(made):
    expected = json.loads((made / "expected.json").read_text())["steps"]
    assert Listed.of(made / "run").state == "stopped"
    assert main(begin(made, "--resume")) == 0
    found = {row["step"]: row["loss"] for row in read_metrics(made / "run/metrics.jsonl")}
    assert found == {row["step"]: pytest.approx(row["loss"], rel=1e-4) for row in expected}
    assert Listed.of(made / "run").state == "done"


def test_codes_uncertainty_quantiser_and_index(made):
    run = load_run(made / "run", torch.device("cpu"))
    codes, images = open_codes(made / "run/codes.lvcodes"), made / "images"
    quantiser, index = stored_quantiser(run, codes), Index.open(made / "codes.index")
    found = lvssl.Model(run).encode(images)
    assert found.names == list(codes.names) == list(index.ids)
    assert np.allclose(found.uncertainty, open_uncertainty(codes), rtol=1e-3, atol=1e-3)  # of the density
    own = np.unpackbits(quantiser.encode(found.features) ^ codes.rows, axis=1)
    assert own.mean() < 0.01 and np.array_equal(index.rows, codes.rows)
    nearest = lvssl.Model(run).search(images / "b/03.png", k=3)[0]
    same, distances = index.search(found.features[found.names.index("b/03.png")][None], 3)
    assert nearest[0].name == same[0][0] == "b/03.png"
    assert np.allclose([one.distance for one in nearest], distances[0], rtol=1e-3, atol=1e-4)


def test_the_store_of_features_is_found_and_holds_them(made):
    run, source = load_run(made / "run", torch.device("cpu")), open_reader(made / "set.beton")
    before = contents(made / "run/features")
    found, anew = embedded(run, source), embed(run.network, source, run.settings.view)
    assert contents(made / "run/features") == before
    assert np.allclose(found.features, anew.features, rtol=1e-3, atol=1e-4)
    assert np.array_equal(found.labels, anew.labels)


def test_results_and_an_export(made, capsys):
    assert Listed.of(made / "run").figures["knn"] > 50
    known = json.loads((made / "run/knn.json").read_text())["results"]["features"]["top1"]
    sets = ["--train", str(made / "set.beton"), "--test", str(made / "set.beton")]
    assert main(["knn", str(made / "run"), *sets, "--overwrite"]) == 0
    assert json.loads((made / "run/knn.json").read_text())["results"]["features"]["top1"] == known
    models = [lvssl.load(made / name, "cpu") for name in ("run", "export")]
    one, other = (model.encode(made / "set.beton") for model in models)
    assert np.array_equal(one.code, other.code) and np.array_equal(one.uncertainty, other.uncertainty)


def relabelled(path: Path, name: str, value: str) -> None:
    """Another value in the header of a file of safetensors."""
    with safe_open(path, "np") as file:
        arrays, about = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(arrays, path, about | {name: value})


def test_what_another_version_has_written_is_refused_by_name_or_made_anew(made, monkeypatch, capsys):
    run = load_run(made / "run", torch.device("cpu"))
    path = made / "run/codes.lvcodes"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"version": 1', b'"version": 2', 1))
    with pytest.raises(CodeFileError, match="codes.lvcodes: format version 2.*encode the images again"):
        open_codes(path)
    path.write_bytes(whole)
    relabelled(made / "codes.index", "lvssl index", "2 0")
    with pytest.raises(CodeFileError, match="codes.index: format version 2.*save the index again"):
        Index.open(made / "codes.index")
    relabelled(made / "run/quantisers/itq-16.safetensors", "version", "2")
    with pytest.raises(CodeFileError, match="neither .*itq-16.safetensors nor .*; encode the images again"):
        stored_quantiser(run, open_codes(path))
    monkeypatch.setattr(embedding, "VERSION", 2)
    embedded(run, open_reader(made / "set.beton"))
    assert len(list((made / "run/features").iterdir())) == 2
    config = made / "run/config.json"
    config.write_text(re.sub(r'"results": \d+', '"results": 1', config.read_text()))
    assert main(begin(made, "--resume")) == 2
    assert "run was started with results version 1" in capsys.readouterr().err
    shutil.copy(config, made / "config.json")
    config.write_text(config.read_text().replace('"temperature"', '"warmth"'))
    assert main(["knn", str(made / "run"), "--test", str(made / "set.beton")]) == 2
    assert "config.json" in (said := capsys.readouterr().err) and "warmth" in said
