"""A report as JUnit XML, one test case a gate, for the test views of GitLab, GitHub actions and Jenkins.

There is no official schema; this is the part that all of them read: testsuites > testsuite > testcase with name and
classname, in it <failure message type> or <skipped message>.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from pifa_deploy.report_numbers import plain
from pifa_deploy.svg_axes import legal

Json = Mapping[str, Any]


def junit_xml(report: Json) -> str:
    """Returns the gates of a report as JUnit XML; a stage result is a suite, a gate that is not decided is skipped."""
    suites: dict[tuple[str, str], list[Json]] = {}
    for gate in report["gates"]:
        suites.setdefault((gate["stage"], gate["label"]), []).append(gate)
    root = ElementTree.Element("testsuites", {"name": legal(report["title"]), **_counts(report["gates"])})
    for (stage, label), gates in suites.items():
        attributes = {"name": legal(f"{stage} {label}"), **_counts(gates), "timestamp": _local(report["created"])}
        suite = ElementTree.SubElement(root, "testsuite", attributes)
        for gate in gates:
            _add_case(suite, gate)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _add_case(suite: ElementTree.Element, gate: Json) -> None:
    names = {"classname": f"pifa-deploy.{gate['stage']}.{gate['label']}", "name": gate["name"], "time": "0"}
    case = ElementTree.SubElement(suite, "testcase", {key: legal(str(value)) for key, value in names.items()})
    told = f"found {plain(gate['value'])}, limit {plain(gate['limit'])}"
    reason = f"; {gate['reason']}" if gate["reason"] else ""
    if gate["passed"] is False:
        failure = ElementTree.SubElement(case, "failure", {"message": legal(told), "type": "gate"})
        failure.text = legal(f"{gate['stage']} {gate['label']}, {gate['name']}: {told}{reason}")
    elif gate["passed"] is None:
        ElementTree.SubElement(case, "skipped", {"message": legal(f"not decided: {gate['reason'] or told}")})


def _counts(gates: Sequence[Json]) -> dict[str, str]:
    results = [gate["passed"] for gate in gates]
    counts = {"tests": len(results), "failures": results.count(False), "errors": 0, "skipped": results.count(None)}
    return {**{name: str(count) for name, count in counts.items()}, "time": "0"}


def _local(created: str) -> str:
    """Returns the time without its offset from UTC, which the XML schema of Jenkins does not allow."""
    return created.partition("+")[0]
