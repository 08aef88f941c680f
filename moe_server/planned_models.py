"""The models of one server before anything is loaded: what each is, and how memory is divided.

Used by the commands that start or explain a configuration. Every model has budgets of its own; the
machine is one, so what it has room for is counted over all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_server import budget
from moe_server.budget import MemoryPlan, format_bytes, plan_memory
from moe_server.checkpoint import Checkpoint, read_checkpoint
from moe_server.config import Config, ModelConfig
from moe_server.errors import MoeServerError, Reason


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """One model, with the budgets that its engine will keep to."""

    config: ModelConfig
    checkpoint: Checkpoint
    plan: MemoryPlan

    @property
    def name(self) -> str:
        return self.config.served_name

    @property
    def memory_bytes(self) -> int:
        """What it takes of the machine's memory, that of a GPU not counted."""
        plan = self.plan
        in_ram = plan.fixed_bytes + plan.slots_bytes if self.config.device == "cpu" else 0
        return in_ram + plan.records_bytes + plan.runtime_bytes


def plan_models(config: Config) -> list[PlannedModel]:
    """Divides every model's budgets, in the order of the configuration.

    Models that name no device budget get theirs from what the others leave.

    Raises:
        MoeServerError: A checkpoint or a budget that cannot be served. With several models the
            message says which, and `field` is the key's whole path.
    """
    models = config.all_models
    planned: dict[int, PlannedModel] = {}
    for index in sorted(range(len(models)), key=lambda i: models[i].device_memory is None):
        model = models[index]
        try:
            checkpoint = read_checkpoint(model.model_path)
            taken = sum(other.memory_bytes for other in planned.values())
            plan = plan_memory(model, checkpoint, reserved_bytes=taken)
        except MoeServerError as error:
            if len(models) == 1:
                raise
            raise MoeServerError(
                f"Model {model.served_name!r}: {error.message}",
                error.remedy,
                reason=error.reason,
                field=f"models[{index - 1}].{error.field}"
                if index and error.field
                else error.field,
            ) from None
        # Decided once: the engine, and every restart of it, gets the budget that is checked here.
        decided = model.model_copy(update={"device_memory": plan.device_budget_bytes})
        planned[index] = PlannedModel(decided, checkpoint, plan)
    return [planned[index] for index in range(len(models))]


def check_room(models: Sequence[PlannedModel]) -> None:
    """Refuses budgets that the machine, or the memory cgroup we are in, cannot hold together.

    Raises:
        MoeServerError: It would be killed or swap later; says by how much to lower which budget.
    """
    needed = sum(model.memory_bytes for model in models)
    runtime = sum(model.plan.runtime_bytes for model in models)
    available = budget.available_memory_bytes()
    if needed > available:
        each = ", ".join(f"{model.name} {format_bytes(model.memory_bytes)}" for model in models)
        raise MoeServerError(
            f"The budgets need {format_bytes(needed)} of memory "
            f"({format_bytes(runtime)} of it the Python runtime"
            f"{f'; {each}' if len(models) > 1 else ''}), "
            f"but only {format_bytes(available)} are available here.",
            f"Lower device_memory or host_memory by {needed - available} bytes, raise the cgroup's "
            "limit, or end other programs.",
            reason=Reason.EXHAUSTED,
            field="device_memory",
        )
