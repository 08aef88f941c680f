"""The hot set's file: which experts were wanted how often, for the next start of the same model.

JSON with a version, the checkpoint it belongs to and a checksum, written whole or not at all. It is
a hint and no more: a file that is damaged, of another checkpoint or of a later version is told
about and left out, and one that cannot be written costs a warning. `HotSetKeeper` stands between a
model's engines and its file; the supervisor has one.
"""

import asyncio
import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
import structlog

from moe_server.checkpoint import Checkpoint
from moe_server.messages import NO_HOT_SET, HotSet
from moe_server.whole_file import write_whole

log = structlog.get_logger(__name__)

AUTO, OFF = "auto", "off"
VERSION = 1
MAX_BYTES = 2**26
"""Far more than any model's; what is larger is something else."""
_FORMAT = "moe-server hot set"
_BEGINNING = b'{"format":"moe-server hot set"'
"""Every version's: what begins so, and an empty file, is ours to replace."""


class _Head(msgspec.Struct):
    """What every version begins with."""

    format: str
    version: int


class _File(_Head):
    checkpoint: str
    """Its fingerprint."""
    digest: str
    """Of the fingerprint and the bytes of `hot_set`."""
    hot_set: msgspec.Raw


class UnusableError(Exception):
    """Why a file is not taken."""


class ForeignError(UnusableError):
    """It is something else altogether, and not to be overwritten."""


def fingerprint(checkpoint: Checkpoint) -> str:
    """Names a checkpoint by its routers: they decide which experts are wanted.

    A copy of it has the same fingerprint, and so has a packed store of it.

    Raises:
        OSError: They cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{checkpoint.num_layers} {checkpoint.num_experts} ".encode())
    for router in checkpoint.routers:
        with router.file.open("rb") as file:
            file.seek(router.offset)
            digest.update(file.read(router.nbytes))
    return digest.hexdigest()


def encode(hot_set: HotSet, checkpoint: str) -> bytes:
    """The file's content, for the checkpoint of that fingerprint."""
    content = msgspec.json.encode(hot_set)
    file = _File(_FORMAT, VERSION, checkpoint, _digest(checkpoint, content), msgspec.Raw(content))
    return msgspec.json.encode(file) + b"\n"


def decode(content: bytes, checkpoint: str, num_layers: int, num_experts: int) -> HotSet:
    """What `encode` wrote.

    Raises:
        UnusableError: It is damaged, of another checkpoint or of a later version.
        ForeignError: It is no hot set.
    """
    if not content:
        raise UnusableError("it is empty")
    if not content.startswith(_BEGINNING):
        raise ForeignError("it is no hot set, and will not be overwritten")
    try:
        head = msgspec.json.decode(content, type=_Head)
        if head.version != VERSION:
            raise UnusableError(f"it has version {head.version}; this server reads {VERSION}")
        file = msgspec.json.decode(content, type=_File)
        if file.digest != _digest(file.checkpoint, bytes(file.hot_set)):
            raise UnusableError("it is damaged: its checksum does not match")
        if file.checkpoint != checkpoint:
            raise UnusableError(f"it is of another checkpoint, {file.checkpoint}")
        hot_set = msgspec.json.decode(file.hot_set, type=HotSet)
    except (ValueError, RecursionError) as error:  # what msgspec raises is a ValueError
        raise UnusableError(f"it is damaged: {error}") from None
    if not _fits(hot_set, num_layers, num_experts):
        raise UnusableError(f"it is not of {num_layers} layers with {num_experts} experts")
    return hot_set


def folder_of(setting: str, environ: Mapping[str, str]) -> Path:
    """Where the file of that setting, a path or AUTO, is kept; whether it exists or not.

    Raises:
        RuntimeError: The user has no home.
    """
    if setting != AUTO:
        return Path(setting).expanduser().absolute().parent
    state = Path(environ.get("XDG_STATE_HOME", ""))
    folder = state if state.is_absolute() else Path("~/.local/state").expanduser()
    return folder / "moe-server" / "hot-set"


