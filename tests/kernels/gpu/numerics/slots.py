"""Experts of random weights in an arena, at random slots, with nothing but rubbish around them."""

import random
from dataclasses import dataclass

import torch

from moe_server.kernels.formats import GROUP_COLUMNS, MatrixLayout, WeightFormat, round_up
from moe_server.kernels.gpu.experts import SlotLayout
from moe_server.kernels.gpu.reference import Expert
from tests.kernels.gpu.numerics.device import DEVICE
from tests.kernels.matrices import random_matrix


@dataclass(frozen=True, slots=True)
class Slots:
    layout: SlotLayout
    arena: torch.Tensor
    table: list[int]
    """Slot of each expert."""
    experts: dict[int, Expert]

    def only(self, *experts: int) -> torch.Tensor:
        """The table of a pass that has only these."""
        wanted = [slot if one in experts else -1 for one, slot in enumerate(self.table)]
        return torch.tensor(wanted, dtype=torch.int32, device=DEVICE)

    def every(self) -> torch.Tensor:
        return self.only(*range(len(self.table)))


def slot_layout(
    weight_format: WeightFormat,
    hidden_size: int,
    intermediate_size: int,
    group_columns: int = GROUP_COLUMNS,
    stride_bytes: int | None = None,
) -> SlotLayout:
    w13 = MatrixLayout(intermediate_size, hidden_size, weight_format, group_columns)
    w2 = MatrixLayout(hidden_size, intermediate_size, weight_format, group_columns)
    w2_offset = round_up(2 * w13.nbytes, 64)
    stride = stride_bytes or round_up(w2_offset + w2.nbytes, 4096)
    return SlotLayout(w13, w2, w13.nbytes, w2_offset, stride)


def random_slots(
    layout: SlotLayout, num_experts: int, seed: int, slots: list[int] | None = None
) -> Slots:
    generator = torch.Generator().manual_seed(seed)
    if slots is None:
        places = random.Random(seed).sample(range(num_experts + 3), num_experts)
        # As bfloat16 and as scales these bytes are NaN.
        size = (num_experts + 3) * layout.stride_bytes
        arena = torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)
    else:
        places = slots
        size = (max(slots) + 1) * layout.stride_bytes
        arena = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    experts = {}
    for expert, slot in enumerate(places):
        w1, w3, w2 = (
            random_matrix(matrix, generator) for matrix in (layout.w13, layout.w13, layout.w2)
        )
        record = arena[slot * layout.stride_bytes :]
        for offset, one in ((0, w1), (layout.w3_offset, w3), (layout.w2_offset, w2)):
            record[offset : offset + one.layout.nbytes] = one.weights
        experts[expert] = tuple(one.values.to(DEVICE) for one in (w1, w3, w2))
    return Slots(layout, arena, places, experts)
