"""A stand-in for the engine process whose tokens can be checked by hand.

Speaks the same messages over the same socket, in its own process: token i+1 = (last + 1) % vocab.
`python -m tests.fake_engine [--vocab N] [--step-s S] [...] ADDRESS MEMORY PULSE SUPERVISOR`.
It imports no torch.

What tests read from its heartbeat: `running` as in the real engine, `blocks_used` = the
number of Cancel messages read, `blocks_total` = the number of Submit messages read. Each engine
leaves one byte more in its memory.
"""

import argparse
import ctypes
import json
import os
import signal
import time
from itertools import count, repeat
from pathlib import Path

import msgspec
import zmq
from msgspec import structs

from moe_server.errors import Reason
from moe_server.messages import (
    Cancel,
    EngineLoad,
    Fatal,
    FinishReason,
    HotSet,
    Loaded,
    Progress,
    RequestFailed,
    Rewarm,
    RewarmOutcome,
    RewarmProgress,
    Shutdown,
    StepDone,
    StopRewarm,
    Submit,
    TargetScore,
    TellHotSet,
    Timings,
    ToEngine,
    TokenEvent,
)
from moe_server.pulse import Pulse

HEARTBEAT_MS = 50
REFUSED_RETRY_S = 7.5


class FakeEngine:
    def __init__(self, options: argparse.Namespace, socket: zmq.Socket) -> None:
        self.options = options
        self.socket = socket
        self.running: dict[int, tuple[Submit, list[int]]] = {}
        self.num_submits = self.num_cancels = 0
        self.rewarming: RewarmProgress | None = None
        self.decoder = msgspec.msgpack.Decoder(ToEngine)

    def send(self, message) -> None:
        self.socket.send(msgspec.msgpack.encode(message))

    def start(self) -> bool:
        config = json.loads(self.socket.recv())
        assert "model" in config
        self.send(Progress("weights", 0, 100))
        if self.options.fatal:
            self.send(
                Fatal(Reason.EXHAUSTED, "No memory.", "Buy some.", self.options.fatal == "retry")
            )
            return False
        if self.options.gate:
            # A named pipe: opening it waits until the test opens its other end.
            Path(self.options.gate).read_bytes()
        self.send(Progress("experts", 100, 100))
        self.send(Loaded(0.0, 0, outlasts_engine=False))
        return True

    def run(self) -> None:
        while True:
            wait_ms = 0 if self.running else HEARTBEAT_MS
            while self.socket.poll(wait_ms):
                wait_ms = 0
                message = self.decoder.decode(self.socket.recv())
                if isinstance(message, Shutdown):
                    return
                self.take(message)
            self.step()

    def take(self, message: ToEngine) -> None:
        if isinstance(message, HotSet):
            self.hot_set = message
        if isinstance(message, TellHotSet):
            # Once more than it was told.
            self.send(HotSet([visits + 1 for visits in self.hot_set.visits or [0]], []))
        if isinstance(message, Rewarm):
            self.rewarming = RewarmProgress(
                message.rewarm_id, 0, self.options.rewarm_steps, 0, 0, 0
            )
        if isinstance(message, StopRewarm) and self.rewarming:
            self.send(structs.replace(self.rewarming, outcome=RewarmOutcome.STOPPED))
            self.rewarming = None
        if not isinstance(message, Submit | Cancel):
            return
        if isinstance(message, Cancel):
            self.num_cancels += 1
            self.running.pop(message.request_id, None)
            return
        self.num_submits += 1
        assert message.token_ids
        assert message.max_new_tokens >= 1
        self.running[message.request_id] = (message, list(message.token_ids))

    def step(self) -> None:
        if self.running and self.options.step_s:
            time.sleep(self.options.step_s)
        events, failed = [], []
        for request_id, (submit, token_ids) in list(self.running.items()):
            if self.options.refuse_token in submit.token_ids:
                refusal = RequestFailed(
                    request_id, Reason.EXHAUSTED, "No blocks.", "Wait.", retry_s=REFUSED_RETRY_S
                )
                failed.append(refusal)
                del self.running[request_id]
                continue
            token = (token_ids[-1] + 1) % self.options.vocab
            if token == self.options.slow_token:
                time.sleep(self.options.slow_s)
            token_ids.append(token)
            finish = self.finish(submit, token_ids)
            events.append(self.event(submit, token, finish))
            if finish is not None:
                del self.running[request_id]
            if self.options.crash_token == token and not Path(self.options.crash_once).exists():
                Path(self.options.crash_once).touch()
                os._exit(7)
        load = EngineLoad(
            len(self.running),
            0,
            self.num_cancels,
            self.num_submits,
            blocks_kept=5,
            preemptions=6,
            hopeless=9,
            overdue=10,
            prompt_tokens=7,
            cached_tokens=8,
        )
        self.send(StepDone(load, events, failed))
        if self.rewarming:
            self.rewarm()

    def rewarm(self) -> None:
        """One expert more."""
        done = self.rewarming.experts_done + 1
        is_last = done == self.rewarming.experts_total
        outcome = RewarmOutcome.DONE if is_last else None
        progress = structs.replace(self.rewarming, experts_done=done, outcome=outcome)
        self.send(progress)
        self.rewarming = None if is_last else progress

    def finish(self, submit: Submit, token_ids: list[int]) -> FinishReason | None:
        if token_ids[-1] in submit.eos_token_ids:
            return FinishReason.END_OF_SEQUENCE
        if token_ids[-1] in submit.stop_token_ids:
            return FinishReason.STOP_TOKEN
        if len(token_ids) - len(submit.token_ids) >= submit.max_new_tokens:
            return FinishReason.LENGTH
        return None

    def score(self, submit: Submit) -> list[TargetScore]:
        """The next token in order has a log-probability of -0.25, all others of -1.5."""
        before = submit.token_ids[len(submit.token_ids) - len(submit.targets) :]
        likely = [(token + 1) % self.options.vocab for token in before]
        matches = [token == target for token, target in zip(likely, submit.targets, strict=True)]
        return [TargetScore(-0.25 if is_likely else -1.5, is_likely) for is_likely in matches]

    def event(self, submit: Submit, token: int, finish: FinishReason | None) -> TokenEvent:
        n = submit.logprobs
        return TokenEvent(
            submit.request_id,
            token,
            logprob=None if n < 0 else -0.5,
            target_scores=self.score(submit),
            embedding=[0.6, 0.8] if submit.pools else [],
            top_logprobs=[(token + i, -0.5 - i) for i in range(max(n, 0))],
            finish=finish,
            cached_tokens=1,
            timings=Timings(queue_s=0.25, decode_s=1.5, read_bytes=7),
        )


