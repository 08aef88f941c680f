"""The systemd unit: its directives, and that its limits agree with the server's own."""

import re
import shlex
import shutil
import subprocess
from configparser import RawConfigParser
from pathlib import Path

import pytest

from moe_server.commands.serve import serve
from moe_server.config import Config, load_config
from moe_server.notify import START_STALL_S, STOP_MARGIN_S
from moe_server.patience import Patience

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy/systemd/moe-server.service"
CONFIG = ROOT / "deploy/systemd/moe-server.toml"

SECONDS = {"s": 1, "min": 60, "h": 3600}

KNOWN = {
    "Unit": """Description Wants After RequiresMountsFor StartLimitIntervalSec StartLimitBurst""",
    "Service": """
        Type NotifyAccess ExecStart TimeoutStartSec WatchdogSec TimeoutStopSec KillMode Restart
        RestartSec OOMPolicy LimitMEMLOCK LimitNOFILE MemorySwapMax DynamicUser StateDirectory
        StateDirectoryMode WorkingDirectory Environment UMask NoNewPrivileges CapabilityBoundingSet
        ProtectSystem ProtectHome PrivateTmp ProtectClock ProtectHostname ProtectKernelLogs
        ProtectKernelModules ProtectKernelTunables ProtectControlGroups RestrictAddressFamilies
        RestrictNamespaces RestrictRealtime RestrictSUIDSGID LockPersonality
        SystemCallArchitectures""",
    "Install": "WantedBy",
}
"""systemd skips a directive that it does not know, or that stands in another section, with a line
in its log. These are in systemd.unit(5), systemd.service(5), systemd.exec(5) and
systemd.resource-control(5), and `systemd-analyze verify` has passed them."""


def read_unit(text: str) -> RawConfigParser:
    parser = RawConfigParser(interpolation=None, strict=True)
    parser.optionxform = str
    parser.read_string(text)
    return parser


def unknown_directives(unit: RawConfigParser) -> list[str]:
    return [
        f"[{section}] {name}"
        for section in unit.sections()
        for name in unit[section]
        if name not in KNOWN.get(section, "").split()
    ]


def seconds(text: str) -> float:
    """ "6min" -> 360; systemd takes a bare number for seconds."""
    number, unit = re.fullmatch(r"(\d+)([a-z]*)", text).groups()
    return int(number) * SECONDS[unit or "s"]


@pytest.fixture(scope="module")
def unit():
    return read_unit(UNIT.read_text())


def test_every_directive_is_known_in_its_section(unit):
    assert unknown_directives(unit) == []


@pytest.mark.parametrize("wrong", ["WatchdogSecs=5", "StartLimitBurst=5", "TimeOutStopSec=5"])
def test_a_misspelt_or_misplaced_directive_is_found(wrong):
    broken = UNIT.read_text().replace("[Service]", f"[Service]\n{wrong}")
    assert unknown_directives(read_unit(broken)) == [f"[Service] {wrong.partition('=')[0]}"]


def test_systemd_itself_finds_nothing_wrong(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed; the tests beside this one need none")
    text = UNIT.read_text().replace("/opt/moe-server/bin/moe-server", "/bin/true")
    copy = tmp_path / UNIT.name
    copy.write_text(text)
    verify = ("systemd-analyze", "verify", "--man=no", str(copy))
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert UNIT.name not in done.stderr, done.stderr


def test_readiness_is_what_the_server_says(unit):
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert service["NotifyAccess"] == "main", "an engine is not to speak for the server"


def test_no_limit_ends_a_start_or_a_server_while_a_disk_stands_still(unit):
    service = unit["Service"]
    stall_s = Patience().loading_s
    assert stall_s < START_STALL_S <= seconds(service["TimeoutStartSec"])
    assert seconds(service["WatchdogSec"]) > stall_s


def test_systemd_waits_for_accepted_requests(unit):
    # What the server asks for in its last message, for as long as that has not come.
    grace_s = Config().service.shutdown_grace_s
    assert seconds(unit["Service"]["TimeoutStopSec"]) >= grace_s + STOP_MARGIN_S


def test_restarts_are_bounded_within_a_window_that_holds_them(unit):
    service, limits = unit["Service"], unit["Unit"]
    assert service["Restart"] == "on-failure"
    # Otherwise starts that all time out would never count as too many.
    longest_s = seconds(service["TimeoutStartSec"]) + seconds(service["RestartSec"])
    bound_s = int(limits["StartLimitBurst"]) * longest_s
    assert bound_s < seconds(limits["StartLimitIntervalSec"])


def test_an_engine_that_the_kernel_killed_is_the_servers_business(unit):
    assert unit["Service"]["OOMPolicy"] == "continue"


def test_host_memory_can_be_pinned(unit):
    assert unit["Service"]["LimitMEMLOCK"] == "infinity"


def test_its_command_and_its_configuration_are_ones_that_the_server_takes(unit):
    program, command, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert (Path(program).name, command) == ("moe-server", serve.name)
    flags = {flag for parameter in serve.params for flag in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("-")} <= flags
    [file] = [Path(argument) for argument in arguments if argument.endswith(".toml")]
    assert file.name == CONFIG.name
    config = load_config(CONFIG, environ={})
    assert config.warmup.max_ttft_ms is not None, "READY is proof of something"
    assert config.metrics_listen.startswith("127.0.0.1:"), "metrics have no authentication"
