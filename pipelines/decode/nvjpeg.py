"""Crops by torchvision's nvJPEG decoder and our own Triton kernel, for machines without DALI."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipelines.decode.on_device import DeviceReader


class NvjpegReader(DeviceReader):
    """Encoded images as a source of crops: each image is decoded in full, on the hardware decoder that GPUs
    from the A100 on have for baseline JPEGs, and then cropped by `gpu.crop_and_resize`.

    From the same decoded pixels, crops equal the CPU's, except that values within rounding of a half may
    differ by one level. nvJPEG's own pixels differ more from libjpeg-turbo's: crops of photographs by half a
    level on average and 47 at most, on an H200, where it reached 0.8 times the throughput of twelve CPU
    threads. On a CPU, torchvision decodes by libjpeg-turbo and the kernel runs in Triton's interpreter, which
    is for tests.
    """

    decoder = "nvjpeg"

    def _made(self, files: list[bytes], boxes: np.ndarray, flips: np.ndarray, side: int) -> Tensor:
        from torchvision.io import ImageReadMode, decode_jpeg

        from pipelines.decode.gpu import crop_and_resize

        encoded = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
        if self.device == "cpu":
            images = [decode_jpeg(file, ImageReadMode.RGB) for file in encoded]
        else:
            images = decode_jpeg(encoded, ImageReadMode.RGB, device=self.device)
        made = crop_and_resize(images, boxes, flips, side)
        if made.is_cuda:  # nvJPEG's stream doesn't wait for this one, so `images` must not be freed before
            torch.cuda.current_stream().synchronize()
        return made
