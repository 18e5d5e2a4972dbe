"""Make one of each file that lvssl keeps, as this version writes it, in an archive named after the version.

    python tests/upgrades/make.py     # for a release; test_upgrades.py reads the files of every version

It holds a set of 40 small images as beton and tars; a run stopped after one of two epochs, with the results
of encode, knn and export; an index of its codes; and expected.json, with the losses of all steps.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

import lvssl
from lvssl.codes.file import open_codes
from lvssl.codes.index import Index
from lvssl.commands.main import main
from lvssl.evaluation.quantisers import stored_quantiser
from lvssl.runs.progress import keep_until, read_metrics
from lvssl.runs.run import load_run
from pipelines.convert.command import main as convert_beton

HERE = Path(__file__).parent
MADE_IN = Path("/tmp/lvssl-made")  # some of the files contain this path


def begin(folder: Path, *more: str) -> list[str]:
    """Return the arguments of the pretraining, which has 4 steps."""
    sets = ["--data", str(folder / "set.beton"), "--out", str(folder / "run"), "--preset", "digits"]
    size = ["--epochs", "2", "--batch-size", "20", "--dim", "16", "--hidden", "8", "--projection", "8"]
    how = ["--optimiser", "sgd", "--momentum", "0", "--lr", "0.05", "--log-every", "1", "--device", "cpu"]
    return ["pretrain", *sets, *size, *how, "--workers", "1", "--threads", "1", *more, "--log"]


def images(folder: Path) -> Path:
    """Write two classes of 20 images each, half of them JPEGs."""
    rng = np.random.default_rng(0)
    for i in range(40):
        coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8) // (1 + i % 2)
        path = folder / "ab"[i % 2] / f"{i:02d}.{'jpg' if i % 4 < 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((16, 12), Image.Resampling.BICUBIC).save(path)
    return folder


def run(arguments: list[str]) -> None:
    if (convert_beton if arguments[0] == "convert-beton" else main)(
        arguments[arguments[0] == "convert-beton" :]
    ):
        raise SystemExit(f"failed: {' '.join(arguments)}")


def make(folder: Path) -> None:
    at, source = folder / "run", images(folder / "images")
    sets = ["--train", str(folder / "set.beton"), "--test", str(folder / "set.beton")]
    tars = ["--webdataset", str(folder / "tars"), "--images-per-tar", "25"]
    run(["convert-beton", str(source), str(folder / "set.beton"), *tars])
    run(begin(folder))
    steps = [{"step": row["step"], "loss": row["loss"]} for row in read_metrics(at / "metrics.jsonl")]
    (at / "checkpoints/step-000000004.pt").unlink()
    keep_until(at / "metrics.jsonl", 2)
    run(["encode", str(at), "--images", str(source), "--bits", "16", "--code", "itq"])
    run(["knn", str(at), *sets])
    run(["export", str(at), "--out", str(folder / "export"), "--no-onnx"])
    codes = open_codes(at / "codes.lvcodes")
    Index.of_file(codes, stored_quantiser(load_run(at), codes)).save(folder / "codes.index")
    (folder / "expected.json").write_text(json.dumps({"steps": steps}, indent=1) + "\n")


def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Remove what differs between two archives; locks are left out."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return None if entry.name.endswith(".lock") else entry


if __name__ == "__main__":
    shutil.rmtree(MADE_IN, ignore_errors=True)
    make(MADE_IN)
    archive = HERE / f"{lvssl.__version__}.tar.xz"
    with tarfile.open(archive, "w:xz", preset=9) as file:
        file.add(MADE_IN, ".", filter=plain)
    shutil.rmtree(MADE_IN)
    print(f"{archive}: {archive.stat().st_size:,} bytes")
