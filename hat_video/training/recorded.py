"""A training step that a GPU is given at once."""

from __future__ import annotations

from collections.abc import Callable

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
        compute: of (HR, LR), sets every `grad` to None, fills them, and returns the loss, a scalar. It must do the same
            for every pair, wait for nothing, and read no tensor that may be freed meanwhile. A `grad` that is None when
            it is recorded is written anew at each playing, and not added to.
        device: the GPU.

    Source: "Whole-network capture", notes on CUDA graphs of PyTorch.
    """

    def __init__(self, compute: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> None:
        self._compute, self._device = compute, device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._seen = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._hr: Tensor
        self._lr: Tensor
        self._loss: Tensor

    def __call__(self, hr: Tensor, lr: Tensor) -> Tensor:
        """The loss of a pair on the GPU, of the first one's shapes and dtypes."""
        with torch.cuda.device(self._device):
            if self._seen < _WARM_UP:
                self._seen += 1
                return self._first(hr, lr)
            if self._graph is None:
                self._graph = self._recorded(hr, lr)
            self._hr.copy_(hr)
            self._lr.copy_(lr)
            self._graph.replay()
            return self._loss.clone()

    def _first(self, hr: Tensor, lr: Tensor) -> Tensor:
        """Not recorded, but on the stream that will be."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self._compute(hr, lr)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _recorded(self, hr: Tensor, lr: Tensor) -> torch.cuda.CUDAGraph:
        self._hr, self._lr = torch.empty_like(hr), torch.empty_like(lr)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the loader's pins memory meanwhile, which would spoil a recording of all of them.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._loss = self._compute(self._hr, self._lr)
        return graph
