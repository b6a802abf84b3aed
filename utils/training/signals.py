"""Signals that ask a training to end."""

import signal
from typing import Any


class StopSignals:
    """SIGTERM and SIGINT ask for an end after the current step; a second SIGINT ends at once.

    A second SIGTERM does not: torchrun and the cluster's scheduler may each send one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
