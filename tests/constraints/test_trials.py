"""Constraints that would hang, fill or end a process, tried for real; and those beside them."""

import asyncio
import json
import sys
import textwrap

import pytest

from moe_server.constraints import trials as trials_module
from moe_server.constraints.bounds import COMPILE_S
from moe_server.constraints.trials import Trials
from moe_server.errors import MoeServerError, Reason
from tests.constraints.vocabularies import constraint, demo_vocabulary, vocabulary_of

GOOD = constraint("regex", "[0-9]+")
LARGE = constraint("json_schema", json.dumps({"type": "integer", "multipleOf": 1_000_003}))
"""A regular expression over decimal digits with a million states."""
SLOW = constraint("grammar", "start: " + " | ".join(f'"w{n}"' for n in range(60_000)))
"""Each alternative is compared with those before it. Needs more than 32 MiB, too."""


def chain(length: int) -> str:
    """A grammar of terminals, each in the one before."""
    links = "\n".join(f'T{n}: T{n + 1} "x"' for n in range(length))
    return f'start: T0\n{links}\nT{length}: "y"'


DEEP = constraint("grammar", chain(4000))
"""Overflows the stack of whoever compiles it."""


@pytest.fixture
async def trials():
    trials = Trials(demo_vocabulary())
    yield trials
    await trials.close()


async def refusal(trials: Trials, what) -> MoeServerError:
    with pytest.raises(MoeServerError) as caught:
        await trials.check(what)
    return caught.value


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        (SLOW, "2 s of processor time"),
        (LARGE, "more than 32 MiB"),
        (DEEP, "nests too deeply"),
    ],
    ids=["slow", "large", "deep"],
)
async def test_a_constraint_that_ends_its_process_ends_nothing_else(
    trials, what, problem, tmp_path, monkeypatch
):
    if what is SLOW:
        monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
        monkeypatch.setattr(
            trials_module.sys, "executable", python_that(tmp_path, WITH_MORE_MEMORY)
        )
    await trials.check(GOOD)
    first = trials._process.pid
    error = await refusal(trials, what)
    assert problem in error.message
    assert (error.reason, error.field) == (Reason.INVALID, what.kind.value)
    await trials.check(constraint("regex", "another"))
    second = trials._process.pid
    assert second != first
    # It is not tried again.
    assert (await refusal(trials, what)).message == error.message
    assert trials._process.pid == second


async def test_a_vocabulary_that_cannot_be_used_is_the_model_s_fault():
    trials = Trials(vocabulary_of([b"a", b"b"], [7]))
    error = await refusal(trials, GOOD)
    assert error.reason is Reason.UNSUPPORTED
    assert "7 is out of range" in error.message
    await trials.close()


async def test_what_one_needed_is_not_counted_against_the_next(trials):
    """Each of these takes a third of what one may."""
    for number in range(4):
        many = json.dumps({"type": "integer", "multipleOf": 20_011 + number})
        await trials.check(constraint("json_schema", many))


async def test_a_bad_constraint_costs_no_process(trials):
    await trials.check(GOOD)
    first = trials._process.pid
    error = await refusal(trials, constraint("regex", "(a"))
    assert "unclosed group" in error.message
    assert error.field == "regex"
    assert trials._process.pid == first


async def test_requests_with_the_same_constraint_share_its_trial(trials, monkeypatch):
    asked = []
    exchange = trials._exchange

    async def counting(frame):
        asked.append(frame)
        return await exchange(frame)

    monkeypatch.setattr(trials, "_exchange", counting)
    await asyncio.gather(*(trials.check(GOOD) for _ in range(20)))
    await trials.check(GOOD)
    assert len(asked) == 2  # the vocabulary, and the constraint once


async def test_who_gives_up_leaves_the_verdict_to_the_others(trials):
    impatient = asyncio.create_task(trials.check(GOOD))
    patient = asyncio.create_task(trials.check(GOOD))
    await asyncio.sleep(0)
    impatient.cancel()
    await patient
    assert impatient.cancelled()
    assert not trials._pending


