"""`python -m moe_server` is `moe-server`, and this is the entry point of both."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def main() -> None:
    """Imports and runs the command; Ctrl-C during the imports is no traceback either."""
    if os.getpid() == 1:
        # A container's first process: the kernel spares it the signals that it does not handle.
        signal.signal(signal.SIGTERM, _terminate)
    try:
        from moe_server.cli import main as run  # noqa: PLC0415

        run()
    except KeyboardInterrupt:
        sys.exit(130)


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
