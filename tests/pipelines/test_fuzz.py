"""Damaged betons and JPEGs through the loader, in child processes: no crash, no hang, no silent garbage.

Each mutant is a small beton (or a folder of JPEGs, or tars with their index) with bytes flipped, zeroed,
moved or cut off, in the layout or in the images. It may be refused as it is opened, or lose some samples;
what the loader does give must be, pixel for pixel, what a fresh decompressor makes of these very bytes, at
the size that it names.
"""

import json
import subprocess
import sys

import pytest

CHILD = """if True:
    import collections, io, json, os, resource, shutil, sys, tempfile
    from pathlib import Path
    import numpy as np
    from PIL import Image
    from pipelines.formats import jpeg
    from pipelines.convert.conversion import Settings, convert
    from pipelines.errors import InputError
    from pipelines.loader import TwoViewLoader
    from pipelines.parameters import crop_boxes
    from pipelines.decode import open_reader
    from pipelines.decode.turbo import crop_pixels
    from pipelines.views import ViewSettings

    first, count = int(sys.argv[1]), int(sys.argv[2])
    view, images = ViewSettings(resolution=16), 9
    folder = Path(tempfile.mkdtemp())
    random = np.random.default_rng(12345)
    for i in range(images):
        (folder / "good" / "a").mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (5, 5, 3), np.uint8)
        size = tuple(random.integers(20, 70, 2).tolist())
        image = Image.fromarray(pixels).resize(size, 3)
        how = {"progressive": i % 3 == 0, "restart_marker_rows": int(i % 3 == 1)}
        if i < 7:
            image.save(folder / "good" / "a" / f"{i}.jpg", quality=int(random.integers(60, 99)), **how)
        else:
            image.save(folder / "good" / "a" / f"{i}.png")
    convert(str(folder / "good"), folder / "good.beton", Settings(), webdataset=folder / "tars")
    beton = (folder / "good.beton").read_bytes()
    files = {path.name: path.read_bytes() for path in sorted((folder / "good" / "a").iterdir())}

    def mutate(content, random, low, high):
        content, kind = bytearray(content), random.integers(5)
        place = int(random.integers(low, high))
        length = int(min(high - place, 2 ** random.integers(0, 10)))
        if kind == 0:
            for _ in range(random.integers(1, 6)):
                content[int(random.integers(low, high))] ^= 1 << int(random.integers(8))
        elif kind == 1:
            content[place] = int(random.choice([0, 1, 0x7F, 0x80, 0xFF]))
        elif kind == 2:
            content[place : place + length] = bytes(length)
        elif kind == 3:
            other = int(random.integers(low, max(low + 1, high - length)))
            content[place : place + length] = content[other : other + length]
        else:
            del content[place:]
        return bytes(content)

    def make(number):
        random = np.random.default_rng(number)
        if number % 4 == 3:
            shutil.rmtree(folder / "bad", ignore_errors=True)
            shutil.copytree(folder / "tars", folder / "bad")
            os.chmod(folder / "bad", 0o755)
            if number % 8 == 3:
                (folder / "bad" / "manifest.json").unlink()
            victim = sorted((folder / "bad").glob("images*"))[random.integers(2)]  # the index or the tar
            data = victim.read_bytes()
            victim.unlink()
            victim.write_bytes(mutate(data, random, 0, len(data)))
            return folder / "bad"
        if number % 4 == 2:
            shutil.rmtree(folder / "bad", ignore_errors=True)
            (folder / "bad" / "a").mkdir(parents=True)
            for name, data in files.items():
                hurt = mutate(data, random, 0, len(data)) if random.random() < 0.6 else data
                (folder / "bad" / "a" / name).write_bytes(hurt)
            return folder / "bad"
        header, table = 24 + 2 * 1041 + 24 * images + 24, 24 * images
        if number % 4 == 0:
            low, high = [(0, header), (len(beton) - table, len(beton))][number % 8 == 0]
        else:
            low, high = header, len(beton) - table
        content = beton
        for _ in range(random.integers(1, 4)):
            content = mutate(content, random, low, min(high, len(content)) if len(content) > low else low + 1)
            if len(content) < len(beton):
                break
        (folder / "bad.beton").write_bytes(content)
        return folder / "bad.beton"

    def truth(source, index):
        stored = source.encoded(0, index)
        if isinstance(stored, bytes) and jpeg.is_jpeg(stored):
            jpeg._local.__dict__.clear()  # a fresh decompressor
            pixels = jpeg.decode(stored, jpeg.read_header(stored))
        elif isinstance(stored, bytes):
            pixels = np.asarray(Image.open(io.BytesIO(stored)).convert("RGB"))
        else:
            pixels = np.ascontiguousarray(stored)
        return pixels

    outcomes = collections.Counter()
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    for number in range(first, first + count):
        path = make(number)
        print(json.dumps({"mutant": number}), flush=True)
        try:
            source = open_reader(path)
            with TwoViewLoader(
                source, view, len(source), workers=1, on_error="skip", crops_only=True, order="sequential"
            ) as loader:
                (batch,) = list(loader)
        except InputError:
            outcomes["refused"] += 1
            continue
        outcomes["some samples refused" if loader.skipped else "read"] += 1
        seen = set()
        for row, index in enumerate(batch.indices.tolist()):
            if index in seen:
                continue
            seen.add(index)
            pixels, found = truth(source, index), np.empty((2, 16, 16, 3), np.uint8)
            assert pixels.shape[:2] == tuple(int(n[0]) for n in source.sizes(np.array([index]))), number
            table = batch.parameters[row].numpy()
            assert crop_pixels(pixels, crop_boxes(table), table[:, 4] != 0, found), number
            ours = batch.views[:, row].permute(0, 2, 3, 1).numpy()
            assert np.array_equal(ours, found), (number, index)
            outcomes["samples read"] += 1
        outcomes["samples refused"] += len(loader.damaged)
    shutil.rmtree(folder)
    print(json.dumps(outcomes), flush=True)
"""


def run(first: int, count: int) -> dict[str, int]:
    """Outcomes of some mutants in a child process."""
    command = [sys.executable, "-c", CHILD, str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + count)
    last = done.stdout.splitlines()[-1] if done.stdout else "nothing"
    assert done.returncode == 0, f"after {last}: {done.stderr[-3000:]}"
    return json.loads(last)


def test_mutants():
    outcomes = run(0, 120)
    assert outcomes["refused"] > 10 and outcomes["samples refused"] > 30 and outcomes["samples read"] > 100


@pytest.mark.slow
def test_two_thousand_mutants():
    totals: dict[str, int] = {}
    for first in range(0, 2000, 250):
        for name, number in run(first, 250).items():
            totals[name] = totals.get(name, 0) + number
    print(json.dumps(totals))
    assert sum(totals.get(name, 0) for name in ("refused", "some samples refused", "read")) == 2000
