"""The garbage collector, while requests run beside models and recordings."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_blocks = 0
_frozen = False


@contextmanager
def young_garbage() -> Iterator[None]:
    """For the length of the block, collect only what was made since its begin.

    Looking for garbage among everything there is would take a tenth of the time. Blocks may
    overlap in several threads. A caller that has frozen its objects is left alone.
    """
    global _blocks, _frozen
    with _lock:
        if _blocks == 0:
            _frozen = gc.get_freeze_count() == 0
            if _frozen:
                gc.freeze()
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0 and _frozen:
                gc.unfreeze()
