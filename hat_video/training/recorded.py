"""A training step that a GPU is given at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["RecordedGradients"]

_WARM_UP = 3
"""Batches before it is recorded: libraries choose their algorithms, and caches fill, at the first."""


class RecordedGradients:
    """Computes a loss and its gradients, recorded once as a CUDA graph and played back from then on.

    A small network is a thousand kernels of some microseconds each, and a CPU takes longer to queue them one by one
    than a GPU to compute them. A recording is queued at once, and computes the same.

    Args:
        compute: fills the parameters' `grad`, which are None before, and returns the loss, a scalar on the GPU. It must
            do the same for every batch, and wait for nothing.
        forget: sets every `grad` to None.

    Source: "Whole-network capture", notes on CUDA graphs of PyTorch.
    """

    def __init__(self, compute: Callable[[Sequence[Tensor]], Tensor], forget: Callable[[], None]) -> None:
        self._compute, self._forget = compute, forget
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._seen = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._loss: Tensor

    def __call__(self, batch: Sequence[Tensor]) -> Tensor:
        """The loss of a batch of tensors, on any device, whose shapes and dtypes are those of the first."""
        if self._seen < _WARM_UP:
            self._seen += 1
            return self._first(batch)
        if self._graph is None:
            self._record(batch)
        assert self._graph is not None
        for kept, part in zip(self._inputs, batch, strict=True):
            kept.copy_(part, non_blocking=True)
        self._graph.replay()
        return self._loss.clone()

    def _first(self, batch: Sequence[Tensor]) -> Tensor:
        """Not recorded, but on the stream that will be."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._forget()
            loss = self._compute([part.to("cuda", non_blocking=True) for part in batch])
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _record(self, batch: Sequence[Tensor]) -> None:
        self._inputs = tuple(torch.empty_like(part, device="cuda") for part in batch)
        # What is found as None is written anew at each playing, and not added to.
        self._forget()
        self._graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the loader's pins memory meanwhile, which would spoil a recording of all of them.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._loss = self._compute(self._inputs)
