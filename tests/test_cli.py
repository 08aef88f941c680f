"""The commands as a user calls them: output, exit codes, signals. No torch anywhere."""

import asyncio
import errno
import json
import os
import re
import signal
import sys
import textwrap
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import pytest_asyncio
import structlog
from click.testing import CliRunner

from moe_server import cli
from moe_server.client import Client
from moe_server.commands import doctor
from moe_server.commands.format import format_bytes
from moe_server.kernels import native
from moe_server.service import validation
from moe_server.state import ServerState
from tests.front_door import (
    EOS,
    FAKE_ENGINE,
    WAIT_S,
    eventually,
    front_door,
    letters_chat,
    make_model,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

NOBODY = "127.0.0.1:1"

SERVE_WITH_FAKE_ENGINE = textwrap.dedent(f"""
    import functools, sys
    from moe_server.commands import serve
    from moe_server.service.running_model import ModelSetup
    from moe_server.cli import main
    command = {(*FAKE_ENGINE,)!r} + tuple(FLAGS)
    serve.ModelSetup = functools.partial(ModelSetup, engine_command=command)
    main()
""")


@pytest.fixture(autouse=True)
def _logs_as_before():
    yield
    structlog.reset_defaults()


def invoke(*args: str):
    return CliRunner().invoke(cli.cli, list(args), prog_name="moe-server")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door():
    async with front_door() as door:
        yield door


async def against(door, *args: str):
    return await asyncio.to_thread(invoke, *args, "--target", door.server.address)


LIGHT = [name for name in cli.COMMANDS if name != "synth"]


@pytest.mark.parametrize("command", LIGHT)
async def test_every_command_has_help_with_an_example(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "Example: moe-server " + command in result.output


async def test_the_commands_are_listed():
    result = invoke("--help")
    assert result.exit_code == 0
    for command in cli.COMMANDS:
        assert f"  {command} " in result.output


async def test_the_front_door_imports_neither_torch_nor_transformers():
    heavy = "{'torch', 'transformers', 'deepspeed'}"
    modules = "moe_server.cli, moe_server.commands.serve"
    code = f"import sys, {modules}; sys.exit(bool({heavy} & sys.modules.keys()))"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await process.wait() == 0


async def test_generate_streams_text_and_says_where_time_went(door):
    result = await against(door, "generate", "abc", "--max-new-tokens", "4", "--seed", "7")
    assert result.exit_code == 0
    assert result.stdout == "defg\n"
    for row in ("queue", "prefill", "decode", "router", "expert transfer", "expert read"):
        assert row in result.stderr
    assert "3 prompt (1 cached) + 4 new" in result.stderr
    assert "length" in result.stderr


async def test_generate_sends_its_priority(door, monkeypatch):
    result = await against(door, "generate", "a", "--priority", "-10", "--max-new-tokens", "1")
    assert result.exit_code == 0
    monkeypatch.setattr(validation, "MAX_PRIORITY", 5)
    result = await against(door, "generate", "a", "--priority", "-10")
    assert "priority is -10" in result.stderr


async def test_a_deadline_that_passes_before_an_answer_is_told_as_one(door):
    result = await against(door, "generate", "a", "--timeout", "0.000001")
    assert result.exit_code == cli.EXIT_RETRY
    assert "deadline" in result.stderr.lower()


async def test_a_terminal_that_cannot_show_a_character_gets_another(door):
    printing = textwrap.dedent("""
        import sys
        from moe_server.commands import generate
        from moe_server.cli import main
        as_it_was = generate.Completion.take

        def take(self, event):
            if event.HasField("delta"):
                event.delta.text = "é"
            as_it_was(self, event)

        generate.Completion.take = take
        main()
    """)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", printing,
        "generate", "a", "--max-new-tokens", "1", "--target", door.server.address,
        stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
    )  # fmt: skip
    output, _ = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert (process.returncode, output) == (0, b"?\n")


async def test_generate_from_token_ids_prints_token_ids(door):
    result = await against(door, "generate", "--token-ids", "1,2", "--max-new-tokens", "3")
    assert result.stdout == "3 4 5 \n"


async def test_generate_chat():
    async with front_door(model=make_model(chat=letters_chat())) as door:
        options = ["--system", "ab", "--max-new-tokens", "3"]
        result = await against(door, "generate", "--chat", "c", *options)
        assert result.stdout == "abc\n"
        assert "5 prompt (1 cached) + 3 new" in result.stderr
        result = await against(door, "generate", "--chat", "c", "text")
        assert "one of TEXT, --token-ids and --chat" in result.stderr
        result = await against(door, "generate", "text", "--system", "c")
        assert "--system goes with --chat" in result.stderr


async def test_score_and_classify(door):
    result = await against(door, "score", "ab", "cd", "ce")
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["'cd'", "-0.5000", "2", "tokens", "greedy"],
        ["'ce'", "-1.7500", "2", "tokens"],
    ]
    result = await against(door, "score", "ab", "c", "--json")
    assert json.loads(result.stdout)["scores"][0]["tokens"][0]["logprob"] == -0.25
    result = await against(door, "classify", "ab", "x", "c")
    assert result.stdout == "'c'  0.7773\n'x'  0.2227\n"
    options = ["--per-token", "--content-free", "b", "--json"]
    answer = json.loads((await against(door, "classify", "ab", "x", "c", *options)).stdout)
    assert [label["probability"] for label in answer["labels"]] == pytest.approx([0.5, 0.5])
    result = await against(door, "classify", "ab", "x")
    assert result.exit_code == cli.EXIT_ERROR
    assert "expected 2 to 128" in result.stderr


