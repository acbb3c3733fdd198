"""Which samples run together, and on which rank."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from neuronlens.atlas import Shard
from neuronlens.errors import DataError
from neuronlens.samples import Sample, as_sample, in_order

Placed = tuple[int, Sample]
"""A sample and its position in the caller's sequence."""

WHOLE = Shard(index=0, count=1)


@dataclass(frozen=True)
class Planned:
    """A batch of the plan.

    Attributes:
        index: Its number among the batches of all shards.
        window: Number of the window its samples are from.
        chain: Fingerprint of all samples up to the end of that window.
        placed: Its samples, each with its position.
        is_first: Whether it is the first of its shard.
    """

    index: int
    window: int
    chain: str
    placed: tuple[Placed, ...]
    is_first: bool


class Plan:
    """The batches of a shard, in order: samples of like length, dealt in turn.

    A pure function of its arguments: within every `window` consecutive samples they are
    ordered by the length of their text (then by position) and cut into batches, and the k-th
    batch is that of shard k modulo their number. All samples are looked at, whichever the shard;
    images are not.

    Attributes:
        positions: How many samples there were; complete when the plan has been run through.
        chain: Fingerprint of their ids and texts, likewise.
    """

    def __init__(
        self, samples: Iterable[Any], batch_size: int, window: int, shard: Shard = WHOLE
    ) -> None:
        self._samples = samples
        self._size, self._window, self._shard = batch_size, window, shard
        self._ids: set[bytes] = set()
        self._hash = hashlib.sha256()
        self.positions = 0

    @property
    def chain(self) -> str:
        """Fingerprint of the ids and texts of the samples so far."""
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[Planned]:
        items = in_order(self._samples)
        index = window = 0
        while chunk := [self._next(item) for item in islice(items, self._window)]:
            chunk.sort(key=lambda placed: (_length(placed[1]), placed[0]))
            chain = self.chain
            for start in range(0, len(chunk), self._size):
                if index % self._shard.count == self._shard.index:
                    yield Planned(
                        index,
                        window,
                        chain,
                        tuple(chunk[start : start + self._size]),
                        index == self._shard.index,
                    )
                index += 1
            window += 1

    def _next(self, item: Any) -> Placed:
        position = self.positions
        sample = as_sample(item, position)
        self.positions += 1
        told = [
            *(sample.id, sample.prompt, sample.response, sample.domain, sample.group),
            len(sample.images),
        ]
        self._hash.update(repr(told).encode())
        known = hashlib.blake2b(sample.id.encode(), digest_size=16).digest()
        if known in self._ids:
            raise DataError(f"Two samples have the id {sample.id!r}; ids must differ.")
        self._ids.add(known)
        return position, sample


def batch_plan(samples: Iterable[Any], batch_size: int, window: int) -> Iterator[list[Placed]]:
    """The batches of a scan that is not sharded, each sample with its position; see `Plan`."""
    for planned in Plan(samples, batch_size, window):
        yield list(planned.placed)


def _length(sample: Sample) -> tuple[int, int]:
    return len(sample.images), len(sample.prompt) + len(sample.response or "")
