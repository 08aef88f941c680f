"""The alerts: every metric and label value they name is one that a server exports."""

import re
import shutil
import subprocess
from pathlib import Path

import grpc
import pytest
import yaml

from moe_server.service.status_metrics import OF_MODELS, OF_STARTS
from moe_server.state import ServerState
from tests.front_door import front_door, make_config
from tests.service.test_metrics import scrape

ALERTS = Path(__file__).parents[2] / "deploy/prometheus/alerts.yaml"
CASES = Path(__file__).parent / "alerts_test.yaml"

SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
METRIC = re.compile(r"(moe_server_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)=~?"([^"]*)"')


@pytest.fixture(scope="module")
def rules():
    [group] = yaml.safe_load(ALERTS.read_text())["groups"]
    return group["rules"]


def named(rules):
    """Every metric in an expression, with its matchers."""
    for rule in rules:
        for metric, matchers in METRIC.findall(rule["expr"]):
            yield metric, dict(MATCHER.findall(matchers))


async def test_every_metric_and_value_is_one_that_a_server_exports(rules):
    config = make_config(
        metrics_listen="127.0.0.1:0",
        warmup={"prompt_tokens": 2, "new_tokens": 2, "max_ttft_ms": 9e6, "max_tpot_ms": 9e6},
    )
    async with front_door(config=config) as door:
        families = (await scrape(door)).families.values()
    exported = {f"{family.name}{suffix}" for family in families for suffix in SUFFIXES[family.type]}
    values = {
        f"moe_server_{family.name}": set(family.reads)
        for family in (*OF_STARTS, *OF_MODELS)
        if family.label
    }
    for metric, matchers in named(rules):
        assert metric in exported
        for label, pattern in matchers.items():
            known = {code.name for code in grpc.StatusCode} if label == "code" else values[metric]
            assert set(pattern.split("|")) <= known, (metric, label)


def test_every_state_that_serves_nobody_is_watched(rules):
    watched = {
        state
        for metric, matchers in named(rules)
        if metric == "moe_server_state"
        for state in matchers["state"].split("|")
    }
    assert watched == {state.value for state in ServerState}


def test_rules_say_how_bad_it_is_and_where_to_look(rules):
    for rule in rules:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "look"}
    names = [rule["alert"] for rule in rules]
    assert len(set(names)) == len(names)


def test_every_alert_has_a_case_in_which_it_fires(rules):
    fired = {
        case["alertname"]
        for test in yaml.safe_load(CASES.read_text())["tests"]
        for case in test["alert_rule_test"]
        if "exp_alerts" in case
    }
    assert fired == {rule["alert"] for rule in rules}


@pytest.mark.parametrize("arguments", [("check", "rules", ALERTS), ("test", "rules", CASES)])
def test_prometheus_itself_agrees(arguments):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed; the tests beside this one need none")
    done = subprocess.run(("promtool", *arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
