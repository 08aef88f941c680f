"""`moe-server serve`: opens the front door, checks what can be known to be wrong, starts models."""

import asyncio
import signal
from collections.abc import Iterator, Sequence

import click
import structlog

from moe_server import preflight
from moe_server.chat.chat import load_chat
from moe_server.commands.config_flags import with_config
from moe_server.config import Config
from moe_server.notify import notifying
from moe_server.patience import Patience, longest_step_s
from moe_server.planned_models import PlannedModel
from moe_server.service.running_model import ModelSetup
from moe_server.service.served_model import ServedModel
from moe_server.service.server import Server
from moe_server.startup import Startup
from moe_server.tokenizer import load_tokenizer
from moe_server.warmup.hot_set import OFF, HotSetKeeper
from moe_server.warmup.recorded import read_requests
from moe_server.warmup.stages import PREFLIGHT

log = structlog.get_logger(__name__)


@click.command(
    epilog="Example: moe-server serve --model /models/Mixtral-8x7B --device-memory 24GiB "
    "--host-memory 64GiB --listen 0.0.0.0:50051"
)
@with_config
def serve(config: Config) -> None:
    """Serve a checkpoint over gRPC, and those of `models` in the configuration beside it.

    The port opens at once; requests are taken when the warm-up has proven that the server keeps its
    limits. A checkpoint whose files are incomplete is waited for. SIGTERM or Ctrl-C lets accepted
    requests finish for service.shutdown_grace_s and exits with 0; a second one cuts them off and
    exits with 130.
    """
    is_cut_off = asyncio.run(_run(config))
    if is_cut_off:
        raise KeyboardInterrupt


def _prepare(config: Config, startups: Sequence[Startup]) -> list[ModelSetup]:
    """The preflight; raises as `preflight.check` does."""
    for startup in startups:
        startup.stages.enter(PREFLIGHT)
    planned = preflight.check(config)
    setups = [_setup(model) for model in planned]
    for model, setup, startup in zip(planned, setups, startups, strict=True):
        names = {"model": model.name} if len(planned) > 1 else {}
        for what, amount in model.plan.table():
            log.info("plan", what=what.strip(), amount=amount, **names)
        warnings = [*preflight.warnings(model), *_textless(setup), *_unsent(setup)]
        startup.stages.warn(warnings)
        for warning in warnings:
            log.warning("preflight", found=warning, **names)
    return setups


def _setup(planned: PlannedModel) -> ModelSetup:
    config, checkpoint = planned.config, planned.checkpoint
    tokenizer = load_tokenizer(config.model_path)
    chat = load_chat(config.model_path, tokenizer)
    setting = config.warmup.hot_set
    has_hot_set = bool(checkpoint.experts) and setting != OFF
    return ModelSetup(
        config,
        ServedModel.of(config, checkpoint, planned.plan, tokenizer, chat),
        Patience(busy_s=longest_step_s(config, checkpoint.num_active_parameters)),
        hot_set=HotSetKeeper(checkpoint, setting) if has_hot_set else None,
        requests=read_requests(config.warmup.requests) if config.warmup.requests else (),
    )


def _textless(setup: ModelSetup) -> Iterator[str]:
    if setup.model.tokenizer is None:
        yield (
            f"{setup.config.model_path} has neither tokenizer.model nor tokenizer.json: only "
            "token_ids are taken. If there is to be text, bring one and start again."
        )


def _unsent(setup: ModelSetup) -> Iterator[str]:
    """Recorded requests that bring this model nothing."""
    names = {recorded.request.model for recorded in setup.requests}
    if names and not names & {"", setup.model.name}:
        yield (
            f"None of the {len(setup.requests)} requests in {setup.config.warmup.requests} is to "
            f"this model, {setup.model.name!r}; they are to {', '.join(map(repr, sorted(names)))}: "
            "name it there, or record them anew."
        )


async def _run(config: Config) -> bool:
    """Serves until a signal; returns whether a second one came.

    Raises:
        MoeServerError: The port is taken, or the models cannot be served.
    """
    startups = [Startup(model.served_name) for model in config.all_models]
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signals.put_nowait, number)
    # After the handlers: a cancellation by Ctrl-C would leave gRPC's listeners half made.
    server = Server(config, startups)
    await server.open()

    async def start() -> None:
        setups = await preflight.wait(lambda: _prepare(config, startups), startups)
        server.models.start(setups)

    starting = asyncio.create_task(start(), name="start")
    signalled = asyncio.create_task(signals.get(), name="signals")
    async with notifying(server.models, config.service.shutdown_grace_s):
        await asyncio.wait({starting, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and (failure := starting.exception()) is not None:
            await server.shut_down(0)
            raise failure
        received = signal.Signals(await signalled)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    log.info("shutting down", signal=received.name, grace_s=config.service.shutdown_grace_s)
    in_order = asyncio.create_task(server.shut_down(config.service.shutdown_grace_s))
    second = asyncio.create_task(signals.get())
    await asyncio.wait({in_order, second}, return_when=asyncio.FIRST_COMPLETED)
    if in_order.done():
        second.cancel()
        await in_order
        return False
    in_order.cancel()
    await asyncio.gather(in_order, return_exceptions=True)
    await server.models.close(at_once=True)
    return True
