"""Encode embeddings that another model has made."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lvssl.codes.file import UNCERTAINTY
from lvssl.codes.quantiser import Quantiser
from lvssl.codes.writer import CodeWriter
from lvssl.evaluation.density import Density
from lvssl.runs.embeddings import Embeddings
from pipelines.errors import InputError

CHUNK = 8192  # embeddings at a time


@dataclass(frozen=True)
class EmbeddingEncoder:
    """Quantiser and density fitted on embeddings, used to encode other embeddings of the same model."""

    run: Embeddings  # those that quantiser and density are fitted on
    code: str
    quantiser: Quantiser
    density: Density

    def write(self, path: Path, asked: Embeddings) -> None:
        """Write the code file and the uncertainties, with row numbers as names. An interrupted call is
        resumed and gives the same bytes, because a chunk is always computed whole, even if some of its rows
        are already written. Raises InputError if a row's values are too large to compute its distance."""
        stat, fitted = asked.path.stat(), [self.quantiser.digest, self.density.digest]
        told = [str(asked.path.resolve()), asked.digest, stat.st_size, stat.st_mtime_ns, fitted]
        count = len(asked.features)
        with CodeWriter(
            path,
            family="embeddings",
            bits=self.quantiser.bits,
            checkpoint=self.run.digest,
            created_by="lvssl encode, embeddings",
            beside={UNCERTAINTY: 1},
            quantiser={"code": self.code, "sha256": self.quantiser.digest},
            source=hashlib.sha256(json.dumps(told).encode()).hexdigest(),
        ) as writer:
            done = writer.position
            if done:
                tqdm.write(f"resuming after {done:,} embeddings", file=sys.stderr)
            with tqdm(total=count, initial=done, desc="encode", disable=None) as bar:
                for start in range(done - done % CHUNK, count, CHUNK):
                    x = np.asarray(asked.features[start : start + CHUNK], np.float32)
                    first = max(done - start, 0)
                    names = map(str, range(start + first, start + len(x)))
                    with np.errstate(over="ignore", invalid="ignore"):
                        codes, scores = self.quantiser.encode(x), self.density(x)
                    if not (good := np.isfinite(scores)).all():
                        raise InputError(
                            f"{asked.path}: row {start + good.argmin()} is too far from the embeddings of "
                            f"{self.run.path}, which the code is fitted on"
                        )
                    writer.append(codes[first:], names, uncertainty=scores[first:])
                    bar.update(len(x) - first)
