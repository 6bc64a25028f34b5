"""How different images are: k-means distance, greedy k-center, greedy coverage, near-duplicates.

Everything returned as `positions` indexes the rows of the `embeddings` argument, never rows of `labelled` and never
keys: the labelled points only start the distances, they can not be picked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strategies.arrays import Booleans, Floats, Integers, as_count, as_embeddings, as_groups, as_mask, as_vector
from strategies.mixing import combined, weighted

Vector = NDArray[np.float64]

# Up to this many numbers the arithmetic is done in float64, where ties are exact; above it in float32, twice as fast.
_SMALL = 2**20
# Numbers in one block of a distance or kernel matrix: 8 MB of float64, which a core's cache nearly holds.
_BLOCK = 2**20
# Above this share of candidates one product of whole blocks is cheaper than looking at each pair.
_FEW_PAIRS = 0.02
# More than float32 can move the product of two rows by, relative to their lengths.
_SKETCH_ROUNDING = 1e-5
# Rows that k-means learns its centroids from: all, or as many as these.
_KMEANS_ROWS = 100_000
# A spread of distances below this share of the embeddings' size is rounding, not diversity.
_RELATIVE_NOISE = 1e-6
# At h = 0.01 the rounding of float32 cosines moves the kernel by 0.2 %; at 0.001 it would be as wide as the kernel.
_SMALLEST_BANDWIDTH = 0.01


# --- k-means ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class KMeansScale:
    """What turns an embedding into a k-means diversity: centroids (n, D) and the pool's distance range."""

    centroids: Floats
    low: float
    high: float

    def diversity(self, embeddings: ArrayLike) -> Vector:
        """(M, D) -> (M,) distance to the nearest centroid, scaled by the pool's range and clipped to [0, 1].

        Zeros when the pool had no spread (or no rows).
        """
        if not len(self.centroids) or not self.high > self.low:
            return np.zeros(len(as_embeddings(embeddings)))
        distances = nearest_distances(embeddings, self.centroids)
        return np.clip((distances - self.low) / (self.high - self.low), 0.0, 1.0)


def fit_kmeans(embeddings: ArrayLike, n_clusters: int = 50) -> KMeansScale:
    """MiniBatchKMeans (Sculley 2010) with min(n_clusters, N) clusters, batches of 512, 3 starts and seed 42.

    Above 100,000 rows the centroids come from a seeded draw of as many: its steps grow faster than the pool.

    Args: embeddings (N, D). An empty pool gives no centroids and the range [0, 0].
    Raises: InputInvalid for NaN, wrong shape or n_clusters < 1.
    """
    points = as_embeddings(embeddings)
    clusters = min(as_count(n_clusters, "n_clusters"), len(points))
    if not clusters:
        return KMeansScale(points, 0.0, 0.0)
    from sklearn.cluster import MiniBatchKMeans  # over a second: not while a web process starts
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # no stubs are published

    # One thread: batches of 512 gain nothing from two, and OpenMP threads that spin beside a training cost 10x.
    with threadpool_limits(limits=1):
        model = MiniBatchKMeans(n_clusters=clusters, batch_size=512, n_init=3, random_state=42).fit(_drawn(points))
    centroids: Floats = model.cluster_centers_
    distances = nearest_distances(points, centroids)
    low, high = float(distances.min()), float(distances.max())
    if high - low <= _RELATIVE_NOISE * float(max(points.max(), -points.min())):
        high = low
    return KMeansScale(centroids, low, high)


def _drawn(points: Floats) -> Floats:
    if len(points) <= _KMEANS_ROWS:
        return points
    chosen = np.random.default_rng(42).choice(len(points), _KMEANS_ROWS, replace=False)
    return points[np.sort(chosen)]


def kmeans_distance(embeddings: ArrayLike, n_clusters: int = 50) -> Vector:
    """Distance of each row to its own k-means centroid, min-max scaled over the rows. See `fit_kmeans`.

    Args: embeddings (N, D).
    Returns: (N,) in [0, 1], high = far from what is common; all distances equal (one row, exact duplicates): zeros.
    Raises: InputInvalid for NaN, wrong shape or n_clusters < 1.
    """
    return fit_kmeans(embeddings, n_clusters).diversity(embeddings)


def nearest_distances(embeddings: ArrayLike, anchors: ArrayLike) -> Vector:
    """(M, D), (A, D) -> (M,) Euclidean distance to the nearest anchor; infinite without anchors.

    Exact where it matters: a row equal to its anchor is at 0, which |x|^2 - 2xa + |a|^2 alone would miss.
    """
    points = as_embeddings(embeddings)
    return np.sqrt(_nearest_squares(points, _beside(points, anchors, "anchors")))


