"""Where libturbojpeg is looked for, and that Pillow gives the same pixels and bytes where there is none."""

import ctypes
import ctypes.util
import hashlib
import io
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from pipelines.convert.command import main as convert_beton
from pipelines.convert.store import Settings, store
from pipelines.decode import open_reader, turbo
from pipelines.errors import InputError
from pipelines.formats import jpeg, turbojpeg
from pipelines.loader import LoaderSettings, TwoViewLoader
from pipelines.views import ViewSettings

ROOT = Path(__file__).resolve().parents[2]
needs_library = pytest.mark.skipif(turbojpeg.FOUND is None, reason="libturbojpeg is not installed")
# Pillow's wheels bundle libjpeg-turbo. Where it was built with another libjpeg, rounding may differ.
same_decoder = pytest.mark.skipif(
    turbojpeg.FOUND is None or not features.check_feature("libjpeg_turbo"),
    reason="no libturbojpeg, or a Pillow without libjpeg-turbo",
)


@pytest.fixture
def pillow_alone(monkeypatch):
    """Call it, and from then on there is no libturbojpeg in this process."""

    def take_away():
        monkeypatch.setattr(jpeg, "_turbo", None)
        monkeypatch.setattr(turbo, "AVAILABLE", False)

    return take_away


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """No place of the search holds the library; returns a copy of it in a folder that isn't one of them."""
    monkeypatch.delenv("LVSSL_TURBOJPEG", raising=False)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setattr(turbojpeg, "__file__", str(tmp_path / "tree/pipelines/formats/turbojpeg.py"))
    copy = tmp_path / "elsewhere" / "libturbojpeg.so.0"
    copy.parent.mkdir()
    shutil.copyfile(turbojpeg.file(), copy)
    return copy


def put(copy: Path, folder: Path) -> str:
    folder.mkdir(parents=True)
    return str(shutil.copy(copy, folder))


@needs_library
def test_it_is_looked_for_in_this_order(monkeypatch, elsewhere, tmp_path):
    beside = put(elsewhere, tmp_path / "tree/lib")
    assert turbojpeg.load()[1] == beside
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path / "conda"))
    assert turbojpeg.load()[1] == beside  # a conda without it
    conda = put(elsewhere, tmp_path / "conda/lib")
    assert turbojpeg.load()[1] == conda
    prefix = put(elsewhere, tmp_path / "prefix/lib")
    assert turbojpeg.load()[1] == prefix
    for chosen in (elsewhere, elsewhere.parent):
        monkeypatch.setenv("LVSSL_TURBOJPEG", str(chosen))
        assert turbojpeg.load()[1] == str(elsewhere)
    monkeypatch.setattr(turbojpeg, "FOUND", turbojpeg.load())
    assert turbojpeg.file() == str(elsewhere)


@needs_library
def test_what_is_chosen_and_does_not_load_is_not_replaced(monkeypatch, elsewhere, tmp_path):
    put(elsewhere, tmp_path / "prefix/lib")
    no_library = tmp_path / "libturbojpeg.so.0"
    no_library.write_bytes(b"no ELF")
    (tmp_path / "empty").mkdir()
    for chosen in (tmp_path / "nowhere", tmp_path / "empty", no_library):
        monkeypatch.setenv("LVSSL_TURBOJPEG", str(chosen))
        assert turbojpeg.load() is None
        assert f"libturbojpeg can't be loaded from LVSSL_TURBOJPEG={chosen}: Pillow" in turbojpeg.absence()
        assert "\n" not in turbojpeg.absence()


@needs_library
def test_a_file_of_another_kind_is_passed_over(monkeypatch, elsewhere, tmp_path):
    (tmp_path / "prefix/lib").mkdir(parents=True)
    (tmp_path / "prefix/lib/libturbojpeg.so.0").write_bytes(b"no ELF")
    other = ctypes.util.find_library("z") or pytest.skip("no zlib here")
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path / "conda"))
    (tmp_path / "conda/lib").mkdir(parents=True)
    monkeypatch.setattr(turbojpeg, "FOUND", None)
    library = ctypes.CDLL(other)
    place = turbojpeg._Place()
    assert library.dladdr(ctypes.cast(library.zlibVersion, ctypes.c_void_p), ctypes.byref(place))
    shutil.copyfile(os.fsdecode(place.file), tmp_path / "conda/lib/libturbojpeg.so.0")
    beside = put(elsewhere, tmp_path / "tree/lib")
    assert turbojpeg.load()[1] == beside


