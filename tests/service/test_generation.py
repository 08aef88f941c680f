"""The generation service against a fake engine: token i+1 = (last + 1) % 100."""

import asyncio
import os
import signal
import sys
import threading

import grpc
import pytest
import pytest_asyncio
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo

from moe_server.proto.moe_server.v1 import generation_pb2 as pb
from moe_server.service.running_model import MAX_TOKENISING
from moe_server.state import ServerState
from moe_server.tokenizer import Tokenizer
from tests.fake_engine import REFUSED_RETRY_S
from tests.front_door import (
    E_ACUTE,
    EOS,
    WAIT_S,
    eventually,
    failure,
    front_door,
    letters_chat,
    make_config,
    make_model,
    small_queue,
)
from tests.front_door import request as make

pytestmark = pytest.mark.asyncio(loop_scope="module")

REFUSED_TOKEN = 77


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door():
    async with front_door("--refuse-token", str(REFUSED_TOKEN)) as door:
        yield door


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def slow_door():
    model = make_model(max_request_tokens=100_000)
    async with front_door("--step-s", "0.01", model=model) as door:
        yield door


async def collect(call):
    events = [event async for event in call]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert set(kinds[1:-1]) <= {"delta"}
    deltas = [event.delta for event in events[1:-1]]
    text = "".join(delta.text for delta in deltas)
    token_ids = [token for delta in deltas for token in delta.token_ids]
    return events[0].started, text, token_ids, events[-1].finished


async def test_a_stream_is_started_then_deltas_then_finished(door):
    call = door.generation.GenerateStream(make("ab", max_new_tokens=4, seed=5))
    started, text, token_ids, finished = await collect(call)
    assert (started.model, started.prompt_tokens, started.seed) == ("demo", 2, 5)
    assert started.request_id
    assert (text, token_ids) == ("cdef", [2, 3, 4, 5])
    assert finished.reason == pb.FINISH_REASON_LENGTH
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (2, 4)
    assert finished.usage.cached_tokens == 1
    assert finished.timings.queue.ToMilliseconds() == 250
    assert finished.timings.decode.ToMilliseconds() == 1500
    assert finished.timings.expert_read_bytes == 7


async def test_generate_gathers_the_same(door):
    response = await door.generation.Generate(
        make([0, 1], pb.GenerateRequest, "demo", max_new_tokens=4, seed=5)
    )
    assert (response.text, list(response.token_ids), response.seed) == ("cdef", [2, 3, 4, 5], 5)
    assert response.finished.reason == pb.FINISH_REASON_LENGTH
    assert response.finished.usage.completion_tokens == 4
    assert response.request_id
    assert response.model == "demo"


async def test_seeds_are_drawn_and_reported(door):
    first, second = [
        (await collect(door.generation.GenerateStream(make([1]))))[0].seed for _ in range(2)
    ]
    assert first != second


async def test_end_of_sequence_ends_unless_ignored(door):
    ended = await collect(door.generation.GenerateStream(make([EOS - 2], max_new_tokens=5)))
    assert ended[2] == [EOS - 1, EOS]
    assert ended[1] == f"<{EOS - 1}>"
    assert ended[3].reason == pb.FINISH_REASON_END_OF_SEQUENCE
    ignored = make([EOS - 2], max_new_tokens=4, ignore_eos=True)
    _, _, token_ids, finished = await collect(door.generation.GenerateStream(ignored))
    assert token_ids == [EOS - 1, EOS, 0, 1]
    assert finished.reason == pb.FINISH_REASON_LENGTH


async def test_default_and_clipped_lengths(door):
    assert len((await collect(door.generation.GenerateStream(make([1]))))[2]) == 8
    clipped = make([1] * 60, max_new_tokens=1000)
    _, _, token_ids, finished = await collect(door.generation.GenerateStream(clipped))
    assert len(token_ids) == 4
    assert finished.reason == pb.FINISH_REASON_LENGTH


