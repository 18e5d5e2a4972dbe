"""Weighted nearest-neighbour classification (Wu et al. 2018) on features and on packed codes.

Each of the k nearest training images votes for its class with weight exp(similarity / temperature), relative
to that of the nearest: the ranking is the same, and no temperature is so low that all weights underflow.
Training images are processed in tiles, so memory doesn't grow with their number, and features may be a larger
memmap.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvssl.codes import hamming
from lvssl.codes.search import chunks, in_threads, nearest_keys, slices, split, thread_count, words
from lvssl.evaluation.embedding import LARGE_SET
from lvssl.runs.progress import with_progress
from pipelines.kernels.compiled import compiled
from pipelines.kernels.pack import as_array

QUERIES = 8192  # test images per pass over the training images
BLOCK = 512  # test images at a time; with TILE: 8 MB of cosines
TILE, DEVICE_TILE = 4096, 65_536  # training images at a time, on a CPU and elsewhere
GLANCE = 128  # cosines that are compared with the limit together before any is looked at alone
SPARE = 64  # places in a buffer beyond 2 k, so that a small k doesn't cause constant sorting
HAMMING_QUERIES = 1024  # test images at a time; their sums of tied votes [.., C] are held in fp64
WHY_NOT_FINITE = "the training diverged (lower --lr), or embeddings are too large for fp32 (scale them down)"


def customary(images: int) -> tuple[int, float]:
    """Return the usual k and temperature for this number of training images."""
    return (200, 0.1) if images >= LARGE_SET else (20, 0.07)


def weighted_knn(
    train_x: Any,
    train_y: Any,
    test_x: Any,
    test_y: Any,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | None = None,
) -> float:
    """Return the accuracy in percent of cosine kNN on features [N, D], labels [N] in 0..C-1; k is cut to N.

    Equal sums of votes go to the lower class. Computed on `device`, by default that of train_x. Raises
    ValueError for shapes that don't match.
    """
    train_y, test_y = (torch.as_tensor(as_array(y)).long() for y in (train_y, test_y))
    check(train_x.shape, train_y, test_x.shape, test_y, k)
    votes = weighted_votes(train_x, train_y, test_x, k, temperature, device)
    return accuracy(votes, test_y)


def accuracy(votes: Tensor, labels: Tensor) -> float:
    return round(100 * float((votes.argmax(dim=1) == labels).float().mean()), 4)


def weighted_votes(
    train_x: Any,
    answers: Tensor,
    test_x: Any,
    k: int,
    temperature: float,
    device: torch.device | None = None,
    title: str = "",
) -> Tensor:
    """Return the sums of weights exp((cosine - highest cosine) / T) over the k nearest training images, on
    the CPU. Arguments as in `nearest_by_cosine`; sums as in `sums_of_votes`."""
    cosines, rows = nearest_by_cosine(train_x, test_x, min(k, len(train_x)), device, title)
    return sums_of_votes(rows, cosine_weights(cosines, temperature), answers)


def cosine_weights(cosines: Tensor, temperature: float) -> Tensor:
    """Return weights for cosines [M, k], most similar first."""
    return torch.exp((cosines - cosines[:, :1]) / temperature)


def sums_of_votes(rows: Tensor, weights: Tensor, answers: Tensor) -> Tensor:
    """Sum the votes of neighbours int64 [M, k] with weights [M, k]. For `answers` int64 [N] (classes) these
    are sums of weights by class, [M, C]; for float [N, T] (targets) weighted sums of the targets, [M, T]."""
    if answers.is_floating_point():
        parts = zip(rows.split(BLOCK), weights.split(BLOCK))
        return torch.cat([(part[:, :, None] * answers[near]).sum(dim=1) for near, part in parts])
    sums = torch.zeros(len(rows), int(answers.max()) + 1, dtype=weights.dtype)
    return sums.scatter_add_(1, answers[rows], weights)


def nearest_by_cosine(
    train_x: Any, test_x: Any, k: int, device: torch.device | None = None, title: str = ""
) -> tuple[Tensor, Tensor]:
    """Return the k rows of train_x [N, D] most similar to each row of test_x [M, D], most similar first:
    (cosines float32 [M, k], rows int64 [M, k]), on the CPU. Ties go to the lower row (on a GPU, to any).

    Inputs are tensors, or arrays and memmaps of any float type, on the CPU. `device` is where to compute, by
    default that of train_x. `title` is that of the progress bar; there is none if it is empty. Raises
    FloatingPointError for features that are not finite.
    """
    if device is None:
        device = train_x.device if isinstance(train_x, Tensor) else torch.device("cpu")
    starts = range(0, len(test_x), QUERIES)
    found = []
    for start in with_progress(starts, title, len(test_x), lambda start: min(QUERIES, len(test_x) - start)):
        queries = unit_on(device, test_x[start : start + QUERIES])
        near = nearest_on_cpu if device.type == "cpu" else nearest_on_device
        found.append(near(train_x, queries, k))
    return torch.cat([c for c, _ in found]), torch.cat([rows for _, rows in found])


def unit(x: Any, out: Tensor) -> Tensor:
    """Normalise features [n, D] to length 1 into the first rows of `out`, float32. Raises FloatingPointError
    if any is not finite."""
    made = out[: len(x)]
    made.copy_(x) if isinstance(x, Tensor) else np.copyto(made.numpy(), x, casting="unsafe")
    lengths = torch.linalg.vector_norm(made, dim=1, keepdim=True)
    if not bool(lengths.isfinite().all()):
        raise FloatingPointError(f"features, or their lengths in fp32, are not finite: {WHY_NOT_FINITE}")
    return made.div_(lengths.clamp_min_(1e-12))


def unit_on(device: torch.device, x: Any) -> Tensor:
    """Normalise as `unit` does, into new memory on the device."""
    there = x if isinstance(x, Tensor) else torch.from_numpy(np.array(x))
    there = there.to(device)
    return unit(there, torch.empty(there.shape, device=device))


def nearest_on_device(train_x: Any, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    cosines = torch.empty(len(queries), 0, device=queries.device)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first in range(0, len(train_x), DEVICE_TILE):
        tile = unit_on(queries.device, train_x[first : first + DEVICE_TILE])
        parts = []
        for block, had, at in zip(queries.split(BLOCK), cosines.split(BLOCK), rows.split(BLOCK)):
            near, column = (block @ tile.T).topk(min(k, len(tile)), dim=1)
            best, place = torch.cat([had, near], 1).topk(min(k, first + len(tile)), dim=1)
            parts.append((best, torch.cat([at, column + first], 1).gather(1, place)))
        cosines, rows = (torch.cat(each) for each in zip(*parts))
    return cosines.cpu(), rows.cpu()


def nearest_on_cpu(train_x: Any, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    keys = np.full((len(queries), 2 * k + SPARE), np.iinfo(np.int64).max)
    held, limits = np.zeros(len(queries), np.int64), np.full(len(queries), -np.inf, np.float32)
    out, tiles = torch.empty(min(BLOCK, len(queries)), TILE), torch.empty(TILE, queries.shape[1])
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for first in range(0, len(train_x), TILE):
            tile = unit(train_x[first : first + TILE], tiles)
            for start in range(0, len(queries), BLOCK):
                block = queries[start : start + BLOCK]
                cosines = out.flatten()[: len(block) * len(tile)].view(len(block), len(tile))
                torch.mm(block, tile.T, out=cosines)
                buffers = [of[start : start + BLOCK] for of in (keys, held, limits)]
                tasks = [
                    pool.submit(take_nearest, cosines.numpy()[part], first, *(of[part] for of in buffers), k)
                    for part in slices(len(block), torch.get_num_threads())
                ]
                for task in tasks:
                    task.result()
    keys[np.arange(keys.shape[1]) >= held[:, None]] = np.iinfo(np.int64).max
    keys = np.sort(keys, axis=1)[:, :k]
    ordered = -(keys >> 32).astype(np.int32)
    bits = np.where(ordered < 0, ordered ^ np.int32(0x7FFFFFFF), ordered)
    return torch.from_numpy(bits.view(np.float32).copy()), torch.from_numpy(keys & 0xFFFFFFFF)


@compiled()
def take_nearest(cosines, first, keys, held, limits, k):
    """Merge the training images of a tile into the k most similar of each query.

    cosines float32 [Q, n] are those to the images from number `first` on, keys int64 [Q, > k] the buffers,
    held int64 [Q] how much of each is in use, limits float32 [Q] the cosine that an image must exceed. A key
    sorts by "more similar first, then the lower row": the negated bits of the cosine, as an integer in the
    same order, above 32 bits of the row.
    """
    bits = cosines.view(np.int32)
    for q in range(cosines.shape[0]):
        limit, used = limits[q], held[q]
        for begin in range(0, cosines.shape[1], GLANCE):
            near = cosines[q, begin : begin + GLANCE]
            nearer = False
            for n in range(near.shape[0]):
                nearer |= near[n] > limit  # no branch, so this is vectorised; it is rarely true
            if not nearer:
                continue
            for n in range(near.shape[0]):
                if near[n] > limit:
                    order = np.int64(bits[q, begin + n])
                    if order < 0:
                        order ^= 0x7FFFFFFF
                    keys[q, used] = (-order << 32) | (first + begin + n)
                    used += 1
                    if used == keys.shape[1]:
                        keys[q].sort()
                        used = k
                        order = -(keys[q, k - 1] >> 32)
                        if order < 0:
                            order ^= 0x7FFFFFFF
                        limit = np.int32(order).view(np.float32)
        limits[q], held[q] = limit, used


def hamming_knn(
    train_codes: np.ndarray,
    train_y: Any,
    test_codes: np.ndarray,
    test_y: Any,
    bits: int,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Return the accuracy in percent of kNN on packed codes uint8 [N, ceil(bits / 8)]. The similarity is
    1 - 2 * distance / bits, the cosine of the +-1 codes, so the accuracy is comparable with `weighted_knn`'s.

    Distances are small integers, and many training images tie at the k-th place. Taking the first of these
    would favour the classes that come first in the data set (on data sorted by class, always the low ones),
    so they share the remaining places: each tied image votes with (places left) / (images tied) of its
    weight, the expectation over a random order. The result doesn't depend on the order of the training set.
    """
    train_y, test_y = (torch.as_tensor(as_array(y)).long() for y in (train_y, test_y))
    check(train_codes.shape, train_y, test_codes.shape, test_y, k)
    return accuracy(hamming_votes(train_codes, train_y, test_codes, bits, k, temperature), test_y)


