"""The arithmetic of memory: what a configuration needs, and how many experts fit beside it.

Decided once, before anything is loaded, from the checkpoint's headers alone; the front door refuses
an impossible budget with it and the engine allocates by it. It counts what moe-server allocates for
the model. The engine's Python runtime is not in the budgets: `planned_models` holds it and them
against what the machine (or its memory cgroup) has. Pure Python.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from moe_server import cgroups
from moe_server.checkpoint import Checkpoint
from moe_server.config import ModelConfig
from moe_server.errors import MoeServerError, Reason
from moe_server.kernels.formats import GROUP_CHOICES
from moe_server.offload.layout import PAGE_BYTES

RUNTIME_BYTES = 290 * 2**20
"""The engine process before it holds any of the model: 264 MiB of imports (torch 2.13, transformers
5.23, deepspeed 0.19.8) and what its allocator keeps."""
PLAIN_RUNTIME_BYTES = 192 * 2**20
"""The same where torch is all that is imported: 153 MiB. (A quarter of a gigabyte of shared
libraries is mapped besides, of which the kernel keeps what it has room for.)"""

READ_BLOCK_BYTES = 8 * 2**20
"""The largest single read. Each reading thread owns one buffer of this size."""

QUERY_TILE_TOKENS = 16
"""Positions of a prompt that attention takes at once; tiles begin at multiples of it."""

DEQUANTISED_ROWS = 64
"""Rows of an integer matrix that torch computes with at once where no kernel does."""

EXPERT_ROWS = 256
"""Rows of a batch that an expert computes at once: what it holds in between is bounded by them."""

EMBEDDING_PLACES = 64
"""Blocks of rows of an embedding on disk that are read at once: far more than the disk serves side
by side. A step of more tokens reads in turns."""

CUDA_STAGING_RECORDS = 2
"""On CUDA an expert passes through pinned host memory on its way from disk."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose. The first four and the slots make up the device budget."""

    device_budget_bytes: int
    dense_bytes: int
    """Without the token embedding where that stays on disk."""
    kv_bytes: int
    workspace_bytes: int
    slot_bytes: int
    """One expert slot: a record, rounded up to whole pages."""
    num_slots: int
    minimum_device_bytes: int
    """The smallest device budget this configuration runs in: one slot."""
    embedding_on_disk_bytes: int
    """The token embedding where steps read its rows from disk; 0: it is held, as all dense ones."""
    host_budget_bytes: int
    num_records: int
    num_staging: int
    """Pinned records that reads from disk pass through on their way to a GPU."""
    expert_bytes: int
    """Weights of one expert."""
    num_experts_total: int
    num_blocks: int
    """KV cache blocks."""
    runtime_bytes: int
    """The engine process without the model; in no budget, but in the machine."""
    max_request_tokens: int
    """Most tokens of prompt and completion together that one request may have."""

    @property
    def slots_bytes(self) -> int:
        return self.num_slots * self.slot_bytes

    @property
    def records_bytes(self) -> int:
        return (self.num_records + self.num_staging) * self.slot_bytes

    @property
    def num_places(self) -> int:
        """Experts that both tiers have a place for."""
        return self.num_slots + self.num_records

    @property
    def num_absent(self) -> int:
        """Experts that have a place in neither tier."""
        return max(0, self.num_experts_total - self.num_places)

    @property
    def fixed_bytes(self) -> int:
        """Device bytes that do not depend on how many experts are resident."""
        return self.dense_bytes + self.kv_bytes + self.workspace_bytes

    def table(self) -> list[tuple[str, str]]:
        """Rows for people: what, and how much."""
        experts = self.num_experts_total
        return [
            ("device budget", format_bytes(self.device_budget_bytes)),
            ("  dense weights", format_bytes(self.dense_bytes)),
            ("  KV cache", f"{format_bytes(self.kv_bytes)} ({self.num_blocks} blocks)"),
            ("  workspace", format_bytes(self.workspace_bytes)),
            (
                "  expert slots",
                f"{format_bytes(self.slots_bytes)} ({self.num_slots} of {experts} experts)",
            ),
            ("  minimum", format_bytes(self.minimum_device_bytes)),
            ("host budget", format_bytes(self.host_budget_bytes)),
            (
                "  expert records",
                f"{format_bytes(self.records_bytes)} ({self.num_records} experts)",
            ),
            ("left on disk", f"{self.num_absent} experts of {format_bytes(self.expert_bytes)}"),
            ("  embedding", format_bytes(self.embedding_on_disk_bytes)),
            ("longest request", f"{self.max_request_tokens} tokens"),
        ]


