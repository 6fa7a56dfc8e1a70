"""What FAISS's cells find and cost against the product with all vectors, above a million rows.

    python benchmarks/search.py
    python benchmarks/search.py --rows 1000000 4000000 --width 512

Nobody has a million embeddings in a package, so they are drawn: groups of very different sizes
around centres, as pictures of the same things are, and queries that lie further from a group than
its members, as texts do from images. `--spread` tells by how much of a vector's length members
differ from their centre; the larger, the harder for cells. What is found is compared with the
exact search's first ten, and both are timed one query at a time, in turn.
"""

import argparse
import statistics
import time

import numpy as np
from _common import header, machine, row

from serve.config import FaissConfig, SearchConfig
from serve.index import Cells, Exact, Matrix, method_of

RESULTS = 10


def unit(vectors: Matrix) -> Matrix:
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def drawn(rows: int, width: int, spread: float, queries: int) -> tuple[Matrix, Matrix]:
    """Vectors [rows, width] and queries [queries, width]."""
    generator = np.random.default_rng(0)
    groups = rows // 100
    centres = unit(generator.standard_normal((groups, width), dtype=np.float32))
    weights = 1 / np.arange(1, groups + 1) ** 0.7
    weights /= weights.sum()

    def around(count: int, distance: float) -> Matrix:
        noise = generator.standard_normal((count, width), dtype=np.float32)
        noise *= distance / np.sqrt(width)
        noise += centres[generator.choice(groups, count, p=weights)]
        return unit(noise)

    return around(rows, spread), around(queries, 1.5 * spread)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 2_000_000])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--spread", type=float, nargs="+", default=[0.7, 1.0])
    parser.add_argument("--probes", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--codes", nargs="+", default=["float16"])
    parser.add_argument("--queries", type=int, default=50)
    options = parser.parse_args()
    print(machine())
    print(f"\nvectors of {options.width} numbers; the first {RESULTS} of one query at a time\n")
    header("rows", "spread", "codes", "made in", "probes", "found", "ms", "exact ms")
    for rows in options.rows:
        for spread in options.spread:
            vectors, queries = drawn(rows, options.width, spread, options.queries)
            for codes in options.codes:
                compare(vectors, queries, spread, codes, options.probes)


def compare(vectors: Matrix, queries: Matrix, spread: float, codes: str, probes: list[int]) -> None:
    """One line for each number of cells that are looked into."""
    exact = Exact(vectors)
    began = time.perf_counter()
    config = SearchConfig(method="faiss", faiss=FaissConfig.model_validate({"codes": codes}))
    cells = method_of(vectors, config)
    made = time.perf_counter() - began
    assert isinstance(cells, Cells)
    for probe in probes:
        cells.look_into(probe)
        cells.nearest(queries[0], RESULTS)
        found = 0
        times: dict[str, list[float]] = {"exact": [], "cells": []}
        for query in queries:
            began = time.perf_counter()
            expected, _ = exact.nearest(query, RESULTS)
            between = time.perf_counter()
            got, _ = cells.nearest(query, RESULTS)
            times["exact"].append(between - began)
            times["cells"].append(time.perf_counter() - between)
            found += len({*expected.tolist()} & {*got.tolist()})
        share = found / (RESULTS * len(queries))
        told = [1000 * statistics.median(times[name]) for name in ("cells", "exact")]
        row(
            f"{len(vectors):,}", f"{spread}", codes, f"{made:.0f} s", f"{probe}",
            f"{100 * share:.1f} %", *(f"{one:.1f}" for one in told),
        )  # fmt: skip


if __name__ == "__main__":
    main()
