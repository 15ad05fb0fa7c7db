"""Reports: what is collected, the published schema, Markdown, JUnit, and the command."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from cli_fixtures import Outcome
from report_fixtures import KINDS, bench, evaluation, profile, tasks, verification, write
from test_proof import TOLD, engine

from pifa_deploy.cli import console
from pifa_deploy.errors import InputMissingError, InputRefusedError
from pifa_deploy.json_shape import validate
from pifa_deploy.proof import PRECISIONS, ProofGates
from pifa_deploy.report import ReportOptions, make_report, read_report, write_report
from pifa_deploy.report_html import html_page
from pifa_deploy.report_junit import junit_xml
from pifa_deploy.report_markdown import markdown
from pifa_deploy.report_numbers import interval, number
from pifa_deploy.report_quality import parity_tables, tasks_tables
from pifa_deploy.report_schema import REPORT, json_schema
from pifa_deploy.report_stages import Source
from pifa_deploy.report_tables import figures_table, gates_table, rivals_table
from pifa_deploy.report_times import profiles_of
from pifa_deploy.report_variants import Estimate, variants_of

pytest_plugins = ("cli_plugin",)

DOCS = Path(__file__).resolve().parents[1] / "docs"
PUBLISHED = sorted((DOCS.parent / "perf" / "results" / "smollm2_ci").glob("*.json"))
HOSTILE = '<script>alert("x")</script>|`*_&\x00'


def report_of(folder: Path, gates: ProofGates | None = None, **results: Any) -> dict[str, Any]:
    """Makes a report of results named like their kind; an engine is given by its folder."""
    engines = {name: value for name, value in results.items() if isinstance(value, Path)}
    files = write(folder, **{name: value for name, value in results.items() if name not in engines})
    sources = [Source(kind=name, label=None, path=path) for name, path in files.items()]
    sources += [Source(kind="engine", label=name, path=path) for name, path in engines.items()]
    return make_report(ReportOptions(sources=tuple(sources), gates=gates or ProofGates()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    return report_of(folder, bench=bench(), evaluate=evaluation(), verify=verification(), tasks=tasks())


# --- verdict ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verify", "benched", "verdict"),
    [
        (verification(), bench(), "passed"),
        (verification(passed=False), bench(), "failed"),
        (verification(passed=None), bench(), "not decided"),
        (verification(passed=None), bench(decisions=[], passed=False), "failed"),
        (verification(decisions=[], passed=True), bench(decisions=[], passed=None), "not decided"),
        (verification(), bench(decisions=[], passed=None), "passed"),
        (verification(decisions=[], passed=None), bench(), "not decided"),
        (verification(decisions=[], passed=False), bench(), "failed"),
    ],
)
def test_the_verdict_is_that_of_the_collected_decisions(
    tmp_path: Path, verify: dict[str, Any], benched: dict[str, Any], verdict: str
) -> None:
    assert report_of(tmp_path, verify=verify, bench=benched)["verdict"] == verdict


def test_gates_keep_their_values_and_say_where_they_come_from(whole: dict[str, Any]) -> None:
    expected = [("verify", gate) for gate in verification()["decisions"]]
    expected += [("bench", gate) for gate in bench()["decisions"]]
    expected += [("tasks", gate) for gate in tasks()["decisions"]]
    assert whole["gates"] == [{"stage": stage, "label": stage, **gate, "reason": None} for stage, gate in expected]


def test_stage_results_are_kept_whole(whole: dict[str, Any]) -> None:
    assert whole["stages"]["bench"] == [{"label": "bench", "content": json.loads(json.dumps(bench()))}]
    assert whole["stages"]["evaluate"][0]["content"] == evaluation()


# --- the schema -------------------------------------------------------------------------------------------------


def test_the_published_schema_is_that_of_the_program() -> None:
    assert json.loads((DOCS / "report.schema.json").read_text()) == json_schema()
    jsonschema.Draft202012Validator.check_schema(json_schema())


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the path of every value in a JSON value; of a list only those in its first item."""
    children = list(value.items()) if isinstance(value, dict) else list(enumerate(value))[:1]
    below = [
        place for key, child in children if isinstance(child, dict | list) for place in places(child, (*path, key))
    ]
    return [(*path, key) for key, _ in children] + below


