"""Timing of calls on a GPU in milliseconds, as CUDA graphs or as plain calls. Several are replayed in turn,
so that a change of the GPU's clock affects all of them."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], Any]


class Graph(Protocol):
    def replay(self) -> Any: ...


@dataclass
class Plain:
    """A call that is run directly."""

    replay: Call


def warmed(call: Call) -> Graph:
    """The plain call, after a few runs that compile it."""
    for _ in range(3 if torch.cuda.is_available() else 1):
        call()
    return Plain(call)


def captured(call: Call) -> Graph:
    """The call as a CUDA graph, after a few runs that compile it; without a GPU the plain call."""
    if not torch.cuda.is_available():
        return warmed(call)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def median_times(graphs: dict[str, Graph], repetitions: int) -> dict[str, float]:
    """The median milliseconds of a replay of each graph, replayed in turn."""
    if not torch.cuda.is_available():
        spent = {}
        for name, graph in graphs.items():
            begun = time.perf_counter()
            graph.replay()
            spent[name] = 1e3 * (time.perf_counter() - begun)
        return spent
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repetitions):
        for name, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop))
    return {name: statistics.median(t[2:]) for name, t in times.items()}
