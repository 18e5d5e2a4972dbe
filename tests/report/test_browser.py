"""Every page that we write, and all of the documentation, in Chromium at two widths, light and dark: axe-core
finds nothing serious, and nothing is wider than the window."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_page import write_analysis, write_compression, write_run

from lvssl.commands.main import main
from lvssl.report.page import write_report

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
LOOKS = [(400, "light"), (1280, "dark"), (400, "dark"), (1280, "light")]
WIDER = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("playwright", "axe_playwright_python")),
        reason="axe-core isn't installed: pip install 'lvssl[browser]'",
    ),
]


@pytest.fixture(scope="module")
def examined():
    """Finds what is wrong with a page: [what], over all widths and colour schemes."""
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    def examine(path: Path, looks: int = 4) -> list[str]:
        found = []
        for width, scheme in LOOKS[:looks]:
            page = browser.new_page(
                viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True
            )
            page.goto(path.as_uri())
            where = f"{path.name} at {width} px, {scheme}"
            if page.evaluate(WIDER):
                found.append(f"{where}: wider than the window")
            for fault in Axe().run(page).response["violations"]:
                if fault["impact"] in ("serious", "critical"):
                    found.append(f"{where}: {fault['id']}: {fault['nodes'][0]['html'][:200]}")
            page.close()
        return found

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield examine
        browser.close()


def test_a_serious_fault_is_found(examined, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<html lang=en><title>t</title><main><h1>a</h1><img src='data:,'></main>")
    assert len(examined(page)) == 4 and all("image-alt" in fault for fault in examined(page))


def test_the_report_with_all_of_its_sections(examined, tmp_path):
    run = write_run(tmp_path / "run", control=tmp_path / "control")
    write_compression(write_analysis(run, np.random.default_rng(1)))
    assert examined(write_report(run)) == []


def test_the_pages_of_a_folder_of_photos(examined, tmp_path):
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for i in range(24):
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((50, 40), Image.Resampling.BICUBIC).save(photos / f"{i}.jpg")
    run = str(tmp_path / "run")
    small = ["--backbone", "tiny", "--hidden", "16", "--epochs", "2", "--device", "cpu", "--workers", "2"]
    assert main(["pretrain", "--data", str(photos), "--out", run, *small]) == 0
    assert main(["encode", run, "--images", str(photos)]) == 0
    assert main(["search", run, "--query", str(photos), "--page", str(tmp_path / "search.html")]) == 0
    assert main(["curate", run, "--cosine", "0.5"]) == 0
    assert main(["report", run]) == 0
    for name in ("search.html", "run/curate/curate.html", "run/report.html"):
        assert examined(tmp_path / name) == []


def test_the_documentation(examined, tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs isn't installed: pip install 'lvssl[docs]', or make docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = sorted(path for path in tmp_path.glob("*.html") if path.name != "404.html")
    assert len(pages) >= 30
    assert [fault for page in pages for fault in examined(page, looks=2)] == []
    for name in ("index.html", "get-started.html"):
        assert examined(tmp_path / name) == []
