"""The engine's lives, with a fake engine and a warm-up that only counts."""

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from structlog.testing import capture_logs

from moe_server.config import Config
from moe_server.engine_link import EngineLink
from moe_server.errors import MoeServerError, Reason
from moe_server.messages import NO_HOT_SET, HotSet, Loaded, RewarmOutcome, Submit
from moe_server.patience import longest_step_s
from moe_server.startup import Startup
from moe_server.state import ServerState
from moe_server.supervisor import ENGINE_COMMAND, Supervisor
from tests.front_door import FAKE_ENGINE, PATIENCE, WAIT_S, eventually, make_config


@asynccontextmanager
async def supervised(*flags, prove=None, command=None, patience=PATIENCE, hot_set=None):
    async def proved(_loaded: Loaded) -> None:
        if prove is not None:
            await prove()

    supervisor = Supervisor(
        make_config(),
        proved,
        command or (*FAKE_ENGINE, *flags),
        patience,
        Startup("demo"),
        hot_set=hot_set,
    )
    supervisor.start()
    try:
        yield supervisor
    finally:
        await supervisor.stop()


async def reach(supervisor: Supervisor, *states: ServerState) -> ServerState:
    return await asyncio.wait_for(supervisor.startup.feed.wait_for(*states), WAIT_S)


async def exhaust(batches) -> None:
    async for _ in batches:
        pass


async def tokens(supervisor: Supervisor, prompt: list[int], num_tokens: int) -> list[int]:
    with supervisor.admit() as request:
        supervisor.submit(request, Submit(request.request_id, prompt, num_tokens, []))
        return [event.token_id async for batch in request for event in batch]