def default_path(checkpoint: str, environ: Mapping[str, str]) -> Path:
    """Where the hot set of a fingerprint is kept if nobody says where.

    Raises:
        RuntimeError: The user has no home.
    """
    return folder_of(AUTO, environ) / f"{checkpoint}.json"


class HotSetKeeper:
    """The hot set of one model: read once, told to every engine, written when one tells its own.

    Args:
        checkpoint: What is served; it has experts.
        setting: A path, or AUTO.
    """

    def __init__(self, checkpoint: Checkpoint, setting: str) -> None:
        self._checkpoint = checkpoint
        self._setting = setting
        self._latest: HotSet | None = None
        self._fingerprint = ""
        self._path: Path | None = None
        """None: not read yet, or there is nowhere to write."""
        self._writing: asyncio.Task[None] | None = None
        self._is_warned = False
        """A write failed, and none has succeeded since."""

    async def latest(self) -> HotSet:
        """What an engine told last; before that, what the file says."""
        if self._latest is None:
            self._latest = await asyncio.to_thread(self._read)
        return self._latest

    def keep(self, hot_set: HotSet) -> None:
        """Remembers what an engine has told, unless that is nothing, and begins to write it."""
        if not any(hot_set.visits):
            return
        self._latest = hot_set
        if self._path is not None and (self._writing is None or self._writing.done()):
            self._writing = asyncio.create_task(self._write(self._path), name="hot set")

    async def saved(self) -> None:
        """Waits until what was told last is written down, or writing has failed."""
        if self._writing is not None:
            await asyncio.shield(self._writing)

    def _read(self) -> HotSet:
        path = None
        try:
            self._fingerprint = fingerprint(self._checkpoint)
            path = (
                default_path(self._fingerprint, os.environ)
                if self._setting == AUTO
                else Path(self._setting).expanduser()
            )
            content = _content(path)
            sizes = (self._checkpoint.num_layers, self._checkpoint.num_experts)
            hot_set = NO_HOT_SET if content is None else decode(content, self._fingerprint, *sizes)
        except (OSError, RuntimeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            log.warning("cannot read the hot set; starting without", path=_text(path), why=why)
            hot_set = NO_HOT_SET
        except UnusableError as error:
            log.warning("ignoring the hot set's file", path=_text(path), why=str(error))
            hot_set = NO_HOT_SET
            if isinstance(error, ForeignError) and self._setting != AUTO:
                path = None
        if any(hot_set.visits):
            log.info("hot set", path=_text(path), visits=round(max(hot_set.visits)))
        self._path = path
        return hot_set

    async def _write(self, path: Path) -> None:
        written = None
        while self._latest is not None and written is not self._latest:
            written = self._latest
            content = encode(written, self._fingerprint)
            try:
                await asyncio.to_thread(write_whole, path, content)
            except OSError as error:
                if not self._is_warned:
                    log.warning(
                        "cannot save the hot set; the next start will do without what is new",
                        path=str(path),
                        why=error.strerror or str(error),
                        remedy="Set warmup.hot_set to a file in a directory that can be written.",
                    )
                self._is_warned = True
            else:
                self._is_warned = False


def _content(path: Path) -> bytes | None:
    """None: there is no file.

    Raises:
        OSError: It cannot be read.
        ForeignError: It is no file of ours.
    """
    try:
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        return None
    if not path.is_file() or size_bytes > MAX_BYTES:
        raise ForeignError("it is no hot set, and will not be overwritten")
    return path.read_bytes()


def _digest(checkpoint: str, content: bytes) -> str:
    return hashlib.blake2b(checkpoint.encode() + b" " + content, digest_size=16).hexdigest()


def _fits(hot_set: HotSet, num_layers: int, num_experts: int) -> bool:
    return (
        len(hot_set.visits) == len(hot_set.shares) == num_layers
        and all(math.isfinite(visits) and visits >= 0 for visits in hot_set.visits)
        and all(len(shares) == num_experts for shares in hot_set.shares)
        and all(0 <= share <= 1.001 for shares in hot_set.shares for share in shares)
    )


def _text(path: Path | None) -> str:
    return "" if path is None else str(path)
