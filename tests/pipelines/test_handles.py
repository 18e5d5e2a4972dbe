"""libjpeg-turbo's handles live no longer than the thread, or the call, that has made them."""

import gc
import resource
import threading
from collections import Counter

import numpy as np
import pytest

from pipelines.decode import turbo
from pipelines.formats import jpeg

needs_turbo = pytest.mark.skipif(jpeg._turbo is None, reason="no libjpeg-turbo on this machine")


class Counted:
    """libjpeg-turbo, which counts the handles that are open."""

    def __init__(self, library):
        self.library, self.calls = library, Counter()

    def __getattr__(self, name):
        def call(*arguments):
            self.calls[name] += 1
            return getattr(self.library, name)(*arguments)

        return call

    @property
    def open(self) -> int:
        return self.calls["tjInitDecompress"] + self.calls["tjInitCompress"] - self.calls["tjDestroy"]


@needs_turbo
def test_a_thread_that_ends_takes_its_handles_along(monkeypatch):
    counted = Counted(jpeg._turbo)
    monkeypatch.setattr(jpeg, "_turbo", counted)
    pixels = np.zeros((8, 8, 3), np.uint8)

    def work():
        data = jpeg.encode(pixels, 90)
        jpeg.decode(data, jpeg.read_header(data))
        with pytest.raises(jpeg.DamagedImage):
            jpeg.decode(data[: len(data) // 2], jpeg.read_header(data))

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    gc.collect()
    assert counted.calls["tjInitCompress"] == 3 and counted.calls["tjInitDecompress"] >= 3
    assert counted.open == 0


@needs_turbo
def test_a_call_that_raises_destroys_its_handle():
    """Raw pixels that are fewer than their entry says: numba raises within the call."""
    data, box = np.zeros(10, np.uint8), np.array([[[0, 0, 4, 4]]], np.int32)
    out, flips = np.zeros((1, 1, 2, 2, 3), np.uint8), np.zeros((1, 1), bool)
    numbers = [np.array([n], np.int64) for n in (0, 10)]
    sides = [np.array([n], np.int64) for n in (4, 4)]
    samples = turbo.Samples(*numbers, np.array([1], np.uint8), *sides)

    def fail(times: int) -> int:
        for _ in range(times):
            with pytest.raises(ValueError):
                turbo.crop_stored(data, samples, box, flips, out)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = fail(200)
    assert fail(3000) - before < 8 * 1024  # KiB; a handle has some 20
