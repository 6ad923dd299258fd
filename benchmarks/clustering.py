"""Time and quality of balanced clustering, compared with faiss, scikit-learn and POT.

    python -m benchmarks.clustering                  # 200,000 features: some minutes
    python -m benchmarks.clustering --case small_equal --only moce,faiss
    python -m benchmarks.clustering --case large --only moce,faiss,scikit-learn  # 3.9 GB on disk
    python -m benchmarks.clustering --only moce,faiss

Features [n, 768] of unit norm around planted clusters, in a mapped float32 file.
Every candidate runs in its own process. A pass goes once over all features: assignment and update,
or one Sinkhorn-Knopp step. Memory is the peak of the process's own memory (RssAnon) above its
start, without pages of the file. The floor is the bare matrix product of features and centroids, in
chunks, measured in the same process as moce's and faiss's passes. Needs: pip install faiss-cpu pot
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from benchmarks.measure import machine
from moce.clustering.balanced_kmeans import Callbacks, Iteration, balanced_kmeans
from moce.clustering.features import Rows, without_duplicates
from moce.clustering.sinkhorn import Scores

PACKAGES = ("moce", "torch", "faiss-cpu", "scikit-learn", "POT")
RESULTS = Path(__file__).parent / "results" / "clustering.json"
CHUNK = 4096
EPSILON = 0.005


@dataclass(frozen=True)
class Case:
    """count: features. planted: clusters they are generated from. clusters: number to find.

    equal: planted clusters are of equal size, else of lognormal sizes.
    """

    name: str
    count: int
    width: int = 768
    planted: int = 256
    clusters: int = 256
    equal: bool = False


CASES = {
    "tiny": Case("tiny", 20_000, 64, 40, 40),
    "small": Case("small", 200_000),
    "small_equal": Case("small_equal", 200_000, equal=True),
    "large": Case("large", 1_280_000),
}
SINKHORN_COUNT = 20_000  # POT holds several n x K matrices in float64


def write_features(path: Path, case: Case) -> None:
    """Centered unit features, and the planted cluster of each in a .npy file.

    Centers come in families of eight, sizes are lognormal, and part of the noise is along 64 shared
    directions.
    """
    random = np.random.default_rng(0)
    family = random.standard_normal((max(1, case.planted // 8), case.width))
    centers = (
        random.standard_normal((case.planted, case.width)) + np.tile(family, (8, 1))[: case.planted]
    )
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    shares = np.exp(0.5 * random.standard_normal(case.planted))
    shares = np.ones(case.planted) if case.equal else shares
    planted = random.choice(case.planted, case.count, p=shares / shares.sum())
    common = random.standard_normal((64, case.width)) / np.sqrt(64 * case.width)
    mean = (shares / shares.sum()) @ centers
    features = np.memmap(path, np.float32, "w+", shape=(case.count, case.width))
    for start in range(0, case.count, CHUNK):
        label = planted[start : start + CHUNK]
        rough = random.standard_normal((len(label), case.width), np.float32) / np.sqrt(case.width)
        found = centers[label] - mean + 0.8 * rough
        found += 0.8 * random.standard_normal((len(label), 64)) @ common
        features[start : start + CHUNK] = found / np.linalg.norm(found, axis=1, keepdims=True)
    features.flush()
    np.save(path.with_suffix(".npy"), planted)


def open_features(path: Path, case: Case) -> np.ndarray:
    return np.memmap(path, np.float32, "r+", shape=(case.count, case.width))


# --- memory -------------------------------------------------------------------------------------------


class Memory:
    """Peak of this process's own memory (RssAnon) within the context."""

    def __enter__(self) -> Memory:
        self.start = self.peak = anonymous_bytes()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ends.wait(0.02):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    @property
    def gigabytes(self) -> float:
        return round((self.peak - self.start) / 1e9, 3)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


# --- candidates ---------------------------------------------------------------------------------------


@dataclass
class Found:
    """The result of a candidate. seconds: of each pass, by kind. total: of the whole clustering."""

    total: float
    seconds: dict[str, list[float]]
    gigabytes: float
    assignment: np.ndarray
    passes: dict[str, int]


def run_moce(features: np.ndarray, case: Case) -> Found:
    """The clustering of `moce cluster`."""
    tensor = torch.from_numpy(features)
    iterations: list[Iteration] = []
    ends: list[float] = []
    passes_made = [0]

    def on_iteration(state: Iteration) -> None:
        iterations.append(state)
        ends.append(time.perf_counter())

    def on_pass() -> None:
        passes_made[0] += 1

    with Memory() as memory:
        start = time.perf_counter()
        found = balanced_kmeans(tensor, case.clusters, callbacks=Callbacks(on_iteration, on_pass))
        total = time.perf_counter() - start
    whole = [i for i, state in enumerate(iterations) if state.stage == 1]
    between = [ends[i] - ends[i - 1] for i in whole if i - 1 in whole]
    passes = {
        "iterations on the sample": len(iterations) - len(whole),
        "iterations on all": len(whole),
        "passes in all": passes_made[0],
    }
    seconds = {
        "iteration on all": between,
        "everything before": [ends[whole[0]] - start],
        "everything after": [total - (ends[-1] - start)],
    }
    return Found(total, seconds, memory.gigabytes, found.assignment.numpy(), passes)


