"""Crops by nvJPEG, as torchvision has it, and a kernel of ours: where DALI can't be brought."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipelines.decode.on_device import DeviceReader


class NvjpegReader(DeviceReader):
    """Encoded images as a source of crops: decoded in full, baseline JPEGs by the hardware that an A100 and
    later ones have for it, then cropped by `gpu.crop_and_resize`.

    Of the same decoded pixels the crops are the CPU's, but for values within rounding of a half, which may be
    a level off. nvJPEG's own pixels differ from libjpeg-turbo's by more: crops of photographs by half a level
    on average, 47 at most, on an H200, where it made 0.8 of the images that twelve threads of a CPU made. On
    a CPU, where torchvision decodes by libjpeg-turbo, it runs in Triton's interpreter alone: for tests.
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
        if made.is_cuda:  # nvJPEG's stream doesn't wait for this one: `images` must not be given back before
            torch.cuda.current_stream().synchronize()
        return made
