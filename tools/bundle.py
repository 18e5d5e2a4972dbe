"""Bundle what a machine without network needs to run this source tree with its own torch. Standard library
only.

    make bundle OUT=DIR [TARGET=3.12] [DATA=PATH] [WITH="lightly kornia numba"]     here, with network
    python DIR/bundle.py unpack FOLDER --source CHECKOUT                            there, without

`gather` collects wheels for the given Python version and this machine's architecture, libturbojpeg from its
Debian package and, on request, data, copied unchanged. The wheels are the small ones that a machine with
torch tends to lack; `--with NAME` adds another dependency of pyproject.toml (`--with all`: all except torch
and its dependencies) or a peer of the benchmarks.

`unpack` puts them into FOLDER and checks them (`check` only checks): every dependency must import in the
required version, under the Python that runs this script, and libturbojpeg must decode an image. The exports
go to stdout and everything else to stderr, so this works:

    exports=$(python DIR/bundle.py unpack FOLDER --source CHECKOUT) && eval "$exports"
    python -m lvssl doctor

Exit status: 0 if all is well; 1 if a piece is missing, with a line for each; 2 for an incomplete bundle.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import hashlib
import importlib
import importlib.metadata as metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MANIFEST, WHEELS, LIBRARY, DATA = "bundle.json", "wheels", "lib/libturbojpeg.so.0", "data"

SMALL = ("tyro", "submitit", "timm")
# What must be bundled with each, besides torch's own dependencies (such as numpy).
COMPANIONS = {
    "tyro": "typeguard docstring_parser",
    "submitit": "cloudpickle",
    "numba": "llvmlite",
    "scikit-learn": "joblib narwhals threadpoolctl",
    "tensorboard": "absl-py grpcio markdown packaging protobuf tensorboard-data-server werkzeug markupsafe "
    "setuptools",
    "matplotlib": "contourpy cycler fonttools kiwisolver packaging pyparsing python-dateutil six",
    "lightly": "lightly_utils",
    "kornia": "kornia_rs",
}
TORCHS_OWN = ("torch", "torchvision", "numpy", "jinja2")

# A JPEG of 8 x 8 pixels, all of level 200.
GREY = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAIBAQEBAQIBAQECAgICAgQDAgICAgUEBAMEBgUGBgYFBgYGBwkIBgcJBwYGCAsI"
    "CQoKCgoKBggLDAsKDAkKCgr/wAALCAAIAAgBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAACf/EABQQAQAAAAAAAAAAAAAAAAAAAAD/2gAIAQEAAD8ASB//2Q=="
)


class Incomplete(Exception):
    """A bundle is incomplete or can't be made: one line, status 2."""


# ---------------------------------------------------------------------------- gather


def gather(out: Path, python: str, extra: list[str], data: Path | None) -> None:
    """Fill the folder `out`, which must be missing or empty. Needs pip, the network, and apt-get."""
    if out.exists() and any(out.iterdir()):
        raise Incomplete(f"{out}: isn't empty; name a new folder")
    if not re.fullmatch(r"3\.\d+", python):
        raise Incomplete(f"--python {python}: a version such as 3.12")
    if data is not None and not data.exists():
        raise Incomplete(f"{data}: no such file or folder")
    modules, requirements = dependencies(python)
    names = wanted(extra, list(requirements))
    (out / WHEELS).mkdir(parents=True)
    download(out / WHEELS, python, [requirements.get(name, name) for name in names])
    bring_library(out / LIBRARY)
    if data is not None and data.is_dir():
        shutil.copytree(data, out / DATA / data.name)
    elif data is not None:
        (out / DATA).mkdir()
        shutil.copyfile(data, out / DATA / data.name)
    shutil.copyfile(__file__, out / "bundle.py")
    seal(out, python, modules, requirements)


def dependencies(python: str) -> tuple[dict[str, str], dict[str, str]]:
    """{distribution: module} and {distribution: requirement} (`timm>=1.0.31,<2`) of this project."""
    code = "import json, lvssl.commands.doctor as d; print(json.dumps([d.PACKAGES, d.dependencies()]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    modules, asked = json.loads(done.stdout)
    modules |= {"torch": "torch", "tomli": "tomli"}
    if python != "3.10":  # only this Python needs it, whichever gathers
        del modules["tomli"]
    requirements = {}
    for text in asked:
        requirement = text.partition(";")[0].replace(" ", "")
        name = re.split(r"[<>=!~]", requirement)[0]
        if name in modules and "extra" not in text.partition(";")[2]:
            requirements[name] = requirement
    return {name: modules[name] for name in requirements}, requirements