async def test_a_character_of_two_tokens_arrives_whole(door):
    call = door.generation.GenerateStream(make([E_ACUTE[0] - 1], max_new_tokens=2))
    _, text, token_ids, _ = await collect(call)
    assert (text, token_ids) == ("é", list(E_ACUTE))
    cut = door.generation.GenerateStream(make([E_ACUTE[0] - 1], max_new_tokens=1))
    assert (await collect(cut))[1] == "\N{REPLACEMENT CHARACTER}"


async def test_logprobs(door):
    response = await door.generation.Generate(
        make([1], pb.GenerateRequest, max_new_tokens=2, top_logprobs=2)
    )
    assert [entry.token_id for entry in response.logprobs] == [2, 3]
    assert response.logprobs[0].logprob == pytest.approx(-0.5)
    assert [top.token_id for top in response.logprobs[0].top] == [2, 3]
    chosen_only = await door.generation.Generate(
        make([1], pb.GenerateRequest, max_new_tokens=2, logprobs=True)
    )
    assert [len(entry.top) for entry in chosen_only.logprobs] == [0, 0]
    without = await door.generation.Generate(make([1], pb.GenerateRequest, max_new_tokens=2))
    assert not without.logprobs


@pytest.mark.parametrize(
    ("stops", "text", "token_ids"),
    [
        (["def"], "bc", [1, 2]),
        (["zzz", "cd", "def"], "b", [1]),
        (["b"], "", []),
    ],
)
async def test_stop_sequences_span_tokens_and_cancel_the_rest(slow_door, stops, text, token_ids):
    cancels = slow_door.num_cancels
    call = slow_door.generation.GenerateStream(
        make("a", max_new_tokens=1000, ignore_eos=True, stop_sequences=stops)
    )
    _, got_text, got_ids, finished = await collect(call)
    assert (got_text, got_ids) == (text, token_ids)
    assert finished.reason == pb.FINISH_REASON_STOP_SEQUENCE
    assert finished.usage.completion_tokens == len(text) + len(
        next(s for s in stops if s[0] == dict(enumerate("bcd"))[len(text)])
    )
    await eventually(lambda: slow_door.num_cancels == cancels + 1)


async def test_a_partial_stop_sequence_at_the_end_is_text_after_all(door):
    call = door.generation.GenerateStream(make("a", max_new_tokens=3, stop_sequences=["cdefghij"]))
    _, text, token_ids, finished = await collect(call)
    assert (text, token_ids) == ("bcd", [1, 2, 3])
    assert finished.reason == pb.FINISH_REASON_LENGTH


async def test_a_stop_token_ends_and_is_returned(door):
    call = door.generation.GenerateStream(make("a", max_new_tokens=9, stop_token_ids=[50, 4]))
    _, text, token_ids, finished = await collect(call)
    assert (text, token_ids) == ("bcde", [1, 2, 3, 4])
    assert finished.reason == pb.FINISH_REASON_STOP_TOKEN


SEVERAL = {"temperature": 1.0, "num_samples": 3}


async def test_samples_share_a_stream_by_index(door):
    call = door.generation.GenerateStream(make("ab", max_new_tokens=4, seed=5, **SEVERAL))
    events = [event async for event in call]
    assert [event.WhichOneof("event") for event in events].count("started") == 1
    assert events[0].started.seed == 5
    for index in range(3):
        own = [event for event in events if event.delta.index == index or event.finished.index]
        deltas = [event.delta for event in own if event.HasField("delta")]
        assert "".join(delta.text for delta in deltas if delta.index == index) == "cdef"
    finishes = [event.finished for event in events if event.HasField("finished")]
    assert sorted(finished.index for finished in finishes) == [0, 1, 2]
    assert all(finished.usage.completion_tokens == 4 for finished in finishes)
    assert events[-1].HasField("finished")


