"""The documents: links lead somewhere, references are current, and what they tell a user to type works."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lvssl.commands.main import COMMANDS, main
from pipelines.decode.resize import resize_crop
from pipelines.parameters import centre_boxes
from tools import reference

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its blocks of code and without code within lines."""
    return re.sub(r"`[^`\n]*`", "", BLOCK.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and mkdocs make them of plain words."""
    heads = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head.lower()).strip()) for head in heads}


def broken_links(page: Path) -> list[str]:
    """Links of a page to a file or a heading that isn't there."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        there = (page.parent / path) if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One Head\n[a](#one-head) [b](#two) [c](no.md) [d](page.md#one-head) `[e](no)`\n")
    assert broken_links(page) == ["#two", "no.md"]


def test_the_readme_stays_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130 and max(map(len, lines)) <= 100


def test_every_page_is_in_the_site():
    listed = set(re.findall(r"- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)) - {"changelog.md"}
    assert listed == {page.name for page in PAGES if page.parent.name == "docs"}


def test_every_page_with_code_is_run():
    """By a test below; commands that only show a form stand in blocks without a language."""
    run = {"README", "codes", "codes-and-search", "export", "ffcv-and-dali", "get-started", "how-it-works"}
    run |= {"latents", "loader"}
    having = [
        page for page in PAGES if {"bash", "python"} & {kind for kind, _ in BLOCK.findall(page.read_text())}
    ]
    assert {page.stem for page in having} == run | {"uncertainty", "your-own-images"}


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


def test_the_command_line_reference_has_every_command_and_option():
    now, written = (
        {head.partition("\n")[0]: options(head) for head in re.split(r"^## ", text, flags=re.M)[1:]}
        for text in (reference.command_line(), (ROOT / "docs/cli.md").read_text())
    )
    assert set(now) == {"convert-beton", *(f"lvssl {name}" for name in COMMANDS)}
    assert now == written, "options have changed: run `make reference`"


def test_the_python_reference_is_current():
    written = (ROOT / "docs/python-api.md").read_text()
    assert reference.python_api().rstrip() == written.rstrip(), "run `make reference`"


def test_the_citation_names_this_version():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_crop_of_the_export_page_is_that_of_encode():
    code = next(
        text for kind, text in BLOCK.findall((ROOT / "docs/export.md").read_text()) if kind == "python"
    )
    defined: dict = {}
    exec(code, defined)
    rng, differing = np.random.default_rng(0), []
    for side, share in ((224, 0.875), (32, 1.0)):
        for _ in range(6):
            height, width = rng.integers(40, 400, 2).tolist()
            image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            ours = np.empty((side, side, 3), np.uint8)
            box = centre_boxes(np.array([height]), np.array([width]), share)[0, 0]
            resize_crop(image, box, ours, False)
            differing.append(np.abs(defined["crop"](image, side, share).astype(int) - ours).ravel())
    assert max(d.max() for d in differing) <= 1 and np.mean(np.concatenate(differing) > 0) < 1e-3


# -- what takes longer -----------------------------------------------------------------------------


def run_blocks(page: Path, folder: Path, without: tuple[str, ...] = ()) -> int:
    """Run a page's bash and python blocks in turn, in one folder, but for those that have one of the words of
    `without`; returns how many there were."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    commands = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    blocks = [(kind, text) for kind, text in BLOCK.findall(page.read_text()) if kind in commands]
    for kind, text in blocks:
        if text.startswith("make ") or any(word in text for word in without):
            continue  # what installs, and this very suite
        done = subprocess.run(
            [*commands[kind], text], cwd=folder, env=environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, f"{page.name}:\n{text}\n{done.stdout}\n{done.stderr}"
    return len(blocks)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A flat folder of 100 small pictures."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for i in range(100):
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((50, 40), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.jpg")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "docs/your-own-images.md"])
def test_the_commands_for_ones_own_photos_work(name, photos):
    assert run_blocks(ROOT / name, photos) > 0
    assert next(photos.glob("*/report.html"), None) or next(photos.glob("runs/*/report.html"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latents", "loader"])
def test_single_pieces_work_in_code_of_ones_own(name, photos):
    assert run_blocks(ROOT / f"docs/{name}.md", photos) == 1


@pytest.mark.slow
def test_get_started_and_the_pages_that_follow_it_work(tmp_path):
    assert run_blocks(ROOT / "docs/get-started.md", tmp_path) >= 3
    assert (tmp_path / "neighbours.csv").stat().st_size > 0
    for name in ("codes-and-search", "uncertainty"):
        assert run_blocks(ROOT / f"docs/{name}.md", tmp_path) >= 1


@pytest.mark.slow
def test_the_python_of_the_other_pages_works(photos, digits, monkeypatch):
    monkeypatch.chdir(photos)
    Path("train.beton").symlink_to(digits["train"])
    small = ["--backbone", "tiny", "--resolution", "32", "--epochs", "1", "--device", "cpu", "--workers", "1"]
    assert main(["pretrain", "--data", "photos", "--out", "RUN", *small]) == 0
    assert main(["encode", "RUN", "--images", "photos"]) == 0
    for name in "ab":
        shutil.copyfile("photos/000.jpg", f"{name}.jpg")
    for name in ("train", "photos", "queries"):
        np.save(f"{name}.npy", np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32))
    assert main(["encode", "train.npy", "--images", "photos.npy", "--bits", "64", "--code", "itq"]) == 0
    known = {"logits": torch.zeros(8, 32), "projector": torch.nn.Linear(32, 8), "beta": 0.01, "step": 1}
    known["your_loss"] = torch.nn.functional.mse_loss
    for page in ("codes", "how-it-works"):
        for kind, text in BLOCK.findall((ROOT / f"docs/{page}.md").read_text()):
            if kind == "python":
                exec(text, known)
    assert torch.isfinite(known["loss"]) and known["ids"][0][0] == "0"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "without"), [("ffcv", ("nvidia",)), ("nvidia.dali", ("ffcv", "theirs"))], ids=["ffcv", "dali"]
)
def test_what_is_said_of_ffcv_and_dali_works_where_they_are_installed(library, without, photos):
    if any(importlib.util.find_spec(name) is None for name in (library.split(".")[0], library)):
        pytest.skip(
            f"{library} isn't installed: make install EXTRAS=dev,ffcv, or pip install 'lvssl[dali-cu120]'"
        )
    for i, path in enumerate(sorted((photos / "photos").glob("*.jpg"))):
        path.parent.joinpath("ab"[i % 2]).mkdir(exist_ok=True)
        path.rename(path.parent / "ab"[i % 2] / path.name)
    assert run_blocks(ROOT / "docs/ffcv-and-dali.md", photos, without) >= 3


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs isn't installed: pip install 'lvssl[docs]', or make docs")
    for name in ("docs", "tools", "mkdocs.yml", "CHANGELOG.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "build/site/get-started.html").is_file()