def run_faiss(features: np.ndarray, case: Case) -> Found:
    import faiss

    passes = 25  # faiss's own default
    kmeans = faiss.Kmeans(
        case.width, case.clusters, niter=passes, max_points_per_centroid=case.count, seed=0
    )
    with Memory() as memory:
        start = time.perf_counter()
        kmeans.train(features)
        times = [0.0, *(row["time"] for row in kmeans.iteration_stats)]
        _, assignment = kmeans.index.search(features, 1)
        total = time.perf_counter() - start
    seconds = {"iteration": list(np.diff(times))}
    return Found(
        total, seconds, memory.gigabytes, assignment[:, 0], {"iterations": passes, "last": 1}
    )


def run_sklearn(features: np.ndarray, case: Case) -> Found:
    from sklearn.cluster import MiniBatchKMeans

    kmeans = MiniBatchKMeans(case.clusters, batch_size=CHUNK, n_init=1, random_state=0)
    with Memory() as memory:
        start = time.perf_counter()
        kmeans.fit(features)
        total = time.perf_counter() - start
    passes = kmeans.n_steps_ * CHUNK / case.count
    return Found(
        total, {"pass": [total / passes]}, memory.gigabytes, kmeans.labels_, {"passes": passes}
    )


def run_pot(features: np.ndarray, case: Case) -> Found:
    """Sinkhorn-Knopp alone, on a subset that fits into memory, with moce's centroids of it."""
    import ot

    part = np.array(features[:SINKHORN_COUNT])
    centroids = balanced_kmeans(
        torch.from_numpy(part), case.clusters, max_iterations=3
    ).centroids.numpy()
    iterations = 20
    with Memory() as memory:
        start = time.perf_counter()
        cost = -part.astype(np.float64) @ centroids.T.astype(np.float64)
        plan = ot.sinkhorn(
            np.full(len(part), 1 / len(part)), np.full(case.clusters, 1 / case.clusters), cost, EPSILON,
            method="sinkhorn_log", numItermax=iterations, stopThr=0, warn=False,
        )  # fmt: skip
        total = time.perf_counter() - start
    seconds = {"iteration": [total / iterations]}
    return Found(total, seconds, memory.gigabytes, plan.argmax(axis=1), {"iterations": iterations})


CANDIDATES: dict[str, Callable[[np.ndarray, Case], Found]] = {
    "moce": run_moce,
    "faiss": run_faiss,
    "scikit-learn": run_sklearn,
    "POT": run_pot,
}


def run_candidate(name: str, path: Path, case: Case) -> dict[str, Any]:
    """Times, memory, sizes and agreement with the planted clusters of one candidate."""
    features, planted = open_features(path, case), np.load(path.with_suffix(".npy"))
    found = CANDIDATES[name](features, case)
    planted = planted[: len(found.assignment)]
    sizes = np.bincount(found.assignment, minlength=case.clusters)
    return {
        "candidate": name,
        "features": len(found.assignment),
        "total_s": round(found.total, 2),
        "seconds": {kind: [round(s, 3) for s in times] for kind, times in found.seconds.items()},
        "passes": found.passes,
        "gigabytes": found.gigabytes,
        "smallest": int(sizes.min()),
        "largest": int(sizes.max()),
        "deviation": round(float(sizes.std() / sizes.mean()), 3),
        "ARI": round(adjusted_rand_score(planted, found.assignment), 4),
        "NMI": round(normalized_mutual_info_score(planted, found.assignment), 4),
    }


# --- single passes ------------------------------------------------------------------------------------


def bare_product(features: torch.Tensor, centroids: torch.Tensor) -> None:
    """The floor: features times centroids, chunk by chunk into one buffer."""
    buffer = torch.empty(CHUNK, len(centroids))
    for start in range(0, len(features), CHUNK):
        chunk = features[start : start + CHUNK]
        torch.mm(chunk, centroids.T, out=buffer[: len(chunk)])


def faiss_pass(features: np.ndarray, centroids: np.ndarray) -> Callable[[], None]:
    """One iteration of faiss's k-means from given centroids, on all features."""
    import faiss

    kmeans = faiss.Kmeans(
        features.shape[1], len(centroids), niter=1, max_points_per_centroid=len(features)
    )
    return lambda: kmeans.train(features, init_centroids=centroids)


