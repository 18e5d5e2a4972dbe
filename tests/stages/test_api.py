"""The library from Python: the numbers are the commands', whatever form the images come in."""

import csv
import doctest
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import lvssl
from lvssl import api
from lvssl.codes.file import CodeFileError, open_codes, open_uncertainty
from lvssl.commands.main import main
from lvssl.evaluation.embedding import embed
from lvssl.models.inference import encode, in_batches
from lvssl.runs.run import load_run
from pipelines.decode import open_reader
from pipelines.errors import InputError
from pipelines.formats import turbojpeg

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def photos(digits, tmp_path) -> Path:
    """Twelve images of two folders, PNGs and JPEGs of several sizes, one of them turned by EXIF."""
    folder, source = tmp_path / "photos", open_reader(digits["test"])
    for i in range(12):
        image = PIL.Image.fromarray(source.encoded(0, i))
        image = image.resize((8 + 7 * i, 30), PIL.Image.Resampling.BICUBIC) if i > 5 else image
        path = folder / ("ab"[i // 6]) / f"{i}.{'jpg' if i % 3 == 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = PIL.Image.Exif()
        exif[0x0112] = 6 if i == 8 else 1
        image.save(path, exif=exif)
    return folder


def paths_of(photos: Path) -> list[Path]:
    return sorted(path for path in photos.rglob("*") if path.is_file())


def same(one: lvssl.Encoding, other: lvssl.Encoding) -> bool:
    return all(
        np.array_equal(getattr(one, n), getattr(other, n)) for n in ("features", "code", "uncertainty")
    )


def test_encode_gives_the_bits_of_the_command(run, digits, tmp_path):
    model = lvssl.load(run, device="cpu")
    found = model.encode(digits["test"])
    assert (
        main(["encode", str(run), "--images", str(digits["test"]), "--out", str(tmp_path / "x.lvcodes")]) == 0
    )
    file = open_codes(tmp_path / "x.lvcodes")
    assert np.array_equal(found.code, file.rows) and found.names == list(file.names)
    assert (found.bits, found.checkpoint) == (file.bits, file.checkpoint)
    loaded = load_run(run)
    known = embed(loaded.network, open_reader(digits["test"]), loaded.settings.view)
    assert np.array_equal(found.features, known.features)
    assert np.array_equal(found.uncertainty, known.uncertainty)
    assert found.features.dtype == found.uncertainty.dtype == np.float32 and found.code.dtype == np.uint8


def test_every_form_of_the_same_images_gives_the_same_bits(run, photos):
    model = lvssl.load(str(run))
    folder = model.encode(photos)
    paths = paths_of(photos)
    assert folder.names == [str(path.relative_to(photos)) for path in paths]
    opened = [PIL.Image.open(path) for path in paths]
    arrays = [np.asarray(PIL.ImageOps.exif_transpose(image)) for image in opened]
    for images in (paths, [str(path) for path in paths], iter(paths), opened, arrays, (i for i in arrays)):
        assert same(model.encode(images), folder)
    assert model.encode(paths).names == [str(path) for path in paths]
    assert model.encode(opened).names == [str(i) for i in range(12)]
    stack = np.stack([a for a in arrays if a.shape == (8, 8, 3)])
    assert same(model.encode(stack), model.encode(list(stack)))
    assert same(model.encode(stack[..., :1]), model.encode([one[..., 0] for one in stack]))
    assert len(model.encode(paths[0])) == len(model.encode(opened[0])) == len(model.encode(arrays[0])) == 1


def test_batches_of_any_size_find_every_image_in_order(run, photos):
    model = lvssl.load(run)
    whole = model.encode(photos)
    for images in (photos, paths_of(photos)):
        for size in (1, 5, 12):
            part = model.encode(images, batch_size=size, workers=1)
            assert np.allclose(part.features, whole.features, atol=1e-4) and len(part) == 12


@pytest.mark.parametrize("device", ["cuda:99", "xpu", "none"])
def test_a_device_that_is_not_there_is_one_line(run, device):
    with pytest.raises(InputError, match=f"device.* '?{device}'?[:;]"):
        lvssl.load(run, device=device)


def test_a_damaged_image_is_named_or_left_out(run, photos, capsys):
    model = lvssl.load(run)
    (photos / "a/1.png").write_bytes(b"no image")
    for images in (photos, paths_of(photos)):
        with pytest.raises(InputError, match=r"a/1\.png"):
            model.encode(images)
        found = model.encode(images, on_error="skip")
        assert len(found) == 11 and not any(name.endswith("a/1.png") for name in found.names)
        assert "a/1.png" in capsys.readouterr().err


@pytest.mark.skipif(turbojpeg.FOUND is None, reason="Pillow says nothing of extraneous bytes")
def test_a_damaged_jpeg_is_kept_in_a_folder_and_in_a_list(run, photos):
    model, path = lvssl.load(run), photos / "b/8.jpg"
    whole, content = model.encode(photos), path.read_bytes()
    path.write_bytes(content[:-2] + b"\x12" * 64 + content[-2:])
    (photos / "a/2.jpg").write_bytes(content[:300])  # of which nothing can be made
    for images in (photos, paths_of(photos)):
        assert len(model.encode(images, on_error="skip")) == 10
        found = model.encode(images, on_error="keep")
        assert len(found) == 11 and any(name.endswith("b/8.jpg") for name in found.names)
        kept = [name.endswith("b/8.jpg") for name in found.names].index(True)
        assert np.allclose(found.features[kept], whole.features[whole.names.index("b/8.jpg")], atol=1e-3)


@pytest.mark.parametrize(
    "images, named",
    [
        (np.zeros((8, 8, 3), np.float32), "float32"),
        (np.zeros((8, 8, 4), np.uint8), r"\[8, 8, 4\]"),
        (np.zeros((5, 8, 8), np.uint8), r"\[N, H, W, 3\]"),
        ([torch.zeros(3, 8, 8)], "not Tensor"),
        ([], "no images"),
        (None, "images: paths, PIL images or arrays are expected, one or several, not NoneType"),
        (b"bytes", "images: .* not bytes"),
        (PIL.Image.new("I;16", (8, 8)), "I;16"),
        ("codes.lvcodes", "holds codes"),
        ("nothing.png", "nothing.png"),
    ],
)
def test_what_is_no_image_is_refused(run, images, named):
    with pytest.raises(InputError, match=named):
        lvssl.load(run).encode(images)


def found_by_command(run: Path, query: Path, table: Path, *more: str) -> list[tuple[str, float]]:
    """(name, distance) of the four nearest."""
    assert main(["search", str(run), "--query", str(query), "--k", "4", "--csv", str(table), *more]) == 0
    with open(table, newline="") as file:
        return [(row["name"], float(row["distance"])) for row in csv.DictReader(file)]


def test_models_and_encodings_are_equal_to_themselves_alone_and_can_be_keys(run, photos):
    """Arrays have no truth value, and a cache of results, such as functools.cache, hashes its arguments."""
    model = lvssl.load(run, device="cpu")
    first, second = model.encode(photos), model.encode(photos)
    assert first == first and first != second and len({first, second, model}) == 3


def test_encode_in_several_threads_gives_each_its_own_uncertainties(run, photos):
    """The density reads activations through hooks, which see every thread's calls."""
    model = lvssl.load(run, device="cpu")
    model.fit_density(photos)
    sets = [np.random.default_rng(i).integers(0, 256, (20 + i, 8, 8, 3), np.uint8) for i in range(4)]
    alone = [model.encode(images) for images in sets]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(model.encode, sets * 8))
    assert all(same(one, known) for one, known in zip(found, alone * 8))


def test_batches_that_are_asked_for_in_turn_by_several_threads_have_their_own_means(run):
    """Each batch may be computed in another thread than the one before."""
    loaded = load_run(run)
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8))
    known = [part.stages for part in encode(loaded.network, in_batches(crops, 4), loaded.settings.view)]
    parts = encode(loaded.network, in_batches(crops, 4), loaded.settings.view)
    for wanted in known:
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(next, parts).result().stages, wanted)