async def test_samples_are_gathered_in_order(door):
    response = await door.generation.Generate(
        make("a", pb.GenerateRequest, max_new_tokens=3, top_logprobs=1, **SEVERAL)
    )
    assert (response.text, list(response.token_ids)) == ("bcd", [1, 2, 3])
    assert response.finished.index == 0
    assert [sample.finished.index for sample in response.further_samples] == [1, 2]
    for sample in response.further_samples:
        assert (sample.text, list(sample.token_ids)) == ("bcd", [1, 2, 3])
        assert [entry.token_id for entry in sample.logprobs] == [1, 2, 3]
        assert sample.finished.reason == pb.FINISH_REASON_LENGTH


async def test_each_sample_takes_a_place_and_all_or_none_run():
    config = make_config(scheduler=small_queue(2))
    async with front_door(config=config) as door:
        failed = await failure(door.generation.GenerateStream(make("a", **SEVERAL)))
        assert failed.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert door.server.supervisor.num_open_requests == 0
        two = make("a", max_new_tokens=2, temperature=1.0, num_samples=2)
        assert len([event async for event in door.generation.GenerateStream(two)]) > 4


async def test_samples_that_stop_at_a_text_leave_the_engine(slow_door):
    cancels = slow_door.num_cancels
    events = [
        event
        async for event in slow_door.generation.GenerateStream(
            make("a", max_new_tokens=5000, ignore_eos=True, stop_sequences=["def"], **SEVERAL)
        )
    ]
    finishes = [event.finished.reason for event in events if event.HasField("finished")]
    assert finishes == [pb.FINISH_REASON_STOP_SEQUENCE] * 3
    await eventually(lambda: slow_door.num_cancels == cancels + 3)


async def test_cancelling_a_request_cancels_all_its_samples(slow_door):
    cancels = slow_door.num_cancels
    call = slow_door.generation.GenerateStream(
        make([1], max_new_tokens=5000, ignore_eos=True, **SEVERAL)
    )
    async for event in call:
        if event.HasField("delta"):
            break
    call.cancel()
    await eventually(lambda: slow_door.num_cancels == cancels + 3)
    assert slow_door.server.supervisor.num_open_requests == 0


async def test_an_engine_refusal_of_samples_keeps_its_reason(door):
    failed = await failure(door.generation.GenerateStream(make([REFUSED_TOKEN], **SEVERAL)))
    assert failed.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "No blocks." in failed.message


async def test_cancelling_reaches_the_engine(slow_door):
    cancels = slow_door.num_cancels
    call = slow_door.generation.GenerateStream(make([1], max_new_tokens=5000, ignore_eos=True))
    async for event in call:
        if event.HasField("delta"):
            break
    call.cancel()
    await eventually(lambda: slow_door.num_cancels == cancels + 1)
    await eventually(lambda: slow_door.server.supervisor.load.running == 0)
    assert slow_door.server.supervisor.num_open_requests == 0


async def test_a_client_that_vanishes_is_cancelled(slow_door):
    cancels = slow_door.num_cancels
    options = ["--token-ids", "1", "--ignore-eos", "--max-new-tokens", "5000", "--target"]
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "moe_server", "generate", *options, slow_door.server.address,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert (await client.stdout.read(2)).startswith(b"2 ")
    client.kill()
    await client.wait()
    await eventually(lambda: slow_door.num_cancels == cancels + 1)


async def test_a_deadline_says_the_stage_and_reaches_the_engine(slow_door):
    cancels = slow_door.num_cancels
    failed = await failure(
        slow_door.generation.GenerateStream(
            make([1], max_new_tokens=5000, ignore_eos=True), timeout=0.6
        )
    )
    assert failed.code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "it generated, " in failed.message
    assert failed.details == [ErrorInfo(reason="EXPIRED", domain="moe_server")]
    await eventually(lambda: slow_door.num_cancels == cancels + 1)


