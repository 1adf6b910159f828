"""Times of things that are measured side by side: interleaved rounds, medians, ratios by pair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

LEAST_P90, LEAST_P99 = 64, 662
"""Queries from which a percentile says anything: MLPerf's floors."""


@dataclass
class Times:
    """What calls took.

    Attributes:
        wall: milliseconds of each.
        cpu: milliseconds of all threads of this process, of each; empty for other processes.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, call: Callable[[], Any]) -> Any:
        """Time one call and return what it returned."""
        wall, cpu = time.perf_counter(), time.process_time()
        found = call()
        self.wall.append((time.perf_counter() - wall) * 1e3)
        self.cpu.append((time.process_time() - cpu) * 1e3)
        return found

    def facts(self) -> dict[str, float]:
        """Count, median, spread, and the percentiles that the count allows."""
        ordered = sorted(self.wall)
        found = {
            "n": len(ordered),
            "min": ordered[0],
            "p50": statistics.median(ordered),
        }
        if self.cpu:
            found["cpu_p50"] = statistics.median(self.cpu)
        for name, share, least in (("p90", 0.90, LEAST_P90), ("p99", 0.99, LEAST_P99)):
            if len(ordered) >= least:
                found[name] = ordered[min(len(ordered) - 1, int(share * len(ordered)))]
        return found

    @property
    def p50(self) -> float:
        """Median of the wall times, in milliseconds."""
        return statistics.median(self.wall)


def interleaved(
    peers: Mapping[str, Callable[[int], Any]], rounds: int, *, warmup: int = 2
) -> dict[str, Times]:
    """Call each peer once a round, in an order that turns by one each round.

    Args:
        peers: by name; each takes the number of the round, to choose its input by.
        rounds: that count.
        warmup: rounds before them, which don't.
    """
    names = [*peers]
    times = {name: Times() for name in names}
    for turn in range(-warmup, rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            into = times[name] if turn >= 0 else Times()
            into.add(lambda peer=peers[name], number=turn % rounds: peer(number))
    return times


def ratio(first: Times, second: Times) -> float:
    """How many times as long the first took: the median over rounds of each pair's ratio."""
    return statistics.median(a / b for a, b in zip(first.wall, second.wall, strict=True))
