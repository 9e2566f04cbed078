"""Batches on their way to a GPU, beside the work that it does."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Sent = tuple[Tensor, "torch.cuda.Event | None"]


def sent(batches: Iterator[Tensor], device: str) -> Iterator[Sent]:
    """Float32 rows on `device`, each batch with the event that its copy is done. For the thread that makes batches.

    Rows cross in the precision in which they are stored, from pinned memory and on a stream of their own, and become
    float32 on the GPU. On "cpu" nothing is copied, and there is no event.
    """
    if device == "cpu":
        for batch in batches:
            yield batch.float(), None
        return
    stream = torch.cuda.Stream()
    for batch in batches:
        with torch.cuda.stream(stream):
            rows = batch.pin_memory().to(device, non_blocking=True).float()
            yield rows, stream.record_event()


def received(batches: Iterator[Sent]) -> Iterator[Tensor]:
    """The rows, ready for the current stream, which waits for their copy; the host does not."""
    for rows, arrived in batches:
        if arrived is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(arrived)
            rows.record_stream(stream)  # or the copying stream might write over rows that are still in use
        yield rows
