"""The engine's pulse: two times in shared memory which say that the process lives and gets on.

A step may take minutes on a slow disk, and says nothing until it has ended. A thread of its own
notes that the process lives (a stopped one has no pulse, whatever it was doing) and when work was
last seen to advance. The watchdog looks at the times and never has messages to catch up with, so
that it is not misled when it was stopped itself. Knows neither messages nor states:
`engine_process` gives the pulse, `engine_link` reads it.
"""

import ctypes
import mmap
import threading
import time
from collections.abc import Callable

INTERVAL_S = 0.25


class Pulse:
    """Both sides' view of it; times are `time.monotonic()` seconds, 0 before the first.

    Args:
        descriptor: A file of at least `Pulse.NBYTES`, which both have.
    """

    NBYTES = mmap.PAGESIZE

    def __init__(self, descriptor: int) -> None:
        self._mapping = mmap.mmap(descriptor, self.NBYTES)
        self._times = (ctypes.c_double * 2).from_buffer(self._mapping)

    @property
    def beaten_at(self) -> float:
        """When the process last showed that it runs."""
        return self._times[0]

    @property
    def advanced_at(self) -> float:
        """When its work was last seen to have advanced."""
        return self._times[1]

    def give(self, work_done: Callable[[], object]) -> None:
        """Starts the thread.

        Args:
            work_done: Called on the thread; what it returns differs from the last where work has
                advanced.
        """
        threading.Thread(target=self._give, args=[work_done], name="pulse", daemon=True).start()

    def _give(self, work_done: Callable[[], object]) -> None:
        last = None
        while True:
            done = work_done()
            now = time.monotonic()
            self._times[0] = now
            if done != last:
                last = done
                self._times[1] = now
            time.sleep(INTERVAL_S)
