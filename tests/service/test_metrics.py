"""Metrics: read as Prometheus reads them, from a front door with a fake engine behind it."""

import asyncio
import time
import urllib.request
from collections import Counter

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moe_server.config import load_config
from moe_server.errors import MoeServerError
from moe_server.proto.moe_server.v1 import generation_pb2
from moe_server.service.server import Server
from moe_server.service.status_metrics import OF_MODELS, OF_STARTS
from moe_server.startup import Startup
from moe_server.state import ServerState
from tests.front_door import (
    eventually,
    failure,
    front_door,
    make_config,
    make_model,
    request,
    setup,
    small_queue,
)

CONFIG = make_config(metrics_listen="127.0.0.1:0")


class Scrape:
    """One answer, parsed; samples are found by name and labels."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        samples = [sample for family in self.families.values() for sample in family.samples]
        self._values = {
            (sample.name, frozenset(sample.labels.items())): sample.value for sample in samples
        }
        assert len(self._values) == len(samples), "a sample came twice"

    def value(self, name: str, model: str | None = "demo", **labels: str) -> float | None:
        named = {"model": model, **labels} if model else labels
        return self._values.get((f"moe_server_{name}", frozenset(named.items())))


def fetch(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        return response.read().decode()


async def scrape(door) -> Scrape:
    return Scrape(await asyncio.to_thread(fetch, door.server.metrics_address))


async def consume(call) -> None:
    async for _ in call:
        pass


async def test_every_family_is_there_with_a_help_text_and_units_that_prometheus_expects():
    config = make_config(
        metrics_listen="127.0.0.1:0",
        warmup={"prompt_tokens": 2, "new_tokens": 2, "max_ttft_ms": 9e6, "max_tpot_ms": 9e6},
    )
    async with front_door(config=config) as door:
        seen = await scrape(door)
    for family in (*OF_STARTS, *OF_MODELS):
        # The parser has a counter without its `_total`, as the family has it.
        found = seen.families[f"moe_server_{family.name}"]
        assert found.documentation == family.help
        if family.name != "startup_remaining_seconds":  # nothing is left once it is ready
            assert found.samples, family.name
    names = {sample.name for family in seen.families.values() for sample in family.samples}
    assert not [name for name in names if name.endswith(("_ms", "_gib", "_milliseconds"))]
    assert "process_resident_memory_bytes" in names


async def test_states_and_probes_are_told():
    async with front_door(config=CONFIG) as door:
        seen = await scrape(door)
        for state in ServerState:
            told = seen.value("state", state=state.value)
            assert told == (1.0 if state is ServerState.READY else 0.0), state
        assert seen.value("probe_time_to_first_token_seconds") == pytest.approx(
            door.server.warm_up.probes[-1].ttft_s
        )
        assert seen.value("startup_seconds") == pytest.approx(
            door.server.supervisor.startup.stages.elapsed_s
        )
        assert seen.value("requests_waiting_limit") == 256
        assert seen.value("time_to_first_token_limit_seconds") is None, "no limit is configured"
        # The warm-up's own requests are no user's.
        assert seen.value("requests_accepted_total") is None
        await door.server.models.drain()
        assert (await scrape(door)).value("state", state="draining") == 1


async def test_a_finished_request_counts_once_with_its_tokens_and_times():
    async with front_door(config=CONFIG) as door:
        for _ in range(2):
            call = door.generation.GenerateStream(request([1], max_new_tokens=5))
            await consume(call)
        seen = await scrape(door)
        assert seen.value("requests_accepted_total") == 2
        assert seen.value("requests_finished_total", code="OK") == 2
        assert seen.value("generated_tokens_total") == 10
        assert seen.value("time_to_first_token_seconds_count") == 2
        assert 0 < seen.value("time_to_first_token_seconds_sum") < 20
        bucket = "time_to_first_token_seconds_bucket"
        assert seen.value(bucket, le="+Inf") == 2
        assert seen.value("requests_open") == 0


async def test_time_per_output_token_is_each_samples_own():
    async with front_door("--step-s", "0.05", config=CONFIG) as door:
        await door.generation.Generate(
            request(
                [1],
                kind=generation_pb2.GenerateRequest,
                max_new_tokens=6,
                num_samples=2,
                temperature=1.0,
            )
        )
        seen = await scrape(door)
        assert seen.value("time_per_output_token_seconds_count") == 2
        assert seen.value("time_to_first_token_seconds_count") == 1
        mean_s = seen.value("time_per_output_token_seconds_sum") / 2
        assert mean_s >= 0.045, "two samples side by side do not halve it"


async def test_refusals_and_failures_count_by_status():
    config = make_config(metrics_listen="127.0.0.1:0", scheduler=small_queue(2))
    async with front_door("--step-s", "0.05", config=config) as door:
        long = [door.generation.GenerateStream(request([1], max_new_tokens=60)) for _ in range(2)]
        await eventually(lambda: door.server.supervisor.num_open_requests == 2)
        full = await failure(door.generation.GenerateStream(request([1])))
        assert full.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in long:
            call.cancel()
        await eventually(lambda: door.server.supervisor.num_open_requests == 0)
        await failure(door.generation.GenerateStream(request([1], temperature=-1.0)))
        late = door.generation.GenerateStream(request([1], max_new_tokens=60), timeout=0.3)
        assert (await failure(late)).code == grpc.StatusCode.DEADLINE_EXCEEDED
        await door.server.models.drain()
        await failure(door.generation.GenerateStream(request([1])))
        seen = await scrape(door)
    refused = {
        code: seen.value("requests_refused_total", code=code)
        for code in ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNAVAILABLE")
    }
    assert refused == {"RESOURCE_EXHAUSTED": 1, "INVALID_ARGUMENT": 1, "UNAVAILABLE": 1}
    assert seen.value("requests_finished_total", code="CANCELLED") == 2
    assert seen.value("requests_finished_total", code="DEADLINE_EXCEEDED") == 1
    assert seen.value("requests_accepted_total") == 3


async def test_scoring_counts_a_call_of_many_parts_once():
    async with front_door(config=CONFIG) as door:
        await door.scoring.Classify(
            generation_pb2.ClassifyRequest(text="a", labels=["b", "c", "d"])
        )
        seen = await scrape(door)
        assert seen.value("requests_accepted_total") == 1
        assert seen.value("requests_finished_total", code="OK") == 1
        assert seen.value("time_to_first_token_seconds_count") is None


async def test_what_the_engine_tells_is_what_a_scrape_finds():
    async with front_door(config=CONFIG) as door:
        await consume(door.generation.GenerateStream(request([1])))
        await eventually(lambda: door.server.supervisor.load.preemptions == 6)
        seen = await scrape(door)
        assert seen.value("preemptions_total") == 6
        assert seen.value("deadline_refusals_total") == 9
        assert seen.value("prompt_tokens_total") == 7
        assert seen.value("cached_prompt_tokens_total") == 8
        assert seen.value("kv_blocks", kind="kept") == 5
        assert seen.value("expert_lookups_total", tier="disk") == 0


async def test_an_engine_that_was_lost_is_counted(tmp_path):
    flags = ("--crash-token", "9", "--crash-once", str(tmp_path / "crashed"))
    async with front_door(*flags, config=CONFIG) as door:
        lost = await failure(door.generation.GenerateStream(request([7], max_new_tokens=5)))
        assert lost.code == grpc.StatusCode.UNAVAILABLE
        await door.reach(ServerState.READY)
        seen = await scrape(door)
        assert seen.value("engine_restarts_total") == 1
        assert seen.value("requests_finished_total", code="UNAVAILABLE") == 1


async def test_models_side_by_side_have_samples_of_their_own():
    beside = [setup(model=make_model(name="other"))]
    async with front_door(config=CONFIG, beside=beside) as door:
        await consume(door.generation.GenerateStream(request([1], model="other")))
        seen = await scrape(door)
    ready = Counter(
        sample.labels["model"]
        for sample in seen.families["moe_server_state"].samples
        if sample.value
    )
    assert ready == {"demo": 1, "other": 1}
    assert seen.value("requests_accepted_total", model="other") == 1
    assert seen.value("requests_accepted_total", model="demo") is None


async def test_a_scraper_that_never_reads_holds_up_no_request():
    async with front_door(config=CONFIG) as door:
        host, _, port = door.server.metrics_address.rpartition(":")
        _, silent = await asyncio.open_connection(host, int(port))
        started = time.monotonic()
        await consume(door.generation.GenerateStream(request([1])))
        assert (await scrape(door)).value("requests_accepted_total") == 1
        assert time.monotonic() - started < 10
        silent.close()


async def test_off_by_default_and_a_taken_port_is_an_error_with_a_remedy():
    async with front_door() as door:
        assert door.server.metrics_address == ""
        with pytest.raises(MoeServerError, match="for metrics") as caught:
            Server(make_config(metrics_listen=door.server.address), [Startup("demo")])
        assert caught.value.field == "metrics_listen"
        assert caught.value.remedy


@pytest.mark.parametrize("address", ["unix:/tmp/metrics", "9464", "host:99999"])
def test_an_address_that_prometheus_cannot_reach_is_refused(address):
    with pytest.raises(MoeServerError) as caught:
        load_config(flags={"metrics_listen": address}, environ={})
    assert caught.value.field == "metrics_listen"