def time_passes(path: Path, case: Case, repeats: int) -> list[dict[str, Any]]:
    """Seconds of single passes, alternating in one process."""
    array = open_features(path, case)
    features = torch.from_numpy(array)
    rows = Rows(features)
    step = max(1, case.count // case.clusters)
    centroids = features[::step][: case.clusters].clone()
    potentials = torch.zeros(case.clusters)
    cached = Scores(rows, centroids, EPSILON)
    cached.masses(potentials, derive=False)

    runs: dict[str, Callable[[], Any]] = {
        "bare product": lambda: bare_product(features, centroids),
        "moce, scores and masses": lambda: Scores(rows, centroids, EPSILON).masses(
            potentials, derive=True
        ),
        "moce, masses, scores cached": lambda: cached.masses(potentials, derive=False),
        "moce, the same and derivative": lambda: cached.masses(potentials, derive=True),
        "moce, assignment, scores cached": lambda: cached.assign(potentials),
        "moce, find duplicates": lambda: without_duplicates(rows),
        "faiss, an iteration": faiss_pass(array, centroids.numpy()),
    }
    found = []
    for repeat in range(repeats):
        for name, one in runs.items():
            start = time.perf_counter()
            one()
            seconds = time.perf_counter() - start
            found.append({"pass": name, "repeat": repeat, "seconds": round(seconds, 3)})
            print(f"{case.name} {name:30} {seconds:8.3f} s", flush=True)
    return found


# --- the whole ----------------------------------------------------------------------------------------


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def keep(out: Path, case: Case, part: str, content: Any) -> None:
    """Replace one entry of the result file."""
    result = json.loads(out.read_text()) if out.is_file() else {}
    sample = result.setdefault(case.name, {})
    sample["case"] = asdict(case)
    sample.setdefault("machine", {})[part] = machine(PACKAGES)
    sample[part] = content
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def tables(found: dict[str, Any]) -> str:
    """The tables that benchmarks.draw puts into docs/performance.md."""
    parts = []
    for name in ("small", "small_equal", "large"):
        if name in found:
            parts += case_tables(found[name])
    return "\n\n".join(parts)


def case_tables(sample: dict[str, Any]) -> list[str]:
    case, machines = sample["case"], sample["machine"]
    last = list(machines.values())[-1]
    names = ", ".join(f"{package} {number}" for package, number in last["versions"].items())
    lines = [
        f"### {case['count']:,} features of width {case['width']}, {case['clusters']} clusters"
        + (" of equal size" if case.get("equal") else ""),
        f"{last['cpu']}, {last['cores']} cores, {last['torch_threads']} torch threads. {names}.",
    ]
    if "passes" in sample:
        lines.append(f"Passes, revision {machines['passes']['revision']}:")
        lines.append("\n".join(pass_table(sample["passes"])))
    found = [name for name in CANDIDATES if name in sample]
    if not found:
        return lines
    revisions = ", ".join(f"{name} {machines[name]['revision']}" for name in found)
    return [*lines, f"Revisions: {revisions}.", "\n".join(whole_table([sample[n] for n in found]))]


def pass_table(rows: list[dict[str, Any]]) -> list[str]:
    """Median seconds of each kind of pass, and their ratios to the floor and to faiss."""
    times: dict[str, list[float]] = {}
    for row in rows:
        times.setdefault(row["pass"], []).append(row["seconds"])
    middle = {name: float(np.median(found)) for name, found in times.items()}
    floor, faiss = middle["bare product"], middle["faiss, an iteration"]
    lines = ["| a pass | s | range | x bare product | x faiss |", "|---|--:|--:|--:|--:|"]
    for name, found in times.items():
        spread = f"{min(found):.2f} to {max(found):.2f}"
        ratios = f"{middle[name] / floor:.2f} | {middle[name] / faiss:.2f}"
        lines.append(f"| {name} | {middle[name]:.2f} | {spread} | {ratios} |")
    return lines


def whole_table(rows: list[dict[str, Any]]) -> list[str]:
    """Cost and quality of whole clusterings."""
    head = (
        "| the whole | features | s | passes over all | GB | sizes | their deviation | ARI | NMI |"
    )
    lines = [head, "|---|--:|--:|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        passes = ", ".join(f"{count:.3g} {kind}" for kind, count in row["passes"].items())
        lines.append(
            f"| {row['candidate']} | {row['features']:,} | {row['total_s']:.0f} | {passes} | "
            f"{row['gigabytes']:.2f} | {row['smallest']:,} to {row['largest']:,} | "
            f"{row['deviation']:.2f} | {row['ARI']:.3f} | {row['NMI']:.3f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="small", choices=CASES)
    parser.add_argument("--only", default="passes,moce,faiss,scikit-learn,POT")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of the single passes")
    parser.add_argument("--features", type=Path, help="file for the features (default: temporary)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    case = CASES[options.case]
    with tempfile.TemporaryDirectory() as folder:
        path = options.features or Path(folder) / "features.f32"
        if not path.exists():
            in_own_process(write_features, path, case)
        for name in options.only.split(","):
            if name == "passes":
                content = in_own_process(time_passes, path, case, options.repeats)
            elif name in CANDIDATES:
                content = in_own_process(run_candidate, name, path, case)
                print(json.dumps(content), flush=True)
            else:
                continue  # nothing but the features
            keep(options.out, case, name, content)


if __name__ == "__main__":
    main()
