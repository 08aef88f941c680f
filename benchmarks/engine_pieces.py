"""What a step costs beside the model: every piece between the scheduler and a client's message.

The pieces are the server's own, one after the other in one process, on the embedded model's engine
with the model itself replaced by logits of Mixtral's size. Microseconds for a step of a whole batch
that decodes; gRPC's own share is not in it (`engine_throughput` sees that).
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch
import zmq

from benchmarks.engine_inside import loaded_engine
from moe_server.checkpoint import read_checkpoint
from moe_server.config import load_config
from moe_server.messages import FromEngine, StepDone, Submit
from moe_server.open_requests import OpenRequests
from moe_server.proto.moe_server.v1 import generation_pb2 as pb
from moe_server.sampler import sample
from moe_server.service.text_stream import TextStream
from moe_server.tokenizer import load_tokenizer

VOCABULARY = 32_000
PROMPT_TOKENS = 16
STEPS = 200
WARM_STEPS = 20
OTHERS = "engine step without the model"
"""It contains `schedule` and `sample`."""


def measure(batch: int) -> dict[str, float]:
    """Microseconds of each piece for a step of `batch` requests, medians."""
    config = load_config(flags={"model": "demo", "dense_backend": "resident"}, environ={})
    engine = loaded_engine(config, read_checkpoint(config.model_path))
    torch.manual_seed(0)
    # Ids below the tokenizer's size, so that there is text to decode.
    logits = torch.randn(batch, VOCABULARY)
    logits[:, 1000:] -= 20
    vars(engine.model)["forward"] = lambda _inputs, _poll: logits
    tokenizer = load_tokenizer(config.model_path)
    assert tokenizer is not None
    requests, texts = OpenRequests(batch), {}
    for number in range(batch):
        opened = requests.open()
        prompt = [3 + number] * PROMPT_TOKENS
        engine.submit(Submit(opened.request_id, prompt, 10 * STEPS, eos_token_ids=[]))
        texts[opened.request_id] = TextStream(tokenizer.detokenizer(), [])
    found: dict[str, list[float]] = {}

    def timed(name: str, piece: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = piece()
        found.setdefault(name, []).append(1e6 * (time.perf_counter() - began))
        return result

    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder[FromEngine](FromEngine)
    with _pair() as (here, there):
        engine.step()  # the prompts
        for _ in range(WARM_STEPS + STEPS):
            scheduler = engine.scheduler
            step = timed("schedule", lambda: scheduler.schedule(time.monotonic()))  # noqa: B023
            running = [part.sequence for part in step]
            timed("sample", lambda: sample(logits, running))  # noqa: B023
            done: StepDone = timed(OTHERS, engine.step)
            frame = timed("encode", lambda: encoder.encode(done))  # noqa: B023
            frame = timed("send and receive", lambda: (there.send(frame), here.recv())[1])  # noqa: B023
            read = timed("decode", lambda: decoder.decode(frame))  # noqa: B023
            assert isinstance(read, StepDone)
            timed("deliver", lambda: [requests.deliver(event) for event in read.tokens])  # noqa: B023
            released = timed(
                "text",
                lambda: [
                    texts[event.request_id].push([event], is_last=False)
                    for event in read.tokens  # noqa: B023
                ],
            )
            timed("protobuf", lambda: [_message(each) for each in released])  # noqa: B023
    engine.close()
    return {name: statistics.median(times[WARM_STEPS:]) for name, times in found.items()}


def _message(released: Any) -> bytes:
    ids = [event.token_id for event in released.tokens]
    message = pb.GenerateStreamResponse(delta=pb.Delta(text=released.text, token_ids=ids))
    return message.SerializeToString()


@contextmanager
def _pair() -> Iterator[tuple["zmq.Socket[bytes]", "zmq.Socket[bytes]"]]:
    """Two connected sockets as between the processes."""
    context = zmq.Context()
    with TemporaryDirectory() as folder:
        here, there = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        address = f"ipc://{Path(folder) / 'pair'}"
        here.bind(address)
        there.connect(address)
        try:
            yield here, there
        finally:
            context.destroy(linger=0)


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
