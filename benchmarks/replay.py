"""Work on a device, recorded once and replayed: what its kernels take, without the host's launches.

On CUDA a graph, timed by events; elsewhere the work is simply called, so that what uses this can be
rehearsed without a GPU.
"""

import time
from collections.abc import Callable

import torch

_WARM_UPS = 3
"""Runs before the recording: programs are compiled in the first."""


class Replay:
    """One piece of work.

    Args:
        work: What is done; the same tensors every time, and no look of the host at any of them.
        device: Where.
    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work = work
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            return
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream(device).wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            work()

    def seconds(self) -> float:
        """Runs it once."""
        if self._graph is None:
            started = time.perf_counter()
            self._work()
            return time.perf_counter() - started
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        self._graph.replay()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3
