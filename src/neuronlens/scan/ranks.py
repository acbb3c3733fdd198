"""Several processes that share a scan: `torchrun`, or any that set up `torch.distributed`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any

import torch.distributed as dist

from neuronlens.atlas import Shard
from neuronlens.scan.plan import WHOLE


@dataclass(frozen=True)
class Ranks:
    """This process among those that scan together.

    Attributes:
        shard: Its share of the batches.
        meet: Waits until all have come here.
        is_first: Whether it is the one that puts the atlas together.
    """

    shard: Shard
    meet: Callable[[], None]
    is_first: bool


@contextmanager
def ranks(shard: Shard | None) -> Iterator[Ranks]:
    """The ranks of the scan; a shard that the caller names is on its own.

    Under `torchrun` a process group is set up, if the program has not done so. Ranks talk over
    gloo, whatever the group is otherwise used for: they only wait for each other.
    """
    if shard is not None:
        yield Ranks(shard, _go_on, True)
        return
    if not dist.is_available():
        yield Ranks(WHOLE, _go_on, True)
        return
    mine = not dist.is_initialized() and _is_launched()
    if mine:
        _begin()
    try:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            yield Ranks(WHOLE, _go_on, True)
            return
        # The slowest rank may be hours behind.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        rank = dist.get_rank()
        yield Ranks(
            Shard(index=rank, count=dist.get_world_size()), partial(_meet, group), rank == 0
        )
    finally:
        if mine:
            dist.destroy_process_group()


_begun = count()


def _begin() -> None:
    """Set up a group whose names in the common store no other group has had.

    The store outlives a group, also that of ranks that were started again; a rank that finds
    the address of one that has ended calls in vain.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = PrefixStore(f"neuronlens/{again}/{next(_begun)}", store)
    dist.init_process_group("gloo", store=own, rank=rank, world_size=size)


def _go_on() -> None:
    """Nobody to wait for."""


def _meet(group: Any) -> None:
    dist.barrier(group=group)


def _is_launched() -> bool:
    return dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1