async def test_states_in_order_and_a_request(tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    proving = asyncio.Event()
    async with supervised("--gate", str(gate), prove=proving.wait) as supervisor:
        with supervisor.startup.feed.watch() as watcher:
            assert await watcher.next() is ServerState.STARTING
            assert await watcher.next() is ServerState.LOADING
            assert supervisor.startup.stages.doing == "weights"
            await asyncio.to_thread(gate.write_bytes, b"go")
            assert await watcher.next() is ServerState.WARMING
            with pytest.raises(MoeServerError, match="warming") as caught, supervisor.admit():
                pass
            assert caught.value.reason is Reason.UNAVAILABLE
            with supervisor.admit(is_probe=True):
                pass
            proving.set()
            assert await watcher.next() is ServerState.READY
        assert await tokens(supervisor, [5], 3) == [6, 7, 8]
        assert supervisor.num_open_requests == 0
        startup_s = supervisor.startup.stages.elapsed_s
        assert supervisor.startup.stages.elapsed_s == startup_s


async def test_nothing_is_left_behind():
    def folders() -> set[Path]:
        return set(Path(tempfile.gettempdir()).glob("moe-server-*"))

    before = folders()
    async with supervised() as supervisor:
        await reach(supervisor, ServerState.READY)
        pid = supervisor.engine_pid
        # Not even while it runs: it may be killed.
        assert not folders() - before
    assert not psutil.pid_exists(pid)
    assert not folders() - before


async def test_stopping_while_loading_and_before_the_engine_connects(tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    # An engine that loads reads no Shutdown: waiting for it would be in vain.
    patience = replace(PATIENCE, shutdown_s=1000.0)
    async with asyncio.timeout(WAIT_S), supervised("--gate", str(gate), patience=patience) as it:
        await reach(it, ServerState.LOADING)
        pid = it.engine_pid
    assert not psutil.pid_exists(pid)
    async with supervised() as supervisor:
        await eventually(lambda: supervisor.engine_pid is not None)
        pid = supervisor.engine_pid
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_crashed_or_hung_engine_is_replaced(how):
    patience = replace(PATIENCE, idle_s=1.0, busy_s=1.0)
    async with supervised("--step-s", "0.01", patience=patience) as supervisor:
        await reach(supervisor, ServerState.READY)
        pid = supervisor.engine_pid
        with supervisor.startup.feed.watch() as watcher, supervisor.admit() as request:
            assert await watcher.next() is ServerState.READY
            supervisor.submit(request, Submit(request.request_id, [1], 10_000, []))
            batches = aiter(request)
            await anext(batches)
            os.kill(pid, how)
            with pytest.raises(MoeServerError, match="engine was lost") as caught:
                await asyncio.wait_for(exhaust(batches), WAIT_S)
            assert caught.value.reason is Reason.UNAVAILABLE
            assert await watcher.next() is ServerState.STARTING
        await reach(supervisor, ServerState.READY)
        assert supervisor.num_restarts == 1
        assert supervisor.engine_pid != pid
        assert not psutil.pid_exists(pid)
        assert await tokens(supervisor, [1], 2) == [2, 3]


@pytest.mark.parametrize("num_rounds", range(4))
async def test_a_stop_as_the_engine_ends_is_not_lost(num_rounds):
    """Else the supervisor would start another engine, and who stopped it would wait for ever."""

    class Ending:
        pid, returncode = 1, None

        def __init__(self):
            self.ended = asyncio.Event()

        async def wait(self):
            await self.ended.wait()
            self.returncode = -9

        def kill(self):
            self.ended.set()

    process = Ending()
    link = EngineLink(process, None, None, None)
    shutting_down = asyncio.create_task(link.shut_down(WAIT_S))
    await asyncio.sleep(0)
    process.kill()
    for _ in range(num_rounds):  # of the event loop, between the end and the stop
        await asyncio.sleep(0)
    if shutting_down.cancel():  # else it had come to its end before
        with pytest.raises(asyncio.CancelledError):
            await shutting_down


async def test_a_process_that_cannot_die_does_not_keep_the_server(monkeypatch):
    class Waiting:
        """For a disk that stands still."""

        pid, returncode = 1, None

        async def wait(self):
            await asyncio.Event().wait()

        def kill(self):
            pass

    monkeypatch.setattr("moe_server.engine_link.KILLED_S", 0.01)
    with capture_logs() as logs:
        await asyncio.wait_for(EngineLink(Waiting(), None, None, None).shut_down(0.01), WAIT_S)
    assert "cannot die" in logs[-1]["event"]


def memory_bytes(supervisor: Supervisor) -> int:
    """What the engines have left in their memory; one byte each."""
    return os.fstat(supervisor._memory).st_size


async def test_engines_share_memory_which_goes_with_the_supervisor():
    async with supervised() as supervisor:
        await reach(supervisor, ServerState.READY)
        assert memory_bytes(supervisor) == 1
        os.kill(supervisor.engine_pid, signal.SIGKILL)
        await reach(supervisor, ServerState.STARTING)
        await reach(supervisor, ServerState.READY)
        assert memory_bytes(supervisor) == 2
        descriptor = supervisor._memory
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


async def test_memory_of_an_engine_that_never_was_ready_is_not_passed_on():
    """What is in it may be what ended the engine."""
    async with supervised("--fatal", "retry") as supervisor:
        await eventually(lambda: supervisor.num_restarts >= 3)
        assert memory_bytes(supervisor) <= 1


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGABRT])
async def test_memory_of_an_engine_that_crashed_is_not_passed_on(how):
    """It may have written where it should not."""
    async with supervised() as supervisor:
        await reach(supervisor, ServerState.READY)
        os.kill(supervisor.engine_pid, how)
        await reach(supervisor, ServerState.STARTING)
        await reach(supervisor, ServerState.READY)
        # What the first wrote is gone, what the second wrote behind it is there.
        assert os.pread(supervisor._memory, 2, 0) == b"\0!"


async def test_a_step_of_a_request_that_has_left_is_no_silence():
    patience = replace(PATIENCE, idle_s=0.5, busy_s=60.0)
    flags = ("--slow-token", "9", "--slow-s", "2.5")
    async with supervised(*flags, patience=patience) as supervisor:
        await reach(supervisor, ServerState.READY)
        with supervisor.admit() as request:
            supervisor.submit(request, Submit(request.request_id, [7], 3, []))
            await asyncio.sleep(0.5)
        assert await tokens(supervisor, [1], 2) == [2, 3]
        assert supervisor.num_restarts == 0
        # Afterwards silence is one again.
        await eventually(lambda: not supervisor._is_busy)
        os.kill(supervisor.engine_pid, signal.SIGSTOP)
        await reach(supervisor, ServerState.STARTING)
        await reach(supervisor, ServerState.READY)


async def test_a_temporary_folder_with_a_long_name(tmp_path, monkeypatch):
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    async with supervised() as supervisor:
        await reach(supervisor, ServerState.READY)
    assert not list(folder.iterdir())


