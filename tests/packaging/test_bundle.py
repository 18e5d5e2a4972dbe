"""Unpacking and checking an offline bundle, made here of two tiny wheels; `gather` needs a network."""

import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pipelines.formats import turbojpeg
from tools import bundle

ROOT = Path(__file__).resolve().parents[2]
HERE = "{}.{}".format(*sys.version_info)


def wheel(folder: Path, name: str, version: str, files: dict[str, str], tags: str = "py3-none-any") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-{tags}.whl", "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}\n")
        for path, text in files.items():
            archive.writestr(path, text)


@pytest.fixture
def made(tmp_path) -> Path:
    """A bundle of a package of plain modules, one whose modules lie in `.data`, a library and data."""
    if turbojpeg.FOUND is None:
        pytest.skip("libturbojpeg is not installed")
    out = tmp_path / "bundle"
    wheel(out / "wheels", "tinyone", "1.2", {"tinyone/__init__.py": "", "tinyone/inner.py": "word = 'one'"})
    wheel(out / "wheels", "tinytwo", "3.0", {"tinytwo-3.0.data/purelib/tinytwo.py": "word = 'two'"})
    (out / "lib").mkdir()
    shutil.copyfile(turbojpeg.file(), out / "lib/libturbojpeg.so.0")
    (out / "data").mkdir()
    (out / "data/images.parquet").write_bytes(b"images")
    shutil.copyfile(bundle.__file__, out / "bundle.py")
    sealed(out)
    return out


def sealed(out: Path, **asked: str) -> None:
    """With a manifest of what is there; `asked`: other requirements than these."""
    requirements = {"tinyone": "tinyone>=1.1,<2", "tinytwo": "tinytwo>=3"} | asked
    bundle.seal(out, HERE, {"tinyone": "tinyone.inner", "tinytwo": "tinytwo"}, requirements)