def shortened(value: Any) -> Any:
    """Returns a JSON value whose lists have one item at most."""
    if isinstance(value, dict):
        return {key: shortened(child) for key, child in value.items()}
    return [shortened(child) for child in value[:1]] if isinstance(value, list) else value


def is_accepted(value: Any) -> bool:
    try:
        validate(value, REPORT, "report")
    except InputRefusedError:
        return False
    return True


def test_both_checks_refuse_the_same_changes(whole: dict[str, Any]) -> None:
    schema, small = jsonschema.Draft202012Validator(json_schema()), shortened(whole)
    assert schema.is_valid(whole)
    assert schema.is_valid(small)
    refused = 0
    for path in places(small):
        for new in ("delete", None, [], {}, "text", -7, 0.5, True):
            changed = copy.deepcopy(small)
            holder = changed
            for key in path[:-1]:
                holder = holder[key]
            if new == "delete":
                del holder[path[-1]]
            else:
                holder[path[-1]] = new
            accepted = is_accepted(changed)
            assert accepted == schema.is_valid(changed), (path, new)
            refused += not accepted
    assert refused > 500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, r"schema is 2, this program reads 1; update pifa-deploy"),
        ({"schema": 0}, r"schema is 0, this program reads 1; make it again with this version"),
        ({"schema": "1"}, r"schema is '1', this program reads 1"),
        ({"verdict": "fine"}, r"report\.verdict is 'fine', expected 'passed' or 'failed' or 'not decided'"),
        ({"gates": 3}, r"report\.gates is 3, expected a list"),
        ({"gates": [{"stage": "x"}]}, r"report\.gates\[0\]\.label is None, expected a value"),
        ({"figures": [{"variant": 3}]}, r"report\.figures\[0\]\.\w+ is "),
        ({"artefact": "bench"}, r"report\.artefact is 'bench', expected 'report'"),
    ],
)
def test_a_report_outside_the_schema_is_refused_by_name(
    whole: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "report.json").write_text(json.dumps({**whole, **change}))
    with pytest.raises(InputRefusedError, match=message) as caught:
        read_report(tmp_path)
    assert "report.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def without(content: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != field}


def rounds(times: list[float]) -> dict[str, Any]:
    """A bench one of whose rows has these times of rounds, and as many launches as the others."""
    content = bench()
    content["cases"][0]["rows"][1]["round_ms"] = times
    return content


PROFILE_OF_NO_CASE = r"profiles are of \['prefill 1'\], which is none of its 3 cases; run bench again"


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("bench", bench(schema=2), r"schema is 2, this program reads 1; update pifa-deploy"),
        ("bench", evaluation(), r"artefact is 'evaluation', expected 'bench'; give what `pifa-deploy bench --json`"),
        ("evaluate", bench(), r"artefact is 'bench', expected 'evaluation'"),
        ("verify", bench(), r"artefact is 'bench', expected 'verify'; give what `pifa-deploy verify --json` wrote"),
        ("verify", without(verification(), "artefact"), r"artefact is None, expected 'verify'"),
        ("verify", verification(artefact="verification"), r"artefact is 'verification', expected 'verify'"),
        ("verify", without(verification(), "schema"), r"schema is None, this program reads 2; make it again"),
        ("verify", without(verification(), "levels"), r"verify\.levels is None, expected a value"),
        ("tasks", without(tasks(), "schema"), r"schema is None, this program reads 1; make it again"),
        ("bench", rounds([]), r"rows of prefill 128 have \[0, 20\] times of rounds, expected as many in each, 2 or"),
        ("bench", rounds([0.0] * 20), r"expected as many in each, 2 or more, all above 0; run bench again"),
        ("bench", bench(layers=[profile("prefill 1", {name: name for name in KINDS})]), PROFILE_OF_NO_CASE),
        ("bench", bench(baseline="nobody"), r"rows or baseline name \['nobody'\]; run bench again"),
        ("bench", bench(names={"pifa": "dense"}), r"name one of them twice"),
        ("bench", bench(cases=[{"phase": "prefill"}]), r"bench\.cases\[0\]\.\w+ is None, expected a value"),
        ("tasks", bench(), r"expected 'compare-tasks'; give what `pifa-deploy compare-tasks --json` wrote"),
        ("tasks", tasks(tasks=[{"task": "a"}]), r"tasks\.tasks\[0\]\.\w+ is None, expected a value"),
        ("verify", verification(overall=3), r"verify\.overall is 3, expected an object"),
        ("verify", {**verification(), "passed": "yes"}, r"verify\.passed is 'yes', expected true or false"),
    ],
)
def test_a_stage_result_outside_its_contract_is_refused(
    tmp_path: Path, kind: str, content: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputRefusedError, match=message):
        report_of(tmp_path, **{kind: content})