def _beside(points: Floats, others: ArrayLike | None, name: str) -> Floats:
    """Rows of the same width as the points; no points have no width to compare with."""
    return as_embeddings([] if others is None else others, name, points.shape[1] if len(points) else None)


def _nearest_squares(points: Floats, others: Floats, *, unit: bool = False) -> Vector:
    result = np.full(len(points), np.inf)
    if not len(points) or not len(others):
        return result
    work = _Arithmetic(points, others, unit=unit)
    targets = work(others)
    squares = _squares(targets)
    for rows in blocks(len(points), max(len(others), points.shape[1])):
        part = work(points[rows])
        distances = part @ targets.T
        distances *= -2
        distances += squares  # + |x|^2, the same along a row
        nearest = np.argmin(distances, axis=1)
        result[rows] = _squares((part - targets[nearest]).astype(np.float64))
    return result


# --- greedy walks ----------------------------------------------------------------------------------------------


class _Candidates:
    """Which rows a greedy walk may take: not twice, and near-duplicates only once nothing else is left."""

    def __init__(self, size: int, duplicate_groups: ArrayLike | None, duplicates_of_labelled: ArrayLike | None) -> None:
        self._groups = as_groups(duplicate_groups, size)
        self._taken = np.zeros(size, dtype=np.bool_)
        self.open = ~closed_rows(size, self._groups, as_mask(duplicates_of_labelled, size))

    def ready(self) -> Booleans:
        """The open rows; when all are closed, every row that is not taken opens again."""
        if not self.open.any():
            self.open = ~self._taken
        return self.open

    def take(self, position: int) -> None:
        self._taken[position] = True
        self.open[position] = False
        if self._groups is not None:
            self.open[self._groups == self._groups[position]] = False


def closed_rows(size: int, groups: Integers | None, duplicates_of_labelled: Booleans | None) -> Booleans:
    """(N,) rows that count as taken from the start: near-duplicates of labelled images and all of their groups."""
    if duplicates_of_labelled is None:
        return np.zeros(size, dtype=np.bool_)
    if groups is None:
        return duplicates_of_labelled.copy()
    return np.isin(groups, groups[duplicates_of_labelled])


@dataclass(frozen=True, eq=False)
class KCenterWalk:
    """positions (K,) as picked; pick_distances (K,), each to the nearest point labelled or picked before it (infinite
    for the first pick without labelled points); distances (N,) of all rows after the last pick; high: the largest
    finite distance there was at the start or, without labelled points, after the first pick (0: none)."""

    positions: Integers
    pick_distances: Vector
    distances: Vector
    high: float


@dataclass(frozen=True, eq=False)
class Mixture:
    """What a walk maximises in place of the distance alone: uncertainty and distance / high, mixed (see `mixing`).

    uncertainty (N,) in [0, 1]; alpha, beta >= 0; mix: a name in MIXES.
    """

    uncertainty: Vector
    alpha: float
    beta: float
    mix: str = "sum"

    def of(self, squares: Vector | Floats, high: float) -> Vector:
        """(N,) squared distances -> (N,) in [0, alpha + beta]; an infinite distance counts as `high`."""
        distances = np.sqrt(squares, dtype=np.float64)
        share = np.where(np.isinf(distances), 1.0, np.minimum(distances / high, 1.0) if high > 0 else 0.0)
        return combined(self._weighted_uncertainty, weighted(share, self.beta, self.mix), self.mix)

    @cached_property
    def _weighted_uncertainty(self) -> Vector:
        return weighted(self.uncertainty, self.alpha, self.mix)