def hamming_votes(
    train_codes: np.ndarray,
    answers: Tensor,
    test_codes: np.ndarray,
    bits: int,
    k: int,
    temperature: float,
    title: str = "",
) -> Tensor:
    """Return the votes as `weighted_votes` does, for packed codes: [M, C] for classes, [M, T] for targets.

    Images nearer than the k-th neighbour have a whole vote. If the (k + 1)-th is as far as the k-th, the
    database is read again for that query, and all images at this distance share the remaining places.
    """
    k = min(k, len(answers))
    weights = torch.exp(-2 * torch.arange(bits + 1) / bits / temperature)
    starts = range(0, len(test_codes), HAMMING_QUERIES)
    parts, votes = [test_codes[start : start + HAMMING_QUERIES] for start in starts], []
    for queries in with_progress(parts, title, len(test_codes), len):
        keys = nearest_keys(queries, train_codes, min(k + 1, len(train_codes)), queries.shape[1], 0)
        rows, distances = split(keys)
        last, first = distances[:, k - 1], distances[:, :1]
        tied = np.flatnonzero(distances[:, -1] == last) if keys.shape[1] > k else np.zeros(0, np.int64)
        whole = weights[torch.from_numpy(distances[:, :k] - first).long()].double()
        nearer = torch.from_numpy(distances[:, :k] < last[:, None])
        untied = torch.ones(len(queries), 1, dtype=torch.bool)
        untied[torch.from_numpy(tied)] = False
        sums = sums_of_votes(torch.from_numpy(rows[:, :k]), whole * (nearer | untied), answers)
        if len(tied):
            found = torch.from_numpy(shares_of_tied(queries[tied], last[tied], train_codes, answers))
            left = (k - nearer.sum(dim=1)[torch.from_numpy(tied)]) * weights[
                torch.from_numpy(last[tied] - first[tied, 0]).long()
            ]
            sums[torch.from_numpy(tied)] += left.double()[:, None] * found
        votes.append(sums.float())
    return torch.cat(votes)


