"""How fast is search in codes? Exact and two-stage Hamming search against faiss, float and binary.

    python -m benchmarks.search --json FILE        one million codes of 2,048 bits, 1,000 queries, top 10

Peers in the same run: faiss's IndexFlatIP over the 2,048 float32 features whose signs are the codes, and its
IndexBinaryFlat over the codes. It takes 9 GB of memory, most of it for the float index; --count 100000 takes
a tenth. Times are medians over rounds in which all alternate, each with all cores. Ratios of processor time
are also given, as they hardly depend on other work on the machine. The exact search is verified against
faiss's binary index.

The codes aren't uniform noise, in which all neighbours would be equally far. Features are members of clusters
(20 rows each, as many clusters as --count needs) in a space of rank 64 with a spectrum of i^-1/2, mixed into
2,048 dimensions, plus noise of half their scale; queries are further members of the clusters. Bits are
therefore correlated, distances vary several times as much as those of independent bits, and each query has
near neighbours; the distances are printed. Recall of the two-stage search is the share of its rows that are
no farther than the exact k-th.

Why ours is faster than faiss's binary index: it keeps tiles of the codes in the cache for all queries, and
carry-save adders halve the counting. Why codes beat floats: 256 bytes per row instead of 8,192.
"""

import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from benchmarks.script import in_turn, new_file, parser_of, save
from lvssl.codes.search import hamming_distances, hamming_search, staged_search
from lvssl.commands.main import guarded
from lvssl.runs.run import versions
from pipelines.cores import cores
from pipelines.errors import InputError
from pipelines.kernels.pack import pack_bits

RANK, CLUSTER, WITHIN, NOISE = 64, 20, 0.6, 0.5
CHUNK = 10_000

Found = tuple[np.ndarray, np.ndarray]
Form = Callable[[int], Found]  # searches with so many of the queries