@pytest.mark.parametrize("text", ["", "[1]", '{"schema": NaN}', "[" * 100_000])
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "verify.json").write_text(text)
    with pytest.raises(InputRefusedError, match=r"verify\.json: (not JSON|holds a list)"):
        make_report(ReportOptions(sources=(Source(kind="verify", label=None, path=tmp_path / "verify.json"),)))


def test_a_missing_file_and_two_of_one_name_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match=r"no\.json: no such file; give what `pifa-deploy verify --json` wrote"):
        make_report(ReportOptions(sources=(Source(kind="verify", label=None, path=tmp_path / "no.json"),)))
    one, other = (Source(kind="verify", label="a", path=tmp_path / name) for name in ("b.json", "c.json"))
    with pytest.raises(ValueError, match="are both called 'a'; name one as --verify NAME=PATH"):
        ReportOptions(sources=(one, other))
    with pytest.raises(ValueError, match="there is nothing to report"):
        ReportOptions(sources=())


def test_a_report_from_before_there_were_tasks_is_refused_in_one_line(whole: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({**whole, "stages": without(whole["stages"], "tasks")}))
    with pytest.raises(InputRefusedError, match=r"report\.json: report\.stages\.tasks is None, expected a") as caught:
        read_report(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_published_results_can_be_reported(file: Path) -> None:
    kind = "evaluate" if file.stem == "evaluate" else "bench"
    report = make_report(ReportOptions(sources=(Source(kind=kind, label=None, path=file),)))
    assert jsonschema.Draft202012Validator(json_schema()).is_valid(report)
    assert len(list(profiles_of(report))) == (0 if kind == "evaluate" else 2)


# --- what is put together ---------------------------------------------------------------------------------------


def test_bench_and_evaluation_are_joined_by_path_or_name(tmp_path: Path) -> None:
    report = report_of(tmp_path, bench=bench(), evaluate=evaluation(pifa="engines/pifa", lowrank="x/other"))
    found = {variant.name: variant for variant in variants_of(report["stages"])}
    assert list(found) == ["dense", "sparse", "lowrank", "pifa", "other"]
    assert found["pifa"].perplexity["novel"].value == pytest.approx(18)
    assert found["pifa"].times["decode at 128"].bound_ms == pytest.approx(9 / 1.45 * 0.6)
    assert not found["lowrank"].perplexity
    assert not found["other"].times


def test_two_benches_keep_their_contenders_apart(tmp_path: Path) -> None:
    files = write(tmp_path, near=bench(), far=bench())
    sources = tuple(Source(kind="bench", label=name, path=path) for name, path in files.items())
    report = make_report(ReportOptions(sources=sources))
    names = [variant.name for variant in variants_of(report["stages"])]
    assert len(set(names)) == 8
    assert {"pifa (near)", "pifa (far)"} < set(names)
    assert len(rivals_table(report).rows) == 6


def test_a_model_evaluated_twice_has_the_texts_of_both(tmp_path: Path) -> None:
    files = write(tmp_path, one=evaluation(("novel",)), two=evaluation(("manual",)))
    sources = tuple(Source(kind="evaluate", label=name, path=path) for name, path in files.items())
    report = make_report(ReportOptions(sources=sources))
    assert all(set(variant.perplexity) == {"novel", "manual"} for variant in variants_of(report["stages"]))


def test_pifa_is_held_against_the_faster_of_dense_and_sparse(whole: dict[str, Any]) -> None:
    for row in rivals_table(whole).rows:
        assert row[1:3] == ("pifa", "sparse (2:4, no build log given)")
        gain, low, high = map(float, re.findall(r"[\d.]+", row[-1]))
        assert gain == pytest.approx(1.45 / 1.3, rel=0.02)
        assert low <= gain <= high
    slow = bench()
    for case in slow["cases"]:
        case["rows"][1]["latency_ms"]["median"] *= 2
    report = {**whole, "stages": {**whole["stages"], "bench": [{"label": "bench", "content": slow}]}}
    assert {row[2] for row in rivals_table(report).rows} == {"dense"}


@pytest.mark.parametrize(
    ("picked", "label"), [(0, "2:4, not picked"), (2, "2:4"), (None, "2:4, not picked")], ids=["none", "two", "silent"]
)
def test_a_sparse_engine_is_named_by_what_its_log_shows(tmp_path: Path, picked: int | None, label: str) -> None:
    told = "" if picked is None else f"{TOLD}(Sparsity) Chose {picked} layer(s) using sparse tactics: a, b"
    (tmp_path / "engine").mkdir()
    folder = engine(tmp_path / "engine", told, sparse_weights=True)
    report = report_of(tmp_path, ProofGates(sparse=True), bench=bench(), sparse=folder)
    (gate,) = (gate for gate in report["gates"] if gate["stage"] == "engine")
    assert gate["passed"] is (None if picked is None else picked > 0)
    assert {row[0]: row[1] for row in figures_table(report).rows}["sparse"] == label
    for text in (markdown(report), html_page(report)):
        assert ("2:4, not picked" in text) == (label != "2:4")


def test_sparse_weights_in_onnx_runtime_are_called_dense(tmp_path: Path) -> None:
    report = report_of(tmp_path, bench=bench(runtime="onnxruntime"))
    assert {row[0]: row[1] for row in figures_table(report).rows}["sparse"] == "2:4, run as dense"


def test_an_earlier_report_gives_the_figures_that_both_have(tmp_path: Path) -> None:
    write_report(report_of(tmp_path, bench=bench()), tmp_path / "old")
    slower = bench()
    slower["cases"][0]["rows"][3]["latency_ms"]["median"] *= 2
    sources = (Source(kind="bench", label=None, path=write(tmp_path, bench=slower)["bench"]),)
    report = make_report(ReportOptions(sources=sources, baseline=tmp_path / "old"))
    changed = [each for each in report["changes"] if each["now"] != each["before"]]
    assert [(each["variant"], each["figure"]) for each in changed] == [("pifa", "prefill 128, median")]
    assert changed[0]["now"] == pytest.approx(2 * changed[0]["before"])
    assert "+100.0 %" in markdown(report)
    assert report["verdict"] == "passed"
    for page in (markdown(report), html_page(report)):
        assert "another machine" not in page


def test_a_report_says_that_times_of_another_machine_are_not_judged(tmp_path: Path) -> None:
    other = bench()
    other["environment"] = {**other["environment"], "cpu": "another"}
    write_report(report_of(tmp_path, bench=other), tmp_path / "old")
    sources = (Source(kind="bench", label=None, path=write(tmp_path, bench=bench())["bench"]),)
    report = make_report(ReportOptions(sources=sources, baseline=tmp_path / "old", max_regression=0.05))
    assert {each["unit"] for each in report["changes"] if not each["comparable"]} == {"ms"}
    judged = " ".join(gate["name"] for gate in report["gates"] if gate["stage"] == "baseline")
    assert "speed-up" in judged
    assert "median" not in judged
    for page in (markdown(report), html_page(report)):
        assert "The earlier times are of another machine: no gate judges them." in page


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (3, "3"),
        (1234567, "1,234,567"),
        (0.0, "0.000"),
        (12.0, "12.00"),
        (1e-5, "1.00e-05"),
        (871.13, "871.1"),
    ],
)
def test_numbers_have_four_digits(value: Any, text: str) -> None:
    assert number(value) == text