def unpack(made: Path, *more: object, command: str = "unpack") -> tuple[int, str, list[str]]:
    """(status, exports, lines of stderr) of the bundle's own script, under this Python."""
    done = subprocess.run(
        [sys.executable, made / "bundle.py", command, made.parent / "target", *more],
        capture_output=True, text=True, timeout=60, cwd=made.parent,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr.splitlines()


def test_a_whole_bundle_is_unpacked_and_its_exports_work(made):
    status, exports, lines = unpack(made, "--source", ROOT)
    assert status == 0, lines
    assert "ok       tinyone 1.2" in lines and "ok       tinytwo 3.0" in lines
    assert f"data: {made / 'data'}" in lines
    code = (
        "import tinyone.inner, tinytwo\nfrom pipelines.formats import turbojpeg as t\n"
        "print(tinyone.inner.word, tinytwo.word, t.file())"
    )
    done = subprocess.run(
        ["bash", "-c", f'{exports}\ncd /; "{sys.executable}" -c "{code}"'], capture_output=True, text=True
    )
    assert done.stdout == f"one two {made.parent / 'target/lib/libturbojpeg.so.0'}\n", done.stderr
    assert unpack(made, command="check")[0] == 0 and unpack(made)[0] == 0  # again, onto what is there


def test_unpacking_removes_neither_the_bundle_nor_folders_of_others(made):
    (made.parent / "target/lib").mkdir(parents=True)
    (made.parent / "target/lib/mine.so").write_text("mine")
    status, exports, (line,) = unpack(made)
    assert status == 2 and not exports and "target/lib: exists, but not from a bundle" in line
    assert (made.parent / "target/lib/mine.so").read_text() == "mine"
    shutil.rmtree(made.parent / "target")
    (made.parent / "target").symlink_to(made)
    status, exports, (line,) = unpack(made)
    assert status == 2 and not exports and "target: is the bundle itself" in line
    assert (made / "lib/libturbojpeg.so.0").is_file()


def test_each_missing_piece_has_its_line(made):
    wheel(made / "wheels", "compiled", "1.0", {"compiled.py": ""}, tags="cp37-cp37m-linux_x86_64")
    (made / "wheels/tinytwo-3.0-py3-none-any.whl").unlink()
    (made / "lib/libturbojpeg.so.0").write_bytes(b"no ELF")
    sealed(made, tinyone="tinyone>=1.10,<2")
    status, exports, lines = unpack(made)
    assert status == 1 and "export PYTHONPATH=" in exports
    missing = [line for line in lines if line.startswith("missing: ")]
    assert [line.split()[1] for line in missing] == [
        "tinyone:", "tinytwo:", "compiled-1.0-cp37-cp37m-linux_x86_64.whl", "libturbojpeg:",
    ]  # fmt: skip
    assert missing[0].endswith("1.2 is there, tinyone>=1.10,<2 is needed")
    assert "No module named 'tinytwo'" in missing[1] and f"make bundle TARGET={HERE}" in missing[2]


def test_a_bundle_for_another_architecture_is_said(made):
    """The library's own error is that it doesn't exist."""
    manifest = json.loads((made / "bundle.json").read_text())
    assert manifest["machine"] == platform.machine()
    (made / "bundle.json").write_text(json.dumps(manifest | {"machine": "pdp11"}))
    status, _, lines = unpack(made)
    said = f"missing: compiled pieces are for pdp11, this is {platform.machine()}: make the bundle on such"
    assert status == 1 and any(line.startswith(said) for line in lines)


def test_a_package_that_brings_python_down_is_named_by_the_line_before_it(made):
    wheel(made / "wheels", "tinytwo", "3.0", {"tinytwo.py": "import os; os.abort()"})
    sealed(made)
    status, _, lines = unpack(made)
    assert status == 1 and "ok       tinyone 1.2" in lines
    assert lines[-1].startswith("missing: the check itself ended with status")


@pytest.mark.parametrize("harm", ["cut", "changed", "gone", "no manifest"])
def test_a_bundle_that_is_not_whole_is_refused(made, harm):
    victim = made / "wheels/tinyone-1.2-py3-none-any.whl"
    content = victim.read_bytes()
    if harm == "gone":
        victim.unlink()
    elif harm == "no manifest":
        victim = made / "bundle.json"
        victim.unlink()
    else:
        victim.write_bytes(content[:-9] if harm == "cut" else content[:-9] + bytes(9))
    status, exports, lines = unpack(made)
    assert status == 2 and exports == "" and len(lines) == 1 and str(victim) in lines[0]
    assert not (made.parent / "target").exists()


def test_versions_are_compared_as_numbers():
    for version, requirement, fits in (
        ("1.0.31", "timm>=1.0.31,<2", True),
        ("1.0.9", "timm>=1.0.31,<2", False),
        ("2.0", "timm>=1.0.31,<2", False),
        ("2.14.1+cu130", "torch>=2.6,<3", True),
        ("3.0.0", "torch>=2.6,<3", False),
        ("2.0", "numpy>=2.0.0", True),
        ("4.0rc1", "tqdm>=4.66", False),
        ("17", "pyarrow", True),
    ):
        assert bundle.fits(version, requirement) == fits, (version, requirement)


def test_what_is_gathered_is_asked_for_as_the_project_does():
    modules, requirements = bundle.dependencies("3.12")
    assert modules["timm"] == "timm.utils"
    assert sorted(requirements["timm"].split(",")) in (["<2", "timm>=1.0.31"], [">=1.0.31", "timm<2"])
    assert set(modules) == set(requirements) >= {"torch", "numpy", "tyro", "submitit", "scipy"}
    small = bundle.wanted([], list(requirements))
    assert small == ["tyro", "typeguard", "docstring_parser", "submitit", "cloudpickle", "timm"]
    assert bundle.wanted(["numba"], list(requirements)) == [*small, "numba", "llvmlite"]
    everything = bundle.wanted(["all", "lightly"], list(requirements))
    assert set(everything) >= set(requirements) - set(bundle.TORCHS_OWN) and "lightly_utils" in everything
    assert not set(everything) & set(bundle.TORCHS_OWN)


@pytest.mark.parametrize("how", ["not empty", "version", "data"])
def test_nothing_is_gathered_of_settings_that_are_wrong(tmp_path, capsys, how):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    arguments, said = {
        "not empty": ([str(tmp_path / "full")], "isn't empty"),
        "version": ([str(tmp_path / "new"), "--python", "312"], "--python 312"),
        "data": ([str(tmp_path / "new"), "--data", str(tmp_path / "none")], "no such file or folder"),
    }[how]
    assert bundle.main(["gather", *arguments]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
