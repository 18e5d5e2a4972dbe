"""Images of every kind that the sources have to read, as files and as a beton made from them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.convert.conversion import ConvertOptions, Settings, convert

COUNT = 53


@pytest.fixture(scope="session")
def beton(tmp_path_factory) -> Path:
    """Write JPEGs of several sizes, some greyscale, and small PNGs, which are stored as raw pixels."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(COUNT):
        target = folder / "pictures" / f"class{i % 3}"
        target.mkdir(parents=True, exist_ok=True)
        height, width = random.integers(30, 120, 2) if i % 4 else (32, 32)
        coarse = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        if i % 5 == 0:
            image = image.convert("L")
        image.save(target / f"{i:03d}.{'jpg' if i % 4 else 'png'}", quality=92)
    convert(
        str(folder / "pictures"), folder / "set.beton", Settings(),
        options=ConvertOptions(webdataset=folder / "shards", images_per_tar=20,
    ))  # fmt: skip
    return folder / "set.beton"


@pytest.fixture(scope="session")
def sources(beton) -> dict[str, Path]:
    """Return the same images as a beton, as tars with their indices, and as the original files."""
    return {"beton": beton, "folder": beton.parent / "pictures", "shards": beton.parent / "shards"}