def test_an_interval_has_the_decimals_of_its_value() -> None:
    assert interval(Estimate(value=1.0, low=0.994, high=1.0123)) == "1.00 [0.99, 1.01]"
    assert interval(Estimate(value=1.0, low=1.0, high=1.0)) == "1.00"


def test_long_runs_of_cases_are_shortened_and_an_unused_column_left_out(tmp_path: Path) -> None:
    case = verification()["cases"][0]
    cases = [case, *({**case, "name": f"decode at {past}"} for past in range(64, 96))]
    report = report_of(tmp_path, verify=verification(cases=cases))
    (table,) = parity_tables(report)
    shown = [row[0] for row in table.rows]
    expected = ["prefill 17", "decode at 64", "decode at 65", "… 28 more of decode in report.json", "decode at 94"]
    assert shown[:5] == expected
    assert shown[5:] == ["decode at 95", "overall", "low-rank pair, same dtype"]
    assert table.rows[-2][-1] == "1.0e-04 [-5.0e-05, 2.0e-04]"
    assert "why" not in gates_table(report).columns
    assert len(report["stages"]["verify"][0]["content"]["cases"]) == 33


def test_a_failed_bisection_says_where(tmp_path: Path) -> None:
    found = {"line": "layer 3 is the first wrong one"}
    for passed in (True, False):
        (table,) = parity_tables(report_of(tmp_path, verify=verification(passed=passed, bisection=found)))
        assert table.note == ("" if passed else found["line"])