def walk_k_center(
    embeddings: ArrayLike,
    k: int,
    labelled: ArrayLike | None = None,
    duplicate_groups: ArrayLike | None = None,
    duplicates_of_labelled: ArrayLike | None = None,
    mixture: Mixture | None = None,
) -> KCenterWalk:
    """`k_center` with its distances; rows of groups already taken (or labelled) wait until nothing else is left.

    With a mixture each pick is the row of the largest one, not the farthest.
    """
    points = as_embeddings(embeddings)
    anchors = _beside(points, labelled, "labelled")
    picks = min(as_count(k, "k"), len(points))
    candidates = _Candidates(len(points), duplicate_groups, duplicates_of_labelled)
    work = _Arithmetic(points)
    rows = points.astype(work.dtype, copy=False)
    squares = work.squares(points)
    sketch = _Sketch(points, work) if work.dtype == np.float32 else None
    nearest = _nearest_squares(points, anchors).astype(work.dtype)  # squares rank alike, and keep exact ties exact
    high = _largest_finite(nearest)
    positions = np.zeros(picks, dtype=np.int64)
    pick_distances = np.zeros(picks)
    for turn in range(picks):
        worth = nearest if mixture is None else mixture.of(nearest, high)
        best = int(np.argmax(np.where(candidates.ready(), worth, -1)))
        positions[turn], pick_distances[turn] = best, math.sqrt(nearest[best])
        candidates.take(best)
        centre = work(points[best])
        closer = slice(None) if sketch is None else sketch.closer(best, squares, nearest)
        # x.c around the middle, from rows as they are: moving all of them would take a second copy of the pool
        distances = _products(rows, closer, centre)
        distances -= work.dtype(work.middle.astype(np.float64) @ centre)
        distances *= -2
        distances += squares[closer]
        distances += squares[best]
        nearest[closer] = np.minimum(nearest[closer], np.maximum(distances, 0, out=distances))
        nearest[best] = 0
        if not turn and not len(anchors):
            high = _largest_finite(nearest)
    return KCenterWalk(positions, pick_distances, np.sqrt(nearest.astype(np.float64)), high)


def _largest_finite(squares: Floats) -> float:
    """The largest finite distance, from its square; 0 when there is none."""
    return math.sqrt(squares.max(initial=0.0, where=np.isfinite(squares)))


def _products(rows: Floats, chosen: Integers | slice, centre: Floats) -> Floats:
    if isinstance(chosen, slice):
        return rows[chosen] @ centre
    products: Floats = np.empty(len(chosen), rows.dtype)
    for part in blocks(len(chosen), rows.shape[1]):
        products[part] = rows[chosen[part]] @ centre
    return products


def k_center(embeddings: ArrayLike, k: int, labelled: ArrayLike | None = None) -> Integers:
    """Greedy core-set (Sener & Savarese 2018): again and again the row farthest from all labelled and picked points.

    Args: embeddings (N, D); k >= 1; labelled (L, D) or None. Euclidean distance, ties to the lowest position; without
        labelled points all distances start infinite, so position 0 is the first pick.
    Returns: (min(k, N),) distinct positions in the order picked, even among exact duplicates; an empty pool gives (0,).
    Raises: InputInvalid for NaN, wrong shape, another width or k < 1.
    """
    return walk_k_center(embeddings, k, labelled).positions


@dataclass(frozen=True, eq=False)
class CoverageWalk:
    """positions (K,) as picked; gains (K,), what each added to the covered utility; the kernel's bandwidth h."""

    positions: Integers
    gains: Vector
    bandwidth: float


def walk_coverage(
    embeddings: ArrayLike,
    k: int,
    utilities: ArrayLike | None = None,
    labelled: ArrayLike | None = None,
    duplicate_groups: ArrayLike | None = None,
    duplicates_of_labelled: ArrayLike | None = None,
    max_references: int = 20_000,
    seed: int = 42,
) -> CoverageWalk:
    """`coverage` with its gains; rows of groups already taken (or labelled) wait until nothing else is left."""
    points = as_embeddings(embeddings)
    anchors = _beside(points, labelled, "labelled")
    picks = min(as_count(k, "k"), len(points))
    candidates = _Candidates(len(points), duplicate_groups, duplicates_of_labelled)
    weights = _coverage_weights(utilities, len(points))
    references = _references(weights, as_count(max_references, "max_references"), seed)
    bandwidth = coverage_bandwidth(anchors)
    reach = np.empty(len(references))
    for some in blocks(len(references), points.shape[1] if len(points) else 1):  # not all at once: memory
        reach[some] = _nearest_squares(points[references[some]], anchors, unit=True)
    gains = _LazyGains(_Kernel(points, references, bandwidth), weights[references], reach)
    positions = np.zeros(picks, dtype=np.int64)
    pick_gains = np.zeros(picks)
    for turn in range(picks):
        best, pick_gains[turn] = gains.best(candidates.ready())
        positions[turn] = best
        candidates.take(best)
        gains.pick(best)
    return CoverageWalk(positions, pick_gains, bandwidth)


