"""Which functions does a batch pass through, from the file to the loss? Prints them by room, as
docs/trace.md.

    python -m benchmarks.trace --out docs/trace.md

It runs one step of pretraining on scikit-learn's digits, in one process with one decoding thread. It lists
each of our functions that was entered, once, under its room and in the order of its first call.
"""

import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.script import parser_of
from lvssl.settings.pretrain import preset
from lvssl.training.distributed import World
from lvssl.training.trainer import Trainer
from pipelines.convert.conversion import convert
from pipelines.decode import open_reader
from pipelines.files import write_atomically
from pipelines.loader import LoaderSettings, TwoViewLoader

ROOT = Path(__file__).resolve().parents[1]
Call = tuple[str, str, str]  # room, file, function


class Calls:
    """Records the functions of ours that any thread enters in the block, each once, in order."""

    def __init__(self) -> None:
        self.seen: dict[Call, None] = {}

    def note(self, frame: Any, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if event != "call" or not path.startswith(str(ROOT)):
            return
        parts = Path(path).relative_to(ROOT).with_suffix("").parts
        name = frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code.co_name
        if parts[0] in ("pipelines", "lvssl") and "<" not in name:
            self.seen.setdefault((".".join(parts[:-1]), ".".join(parts), name))

    def __enter__(self) -> "Calls":
        threading.setprofile(self.note)
        sys.setprofile(self.note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)


def step() -> Calls:
    """The functions entered by the second step of a pretraining and by the loader that makes its batch."""
    with tempfile.TemporaryDirectory() as folder:
        beton = Path(folder) / "digits.beton"
        convert("sklearn:digits", beton)
        settings = replace(preset("digits"), data=beton, out=Path(folder) / "run", workers=1, threads=1)
        reader, how = open_reader(beton), LoaderSettings(settings.batch_size, workers=1)
        with TwoViewLoader(reader, settings.view, how) as loader:
            trainer = Trainer(settings, 10, loader, torch.device("cpu"), World())
            trainer.network.train()
            trainer.train_step(next(iter(loader)))
        with Calls() as calls, TwoViewLoader(reader, settings.view, how) as loader:
            trainer.train_step(next(iter(loader)))
    return calls


def rooms(calls: Calls) -> dict[str, list[str]]:
    """The functions of each room; rooms are in the order in which the batch first enters them."""
    found: dict[str, list[str]] = {}
    for room, module, name in calls.seen:
        found.setdefault(room, []).append(f"{module.removeprefix(room + '.')}: {name}")
    return found


def page(calls: Calls) -> str:
    """The text of docs/trace.md."""
    found = rooms(calls)
    head = (
        "# The path of a batch, from the file to the loss\n\nThis page lists the functions that one step of "
        "pretraining calls (scikit-learn's digits, on a CPU), in order. Use it to\nfind your way around the "
        f"code. They are grouped into {len(found)} packages, in the order in which the batch first enters "
        "them. The loader\ncalls decoding and augmentation, and training calls network, latent and loss; "
        "none of these calls back. The page is written by\n`python -m benchmarks.trace --out docs/trace.md`."
        "\n"
    )
    parts = (f"## {room}\n\n" + "\n".join(f"- `{one}`" for one in inside) for room, inside in found.items())
    return head + "\n" + "\n\n".join(parts) + "\n"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, help="a Markdown file; left out: the terminal")
    options = parser.parse_args()
    text = page(step())
    print(text) if options.out is None else write_atomically(options.out, text.encode())


if __name__ == "__main__":
    main()