def main(arguments: list[str]) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help="codes in the database")
    parser.add_argument("--bits", type=int, default=2048)
    parser.add_argument("--queries", type=int, default=1000, help="of the batch")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--coarse-bits", type=int, default=512)
    parser.add_argument("--candidates", type=int, default=0, help="of the two-stage search; 0: its default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=new_file, help="where the figures go")
    options = parser.parse_args(arguments)
    if min(options.count, options.bits, options.queries, options.k, options.rounds) < 1:
        raise InputError("--count, --bits, --queries, --k and --rounds must be at least 1")
    if options.k > options.count:
        raise InputError("--k must not be above --count")
    try:
        import faiss
    except ImportError:
        raise InputError("this benchmark needs faiss: pip install 'lvssl[faiss]'") from None
    faiss.omp_set_num_threads(cores())

    features, index = float_index(faiss, options.count, options.bits)
    fill(features, 0)
    database = pack(features)
    query_features = np.empty((options.queries, options.bits), np.float32)
    fill(query_features, 1, clusters=options.count // CLUSTER)
    queries = pack(query_features)
    binary = faiss.IndexBinaryFlat(8 * database.shape[1])
    binary.add(database)

    k = options.k
    forms: dict[str, Form] = {
        "exact": lambda n: hamming_search(queries[:n], database, k),
        "staged": lambda n: staged_search(
            queries[:n], database, k, coarse_bits=options.coarse_bits, candidates=options.candidates
        ),
        "faiss_binary": lambda n: binary.search(queries[:n], k)[::-1],
        "faiss_float": lambda n: index.search(query_features[:n], k)[::-1],
    }
    for form in forms.values():
        form(1)  # compiles, starts threads, and touches the pages
    whole = {name: partial(form, options.queries) for name, form in forms.items()}
    times, found = in_turn(whole, options.rounds)
    if not np.array_equal(found["exact"][1], found["faiss_binary"][1]):
        raise AssertionError("the exact search and faiss's binary index found other distances")
    result: dict[str, Any] = {
        "versions": versions() | {"faiss": faiss.__version__},
        "cores": cores(),
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "rows": rows(times, options.queries, memory(database, features)),
        "distances": distances(queries, database, found["exact"]),
        "ratios": ratios(times, found, database, features),
    }
    for name, value in (result["distances"] | result["ratios"]).items():
        print(f"{name:40}{value:10.4g}")
    save(options.json, "search", arguments, result)


def float_index(faiss: Any, count: int, dim: int) -> tuple[np.ndarray, Any]:
    """(features float32 [count, dim], the index that owns their memory): the 8 GB exist only once.

    The zeros that are added first are untouched pages, which take no memory.
    """
    index = faiss.IndexFlatIP(dim)
    index.add(np.zeros((count, dim), np.float32))
    return faiss.rev_swig_ptr(index.get_xb(), count * dim).reshape(count, dim), index


def fill(features: np.ndarray, stream: int, clusters: int = 0) -> None:
    """Fill in features of the model above, drawn from (stream, chunk), of unit length."""
    count, dim = features.shape
    model = np.random.default_rng(7)
    mixing = model.standard_normal((RANK, dim), np.float32)
    mixing *= np.arange(1, RANK + 1, dtype=np.float32)[:, None] ** -0.5
    centres = model.standard_normal((max(clusters or count // CLUSTER, 1), RANK), np.float32)
    spread = float(np.sqrt((1 + WITHIN**2) * (np.arange(1, RANK + 1) ** -1.0).sum()))

    def chunk(start: int) -> None:
        part = features[start : start + CHUNK]
        generator = np.random.default_rng((stream, start))
        latent = centres[generator.integers(0, len(centres), len(part))]
        latent += WITHIN * generator.standard_normal(latent.shape, np.float32)
        generator.standard_normal(out=part, dtype=np.float32)
        part *= NOISE * spread
        part += latent @ mixing
        part /= np.linalg.norm(part, axis=1, keepdims=True)

    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(chunk, range(0, count, CHUNK)))


def pack(features: np.ndarray) -> np.ndarray:
    return np.concatenate([pack_bits(features[i : i + CHUNK] > 0) for i in range(0, len(features), CHUNK)])


def memory(database: np.ndarray, features: np.ndarray) -> dict[str, int]:
    """Bytes that each must hold; the two-stage search reads the codes themselves and has no index."""
    codes, floats = database.nbytes, features.nbytes
    return {"exact": codes, "staged": codes, "faiss_binary": codes, "faiss_float": floats}


def rows(
    times: dict[str, list[tuple[float, float]]], queries: int, held: dict[str, int]
) -> list[dict[str, Any]]:
    made = []
    for name, taken in times.items():
        wall = [seconds for seconds, _ in taken]
        made.append(
            {
                "form": name,
                "queries_per_second": queries / statistics.median(wall),
                "lowest": queries / max(wall),
                "highest": queries / min(wall),
                "processor_seconds": statistics.median(seconds for _, seconds in taken),
                "bytes": held[name],
            }
        )
        row = made[-1]
        print(f"{name:16}{row['queries_per_second']:10.1f} queries/s{held[name] / 2**20:10,.0f} MiB")
    return made


def distances(queries: np.ndarray, database: np.ndarray, found: Found) -> dict[str, float]:
    """Distances of the neighbours and of all other rows, which show whether the codes are realistic."""
    everything = hamming_distances(queries[:100], database[:100_000])
    return {
        "mean distance": float(everything.mean()),
        "deviation of distances": float(everything.std()),
        "nearest, median": float(np.median(found[1][:, 0])),
        "k-th, median": float(np.median(found[1][:, -1])),
    }


def ratios(
    times: dict[str, list[tuple[float, float]]],
    found: dict[str, Found],
    database: np.ndarray,
    features: np.ndarray,
) -> dict[str, float]:
    kth, k = found["exact"][1][:, -1:], found["exact"][1].shape[1]
    same = [len(np.intersect1d(*pair)) for pair in zip(found["exact"][0], found["faiss_float"][0])]

    def over(theirs: str, ours: str, clock: int = 0) -> float:
        median = [statistics.median(taken[clock] for taken in times[name]) for name in (theirs, ours)]
        return median[0] / median[1]

    return {
        "exact_over_faiss_float": over("faiss_float", "exact"),
        "staged_over_faiss_float": over("faiss_float", "staged"),
        "exact_over_faiss_binary": over("faiss_binary", "exact"),
        "exact_over_faiss_float_processor": over("faiss_float", "exact", 1),
        "staged_over_faiss_float_processor": over("faiss_float", "staged", 1),
        "staged_recall": float((found["staged"][1] <= kth).mean()),
        "float_memory_over_code_memory": features.nbytes / database.nbytes,
        "neighbours_shared_with_float": float(np.mean(same) / k),
    }


if __name__ == "__main__":
    import sys

    sys.exit(guarded(main, sys.argv[1:]))
