"""Batches by index for data sets that do not fit on the device (or, lazily loaded, in memory).

Training draws the same indices whether the images lie on the device or are streamed; streamed,
the host gathers the batch while the device computes, and trigger and labels are applied to the
batch by the same code, with the indices to look the poison mask up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Leading axes as in the indices: [B], or [M, B] with one draw a member."""

    indices: np.ndarray  #: int [..., B], positions in the data set
    images: np.ndarray  #: uint8 [..., B, H, W, C]
    labels: np.ndarray  #: int32 [..., B]


def batches(
    images: Any,
    labels: np.ndarray,
    order: Iterable[np.ndarray],
    *,
    prefetch: int = 2,
    threads: int = 1,
) -> Iterator[Batch]:
    """The batches that `order` asks for, gathered ahead in background threads.

    Args:
      images: uint8 [N, H, W, C]: an array, a memory map, or `records.LazyImages`.
      labels: int32 [N].
      order: integer arrays [B] or [M, B], one for each batch, taken as they are needed.
      prefetch: how many batches to gather ahead of the one in use.
      threads: how many are gathered at once; more than one helps if images are decoded.

    Raises:
      PmoeError: (from lazily loaded images) an image that cannot be decoded.
      IndexError: an index outside 0..N-1.
    """

    def gather(indices: np.ndarray) -> Batch:
        return Batch(indices, images[indices], labels[indices])

    pending: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for indices in order:
                pending.append(pool.submit(gather, np.asarray(indices)))
                if len(pending) > prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # also when the consumer stops early
            for future in pending:
                future.cancel()
