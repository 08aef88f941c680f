"""A client's deadline, kept a little earlier by ourselves."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from moe_server.errors import MoeServerError, Reason
from moe_server.service.registration import Context

MAX_MARGIN_S = 0.05
"""We end a request this much before its deadline (or a tenth of the time, if that is less), so that
the client hears from us which stage it had reached, not from its own timer that time is up."""


@asynccontextmanager
async def deadline_of(
    context: Context, stage: Callable[[], str], remedy: str
) -> AsyncIterator[float | None]:
    """Runs a handler's work within its RPC's deadline.

    Args:
        context: The RPC's.
        stage: How far the request has come: "it waited".
        remedy: What would take less time.

    Yields:
        The deadline as `time.monotonic()` has it; None without one.

    Raises:
        MoeServerError: EXPIRED, with the stage.
    """
    remaining_s: float | None = context.time_remaining()
    own_limit_s = deadline = None
    if remaining_s is not None:
        own_limit_s = remaining_s - min(MAX_MARGIN_S, remaining_s / 10)
        deadline = time.monotonic() + remaining_s
    try:
        async with asyncio.timeout(own_limit_s) as timer:
            yield deadline
    except TimeoutError:
        if not timer.expired():
            raise
        raise MoeServerError(
            f"The deadline passed while {stage()}.", remedy, reason=Reason.EXPIRED
        ) from None
