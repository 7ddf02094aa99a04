# SPDX-License-Identifier: Apache-2.0
"""Weighted k-means of many short rows of numbers at once, in one dimension.

In one dimension the clusters of an optimal solution are runs of the sorted points, so a solution is a row of
*bounds* 0 = b_0 <= b_1 <= ... <= b_C = S: cluster c holds points b_c to b_{c+1} - 1. With prefix sums W_i of the
weights and M_i of weight * value, replacing a run by its mean leaves

    sum_j w_j (x_j - mean)^2 = sum_j w_j x_j^2 - gain(i, j),   gain(i, j) = (M_j - M_i)^2 / (W_j - W_i)

so that minimising the error is maximising a sum of gains, and every step below costs a few look-ups per cluster
instead of a pass over the points. All rows are handled together; there is no loop over rows.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = [
    "SortedRows",
    "coarse_bounds",
    "companded_bounds",
    "exact_bounds",
    "improve_bounds",
    "lloyd_bounds",
    "total_gain",
]

# Weights are scaled to mean 1, so this only keeps the gain of a run without weight at zero.
NO_WEIGHT = 1e-20
# Pairs of bounds looked at together: temporaries of 4 MB stay in the cache of a CPU, those of 256 MB fill a GPU.
MAX_PAIRS = 2**19
MAX_PAIRS_CUDA = 2**25
# Asking a GPU whether anything still changes waits for it, which costs more than a few rounds that change nothing.
ROUNDS_PER_LOOK_CUDA = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SortedRows:
    """Rows of sorted points with prefix sums, in float64.

    Args:
        points: Ascending, [R, S].
        weights: Prefix sums of the weights, [R, S + 1].
        moments: Prefix sums of weight * point, [R, S + 1].
    """

    points: Float[Tensor, "R S"]
    weights: Float[Tensor, "R sums"]
    moments: Float[Tensor, "R sums"]

    @classmethod
    def of(cls, values: Float[Tensor, "R S"], importance: Float[Tensor, "R S"]) -> "SortedRows":
        """Sort the values; a row of zero importance counts every value once.

        Each row's importance is divided by its mean first: squared gradients may be as small as 1e-20.
        """
        mean_R1 = importance.double().mean(dim=1, keepdim=True)
        weight_RS = torch.where(mean_R1 > 0, importance.double() / mean_R1, torch.ones_like(mean_R1))
        points_RS, order_RS = values.double().sort(dim=1, stable=True)
        weight_RS = weight_RS.gather(1, order_RS)
        zero_R1 = torch.zeros_like(mean_R1)
        return cls(
            points=points_RS,
            weights=torch.cat([zero_R1, weight_RS.cumsum(dim=1)], dim=1),
            moments=torch.cat([zero_R1, (weight_RS * points_RS).cumsum(dim=1)], dim=1),
        )

    def at(self, rows: Int64[Tensor, " _"]) -> "SortedRows":
        """Return some of the rows."""
        return SortedRows(points=self.points[rows], weights=self.weights[rows], moments=self.moments[rows])

    def centroids(
        self, bounds: Int64[Tensor, "R bounds"], otherwise: Float[Tensor, "R C"] | None = None
    ) -> Float[Tensor, "R C"]:
        """Return the weighted mean of each cluster; one without weight keeps `otherwise`, or takes a neighbour's.

        Without `otherwise` the result is ascending.
        """
        weight_RC, moment_RC = (
            self.weights.gather(1, bounds).diff(dim=1),
            self.moments.gather(1, bounds).diff(dim=1),
        )
        has_weight_RC = weight_RC > NO_WEIGHT
        mean_RC = moment_RC / torch.where(has_weight_RC, weight_RC, torch.ones_like(weight_RC))
        if otherwise is not None:
            return torch.where(has_weight_RC, mean_RC, otherwise)
        mean_RC = torch.where(has_weight_RC, mean_RC, torch.full_like(mean_RC, -torch.inf)).cummax(dim=1).values
        first_R1 = torch.where(mean_RC.isinf(), torch.full_like(mean_RC, torch.inf), mean_RC).amin(1, keepdim=True)
        return torch.maximum(mean_RC, first_R1)


def total_gain(rows: SortedRows, bounds: Int64[Tensor, "R bounds"]) -> Float[Tensor, " R"]:
    """Return the sum of gains of the clusters; the larger, the smaller the error."""
    weight_RC, moment_RC = rows.weights.gather(1, bounds).diff(dim=1), rows.moments.gather(1, bounds).diff(dim=1)
    return (moment_RC.square() / (weight_RC + NO_WEIGHT)).sum(dim=1)


def lloyd_bounds(rows: SortedRows, centroids: Float[Tensor, "R C"], num_rounds: int) -> Int64[Tensor, "R bounds"]:
    """Alternate between nearest centroids and means, from ascending centroids; the error never rises.

    Stops after `num_rounds`, or when no row changes.
    """
    num_rows, num_points = rows.points.shape
    ends = torch.tensor([0, num_points], device=centroids.device).expand(num_rows, 2)
    bounds = torch.zeros(0, dtype=torch.int64, device=centroids.device)
    for round_index in range(num_rounds):
        limits_RC = ((centroids[:, 1:] + centroids[:, :-1]) / 2).contiguous()
        inner = torch.searchsorted(rows.points, limits_RC)
        moved = torch.cat([ends[:, :1], inner, ends[:, 1:]], dim=1)
        if _looks(round_index, moved) and torch.equal(moved, bounds):
            break
        bounds, centroids = moved, rows.centroids(moved, centroids)
    return bounds


def improve_bounds(
    rows: SortedRows, bounds: Int64[Tensor, "R bounds"], *, reach: int = 16, num_rounds: int = 20
) -> Int64[Tensor, "R bounds"]:
    """Move all bounds of a row at once to the best places within `reach` points, until nothing improves.

    Dynamic programming over windows around the bounds: a step of Lloyd moves each bound for fixed centroids and
    stops in many places that this does not.
    """
    bounds, active = bounds.clone(), torch.arange(len(bounds), device=bounds.device)
    part = rows
    for round_index in range(num_rounds):
        before = bounds[active]
        moved = _best_in_windows(part, before, reach)
        is_better = total_gain(part, moved) > total_gain(part, before)
        bounds[active] = torch.where(is_better[:, None], moved, before)
        if _looks(round_index, bounds):
            active = active[is_better]
            if active.numel() == 0:
                break
            part = rows.at(active)
    return bounds


def _looks(round_index: int, tensor: Tensor) -> bool:
    """Whether this round asks what still changes. Rows that do not change in one round change in none after it."""
    return not tensor.is_cuda or round_index % ROUNDS_PER_LOOK_CUDA == ROUNDS_PER_LOOK_CUDA - 1


def _best_in_windows(rows: SortedRows, bounds: Int64[Tensor, "R bounds"], reach: int) -> Int64[Tensor, "R bounds"]:
    """Return the best bounds of which each lies within `reach` of where it was."""
    num_points = rows.points.shape[1]
    steps = torch.arange(-reach, reach + 1, device=bounds.device)
    places = (bounds[:, 1:-1, None] + steps).clamp(0, num_points)
    places = torch.cat([places, torch.full_like(places[:, :1], num_points)], dim=1)
    flat = places.flatten(1)
    weight, moment = (sums.gather(1, flat).view(places.shape) for sums in (rows.weights, rows.moments))
    best, choices = moment[:, 0].square() / (weight[:, 0] + NO_WEIGHT), []
    for index in range(1, places.shape[1]):
        run = (moment[:, index, :, None] - moment[:, index - 1, None, :]).square_()
        run /= (weight[:, index, :, None] - weight[:, index - 1, None, :]).add_(NO_WEIGHT)
        run.masked_fill_(places[:, index, :, None] < places[:, index - 1, None, :], -torch.inf)
        best, choice = run.add_(best[:, None, :]).max(dim=2)
        choices.append(choice)
    where = torch.zeros_like(bounds[:, :1])  # every place of the last bound is the end of the row
    inner = []
    for index, choice in reversed(list(enumerate(choices))):
        where = choice.gather(1, where)
        inner.append(places[:, index].gather(1, where))
    return torch.cat([bounds[:, :1], *reversed(inner), bounds[:, -1:]], dim=1)


def exact_bounds(rows: SortedRows, num_clusters: int) -> Int64[Tensor, "R bounds"]:
    """Return the bounds with the smallest error of all."""
    return _best_chain(rows.weights, rows.moments, num_clusters)


def coarse_bounds(rows: SortedRows, num_clusters: int, num_runs: int) -> Int64[Tensor, "R bounds"]:
    """Return the best bounds among those that do not split any of `num_runs` runs of points."""
    edges = companded_bounds(rows, num_runs)
    chain = _best_chain(rows.weights.gather(1, edges), rows.moments.gather(1, edges), num_clusters)
    return edges.gather(1, chain)


def companded_bounds(rows: SortedRows, num_runs: int) -> Int64[Tensor, "R bounds"]:
    """Return bounds whose runs have equal shares of weight^(1/3) * gap^(2/3), a gap being that of neighbours.

    The limit of many clusters: the best density of centroids is the cube root of weight times density of points.

    References:
        Panter and Dite, 1951, Quantization distortion in pulse-count modulation.
    """
    gap_RS = torch.zeros_like(rows.points)
    step = rows.points.diff(dim=1)
    gap_RS[:, 1:] += step
    gap_RS[:, :-1] += step
    sums_RS = (rows.weights.diff(dim=1).clamp(min=0).pow(1 / 3) * gap_RS.pow(2 / 3)).cumsum(dim=1)
    shares = torch.arange(1, num_runs, device=sums_RS.device, dtype=sums_RS.dtype) / num_runs
    inner = torch.searchsorted(sums_RS, sums_RS[:, -1:] * shares) + 1
    num_points = rows.points.shape[1]
    ends = torch.tensor([0, num_points], device=inner.device).expand(len(inner), 2)
    return torch.cat([ends[:, :1], inner.clamp(max=num_points), ends[:, 1:]], dim=1)


def _best_chain(
    weights: Float[Tensor, "R sums"], moments: Float[Tensor, "R sums"], num_clusters: int
) -> Int64[Tensor, "R bounds"]:
    """Return the bounds, as positions among the prefix sums, with the largest sum of gains.

    best_c(j) = max over i <= j of best_{c-1}(i) + gain(i, j), for c = 2 .. C and every j. The maximising i never
    falls as j rises (the gain satisfies the quadrangle inequality), so those at a few j confine all between them.

    References:
        Wang and Song, 2011, Ckmeans.1d.dp; Gronlund et al., 2017, arXiv:1701.07204, section 2.
    """
    num_rows, num_sums = weights.shape
    stride = max(2, round((2 * num_sums) ** 0.5))
    max_pairs = MAX_PAIRS_CUDA if weights.is_cuda else MAX_PAIRS
    chunk = max(1, max_pairs // (num_sums * (num_sums // stride + 2)))
    parts = []
    for start in range(0, num_rows, chunk):
        weight, moment = weights[start : start + chunk], moments[start : start + chunk]
        best, choices = moment.square() / (weight + NO_WEIGHT), []
        for _ in range(1, num_clusters):
            best, choice = _add_cluster(weight, moment, best, stride)
            choices.append(choice)
        bounds = [torch.full((len(weight), 1), num_sums - 1, device=weight.device)]
        for choice in reversed(choices):
            bounds.append(choice.gather(1, bounds[-1]))
        bounds.append(torch.zeros_like(bounds[0]))
        parts.append(torch.cat(bounds[::-1], dim=1))
    return torch.cat(parts)


def _add_cluster(
    weight: Float[Tensor, "R sums"], moment: Float[Tensor, "R sums"], best: Float[Tensor, "R sums"], stride: int
) -> tuple[Float[Tensor, "R sums"], Int64[Tensor, "R sums"]]:
    """Return best_c and its maximising i from best_{c-1}, for every end of the last cluster."""
    num_sums = weight.shape[1]
    result, choice = torch.empty_like(best), torch.empty(best.shape, dtype=torch.int64, device=best.device)

    def fill(ends: Int64[Tensor, " J"], low: int, high: int) -> None:
        run = (moment[:, ends, None] - moment[:, None, low:high]).square_()
        run /= (weight[:, ends, None] - weight[:, None, low:high]).add_(NO_WEIGHT)
        starts = torch.arange(low, high, device=ends.device)
        run.add_(best[:, None, low:high]).masked_fill_(starts > ends[:, None], -torch.inf)
        result[:, ends], found = run.max(dim=2)
        choice[:, ends] = found + low

    anchors = [*range(0, num_sums - 1, stride), num_sums - 1]
    fill(torch.tensor(anchors, device=best.device), 0, num_sums)
    found = choice[:, anchors]
    lowest, highest = torch.stack([found.amin(dim=0), found.amax(dim=0)]).tolist()
    for index, (first, last) in enumerate(pairwise(anchors)):
        if last - first > 1:
            ends = torch.arange(first + 1, last, device=best.device)
            fill(ends, lowest[index], highest[index + 1] + 1)
    return result, choice
