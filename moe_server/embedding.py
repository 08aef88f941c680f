"""The token embedding where it stays on disk: the rows of a step's tokens are read for the step.

Takes the place of the embedding in our module and in transformers' alike, and has no parameters.
What it returns is bit for bit what the embedding in memory would. Shape legend: T tokens of the
step, H hidden size.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from moe_server.kernels.dense import int8_embedding
from moe_server.offload.rows import StoredRows
from moe_server.step import Step


class StoredEmbedding(nn.Module):
    """Looks tokens up on disk.

    Args:
        stored: The embedding's rows.
        dtype: What the model computes in.
    """

    def __init__(self, stored: StoredRows, dtype: torch.dtype) -> None:
        super().__init__()
        self.step = Step()
        """Whose tokens they are; `model` sets it."""
        self._stored = stored
        self._dtype = dtype
        # The blocks that are in memory, as a matrix of their own.
        block_rows = stored.layout.block_rows
        self._layout = replace(stored.layout, rows=stored.num_places * block_rows)
        self._weights = torch.frombuffer(
            stored.memory, dtype=torch.uint8, count=self._layout.nbytes
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(1, T) to (1, T, H); zeros where a row could not be read or nobody waits for it.

        Requests whose rows cannot be read fail.
        """
        step, block_rows = self.step, self._layout.block_rows
        tokens = ids.flatten().tolist()
        rows_of: dict[int, list[int]] = defaultdict(list)
        for row, token in enumerate(tokens):
            rows_of[token // block_rows].append(row)
        out_TH = torch.zeros(len(tokens), self._layout.columns, dtype=self._dtype)

        def still_wanted(blocks: Sequence[int]) -> list[int]:
            step.poll()
            if step.are_all_wanted():
                return list(blocks)
            return [block for block in blocks if step.requests_of(rows_of[block])]

        for arrived in self._stored.read(sorted(rows_of), still_wanted):
            rows = [row for block in arrived.places for row in rows_of[block]]
            stored_rows = [
                place * block_rows + tokens[row] % block_rows
                for block, place in arrived.places.items()
                for row in rows_of[block]
            ]
            out_TH[rows] = self._decode(torch.tensor(stored_rows, dtype=torch.int64))
            for block, error in arrived.errors.items():
                for request in step.requests_of(rows_of[block]):
                    request.fail(error)
        return out_TH.view(*ids.shape, -1)

    def _decode(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the memory, int64 (n,), as weights: (n, H)."""
        if self._layout.format.is_integer:
            return int8_embedding(rows, self._weights, self._layout, self._dtype)
        return self._weights.view(self._dtype).view(self._layout.rows, -1)[rows]
