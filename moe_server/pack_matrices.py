"""Reads an expert or a dense tensor of a checkpoint and makes its bytes in a store's format.

Matrix by matrix through two buffers: while the rows of one are quantised on all cores, a few at a
time, the next one is read past the page cache. Knows no files to be written; `pack` calls it.
"""

import mmap
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_server.budget import usable_cores
from moe_server.checkpoint import Checkpoint, DenseTensor
from moe_server.errors import MoeServerError
from moe_server.kernels.formats import BLOCK_ROWS, MatrixLayout, WeightFormat
from moe_server.kernels.packing import pack_int4, pack_int8
from moe_server.kernels.quantise import quantise_int4, quantise_int8
from moe_server.offload.layout import ExpertId, RecordLayout, Segment
from moe_server.offload.pages import address_of, map_pages
from moe_server.offload.reader import Reader, ReadTicket

READ_THREADS = 2
READ_BLOCK_BYTES = 8 * 2**20
ROWS_ELEMENTS = 2**16
"""Weights that one thread quantises at a time: they and what is made of them stay in its cache."""


@dataclass(frozen=True, slots=True)
class RoundingError:
    """What quantising changed, summed over weights."""

    squared_error: float = 0.0
    squared_norm: float = 0.0

    def __add__(self, other: "RoundingError") -> "RoundingError":
        return RoundingError(
            self.squared_error + other.squared_error, self.squared_norm + other.squared_norm
        )


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix to be quantised, and where its bytes go."""

    segment: Segment
    layout: MatrixLayout
    target_offset: int


class MatrixMaker:
    """Makes records and dense tensors. One thread calls it.

    Args:
        source: The checkpoint.
        record_layout: How records are to be.
        threads: Threads that quantise; None: one for each core.
    """

    def __init__(
        self, source: Checkpoint, record_layout: RecordLayout, threads: int | None = None
    ) -> None:
        self._source = source
        self._record_layout = record_layout
        self._dtype: torch.dtype = getattr(torch, source.dtype)
        self._reader = Reader(READ_THREADS, READ_BLOCK_BYTES)
        # Each works on rows of its own; torch would split every small product once more.
        self._executor = ThreadPoolExecutor(
            threads or usable_cores(), "quantise", torch.set_num_threads, (1,)
        )
        expert_matrix = source.hidden_size * source.intermediate_size * source.itemsize
        largest = max(expert_matrix, *(tensor.nbytes for tensor in source.dense.values()))
        self._buffers = [map_pages(largest), map_pages(largest)]

    def record(self, expert: ExpertId, target: mmap.mmap) -> RoundingError:
        """Fills `target` with the expert's record.

        Raises:
            MoeServerError: Its weights could not be read, or are not finite.
        """
        segments = self._source.record_segments(expert)
        layout = self._record_layout
        record = torch.frombuffer(target, dtype=torch.uint8)
        record[layout.w3_offset + layout.w13.nbytes : layout.w2_offset] = 0
        record[layout.w2_offset + layout.w2.nbytes : layout.stride_bytes] = 0
        if not layout.format.is_integer:
            self._read(segments, target).wait()
            return RoundingError()
        places = (
            (layout.w13, layout.w1_offset),
            (layout.w13, layout.w3_offset),
            (layout.w2, layout.w2_offset),
        )
        matrices = [
            _Matrix(segment, matrix, offset)
            for segment, (matrix, offset) in zip(segments, places, strict=True)
        ]
        return self._quantise(matrices, target)

    def dense(
        self, tensor: DenseTensor, layout: MatrixLayout | None, target: mmap.mmap
    ) -> RoundingError:
        """Fills `target` with a dense tensor's bytes, quantised if it has a layout.

        Raises:
            MoeServerError: Its weights could not be read, or are not finite.
        """
        segment = Segment(tensor.file, tensor.offset, tensor.nbytes, 0)
        if layout is None:
            self._read([segment], target).wait()
            return RoundingError()
        return self._quantise([_Matrix(segment, layout, 0)], target)

    def close(self) -> None:
        """Ends its threads."""
        self._executor.shutdown(cancel_futures=True)
        self._reader.close()

    def _read(self, segments: Iterable[Segment], target: mmap.mmap) -> ReadTicket:
        return self._reader.submit(list(segments), address_of(target))

    def _quantise(self, matrices: list[_Matrix], target: mmap.mmap) -> RoundingError:
        record = torch.frombuffer(target, dtype=torch.uint8)
        total = RoundingError()
        for matrix, weights in self._matrices(matrices):
            layout = matrix.layout
            made = record[matrix.target_offset :][: layout.nbytes]
            blocks = made.view(layout.num_blocks, layout.block_bytes)
            step = max(1, ROWS_ELEMENTS // (BLOCK_ROWS * layout.columns))

            def rows_done(
                first: int,
                layout: MatrixLayout = layout,
                weights: torch.Tensor = weights,
                blocks: torch.Tensor = blocks,
                step: int = step,
            ) -> RoundingError:
                rows = weights[first * BLOCK_ROWS : (first + step) * BLOCK_ROWS]
                return _quantise_rows(rows.float(), layout, blocks[first : first + step])

            starts = range(0, layout.num_blocks, step)
            matrix_error = sum(self._executor.map(rows_done, starts), RoundingError())
            if not torch.tensor(matrix_error.squared_norm).isfinite():
                raise _not_finite(matrix.segment.file)
            total += matrix_error
        return total

    def _matrices(self, matrices: list[_Matrix]) -> Iterator[tuple[_Matrix, torch.Tensor]]:
        """Each with its weights; the next one is being read meanwhile."""
        tickets: list[ReadTicket] = []

        def read(number: int) -> None:
            if number < len(matrices):
                segment = matrices[number].segment
                part = Segment(segment.file, segment.file_offset, segment.nbytes, 0)
                tickets.append(self._read([part], self._buffers[number % 2]))

        read(0)
        try:
            for number, matrix in enumerate(matrices):
                read(number + 1)
                tickets[number].wait()
                layout = matrix.layout
                weights = torch.frombuffer(
                    self._buffers[number % 2],
                    dtype=self._dtype,
                    count=layout.rows * layout.columns,
                )
                yield matrix, weights.view(layout.rows, layout.columns)
        finally:
            for ticket in tickets:  # the buffers are the reader's until then
                ticket.cancel()
                _settle(ticket)


def _settle(ticket: ReadTicket) -> None:
    try:
        ticket.wait()
    except MoeServerError:
        return


def _quantise_rows(rows: torch.Tensor, layout: MatrixLayout, blocks: torch.Tensor) -> RoundingError:
    if layout.format is WeightFormat.INT8:
        made = quantise_int8(rows)
        packed = pack_int8(made.codes, made.scales, layout)
    else:
        made = quantise_int4(rows, layout.group_columns)
        assert made.zeros is not None
        packed = pack_int4(made.codes, made.scales, made.zeros, layout)
    blocks.view(-1)[:] = packed
    norm = float(torch.linalg.vector_norm(rows)) ** 2
    return RoundingError(made.squared_error, norm)


def _not_finite(file: Path) -> MoeServerError:
    return MoeServerError(
        f"{file} holds weights that are not finite, which cannot be quantised.",
        "Copy the checkpoint again, or pack it with --format bf16.",
        field="checkpoint",
    )