@pytest.mark.parametrize(
    ("passed", "verdict", "row"),
    [
        (True, "passed", ("-0.2 [-0.8, 0.4]", "0.73", "passed")),
        (None, "not decided", ("-0.2 [-2.0, 0.4]", "0.73", "not decided")),
        (False, "failed", ("-10.0 [-12.0, -8.0]", "0.73", "failed")),
    ],
)
def test_tasks_are_gates_and_a_table(tmp_path: Path, passed: bool | None, verdict: str, row: tuple[str, ...]) -> None:
    report = report_of(tmp_path, tasks=tasks(passed=passed))
    assert report["verdict"] == verdict
    (table,) = tasks_tables(report)
    first, second, overall = table.rows
    assert first[:7] == ("arc_easy", "acc", "1,000", "80.0 %", "79.8 %", "5", "3")
    assert second[-3:] == row
    assert (overall[0], overall[2], overall[-1]) == ("all tasks", "2,000", "–")
    assert table.numeric == (False, False, *[True] * 7, False)
    line = "| arc\\_easy | acc | 1,000 | 80.0 % | 79.8 % | 5 | 3 | -0.2 \\[-0.8, 0.4\\] | 0.73 | passed |"
    assert line in markdown(report).splitlines()
    page = html_page(report)
    assert '<h2 id="tasks">Tasks</h2>' in page
    assert all(re.search(rf"[> ]{re.escape(cell)}<", page) for cell in ("arc_easy", *row))


def test_markdown_fits_a_comment(tmp_path: Path) -> None:
    case = bench()["cases"][0]
    many = [{**case, "tokens": 100 + i} for i in range(200)]
    text = markdown(report_of(tmp_path, bench=bench(cases=many, layers=[]), verify=verification()))
    assert len(text) < 65_536
    assert text.endswith("this comment has reached its length.\n")
    assert text.count("<details>") == text.count("</details>")


# --- JUnit ------------------------------------------------------------------------------------------------------


def test_junit_has_a_case_for_each_gate(tmp_path: Path) -> None:
    open_gate = {"name": "top1", "value": None, "limit": 0.9, "passed": None, "reason": "no runtime"}
    verify = verification(passed=False)
    report = report_of(tmp_path, verify={**verify, "decisions": [*verify["decisions"], open_gate]}, bench=bench())
    root = ElementTree.fromstring(junit_xml(report).encode())
    cases = root.findall("testsuite/testcase")
    assert [case.get("name") for case in cases] == ["finite", "mean_kl", "top1", "speed_up pifa"]
    assert all(case.get("classname", "").startswith("pifa-deploy.") for case in cases)
    (failure,) = root.iter("failure")
    assert failure.get("message") == "found 6e-06, limit 1e-06"
    (skipped,) = root.iter("skipped")
    assert skipped.get("message") == "not decided: no runtime"
    for element in (root, *root):
        inside = element.findall(".//testcase")
        assert int(element.get("tests", "-1")) == len(inside)
        assert int(element.get("failures", "-1")) == len(element.findall(".//failure"))
        assert int(element.get("skipped", "-1")) == len(element.findall(".//skipped"))
        assert element.get("errors") == "0"


# --- hostile text -----------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path: Path) -> dict[str, Any]:
    names = {name: f"{name}{HOSTILE}" for name in ("dense", "pifa", "sparse")}
    decision = {"name": HOSTILE, "value": HOSTILE, "limit": HOSTILE, "passed": False, "reason": HOSTILE}
    benched = bench(names=names, environment={HOSTILE: {HOSTILE: HOSTILE}}, command=HOSTILE, decisions=[decision])
    benched["cases"][0]["warnings"] = [HOSTILE]
    solved = tasks()
    solved["tasks"][0]["task"] = solved["overall"]["metric"] = HOSTILE
    files = write(
        tmp_path, bench=benched, evaluate=evaluation((HOSTILE,)), verify=verification(dtype=HOSTILE), tasks=solved
    )
    sources = tuple(Source(kind=kind, label=f"{kind}{HOSTILE}", path=path) for kind, path in files.items())
    return make_report(ReportOptions(sources=sources, title=HOSTILE, command=HOSTILE))