def test_an_engine_whose_supervisor_died_before_it_could_look_ends():
    with subprocess.Popen(["true"]) as supervisor:
        pass
    command = [*ENGINE_COMMAND, "ipc:///nobody", "0", "0", str(supervisor.pid)]
    engine = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert engine.returncode == 1
    assert "supervisor is gone" in engine.stderr


async def test_a_killed_engine_is_said_to_have_been_killed():
    async with supervised() as supervisor:
        await reach(supervisor, ServerState.READY)
        with capture_logs() as logs:
            os.kill(supervisor.engine_pid, signal.SIGKILL)
            await eventually(lambda: any(entry["event"] == "engine lost" for entry in logs))
    [lost] = [entry for entry in logs if entry["event"] == "engine lost"]
    assert lost["message"] == "The engine process ended with signal SIGKILL (out of memory?)."
    assert lost["remedy"] == ""


async def test_a_crash_in_the_middle_of_a_request(tmp_path):
    flags = ("--crash-token", "9", "--crash-once", str(tmp_path / "crashed"))
    async with supervised(*flags) as supervisor:
        await reach(supervisor, ServerState.READY)
        with pytest.raises(MoeServerError, match="exit code 7"):
            await tokens(supervisor, [5], 10)
        await reach(supervisor, ServerState.READY)
        assert await tokens(supervisor, [5], 5) == [6, 7, 8, 9, 10]


async def test_a_final_fatal_is_failed_with_the_remedy():
    async with supervised("--fatal", "final") as supervisor:
        await reach(supervisor, ServerState.FAILED)
        assert supervisor.startup.reason == "No memory. Buy some."
        assert supervisor.num_restarts == 0
        with pytest.raises(MoeServerError, match=r"failed\. No memory\.") as caught:
            await tokens(supervisor, [1], 1)
        assert caught.value.reason is Reason.UNAVAILABLE
        # There is no engine that would answer it.
        with pytest.raises(MoeServerError, match="failed"), supervisor.admit(is_probe=True):
            pass


async def test_a_passing_fatal_is_retried_with_growing_backoff():
    async with supervised("--fatal", "retry") as supervisor:
        for backoff_s in ("0.02", "0.04", "0.08", "0.1"):
            stage = f"restarting the engine in {backoff_s} s: No memory."
            await eventually(lambda stage=stage: supervisor.startup.stages.doing == stage)
        await eventually(lambda: supervisor.num_restarts >= 4)
        assert supervisor.startup.reason == ""


async def test_an_engine_that_cannot_be_spawned_is_retried_and_said():
    async with supervised(command=("/no/such/engine",)) as supervisor:
        await eventually(lambda: supervisor.num_restarts >= 2)
        assert "/no/such/engine" in supervisor.startup.stages.doing


async def test_a_failed_proof_is_failed_and_never_ready():
    async def refuse() -> None:
        raise MoeServerError("Too slow.", "Buy a faster one.")

    async with supervised(prove=refuse) as supervisor:
        with supervisor.startup.feed.watch() as watcher:
            states = []
            while ServerState.FAILED not in states:
                states.append(await asyncio.wait_for(watcher.next(), WAIT_S))
        assert ServerState.READY not in states
        assert supervisor.startup.reason == "Too slow. Buy a faster one."
        assert supervisor.engine_pid is not None, "the next try needs it"
        with supervisor.admit(is_probe=True):
            pass
        doing = supervisor.startup.stages.doing
        assert doing == "proving anew in 0.1 s: Too slow. Buy a faster one."


async def test_a_failed_proof_is_no_reason_any_more_when_its_engine_is_lost():
    async def refuse() -> None:
        raise MoeServerError("Too slow.", "Buy a faster one.")

    patience = replace(PATIENCE, proof_again_s=1000.0)
    async with supervised(prove=refuse, patience=patience) as supervisor:
        await reach(supervisor, ServerState.FAILED)
        with supervisor.startup.feed.watch() as watcher:
            assert await watcher.next() is ServerState.FAILED
            os.kill(supervisor.engine_pid, signal.SIGKILL)
            assert await watcher.next() is ServerState.STARTING
            assert supervisor.startup.reason == ""


