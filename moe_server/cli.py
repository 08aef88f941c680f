"""The `moe-server` command: its subcommands, its exit codes and its log.

Each subcommand is a module of its own, imported when it is called, so that light ones stay light
and none but the engine process imports torch.
"""

import errno
import importlib
import os
import sys
from typing import Any, NoReturn

import click
import structlog

from moe_server import __version__
from moe_server.errors import MoeServerError

EXIT_ERROR = 2
EXIT_UNREACHABLE = 3
EXIT_NOT_READY = 4
EXIT_LIMIT_MISSED = 5
EXIT_RETRY = 6
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

COMMANDS = {
    "serve": "moe_server.commands.serve:serve",
    "generate": "moe_server.commands.generate:generate",
    "score": "moe_server.commands.score:score",
    "classify": "moe_server.commands.score:classify",
    "warmup": "moe_server.commands.warmup:warmup",
    "status": "moe_server.commands.operate:status",
    "drain": "moe_server.commands.operate:drain",
    "rewarm": "moe_server.commands.rewarm:rewarm",
    "undrain": "moe_server.commands.operate:undrain",
    "plan": "moe_server.commands.plan:plan",
    "check-config": "moe_server.commands.plan:check_config",
    "doctor": "moe_server.commands.doctor:doctor",
    "pack": "moe_server.commands.pack:pack_command",
    "synth": "moe_server.synth:synth_command",
}


class Commands(click.Group):
    """Loads a subcommand when it is named, and turns its errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """In the order of a first visit."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Imports it."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the subcommand; nothing a user can cause ends in a traceback."""
        try:
            return self._invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(EXIT_INTERRUPTED)

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except MoeServerError as error:
            click.echo(f"error: {error.message}", err=True)
            if error.remedy:
                click.echo(f"remedy: {error.remedy}", err=True)
            ctx.exit(_exit_code(error))
        except BrokenPipeError:
            # The reader has gone (`| head`).
            _discard_stdout()
            ctx.exit(EXIT_BROKEN_PIPE)
        return result


def _exit_code(error: MoeServerError) -> int:
    from moe_server.client import RetryableError, UnreachableError  # noqa: PLC0415  # imports grpc
    from moe_server.commands.warmup import (  # noqa: PLC0415
        LimitMissedError,
        NotReadyError,
    )

    codes = (
        (UnreachableError, EXIT_UNREACHABLE),
        (NotReadyError, EXIT_NOT_READY),
        (LimitMissedError, EXIT_LIMIT_MISSED),
        (RetryableError, EXIT_RETRY),
    )
    return next((code for kind, code in codes if isinstance(error, kind)), EXIT_ERROR)


@click.command(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 success; 2 wrong usage, configuration or request; 3 no server at the "
    "target; 4 not ready in time; 5 a limit was missed; 6 the server refused for now (not ready, "
    "full, or past the deadline), a retry can succeed; 130 interrupted; 141 the reader of stdout "
    "has gone; 143 terminated.",
)
@click.version_option(__version__, prog_name="moe-server")
def cli() -> None:
    """Serve mixture-of-experts models that do not fit on the device.

    Start with `moe-server serve` and, in another terminal, `moe-server generate "Hello"`.
    """
    configure_log()


def configure_log() -> None:
    """key=value lines on stderr. Only here: a library does not configure logging."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(
                key_order=["timestamp", "level", "event", "model"],
                drop_missing=True,
                bool_as_flag=False,
            ),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )


def main() -> None:
    """Runs the command; called by the entry point, `__main__`."""
    # Not for `serve` only: the next file or socket that is opened would take the number 1.
    if sys.stdout is None:
        _fail("stdout is closed", "Redirect it to /dev/null.")
    # Failing to bind, say, is reported by us with a remedy; gRPC's own lines would precede it.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        cli(prog_name="moe-server")
    except OSError as error:
        if error.filename is not None or error.errno not in CANNOT_WRITE:
            raise
        _discard_stdout()
        _fail(f"cannot write output: {error.strerror}", "Redirect stdout elsewhere.")


def _fail(message: str, remedy: str) -> NoReturn:
    click.echo(f"error: {message}.", err=True)
    click.echo(f"remedy: {remedy}", err=True)
    sys.exit(EXIT_ERROR)


def _discard_stdout() -> None:
    """Python would complain again about what is still buffered when it closes stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