# ------------------------------------------------------------------- Pillow in its place


def jpegs() -> list[bytes]:
    """Noise at every subsampling, size of block and quality, baseline and progressive, in colour and grey."""
    random, found = np.random.default_rng(0), []
    for height, width in ((64, 64), (33, 47), (7, 5), (1, 100), (90, 1)):
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
        choices = itertools.product(("4:4:4", "4:2:2", "4:2:0"), (False, True), (30, 75, 95))
        for subsampling, progressive, quality in choices:
            for mode in ("RGB", "L"):
                out = io.BytesIO()
                options = {"subsampling": subsampling} if mode == "RGB" else {}
                image.convert(mode).save(out, "JPEG", quality=quality, progressive=progressive, **options)
                found.append(out.getvalue())
    return found


def rare_jpegs(monkeypatch) -> list[bytes]:
    """Of the two subsamplings that Pillow doesn't write, 4:4:0 and 4:1:1."""
    random, found = np.random.default_rng(1), []
    for sampling in (4, 5):  # TJSAMP_440, TJSAMP_411
        with monkeypatch.context() as patch:
            patch.setitem(turbojpeg.SAMPLINGS, "4:2:0", sampling)
            found += [
                jpeg.encode(random.integers(0, 256, (h, w, 3), np.uint8), 80) for h, w in ((64, 64), (33, 47))
            ]
    return found