async def test_the_client_embeds_and_scores_token_ids(door):
    def ask() -> tuple[list[float], float]:
        with Client(door.server.address) as client:
            return client.embed([1, 2]), client.score([1], [[2, 3]]).scores[0].logprob

    embedding, logprob = await asyncio.to_thread(ask)
    assert embedding == pytest.approx([0.6, 0.8])
    assert logprob == -0.5


async def test_the_client_tokenises_and_detokenises():
    async with front_door(model=make_model(chat=letters_chat())) as door:

        def round_trip() -> tuple[list[int], list[int], str]:
            with Client(door.server.address) as client:
                messages = [{"role": "user", "content": "b"}]
                return client.tokenize("ab"), client.tokenize(messages), client.detokenize([0, 1])

        assert await asyncio.to_thread(round_trip) == ([0, 1], [1, EOS], "ab")


async def test_generate_json(door):
    result = await against(
        door, "generate", "a", "--max-new-tokens", "30", "--stop", "fg", "--json"
    )
    answer = json.loads(result.stdout)
    assert (answer["text"], answer["token_ids"]) == ("bcde", [1, 2, 3, 4])
    assert answer["finish_reason"] == "stop_sequence"
    assert answer["timings"]["queue_s"] == pytest.approx(0.25)
    assert answer["timings"]["expert_read_bytes"] == 7
    assert answer["ttft_s"] > 0


async def test_generate_several_samples(door):
    several = ["--samples", "2", "--temperature", "1", "--max-new-tokens", "3"]
    result = await against(door, "generate", "a", *several)
    assert result.stdout == "[0] bcd\n[1] bcd\n"
    assert "1 prompt (1 cached) + 6 new" in result.stderr
    assert "length, length" in result.stderr
    result = await against(door, "generate", "a", *several, "--top-logprobs", "2", "--json")
    answer = json.loads(result.stdout)
    [other] = answer["further_samples"]
    assert (answer["text"], other["text"], other["token_ids"]) == ("bcd", "bcd", [1, 2, 3])
    assert [entry["token_id"] for entry in other["logprobs"]] == [1, 2, 3]
    assert [top["token_id"] for top in other["logprobs"][0]["top"]] == [1, 2]
    result = await against(door, "generate", "--token-ids", "0", *several)
    assert result.stdout == "[0] 1 2 3\n[1] 1 2 3\n"


async def test_generate_ends_after_a_stop_token(door):
    result = await against(
        door, "generate", "a", "--stop-token", "3", "--stop-token", "9", "--max-new-tokens", "9"
    )
    assert result.stdout == "bcd\n"
    assert "stop_token" in result.stderr