async def test_only_so_many_wait(trials, monkeypatch):
    monkeypatch.setattr(trials_module, "MAX_PENDING", 2)
    checks = [
        asyncio.create_task(trials.check(constraint("regex", f"a{number}"))) for number in range(3)
    ]
    outcomes = await asyncio.gather(*checks, return_exceptions=True)
    assert outcomes[:2] == [None, None]
    assert outcomes[2].reason is Reason.EXHAUSTED
    assert outcomes[2].retry_s == COMPILE_S


async def test_verdicts_are_forgotten_oldest_first(trials, monkeypatch):
    monkeypatch.setattr(trials_module, "MAX_VERDICTS", 2)
    for text in ("a", "b", "a", "c"):
        await trials.check(constraint("regex", text))
    assert list(trials._verdicts) == [constraint("regex", text).digest for text in ("a", "c")]


async def test_a_machine_that_is_too_busy_is_not_the_constraint_s_fault(trials, monkeypatch):
    monkeypatch.setattr(trials_module, "PATIENCE_S", 0.0)
    assert (await refusal(trials, GOOD)).reason is Reason.EXHAUSTED
    monkeypatch.undo()
    await trials.check(GOOD)


async def test_a_burst_that_gave_up_is_not_tried(trials, monkeypatch):
    monkeypatch.setattr(trials_module, "MAX_PENDING", 4)
    async with trials._turn:  # As while another is tried.
        burst = [
            asyncio.create_task(trials.check(constraint("regex", f"gone {number}")))
            for number in range(4)
        ]
        await asyncio.sleep(0)
        assert len(trials._pending) == 4
        for task in burst:
            task.cancel()
        await asyncio.wait(burst)
        assert not trials._pending
        # Whoever comes back for one of them, before it is gone, is not told that it was cancelled.
        again = asyncio.create_task(trials.check(constraint("regex", "gone 0")))
        await asyncio.sleep(0)
    await again
    assert list(trials._verdicts) == [constraint("regex", "gone 0").digest]


async def test_a_process_that_was_killed_is_started_again(trials):
    await trials.check(GOOD)
    trials._process.kill()
    await trials._process.wait()
    await trials.check(constraint("regex", "b+"))


def python_that(tmp_path, what: str) -> str:
    """An interpreter that does something else than it is told."""
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(what)}")
    path.chmod(0o755)
    return str(path)


WITH_MORE_MEMORY = """
    from moe_server.constraints import bounds
    bounds.MEMORY_BYTES = 2**30
    from moe_server.constraints.trial import main
    main()
"""
KILLED_AFTER = """
    import os, signal, sys
    from moe_server.constraints.frames import length_of, pack
    for number in range(2):
        sys.stdin.buffer.read(length_of(sys.stdin.buffer.read(4)))
        sys.stdout.buffer.write(pack(b""))
        sys.stdout.buffer.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    "what", ["raise ImportError", KILLED_AFTER, None], ids=["import", "killed", "absent"]
)
async def test_a_process_that_dies_of_something_else_blames_no_constraint(
    trials, tmp_path, monkeypatch, what
):
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    interpreter = "/no/such/python" if what is None else python_that(tmp_path, what)
    with monkeypatch.context() as patched:
        patched.setattr(trials_module.sys, "executable", interpreter)
        assert (await refusal(trials, GOOD)).reason is Reason.UNAVAILABLE
    assert not trials._verdicts
    await trials.check(GOOD)


async def test_a_hard_limit_on_data_is_kept(trials, monkeypatch, tmp_path):
    """Raising one takes a privilege; without it this failed before anything was compiled."""
    what = f"""
        import os, resource, sys
        resource.setrlimit(resource.RLIMIT_DATA, ({2**30}, {2**30}))
        code = (
            "import resource, sys; kept = resource.setrlimit;"
            "resource.setrlimit = lambda which, pair: (pair[1] == {2**30} or sys.exit(1),"
            " kept(which, pair));"
            "from moe_server.constraints.trial import main; main()"
        )
        os.execv({sys.executable!r}, [{sys.executable!r}, "-c", code])
    """
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    monkeypatch.setattr(trials_module.sys, "executable", python_that(tmp_path, what))
    await trials.check(GOOD)
