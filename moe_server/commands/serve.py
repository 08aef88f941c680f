"""`moe-server serve`: checks everything that can be wrong beforehand, then runs the front door."""

import asyncio
import signal

import click
import structlog

from moe_server.budget import check_room, plan_memory
from moe_server.chat.chat import load_chat
from moe_server.checkpoint import read_checkpoint
from moe_server.commands.config_flags import with_config
from moe_server.config import Config
from moe_server.patience import Patience, longest_step_s
from moe_server.service.served_model import ServedModel
from moe_server.service.server import Server
from moe_server.tokenizer import load_tokenizer

log = structlog.get_logger(__name__)


@click.command(
    epilog="Example: moe-server serve --model /models/Mixtral-8x7B --device-memory 24GiB "
    "--host-memory 64GiB --listen 0.0.0.0:50051"
)
@with_config
def serve(config: Config) -> None:
    """Serve a checkpoint over gRPC.

    The port opens at once; requests are taken when the warm-up has proven that the server keeps its
    limits. SIGTERM or Ctrl-C lets accepted requests finish for service.shutdown_grace_s and exits
    with 0; a second one cuts them off and exits with 130.
    """
    checkpoint = read_checkpoint(config.model_path)
    plan = plan_memory(config, checkpoint)
    check_room(plan, config)
    # Decided once: the engine, and every restart of it, gets the budget that was checked here.
    config = config.model_copy(update={"device_memory": plan.device_budget_bytes})
    tokenizer = load_tokenizer(config.model_path)
    chat = load_chat(config.model_path, tokenizer)
    model = ServedModel.of(config, checkpoint, plan, tokenizer, chat)
    for what, amount in plan.table():
        log.info("plan", what=what.strip(), amount=amount)
    patience = Patience(busy_s=longest_step_s(config, model.num_active_parameters))
    is_cut_off = asyncio.run(_run(config, model, patience))
    if is_cut_off:
        raise KeyboardInterrupt


async def _run(config: Config, model: ServedModel, patience: Patience) -> bool:
    """Serves until a signal; returns whether a second one came."""
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signals.put_nowait, number)
    # After the handlers: a cancellation by Ctrl-C would leave gRPC's listeners half made.
    server = Server(config, model, patience)
    await server.open()
    received = signal.Signals(await signals.get())
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
    await server.supervisor.stop(at_once=True)
    return True