async def test_generate_takes_constraints(door, tmp_path):
    """The fake engine does not keep them; the front door tries them and says what is wrong."""
    file = tmp_path / "schema.json"
    file.write_text('{"type": "boolean"}')
    for options in (
        ["--regex", "[a-e]+"],
        ["--choice", "ab", "--choice", "b"],
        ["--json-schema", '{"const": true}'],
        ["--json-schema", f"@{file}"],
        ["--grammar", 'start: "a"'],
    ):
        result = await against(door, "generate", "a", "--max-new-tokens", "2", *options)
        assert (result.exit_code, result.stdout) == (0, "bc\n"), (options, result.stderr)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate"], "one of TEXT, --token-ids and --chat"),
        (["generate", "a", "--regex", "(a"], "unclosed group"),
        (["generate", "a", "--regex", "a", "--choice", "a"], "At most one of"),
        (["generate", "a", "--json-schema", "@/no/such/file"], "/no/such/file"),
        (["generate", "a", "--samples", "3"], "num_samples is 3 and temperature 0"),
        (["generate", "a", "--frequency-penalty", "3"], "frequency_penalty is 3"),
        (["generate", "a", "--token-ids", "1"], "one of TEXT, --token-ids and --chat"),
        (["generate", "--token-ids", "1,x"], "1,x"),
        (["generate", "a", "--temperature", "-1"], "temperature is -1"),
        (["generate", "\udcff"], "UTF-8"),
        (["score", "a", "\udcff"], "A continuation is not valid UTF-8"),
        (["classify", "\udcff", "a", "b"], "TEXT is not valid UTF-8"),
        (["generate", "a", "--regex", "\udcff"], "--regex is not valid UTF-8"),
        (["generate", "a", "--choice", "a", "--choice", "\udcff"], "--choice is not valid UTF-8"),
        (["generate", "a", "--stop", "\udcff"], "--stop is not valid UTF-8"),
        (["generate", "a", "--grammar", "\udcff"], "--grammar is not valid UTF-8"),
        (["generate", "a", "--json-schema", "\udcff"], "--json-schema is not valid UTF-8"),
        (["generate", "a", "--timeout", "-1"], "--timeout"),
        (["generate", "a", "--timeout", "nan"], "not a finite number"),
        (["drain", "--wait", "inf"], "--wait"),
        (["warmup", "--max-ttft-ms", "nan"], "not a finite number"),
        (["warmup", "--report", "/no/such/folder/report.json"], "/no/such/folder/report.json"),
    ],
)
async def test_bad_requests_exit_with_2_and_say_why(door, args, message):
    result = await against(door, *args)
    assert result.exit_code == cli.EXIT_ERROR
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", [["generate", "a"], ["status"], ["warmup"]])
async def test_a_target_that_is_no_address_exits_with_2(command):
    for target in ("127.0.0.1:99999", "localhost:0", "nonsense", "::1:5"):
        result = await asyncio.to_thread(invoke, *command, "--target", target)
        assert result.exit_code == cli.EXIT_ERROR
        assert repr(target) in result.stderr


@pytest.mark.parametrize(
    "args",
    [["generate", "a"], ["status"], ["drain"], ["undrain"], ["warmup", "--timeout", "0"]],
)
async def test_nobody_there_exits_with_3(args):
    result = await asyncio.to_thread(invoke, *args, "--target", NOBODY)
    assert result.exit_code == cli.EXIT_UNREACHABLE
    assert NOBODY in result.stderr
    assert "remedy:" in result.stderr


async def test_status_drain_undrain(door):
    result = await against(door, "status")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].split() == ["state", "ready"]
    assert "  room for" in result.stdout
    status = json.loads((await against(door, "status", "--json")).stdout)
    assert status["state"] == "SERVER_STATE_READY"
    assert int(status["memory"]["device_budget_bytes"]) > 0
    told = await against(door, "drain")
    assert told.stdout == "draining; requests still running: 0\n"
    drained = await against(door, "drain", "--wait", "1", "--json")
    assert json.loads(drained.stdout) == {"remaining_requests": 0}
    refused = await against(door, "generate", "a")
    assert refused.exit_code == cli.EXIT_RETRY
    assert "draining" in refused.stderr
    assert "Retry after 2 s." in refused.stderr
    assert (await against(door, "undrain")).exit_code == 0
    assert (await against(door, "generate", "a")).exit_code == 0


async def test_warmup_proves_and_reports(door, tmp_path):
    report = tmp_path / "report.json"
    result = await against(
        door, "warmup", "--max-ttft-ms", "20000", "--report", str(report), "--json"
    )
    assert result.exit_code == 0
    findings = json.loads(report.read_text())
    assert json.loads(result.stdout) == findings
    assert findings["passed"]
    assert findings["state"] == "ready"
    assert [probe["completion_tokens"] for probe in findings["probes"]] == [2, 2, 2]
    assert [stage["state"] for stage in findings["stages"]] == ["done"] * len(findings["stages"])


