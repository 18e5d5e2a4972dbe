"""(seed, epoch, sample index, view) -> the parameters of that view.

All randomness of the augmentation is drawn here and nowhere else, from Philox4x32-10 (Salmon et al.
2011), a counter-based generator: no worker, rank, batch size or backend changes what a sample sees,
and to resume in mid-epoch is to know one number.
"""

import numpy as np
from numba import uint64

from pipelines.kernels.compiled import compiled
from pipelines.kernels.elementary import exp, log
from pipelines.kernels.philox import philox
from pipelines.views import ViewSettings

COLUMNS = (
    "top",  # crop box in pixels of the image ...
    "left",
    "height",
    "width",
    "flip",  # 1: mirrored
    "order",  # 0..23: which permutation of brightness, contrast, saturation, hue
    "brightness",  # factors; 1 leaves the image as it is
    "contrast",
    "saturation",
    "hue",  # share of a turn; 0 leaves the image as it is
    "grey",  # 1: colour dropped
    "sigma",  # of the blur, in pixels; 0: no blur
    "solarise",  # 1: values >= 0.5 inverted
)
TOP, LEFT, HEIGHT, WIDTH, FLIP, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, SIGMA, SOLARISE = range(
    13
)
P = len(COLUMNS)

CROP_TRIES = 10  # as torchvision's RandomResizedCrop
CROP_BLOCK = 16  # the tries' Philox blocks start here; blocks below are the other parameters'
ORDER_STREAM, PAGE_STREAM = 0xFFFF, 0xFFFE  # "view" numbers of the streams that make the epoch's order


@compiled(inline="always")
def uniforms(seed, epoch, index, view, block):
    """Four uniforms in [0, 1), multiples of 2^-24 (exact in fp32 too)."""
    seed, index = uint64(seed), uint64(index)
    w0, w1, w2, w3 = philox(
        index,
        index >> uint64(32),
        uint64(epoch),
        (uint64(view) << uint64(16)) | uint64(block),
        seed,
        seed >> uint64(32),
    )
    unit = 1.0 / 16777216.0
    eight = uint64(8)
    return (w0 >> eight) * unit, (w1 >> eight) * unit, (w2 >> eight) * unit, (w3 >> eight) * unit


@compiled()
def crop_box(seed, epoch, index, view, image_height, image_width, scale, ratio):
    """torchvision's RandomResizedCrop.get_params: ten tries, then the central crop of an allowed ratio."""
    log_low, log_high = log(ratio[0]), log(ratio[1])
    for attempt in range(CROP_TRIES):
        u_area, u_ratio, u_top, u_left = uniforms(seed, epoch, index, view, CROP_BLOCK + attempt)
        area = image_height * image_width * (scale[0] + u_area * (scale[1] - scale[0]))
        aspect = exp(log_low + u_ratio * (log_high - log_low))
        width = int(np.rint(np.sqrt(area * aspect)))
        height = int(np.rint(np.sqrt(area / aspect)))
        if 0 < width <= image_width and 0 < height <= image_height:
            top = int(u_top * (image_height - height + 1))
            left = int(u_left * (image_width - width + 1))
            return top, left, height, width
    width, height = image_width, image_height
    if image_width / image_height < ratio[0]:
        height = min(image_height, int(np.rint(image_width / ratio[0])))
    elif image_width / image_height > ratio[1]:
        width = min(image_width, int(np.rint(image_height * ratio[1])))
    return (image_height - height) // 2, (image_width - width) // 2, height, width


@compiled()
def _fill(table, seed, epoch, indices, heights, widths, scale, ratio, probability, strength, sigma):
    for row in range(len(indices)):
        index = indices[row]
        for view in range(table.shape[1]):
            out = table[row, view]
            box = crop_box(seed, epoch, index, view, heights[row], widths[row], scale, ratio)
            out[TOP], out[LEFT], out[HEIGHT], out[WIDTH] = box
            u_flip, u_jitter, u_order, u_grey = uniforms(seed, epoch, index, view, 0)
            out[FLIP] = u_flip < probability[0]
            out[ORDER] = int(u_order * 24)
            factors = uniforms(seed, epoch, index, view, 1)
            for k in range(3):
                low, high = max(0.0, 1.0 - strength[k]), 1.0 + strength[k]
                out[BRIGHTNESS + k] = low + factors[k] * (high - low)
            out[HUE] = strength[3] * (2 * factors[3] - 1)
            if not u_jitter < probability[1]:
                out[BRIGHTNESS] = out[CONTRAST] = out[SATURATION] = 1
                out[HUE] = out[ORDER] = 0
            out[GREY] = u_grey < probability[2]
            u_blur, u_sigma, u_solarise, _ = uniforms(seed, epoch, index, view, 2)
            out[SIGMA] = sigma[0] + u_sigma * (sigma[1] - sigma[0]) if u_blur < probability[3] else 0.0
            out[SOLARISE] = u_solarise < probability[4]


def draw_parameters(
    view: ViewSettings,
    seed: int,
    epoch: int,
    indices: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    views: int = 2,
) -> np.ndarray:
    """Parameters of the views of some samples.

    Args:
        view: the ranges.
        seed: 0 <= seed < 2^64. epoch: 0 <= epoch < 2^32.
        indices: int [B], positions in the data set. heights, widths: int [B], of the images in pixels.
        views: how many of each image; fewer are the first of more.

    Returns:
        float32 [B, views, P], columns as in COLUMNS. Any row depends on (seed, epoch, index, view) and the
        image's size alone.
    """
    table = np.empty((len(indices), views, P), np.float32)
    _fill(
        table,
        np.uint64(seed),
        np.uint64(epoch),
        np.ascontiguousarray(indices, np.int64),
        np.ascontiguousarray(heights, np.int64),
        np.ascontiguousarray(widths, np.int64),
        view.scale,
        view.ratio,
        (view.flip, view.jitter, view.grey, view.blur, view.solarise),
        (view.brightness, view.contrast, view.saturation, view.hue),
        view.sigma,
    )
    return table


def crop_boxes(table: np.ndarray) -> np.ndarray:
    """Top, left, height, width of each view: int32 [B, views, 4]."""
    return table[..., TOP : WIDTH + 1].astype(np.int32)


def centre_boxes(heights: np.ndarray, widths: np.ndarray, fraction: float) -> np.ndarray:
    """The evaluation's centre square, `fraction` of the shorter side: int32 [B, 1, 4]."""
    side = np.maximum(1, np.rint(np.minimum(heights, widths) * fraction)).astype(np.int32)
    box = np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=-1)
    return box[:, None].astype(np.int32)


@compiled()
def _order_keys(seed, epoch, stream, keys):
    for index in range(len(keys)):
        w0, w1, _, _ = philox(
            uint64(index),
            uint64(index) >> uint64(32),
            uint64(epoch),
            uint64(stream) << uint64(16),
            uint64(seed),
            uint64(seed) >> uint64(32),
        )
        keys[index] = (w0 << uint64(32)) | w1


def order_keys(seed: int, epoch: int, count: int, stream: int = ORDER_STREAM) -> np.ndarray:
    """One uniform uint64 for each sample (or page); sorting by them gives the epoch's order."""
    keys = np.empty(count, np.uint64)
    _order_keys(np.uint64(seed), np.uint64(epoch), np.uint64(stream), keys)
    return keys