async def test_a_stalled_reader_holds_up_nobody():
    model = make_model(max_request_tokens=100_000)
    async with front_door(model=model) as door:
        stalled = door.generation.GenerateStream(
            make([1], max_new_tokens=20_000, ignore_eos=True, top_logprobs=20)
        )
        await stalled.read()
        for _ in range(3):
            call = door.generation.GenerateStream(make([1], max_new_tokens=5))
            assert (await collect(call))[2] == [2, 3, 4, 5, 6]
        stalled.cancel()


async def test_a_reader_that_stalls_for_long_loses_its_request_and_nobody_else(monkeypatch):
    monkeypatch.setattr("moe_server.open_requests.MAX_UNREAD", 20_000)
    model = make_model(max_request_tokens=100_000)
    async with front_door(model=model) as door:
        cancels = door.num_cancels
        stalled = door.generation.GenerateStream(
            make([1], max_new_tokens=90_000, ignore_eos=True, top_logprobs=20)
        )
        await stalled.read()
        reading = door.generation.GenerateStream(make([1], max_new_tokens=5000, ignore_eos=True))
        assert len((await collect(reading))[2]) == 5000
        # The engine forgets it, though its client still holds the stream.
        await eventually(lambda: door.num_cancels == cancels + 1)
        await eventually(lambda: door.server.supervisor.load.running == 0)

        async def read_on() -> None:
            while await stalled.read():
                pass

        with pytest.raises(grpc.aio.AioRpcError, match="unread") as caught:
            await read_on()
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert door.server.supervisor.num_open_requests == 0


async def test_many_streams_side_by_side(door):
    calls = [
        collect(door.generation.GenerateStream(make([n], max_new_tokens=10, ignore_eos=True)))
        for n in range(70)
    ]
    for n, (_, _, token_ids, _) in enumerate(await asyncio.gather(*calls)):
        assert token_ids == [(n + 1 + i) % 100 for i in range(10)]


async def test_an_engine_refusal_keeps_its_reason_and_its_delay(door):
    failed = await failure(door.generation.GenerateStream(make([REFUSED_TOKEN])))
    assert failed.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "No blocks." in failed.message
    assert isinstance(failed.details[0], RetryInfo)
    assert failed.details[0].retry_delay.ToTimedelta().total_seconds() == REFUSED_RETRY_S


async def test_a_full_server_refuses_with_retry_info():
    config = make_config(scheduler=small_queue(2))
    model = make_model(max_request_tokens=100_000)
    async with front_door("--step-s", "0.01", config=config, model=model) as door:
        calls = [
            door.generation.GenerateStream(make([1], max_new_tokens=5000, ignore_eos=True))
            for _ in range(2)
        ]
        for call in calls:
            await call.read()
        failed = await failure(door.generation.GenerateStream(make([1])))
        assert failed.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert failed.details[0].retry_delay.seconds > 0
        calls[0].cancel()
        await eventually(lambda: door.server.supervisor.num_open_requests == 1)
        assert (await collect(door.generation.GenerateStream(make([1]))))[2][0] == 2