def _outcomes(junit: Path) -> dict[str, str]:
    """What became of each case of a JUnit report: the tag below it, or "passed"."""
    suite = ET.fromstring(junit.read_text())
    return {case.get("name"): next((below.tag for below in case), "passed") for case in suite}


async def test_warmup_reports_to_ci(door, tmp_path):
    junit = tmp_path / "junit.xml"
    assert (await against(door, "warmup", "--junit", str(junit))).exit_code == 0
    cases = _outcomes(junit)
    assert set(cases.values()) == {"passed"}
    assert [name for name in cases if "probe" in name] == [f"demo: probe {i}" for i in (1, 2, 3)]
    assert {"demo: experts", "demo: proof", "ready"} <= set(cases)
    missed = await against(door, "warmup", "--max-ttft-ms", "0.001", "--junit", str(junit))
    assert missed.exit_code == cli.EXIT_LIMIT_MISSED
    cases = _outcomes(junit)
    assert [cases[f"demo: probe {i}"] for i in (1, 2, 3)] == ["failure", "skipped", "skipped"]


async def test_warmup_reports_to_ci_what_failed_in_the_start(tmp_path):
    junit = tmp_path / "junit.xml"
    async with front_door("--fatal", "final", until=ServerState.FAILED) as door:
        result = await against(door, "warmup", "--junit", str(junit))
    assert result.exit_code == cli.EXIT_NOT_READY
    cases = _outcomes(junit)
    assert cases["demo: weights"] == cases["ready"] == "failure"
    assert cases["demo: probe 1"] == "skipped"


async def test_two_reports_need_two_files_and_leave_nothing_behind(tmp_path):
    report = tmp_path / "report"
    args = ("warmup", "--target", NOBODY, "--report", str(report))
    same = await asyncio.to_thread(invoke, *args, "--junit", str(report))
    assert same.exit_code == cli.EXIT_ERROR
    assert "the same file" in same.stderr
    nowhere = await asyncio.to_thread(invoke, *args, "--junit", str(tmp_path / "no" / "junit"))
    assert nowhere.exit_code == cli.EXIT_ERROR
    assert list(tmp_path.iterdir()) == []


async def test_a_report_that_cannot_be_written_costs_nothing_but_itself(door, tmp_path):
    full, junit = Path("/dev/full"), tmp_path / "junit.xml"
    for report, other in (("--report", "--junit"), ("--junit", "--report")):
        result = await against(door, "warmup", report, str(full), other, str(junit))
        assert result.exit_code == cli.EXIT_ERROR
        assert "No space left on device" in result.stderr
        assert junit.stat().st_size > 0
        assert list(tmp_path.iterdir()) == [junit]
        junit.unlink()


async def test_an_unwritable_report_is_refused_before_probing(tmp_path):
    report = tmp_path / "absent" / "report.json"
    result = await asyncio.to_thread(invoke, "warmup", "--target", NOBODY, "--report", str(report))
    assert result.exit_code == cli.EXIT_ERROR
    report = tmp_path / "report.json"
    report.write_text("earlier")
    args = ("--timeout", "0", "--report", str(report))
    result = await asyncio.to_thread(invoke, "warmup", "--target", NOBODY, *args)
    assert result.exit_code == cli.EXIT_UNREACHABLE
    assert json.loads(report.read_text())["state"] == "unreachable"
    assert list(tmp_path.iterdir()) == [report]


async def test_warmup_exits_with_5_when_a_limit_is_missed(door, tmp_path):
    report = tmp_path / "report.json"
    result = await against(door, "warmup", "--max-ttft-ms", "0.001", "--report", str(report))
    assert result.exit_code == cli.EXIT_LIMIT_MISSED
    assert "over max_ttft_ms = 0.001" in result.stderr
    findings = json.loads(report.read_text())
    assert not findings["passed"]
    assert len(findings["probes"]) == 1