def coverage(
    embeddings: ArrayLike,
    k: int,
    utilities: ArrayLike | None = None,
    labelled: ArrayLike | None = None,
    *,
    max_references: int = 20_000,
    seed: int = 42,
) -> Integers:
    """Greedy weighted facility location over a Gaussian kernel (MaxHerding, ECCV 2024; weighted: UHerding, ICLR 2025).

    x* = argmax_x sum_j U_j max(0, k(x, j) - m_j), then m_j <- max(m_j, k(x*, j)), with k(x, j) = exp(-|x - j|^2 / h^2)
    on L2-normalised embeddings (a zero row stays zero) and h from `coverage_bandwidth`. Labelled points cover, with no
    weight of their own. Lazy greedy (Minoux 1978): gains only fall, so only rows near the top are computed again.

    Args: embeddings (N, D); k >= 1; utilities (N,) >= 0 or None for equal weights (all zero counts as equal);
        labelled (L, D) or None; at most max_references rows j with weight, drawn by `seed` when there are more.
    Returns: (min(k, N),) distinct positions in the order picked (every prefix is what a smaller k gives; ties go to the
        lowest position up to rounding); an empty pool gives (0,).
    Raises: InputInvalid for NaN, wrong shape, another width, negative utilities or k < 1.
    """
    return walk_coverage(embeddings, k, utilities, labelled, max_references=max_references, seed=seed).positions


def coverage_bandwidth(labelled: ArrayLike) -> float:
    """h: the median distance of a labelled point to its nearest other one, on L2-normalised rows (L, D).

    1 with fewer than two labelled points; when most are exact duplicates, the median of the positive distances (1 when
    there are none); never below 0.01.
    """
    rows = as_embeddings(labelled, "labelled")
    if len(rows) < 2:
        return 1.0
    points = _Arithmetic(rows, unit=True)(rows)
    distances = _distances_to_next(points)
    median = float(np.median(distances))
    if median <= _RELATIVE_NOISE:
        positive = distances[distances > _RELATIVE_NOISE]
        median = float(np.median(positive)) if len(positive) else 1.0
    return max(median, _SMALLEST_BANDWIDTH)


def _distances_to_next(points: Floats) -> Vector:
    nearest = np.zeros(len(points), dtype=np.int64)
    squares = _squares(points)
    for rows in blocks(len(points), len(points)):
        distances = squares - 2 * (points[rows] @ points.T)  # + |x|^2, the same along a row
        distances[np.arange(len(distances)), np.arange(len(points))[rows]] = np.inf  # nobody is its own neighbour
        nearest[rows] = distances.argmin(axis=1)
    result: Vector = np.linalg.norm((points - points[nearest]).astype(np.float64), axis=1)
    return result


def best_kernel(embeddings: ArrayLike, anchors: ArrayLike, bandwidth: float) -> Vector:
    """(M, D), (A, D) -> (M,) max_a k(x, a) in [0, 1] on L2-normalised rows: how covered x is; 0 without anchors."""
    points = as_embeddings(embeddings)
    squares = _nearest_squares(points, _beside(points, anchors, "anchors"), unit=True)
    result: Vector = np.exp(-squares / bandwidth**2)
    return result


def _coverage_weights(utilities: ArrayLike | None, size: int) -> Vector:
    weights = np.ones(size) if utilities is None else as_vector(utilities, "utilities", size, low=0.0)
    return weights if weights.any() else np.ones(size)


def _references(weights: Vector, limit: int, seed: int) -> Integers:
    weighty = np.flatnonzero(weights)  # a row without weight can not gain from being covered
    if len(weighty) <= limit:
        return weighty
    return np.sort(np.random.default_rng(seed).choice(weighty, size=limit, replace=False))