def all_decoded(files: list[bytes]) -> list[np.ndarray]:
    """Each in full, and as if it were to shrink to a half, a quarter and an eighth."""
    found = []
    for data in files:
        header = jpeg.read_header(data)
        sizes = [(max(1, header.height // n), max(1, header.width // n)) for n in (2, 4, 8)]
        found += [jpeg.decode(data, header, shortest) for shortest in (None, *sizes)]
    return found


@same_decoder
def test_pillow_decodes_the_same_pixels(monkeypatch, pillow_alone):
    files = jpegs() + rare_jpegs(monkeypatch)
    expected = all_decoded(files)
    pillow_alone()
    assert jpeg.library() == "pillow"
    for ours, theirs in zip(all_decoded(files), expected, strict=True):
        assert np.array_equal(ours, theirs)


@same_decoder
def test_pillow_stores_the_same_bytes(pillow_alone):
    """What is kept, what is shrunk and encoded anew, and what is encoded of pixels."""
    random = np.random.default_rng(2)
    images = [*jpegs(), random.integers(0, 256, (80, 70, 3), np.uint8)]
    settings = [Settings(), Settings(max_resolution=20, jpeg_quality=77)]
    expected = [store(image, each) for image in images for each in settings]
    pillow_alone()
    found = [store(image, each) for image in images for each in settings]
    assert found == expected and {each.storage_kind for each in found} == {
        "jpeg_untouched",
        "reencoded",
        "raw",
    }


def digests(path: Path, **options) -> tuple[list[str], dict[int, str]]:
    """Of the batches of an epoch, and what was damaged."""
    with TwoViewLoader(
        open_reader(path), ViewSettings(resolution=24), LoaderSettings(7, workers=2, **options)
    ) as loader:
        found = [hashlib.sha256(batch.views.numpy().tobytes()).hexdigest() for batch in loader]
        return found, loader.damaged


@same_decoder
@pytest.mark.parametrize("kind", ["beton", "folder", "shards"])
def test_the_views_are_the_same_without_it(sources, pillow_alone, kind):
    expected = digests(sources[kind])
    pillow_alone()
    assert digests(sources[kind]) == expected


@needs_library
def test_the_same_damage_is_named_without_it(beton, tmp_path, pillow_alone):
    """Cut in its header, cut behind it, another size than its entry, too few bytes, CMYK."""
    content, source = bytearray(beton.read_bytes()), open_reader(beton)
    victims = [int(i) for i in np.flatnonzero(source.file.modes == turbo.JPEG)[:5]]
    stored = [source.encoded(0, victim) for victim in victims]
    cmyk = io.BytesIO()
    height, width = int(source.heights[victims[4]]), int(source.widths[victims[4]])
    Image.new("CMYK", (width, height)).save(cmyk, "JPEG", quality=1)
    size_at = stored[3].index(b"\xff\xc0") + 5
    changed = [
        stored[0][:60],
        stored[1][: len(stored[1]) // 3],
        stored[2],
        stored[3][:size_at] + b"\x1f\x40\x1f\x40" + stored[3][size_at + 4 :],
        cmyk.getvalue(),
    ]
    for victim, data in zip(victims, changed):
        start, size = int(source.file.offsets[victim]), int(source.file.sizes[victim])
        content[start : start + size] = data[:size].ljust(size, b"\0")
    path = tmp_path / "damaged.beton"
    path.write_bytes(content)

    def reasons() -> list[str]:
        source, found = open_reader(path), []
        source.heights[victims[2]] += 1
        source.heights[victims[3]] = source.widths[victims[3]] = 8000
        for victim in victims:
            out = np.empty((1, 1, 8, 8, 3), np.uint8)
            with pytest.raises(InputError, match=rf"sample {victim} can't be decoded \(") as error:
                source.crops(np.array([victim]), np.array([[[0, 0, 1, 1]]], np.int32), out)
            found.append(str(error.value))
        return found

    expected = reasons()
    pillow_alone()
    found = reasons()
    assert found[2:4] == expected[2:4] and "but its entry says" in found[2] and "too few" in found[3]
    with pytest.raises(ValueError, match="do not lie within"):
        open_reader(path).crops(
            np.array([0]), np.array([[[0, 0, 999, 5]]], np.int32), np.empty((1, 1, 8, 8, 3), np.uint8)
        )


@needs_library
def test_commands_work_without_it_and_say_so_in_one_line(sources, tmp_path, capfd):
    """Conversion, its verification, and the loader that trains, in a process that can't find it."""
    script = tmp_path / "commands.py"
    script.write_text(
        "import sys\n"
        "from pipelines.loader import LoaderSettings, TwoViewLoader\n"
        "from pipelines.decode import open_reader\n"
        "from pipelines.views import ViewSettings\n"
        "from pipelines.convert.command import main\n"
        "pictures, out = sys.argv[1:]\n"
        "for arguments in ([pictures, out, '--max-resolution', '40'], ['--verify', out]):\n"
        "    assert main(arguments) == 0\n"
        "with TwoViewLoader(open_reader(out), ViewSettings(resolution=24), LoaderSettings(8)) as loader:\n"
        "    assert len(list(loader)) == len(loader)\n"
    )
    with_it, without = (tmp_path / f"{name}.beton" for name in ("with", "without"))
    environment = {"PYTHONPATH": str(ROOT), "LVSSL_TURBOJPEG": str(tmp_path / "nowhere")}
    done = subprocess.run(
        [sys.executable, script, sources["folder"], without],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (said,) = (line for line in done.stderr.splitlines() if "libturbojpeg" in line)
    assert "`lvssl doctor` says how to install it" in said
    assert f"LVSSL_TURBOJPEG={tmp_path / 'nowhere'}" in said
    assert convert_beton([str(sources["folder"]), str(with_it), "--max-resolution", "40"]) == 0
    assert "libturbojpeg" not in capfd.readouterr().err
    if features.check_feature("libjpeg_turbo"):
        assert with_it.read_bytes() == without.read_bytes()


def test_threads_that_find_out_together_say_it_once(monkeypatch, capsys):
    monkeypatch.setattr(turbojpeg, "_said", threading.Lock())
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)

    def slowly() -> str:
        time.sleep(0.1)
        return "no library"

    monkeypatch.setattr(turbojpeg, "absence", slowly)
    threads = [threading.Thread(target=turbojpeg.say_absence) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capsys.readouterr().err == "no library\n"