def die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main() -> None:
    die_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocab", type=int, default=100)
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--slow-token", type=int, default=-1)
    parser.add_argument("--slow-s", type=float, default=0.0)
    parser.add_argument("--fatal", choices=["retry", "final"])
    parser.add_argument("--gate", default="")
    parser.add_argument("--refuse-token", type=int, default=-1)
    parser.add_argument("--crash-token", type=int, default=-1)
    parser.add_argument("--crash-once", default="", help="a file; no crash where it exists")
    parser.add_argument("--rewarm-steps", type=int, default=3)
    parser.add_argument("--pulse", dest="has_pulse", action="store_true")
    parser.add_argument("--advancing", action="store_true", help="its pulse tells of work")
    parser.add_argument("address")
    parser.add_argument("memory", type=int, help="an inherited descriptor")
    parser.add_argument("pulse", type=int, help="an inherited descriptor")
    parser.add_argument("supervisor", type=int, help="a process id")
    options = parser.parse_args()
    os.write(options.memory, b"!")
    if options.has_pulse:
        work = count() if options.advancing else repeat(0)
        Pulse(options.pulse).give(lambda: next(work))
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.connect(options.address)
    engine = FakeEngine(options, socket)
    if engine.start():
        engine.run()
    context.destroy(linger=1000)


if __name__ == "__main__":
    main()
