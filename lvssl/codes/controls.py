"""Equal-bit controls: codes made from a deterministic model's features, which a learned code has to beat."""

from __future__ import annotations

from typing import Any

import numpy as np

from lvssl.codes.pack import as_array


def sign_bits(features: Any, mean: Any) -> np.ndarray:
    """1[h_d > mean_d]: one bit a feature, bool [N, D].

    `features` [N, D] of any split; `mean` [D] of the *training* features, so that a test image's code does
    not depend on the other test images. Arrays or torch tensors. Raises ValueError where widths differ.
    """
    h_ND, mean_D = as_array(features), as_array(mean)
    if h_ND.ndim != 2 or mean_D.shape != h_ND.shape[1:]:
        raise ValueError(
            f"features [N, D] and a mean [D] are needed, not {list(h_ND.shape)} and {list(mean_D.shape)}"
        )
    return h_ND > mean_D
