"""One block of memory cut into equal records: the host tier, or the slots of a CPU device.

One mapping with huge pages, private or shared with the process that comes after this one. Measured
on 2 cores, O_DIRECT reads reach 3.3-3.8 GB/s into huge pages and 1.1-2.0 GB/s into small ones.
Pages are touched on first use, so an arena costs what it holds. For CUDA the mapping is registered
as pinned memory.

torch is imported when a record is first looked at: reading into an arena can begin before, while a
process still imports its libraries. Knows nothing of experts; `cache` decides what lies where.
"""

import mmap
from typing import TYPE_CHECKING

from moe_server.errors import MoeServerError, Reason
from moe_server.offload.pages import address_of, map_pages, touch
from moe_server.offload.shared_pages import SharedPages

if TYPE_CHECKING:
    import torch

_REGISTER_BYTES = 16 * 2**30
"""cudaHostRegister refuses very large ranges on some drivers."""


class Arena:
    """`count` records of `stride_bytes` each, at page-aligned addresses.

    Args:
        count: Records; 0 is an arena that holds nothing.
        stride_bytes: A multiple of the page size.
        pinned: Register the memory with CUDA, so that copies to the device run at link speed.
        allow_pageable: Go on with memory that could not be registered; copies are then slower.
        shared: The memory, where it is not to be private.

    Raises:
        MoeServerError: The mapping was refused, or the registration and `allow_pageable` is not
            given.
    """

    def __init__(
        self,
        count: int,
        stride_bytes: int,
        *,
        pinned: bool = False,
        allow_pageable: bool = False,
        shared: SharedPages | None = None,
    ) -> None:
        self.count = count
        self.touch = shared.touch if shared else touch
        """Has the kernel provide a part of the memory; given its address and size."""
        self.is_pinned = False
        self._stride_bytes = stride_bytes
        self._records: list[torch.Tensor] | None = None
        self._size = size = count * stride_bytes
        if count == 0:
            return
        self._mapping_offset = shared.mapping_offset if shared else 0
        self._mapping = shared.mapping if shared else _map_private(size)
        self._address = address_of(self._mapping) + self._mapping_offset
        if pinned:
            if shared:
                shared.touch(self._address, size)  # registering would provide small pages
            try:
                _register(self._address, size, stride_bytes)
                self.is_pinned = True
            except MoeServerError:
                if not allow_pageable:
                    raise

    def address(self, index: int) -> int:
        """Where the record at `index` begins."""
        assert 0 <= index < self.count
        return self._address + index * self._stride_bytes

    def __getitem__(self, index: int) -> "torch.Tensor":
        """The record at `index`: uint8, shape (stride_bytes,), a view."""
        if self._records is None:
            import torch  # noqa: PLC0415  see above

            flat = torch.frombuffer(
                self._mapping, dtype=torch.uint8, count=self._size, offset=self._mapping_offset
            )
            self._records = list(flat.view(self.count, self._stride_bytes).unbind())
        assert 0 <= index < self.count
        return self._records[index]


def _map_private(size: int) -> mmap.mmap:
    try:
        return map_pages(size)
    except OSError as error:
        raise MoeServerError(
            f"Cannot map {size} bytes for experts: {error.strerror}.",
            "Lower device_memory or host_memory.",
            reason=Reason.EXHAUSTED,
        ) from None


def _register(address: int, size: int, stride_bytes: int) -> None:
    """Pins the mapping, in pieces of whole records: a copy may not cross from one to another."""
    import torch  # noqa: PLC0415

    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    piece = max(1, _REGISTER_BYTES // stride_bytes) * stride_bytes
    for start in range(0, size, piece):
        length = min(piece, size - start)
        code = cudart.cudaHostRegister(address + start, length, 0)
        if int(code) != 0:
            for registered in range(0, start, piece):
                cudart.cudaHostUnregister(address + registered)
            raise MoeServerError(
                f"cudaHostRegister of {length} bytes failed with code {int(code)}.",
                "Raise RLIMIT_MEMLOCK (ulimit -l unlimited), lower host_memory, or set "
                "allow_pageable and accept slower copies.",
                reason=Reason.EXHAUSTED,
                field="host_memory",
            )
