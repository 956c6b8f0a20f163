"""Stopping a run from outside: what was asked is remembered and done at the next safe place."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Within this context SIGTERM and SIGINT ask for a stop instead of ending the process.

    Before `arm` there is nothing to save, so the process leaves at once. After it a signal only
    sets `requested`; the owner looks at it between pieces of work, saves, and calls `leave`. A
    second SIGINT interrupts at once. Outside the main thread signals stay as they are.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._armed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def arm(self) -> None:
        """From here on a signal waits until the owner has saved."""
        self._armed = True

    def leave(self) -> None:
        """End the process the way the signal asks: exit code 143, or `KeyboardInterrupt`."""
        if self.requested == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + int(self.requested or signal.SIGTERM))

    def _take(self, number: int, frame: FrameType | None) -> None:
        again = self.requested == number == signal.SIGINT
        self.requested = number
        if again or not self._armed:
            self.leave()
