"""CUDA graphs that share their memory: those that read prompts, of which one runs at a time."""

from collections.abc import Callable
from weakref import WeakSet

import torch


class Recorder:
    """Work as CUDA graphs that never run at the same time, so that they share a stream and their memory."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """`work` once to compile what is not compiled yet, then as a graph: a function that launches it.

        Kernels with memory of their own keep it by the stream, so a graph always runs on the stream that it
        was captured on, after what the caller's stream was given before and before what it is given next.
        """
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        stream, graph = self._stream, torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            work()
            stream.synchronize()
        other = next(iter(self._graphs), None)
        with torch.cuda.graph(graph, pool=None if other is None else other.pool(), stream=stream):
            work()
        self._graphs.add(graph)

        def replay() -> None:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                graph.replay()
            torch.cuda.current_stream(device).wait_stream(stream)

        return replay
