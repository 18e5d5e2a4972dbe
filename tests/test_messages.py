"""What is said when something is awaited, missing or too large: a line that helps."""

import gzip
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from lvssl.commands.main import main
from lvssl.plan import require_memory
from lvssl.runs.progress import Metrics
from lvssl.settings.pretrain import preset
from lvssl.training import distributed
from lvssl.training.distributed import World, connected
from pipelines.datasets.opening import open_dataset
from pipelines.decode import open_reader
from pipelines.errors import InputError
from pipelines.loader import LoaderSettings, TwoViewLoader


def line_of(capsys, arguments: list[object]) -> str:
    """The one line of a command that is refused."""
    assert main([*map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def ctrl_c():
    """Heard, also where a shell has started all this deaf to it, as it does in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_do_not_come_are_named_and_ctrl_c_ends_the_wait(rank, monkeypatch, capfd, ctrl_c):
    """An interactive Slurm shell has variables of four processes, and one is started."""
    monkeypatch.setattr(distributed, "SAID_AFTER", 0.2)
    monkeypatch.delenv("RANK", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = threading.Event()

    def interrupt() -> None:
        said.wait(1.0)
        os.kill(os.getpid(), signal.SIGINT)

    begun = time.monotonic()
    threading.Thread(target=interrupt, daemon=True).start()
    with (
        pytest.raises(KeyboardInterrupt),
        connected(World(rank, 4, 0, "127.0.0.1", port), torch.device("cpu"), 0.5),
    ):
        pass
    assert time.monotonic() - begun < 20  # not the half minute that it would have waited
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rank ")]
    awaited = "rank 1" if rank == 0 else "rank 0"
    assert len(lines) == 1 and f"rank {rank} of 4: waiting up to 0:00:30 for {awaited} at" in lines[0]
    assert "Slurm's variables say 4 processes: start them with srun, or unset SLURM_NTASKS" in lines[0]


def test_a_beton_that_shrinks_while_it_is_read_is_refused_and_one_that_is_replaced_is_not(digits, tmp_path):
    path = tmp_path / "train.beton"
    shutil.copy(digits["train"], path)
    reader = open_reader(path)
    boxes, out = np.array([[[0, 0, 8, 8]]], np.int32), np.empty((1, 1, 8, 8, 3), np.uint8)
    last = np.array([len(reader) - 1])
    reader.crops(last, boxes, out)
    whole = path.stat().st_size
    os.truncate(path, whole // 2)
    for read in (lambda: reader.crops(last, boxes, out), lambda: reader.encoded(0, int(last[0]))):
        with pytest.raises(
            InputError, match=f"train.beton: was cut from {whole:,} to {whole // 2:,} bytes while"
        ):
            read()
    other = open_reader(shutil.copy(digits["train"], tmp_path / "other.beton"))
    (tmp_path / "new").write_bytes(b"another file")
    os.replace(tmp_path / "new", tmp_path / "other.beton")
    other.crops(last, boxes, out)


def test_a_beton_that_is_cut_in_the_middle_of_a_read_is_an_error_not_a_bus_error(digits, tmp_path):
    """In a process of its own, which a bus error would end; the file is cut while it decodes."""
    path = shutil.copy(digits["train"], tmp_path / "train.beton")
    program = """if True:
        import os, sys, threading
        import numpy as np
        from pipelines.decode import open_reader
        from pipelines.errors import InputError
        reader = open_reader(sys.argv[1])
        indices = np.tile(np.arange(len(reader)), 100)
        boxes = np.tile(np.array([[[0, 0, 8, 8]]], np.int32), (len(indices), 1, 1))
        out = np.empty((len(indices), 1, 8, 8, 3), np.uint8)
        reader.crops(indices[:9], boxes[:9], out[:9])  # compiles
        reading = threading.Event()
        threading.Thread(target=lambda: (reading.wait(), os.truncate(sys.argv[1], 4096))).start()
        try:
            while True:
                reading.set()
                reader.crops(indices, boxes, out)
        except InputError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert "train.beton: was cut from" in done.stdout and "to 4,096 bytes" in done.stdout


def test_a_beton_that_is_cut_while_an_epoch_runs_ends_it_with_that_line(digits, tmp_path):
    path = tmp_path / "train.beton"
    shutil.copy(digits["train"], path)
    settings = LoaderSettings(16, order="sequential")
    view = preset("digits").view
    with TwoViewLoader(open_reader(path), view, settings) as loader, pytest.raises(InputError) as raised:
        for _ in loader:
            os.truncate(path, path.stat().st_size // 2)
    assert "train.beton: was cut from" in str(raised.value)


def test_a_run_to_resume_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = line_of(capsys, ["pretrain", "--out", "rnus/lv", "--resume"])
    assert "rnus/lv: no run to resume" in said and "check --out" in said


def test_a_table_names_the_line(tmp_path, capsys):
    (tmp_path / "set.jsonl").write_text('{"path": "a.jpg", "label": 0}\n\n\n\n{"path": \n')
    assert "set.jsonl: line 5 is not JSON" in line_of(capsys, ["pretrain", "--data", tmp_path / "set.jsonl"])
    (tmp_path / "set.jsonl").write_text('{"path": "a.jpg", "label": 0}\n7\n')
    assert "set.jsonl: line 2 must be an object" in line_of(
        capsys, ["pretrain", "--data", tmp_path / "set.jsonl"]
    )


def test_a_compressed_tar_is_called_one(tmp_path):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a/1.jpg"))
    (tmp_path / "set.tar").write_bytes(gzip.compress(content.getvalue()))
    with pytest.raises(InputError, match=r"set\.tar: is compressed by gzip despite its name: unpack it"):
        open_dataset(str(tmp_path / "set.tar"))


def test_one_image_to_encode_and_codes_to_search_that_are_not_there(run, tmp_path, capsys):
    image = tmp_path / "one.jpg"
    Image.new("RGB", (9, 9)).save(image)
    assert "one.jpg: a single image; pass its folder" in line_of(capsys, ["encode", run, "--images", image])
    codes = tmp_path / "no.lvcodes"
    said = line_of(capsys, ["search", run, "--query", image, "--codes", codes])
    assert f"{codes}: No such file or directory; `lvssl encode` writes it" in said


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch on images without labels, 20 of them in one folder, of which one is damaged."""
    folder, random = tmp_path_factory.mktemp("loose"), np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(20):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / "photos" / f"{i}.png")
    options = ["pretrain", "--preset", "digits", "--data", folder / "photos", "--out", folder / "run"]
    assert main([*map(str, options), "--epochs", "1", "--batch-size", "4"]) == 0
    return folder / "run"


def test_after_training_without_labels_the_next_command_is_one_that_works(run, capsys):
    assert main(["pretrain", "--out", str(run), "--resume"]) == 0
    following = capsys.readouterr().out.strip().partition("; next: lvssl ")[2].split()
    assert following[:2] == ["encode", str(run)] and main([*following, "--out", str(run / "c.lvcodes")]) == 0


def test_a_damaged_image_names_the_option_that_goes_on_without_it(run, tmp_path, capsys):
    shutil.copytree(run.parent / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "7.png").write_bytes(b"\x89PNG\r\n\x1a\n, and nothing of the kind")
    options = [
        "--preset",
        "digits",
        "--data",
        tmp_path / "photos",
        "--out",
        tmp_path / "new",
        "--batch-size",
        4,
    ]
    assert main(["pretrain", *map(str, options), "--epochs", "1"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and "7.png" in said and "--on-error skip" in said


def test_a_full_disk_names_the_file(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full, a device that is always full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    metrics = Metrics.__new__(Metrics)
    metrics.path, metrics.file = tmp_path / "metrics.jsonl", open("/dev/full", "a", buffering=1)  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        metrics.write({"step": 1})


def test_a_machine_that_is_too_small_is_told_with_settings_that_fit(capsys):
    import dataclasses

    huge = dataclasses.replace(preset("folder-r50"), batch_size=2**20, device="cpu")
    with pytest.raises(
        InputError, match=r"needs about [\d,.]+ GiB, and this machine has .*: try .*--batch-size"
    ):
        require_memory(huge)
    with pytest.raises(InputError, match=r"try .*--batch-size 512\b.*--batch-size 128\b"):
        require_memory(huge, ranks=8)
    require_memory(dataclasses.replace(preset("digits"), device="cpu"))
    assert capsys.readouterr().err == ""
