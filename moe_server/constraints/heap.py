"""How much of the heap is in use, as the C library counts it: what llguidance keeps is in there."""

import ctypes
from functools import cache
from typing import Any

_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS.split()]


def used_bytes() -> int | None:
    """Bytes that are allocated now, by whatever thread; None where the C library does not say."""
    mallinfo2 = _mallinfo2()
    if mallinfo2 is None:
        return None
    found = mallinfo2()
    return int(found.uordblks + found.hblkhd)


@cache
def _mallinfo2() -> Any:
    # glibc has it since 2.33.
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is not None:
        function.restype = _Mallinfo2
    return function
