"""`python -m moe_server` is `moe-server`, and this is the entry point of both."""

import sys


def main() -> None:
    """Imports and runs the command; Ctrl-C during the imports is no traceback either."""
    try:
        from moe_server.cli import main as run  # noqa: PLC0415

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
