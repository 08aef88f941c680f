"""Messages on the pipes between the front door and the trial's process: a length, then bytes."""

import struct

_HEADER = struct.Struct("<I")
HEADER_BYTES = _HEADER.size


def pack(frame: bytes) -> bytes:
    """The frame with its header."""
    return _HEADER.pack(len(frame)) + frame


def length_of(header: bytes) -> int:
    """How many bytes follow a header."""
    (length,) = _HEADER.unpack(header)
    return int(length)
