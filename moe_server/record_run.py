"""Experts one after another, each in the memory that its record is in.

The CPU's way, and torch's for what no GPU kernel serves. An expert is computed while its bytes
arrive. Shape legend: T tokens, H hidden size, P picks, N rows of an expert.
"""

from collections.abc import Iterable

import torch

from moe_server.budget import EXPERT_ROWS
from moe_server.kernels.experts import Activation, ExpertRun
from moe_server.kernels.formats import MatrixLayout
from moe_server.kernels.products import Activations, prepare
from moe_server.kernels.routing import RoutingPlan, combine
from moe_server.offload.cache import Held
from moe_server.offload.layout import RecordLayout


class Rows:
    """The input of a layer's experts: prepared once for each device, whatever asks for rows.

    Args:
        values: (T, H).
        layout: Of the matrices that it is multiplied with.
    """

    def __init__(self, values: torch.Tensor, layout: MatrixLayout) -> None:
        self._values = values
        self._layout = layout
        self._prepared: dict[torch.device, Activations] = {}

    def prepared(self, index: torch.Tensor, device: torch.device) -> Activations:
        """Distinct rows in ascending order, as products with weights on `device` want them."""
        if device not in self._prepared:
            self._prepared[device] = prepare(self._values.to(device), self._layout)
        if len(index) == len(self._values):
            return self._prepared[device]
        return self._prepared[device].rows(index.to(device))


def compute_record(
    rows: Rows,
    index: torch.Tensor,
    held: Held,
    layout: RecordLayout,
    activation: Activation,
    out_NH: torch.Tensor,
) -> None:
    """One expert over the rows that `index` names, where its weights are; zeros if it is dropped.

    Args:
        rows: The layer's input.
        index: int64 (N,), ascending.
        held: The expert.
        layout: Of its record.
        activation: Of its gate.
        out_NH: Where the output goes, on any device.
    """
    arrivals: Iterable[int] = held.arrivals
    for first in range(0, len(index), EXPERT_ROWS):
        part = slice(first, first + EXPERT_ROWS)
        run = ExpertRun(
            rows.prepared(index[part], held.memory.device),
            held.memory,
            layout.w13,
            layout.w2,
            layout.w3_offset,
            layout.w2_offset,
            activation,
            out_NH[part],
        )
        for arrived_bytes in arrivals:
            run.advance(arrived_bytes)
        if held.dropped:
            out_NH.zero_()
            return
        run.output()  # asserts that it is complete
        arrivals = (layout.stride_bytes,)


class RecordRun:
    """One layer's experts over one step's rows.

    Args:
        x_TH: The layer's input.
        plan: Which expert computes which rows.
        layout: Of records.
        activation: Of the experts' gates.
    """

    def __init__(
        self, x_TH: torch.Tensor, plan: RoutingPlan, layout: RecordLayout, activation: Activation
    ) -> None:
        self._plan = plan
        self._layout = layout
        self._activation = activation
        self._rows = Rows(x_TH, layout.w13)
        self._outputs_PH = x_TH.new_empty(len(plan.rows), x_TH.shape[1])

    def skip(self, expert: int) -> None:
        """Nobody wants this expert's rows: they become zeros."""
        self._outputs_PH[self._plan.picks_of(expert)] = 0.0

    def compute(self, held: Held) -> int:
        """Computes an expert over its rows; zeros if it is dropped.

        Returns:
            How many experts were computed: 1.
        """
        compute_record(
            self._rows,
            self._plan.rows_of(held.expert),
            held,
            self._layout,
            self._activation,
            self._outputs_PH[self._plan.picks_of(held.expert)],
        )
        return 1

    def combined(self) -> torch.Tensor:
        """(T, H): outputs weighted and summed."""
        return combine(self._outputs_PH, self._plan)
