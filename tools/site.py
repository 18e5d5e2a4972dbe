"""A hook for mkdocs: pages link to CHANGELOG.md above docs/, and the site needs a copy of it."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    text = (ROOT / "CHANGELOG.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("](../CHANGELOG.md)", "](changelog.md)")