def test_no_text_of_a_file_becomes_markup(hostile: dict[str, Any]) -> None:
    page, text = html_page(hostile), markdown(hostile)
    assert "<script" not in page.lower()
    assert page.count("&lt;script&gt;") > 20
    code = re.search(r"^(`{3,})sh\n.*?\n\1$", text, re.MULTILINE | re.DOTALL)
    assert code
    assert "<script" not in text.replace(code[0], "")
    for block in re.findall(r"(?:^\| .*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    root = ElementTree.fromstring(junit_xml(hostile).encode())
    assert root.get("name") == HOSTILE.replace("\x00", "\ufffd")


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_writes_four_files_and_its_verdict_is_the_exit_code(
    pifa_deploy: Callable[..., Outcome], tmp_path: Path
) -> None:
    results = write(tmp_path, b=bench(), e=evaluation(), v=verification(), bad=verification(passed=False))
    given = ["--bench", f"rtx={results['b']}", "--evaluate", results["e"], "--out", tmp_path / "out"]
    done = pifa_deploy("report", "--verify", results["v"], *given, "--title", "A model")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == f"{tmp_path / 'out'}: passed"
    names = ["report.html", "report.json", "report.md", "report.xml"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    report = read_report(tmp_path / "out")
    assert report["title"] == "A model"
    assert report["stages"]["bench"][0]["label"] == "rtx"
    assert report["command"].startswith(f"pifa-deploy report --verify {results['v']} --bench rtx=")
    pifa_deploy("report", "--verify", results["v"], *given).failed(2, "out exists")
    assert pifa_deploy("report", "--verify", results["bad"], *given, "--force").code == 1
    assert pifa_deploy("report", *given[2:], "--force", "--json", "-").code == 3


def test_gates_on_engines_need_an_engine(pifa_deploy: Callable[..., Outcome], tmp_path: Path) -> None:
    results = write(tmp_path, v=verification())
    given = ["report", "--verify", results["v"], "--out", tmp_path / "out"]
    pifa_deploy(*given, "--require-plugin").failed(2, "ask about engines; give --engine")
    engine(tmp_path)
    done = pifa_deploy(*given, "--engine", f"e={tmp_path}", "--require-plugin", "--require-sparse")
    assert done.code == 1
    assert "without leave to use sparse kernels" in (tmp_path / "out" / "report.md").read_text()


def test_the_command_knows_the_precisions_of_the_gate() -> None:
    assert tuple(PRECISIONS) == console.PRECISIONS


def test_the_example_is_one_small_page_that_loads_nothing() -> None:
    page = (DOCS / "example_report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 500_000
    assert not re.search(r"(?:src|href|action)=.(?!data:)|@import|url\(|<script", page)
    assert "default-src 'none'" in page
    assert not re.search(r"/(?:home|root|work|tmp|Users)/", page)


def test_bad_input_is_one_line(pifa_deploy: Callable[..., Outcome], tmp_path: Path) -> None:
    pifa_deploy("report", "--out", tmp_path / "o").failed(2, "there is nothing to report")
    pifa_deploy("report", "--verify", "=x", "--out", tmp_path / "o").failed(
        2, r"--verify is '=x', expected \[NAME=\]PATH"
    )
    (tmp_path / "old.json").write_text(json.dumps({"artefact": "report", "schema": 7}))
    given = ["--verify", write(tmp_path, v=verification())["v"], "--out", tmp_path / "o"]
    pifa_deploy("report", *given, "--baseline-report", tmp_path / "old.json").failed(
        6, "schema is 7.*update pifa-deploy"
    )
    pifa_deploy("report", *given, "--checkpoint", tmp_path).failed(6, "no factorised checkpoint")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("given", ["bench", "=reason", "bench="])
def test_what_is_not_decided_needs_a_title_and_a_reason(
    pifa_deploy: Callable[..., Outcome], tmp_path: Path, given: str
) -> None:
    outcome = pifa_deploy("report", "--undecided", given, "--out", tmp_path / "report")
    outcome.failed(2, rf"--undecided is '{given}', expected TITLE=REASON")