class _Kernel:
    """The (N, R) Gaussian kernel, computed when asked for: at 80,000 x 20,000 it would not fit in memory."""

    def __init__(self, points: Floats, references: Integers, bandwidth: float) -> None:
        self._points, self._references = points, references
        self._work = _Arithmetic(points, unit=True)
        self.dtype = self._work.dtype
        self.size, self.width, self.columns = len(points), len(references), points.shape[1] + 2 if len(points) else 2
        self.scale = self.dtype(bandwidth**-2)
        self._sketch = _Sketch(points, self._work) if self.dtype == np.float32 else None
        self._held: Floats | None = None

    def hold(self) -> None:
        """Keep all references ready from now on: for walks that need most of them again and again."""
        held: Floats = np.empty((self.width, self.columns), self.dtype)
        for columns in blocks(self.width, self.columns):
            held[columns] = self.right(columns)
        self._held = held

    def left(self, positions: Integers | slice) -> Floats:
        """(n, D + 2) of rows of the pool: times `right` it is the whole exponent, (2 x.r - |x|^2 - |r|^2) / h^2."""
        part = self._work(self._points[positions])
        return np.column_stack([part, _squares(part), np.ones(len(part), self.dtype)])

    def right(self, columns: Integers | slice) -> Floats:
        """(n, D + 2) of references."""
        if self._held is not None:
            return self._held[columns]
        part = self._work(self._points[self._references[columns]])
        result = np.column_stack([part, np.full(len(part), -0.5, self.dtype), _squares(part) / -2])
        result *= 2 * self.scale
        return result

    def closer(self, rows: Integers | slice, columns: slice, reach: Floats) -> tuple[Integers, Integers] | None:
        """Pairs (n-th row, m-th column) that may be at a squared distance below the column's reach, or None if many."""
        if self._sketch is None:
            return None
        close = self._sketch.within(rows, self._references[columns], reach[columns])
        if int(np.count_nonzero(close)) > _FEW_PAIRS * close.size:
            return None
        first, second = np.divmod(np.flatnonzero(close), close.shape[1])
        return first, second

    def of_pairs(self, left: Floats, right: Floats, first: Integers, second: Integers) -> Floats:
        """(n,) of the rows `first` of left and `second` of right."""
        exponents: Floats = np.empty(len(first), self.dtype)
        for some in blocks(len(first), 8 * self.columns):  # eighths of a block: both copies stay in the cache
            exponents[some] = np.einsum("ij,ij->i", left[first[some]], right[second[some]])
        return _kernel_of(exponents)


def _kernel_of(exponents: Floats) -> Floats:
    np.minimum(exponents, 0, out=exponents)
    result: Floats = np.exp(exponents, out=exponents)
    return result


class _Pairs:
    """Kernel values of pairs (row, reference), stored row by row: at most as many as make a fifth of the embeddings.

    `full` once there were more: then it holds nothing of use.
    """

    _SHARE = 8  # numbers in the embeddings to one pair
    _ROWS = 2048  # read by the first round before what it found is sorted

    def __init__(self, kernel: _Kernel) -> None:
        most = int(kernel.size * kernel.columns / self._SHARE)  # memory is taken as it fills, not here
        self._starts = np.zeros(kernel.size + 1, dtype=np.int64)
        self._columns = np.empty(most, np.uint16 if kernel.width <= 2**16 else np.int64)
        self._values: Floats = np.empty(most, kernel.dtype)
        self._rows_done = 0
        self.full = False

    def give_up(self) -> None:
        self._columns, self._values, self.full = self._columns[:0].copy(), self._values[:0].copy(), True

    def append(self, size: int, rows: Integers, columns: Integers, values: Floats) -> bool:
        """The pairs of the next `size` rows, `rows` counting from the first of them; False if they do not fit."""
        start, done = self._starts[self._rows_done], self._rows_done
        if start + len(rows) > len(self._columns):
            return False
        order = np.argsort(rows, kind="stable")
        self._columns[start : start + len(rows)] = columns[order]
        self._values[start : start + len(rows)] = values[order]
        self._rows_done += size
        self._starts[done + 1 : done + size + 1] = start + np.cumsum(np.bincount(rows, minlength=size))
        return True

    def of(self, positions: Integers) -> tuple[Integers, NDArray[np.integer[Any]], Floats]:
        """Of these rows: which of them, the reference, the value."""
        starts = self._starts[positions]
        counts = self._starts[positions + 1] - starts
        nth = np.repeat(np.arange(len(positions)), counts)
        places = np.arange(len(nth)) + np.repeat(starts - np.cumsum(counts) + counts, counts)
        return nth, self._columns[places], self._values[places]


