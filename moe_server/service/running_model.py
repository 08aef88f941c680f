"""One model of a running server: its facts, its engine's supervisor, and what is made for it alone.

Made by `server`, found by name in `registry`; the services use its parts. Knows of no other model.
"""

import asyncio
import contextvars
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from structlog.contextvars import bind_contextvars

from moe_server.config import ModelConfig
from moe_server.constraints.trials import Trials
from moe_server.messages import Loaded
from moe_server.patience import Patience
from moe_server.proto.moe_server.v1.generation_pb2 import RecordedRequest
from moe_server.service.prompts import Prompts
from moe_server.service.recorder import Recorder
from moe_server.service.served_model import ServedModel
from moe_server.startup import Startup
from moe_server.state import ServerState
from moe_server.supervisor import ENGINE_COMMAND, Supervisor
from moe_server.warmup.hot_set import HotSetKeeper
from moe_server.warmup.ladder import as_people_send_it, ladder, longest_prompt, num_shapes
from moe_server.warmup.limits import Limits, Speeds, Work
from moe_server.warmup.probe import ProbeShape
from moe_server.warmup.recorded import of_model
from moe_server.warmup.warm_up import FirstRequests, WarmUp

MAX_TOKENISING = 2
"""Long prompts tokenised at a time: one of 1 MB takes a core for a second and 100 MB meanwhile."""


@dataclass(frozen=True, slots=True)
class ModelSetup:
    """What a model is run with."""

    config: ModelConfig
    model: ServedModel
    patience: Patience
    """As in Supervisor."""
    engine_command: Sequence[str] = ENGINE_COMMAND
    """As in Supervisor."""
    hot_set: HotSetKeeper | None = None
    """As in Supervisor."""
    requests: Sequence[RecordedRequest] = ()
    """Recorded ones, which the warm-up sends; those to other models among them are left out."""


class RunningModel:
    """A model and its engine. `start` it, then `close`.

    Args:
        setup: What it is run with.
        startup: Where its start is told.
        target: The server's own listener, where the warm-up sends its requests.
        probe_metadata: Lets them in before READY.
        prove: Called with this model when its engine has loaded; awaits the warm-up when its turn
            has come.
        names_log_lines: Whether what is logged on the engine's behalf carries the model's name.
    """

    def __init__(
        self,
        setup: ModelSetup,
        startup: Startup,
        target: str,
        probe_metadata: Sequence[tuple[str, str]],
        prove: "Callable[[RunningModel, Loaded], Awaitable[None]]",
        *,
        names_log_lines: bool,
    ) -> None:
        config, model = setup.config, setup.model
        self.config = config
        self.model = model
        # Request ids count from 1 for every model, in every process.
        self.id_prefix = secrets.token_hex(4)
        # What runs in it, and the tasks that it starts, log with the name.
        self._context = contextvars.copy_context()
        if names_log_lines:
            self._context.run(bind_contextvars, model=model.name)
        self.startup = startup
        self._shape = ProbeShape.fitting(
            config.warmup.prompt_tokens,
            config.warmup.new_tokens,
            model=model.name,
            vocab_size=model.vocab_size,
            max_request_tokens=model.max_request_tokens,
        )
        self._speeds = Speeds()
        self.warm_up = WarmUp(
            config.warmup,
            self._shape,
            self._first_requests(setup.requests),
            target=target,
            metadata=probe_metadata,
            stages=startup.stages,
        )
        self.recorder = Recorder(config.warmup, model.name)
        self.prompts = Prompts(model, MAX_TOKENISING)
        self.prompts_to_show = Prompts(model, at_once=1)
        """Those that are only to be tokenised: they wait for one another, no request for them."""
        vocabulary = model.vocabulary
        self.trials = None if vocabulary is None else Trials(vocabulary)
        self.supervisor = Supervisor(
            config,
            lambda loaded: prove(self, loaded),
            setup.engine_command,
            setup.patience,
            startup,
            () if vocabulary is None else (vocabulary,),
            setup.hot_set,
        )

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def degraded(self) -> str:
        """What the proof missed of a model that serves all the same; otherwise empty."""
        serves = self.startup.state in (ServerState.READY, ServerState.DRAINING)
        return self.warm_up.degraded if serves else ""

    def limits(self, loaded: Loaded) -> Limits:
        """What the proof holds an engine to that has loaded."""
        measured = Speeds(loaded.expert_s, loaded.disk_bytes_per_s, loaded.copy_bytes_per_s)
        self._speeds = self._speeds.best_of(measured)
        model = self.model
        work = Work(model.num_layers, model.num_experts, model.num_experts_per_token, model.memory)
        return Limits.of(self.config.warmup, work, self._speeds, self._shape.prompt_tokens)

    def _first_requests(self, recorded: Sequence[RecordedRequest]) -> FirstRequests:
        config, model = self.config, self.model
        sends_text = config.warmup.text and model.tokenizer is not None
        text = as_people_send_it(model.name, is_chat=model.chat is not None)
        return FirstRequests(
            list(ladder(self._shape, longest_prompt(config), num_shapes(config))),
            text if sends_text else None,
            of_model(recorded, model.name, model.vocab_size, model.max_request_tokens),
        )

    def start(self, *, draining: bool) -> None:
        """Spawns the engine, and begins to load what the first conversation would wait for."""
        self.startup.stages.finish()
        self._context.run(lambda: self.supervisor.start(draining=draining))
        self.prompts.prepare()

    async def drain(self, wait_s: float, *, for_good: bool) -> int:
        """As Supervisor has it."""
        draining = self.supervisor.drain(wait_s, for_good=for_good)
        return await asyncio.create_task(draining, context=self._context)

    async def close(self, *, at_once: bool = False) -> None:
        """Ends the engine, in order unless `at_once`, and the process that tries constraints."""
        await self.supervisor.stop(at_once=at_once)
        if self.trials is not None:
            await self.trials.close()