async def test_a_doubt_is_proven_away_whatever_else_goes_on():
    proofs = 0

    async def prove() -> None:
        nonlocal proofs
        proofs += 1
        if proofs == 2:
            raise MoeServerError("It cannot be read.", reason=Reason.UNAVAILABLE)

    async with supervised(prove=prove) as supervisor:
        await reach(supervisor, ServerState.READY)
        with supervisor.startup.feed.watch() as watcher, supervisor.admit() as request:
            assert await watcher.next() is ServerState.READY
            supervisor._doubt.set()
            assert await watcher.next() is ServerState.WARMING
            with pytest.raises(MoeServerError, match="warming"), supervisor.admit():
                pass
            # Who was let in before is served.
            supervisor.submit(request, Submit(request.request_id, [5], 2, []))
            assert [event.token_id async for batch in request for event in batch] == [6, 7]
            assert await watcher.next() is ServerState.READY
        assert proofs == 3
        await supervisor.drain()
        supervisor._doubt.set()
        await eventually(lambda: proofs == 4 and supervisor.phase is ServerState.READY)
        assert supervisor.state is ServerState.DRAINING
        supervisor.undrain()
        assert supervisor.state is ServerState.READY


async def test_a_crash_while_proving_proves_again():
    lives = 0
    supervisor_ready: list[Supervisor] = []

    async def prove() -> None:
        nonlocal lives
        lives += 1
        if lives == 1:
            os.kill(supervisor_ready[0].engine_pid, signal.SIGKILL)
            await asyncio.Event().wait()

    async with supervised(prove=prove) as supervisor:
        supervisor_ready.append(supervisor)
        await reach(supervisor, ServerState.READY)
        assert (lives, supervisor.num_restarts) == (2, 1)


async def test_drain_hides_readiness_until_undrain():
    async with supervised() as supervisor:
        await reach(supervisor, ServerState.READY)
        assert await supervisor.drain() == 0
        assert supervisor.state is ServerState.DRAINING
        with pytest.raises(MoeServerError, match="draining"), supervisor.admit():
            pass
        supervisor.undrain()
        assert supervisor.state is ServerState.READY


async def test_a_proof_goes_on_in_a_drain_and_not_in_a_shutdown():
    async with supervised(prove=asyncio.Event().wait) as supervisor:
        await reach(supervisor, ServerState.WARMING)
        await supervisor.drain()
        with supervisor.admit(is_probe=True):
            pass
        await supervisor.drain(for_good=True)
        with pytest.raises(MoeServerError, match="draining"), supervisor.admit(is_probe=True):
            pass


async def test_a_stopped_engine_is_noticed_by_its_pulse_whatever_a_step_may_take():
    patience = replace(PATIENCE, idle_s=1000.0, busy_s=1000.0, pulse_s=1.0)
    async with supervised("--pulse", patience=patience) as supervisor:
        await reach(supervisor, ServerState.READY)
        with capture_logs() as logs:
            os.kill(supervisor.engine_pid, signal.SIGSTOP)
            await reach(supervisor, ServerState.STARTING)
            await eventually(lambda: any(entry["event"] == "engine lost" for entry in logs))
        [lost] = [entry for entry in logs if entry["event"] == "engine lost"]
        assert "has stood still for 1 s" in lost["message"]
        await reach(supervisor, ServerState.READY)


@pytest.mark.parametrize("flags", [(), ("--advancing",)])
async def test_a_step_may_take_as_long_as_it_likes_while_work_advances(flags):
    patience = replace(PATIENCE, idle_s=0.4, busy_s=0.4, pulse_s=1000.0)
    flags = ("--pulse", *flags, "--slow-token", "9", "--slow-s", "2.5")
    async with supervised(*flags, patience=patience) as supervisor:
        await reach(supervisor, ServerState.READY)
        if "--advancing" in flags:
            assert await tokens(supervisor, [7], 3) == [8, 9, 10]
            assert supervisor.num_restarts == 0
        else:
            with pytest.raises(MoeServerError, match="said nothing and read nothing"):
                await tokens(supervisor, [7], 3)


def test_the_longest_step_allows_for_what_must_be_computed():
    config = Config()
    at_rest = longest_step_s(config, 0)
    assert 30 < at_rest < 40
    assert longest_step_s(config, 10**9) > at_rest + 100


# Rewarming


async def outcomes(rewarming) -> list[tuple[int, RewarmOutcome | None]]:
    return [(progress.experts_done, progress.outcome) async for progress in rewarming]


async def test_a_rewarming_tells_its_progress_and_that_it_is_done():
    async with supervised() as supervisor:
        await reach(supervisor, ServerState.READY)
        for _ in range(2):
            told = await outcomes(supervisor.rewarm())
            assert told == [(1, None), (2, None), (3, RewarmOutcome.DONE)]
        supervisor.stop_rewarm()  # there is none: nothing happens
        assert await tokens(supervisor, [5], 1) == [6]


