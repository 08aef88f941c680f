"""Experts in the slots of a GPU, all that are there at once.

The kernels see slots, never experts: a table says where each expert of the layer is, and leaves
out what is not there yet. The first pass takes all that are resident, every later one what has
arrived since. Launches are ordered like the copies into slots, so a slot may be given away as soon
as the launch that reads it was made. Shape legend: T tokens, H hidden size, I intermediate size, E
experts, P picks.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from moe_server.kernels.experts import Activation
from moe_server.kernels.formats import WeightFormat
from moe_server.kernels.gpu.combine import combine
from moe_server.kernels.gpu.experts import SlotLayout, grouped_swiglu
from moe_server.kernels.gpu.routing import DevicePlan
from moe_server.kernels.gpu.tiles import FORMATS
from moe_server.offload.layout import RecordLayout
from moe_server.record_run import Rows, compute_record

if TYPE_CHECKING:
    from moe_server.offload.cache import Held
    from moe_server.offload.tiers import Tiers

ABSENT = -1
"""In a table of slots: leave this expert alone."""


def can_compute(weight_format: WeightFormat, dtype: torch.dtype, activation: Activation) -> bool:
    """Whether a GPU's kernels serve experts in this format, of a model in this dtype."""
    return weight_format in FORMATS and dtype is torch.bfloat16 and activation is F.silu


def slot_layout(record: RecordLayout) -> SlotLayout:
    """A record's layout as the kernels want it."""
    return SlotLayout(
        record.w13, record.w2, record.w3_offset, record.w2_offset, record.stride_bytes
    )


class Slots:
    """The device's slots as the kernels see them.

    Args:
        tiers: Who is where.
        layout: Of records.
        num_experts: E.
    """

    def __init__(self, tiers: "Tiers", layout: RecordLayout, num_experts: int) -> None:
        self.layout = layout
        self.in_slots = slot_layout(layout)
        self.num_experts = num_experts
        assert isinstance(tiers.slots, torch.Tensor)
        self.arena = tiers.slots
        self._tiers = tiers
        self._tables: dict[int, tuple[list[int], torch.Tensor]] = {}

    def of_layer(self, layer: int) -> dict[int, int]:
        """The slots of the experts of a layer that are on the device."""
        return self._tiers.slots_of(layer, range(self.num_experts))

    def table(self, layer: int, slots: Mapping[int, int]) -> torch.Tensor:
        """int32 (E,): the slots of these experts, ABSENT for the others."""
        wanted = [slots.get(expert, ABSENT) for expert in range(self.num_experts)]
        known = self._tables.get(layer)
        # Mostly what it was at the layer's last step: there is nothing to send then.
        if known is None or known[0] != wanted:
            on_host = torch.tensor(wanted, dtype=torch.int32)
            # From pageable memory: it has been read when the call returns, without a wait.
            known = (wanted, on_host.to(self.arena.device, non_blocking=True))
            self._tables[layer] = known
        return known[1]


class SlotRun:
    """One layer's experts over one step's rows.

    Args:
        layer: The layer.
        x_TH: Its input, bfloat16.
        plan: Which expert computes which rows.
        slots: Where experts are.
    """

    def __init__(self, layer: int, x_TH: torch.Tensor, plan: DevicePlan, slots: Slots) -> None:
        num_picks, hidden_size = len(plan.order), x_TH.shape[1]
        self._layer = layer
        self._x_TH = x_TH
        self._plan = plan
        self._slots = slots
        self._rows = Rows(x_TH, slots.layout.w13)
        self._hidden_PI = x_TH.new_empty(num_picks, slots.layout.intermediate_size)
        self._outputs_PH = x_TH.new_empty(num_picks, hidden_size)
        self._computed: set[int] = set()

    def skip(self, expert: int) -> None:
        """Nobody wants this expert's rows: they become zeros."""
        self._outputs_PH[self._plan.picks_of(expert)] = 0.0

    def compute(self, held: "Held") -> int:
        """Computes an expert over its rows, and all others that are in slots; zeros if dropped.

        Returns:
            How many experts were computed: 0 where it was, with one before.
        """
        if held.expert in self._computed:
            return 0
        if held.slot is None:
            self._compute_in_host(held)
            return 1
        resident = self._slots.of_layer(self._layer)
        slots = {one: slot for one, slot in resident.items() if one not in self._computed}
        slots[held.expert] = held.slot
        grouped_swiglu(
            self._x_TH,
            self._plan,
            self._slots.table(self._layer, slots),
            self._slots.arena,
            self._slots.in_slots,
            self._outputs_PH,
            self._hidden_PI,
        )
        self._computed.update(slots)
        return sum(self._plan.count_of(expert) > 0 for expert in slots)

    def combined(self) -> torch.Tensor:
        """(T, H): outputs weighted and summed."""
        return combine(self._outputs_PH, self._plan.expert_ids, self._plan.weights)

    def _compute_in_host(self, held: "Held") -> None:
        picks = self._plan.picks_of(held.expert)
        output_NH = self._outputs_PH.new_empty(len(picks), self._outputs_PH.shape[1])
        index = self._plan.rows_of(held.expert)
        compute_record(self._rows, index, held, self._slots.layout, F.silu, output_NH)
        self._outputs_PH[picks] = output_NH
        self._computed.add(held.expert)
