"""Phrases that readers stumbled over don't come back, in code, help, messages, documents."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WHERE = ("README.md", "CHANGELOG.md", "docs/*.md", "lvssl", "pipelines", "slurm", "tools", "benchmarks")
PHRASES = (
    "all of its own set-up",
    "goes on where it was",
    "what regresses from a code",
    "measured alike and compared pair by pair",
    "owes its lead",
    "Who wants nothing but",
    "that nobody knows",
    "a repetition mends nothing",
    "final at once",
    "Ending and going on",
    "stands for something else",
    "holds other work",
    "no two classes to tell apart",
    "leave it out by",
    "exists and is no run",
    "units say anything",
    "is no uncertainty",
    "every required piece works",
    "without a word",
    "is at this task already",
    "is at work there",
    "how a chain stands",
    "control and floors",
    "type it again",
    "Where K samples meet",
    '"""Of NT-Xent',
    "meets the test images once",
    "ends all (fail)",
    "of each class as can be",
    "cannot be had in",
    "what tells two of them apart",
    "so many in a row end",
    "that a person can mend",
    "backward walk",
    "forward walk",
    "images from elsewhere",
    "made worse in steps",
    "meaning of bits",
)


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    listed = subprocess.run(["git", "ls-files", *WHERE], cwd=ROOT, capture_output=True, text=True).stdout
    files = [ROOT / name for name in listed.splitlines() if name.endswith((".py", ".md", ".html"))]
    if not files:
        pytest.skip("not a git checkout")
    return {
        str(path.relative_to(ROOT)): " ".join(path.read_text().split()) for path in files if path.exists()
    }


@pytest.mark.parametrize("phrase", PHRASES)
def test_no_file_has_the_phrase(texts, phrase):
    assert [name for name, text in texts.items() if phrase in text] == []