async def test_warmup_exits_with_4_when_not_ready_in_time(tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    async with front_door("--gate", str(gate), until=ServerState.LOADING) as door:
        result = await against(door, "warmup", "--timeout", "0.1")
        assert result.exit_code == cli.EXIT_NOT_READY
        assert "still loading (weights) after 0.1 s" in result.stderr
        limits = [
            line for line in (await against(door, "status")).stdout.splitlines() if "limits" in line
        ]
        assert limits[0].split()[-1] == "-", "not 'any time': they are not known yet"
        waiting = asyncio.create_task(against(door, "warmup"))
        await asyncio.to_thread(gate.write_bytes, b"go")
        assert (await asyncio.wait_for(waiting, WAIT_S)).exit_code == 0


async def test_warmup_of_a_server_that_has_gone_says_so(tmp_path):
    gate, report = tmp_path / "gate", tmp_path / "report.json"
    os.mkfifo(gate)
    async with front_door("--gate", str(gate), until=ServerState.LOADING) as door:
        args = ("warmup", "--timeout", "3", "--report", str(report))
        waiting = asyncio.create_task(against(door, *args))
        await asyncio.sleep(0.5)
    result = await waiting
    assert result.exit_code == cli.EXIT_UNREACHABLE
    findings = json.loads(report.read_text())
    assert findings["state"] == "unreachable"
    assert [stage["name"] for stage in findings["stages"]] == ["weights"], "what was seen is told"


async def test_warmup_that_does_not_wait_still_probes(door):
    assert (await against(door, "warmup", "--timeout", "0")).exit_code == 0


async def test_warmup_of_a_drained_server_says_how_that_ends(door):
    assert (await against(door, "drain")).exit_code == 0
    result = await against(door, "warmup", "--timeout", "0.1")
    assert result.exit_code == cli.EXIT_NOT_READY
    assert "still draining" in result.stderr
    assert "moe-server undrain" in result.stderr
    assert (await against(door, "undrain")).exit_code == 0


async def test_warmup_exits_with_4_at_once_when_the_server_failed(tmp_path):
    report = tmp_path / "report.json"
    async with front_door("--fatal", "final", until=ServerState.FAILED) as door:
        result = await against(door, "warmup", "--report", str(report))
    assert result.exit_code == cli.EXIT_NOT_READY
    assert "No memory. Buy some." in result.stderr
    assert "No memory" in json.loads(report.read_text())["error"]


async def test_a_containers_first_process_can_be_terminated():
    """Not by the kernel: it spares process 1 a signal without a handler."""
    as_process_1 = "import os; os.getpid = lambda: 1; from moe_server.__main__ import main; main()"
    is_at_work = asyncio.Event()
    listener = await asyncio.start_server(lambda *_: is_at_work.set(), "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with listener:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", as_process_1, "warmup", "--target", f"127.0.0.1:{port}"
        )
        await asyncio.wait_for(is_at_work.wait(), WAIT_S)
        process.terminate()
        assert await asyncio.wait_for(process.wait(), WAIT_S) == 128 + signal.SIGTERM


async def test_plan_and_check_config(tmp_path):
    plan = json.loads(invoke("plan", "--json").stdout)
    assert plan["minimum_device_bytes"] <= plan["device_budget_bytes"]
    assert "expert slots" in invoke("plan").stdout
    assert re.search(r"memory in all .+\navailable here +\d", invoke("plan").stdout)
    assert plan["available_memory_bytes"] > 0
    assert plan["embedding_on_disk_bytes"] == 0
    paged = ("plan", "--json", "--device-memory", "min", "--dense-backend", "resident")
    on_disk = json.loads(invoke(*paged).stdout)
    assert on_disk["embedding_on_disk_bytes"] > 0
    assert on_disk["dense_bytes"] == plan["dense_bytes"] - on_disk["embedding_on_disk_bytes"]
    assert invoke("plan", "--device-memory", "1MiB").exit_code == cli.EXIT_ERROR
    file = tmp_path / "moe.toml"
    file.write_text('device_memory = "24GiB"\n[warmup]\nprobes = 9\n')
    result = invoke("check-config", "--config", str(file), "--max-ttft-ms", "5", "--json")
    resolved = json.loads(result.stdout)
    assert resolved["device_memory"] == 24 * 2**30
    assert (resolved["warmup"]["probes"], resolved["warmup"]["max_ttft_ms"]) == (9, 5.0)
    assert "warmup.max_ttft_ms" in invoke("check-config").stdout
    file.write_text("device_memroy = 1\n")
    result = invoke("check-config", "--config", str(file))
    assert result.exit_code == cli.EXIT_ERROR
    assert "Did you mean 'device_memory'?" in result.stderr


async def test_doctor_reports_and_survives_what_is_missing(monkeypatch):
    findings = json.loads(invoke("doctor", "--json").stdout)
    checks = {finding["check"] for finding in findings}
    assert {"python", "torch", "memory", "memlock limit", "free disk", "GPU"} <= checks
    assert all(set(finding) == {"check", "is_ok", "found", "remedy"} for finding in findings)

    def absent(*_args, **_kwargs):
        raise FileNotFoundError("no such file")

    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(Path, "exists", lambda _: False)
    monkeypatch.setattr("importlib.metadata.version", _nothing_installed)
    result = invoke("doctor")
    assert result.exit_code == 0
    assert "not installed" in result.stdout
    assert "pip install torch" in result.stdout
    assert "cannot be told" in result.stdout


def kernels_row() -> dict:
    findings = json.loads(invoke("doctor", "--json").stdout)
    [row] = [finding for finding in findings if finding["check"] == "CPU kernels"]
    return row


async def test_doctor_says_what_missing_kernels_cost(monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_kernels,))
    monkeypatch.setenv("MOE_SERVER_KERNELS", "")
    assert kernels_row()["found"] == f"compiled, use {native.instruction_set()}"
    monkeypatch.setenv("MOE_SERVER_KERNELS", "torch")
    row = kernels_row()
    assert not row["is_ok"]
    assert "16 to 65 times in int4" in row["found"]
    assert "compiler" in row["remedy"]
    monkeypatch.setenv("MOE_SERVER_KERNELS", "sse")
    row = kernels_row()
    assert not row["is_ok"]
    assert "MOE_SERVER_KERNELS='sse'" in row["found"]


