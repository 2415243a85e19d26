"""Cores for branches that run side by side, so that they end together (arXiv 2510.14686, section 4.1).

A branch that holds x cube and y vector cores takes T = fixed + T_cube(x) + T_vector(y); where work divides evenly,
T(x) = W / (gamma x). Its operators run one after the other, so an operator is a branch with work on one unit. The
objective is min max |T_i - T_j| over all pairs, with at least one core where there is work and no more cores than there
are. Alone it would accept that everybody waits (all on one core may be perfectly even), so it is sought among the
allocations within ``slack`` of the shortest.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

_Point = tuple[int, int, float]
"""Cube cores, vector cores, seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    name: str
    cube_s: tuple[float, ...] = ()
    """Seconds of its cube work on 1, 2, ... cores, as many entries as there are cores; empty where it has none."""
    vector_s: tuple[float, ...] = ()
    fixed_s: float = 0.0
    """What takes as long on any number of cores."""

    def __post_init__(self) -> None:
        if min((self.fixed_s, *self.cube_s, *self.vector_s)) < 0:
            raise ValueError(f"branch {self.name} has negative times")

    def seconds(self, cube: int, vector: int) -> float:
        """On so many cores of either; at least one where there is work."""
        total = self.fixed_s
        for times, cores in ((self.cube_s, cube), (self.vector_s, vector)):
            if times:
                total += times[cores - 1]
        return total


def divided(core_s: float, cores: int) -> tuple[float, ...]:
    """Times of work that divides evenly: W / (gamma x), ``core_s`` being W / gamma."""
    return tuple(core_s / x for x in range(1, cores + 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    cores: tuple[tuple[int, int], ...]
    """(cube, vector) of each branch; 0 of a unit it has no work for."""
    seconds: tuple[float, ...]

    @property
    def makespan(self) -> float:
        return max(self.seconds)

    @property
    def spread(self) -> float:
        return max(self.seconds) - min(self.seconds)


def balance_cores(branches: Sequence[Branch], cube_cores: int, vector_cores: int, *, slack: float = 0.05) -> Allocation:
    """The allocation of least spread within (1 + slack) of the least makespan; of equals, the shortest. Exact.

    ``slack`` inf is the objective alone. Raises ValueError when there are more branches with work on a unit than it has
    cores.
    """
    for unit, tables, cores in (
        ("cube", [branch.cube_s for branch in branches if branch.cube_s], cube_cores),
        ("vector", [branch.vector_s for branch in branches if branch.vector_s], vector_cores),
    ):
        if len(tables) > cores:
            raise ValueError(f"{len(tables)} branches have {unit} work, there are {cores} {unit} cores")
        if any(len(table) != cores for table in tables):
            raise ValueError(f"a branch has {unit} times for another number of cores than {cores}")
    if not branches or slack < 0:
        raise ValueError(f"slack={slack} must be at least 0, and there must be a branch")
    points = [_points(branch, cube_cores, vector_cores) for branch in branches]
    limit = _least_makespan(points, cube_cores, vector_cores) * (1 + slack)
    return _least_spread([[p for p in each if p[2] <= limit] for each in points], cube_cores, vector_cores)


def _points(branch: Branch, cube_cores: int, vector_cores: int) -> list[_Point]:
    """Every allocation the branch can have, fastest first."""
    cubes = range(1, cube_cores + 1) if branch.cube_s else (0,)
    vectors = range(1, vector_cores + 1) if branch.vector_s else (0,)
    found = [(x, y, branch.seconds(x, y)) for x in cubes for y in vectors]
    return sorted(found, key=lambda point: point[2])


def _least_makespan(points: Sequence[Sequence[_Point]], cube_cores: int, vector_cores: int) -> float:
    candidates = sorted({seconds for each in points for _, _, seconds in each})

    def is_feasible(limit: float) -> bool:
        # used[x]: fewest vector cores with which the branches so far end in time on x cube cores.
        used = {0: 0}
        for each in points:
            cheapest: dict[int, int] = {}
            for x, y, seconds in each:
                if seconds > limit:
                    break
                cheapest[x] = min(y, cheapest.get(x, y))
            merged: dict[int, int] = {}
            for x, y in used.items():
                for more_x, more_y in cheapest.items():
                    if x + more_x <= cube_cores and y + more_y <= vector_cores:
                        merged[x + more_x] = min(y + more_y, merged.get(x + more_x, vector_cores))
            used = merged
        return bool(used)

    return candidates[bisect.bisect_left(candidates, True, key=is_feasible)]


def _least_spread(points: Sequence[Sequence[_Point]], cube_cores: int, vector_cores: int) -> Allocation:
    """Branch and bound over the branches in order: a partial choice is left once its own spread is no better, or the
    branches to come cannot have their fewest cores."""
    least_x = [min(x for x, _, _ in each) for each in points]
    least_y = [min(y for _, y, _ in each) for each in points]
    best: list[tuple[float, float, tuple[_Point, ...]]] = []

    def extend(chosen: tuple[_Point, ...], x: int, y: int, low: float, high: float) -> None:
        if best and (high - low, high) >= best[0][:2]:
            return
        at = len(chosen)
        if at == len(points):
            best[:] = [(high - low, high, chosen)]
            return
        x_left, y_left = x - sum(least_x[at + 1 :]), y - sum(least_y[at + 1 :])
        for point in points[at]:
            if point[0] <= x_left and point[1] <= y_left:
                extend((*chosen, point), x - point[0], y - point[1], min(low, point[2]), max(high, point[2]))

    for first in points[0]:
        extend((first,), cube_cores - first[0], vector_cores - first[1], first[2], first[2])
    _, _, chosen = best[0]
    return Allocation(cores=tuple((x, y) for x, y, _ in chosen), seconds=tuple(seconds for _, _, seconds in chosen))
