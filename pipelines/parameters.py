"""(seed, epoch, sample index, view) -> the parameters of that view.

All randomness of the augmentation is drawn here, from Philox4x32-10 (Salmon et al. 2011), a counter-based
generator. A sample's views therefore don't depend on workers, ranks, batch size or backend, and one number
suffices to resume in mid-epoch.
"""

import numpy as np
from numba import int64

from pipelines.kernels.compiled import compiled
from pipelines.kernels.elementary import exp, log
from pipelines.kernels.philox import LOW, philox
from pipelines.views import ViewSettings

COLUMNS = (
    "top",  # crop box, in pixels of the image ...
    "left",
    "height",
    "width",
    "flip",  # 1: mirrored
    "order",  # 0..23: permutation of brightness, contrast, saturation, hue
    "brightness",  # factors; 1: unchanged
    "contrast",
    "saturation",
    "hue",  # fraction of a turn; 0: unchanged
    "grey",  # 1: converted to grey
    "sigma",  # of the blur, in pixels; 0: no blur
    "solarise",  # 1: values >= 128 / 255 inverted
)
TOP, LEFT, HEIGHT, WIDTH, FLIP, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, SIGMA, SOLARISE = range(
    13
)
P = len(COLUMNS)

CROP_TRIES = 10  # as in torchvision's RandomResizedCrop
CROP_BLOCK = 16  # first Philox block of the tries; lower blocks are for the other parameters


philox_compiled = compiled(inline="always")(philox)


@compiled(inline="always")
def uniforms(seed, epoch, index, view, block):
    """Four uniform numbers in [0, 1), multiples of 2^-24 (also exact in fp32)."""
    seed, index = int64(seed), int64(index)
    words = philox_compiled(
        index & LOW,
        (index >> 32) & LOW,
        int64(epoch),
        int64(view) << 16 | int64(block),
        seed & LOW,
        (seed >> 32) & LOW,
    )
    unit = 1.0 / 16777216.0
    return (words[0] >> 8) * unit, (words[1] >> 8) * unit, (words[2] >> 8) * unit, (words[3] >> 8) * unit


@compiled()
def crop_box(seed, epoch, index, view, image_height, image_width, scale, ratio):
    """torchvision's RandomResizedCrop.get_params: ten tries, then a central crop of an allowed ratio."""
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
    """Draw the parameters of the views of some samples.

    Args:
        view: the ranges of the parameters.
        seed: 0 <= seed < 2^64. epoch: 0 <= epoch < 2^32.
        indices: int [B], positions in the data set. heights, widths: int [B], of the images in pixels.
        views: number of views per image; the first views are the same for any number.

    Returns:
        float32 [B, views, P], columns as in COLUMNS. Each row depends only on (seed, epoch, index, view) and
        on the image's size.
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
    """Top, left, height and width of each view: int32 [B, views, 4]."""
    return table[..., TOP : WIDTH + 1].astype(np.int32)


def centre_boxes(heights: np.ndarray, widths: np.ndarray, fraction: float) -> np.ndarray:
    """The central square used for evaluation, `fraction` of the shorter side: int32 [B, 1, 4]."""
    side = np.maximum(1, np.rint(np.minimum(heights, widths) * fraction)).astype(np.int32)
    box = np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=-1)
    return box[:, None].astype(np.int32)
