"""Ctrl-C and SIGTERM end a scan between two batches, where everything is whole."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

_log = logging.getLogger("neuronlens.scan")


class Asked:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self._signal: int | None = None

    def hear(self, number: int, _frame: FrameType | None) -> None:
        """Note a signal; the second one does not wait."""
        if self._signal is not None:
            self.act()
        self._signal = number
        _log.warning("Stopping after this batch, with a checkpoint. Once more to stop at once.")

    def act(self) -> None:
        """Stop, if somebody asked to.

        Raises:
            KeyboardInterrupt: After Ctrl-C.
            SystemExit: After SIGTERM.
        """
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is not None:
            raise SystemExit(128 + self._signal)


@contextmanager
def listening() -> Iterator[Asked]:
    """Signals of the block are noted; outside the main thread there are none."""
    asked = Asked()
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, asked.hear)
                stack.callback(signal.signal, number, before or signal.SIG_DFL)
        yield asked