async def test_doctor_tells_the_limit_of_the_cgroup_it_runs_in(monkeypatch):
    def memory_rows() -> dict[str, dict]:
        findings = json.loads(invoke("doctor", "--json").stdout)
        return {finding["check"]: finding for finding in findings}

    monkeypatch.setattr(doctor, "available_memory_bytes", lambda: 300 * 2**20)
    limit = memory_rows()["cgroup memory limit"]
    assert limit["found"].startswith("leaves 300.0 MiB")
    assert not limit["is_ok"]
    assert "container" in limit["remedy"]
    monkeypatch.setattr(doctor, "available_memory_bytes", lambda: 2**60)
    assert memory_rows()["cgroup memory limit"]["found"] == "none below what is available"


def findings_of(check) -> dict[str, doctor.Finding]:
    return {finding.check: finding for finding in check()}


async def test_doctor_tells_of_a_kernel_without_huge_pages(monkeypatch, tmp_path):
    file = tmp_path / "enabled"
    monkeypatch.setattr(doctor, "HUGE_PAGES", file)
    for modes, is_ok in (("always [madvise] never\n", True), ("always madvise [never]\n", False)):
        file.write_text(modes)
        found = findings_of(doctor.check_huge_pages)["huge pages"]
        assert (found.is_ok, found.found) == (is_ok, modes.strip())
        assert (f"echo madvise > {file}" in found.remedy) is not is_ok


async def test_doctor_minds_the_memlock_limit_where_there_is_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (8 * 2**20, 8 * 2**20))
    assert findings_of(doctor.check_memlock)["memlock limit"].is_ok
    doctor.NVIDIA_DRIVER.touch()
    limit = findings_of(doctor.check_memlock)["memlock limit"]
    assert (limit.is_ok, limit.found) == (False, "8.0 MiB")
    assert "containerd" in limit.remedy


async def test_doctor_looks_at_the_disk_of_a_checkpoint_that_it_may_only_read(monkeypatch):
    def read_only(*_args, **_kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(doctor, "CHECKS", ())
    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", read_only)
    demo = Path(doctor.__file__).parents[1] / "demo"
    for folder, is_ok in ((demo, True), (demo.parent, False)):
        rows = json.loads(invoke("doctor", "--json", "--model", str(folder)).stdout)
        [direct] = [row for row in rows if row["check"] == "O_DIRECT"]
        assert direct["is_ok"] is is_ok
        assert str(folder) in direct["found"]


def _nothing_installed(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "/no/such/checkpoint"], "/no/such/checkpoint"),
        (["--device-memory", "1MiB"], "device_memory"),
        (["--device", "tpu"], "device = 'tpu'"),
        (["--listen", "nowhere"], "nowhere"),
    ],
)
async def test_serve_refuses_what_cannot_work(args, message):
    assert message in await refused(*args)