async def test_before_ready_requests_are_refused_with_retry_info(tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    async with front_door("--gate", str(gate), until=ServerState.LOADING) as door:
        for metadata in ((), (("x-moe-server-probe", "guess"),)):
            failed = await failure(door.generation.GenerateStream(make([1]), metadata=metadata))
            assert failed.code == grpc.StatusCode.UNAVAILABLE
            assert "loading" in failed.message
            assert failed.details[0].retry_delay.seconds > 0
        await asyncio.to_thread(gate.write_bytes, b"go")
        await door.reach(ServerState.READY)
        assert (await collect(door.generation.GenerateStream(make([1]))))[2][0] == 2


async def test_a_lost_engine_fails_streams_as_retryable_and_comes_back():
    model = make_model(max_request_tokens=100_000)
    async with front_door("--step-s", "0.01", model=model) as door:
        call = door.generation.GenerateStream(make([1], max_new_tokens=9000, ignore_eos=True))
        assert await anext(aiter(call))
        os.kill(door.server.supervisor.engine_pid, signal.SIGKILL)
        failed = await failure(call)
        assert failed.code == grpc.StatusCode.UNAVAILABLE
        assert "SIGKILL" in failed.message
        assert failed.details[0].retry_delay.seconds > 0
        await door.reach(ServerState.READY)
        assert door.server.supervisor.num_restarts == 1
        assert (await collect(door.generation.GenerateStream(make([1]))))[2][0] == 2


async def test_messages_go_through_the_chat_template():
    async with front_door(model=make_model(chat=letters_chat())) as door:
        call = door.generation.GenerateStream(make([("system", "ab"), ("user", "c")]))
        started, text, token_ids, _ = await collect(call)
        assert (started.prompt_tokens, token_ids[:3], text[:3]) == (5, [0, 1, 2], "abc")


@pytest.mark.parametrize("has_tokenizer", [True, False])
async def test_messages_without_a_template_are_a_failed_precondition(has_tokenizer):
    async with front_door(model=make_model(has_tokenizer=has_tokenizer)) as door:
        failed = await failure(door.generation.GenerateStream(make([("user", "a")])))
    assert failed.code == grpc.StatusCode.FAILED_PRECONDITION
    assert ("no chat template" if has_tokenizer else "no tokenizer") in failed.message
    assert "chat_template.jinja" in failed.message


async def test_a_conversation_that_must_be_prepared_holds_up_nobody():
    go = threading.Event()

    class SlowChat:
        is_prepared = False

        def prepare(self) -> None:
            go.wait(WAIT_S)
            self.is_prepared = True

        def encode(self, messages, _max_tokens, _answer):
            go.wait(WAIT_S)
            return [len(messages)]

    async with front_door(model=make_model(chat=SlowChat())) as door:
        chat = asyncio.create_task(
            collect(door.generation.GenerateStream(make([("user", "a")], max_new_tokens=1)))
        )
        call = door.generation.GenerateStream(make("a", max_new_tokens=1))
        assert (await collect(call))[2] == [1]
        assert not chat.done()
        go.set()
        assert (await chat)[2] == [2]


async def test_few_long_prompts_are_tokenised_at_a_time():
    go, lock = threading.Event(), threading.Lock()
    working = most = 0

    def encode(_text: str, _max_tokens: int) -> list[int]:
        nonlocal working, most
        with lock:
            working += 1
            most = max(most, working)
        go.wait()
        with lock:
            working -= 1
        return [1]

    tokenizer = Tokenizer(encode, [b"x" * 1000] * 100, adds_leading_space=False)
    async with front_door(model=make_model(tokenizer=tokenizer)) as door:
        call = door.generation.GenerateStream
        given_up = [call(make("a" * 3000, max_new_tokens=2)) for _ in range(MAX_TOKENISING)]
        await eventually(lambda: working == MAX_TOKENISING)
        for early in given_up:
            early.cancel()
        calls = [call(make("a" * 3000, max_new_tokens=2)) for _ in range(4)]
        await eventually(lambda: door.server.supervisor.num_open_requests == len(calls))
        go.set()
        assert [(await collect(call))[2] for call in calls] == [[2, 3]] * len(calls)
    assert most == MAX_TOKENISING


async def test_a_prompt_that_cannot_fit_is_refused_by_its_size_unread():
    def encode(_text: str, _max_tokens: int) -> list[int]:
        raise AssertionError("it was read")

    tokenizer = Tokenizer(encode, [b"a", b"long", b""], adds_leading_space=False)
    async with front_door(model=make_model(tokenizer=tokenizer)) as door:
        for text in ("a" * 3_000_000, "\u00e9" + "a" * 251):
            failed = await failure(door.generation.GenerateStream(make(text)))
            assert failed.code == grpc.StatusCode.INVALID_ARGUMENT
            assert failed.details[0].field_violations[0].field == "prompt"
            assert f"{len(text.encode())} bytes" in failed.message
            assert "63 tokens" in failed.message
        failed = await failure(door.generation.GenerateStream(make("a" * 252)))
        assert failed.code == grpc.StatusCode.INTERNAL
