"""Write the small beton in this folder with FFCV's own DatasetWriter; needs the extra `ffcv`.

    python tests/convert/make_ffcv_beton.py    # writes ffcv-written.beton.gz here (FFCV 1.0.2 made this one)

It holds six images of 16 to 32 pixels, half of them JPEG, half raw. It is compressed, because FFCV fills
whole pages of 2 MB.
"""

import gzip
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from made_images import pixels

BETON = Path(__file__).with_name("ffcv-written.beton.gz")
COUNT = 6


def image(index: int) -> np.ndarray:
    return pixels(16 + 3 * index, 32 - 2 * index, seed=index)


def label(index: int) -> int:
    return 7 - index


def weight(index: int) -> float:
    return index / 4 - 0.5


class Images:
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int):
        # FFCV chooses what becomes JPEG with NumPy's generator, in its worker process.
        np.random.seed(index)
        return image(index), label(index), weight(index)


def write(path: Path) -> None:
    from ffcv.fields import FloatField, IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {
        "image": RGBImageField("proportion", compress_probability=0.5, jpeg_quality=95),
        "label": IntField(),
        "weight": FloatField(),
    }
    DatasetWriter(str(path), fields, page_size=1 << 21, num_workers=1).from_indexed_dataset(Images())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "x.beton")
        content = (Path(folder) / "x.beton").read_bytes()
    BETON.write_bytes(gzip.compress(content, mtime=0))
    print(f"{BETON}: {BETON.stat().st_size:,} bytes, {len(content):,} unpacked")