def wanted(extra: list[str], known: list[str]) -> list[str]:
    """The distributions to bundle, without duplicates."""
    named = [*SMALL, *(["tomli"] if "tomli" in known else [])]
    for name in extra:
        named += [k for k in known if k not in TORCHS_OWN] if name == "all" else [name]
    return list(dict.fromkeys(one for name in named for one in (name, *COMPANIONS.get(name, "").split())))


def download(folder: Path, python: str, requirements: list[str]) -> None:
    machine = platform.machine()
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(28, 16, -1)]
    platforms += [f"{old}_{machine}" for old in ("manylinux2014", "manylinux2010", "manylinux1")]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["-d", str(folder)]
    command += ["--python-version", python, "--implementation", "cp"]
    command += [word for name in platforms for word in ("--platform", name)]
    if subprocess.run([*command, *requirements], stdout=sys.stderr).returncode:
        raise Incomplete("pip download failed, see above")


def bring_library(target: Path) -> None:
    """Extract libturbojpeg from the distribution's package; it only needs libc."""
    target.parent.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        names = ("libturbojpeg0", "libturbojpeg")  # Debian's and Ubuntu's
        if subprocess.run([ROOT / "tools/install.sh", "deb", folder, *names]).returncode:
            raise Incomplete("libturbojpeg can't be had from apt-get, see above")
        (package,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, f"{folder}/files"], check=True)
        (found,) = Path(folder).glob("files/usr/lib/*/libturbojpeg.so.0")
        shutil.copyfile(found, target)


