"""The budgets of several models on one machine."""

import pytest

from moe_server import budget
from moe_server.budget import format_bytes
from moe_server.config import load_config
from moe_server.errors import MoeServerError, Reason
from moe_server.planned_models import PlannedModel, check_room, plan_models
from tests.test_budget import GIB, make_checkpoint, make_config, plan_memory
from tests.tiny import Tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(vocab=100).write(tmp_path_factory.mktemp("planned") / "tiny")


def two_models(tiny, tmp_path, first="", second=""):
    file = tmp_path / "server.toml"
    file.write_text(f'max_total_tokens = 64\n{first}\n[[models]]\nmodel = "{tiny}"\n{second}\n')
    return load_config(file, environ={})


def planned(**changes) -> PlannedModel:
    config, checkpoint = make_config(**changes), make_checkpoint()
    return PlannedModel(config.all_models[0], checkpoint, plan_memory(config, checkpoint))


def test_check_room_says_by_how_much_to_lower_the_budget(monkeypatch):
    model = planned(device_memory=GIB, host_memory=0)
    plan = model.plan
    needed = plan.fixed_bytes + plan.slots_bytes + plan.records_bytes + plan.runtime_bytes
    monkeypatch.setattr(budget, "available_memory_bytes", lambda: needed)
    check_room([model])
    monkeypatch.setattr(budget, "available_memory_bytes", lambda: needed - 4321)
    with pytest.raises(MoeServerError) as caught:
        check_room([model])
    error = caught.value
    assert error.reason is Reason.EXHAUSTED
    assert "by 4321 bytes" in error.remedy
    assert format_bytes(needed) in error.message


def test_check_room_counts_what_a_gpu_holds_as_the_gpu_s(monkeypatch):
    model = planned(device="cuda", device_memory=GIB, host_memory=10**6)
    assert model.plan.records_bytes > 0
    needed = model.plan.records_bytes + model.plan.runtime_bytes
    monkeypatch.setattr(budget, "available_memory_bytes", lambda: needed)
    check_room([model])
    monkeypatch.setattr(budget, "available_memory_bytes", lambda: needed - 1)
    with pytest.raises(MoeServerError):
        check_room([model])


def test_check_room_counts_all_models_together_and_names_each(monkeypatch):
    models = [
        planned(device_memory=GIB, model_name="heavy"),
        planned(device_memory=GIB, model_name="light", dense_backend="resident"),
    ]
    needed = sum(model.memory_bytes for model in models)
    monkeypatch.setattr(budget, "available_memory_bytes", lambda: needed)
    check_room(models)
    monkeypatch.setattr(budget, "available_memory_bytes", lambda: needed - 1)
    for model in models:
        check_room([model])
    with pytest.raises(MoeServerError, match="by 1 bytes") as caught:
        check_room(models)
    for model in models:
        assert f"{model.name} {format_bytes(model.memory_bytes)}" in caught.value.message


@pytest.mark.parametrize("explicit_first", [True, False])
def test_a_model_without_a_budget_gets_what_the_others_leave(
    tiny, tmp_path, monkeypatch, explicit_first
):
    one = 'device_memory = "1GiB"'
    budgets = (one, "") if explicit_first else ("", one)
    config = two_models(tiny, tmp_path, *budgets)
    alone = plan_models(config)
    # All but the last of what both would take: the one without a budget has to give way.
    available = sum(model.memory_bytes for model in alone) - 1
    monkeypatch.setattr(budget, "available_memory_bytes", lambda: available)
    together = plan_models(config)
    explicit, other = (0, 1) if explicit_first else (1, 0)
    assert together[explicit] == alone[explicit]
    assert together[other].plan.num_slots < alone[other].plan.num_slots
    check_room(together)


def test_every_engine_gets_the_budget_that_was_checked(tiny, tmp_path):
    for model in plan_models(two_models(tiny, tmp_path, 'device_memory = "min"')):
        assert model.config.device_memory == model.plan.device_budget_bytes


def test_a_budget_that_cannot_run_names_the_model_and_the_whole_key(tiny, tmp_path):
    with pytest.raises(MoeServerError, match="Model 'tiny': device_memory") as caught:
        plan_models(two_models(tiny, tmp_path, second="device_memory = 1"))
    assert caught.value.field == "models[0].device_memory"
    with pytest.raises(MoeServerError, match="Model 'demo': device_memory") as caught:
        plan_models(two_models(tiny, tmp_path, first="device_memory = 1"))
    assert caught.value.field == "device_memory"
