"""Nearest neighbours by cosine among more features than can be compared pair by pair.

    N  features   F  dimensions of a feature   C  cells

The database is divided into cells, one for each of C centroids (Jegou et al. 2011, "inverted lists"), and a
query is compared with the features in the PROBED cells whose centroids are nearest to it. Up to EXACT
features there is a single cell, and all pairs are compared.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipelines.datasets.dataset import evenly_spaced

EXACT = 20_000  # up to this many features there is one cell
IN_A_CELL = 1000  # approximate number of features per cell if there are more
PROBED = 8
FITTED_ON = 50  # features per cell from which the centroids are computed
CHUNK = 1 << 15  # features at a time
TILE = 1 << 24  # cosines at a time


def nearest_in_cells(
    queries: np.ndarray, database: np.ndarray, z: tuple[np.ndarray, np.ndarray], k: int, same: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows int64 [Q, k'], cosines float32 [Q, k']) of the nearest of each query, nearest first; k' <=
    k is limited by their number. If the probed cells contain fewer, the cosine is -inf.

    Features are floats [Q, F] and [N, F], which may be mapped; `z` is the mean and deviation [F] that
    standardises them. With `same`, both are one set, and a feature isn't its own neighbour.
    """
    k = min(k, len(database) - same)
    centroids = fit_cells(database, z)
    home = nearest_cells(database, z, centroids, 1)[:, 0]
    asked = nearest_cells(queries, z, centroids, min(PROBED, len(centroids)))
    rows = torch.zeros((len(queries), k), dtype=torch.int64)
    cosines = torch.full((len(queries), k), -torch.inf)
    members, askers = by_cell(home[:, None], len(centroids)), by_cell(asked, len(centroids))
    cells = tqdm(
        zip(members, askers), "neighbours", len(centroids), unit="cell", disable=None, file=sys.stderr
    )
    for inside, asking in cells:
        if not len(inside):
            continue
        known, step = unit(database, inside, z), max(1, TILE // len(inside))
        for some in np.split(asking, range(step, len(asking), step)):
            tile = unit(queries, some, z) @ known.T
            if same:
                tile[torch.from_numpy(some[:, None] == inside)] = -torch.inf
            best, place = tile.topk(min(k, len(inside)), dim=1)
            at = torch.from_numpy(some)
            values = torch.cat([cosines[at], best], dim=1)
            ids = torch.cat([rows[at], torch.from_numpy(inside)[place]], dim=1)
            cosines[at], place = values.topk(k, dim=1)
            rows[at] = ids.gather(1, place)
    return rows.numpy(), cosines.numpy()


def unit(features: np.ndarray, rows: np.ndarray | slice, z: tuple[np.ndarray, np.ndarray]) -> Tensor:
    """Standardise rows and normalise them to length 1: float32 [n, F]. Rows equal to the mean become the
    first unit vector, so that two of them have a cosine of 1."""
    x = torch.from_numpy((features[rows].astype(np.float32) - z[0]) / z[1])
    x[:, 0] += (x.norm(dim=1) < 1e-6).float()
    return torch.nn.functional.normalize(x, dim=1)


def fit_cells(database: np.ndarray, z: tuple[np.ndarray, np.ndarray]) -> Tensor:
    """Return centroids float32 [C, F] by k-means on a sample."""
    if len(database) <= EXACT:
        return torch.zeros((1, database.shape[1]))
    from sklearn.cluster import KMeans

    count = len(database) // IN_A_CELL
    sample = unit(database, evenly_spaced(len(database), FITTED_ON * count), z).numpy()
    found = KMeans(count, init="random", n_init=1, max_iter=10, random_state=0).fit(sample)
    return torch.from_numpy(found.cluster_centers_.astype(np.float32))


def nearest_cells(
    features: np.ndarray, z: tuple[np.ndarray, np.ndarray], centroids: Tensor, count: int
) -> np.ndarray:
    """Return the nearest cells by Euclidean distance, int64 [N, count]."""
    half = centroids.square().sum(dim=1) / 2
    found = np.empty((len(features), count), np.int64)
    for start in range(0, len(features), CHUNK):
        part = slice(start, start + CHUNK)
        found[part] = (unit(features, part, z) @ centroids.T - half).topk(count, dim=1).indices.numpy()
    return found


def by_cell(cells: np.ndarray, count: int) -> list[np.ndarray]:
    """Return for each of `count` cells the rows of int64 [N, n] in which it occurs, in ascending order."""
    order = np.argsort(cells, axis=None, kind="stable")
    ends = np.cumsum(np.bincount(cells.ravel(), minlength=count))[:-1]
    return np.split(order // cells.shape[1], ends)
