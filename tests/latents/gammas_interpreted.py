"""Compare the kernel of gamma variates, in Triton's interpreter, with plain torch. Run by test_noise.py.

TRITON_INTERPRET=1 python tests/latents/gammas_interpreted.py
"""

import json
import sys

import torch
from triton.runtime.interpreter import InterpretedFunction

from lvssl.latents import noise_triton
from lvssl.latents.noise import GAMMA_PROPOSALS, Noise, plain_log_gammas

SHAPES = torch.tensor([0.01, 0.3, 0.999, 1.0, 1.5, 30.0, 2e4, 1e8])
ROWS = torch.tensor([0, 1, 77, 2**31 + 5, 2**32 - 1])
SIZES = ((5, 8, 3, 0), (5, 61, 2, 200), (1, 1, 1, 1), (0, 8, 2, 0), (5, 0, 2, 0))


def main() -> None:
    assert isinstance(noise_triton.log_gammas_kernel, InterpretedFunction)
    checked = 0
    for key in (0, 2**62 + 12345, -1):
        for rows, dim, count, stream in SIZES:
            noise = Noise(torch.tensor([key]), ROWS[:rows], stream)
            shapes = SHAPES.repeat(8)[:dim].repeat(rows, 1)
            given = noise.key, noise.rows, stream, GAMMA_PROPOSALS
            for dtype in (torch.float32, torch.float64):
                found = noise_triton.log_gammas(shapes.to(dtype), count, *given)
                expected = plain_log_gammas(shapes.to(dtype), count, noise)
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
                checked += 1
    print(json.dumps({"compared": checked}))


if __name__ == "__main__":
    sys.exit(main())