def plan_memory(config: ModelConfig, checkpoint: Checkpoint, reserved_bytes: int = 0) -> MemoryPlan:
    """Divides the budgets.

    Args:
        config: The model's.
        checkpoint: Its sizes.
        reserved_bytes: Memory that is free now and that other models will take.

    Raises:
        MoeServerError: A budget that cannot run anything; the message says the smallest that can.
            Or the experts are stored in another format than the configuration asks for.
    """
    _refuse_other_format(config, checkpoint)
    _refuse_unserved_format(config, checkpoint)
    block_tokens = config.scheduler.block_tokens
    max_request = min(checkpoint.max_context_tokens, config.max_total_tokens)
    num_blocks = -(-config.max_total_tokens // block_tokens)
    dense = checkpoint.dense_bytes
    kv = num_blocks * block_tokens * checkpoint.kv_bytes_per_token
    workspace = _workspace_bytes(config, checkpoint, max_request)
    total = len(checkpoint.experts)
    # A model without experts has no use for slots.
    slot = checkpoint.record_layout.stride_bytes if total else PAGE_BYTES
    fixed = dense + kv + workspace
    on_disk, rows = _embedding_from_disk(config, checkpoint)
    minimum = fixed - on_disk + rows + slot
    runtime = runtime_bytes(config, checkpoint)
    budget = _device_budget(config, runtime + reserved_bytes, minimum, fixed + max(1, total) * slot)
    room, room_without = (budget - fixed) // slot, (budget - fixed + on_disk - rows) // slot
    if room >= 1 and (room_without == room or room + config.host_memory // slot >= total):
        # It would make room for no expert, or no step waits for one: none is to wait for it.
        on_disk = rows = 0
    dense, workspace = dense - on_disk, workspace + rows
    if budget < minimum:
        raise MoeServerError(
            f"device_memory of {budget} bytes ({format_bytes(budget)}) is too small: dense "
            f"weights {format_bytes(dense)}, KV cache {format_bytes(kv)}, workspace "
            f"{format_bytes(workspace)} and one expert slot {format_bytes(slot)} need "
            f"{minimum} bytes.",
            f"Give at least {minimum} bytes ({format_bytes(minimum)}), or lower max_total_tokens "
            "or scheduler.max_batch_tokens.",
            field="device_memory",
        )
    num_slots = min(total, (budget - dense - kv - workspace) // slot)
    num_staging = CUDA_STAGING_RECORDS if config.device == "cuda" and total else 0
    least_host = max(num_staging, 1 if config.host_memory and num_slots < total else 0) * slot
    if config.host_memory < least_host:
        raise MoeServerError(
            f"host_memory of {config.host_memory} bytes is too small for records of {slot} bytes.",
            f"Give at least {least_host} bytes ({format_bytes(least_host)})"
            + (", or 0 for no host tier." if not num_staging else "."),
            field="host_memory",
        )
    num_records = min(total - num_slots, config.host_memory // slot - num_staging)
    return MemoryPlan(
        device_budget_bytes=budget,
        dense_bytes=dense,
        kv_bytes=kv,
        workspace_bytes=workspace,
        slot_bytes=slot,
        num_slots=num_slots,
        minimum_device_bytes=minimum,
        embedding_on_disk_bytes=on_disk,
        host_budget_bytes=config.host_memory,
        num_records=num_records,
        num_staging=num_staging,
        expert_bytes=checkpoint.record_layout.weight_bytes,
        num_experts_total=total,
        num_blocks=num_blocks,
        runtime_bytes=runtime,
        max_request_tokens=max_request,
    )


def embedding_places(config: ModelConfig, checkpoint: Checkpoint) -> int:
    """Blocks of rows that are read at once where the embedding stays on disk."""
    most = min(config.scheduler.max_batch_tokens, checkpoint.embedding_layout.num_blocks)
    return min(most, EMBEDDING_PLACES)


def runtime_bytes(config: ModelConfig, checkpoint: Checkpoint) -> int:
    """What the engine process takes in memory before it holds any of the model."""
    is_light = config.dense_backend == "resident" and checkpoint.is_plain
    return PLAIN_RUNTIME_BYTES if is_light else RUNTIME_BYTES


def available_memory_bytes() -> int:
    """Bytes this process can still take: free memory of the machine, or what its cgroups leave."""
    with Path("/proc/meminfo").open(encoding="ascii") as stream:
        fields = dict(line.split(":", 1) for line in stream)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *cgroups.memory_room()])


def format_bytes(count: int) -> str:
    """1536 -> "1.50 KiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def _refuse_other_format(config: ModelConfig, checkpoint: Checkpoint) -> None:
    wanted, found = config.expert_format, checkpoint.stored.experts
    is_wanted = found.value == wanted
    if wanted == "bf16":
        is_wanted = not found.is_integer and found.itemsize == 2
    if wanted != "checkpoint" and not is_wanted:
        raise MoeServerError(
            f"expert_format is {wanted}, but {checkpoint.path} stores its experts in "
            f"{found.value}.",
            f"Make a store with `moe-server pack CHECKPOINT OUT --format {wanted}` and give its "
            "directory, or leave expert_format out.",
            field="expert_format",
        )


def _refuse_unserved_format(config: ModelConfig, checkpoint: Checkpoint) -> None:
    stored = checkpoint.stored
    on_gpu = config.device == "cuda"
    if on_gpu and stored.dense_int8:
        raise MoeServerError(
            f"{checkpoint.path} holds its dense weights in int8, which are computed on a CPU only.",
            "Serve it with --device cpu, or pack it with --dense-format checkpoint.",
            reason=Reason.UNSUPPORTED,
            field="device",
        )
    if on_gpu and stored.experts.is_integer and checkpoint.dtype != "bfloat16":
        raise MoeServerError(
            f"{checkpoint.path} holds {stored.experts.value} experts of a {checkpoint.dtype} model;"
            " a GPU computes those of bfloat16 models.",
            "Serve it with --device cpu, or serve the checkpoint it was packed from.",
            reason=Reason.UNSUPPORTED,
            field="device",
        )
    if config.dense_backend == "zero3" and stored.dense_int8:
        raise MoeServerError(
            f"{checkpoint.path} holds its dense weights in int8, which ZeRO-3 does not take.",
            "Serve it with --dense-backend resident.",
            reason=Reason.UNSUPPORTED,
            field="dense_backend",
        )


def _device_budget(config: ModelConfig, others: int, minimum: int, everything: int) -> int:
    if config.device_memory == "min":
        return minimum
    if config.device_memory is not None:
        return config.device_memory
    if config.device == "cuda":
        raise MoeServerError(
            "device cuda needs a budget.",
            "Give --device-memory, for example 24GiB.",
            field="device_memory",
        )
    free = available_memory_bytes() - others - config.host_memory
    return min(everything, max(minimum, int(0.9 * free)))


def _workspace_bytes(config: ModelConfig, checkpoint: Checkpoint, max_request: int) -> int:
    """An upper bound of what one step allocates and frees, term by term as model.py spends it."""
    tokens = config.scheduler.max_batch_tokens
    rows = min(config.scheduler.max_running, tokens)
    hidden, item = checkpoint.hidden_size, checkpoint.itemsize
    query = checkpoint.num_heads * checkpoint.head_dim
    key_value = checkpoint.num_kv_heads * checkpoint.head_dim
    residual = tokens * hidden * (3 * item + 2 * 4)  # RMSNorm computes in float32
    projections = 4 * tokens * (query + 2 * key_value) * item  # rotation makes copies
    gathered = 2 * max_request * key_value * item
    if checkpoint.kind.head_norms or checkpoint.kind.whole_norms:
        projections += 2 * tokens * (query + key_value) * 4
    group_rows = checkpoint.num_heads // checkpoint.num_kv_heads * QUERY_TILE_TOKENS
    mask = group_rows * max_request * (1 + 4)  # boolean, and as SDPA widens it
    attention = projections + gathered + mask
    picks = tokens * checkpoint.num_experts_per_token
    # Outputs of all picks; one choice at a time is widened, weighted and added.
    combining = picks * hidden * item + tokens * hidden * (2 * item + 8)
    intermediate = checkpoint.intermediate_size
    # Rows in and out; gate, up and their product in float32, and as the products want them.
    at_once = min(tokens, EXPERT_ROWS)
    one_expert = tokens * 3 * hidden * item + at_once * intermediate * (3 * 4 + item)
    if checkpoint.stored.experts.is_integer:
        one_expert += _quantised_bytes(tokens, hidden) + _quantised_bytes(at_once, intermediate)
        # Without compiled kernels some rows of a matrix are dequantised at a time, in four steps.
        one_expert += 4 * 4 * DEQUANTISED_ROWS * max(hidden, intermediate)
    if config.device == "cuda":
        one_expert = max(one_expert, picks * intermediate * item)  # all experts are one launch
    experts = combining + one_expert
    if not checkpoint.experts:
        # Gate, what the activation makes of it, up, and their product.
        experts = tokens * (4 * intermediate + 2 * hidden) * item
    # Float32 and log-probabilities of all rows, with room for as many that a readout looks at; one
    # row at a time is in float64.
    logits = checkpoint.vocab_size * (rows * 4 * 6 + 10 * 8)
    reading = 0
    if config.device == "cpu" and not checkpoint.is_page_aligned:
        # What is not aligned is read through a window of each thread's.
        reading = config.read_threads * (READ_BLOCK_BYTES + 2 * PAGE_BYTES)
    return residual + max(attention, experts, logits) + reading


def _embedding_from_disk(config: ModelConfig, checkpoint: Checkpoint) -> tuple[int, int]:
    """Bytes of the embedding that may stay on disk, and of the memory that rows are then read into.

    Zeros where it has to be held in any case, or that would take less.
    """
    is_resident = config.device == "cpu" and config.dense_backend == "resident"
    if not is_resident or checkpoint.is_tied or not checkpoint.experts:
        return 0, 0
    layout = checkpoint.embedding_layout
    rows = embedding_places(config, checkpoint) * layout.block_bytes
    if checkpoint.is_page_aligned:
        # Blocks may not be. The windows that they then are read through are not counted yet.
        rows += config.read_threads * (layout.block_bytes + 2 * PAGE_BYTES)
    return (layout.nbytes, rows) if rows < layout.nbytes else (0, 0)


def _quantised_bytes(rows: int, columns: int) -> int:
    """Activations as int8 codes, with a scale and a sum for each group."""
    groups = -(-columns // min(GROUP_CHOICES))
    return rows * groups * (min(GROUP_CHOICES) + 2 * 4)


def usable_cores() -> int:
    """CPU cores this process may use: those it may run on, or what a container's quota is worth.

    More threads than that would use the quota up early in each period, and all stand still then.
    """
    return min([len(os.sched_getaffinity(0)), *(max(1, int(one)) for one in cgroups.cpu_quotas())])
