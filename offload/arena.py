"""One block of memory cut into equal records: the host tier, or the slots of a CPU device.

One anonymous mapping with huge pages: measured on 2 cores, O_DIRECT reads reach 3.3-3.8 GB/s into
huge pages and 1.1-2.0 GB/s into small ones. Pages are touched on first use, so an arena costs what
it holds. For CUDA the mapping is registered as pinned memory.

Knows nothing of experts; `cache` decides what lies where.
"""

import torch

from moe_server.errors import MoeServerError, Reason
from moe_server.offload.pages import map_pages

_REGISTER_CHUNK_BYTES = 64 * 2**30
"""cudaHostRegister refuses very large ranges on some drivers."""


class Arena:
    """`count` records of `stride_bytes` each, at page-aligned addresses.

    Args:
        count: Records; 0 is an arena that holds nothing.
        stride_bytes: A multiple of the page size.
        pinned: Register the memory with CUDA, so that copies to the device run at link speed.

    Raises:
        MoeServerError: The mapping or the registration was refused.
    """

    def __init__(self, count: int, stride_bytes: int, *, pinned: bool = False) -> None:
        self.count = count
        size = count * stride_bytes
        self._records: torch.Tensor | None = None
        if count == 0:
            return
        try:
            mapping = map_pages(size)
        except OSError as error:
            raise MoeServerError(
                f"Cannot map {size} bytes for experts: {error.strerror}.",
                "Lower device_memory or host_memory.",
                reason=Reason.EXHAUSTED,
            ) from None
        self._records = torch.frombuffer(mapping, dtype=torch.uint8).view(count, stride_bytes)
        if pinned:
            _register(self._records.data_ptr(), size)

    def __getitem__(self, index: int) -> torch.Tensor:
        """The record at `index`: uint8, shape (stride_bytes,), a view."""
        assert self._records is not None
        assert 0 <= index < self.count
        return self._records[index]


def _register(address: int, size: int) -> None:
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    for start in range(0, size, _REGISTER_CHUNK_BYTES):
        length = min(_REGISTER_CHUNK_BYTES, size - start)
        code = cudart.cudaHostRegister(address + start, length, 0)
        if int(code) != 0:
            raise MoeServerError(
                f"cudaHostRegister of {length} bytes failed with code {int(code)}.",
                "Raise RLIMIT_MEMLOCK (ulimit -l unlimited) or lower host_memory.",
                reason=Reason.EXHAUSTED,
                field="host_memory",
            )
