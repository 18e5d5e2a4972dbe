"""Encoders of the Hugging Face Hub, from its cache as it lies on the disk: no test asks the network."""

import os
import shutil
import subprocess
import sys

import pytest
from test_export import made_run

import lvssl
from lvssl.commands.main import main
from pipelines.errors import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    run = made_run(folder / "run", "digits", "tiny")
    assert main(["export", str(run), "--out", str(folder / "out"), "--no-onnx"]) == 0
    return folder / "out"


def offline(cache, code: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, for huggingface_hub reads its settings when it is imported."""
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", f"import lvssl\n{code}"], env=environment, capture_output=True, text=True
    )


def test_an_export_in_the_cache_is_loaded(exported, tmp_path):
    repository = tmp_path / "models--someone--encoder"
    shutil.copytree(exported, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    names = ('lvssl.load("hf://someone/encoder")', f'lvssl.load("hf://someone/encoder@{COMMIT}")')
    for loaded in (*names, 'lvssl.Model.from_pretrained("someone/encoder")'):
        done = offline(tmp_path, f"print({loaded}.run.digest)")
        assert done.stdout.strip() == lvssl.load(exported).run.digest, done.stderr


@pytest.mark.parametrize(
    ("name", "said"), [("someone/else", "hf://someone/else: "), ("a/b/c", "hf://a/b/c: ")]
)
def test_what_is_not_there_is_said_in_one_line(name, said, tmp_path):
    done = offline(tmp_path, f'from pipelines.errors import InputError\ntry: lvssl.load("hf://{name}")\n'
                   "except InputError as error: print(error)")  # fmt: skip
    assert done.stdout.startswith(said) and len(done.stdout.splitlines()) == 1, done.stdout + done.stderr


def test_a_folder_needs_no_hub(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it weren't installed
    assert lvssl.Model.from_pretrained(exported).bits == lvssl.load(exported).bits
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        lvssl.load("hf://someone/encoder")