async def test_a_rewarming_can_be_stopped_and_no_second_one_begins_meanwhile():
    async with supervised("--rewarm-steps", "100000") as supervisor:
        await reach(supervisor, ServerState.READY)
        rewarming = supervisor.rewarm()
        assert (await anext(rewarming)).outcome is None
        with pytest.raises(MoeServerError, match="already") as caught:
            await anext(supervisor.rewarm())
        assert caught.value.reason is Reason.EXHAUSTED
        supervisor.stop_rewarm()
        assert (await outcomes(rewarming))[-1][1] is RewarmOutcome.STOPPED


@pytest.mark.parametrize("how", ["closed", "cancelled"])
async def test_a_rewarming_that_is_left_is_stopped_and_disturbs_the_next_one_by_nothing(how):
    async with supervised("--rewarm-steps", "100000") as supervisor:
        await reach(supervisor, ServerState.READY)
        for _ in range(3):
            rewarming = supervisor.rewarm()
            first = await anext(rewarming)
            assert (first.experts_done, first.outcome) == (1, None)
            if how == "closed":
                await rewarming.aclose()
            else:
                task = asyncio.create_task(outcomes(rewarming))
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


async def test_an_engine_that_is_lost_ends_its_rewarming_as_unavailable():
    async with supervised("--rewarm-steps", "100000") as supervisor:
        with pytest.raises(MoeServerError, match="starting") as caught:
            await anext(supervisor.rewarm())
        assert caught.value.reason is Reason.UNAVAILABLE
        await reach(supervisor, ServerState.READY)
        rewarming = supervisor.rewarm()
        await anext(rewarming)
        os.kill(supervisor.engine_pid, signal.SIGKILL)
        with pytest.raises(MoeServerError, match="lost while it rewarmed") as caught:
            await outcomes(rewarming)
        assert caught.value.reason is Reason.UNAVAILABLE
        await reach(supervisor, ServerState.READY)
        async with contextlib.aclosing(supervisor.rewarm()) as rewarming:
            assert (await anext(rewarming)).experts_done == 1


# The hot set


class Notebook:
    """Stands in for a HotSetKeeper."""

    def __init__(self, latest: HotSet = NO_HOT_SET) -> None:
        self.kept = [latest]

    async def latest(self) -> HotSet:
        return self.kept[-1]

    def keep(self, hot_set: HotSet) -> None:
        self.kept.append(hot_set)

    async def saved(self) -> None:
        pass


async def test_engines_are_told_the_hot_set_and_asked_for_theirs_at_a_drain():
    notebook = Notebook(HotSet([4.0], [[0.5]]))
    async with supervised(hot_set=notebook) as supervisor:
        await supervisor.drain()  # nothing has loaded: nobody is asked
        assert len(notebook.kept) == 1
        supervisor.undrain()
        await reach(supervisor, ServerState.READY)
        await supervisor.drain()
        assert notebook.kept[-1].visits == [5.0]
        os.kill(supervisor.engine_pid, signal.SIGKILL)
        await eventually(lambda: supervisor.num_restarts and supervisor.phase is ServerState.READY)
        await supervisor.drain()
        assert notebook.kept[-1].visits == [6.0]


async def test_a_drain_does_not_wait_for_ever_for_a_hung_engine():
    notebook = Notebook()
    patience = replace(PATIENCE, shutdown_s=0.1)
    async with supervised(hot_set=notebook, patience=patience) as supervisor:
        await reach(supervisor, ServerState.READY)
        os.kill(supervisor.engine_pid, signal.SIGSTOP)
        async with asyncio.timeout(WAIT_S):
            with capture_logs() as logs:
                await supervisor.drain()
        assert "busy" in logs[-1]["event"]
        assert len(notebook.kept) == 1


async def test_an_engine_that_is_lost_in_a_shutdown_is_not_started_again():
    async with supervised() as supervisor:
        await reach(supervisor, ServerState.READY)
        await supervisor.drain(for_good=True)
        os.kill(supervisor.engine_pid, signal.SIGKILL)
        await asyncio.wait_for(asyncio.shield(supervisor._task), WAIT_S)
        assert supervisor.engine_pid is None
        assert supervisor.num_restarts == 0
