"""The augmentation as a DALI graph on the same parameters, for pipelines that are DALI's already.

What deviates (measured in docs/augmentation.md):

- the order is always brightness, contrast, saturation with hue: a graph can't differ from sample to sample;
- hue and saturation are `fn.hsv`: one matrix in YIQ, hue a rotation about the grey axis by 360 degrees times
  our share of a turn, where torchvision goes through HSV's hexagon.

All else is DALI's arithmetic, flip and blur, clamped after each operation, and agrees.
"""

import numpy as np
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.types import DALIDataType

from pipelines.parameters import BRIGHTNESS, CONTRAST, FLIP, GREY, HUE, SATURATION, SIGMA, SOLARISE
from pipelines.views import ViewSettings

NO_BLUR = 0.05  # a Gaussian so narrow is the identity in float32


def augment(crops: np.ndarray, table: np.ndarray, view: ViewSettings, threads: int = 2) -> np.ndarray:
    """Augment and normalise on the CPU. Builds a pipeline: for tests and measurements.

    Args:
        crops: uint8 [N, R, R, 3]. table: float32 [N, P].

    Returns:
        float32 [N, R, R, 3].
    """
    pipeline = build(view, len(crops), threads)
    return run(pipeline, crops, table)


def build(view: ViewSettings, batch_size: int, threads: int = 2):
    """A DALI pipeline whose sources `crops` and `table` are fed by `run`."""

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None)  # type: ignore[call-overload,unused-ignore]
    def views():
        crops = fn.external_source(name="crops", layout="HWC", dtype=DALIDataType.UINT8, ndim=3)
        table = fn.external_source(name="table", dtype=DALIDataType.FLOAT, ndim=1)
        return graph(crops, table, view)

    pipeline = views()
    pipeline.build()
    return pipeline


def run(pipeline, crops: np.ndarray, table: np.ndarray) -> np.ndarray:
    """One batch through a pipeline of `build`: float32 [N, R, R, 3]."""
    pipeline.feed_input("crops", list(crops))
    pipeline.feed_input("table", list(table))
    return pipeline.run()[0].as_array()


def graph(crops, table, view: ViewSettings):
    """crops: uint8 HWC. table: float [P] of each sample. Both DALI nodes, and so is the result, float HWC."""
    x = fn.cast(crops, dtype=DALIDataType.FLOAT) * np.float32(1 / 255)
    x = fn.flip(x, horizontal=fn.cast(table[FLIP], dtype=DALIDataType.INT32))
    x = math.clamp(x * table[BRIGHTNESS], 0.0, 1.0)
    mean = fn.reductions.mean(_luma(x))
    x = math.clamp(x * table[CONTRAST] + (1.0 - table[CONTRAST]) * mean, 0.0, 1.0)
    x = fn.hsv(x, hue=table[HUE] * 360.0, saturation=table[SATURATION], dtype=DALIDataType.FLOAT)
    x = math.clamp(x, 0.0, 1.0)
    x = x + (_luma(x) - x) * table[GREY]
    if view.kernel_size > 1:
        sigma = math.max(table[SIGMA], NO_BLUR)
        x = fn.gaussian_blur(fn.reshape(x, layout="HWC"), sigma=sigma, window_size=view.kernel_size)
    bright = fn.cast(x >= np.float32(128 / 255), dtype=DALIDataType.FLOAT)
    x = x + bright * table[SOLARISE] * (1.0 - 2.0 * x)
    return (x - types.Constant(np.array(view.mean, np.float32))) / types.Constant(
        np.array(view.std, np.float32)
    )


def _luma(x):
    """[H, W, 1]."""
    weights = types.Constant(np.array([0.2989, 0.587, 0.114], np.float32))
    return fn.reductions.sum(x * weights, axes=2, keep_dims=True)