def test_the_callers_autocast_changes_no_bit(run, photos):
    model = lvssl.load(run, device="cpu")
    alone = model.encode(photos)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(model.encode(photos), alone)


def test_a_pil_image_whose_file_is_damaged_is_named_or_left_out(run, photos, capsys):
    """Its pixels are read when they are asked for."""
    path = photos / "a/2.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    model, good = lvssl.load(run), np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(InputError, match="image 1: not an image, or damaged .*truncated"):
        model.encode([good, PIL.Image.open(path)])
    assert model.encode([good, PIL.Image.open(path)], on_error="skip").names == ["0"]
    assert "left out: image 1" in capsys.readouterr().err


def test_keep_does_the_same_for_a_list_as_for_a_folder(run, photos, capsys):
    """One JPEG whose damage Pillow passes over is kept, another file is left out."""
    path = photos / "a/2.jpg"
    path.write_bytes(path.read_bytes()[:-2] + b"12345" + b"\xff\xd9")
    (photos / "a/1.png").write_bytes(b"no image")
    model = lvssl.load(run)
    with pytest.raises(InputError, match="extraneous"):
        model.encode(path)
    folder, listed = model.encode(photos, on_error="keep"), model.encode(paths_of(photos), on_error="keep")
    assert same(folder, listed) and len(folder) == 11 and "a/2.jpg" in folder.names
    assert capsys.readouterr().err.count("a/1.png") == 2


