"""The engine process: `python -m moe_server.engine_process ADDRESS MEMORY PULSE SUPERVISOR`.

Started by the supervisor: ADDRESS is its socket, MEMORY the descriptor of the file that experts are
kept in from one engine to the next, PULSE that of the page where the watchdog looks,
SUPERVISOR the process id of who started it. Gets the configuration as the first frame and the hot
set as the second, loads, and then repeats: drain the inbox, run a step, send what it brought in one
message. Sends a heartbeat while idle, and now and then how often experts were wanted. Ends on
Shutdown or when the supervisor is gone; Ctrl-C is the supervisor's business.
"""

import ctypes
import importlib.util
import os
import signal
import sys
import time
import traceback

import msgspec
import zmq

from moe_server.budget import plan_memory
from moe_server.checkpoint import read_checkpoint
from moe_server.config import ModelConfig
from moe_server.errors import MoeServerError, Reason
from moe_server.messages import (
    Fatal,
    FromEngine,
    HotSet,
    Loaded,
    Progress,
    Shutdown,
    ToEngine,
)
from moe_server.pulse import Pulse
from moe_server.read_ahead import read_ahead
from moe_server.warmup.stages import LIBRARIES
from moe_server.weights import Weights, lasting_memory

HEARTBEAT_MS = 500
REWARMING_MS = 10
"""Between two looks at what the disk has brought, while there are no requests."""
PROGRESS_INTERVAL_S = 0.1
SWITCH_INTERVAL_S = 0.0005
PACKAGES = ("torch", "deepspeed", "numpy")
"""What is imported while the disk is busy, and consists of many files."""

_PR_SET_PDEATHSIG = 1


class Outbox:
    """Messages to the supervisor."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()
        self._last_progress = 0.0

    def send(self, message: FromEngine) -> None:
        """Hands a message to the socket; never blocks on a slow reader."""
        self._socket.send(self._encoder.encode(message))

    def progress(self, progress: Progress) -> None:
        """Sends progress, not more often than somebody can look at it."""
        now = time.monotonic()
        complete = progress.bytes_done >= progress.bytes_total
        if complete or now - self._last_progress >= PROGRESS_INTERVAL_S:
            self._last_progress = now
            self.send(progress)


def main() -> None:
    """Runs the process until it is told to end."""
    # Ctrl-C, systemd and `timeout` send them to all processes; the supervisor says when to end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    memory, pulse, supervisor = map(int, sys.argv[2:])
    _die_with(supervisor)
    # Read by OpenMP when torch is imported. Threads that spin at a barrier wait for one that has
    # lost its core: with one of two cores busy elsewhere the demo model decoded 10.6 tokens/s
    # spinning and 62.9 sleeping.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    # What is unread when the process ends must not keep it: the supervisor may be gone.
    socket.setsockopt(zmq.LINGER, 1000)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(sys.argv[1])
    outbox = Outbox(socket)
    status = 0
    try:
        _serve(ModelConfig.model_validate_json(socket.recv()), memory, Pulse(pulse), socket, outbox)
    except MoeServerError as error:
        outbox.send(Fatal.of(error))
        status = 2
    except Exception as error:  # noqa: BLE001  the supervisor has to hear of anything that ends us
        traceback.print_exc()
        outbox.send(
            Fatal(Reason.UNAVAILABLE, f"The engine failed: {error!r}.", "See its log.", True)
        )
        status = 1
    finally:
        socket.close()
        context.term()
    sys.stdout.flush()
    # Interpreter shutdown would wait for threads of libraries that are of no use any more.
    os._exit(status)


def _serve(
    config: ModelConfig, memory: int, pulse: Pulse, socket: "zmq.Socket[bytes]", outbox: Outbox
) -> None:
    started = time.monotonic()
    decoder = msgspec.msgpack.Decoder(ToEngine)
    hot_set = decoder.decode(socket.recv())
    assert isinstance(hot_set, HotSet), hot_set
    checkpoint = read_checkpoint(config.model_path)
    plan = plan_memory(config, checkpoint)
    outbox.progress(Progress(LIBRARIES))
    if config.device == "cuda":
        _check_cuda()
    # The disk works while libraries are imported; a lower interval lets its threads have the GIL.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    lasting = lasting_memory(memory, config, checkpoint, plan)
    weights = Weights(config, checkpoint, plan, lasting, hot_set)
    read_ahead(*PACKAGES)
    weights.begin()
    pulse.give(lambda: weights.reader.counters.bytes)
    # Heavy imports, after the messages that tell the front door we live.
    from moe_server.engine import Engine  # noqa: PLC0415
    from moe_server.warmup.preload import preload, resident_expert_s  # noqa: PLC0415

    is_shutdown = False

    def drain_inbox(timeout_ms: int = 0) -> None:
        nonlocal is_shutdown
        while not is_shutdown and socket.poll(timeout_ms):
            timeout_ms = 0
            message = decoder.decode(socket.recv())
            if isinstance(message, Shutdown):
                is_shutdown = True
                engine.cancel_all()
            else:
                engine.take(message)

    engine = Engine(config, plan, weights, drain_inbox)
    preload(engine, config, plan, outbox.progress)
    outbox.send(
        Loaded(
            time.monotonic() - started,
            weights.num_kept,
            outlasts_engine=lasting is not None,
            expert_s=resident_expert_s(engine),
            disk_bytes_per_s=engine.cache.tiers.cost.disk.bytes_per_s or 0.0,
            copy_bytes_per_s=engine.cache.tiers.cost.copy.bytes_per_s or 0.0,
        )
    )
    while True:
        idle_ms = REWARMING_MS if engine.hot_experts.is_rewarming else HEARTBEAT_MS
        drain_inbox(idle_ms if engine.idle else 0)
        if is_shutdown:
            engine.close()
            return
        outbox.send(engine.step())
        for message in engine.between_steps():
            outbox.send(message)


def _check_cuda() -> None:
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        raise MoeServerError(
            "device is cuda, but torch finds no GPU.",
            "Use --device cpu, or install a CUDA build of torch and the driver.",
            reason=Reason.UNSUPPORTED,
            field="device",
        )
    if importlib.util.find_spec("triton") is None:
        raise MoeServerError(
            "device is cuda, but Triton, which its kernels are written in, is not installed.",
            "Install it: pip install 'moe-server[gpu]'.",
            reason=Reason.UNSUPPORTED,
            field="device",
        )


def _die_with(supervisor: int) -> None:
    """Asks the kernel to kill us when the supervisor dies, however it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may be dead already: until here takes Python's own start.
    if os.getppid() != supervisor:
        sys.exit("The supervisor is gone.")


if __name__ == "__main__":
    main()