def seal(out: Path, python: str, modules: dict[str, str], requirements: dict[str, str]) -> None:
    """Write the manifest and print the sizes."""
    files: dict[str, tuple[int, str]] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file() and path.name != MANIFEST):
        files[path.relative_to(out).as_posix()] = (path.stat().st_size, digest(path))
    content = {"python": python, "machine": platform.machine(), "modules": modules}
    content |= {"requirements": requirements, "files": files}
    (out / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")
    for name, (size, _) in files.items():
        say(f"{size / 2**20:8.2f} MiB  {name}")
    say(f"{sum(size for size, _ in files.values()) / 2**20:8.2f} MiB  in all, for Python {python}: {out}")


# ---------------------------------------------------------------------------- unpack


def unpack(bundle: Path, target: Path, source: Path | None) -> int:
    """Put the wheels and the library into `target`, print the exports, and check. Returns the exit status."""
    manifest = read_manifest(bundle)
    for name, (size, expected) in manifest["files"].items():
        path = bundle / name
        if not path.is_file() or path.stat().st_size != size or digest(path) != expected:
            raise Incomplete(f"{path}: isn't what was gathered; bring the bundle again")
    python, lib = target / "python", target / "lib"
    if target.resolve() == bundle.resolve():
        raise Incomplete(f"{target}: is the bundle itself; name another folder")
    for folder in (python, lib):
        if folder.exists() and not (target / MANIFEST).is_file():
            raise Incomplete(f"{folder}: exists, but not from a bundle; name another folder")
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(bundle / MANIFEST, target / MANIFEST)
    for folder in (python, lib):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for name in manifest["files"]:
        if name.startswith(WHEELS + "/"):
            unpack_wheel(bundle / name, python)
        elif name.startswith("lib/"):
            shutil.copyfile(bundle / name, target / name)
    if any(name.startswith(DATA + "/") for name in manifest["files"]):
        say(f"data: {(bundle / DATA).resolve()}")
    return check(target, source)


def unpack_wheel(wheel: Path, folder: Path) -> None:
    """Extract a wheel's modules; scripts aren't needed."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            top, _, rest = name.partition("/")
            kind, _, inner = rest.partition("/")
            if top.endswith(".data"):
                if kind in ("purelib", "platlib") and inner and not name.endswith("/"):
                    (folder / inner).parent.mkdir(parents=True, exist_ok=True)
                    (folder / inner).write_bytes(archive.read(name))
            else:
                archive.extract(name, folder)


# ---------------------------------------------------------------------------- check


def check(target: Path, source: Path | None) -> int:
    """Print the exports, and which pieces of the bundle's list are missing under this Python with them."""
    read_manifest(target)
    exports = {"PYTHONPATH": search_path(target, source), "LVSSL_TURBOJPEG": str(target.resolve() / LIBRARY)}
    for name, value in exports.items():
        print(f"export {name}={shlex.quote(value)}", flush=True)
    # In its own process: paths are read when Python starts, and a package may crash the process.
    command = [sys.executable, str(Path(__file__).resolve()), "probe", str(target.resolve())]
    done = subprocess.run(command, env=os.environ | exports, stdout=sys.stderr)
    if done.returncode not in (0, 1):
        say(f"missing: the check itself ended with status {done.returncode}, after the last line above")
    return 1 if done.returncode else 0


def search_path(target: Path, source: Path | None) -> str:
    """The source tree, the bundle, then the existing search path."""
    places = [str(source.resolve())] if source else []
    places += [str(target.resolve() / "python"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(place for place in places if place))


def probe(target: Path) -> int:
    """Import everything in this process."""
    manifest = read_manifest(target)
    missing = 0
    for name, module in manifest["modules"].items():
        found, why = import_one(name, module, manifest["requirements"][name])
        missing += bool(why)
        say(f"missing: {name}: {why}" if why else f"ok       {name} {found}")
    for wheel in unfit(manifest):
        missing += 1
        here = "{}.{}".format(*sys.version_info)
        say(f"missing: {wheel} is for Python {manifest['python']}, this is {here}: make bundle TARGET={here}")
    if (machine := manifest["machine"]) != (here := platform.machine()):
        missing += 1
        say(f"missing: compiled pieces are for {machine}, this is {here}: make the bundle on such a machine")
    why = library_fails(target / LIBRARY)
    missing += bool(why)
    say(f"missing: libturbojpeg: {why}" if why else f"ok       libturbojpeg {target / LIBRARY}")
    return 1 if missing else 0


def import_one(name: str, module: str, requirement: str) -> tuple[str, str]:
    """(version, error or empty string)."""
    try:
        importlib.import_module(module)
        found = metadata.version(name)
    except Exception as error:  # a broken package may raise anything
        return "", f"{type(error).__name__}: {error}".splitlines()[0]
    return found, "" if fits(found, requirement) else f"{found} is there, {requirement} is needed"


def fits(version: str, requirement: str) -> bool:
    """Whether a version meets `name>=1.0,<2`; only >= and < are supported."""
    for operator, bound in re.findall(r"(>=|<)([\d.]+)", requirement):
        if (release(version) >= release(bound)) != (operator == ">="):
            return False
    return True


def release(version: str) -> list[int]:
    """1.0.31+cu130 -> [1, 0, 31]; trailing zeros are ignored."""
    numbers = [int(number) for number in re.split(r"[^\d.]", version)[0].split(".") if number]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers


def unfit(manifest: dict) -> list[str]:
    """Compiled wheels of the bundle that are for another Python version."""
    here, found = "cp{}{}".format(*sys.version_info), []
    for name in manifest["files"]:
        tags = Path(name).stem.split("-")[-3:]
        compiled = name.endswith(".whl") and tags[0].startswith("cp") and tags[1] != "abi3"
        if compiled and here not in tags[0].split("."):
            found.append(Path(name).name)
    return found


def library_fails(path: Path) -> str:
    """The error of libturbojpeg when it decodes a grey square, or an empty string."""
    try:
        library = ctypes.CDLL(str(path))
        library.tjInitDecompress.restype = ctypes.c_void_p
        handle = ctypes.c_void_p(library.tjInitDecompress())
        pixels = ctypes.create_string_buffer(64)
        jpeg, size = ctypes.c_char_p(GREY), ctypes.c_ulong(len(GREY))
        failed = library.tjDecompress2(handle, jpeg, size, pixels, 8, 8, 8, 6, 0)  # TJPF_GRAY
        library.tjDestroy(handle)
    except (OSError, AttributeError) as error:
        return str(error)
    return "" if not failed and set(pixels.raw) <= set(range(198, 203)) else "decodes a JPEG wrongly"


# ---------------------------------------------------------------------------- both


def read_manifest(folder: Path) -> dict:
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise Incomplete(f"{folder / MANIFEST}: cannot be read ({error}); is {folder} a bundle?") from error


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bundle.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("gather", help="fill a folder; needs the network")
    one.add_argument("out", type=Path)
    one.add_argument("--python", default="3.12", metavar="X.Y", help="of the machine without network")
    one.add_argument("--with", dest="extra", action="append", default=[], metavar="NAME", help="or all")
    one.add_argument("--data", type=Path, metavar="PATH", help="a file or folder that comes along")
    for name, what in (("unpack", "lay a bundle into a folder and check it"), ("check", "check it again")):
        one = commands.add_parser(name, help=what)
        one.add_argument("target", type=Path, metavar="FOLDER")
        one.add_argument("--source", type=Path, metavar="CHECKOUT", help="of this project, for PYTHONPATH")
    commands.add_parser("probe").add_argument("target", type=Path)
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "gather":
            gather(chosen.out, chosen.python, chosen.extra, chosen.data)
            return 0
        if chosen.command == "unpack":
            return unpack(Path(__file__).resolve().parent, chosen.target, chosen.source)
        if chosen.command == "check":
            return check(chosen.target, chosen.source)
        return probe(chosen.target)
    except Incomplete as error:
        say(f"error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