def test_search_finds_what_the_command_finds(run, photos, tmp_path):
    model, query, file = lvssl.load(run), photos / "b/8.jpg", run / "codes.lvcodes"
    assert main(["encode", str(run), "--images", str(photos)]) == 0
    assert np.array_equal(model.encode(photos).uncertainty, open_uncertainty(open_codes(file)))
    real = found_by_command(run, query, tmp_path / "real.csv")
    hamming = found_by_command(run, query, tmp_path / "hamming.csv", "--symmetric")
    image, codes, encoded = PIL.Image.open(query), model.encode(query), model.encode(photos)

    def short(found: list[list[lvssl.Neighbour]]) -> list[tuple[str, float]]:
        return [(one.name, pytest.approx(one.distance, rel=1e-4, abs=1e-4)) for one in found[0]]

    for given in (query, image):
        assert short(model.search(given, k=4)) == short(model.search(given, file, k=4)) == real
        assert short(model.search(given, k=4, symmetric=True)) == hamming
        assert short(model.search(given, encoded, k=4)) == hamming
    assert short(model.search(codes, k=4)) == short(model.search(codes, encoded, k=4)) == hamming
    assert real != hamming
    assert len(model.search(photos, k=99)) == len(model.search(photos, k=99)[0]) == 12


def test_codes_of_another_model_are_refused(run, photos, tmp_path):
    model = lvssl.load(run)
    other = lvssl.pretrain(
        lvssl.preset("digits", data=photos, out=tmp_path / "other", epochs=1, batch_size=6)
    )
    with pytest.raises(InputError, match="encode the images with this model"):
        model.search(other.encode(photos), model.encode(photos))
    with pytest.raises(InputError, match="encode the images with this model"):
        model.search(photos, other.encode(photos))
    assert main(["encode", str(other.run.folder), "--images", str(photos)]) == 0
    with pytest.raises(CodeFileError, match="encode the images again"):
        model.search(photos, other.run.folder / "codes.lvcodes")


def test_a_models_own_codes_are_not_compared_with_codes_of_another_kind(run, digits, photos, tmp_path):
    """Though they may have the same number of bytes."""
    model = lvssl.load(run)
    for bits, code in ((model.bits, "itq"), (model.bits // 2, "bits")):
        out = tmp_path / f"{code}.lvcodes"
        words = ["encode", run, "--images", photos, "--out", out, "--bits", bits, "--code", code]
        assert main([*map(str, words), "--train", str(digits["train"])]) == 0
        assert model.search(photos / "a/0.png", out, k=1)[0][0].name == "a/0.png"
        with pytest.raises(CodeFileError, match=f"{code}.lvcodes has {bits} bits by {code}.*pass the images"):
            model.search(model.encode(photos), out)


@pytest.mark.parametrize("site", ["repr", "proj"])
def test_an_export_gives_the_bits_of_its_run(site, photos, tmp_path, capsys):
    settings = lvssl.preset("digits", data=photos, out=tmp_path / "run", epochs=1, batch_size=6, site=site)
    model = lvssl.pretrain(settings)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "export"), "--no-onnx"]) == 0
    exported = lvssl.load(tmp_path / "export")
    assert same(exported.encode(photos), model.encode(photos))
    model.fit_density()
    assert not same(exported.encode(photos), model.encode(photos))  # other uncertainties, now
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "again"), "--no-onnx"]) == 0
    assert same(lvssl.load(tmp_path / "again").encode(photos), model.encode(photos))
    assert main(["encode", str(tmp_path / "export"), "--images", str(photos)]) == 2
    assert "--train" in capsys.readouterr().err
    assert main(["encode", str(tmp_path / "export"), "--images", str(photos), "--no-fit"]) == 0
    assert model.search(photos, tmp_path / "export/codes.lvcodes") == exported.search(photos)
    more = ["--images", str(photos), "--bits", "8", "--code", "pca"]
    assert main(["encode", str(tmp_path / "again"), *more]) == 2  # the density is there, no such quantiser
    assert "--train" in capsys.readouterr().err