async def test_serve_refuses_a_taken_port(door):
    errors = await refused("--listen", door.server.address)
    assert f"error: Cannot listen on {door.server.address!r}" in errors


async def refused(*args: str) -> str:
    """What `serve` says as it ends by itself."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "moe_server", "serve", "--listen", "127.0.0.1:0", *args,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, errors = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert process.returncode == cli.EXIT_ERROR
    assert "remedy:" in errors.decode()
    assert "Traceback" not in errors.decode()
    return errors.decode()


async def serve(
    *flags: str, listen: str = "127.0.0.1:0", config: Path | None = None, ready=(None,)
):
    """A `moe-server serve` with fake engines; returns it with its address, once READY.

    `ready` are the models that the log has to call so, where it names them.
    """
    waiting = set(ready)
    code = SERVE_WITH_FAKE_ENGINE.replace("FLAGS", repr(flags))
    with_config = ("--config", str(config)) if config else ()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, "serve", "--listen", listen, *with_config,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    address = ""
    while True:
        line = (await asyncio.wait_for(process.stderr.readline(), WAIT_S)).decode()
        assert line, "serve ended"
        fields = dict(pair.split("=", 1) for pair in line.split() if "=" in pair)
        address = fields.get("address", address)
        if fields.get("state") == "ready":
            waiting.remove(fields.get("model"))
            if not waiting:
                return process, address


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_serve_finishes_what_it_accepted_and_exits_with_0(number):
    # The warm-up's prompts hold random tokens of the demo's vocabulary: large enough for all.
    process, address = await serve("--step-s", "0.01", "--vocab", "4096")
    running = asyncio.create_task(
        asyncio.to_thread(
            invoke, "generate", "--token-ids", "1", "--max-new-tokens", "50", "--ignore-eos",
            "--json", "--target", address,
        )
    )  # fmt: skip
    await asyncio.to_thread(_wait_running, address)
    process.send_signal(number)
    assert await asyncio.wait_for(process.wait(), WAIT_S) == 0
    answer = json.loads((await running).stdout)
    assert answer["completion_tokens"] == 50


@pytest.fixture
def two_models(tmp_path) -> Path:
    file = tmp_path / "two.toml"
    file.write_text(
        'model_name = "heavy"\ndevice_memory = "1GiB"\n[warmup]\nbatch = 2\nprobes = 1\n'
        '[[models]]\nmodel = "demo"\nmodel_name = "light"\ndevice_memory = "512MiB"\n'
        "warmup = {batch = 1, probes = 1}\n"
    )
    return file


async def test_several_models_in_every_command(two_models, tmp_path):
    names = ("heavy", "light")
    process, address = await serve("--vocab", "4096", config=two_models, ready=names)
    target = ("--target", address)

    async def said(*args: str):
        result = await asyncio.to_thread(invoke, *args, *target)
        assert result.exit_code == 0, result.output
        return result

    prompt = ("generate", "--token-ids", "7", "--max-new-tokens", "1", "--json")
    for flags, model in (((), "heavy"), (("--model", "light"), "light")):
        assert json.loads((await said(*prompt, *flags)).stdout)["model"] == model
    unknown = await asyncio.to_thread(invoke, *prompt, "--model", "third", *target)
    assert unknown.exit_code == cli.EXIT_ERROR
    assert "NOT_FOUND: There is no model 'third' here. This server has 'heavy', 'light'." in (
        unknown.stderr
    )
    status = (await said("status")).stdout
    assert re.search(r"model +heavy  ready\n(.*\n)*model +light  ready\n", status)
    told = json.loads((await said("status", "--json")).stdout)
    assert [model["name"] for model in told["models"]] == [*names]
    budgets = [int(model["memory"]["device_budget_bytes"]) for model in told["models"]]
    assert budgets == [2**30, 2**29]
    report = tmp_path / "report.json"
    await said("warmup", "--report", str(report))
    findings = json.loads(report.read_text())
    assert [probe["model"] for probe in findings["probes"]] == ["heavy"] * 3 + ["light"] * 3
    assert json.loads((await said("drain", "--json")).stdout) == {"remaining_requests": 0}
    assert "draining" in (await said("status")).stdout
    await said("undrain")
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), WAIT_S) == 0


async def test_plan_and_check_config_of_several_models(two_models):
    config = ("--config", str(two_models))
    figures = json.loads(invoke("plan", "--json", *config).stdout)
    heavy, light = figures["models"]
    assert (heavy["name"], light["name"], figures["name"]) == ("heavy", "light", "heavy")
    assert (heavy["device_budget_bytes"], light["device_budget_bytes"]) == (2**30, 2**29)
    total = format_bytes(heavy["memory_bytes"] + light["memory_bytes"])
    assert re.search(rf"memory of all +{re.escape(total)}\n", invoke("plan", *config).stdout)
    resolved = invoke("check-config", *config).stdout
    assert re.search(r"models\[0\]\.model_name +light\n", resolved)
    two_models.write_text(two_models.read_text().replace("512MiB", "1MiB"))
    refused = invoke("plan", *config)
    assert refused.exit_code == cli.EXIT_ERROR
    assert "Model 'light': device_memory of 1048576 bytes" in refused.stderr


def _wait_running(address: str) -> None:
    from moe_server.client import Client

    with Client(address) as client:
        while client.status().load.running_requests == 0:
            pass


async def test_a_second_interrupt_ends_serve_at_once():
    process, address = await serve("--step-s", "0.01", "--vocab", "4096")
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "moe_server", "generate", "--token-ids", "1", "--ignore-eos",
        "--max-new-tokens", "2000", "--target", address,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert await client.stdout.read(2)
    process.send_signal(signal.SIGINT)
    while b"shutting down" not in (await asyncio.wait_for(process.stderr.readline(), WAIT_S)):
        pass
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), WAIT_S) == cli.EXIT_INTERRUPTED
    _, errors = await asyncio.wait_for(client.communicate(), WAIT_S)
    assert client.returncode in (cli.EXIT_RETRY, cli.EXIT_UNREACHABLE)
    assert b"Traceback" not in errors


async def test_a_killed_serve_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process, _ = await serve("--vocab", "4096")
    process.kill()
    await asyncio.wait_for(process.wait(), WAIT_S)
    assert not list(tmp_path.iterdir())


async def test_interrupting_generate_cancels_without_a_traceback():
    model = make_model(max_request_tokens=100_000)
    async with front_door("--step-s", "0.01", model=model) as door:
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "moe_server", "generate", "--token-ids", "1", "--ignore-eos",
            "--max-new-tokens", "50000", "--target", door.server.address,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert await client.stdout.read(2)
        client.send_signal(signal.SIGINT)
        _, errors = await asyncio.wait_for(client.communicate(), WAIT_S)
        assert client.returncode == cli.EXIT_INTERRUPTED
        assert b"Traceback" not in errors
        await eventually(lambda: door.num_cancels == 1)


async def test_a_reader_that_leaves_is_no_traceback(door):
    read, write = os.pipe()
    os.close(read)
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "moe_server", "generate", "abc", "--target", door.server.address,
        stdout=write, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    os.close(write)
    _, errors = await asyncio.wait_for(client.communicate(), WAIT_S)
    assert client.returncode == cli.EXIT_BROKEN_PIPE, errors
    assert errors == b""


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
@pytest.mark.parametrize("command", ["--version", "--help", "plan", "check-config --json"])
async def test_a_stdout_that_cannot_be_written_is_one_error(command, redirection):
    shell = await asyncio.create_subprocess_shell(
        f"{sys.executable} -m moe_server {command} {redirection}", stderr=asyncio.subprocess.PIPE
    )
    _, errors = await asyncio.wait_for(shell.communicate(), WAIT_S)
    assert shell.returncode == cli.EXIT_ERROR
    assert [line.split(":")[0] for line in errors.decode().splitlines()] == ["error", "remedy"]
    assert b"stdout" in errors


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("structlog", ["status"]),
        ("grpc", ["status"]),
        ("grpc", ["plan", "--model", "/absent"]),  # imported to tell what kind of error it is
    ],
)
async def test_an_interrupt_during_the_imports_is_no_traceback(tmp_path, module, command):
    (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt\n")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "moe_server", *command, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    _, errors = await asyncio.wait_for(process.communicate(), WAIT_S)
    lines = [line.split(":")[0] for line in errors.decode().splitlines()]
    assert process.returncode == cli.EXIT_INTERRUPTED
    assert set(lines) <= {"error", "remedy"}


async def test_exit_codes_are_documented():
    text = " ".join(invoke("--help").output.split())
    codes = {value for name, value in vars(cli).items() if name.startswith("EXIT_")}
    assert all(f" {code} " in text for code in codes)
