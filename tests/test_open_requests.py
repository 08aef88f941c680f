import asyncio

import pytest

from moe_server.errors import MoeServerError, Reason
from moe_server.messages import FinishReason, RequestFailed, TokenEvent
from moe_server.open_requests import MAX_UNREAD, OpenRequests


def token(request_id: int, token_id: int, *, last: bool = False) -> TokenEvent:
    return TokenEvent(request_id, token_id, finish=FinishReason.LENGTH if last else None)


async def test_a_lagging_reader_gets_everything_in_few_batches():
    requests = OpenRequests(limit=1)
    request = requests.open()
    batches = []
    requests.deliver(token(request.request_id, 0))
    async for batch in request:
        batches.append([event.token_id for event in batch])
        if len(batches) == 1:
            for token_id in range(1, 50):
                requests.deliver(token(request.request_id, token_id))
            requests.deliver(token(request.request_id, 50, last=True))
    assert batches == [[0], list(range(1, 51))]
    assert request.ended


async def test_failure_comes_after_what_was_delivered():
    requests = OpenRequests(limit=1)
    request = requests.open()
    requests.deliver(token(request.request_id, 7))
    requests.fail(RequestFailed(request.request_id, Reason.EXPIRED, "Too late.", "Hurry."))
    batches = aiter(request)
    assert [event.token_id for event in await anext(batches)] == [7]
    with pytest.raises(MoeServerError, match=r"Too late\. Hurry\.") as caught:
        await anext(batches)
    assert caught.value.reason is Reason.EXPIRED


async def test_places_are_bounded_and_given_back():
    requests = OpenRequests(limit=2)
    first, second = requests.open(), requests.open()
    with pytest.raises(MoeServerError) as caught:
        requests.open()
    assert caught.value.reason is Reason.EXHAUSTED
    waiting = asyncio.create_task(requests.wait_empty())
    requests.close(first)
    requests.close(first)
    assert requests.open().request_id not in (first.request_id, second.request_id)
    assert len(requests) == 2
    assert not waiting.done()
    waiting.cancel()


async def test_events_of_unknown_requests_are_dropped():
    requests = OpenRequests(limit=1)
    request = requests.open()
    requests.close(request)
    requests.deliver(token(request.request_id, 1))
    requests.fail(RequestFailed(request.request_id, Reason.EXPIRED, "Too late."))
    requests.fail_all("Lost.", "")
    assert not request.ended


async def test_fail_all_spares_what_has_finished():
    requests = OpenRequests(limit=2)
    finished, open_ = requests.open(), requests.open()
    requests.deliver(token(finished.request_id, 1, last=True))
    requests.fail_all("Lost.", "Retry.")
    assert [len(batch) async for batch in finished] == [1]
    with pytest.raises(MoeServerError, match="Lost") as caught:
        await anext(aiter(open_))
    assert caught.value.reason is Reason.UNAVAILABLE


async def test_what_a_client_does_not_read_is_bounded():
    """Alternatives count: they are most of what an event takes."""
    requests = OpenRequests(1)
    request = requests.open()
    event = TokenEvent(request.request_id, 5, top_logprobs=[(1, -0.5)] * 4)
    room = MAX_UNREAD // 5
    assert all(requests.deliver(event) for _ in range(room))
    batches = aiter(request)
    assert len(await anext(batches)) == room
    assert all(requests.deliver(event) for _ in range(room)), "what was read makes room"
    assert not requests.deliver(event)
    assert request.ended
    assert requests.deliver(event), "the engine is told once"
    with pytest.raises(MoeServerError, match="unread") as caught:
        await anext(batches)
    assert caught.value.reason is Reason.EXHAUSTED