def shares_of_tied(
    queries: np.ndarray, distance: np.ndarray, train_codes: np.ndarray, answers: Tensor
) -> np.ndarray:
    """Average the answers of the training images at distance [Q] from each query: the share of each class,
    float64 [Q, C], or the mean targets, [Q, T]."""
    labels: np.ndarray = answers.numpy()
    table: np.ndarray = np.zeros((0, int(answers.max()) + 1), np.float32)
    if answers.is_floating_point():
        labels, table = np.zeros(0, np.int64), labels
    sums, counts = np.zeros((len(queries), table.shape[1])), np.zeros(len(queries), np.int64)
    query_words, limits = words(queries), distance.astype(np.uint64)
    for first, chunk in chunks(train_codes):
        last = first + len(chunk)

        def add(part: slice, chunk: np.ndarray = chunk, first: int = first, last: int = last) -> None:
            given = query_words[part], limits[part], chunk, labels[first:last], table[first:last]
            add_tied(*given, sums[part], counts[part])

        in_threads(add, slices(len(queries), thread_count(0)))
    return sums / counts[:, None]


@compiled()
def add_tied(queries, distance, database, labels, table, sums, counts):
    """Add to sums float64 [Q, T] the answers of those rows of database uint64 [N, W] that lie at `distance`
    uint64 [Q] from queries uint64 [Q, W], and to counts int64 [Q] their number. An answer is 1 for the class
    in labels int64 [N] or, if table float32 [N, T] isn't empty, a row of it."""
    tile = np.empty((queries.shape[1], hamming.TILE), np.uint64)
    distances = np.empty(hamming.TILE, np.uint64)
    for start in range(0, database.shape[0], hamming.TILE):
        rows = database[start : start + hamming.TILE]
        hamming.transpose(rows, tile)
        for q in range(queries.shape[0]):
            hamming.tile_distances(queries[q], tile, distances)
            for r in range(rows.shape[0]):
                if distances[r] == distance[q]:
                    counts[q] += 1
                    if table.shape[0]:
                        for t in range(table.shape[1]):
                            sums[q, t] += table[start + r, t]
                    else:
                        sums[q, labels[start + r]] += 1.0


def check(train_shape: Any, train_y: Any, test_shape: Any, test_y: Any, k: int) -> None:
    if len(train_shape) != 2 or len(test_shape) != 2 or train_shape[1] != test_shape[1]:
        raise ValueError(
            f"train and test need one width: [N, D] and [M, D], not {list(train_shape)}, {list(test_shape)}"
        )
    if len(train_y) != train_shape[0] or len(test_y) != test_shape[0] or not len(train_y) or not len(test_y):
        raise ValueError("one label is needed for each row, and at least one row in train and in test")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
