# ruff: noqa: E402 - thread counts are set before NumPy is imported
"""What exact top-k costs against its floors: ``python -m tests.benchmarks.topk [--full]``.

Everything on one thread, in CPU seconds of this process (the machine may be busy with others). Two kinds of losses:

* gaussian: independent normal deviations, all norms alike; nothing can be pruned, the worst case;
* ensemble: deviations of falling variance over 100 directions (geometric, 1 to .03) with log-normal norms (sigma .5),
  which is milder than the spectra of the fine-tunes in tasks.py.

Compared with: the bare blocked product of the same matrices without selection; faiss-cpu's exact inner-product index;
and ``A.T @ B`` with a full argsort where that fits. ``--full`` runs N = 1,000,000, M = 10,000, K = 100, k = 100 once,
in a process of its own that reports its peak memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np

from daunce_api.core import ESTIMATORS, Choice, Setting, member_losses, top, topk

MEMBERS, K_BEST = 100, 100


def losses(kind: str, train: int, test: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(K, N) and (K, M) losses in float32."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((MEMBERS, train), dtype=np.float32)
    b = rng.standard_normal((MEMBERS, test), dtype=np.float32)
    if kind == "ensemble":
        scale = np.geomspace(1, 0.03, MEMBERS, dtype=np.float32)[:, None]
        turn = np.linalg.qr(rng.standard_normal((MEMBERS, MEMBERS)))[0].astype(np.float32)
        a, b = turn @ (a * scale), turn @ (b * scale)
        a *= np.exp(0.5 * rng.standard_normal(train)).astype(np.float32)
        b *= np.exp(0.5 * rng.standard_normal(test)).astype(np.float32)
    return a, b


def bare_product(a_KN: np.ndarray, b_KM: np.ndarray) -> None:
    """The product in the tiles of the search, thrown away."""
    rows, queries = np.ascontiguousarray(a_KN.T), np.ascontiguousarray(b_KM.T)
    buffer = np.empty(topk._QUERIES * topk._POINTS, np.float32)
    for i in range(0, len(queries), topk._QUERIES):
        q = queries[i : i + topk._QUERIES]
        for j in range(0, len(rows), topk._POINTS):
            p = rows[j : j + topk._POINTS]
            np.matmul(q, p.T, out=buffer[: len(q) * len(p)].reshape(len(q), len(p)))


def found(a_KN: np.ndarray, b_KM: np.ndarray, stderr: bool = True) -> None:
    """Top of plain scores."""
    choice = Choice(ESTIMATORS["covariance"], Setting(), "", "attribution")
    top(member_losses(a_KN, b_KM), choice, K_BEST, stderr=stderr)


def drawn(a_KN: np.ndarray, b_KM: np.ndarray) -> None:
    """Top of weighted scores (`core.pairs.Shrinkage`), whose spectrum is needed too."""
    choice = Choice(ESTIMATORS["covariance"], Setting(shrinkage=4.0), "", "attribution")
    top(member_losses(a_KN, b_KM), choice, K_BEST, stderr=False)


def full_sort(a_KN: np.ndarray, b_KM: np.ndarray) -> None:
    """The whole matrix and a full argsort."""
    np.argsort(-(b_KM.T @ a_KN), axis=1)[:, :K_BEST]


def seconds(call: Callable[[], object], passes: int = 2) -> float:
    """CPU seconds, the best of some passes."""
    best = float("inf")
    for _ in range(passes):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return best


def compare(train: int, test: int, kinds: Sequence[str], passes: int) -> None:
    """One size, all ratios."""
    for kind in kinds:
        a, b = losses(kind, train, test)
        bare = seconds(lambda a=a, b=b: bare_product(a, b), passes)
        ours = seconds(lambda a=a, b=b: found(a, b, stderr=False), passes)
        with_errors = seconds(lambda a=a, b=b: found(a, b), passes)
        weighted = seconds(lambda a=a, b=b: drawn(a, b), passes)
        line = (
            f"{kind:9} N={train:>9,} M={test:>6,}: bare {bare:6.2f} s ({2e-9 * MEMBERS * train * test / bare:.0f} "
            "GFLOP/s)  "
            f"top {ours:6.2f} s = {ours / bare:.2f} x  with standard errors {with_errors:6.2f} s = "
            f"{with_errors / bare:.2f} x  shrunk towards zero {weighted:6.2f} s = {weighted / bare:.2f} x"
        )
        try:
            import faiss  # type: ignore[import-not-found]
        except ImportError:
            line += "  (faiss-cpu is not installed)"
        else:
            faiss.omp_set_num_threads(1)

            def search(a: np.ndarray = a, b: np.ndarray = b) -> None:
                index = faiss.IndexFlatIP(MEMBERS)
                index.add(np.ascontiguousarray(a.T))
                index.search(np.ascontiguousarray(b.T), K_BEST)

            theirs = seconds(search, passes)
            line += f"  faiss {theirs:6.2f} s, top = {ours / theirs:.2f} x"
        if train * test <= 2e8:
            whole = seconds(lambda a=a, b=b: full_sort(a, b), passes)
            line += f"  full argsort {whole:6.2f} s, top = {ours / whole:.3f} x"
        print(line, flush=True)


def full_size() -> None:
    """One million by ten thousand, with the peak memory above the inputs."""
    a, b = losses("gaussian", 1_000_000, 10_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.process_time()
    found(a, b)
    spent = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    inputs = (a.nbytes + b.nbytes) / 2**30
    print(
        f"N=1,000,000 M=10,000 K=100 k=100 with standard errors: {spent:.0f} s, peak {peak:.2f} GiB, inputs "
        f"{inputs:.2f} GiB"
    )
    print(f"(peak before the call, while inputs were made: {before:.2f} GiB)")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--full-here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, nargs=2, default=(200_000, 2_000), metavar=("N", "M"))
    parser.add_argument("--kinds", nargs="+", default=["gaussian", "ensemble"])
    parser.add_argument("--passes", type=int, default=2, help="the best of so many counts")
    parser.add_argument("--curve", action="store_true", help="growth in N and in M")
    arguments = parser.parse_args()
    if arguments.full_here:
        full_size()
        return
    compare(*arguments.size, arguments.kinds, arguments.passes)
    if arguments.curve:
        for size in (
            (50_000, 1_000),
            (100_000, 1_000),
            (200_000, 1_000),
            (400_000, 1_000),
            (100_000, 2_000),
            (100_000, 4_000),
        ):
            a, b = losses("gaussian", *size)
            ours = seconds(lambda a=a, b=b: found(a, b))
            print(
                f"N={size[0]:>8,} M={size[1]:>6,}: {ours:6.2f} s, {1e9 * ours / size[0] / size[1]:.2f} ns a pair",
                flush=True,
            )
    if arguments.full:
        subprocess.run([sys.executable, "-m", "tests.benchmarks.topk", "--full-here"], check=True)


if __name__ == "__main__":
    main()
