"""A warm-up's findings in JUnit's format."""

from xml.etree import ElementTree as ET

import pytest

from moe_server.warmup.junit import junit_xml


def stage(name: str, state: str = "done", failure: str = "") -> dict:
    return {
        "model": "demo",
        "name": name,
        "state": state,
        "attempts": 1,
        "seconds": 2.5,
        "bytes": 7,
        "failure": failure,
    }


def probe(index: int, missed: str = "", model: str = "demo") -> dict:
    return {"model": model, "index": index, "ttft_s": 0.25, "tpot_s": 0.1, "missed": missed}


def findings(**changes) -> dict:
    return {
        "target": "10.0.0.7:50051",
        "ready": True,
        "error": "",
        "startup_s": 12.0,
        "models": ["demo"],
        "stages": [stage("libraries"), stage("experts")],
        "probes_per_model": 3,
        "probes": [probe(1), probe(2), probe(3)],
        **changes,
    }


def outcomes(found: dict) -> tuple[ET.Element, dict[str, str]]:
    """The suite, and for each case "passed", "skipped" or what its failure says."""
    suite = ET.fromstring(junit_xml(found))
    cases = {}
    for case in suite:
        failure, skipped = case.find("failure"), case.find("skipped")
        outcome = "skipped" if skipped is not None else "passed"
        cases[case.get("name")] = outcome if failure is None else failure.get("message")
    assert len(cases) == len(suite), "names differ, or CI systems show one of them"
    for attribute, count in (
        ("tests", len(cases)),
        ("skipped", sum(outcome == "skipped" for outcome in cases.values())),
        ("failures", sum(outcome not in ("passed", "skipped") for outcome in cases.values())),
    ):
        assert suite.get(attribute) == str(count), attribute
    return suite, cases


def test_a_proof_is_all_green_with_its_times():
    suite, cases = outcomes(findings())
    assert list(cases) == [
        "demo: libraries", "demo: experts", "ready",
        "demo: probe 1", "demo: probe 2", "demo: probe 3",
    ]  # fmt: skip
    assert set(cases.values()) == {"passed"}
    assert (suite.get("name"), suite.get("hostname")) == ("moe-server warmup", "10.0.0.7:50051")
    assert [case.get("time") for case in suite][1:4] == ["2.500", "12.000", "0.250"]


def test_a_missed_limit_is_the_probes_and_the_rest_is_skipped():
    missed = "time to first token 250.0 ms, 50.0 ms over max_ttft_ms = 200"
    _, cases = outcomes(findings(probes=[probe(1), probe(2, missed)], error="Probe 2 of 3: ..."))
    assert cases["demo: probe 1"] == "passed"
    assert cases["demo: probe 2"] == missed
    assert cases["demo: probe 3"] == "skipped"


def test_a_probe_that_got_no_answer_carries_the_error():
    error = "A probe failed with UNAVAILABLE: The engine was lost."
    _, cases = outcomes(findings(probes=[probe(1)], error=error, models=["demo", "other"]))
    assert cases["demo: probe 2"] == error
    assert cases["demo: probe 3"] == cases["other: probe 1"] == "skipped"


def test_a_start_that_failed_names_its_stage():
    why = "Shard 3 is missing."
    found = findings(
        ready=False,
        error=f"The server failed to start: {why}",
        stages=[stage("libraries"), stage("experts", "failed", why)],
        probes=[],
    )
    _, cases = outcomes(found)
    assert cases["demo: libraries"] == "passed"
    assert cases["demo: experts"] == why
    assert cases["ready"] == found["error"]
    assert cases["demo: probe 1"] == "skipped"


def test_a_stage_that_failed_once_and_was_done_is_green():
    found = findings(stages=[stage("experts", "done", "")])
    assert outcomes(found)[1]["demo: experts"] == "passed"


def test_what_was_missed_by_a_model_that_serves_all_the_same_is_told_and_not_red():
    found = findings(stages=[stage("proof", "failed", "Too slow.")])
    suite, cases = outcomes(found)
    assert cases["demo: proof"] == "skipped"
    assert next(suite.iter("skipped")).get("message") == "ready all the same: Too slow."


def test_without_a_server_there_is_one_red_case():
    found = findings(ready=False, error="Nobody there.", models=[], stages=[], probes=[])
    assert outcomes(found)[1] == {"ready": "Nobody there."}


@pytest.mark.parametrize("text", ["a <b> & \"c\" 'd'", "nul \x00 bell \x07 end", "é… 漢"])
def test_any_text_makes_xml_that_parses(text):
    _, cases = outcomes(findings(ready=False, error=text, probes=[]))
    assert cases["ready"] == text.replace("\x00", " ").replace("\x07", " ")
