"""A warm-up's findings as the XML that CI systems show as a list of tests.

JUnit's format as Jenkins, GitLab and others read it: a case for each stage of the start, one for
being READY, one for each probe. The first thing that failed carries the error; what was not reached
is skipped, so that a red list says where it stopped. So is what failed of a model that serves all
the same, with what it missed. `moe-server warmup` writes it.
"""

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as ET

SUITE = "moe-server warmup"
FAILED_STAGE = "failed"


def junit_xml(findings: Mapping[str, Any]) -> str:
    """The report of `moe-server warmup` (its JSON, as a mapping) in XML."""
    suite = ET.Element("testsuite", name=SUITE, hostname=findings["target"])
    is_ready = findings["ready"]
    for stage in findings["stages"]:
        failure = stage["failure"] if stage["state"] == FAILED_STAGE else ""
        _add(
            suite,
            f"{stage['model']}: {stage['name']}",
            stage["seconds"],
            failure="" if is_ready else failure,
            skipped=f"ready all the same: {failure}" if is_ready and failure else "",
        )
    error = findings["error"]
    _add(suite, "ready", findings["startup_s"], failure="" if is_ready else error)
    probes = {(probe["model"], probe["index"]): probe for probe in findings["probes"]}
    # Probes go one after another, and the first failure ends them: it was the first that is
    # missing, if it was none of those that were measured.
    is_told = not is_ready or any(probe["missed"] for probe in probes.values())
    for model in findings["models"]:
        for index in range(1, findings["probes_per_model"] + 1):
            name = f"{model}: probe {index}"
            if probe := probes.get((model, index)):
                _add(suite, name, probe["ttft_s"], failure=probe["missed"])
            else:
                skipped = "an earlier case failed" if is_told else ""
                _add(suite, name, 0.0, failure="" if is_told else error, skipped=skipped)
                is_told = True
    for attribute, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
        suite.set(attribute, str(len(list(suite.iter(tag)))))
    suite.set("errors", "0")
    suite.set("time", f"{sum(float(case.get('time', 0)) for case in suite):.3f}")
    ET.indent(suite)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True)


def _add(
    suite: ET.Element, name: str, seconds: float, *, failure: str = "", skipped: str = ""
) -> None:
    case = ET.SubElement(suite, "testcase", classname=SUITE, name=name, time=f"{seconds:.3f}")
    if skipped:
        ET.SubElement(case, "skipped", message=_printable(skipped))
    elif failure:
        ET.SubElement(case, "failure", message=_printable(failure))


def _printable(text: str) -> str:
    """Without the control characters that XML has no way to write."""
    return "".join(char if char.isprintable() else " " for char in text)
