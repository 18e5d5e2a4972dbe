"""Identity of a data set, kept in a run's config.json so that the run isn't resumed on another set.

It consists of the number of images, the class names, and a digest of the labels and of up to SAMPLED images,
evenly spaced. Neither path nor format counts: a set may be moved, and a beton and the tars that were made in
the same pass are the same set.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from pipelines.datasets.dataset import evenly_spaced
from pipelines.decode import DamagedSample, Reader
from pipelines.decode.pixels import as_rgb, decode_other
from pipelines.formats import jpeg

SAMPLED = 256  # images, each of which takes one read of a file


def describe_set(source: Reader, order: str = "random", labelled: bool = True) -> dict[str, Any]:
    """Return {"images", "classes" (names, or None), "digest"} of a set, as plain JSON values; with the
    `order` quasi-random, which goes by storage blocks, also their digest, "blocks". Unless `labelled`, the
    digest is that of the same images without labels."""
    labels = source.labels if labelled else np.full(len(source), -1)
    digest = hashlib.sha256(np.ascontiguousarray(labels, np.int64).tobytes())
    for index in evenly_spaced(len(source), SAMPLED).tolist():
        digest.update(_content(source, index))
    told = {"images": len(source), "classes": source.classes, "digest": digest.hexdigest()}
    if order == "quasi-random":
        blocks = np.ascontiguousarray(source.storage_blocks(), np.int64)
        told["blocks"] = hashlib.sha256(blocks.tobytes()).hexdigest()
    return told


def same_images(one: Reader, other: Reader) -> bool:
    """Whether two sets hold the same images, whatever their labels and formats, judging by the number of
    images and SAMPLED of them; those that differ do so at the first, as a rule."""
    rows = evenly_spaced(len(one), SAMPLED).tolist()
    return len(one) == len(other) and all(_content(one, row) == _content(other, row) for row in rows)


def other_set(stored: dict[str, Any], found: dict[str, Any]) -> str:
    """Describe how the set of `found` differs from that of `stored`; empty if they are the same."""
    if stored["images"] != found["images"]:
        return f"it has {found['images']:,} images, not {stored['images']:,}"
    ours, theirs = stored["classes"], found["classes"]
    if ours is not None and theirs is not None and ours != theirs:
        strange = sorted(set(theirs) ^ set(ours))
        return f"its classes differ{', such as ' + ', '.join(strange[:3]) if strange else ''}"
    if stored["digest"] != found["digest"]:
        return "its images or labels differ"
    if stored.get("blocks") and found.get("blocks") and stored["blocks"] != found["blocks"]:
        return "its files are split differently, which the order quasi-random depends on"
    return ""


def _content(source: Reader, index: int) -> bytes:
    """Return a JPEG's bytes or, for other images, size and pixels, which are the same in every format."""
    try:
        stored = source.encoded(0, index)
        if isinstance(stored, bytes) and jpeg.is_jpeg(stored):
            return stored
        if isinstance(stored, np.ndarray):
            pixels = as_rgb(stored)
        else:  # regardless of --max-pixels, which may be raised later
            pixels = decode_other(stored, most=jpeg.MAX_PIXELS)[0]
    except (DamagedSample, jpeg.DamagedImage):
        return b"damaged"
    return str(pixels.shape).encode() + pixels.tobytes()