class _LazyGains:
    """Upper bounds on what each row would still add; brought up to date only for rows that may be the best.

    A row adds to a reference only if it is closer than whatever covers that reference (`reach`, a squared distance). So
    the kernel is computed where the sketch can not rule that out, and kept where there was something to add: what is
    covered only rises. All that is left out is zero; nothing is approximated.
    """

    _TILE = 1024  # references weighed at once
    _TILE_ROWS = 512  # beside as many rows in the first round: 2 MB
    _FIRST, _LARGEST = 16, 512  # rows brought up to date at once: few when the first guess is right, more when not

    def __init__(self, kernel: _Kernel, weights: Vector, reach: Vector) -> None:
        self._kernel = kernel
        self._weights = weights.astype(kernel.dtype)
        self._reach = reach.astype(kernel.dtype)
        self._covered: Floats = np.exp(-self._reach * kernel.scale)
        self._bounds = np.zeros(kernel.size)
        self._fresh = np.ones(kernel.size, dtype=np.bool_)
        self._pairs = _Pairs(kernel)
        for rows in blocks(kernel.size, _BLOCK // _Pairs._ROWS):
            self._start(rows)

    def best(self, allowed: Booleans) -> tuple[int, float]:
        """The allowed row of the largest gain, and that gain."""
        step = self._FIRST
        while True:
            bounds = np.where(allowed, self._bounds, -1.0)
            best = int(bounds.argmax())
            if self._fresh[best] or bounds[best] <= 0:
                return best, float(bounds[best])
            floor = bounds[self._fresh].max(initial=0.0)
            stale = np.flatnonzero((bounds >= floor) & ~self._fresh)
            if len(stale) > step:
                stale = stale[np.argpartition(-bounds[stale], step)[:step]]
            self._update(stale)
            step = min(2 * step, self._LARGEST)

    def pick(self, position: int) -> None:
        self._fresh[:] = False
        row = np.array([position])
        if not self._pairs.full:
            _, kept, values = self._pairs.of(row)
            self._covered[kept] = np.maximum(self._covered[kept], values)
            return
        left = self._kernel.left(row)[0]
        near = self._kernel.closer(row, slice(0, self._kernel.width), self._reach)
        every: Integers = np.arange(self._kernel.width, dtype=np.int64) if near is None else near[1]
        for some in blocks(len(every), self._kernel.columns):
            columns = every[some]
            exponents = np.minimum(self._kernel.right(columns) @ left, 0)
            self._reach[columns] = np.minimum(self._reach[columns], -exponents / self._kernel.scale)
            self._covered[columns] = np.maximum(self._covered[columns], np.exp(exponents))

    def _update(self, positions: Integers) -> None:
        # Bounds never rise, so rounding can not make a row look better than it was.
        self._bounds[positions] = np.minimum(self._bounds[positions], self._gains(positions))
        self._fresh[positions] = True

    def _start(self, rows: slice) -> None:
        """The first bounds of some thousand rows, and their pairs."""
        left = self._kernel.left(rows)
        found: list[tuple[Integers, Integers, Floats]] = []
        for columns in blocks(self._kernel.width, _BLOCK // self._TILE):
            right = self._kernel.right(columns)
            for part in blocks(len(left), _BLOCK // self._TILE_ROWS):
                some = slice(rows.start + part.start, rows.start + part.stop)
                near = self._kernel.closer(some, columns, self._reach)
                if near is None:
                    self._bounds[some] += self._added_by_all(left[part], columns, right)
                    self._give_up()
                    continue
                values = self._kernel.of_pairs(left[part], right, *near)
                more = values > self._covered[columns][near[1]]
                pairs = near[0][more], near[1][more] + columns.start, values[more]
                self._bounds[some] += self._added_by(len(self._bounds[some]), *pairs)
                if not self._pairs.full:
                    found.append((pairs[0] + part.start, *pairs[1:]))
        if not self._pairs.full:
            first, second, near_values = (np.concatenate(one) for one in zip(*found, strict=True))
            if not self._pairs.append(len(left), first, second, near_values):
                self._give_up()

    def _give_up(self) -> None:
        """Too many pairs to keep: from now on they are computed when needed, from references that are kept instead."""
        if not self._pairs.full:
            self._pairs.give_up()
            self._kernel.hold()

    def _gains(self, positions: Integers) -> Vector:
        """(n,) what these rows would add now."""
        if not self._pairs.full:
            return self._added_by(len(positions), *self._pairs.of(positions))
        left = self._kernel.left(positions)
        gains = np.zeros(len(positions))
        for columns in blocks(self._kernel.width, _BLOCK // self._TILE):
            near = self._kernel.closer(positions, columns, self._reach)
            right = self._kernel.right(columns)
            if near is None:
                gains += self._added_by_all(left, columns, right)
            else:
                values = self._kernel.of_pairs(left, right, *near)
                gains += self._added_by(len(left), near[0], near[1] + columns.start, values)
        return gains

    def _added_by(self, size: int, rows: Integers, columns: NDArray[np.integer[Any]], values: Floats) -> Vector:
        """(size,) what pairs add to what is covered, summed by row."""
        added = np.maximum(values - self._covered[columns], 0) * self._weights[columns]
        sums: Vector = np.bincount(rows, added, minlength=size).astype(np.float64)
        return sums

    def _added_by_all(self, left: Floats, columns: slice, right: Floats) -> Vector:
        values = _kernel_of(left @ right.T)
        values -= self._covered[columns]
        added: Vector = np.maximum(values, 0, out=values) @ self._weights[columns]
        return added


# --- near-duplicates -------------------------------------------------------------------------------------------


def near_duplicate_groups(embeddings: ArrayLike, threshold: float = 0.99) -> Integers:
    """Connected components of "cosine > threshold": if a is like b and b like c, all three are one group.

    Args: embeddings (N, D); threshold in [-1, 1]; 1 groups nothing, as no cosine exceeds it. A zero row has no
        direction and is alone.
    Returns: (N,) group ids 0, 1, 2... numbered by first appearance; an empty pool gives (0,).
    Raises: InputInvalid for NaN, wrong shape or another threshold.
    Memory: blocks of a million cosines; time O(N^2 D), in large pools mostly O(N^2 32) (see `_Sketch`).
    """
    limit = _threshold(threshold)
    points = as_embeddings(embeddings)
    groups = np.arange(len(points))
    if limit >= 1:
        return groups
    work = _Arithmetic(points, unit=True, centre=False)
    sketch = _Sketch(points, work) if work.dtype == np.float32 else None
    side = math.isqrt(_BLOCK)
    for row in range(0, len(points), side):
        for column in range(row, len(points), side):
            rows, columns = slice(row, row + side), slice(column, column + side)
            first, second = _close_pairs(points, work, sketch, groups, limit, rows, columns)
            if len(first):
                groups = _joined(groups, first, second)
    return _numbered_by_appearance(groups)


def near_duplicates_of_labelled(embeddings: ArrayLike, labelled: ArrayLike, threshold: float = 0.99) -> Booleans:
    """(N, D), (L, D) -> (N,) whether a row's cosine with any labelled row exceeds the threshold."""
    limit = _threshold(threshold)
    points = as_embeddings(embeddings)
    others = _beside(points, labelled, "labelled")
    result = np.zeros(len(points), dtype=np.bool_)
    if limit >= 1 or not len(points):
        return result
    work = _Arithmetic(points, others, unit=True, centre=False)
    targets = work(others).T
    for rows in blocks(len(points), max(len(others), points.shape[1])):
        result[rows] = (work(points[rows]) @ targets > limit).any(axis=1)
    return result


class _Sketch:
    """Upper bounds on the products of rows, from the few directions in which rows differ most.

    Each row is its coordinates along them and the length of what is left of it: by Cauchy-Schwarz the product of two
    such short rows is at least that of the rows themselves. An eighth of the work rules out most pairs of a pool.
    """

    _WIDTH = 32
    _SAMPLE = 4096

    def __init__(self, points: Floats, work: _Arithmetic) -> None:
        sample = work(_spread(points, self._SAMPLE))
        # any orthonormal directions give true bounds; these give close ones
        vectors = np.linalg.eigh((sample.T @ sample).astype(np.float64))[1]
        directions = vectors[:, ::-1][:, : self._WIDTH - 1].astype(np.float32)
        self.rows = np.empty((len(points), directions.shape[1] + 1), np.float32)
        self.squares = np.empty(len(points), np.float32)
        del sample
        for rows in blocks(len(points), 4 * max(points.shape[1], 1)):
            part = work(points[rows])
            along = part @ directions
            squares = self.squares[rows] = _squares(part)
            left = np.maximum(squares - _squares(along), 0) + np.float32(_SKETCH_ROUNDING) * squares
            self.rows[rows, :-1] = along
            self.rows[rows, -1] = np.sqrt(left)

    def within(self, rows: Integers | slice, columns: Integers, reach: Floats) -> Booleans:
        """Pairs whose squared distance may be below the column's reach; that of the others is not."""
        shrink = np.float32(1 - _SKETCH_ROUNDING)
        left = np.column_stack([self.rows[rows], shrink * self.squares[rows]])
        right = np.column_stack([self.rows[columns], np.full(len(columns), -0.5, np.float32)])
        result: Booleans = left @ right.T > (shrink * self.squares[columns] - reach) / 2
        return result

    def above(self, rows: slice, columns: slice, limit: float) -> Booleans:
        """Pairs of rows of unit length whose cosine may exceed the limit; the others do not."""
        result: Booleans = self.rows[rows] @ self.rows[columns].T > limit - _SKETCH_ROUNDING
        return result

    def closer(self, centre: int, squares: Floats, nearest: Floats) -> Integers | slice:
        """Rows whose squared distance to a row may be below `nearest`, or all when those are many."""
        bounds = squares + squares[centre]
        bounds *= np.float32(1 - _SKETCH_ROUNDING)
        bounds -= 2 * (self.rows @ self.rows[centre])
        positions = np.flatnonzero(bounds < nearest)
        return positions if 8 * len(positions) < len(nearest) else slice(None)


def _close_pairs(
    points: Floats,
    work: _Arithmetic,
    sketch: _Sketch | None,
    groups: Integers,
    limit: float,
    rows: slice,
    columns: slice,
) -> tuple[Integers, Integers]:
    """Rows of the pool, pairwise, with a cosine above the limit; pairs of one group may be left out."""
    if sketch is not None:
        close = sketch.above(rows, columns, limit)
        count = int(np.count_nonzero(close))
        if count <= _FEW_PAIRS * close.size:
            first, second = np.divmod(np.flatnonzero(close), close.shape[1])
            first, second = first + rows.start, second + columns.start
            apart = groups[first] != groups[second]
            return _confirmed(points, work, first[apart], second[apart], limit)
    first, second = np.nonzero(work(points[rows]) @ work(points[columns]).T > limit)
    return first + rows.start, second + columns.start


def _confirmed(
    points: Floats, work: _Arithmetic, first: Integers, second: Integers, limit: float
) -> tuple[Integers, Integers]:
    close = np.zeros(len(first), dtype=np.bool_)
    for pairs in blocks(len(first), points.shape[1]):
        cosines = np.einsum("ij,ij->i", work(points[first[pairs]]), work(points[second[pairs]]))
        close[pairs] = cosines > limit
    return first[close], second[close]


def unit_rows(embeddings: Floats) -> Floats:
    """(N, D) with each row divided by its length; a row of zeros stays zero."""
    lengths = np.sqrt(np.einsum("ij,ij->i", embeddings, embeddings, dtype=np.float64))[:, None]
    result: Floats = np.divide(embeddings, lengths, where=lengths > 0, out=np.zeros(embeddings.shape, embeddings.dtype))
    return result


def _threshold(threshold: float) -> float:
    return float(as_vector([threshold], "threshold", 1, -1.0, 1.0)[0])


def _joined(groups: Integers, first: Integers, second: Integers) -> Integers:
    one, other = groups[first], groups[second]
    apart = one != other
    if not apart.any():
        return groups
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = len(groups)
    edges = coo_array((np.ones(int(apart.sum()), dtype=np.bool_), (one[apart], other[apart])), shape=(size, size))
    labels = connected_components(edges, directed=False)[1].astype(np.int64)
    result: Integers = labels[groups]
    return result


def _numbered_by_appearance(groups: Integers) -> Integers:
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    numbers = np.empty(len(first), dtype=np.int64)
    numbers[np.argsort(first)] = np.arange(len(first))
    return numbers[inverse]


# --- arithmetic ------------------------------------------------------------------------------------------------


class _Arithmetic:
    """Rows as they are computed with: small inputs in float64, where small examples are exact; large ones in float32.

    |x|^2 - 2xy + |y|^2 loses digits when all points lie far from 0 and near each other; distances do not change when
    the points move, so in float32 they move by `middle`, about the mean of the first matrix. Cosines do change:
    `centre=False` for those. Rows are made when asked for: a second copy of a large pool is what memory is spent on.
    """

    def __init__(self, *matrices: Floats, unit: bool = False, centre: bool = True) -> None:
        small = sum(matrix.size for matrix in matrices) <= _SMALL
        self.dtype: type[np.floating[Any]] = np.float64 if small else np.float32
        self._unit = unit
        self.middle: Floats = np.zeros(matrices[0].shape[1], self.dtype)
        self._centred = False
        if centre and not small and len(matrices[0]):
            self.middle = self(_spread(matrices[0], 4096)).mean(axis=0, dtype=np.float64).astype(np.float32)
            self._centred = True

    def __call__(self, rows: Floats) -> Floats:
        """(n, D), or one row (D,), of a matrix -> the same, scaled to unit length if so wished, around the middle."""
        part = unit_rows(rows) if self._unit else rows
        if self._centred:
            part = part - self.middle
        return part.astype(self.dtype, copy=False)

    def squares(self, rows: Floats) -> Floats:
        """(N, D) -> (N,) squared lengths."""
        result: Floats = np.empty(len(rows), self.dtype)
        for some in blocks(len(rows), rows.shape[1] if len(rows) else 1):
            result[some] = _squares(self(rows[some]))
        return result


def _spread(matrix: Floats, count: int) -> Floats:
    """At most `count` rows, evenly from the whole matrix."""
    return matrix[:: -(-len(matrix) // count) or 1]


def _squares(matrix: Floats) -> Floats:
    result: Floats = np.einsum("ij,ij->i", matrix, matrix)
    return result


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of a matrix that has `width` numbers in a row, each small enough for a core's cache."""
    step = max(1, _BLOCK // max(width, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
