"""Compare the crop kernel, in Triton's interpreter, with integer arithmetic; prints a JSON object per case.

    TRITON_INTERPRET=1 python tests/pipelines/crop_kernel_interpreted.py [case ...]

A case is HEIGHT:WIDTH:SIDE, or the name of a function below. Run by test_decode_gpu.py. With `cuda` as the
first argument, the same cases run on a GPU instead.
"""

import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from pipelines.decode.gpu import crop_and_resize
from pipelines.decode.images import ImageReader
from pipelines.decode.nvjpeg import NvjpegReader
from pipelines.decode.resize import resize_crop

# One pixel; odd sides; shrunk, in two blocks; enlarged; 20 taps; exact halves.
CASES = ("1:1:8", "33:27:9", "40:30:20", "9:5:17", "70:40:8", "32:32:16", "empty", "decoded", "reader")


def exact(image: np.ndarray, box: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return a crop of image uint8 [H, W, 3] as fractions (numerators int64 [R, R, 3], denominators int64 [R,
    R, 1]), and by how many levels products and sums in fp32 may be off."""
    top, left, height, width = (int(number) for number in box)
    down, across = weights(height, side), weights(width, side)
    pixels = image[top : top + height, left : left + width].astype(np.int64)
    above = np.einsum("yp,pqc,xq->yxc", down, pixels, across, optimize=True)
    below = (down.sum(1)[:, None] * across.sum(1))[..., None]
    # Each rounding is u = 2^-24, of at most 256. For n products there is one for the weight (on the CPU
    # three, for each direction's), one for the pixel and n for their sum; the denominator has as many, then
    # come quotient and 0.5.
    taps = int((down > 0).sum(1).max() * (across > 0).sum(1).max())
    return above, below, 256 * (2 * taps + 10) * 2.0**-24


def weights(size: int, side: int) -> np.ndarray:
    """Return weights int64 [R, size]: 2 max(size, R) at distance 0."""
    distance = np.abs((2 * np.arange(size) + 1) * side - (2 * np.arange(side)[:, None] + 1) * size)
    return np.maximum(2 * max(size, side) - distance, 0)


def compared(images: list[np.ndarray], boxes: np.ndarray, flips: np.ndarray, side: int, device: str) -> dict:
    """Measure by how much more than half a level the kernel's and the CPU's crops of uint8 [H, W, 3] are off,
    as a share of what rounding may add, and count the values in which the two differ."""
    planes = [torch.from_numpy(image).permute(2, 0, 1).contiguous().to(device) for image in images]
    kernel = crop_and_resize(planes, boxes, flips, side).cpu().numpy()
    on_cpu, excess = np.empty_like(kernel), {"kernel": 0.0, "cpu": 0.0}
    for b, image in enumerate(images):
        for v in range(boxes.shape[1]):
            resize_crop(image, boxes[b, v], on_cpu[b, v], flips[b, v])
            above, below, slack = exact(image, boxes[b, v], side)
            for name, crop in (("kernel", kernel[b, v]), ("cpu", on_cpu[b, v])):
                upright = crop[:, ::-1] if flips[b, v] else crop
                beyond = np.abs(upright.astype(np.int64) * below - above) / below - 0.5
                excess[name] = max(excess[name], float(beyond.max()) / slack)
    levels = np.abs(kernel.astype(int) - on_cpu)
    return {**excess, "levels": int(levels.max()), "differ": float((levels > 0).mean())}


def sized(height: int, width: int, side: int, device: str) -> dict:
    """Crop two images: the whole and a corner pixel of one, a part and a line of a larger one."""
    rng = np.random.default_rng(side)
    images = [rng.integers(0, 256, (height + k, width + 2 * k, 3), np.uint8) for k in (0, 3)]
    part = [height // 3, width // 4, height - height // 3, max(1, width // 2)]
    boxes = np.array(
        [[[0, 0, height, width], [height - 1, width - 1, 1, 1]], [part, [height + 2, 0, 1, width]]], np.int32
    )
    return compared(images, boxes, rng.random((2, 2)) < 0.5, side, device)


def empty(device: str) -> dict:
    """Take no images, and no crops of one."""
    image = torch.zeros(3, 5, 5, dtype=torch.uint8, device=device)
    shapes = [
        list(crop_and_resize(images, np.empty((len(images), views, 4), np.int32), np.empty((0,)), 9).shape)
        for images, views in (([], 2), ([image], 0))
    ]
    return {"shapes": shapes}


def encoded(number: int, kind: str) -> bytes:
    """Return an image file of one kind; its size depends on the number."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    picture = coarse.resize((20 + 4 * number, 36 - 2 * number), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if kind == "turned":
        exif[0x0112] = 6
    file = io.BytesIO()
    options = {"quality": 90, "progressive": kind == "progressive", "exif": exif}
    picture = picture.convert("L") if kind == "grey" else picture
    picture.save(file, *(["PNG"] if kind == "png" else ["JPEG"]), **({} if kind == "png" else options))
    return file.getvalue()


def decoded(device: str) -> dict:
    """Crop pixels that torchvision decodes on this device: colour, grey, progressive."""
    files = [encoded(number, kind) for number, kind in enumerate(("plain", "grey", "progressive"))]
    images = []
    for file in files:
        data = torch.frombuffer(bytearray(file), dtype=torch.uint8)
        planes = decode_jpeg(data, ImageReadMode.RGB, device=device)
        images.append(np.ascontiguousarray(planes.permute(1, 2, 0).cpu().numpy()))
    boxes = np.array([[[2, 1, 26, 17], [0, 0, *image.shape[:2]]] for image in images], np.int32)
    return compared(images, boxes, np.array([[True, False]] * 3), 12, device)


def reader(device: str) -> dict:
    """Read a folder of every kind of file, decoding unusual ones on the CPU, into an array and a tensor, and
    compare with the CPU's own reader."""
    kinds = ("plain", "grey", "png", "turned", "progressive", "plain")
    with tempfile.TemporaryDirectory() as folder:
        for number, kind in enumerate(kinds):
            name = f"{number}.{'png' if kind == 'png' else 'jpg'}"
            (Path(folder) / name).write_bytes(encoded(number, kind))
        ours, theirs = ImageReader(folder), NvjpegReader(folder, device)
        indices, rng = np.arange(len(kinds))[::-1], np.random.default_rng(0)
        boxes = np.array([[[0, 0, h, w], [5, 3, 9, 15]] for h, w in zip(*ours.sizes(indices))], np.int32)
        flips = rng.random(boxes.shape[:2]) < 0.5
        outs = [np.zeros((len(kinds), 2, 12, 12, 3), np.uint8) for _ in range(2)]
        tensor = torch.zeros(outs[0].shape, dtype=torch.uint8, device=device)
        for source, out in zip((ours, theirs, theirs), (*outs, tensor)):
            source.crops(indices, boxes, out, flips)
        levels = np.abs(outs[0].astype(int) - outs[1])
        same = bool((torch.from_numpy(outs[1]) == tensor.cpu()).all())
        return {"levels": int(levels.max()), "mean": float(levels.mean()), "tensor is the array": same}


def main(arguments: list[str]) -> None:
    device = "cuda" if arguments[:1] == ["cuda"] else "cpu"
    for case in arguments[device == "cuda" :] or CASES:
        named = {"empty": empty, "decoded": decoded, "reader": reader}.get(case)
        row = named(device) if named else sized(*map(int, case.split(":")), device=device)
        print(json.dumps({"case": case, **row}), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