def test_an_export_is_no_run_and_a_damaged_one_is_named(run, tmp_path, capsys):
    out = tmp_path / "export"
    assert main(["export", str(run), "--out", str(out), "--no-onnx"]) == 0
    assert main(["linear", str(out)]) == 2 and "exported encoder" in capsys.readouterr().err
    assert main(["export", str(out), "--out", str(tmp_path / "two")]) == 2
    weights = (out / "head.safetensors").read_bytes()
    (out / "head.safetensors").write_bytes(weights[:-9])
    with pytest.raises(InputError, match="not a complete export"):
        lvssl.load(out)


def test_a_setting_is_found_by_its_option():
    settings = lvssl.preset("digits", lr=0.1, data="x.beton", backbone="small", family="none")
    assert settings.optimiser.lr == 0.1 and settings.data == Path("x.beton")
    assert settings.model.backbone == "small" and settings.latent.family == "none"
    with pytest.raises(InputError, match="unknown option 'epoch'"):
        lvssl.preset("digits", epoch=1)
    with pytest.raises(InputError, match="unknown preset"):
        lvssl.preset("digit")


@pytest.mark.parametrize(
    "option, value",
    [("epochs", "3"), ("lr", "0.1"), ("seed", 1.5), ("batch_size", 16.0), ("log", "wandb"), ("out", None),
     ("scale", (0.5,)), ("backbone", None), ("flip", "no")],
)  # fmt: skip
def test_a_value_of_a_wrong_type_is_refused_before_anything_is_written(option, value):
    with pytest.raises(InputError, match=f"{option} should be of type"):
        lvssl.preset("digits", **{option: value})


def test_settings_are_those_of_a_preset():
    with pytest.raises(InputError, match=r"the result of lvssl\.preset\(\.\.\.\) is expected, not 'digits'"):
        lvssl.pretrain("digits")


def test_values_may_be_lists_arrays_and_paths():
    numbers = {"scale": [0.5, 1.0], "mean": np.array([0.25, 0.5, 0.75]), "epochs": np.int64(3), "lr": 1}
    found = lvssl.preset("digits", data="a", out=Path("b"), init=Path("c"), log=[], **numbers)
    assert (found.data, found.out, found.epochs, found.log) == (Path("a"), Path("b"), 3, ())
    assert (found.view.scale, found.view.mean) == ((0.5, 1.0), (0.25, 0.5, 0.75))
    assert found.model.init == "c" and lvssl.preset(device=torch.device("cpu")).device == "cpu"


def test_importing_the_package_loads_no_room_of_it():
    code = (
        "import sys, lvssl; assert 'load' in dir(lvssl); names = ('torch', 'numpy', 'pipelines')\n"
        "print([m for m in sys.modules if m.split('.')[0] in names or 'lvssl.' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lvssl.nothing  # noqa: B018


def test_the_names_that_type_checkers_see_are_the_lazy_ones():
    stub = (ROOT / "lvssl/__init__.pyi").read_text()
    assert sorted(re.findall(r"import (\w+) as", stub)) == sorted(lvssl.__all__) == sorted(api.__all__)
    assert all(getattr(lvssl, name) is getattr(api, name) for name in lvssl.__all__)


def public() -> list[str]:
    """Every public name of the interface: functions, classes, and their methods."""
    return [*api.__all__, *(f"Model.{n}" for n in vars(api.Model) if not n.startswith("_") and n != "run")]


@pytest.mark.parametrize("name", public())
def test_the_example_of_each_public_name_gives_what_it_says(name, run, digits, photos, tmp_path, monkeypatch):
    found: object = api
    for part in name.split("."):
        found = getattr(found, part)
    if name in ("load", "Model.from_pretrained"):
        assert main(["export", str(run), "--out", str(tmp_path / "export"), "--no-onnx"]) == 0
    (tmp_path / "train.beton").symlink_to(digits["train"])
    Path(f"{tmp_path}/train.beton.json").symlink_to(f"{digits['train']}.json")
    for i, path in enumerate(paths_of(photos)):  # one name for the examples, whatever the format
        PIL.Image.open(path).convert("L").save(photos / ("ab"[i // 6]) / f"{i % 6}.png")
        if path.name != f"{i % 6}.png":
            path.unlink()
    monkeypatch.chdir(tmp_path)
    text = (found.fget if isinstance(found, property) else found).__doc__ or ""
    test = doctest.DocTestParser().get_doctest(
        text, {"lvssl": lvssl, "np": np, "torch": torch, "PIL": PIL}, name, None, 0
    )
    assert test.examples, f"{name} has no example"
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not said, "".join(said)
