"""Pipeline files: what is refused, which commands they become, and a whole run of a small model."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cli_fixtures import Outcome, save_dense

from pifa_deploy.calibration import HELD_OUT_TEXT, packaged_text
from pifa_deploy.cli.ci import arguments_of
from pifa_deploy.cli.ci_checks import check_files
from pifa_deploy.cli.main import run
from pifa_deploy.errors import ExitCode, InputMissingError, InputRefusedError, OutputExistsError
from pifa_deploy.pipeline import Outcome as StepOutcome
from pifa_deploy.pipeline import StepFailedError, held_output, remove_report, run_steps, verdict
from pifa_deploy.pipeline_file import PipelineFile, read_pipeline
from pifa_deploy.pipeline_record import StepRecord
from pifa_deploy.pipeline_step import OnlyWith, Step
from pifa_deploy.pipeline_steps import steps_of

pytest_plugins = ("cli_plugin",)

DOCS = Path(__file__).resolve().parents[1] / "docs"
COMPRESS = 'compress = { density = 0.6, method = "svd" }'
WHOLE = f"""
[model]
dense = "dense"
[output]
folder = "made"
[variants.dense]
verify = {{ decode-steps = 2 }}
[variants.pifa]
{COMPRESS}
[export]
dtype = "fp32"
[evaluate]
text = ["held-out=held-out.txt"]
context = 64
max-windows = 2
"""
# What is really run: as little as makes an artefact and a result of each kind.
RUN = f"""
[model]
dense = "dense"
[output]
folder = "made"
[variants.dense]
export = {{ dtype = "fp32" }}
verify = {{ decode-steps = 2, positions = 512 }}
[variants.pifa]
{COMPRESS}
[evaluate]
text = ["held-out=held-out.txt"]
context = 64
max-windows = 2
"""
TASKS = f"""{WHOLE}
[tasks]
task = ["arc_easy", "piqa"]
limit = 200
margin = 0.02
"""


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    """`file(text)` writes a pipeline file and returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "pifa-deploy.toml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("[model\n", r"pifa-deploy\.toml: is not TOML \(.*line 1"),
        ('[modle]\ndense = "d"\n', r"unknown key 'modle'; did you mean model\?"),
        ('[model]\ndnse = "d"\n[variants.a]\n', r"\[model\]: unknown key 'dnse'; did you mean dense\?"),
        ('[model]\ndense = "d"\n', r"has no variants; expected at least one"),
        ("[model]\ndense = 3\n[variants.a]\n", r"\[model\]: dense is 3, expected text"),
        ("\ufeffvariants = 3\n", r"variants is 3, expected a table"),
        ("[variants.a]\n", r"\[variants\.a\]: needs the dense model; give it as dense in \[model\]"),
        (f"[variants.a]\n{COMPRESS}\n", r"needs the dense model"),
        ('[variants.a]\ncheckpoint = "c"\nimport = "i"\n', r"has checkpoint and import, expected one of"),
        ('[variants.a]\nchekpoint = "c"\n', r"\[variants\.a\]: unknown key 'chekpoint'; did you mean checkpoint\?"),
        ('[variants.a]\ncheckpoint = "c"\n[bench.t]\n', r"\[bench\.t\]: a is measured as ONNX; add \[export\]"),
        ('[variants.a]\ncheckpoint = "c"\n[verify]\n', r"\[verify\] of a works on ONNX; add \[export\]"),
        ('[variants.report]\ncheckpoint = "c"\n', r"the name 'report' is that of a result in the output folder"),
        (
            '[variants.a]\ncheckpoint = "c"\n[variants.b]\ncheckpoint = "d"\n[tasks]\n',
            r"\[tasks\]: has no task, expected names of lm-eval tasks",
        ),
        (
            '[variants.a]\ncheckpoint = "c"\n[tasks]\ntask = ["t"]\n',
            r"\[tasks\]: contenders is \['a'\], expected a reference and one to compare",
        ),
        (
            '[variants.a]\ncheckpoint = "c"\n[tasks]\ntask = ["t"]\ncontenders = ["b"]\n',
            r"\[tasks\]: contenders is \['b'\], expected names out of a",
        ),
        (
            '[variants.a]\ncheckpoint = "c"\n[tasks]\ntask = ["t"]\nartefact = "engine"\n',
            r"\[tasks\]: artefact is 'engine', expected one of checkpoint, onnx",
        ),
        (
            '[variants.a]\ncheckpoint = "c"\n[variants.b]\ncheckpoint = "d"\n[tasks]\ntask = "t"\nartefact = "onnx"\n',
            r"\[tasks\]: a solves tasks as ONNX; add \[export\]",
        ),
        ('[variants."../a"]\ncheckpoint = "c"\n', r"the name '\.\./a' is not one of letters"),
        ('[variants.a]\nrelayout = {layout = "auto"}\n', r"relayout has no from"),
        (
            '[variants.a]\nrelayout = {from = "b"}\n',
            r"relayout is from 'b', expected a variant above it \(there is none\)",
        ),
        ('[variants.a]\ncheckpoint = "c"\n[export]\n[bench.t]\ncpu = 3\n', r"\[bench\.t\]: cpu is 3, expected a table"),
        (
            '[variants.a]\ncheckpoint = "c"\n[export]\n[bench.t.gpu]\ncontenders = ["a"]\n',
            r"\[bench\.t\]: contenders in \.gpu is of both stages; give it in \[bench\.t\]",
        ),
        (
            '[variants.a]\ncheckpoint = "c"\n[bench.t]\ncontenders = ["b"]\n',
            r"contenders is \['b'\], expected .* out of a",
        ),
    ],
)
def test_a_malformed_file_is_refused_by_name(file: Callable[[str], Path], text: str, pattern: str) -> None:
    with pytest.raises(InputRefusedError, match=pattern):
        read_pipeline(file(text))


def test_the_example_in_the_docs_becomes_commands() -> None:
    file = read_pipeline(DOCS / "ci" / "pifa-deploy.toml")
    made = {stage: [step.arguments[0] for step in steps_of(file, stage, arguments_of)] for stage in ("cpu", "gpu")}
    assert set(made["cpu"]) == {
        *("compress", "relayout", "export", "verify", "build", "evaluate", "tasks", "compare-tasks", "bench", "report")
    }
    assert set(made["gpu"]) == {"verify", "bench", "report"}


@pytest.mark.parametrize(
    ("build", "pattern"),
    [
        ('target = ["rtx4900"]', r"toml: build dense: .*rtx4900.*rtx4090"),
        ("target = [3]", r"toml: build dense: .*'3'"),
        ('target = ["orin-agx"]', r"toml: build dense: .*8\.7"),
    ],
)
def test_a_gpu_that_cannot_be_built_for_is_refused_before_the_first_step(
    file: Callable[[str], Path], pifa_deploy: Callable[..., Outcome], build: str, pattern: str
) -> None:
    pifa_deploy("ci", file(f"{WHOLE}[build]\n{build}\n"), "--dry-run").failed(ExitCode.INPUT_REFUSED, pattern)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match=r"none\.toml: no such file; docs/ci has an example"):
        read_pipeline(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("command", "table", "pattern"),
    [
        ("export", {"dtpye": "fp16"}, r"\[x\]: unknown key 'dtpye'; did you mean dtype\?"),
        ("export", {"dtype": "fp8"}, r"\[x\]: dtype is 'fp8': .*fp8.* is not one of"),
        ("export", {"plain-ops": 1}, r"plain-ops is 1, expected true or false"),
        ("compress", {"density": "half"}, r"density is 'half': 'half' is not a valid float"),
        ("compress", {"density": True}, r"density is True, expected text or a number"),
        ("compress", {"force": True}, r"unknown key 'force'"),
        ("verify", {"reference": "c"}, r"unknown key 'reference'"),
        ("bench", {"device": "cpu"}, r"unknown key 'device'"),
        ("tasks", {"margn": 0.02}, r"unknown key 'margn'; did you mean margin\?"),
        ("compare-tasks", {"limt": 3}, r"unknown key 'limt'; did you mean limit\?"),
        ("tasks", {"contender": ["a"]}, r"unknown key 'contender'; did you mean contenders\?"),
        ("tasks", {"limit": "all"}, r"limit is 'all': 'all' is not a valid integer"),
        ("bench", {"prefill": []}, r"prefill is \[\], expected a value; leave the key out for the default"),
        ("compress", {"density": [0.5, 0.6]}, r"density is \[0\.5, 0\.6\], expected one value"),
    ],
)
def test_options_are_those_of_the_command(command: str, table: dict[str, object], pattern: str) -> None:
    with pytest.raises(InputRefusedError, match=pattern):
        arguments_of(command, table, "[x]")


def test_options_become_arguments() -> None:
    table = {"density": 0.5, "calibration": ["mixture", "a.txt"], "sequence_length": 64, "restart": False}
    assert arguments_of("compress", table, "") == [
        *("--density", "0.5", "--calibration", "mixture", "--calibration", "a.txt", "--sequence-length", "64")
    ]
    assert arguments_of("export", {"plain-ops": True}, "") == ["--plain-ops"]
    assert arguments_of("export", {"plan": "plan.json"}, "") == ["--plan", "plan.json"]


def test_steps_follow_the_file_and_the_variants_own_options(file: Callable[[str], Path]) -> None:
    text = (
        f'{WHOLE}[variants.low]\nrelayout = {{ from = "pifa", layout = "pivoted" }}\nexport = {{ dtype = "fp16" }}\n'
        '[build]\ntarget = ["rtx4090"]\n'
    )
    commands = [" ".join(step.arguments) for step in steps_of(read_pipeline(file(text)), "cpu", arguments_of)]
    assert commands == [
        "export dense made/dense/onnx --force --dtype fp32",
        "verify made/dense/onnx --reference dense --decode-steps 2 --json made/dense/verify-onnx.json",
        "build made/dense/onnx made/dense/engine --force --target rtx4090",
        "compress dense made/pifa/checkpoint --force --density 0.6 --method svd",
        "export made/pifa/checkpoint made/pifa/onnx --force --dtype fp32",
        "build made/pifa/onnx made/pifa/engine --force --target rtx4090",
        "relayout made/pifa/checkpoint made/low/checkpoint --force --layout pivoted",
        "export made/low/checkpoint made/low/onnx --force --dtype fp16",
        "build made/low/onnx made/low/engine --force --target rtx4090",
        "evaluate dense=dense pifa=made/pifa/checkpoint low=made/low/checkpoint --text held-out=held-out.txt "
        "--context 64 --max-windows 2 --json made/evaluate.json",
    ]


def test_tasks_are_solved_by_each_and_compared_with_the_first(file: Callable[[str], Path]) -> None:
    def commands(text: str) -> list[str]:
        steps = steps_of(read_pipeline(file(text)), "cpu", arguments_of)
        return [" ".join(step.command(lambda place: True)) for step in steps if "tasks" in " ".join(step.arguments)]

    assert commands(TASKS) == [
        "tasks dense made/dense/tasks --force --task arc_easy --task piqa --limit 200",
        "tasks made/pifa/checkpoint made/pifa/tasks --force --task arc_easy --task piqa --limit 200",
        "compare-tasks made/dense/tasks made/pifa/tasks --margin 0.02 --json made/pifa/tasks.json",
    ]
    *_, report = steps_of(read_pipeline(file(TASKS + "[report]\n")), "gpu", arguments_of)
    assert ("--tasks", "pifa", Path("made/pifa/tasks.json")) in report.reads_too
    exported = commands(TASKS + 'artefact = "onnx"\ncontenders = ["pifa", "dense"]\npooled = true\n')
    assert [command.split(" --")[0] for command in exported] == [
        "tasks made/pifa/onnx made/pifa/tasks",
        "tasks made/dense/onnx made/dense/tasks",
        "compare-tasks made/pifa/tasks made/dense/tasks",
    ]
    assert exported[-1].endswith("--margin 0.02 --pooled --json made/dense/tasks.json")


def test_without_lm_eval_its_steps_are_not_decided_and_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "lm_eval.py").write_text("raise ImportError('hidden')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hidden"))
    (tmp_path / "pifa-deploy.toml").write_text(TASKS + '[report]\nbaseline-report = "no.json"\nmax-regression = 0.05\n')
    file = read_pipeline(tmp_path / "pifa-deploy.toml")
    steps = [step for step in steps_of(file, "cpu", arguments_of) if "tasks" in step.title or step.reports]
    solving, other, comparing, report = steps
    (tmp_path / "dense").mkdir()
    for stale in (solving.output, other.output, comparing.output):
        (tmp_path / stale).mkdir(parents=True)
    told: list[str] = []
    outcomes = run_steps(file, [solving, comparing, report], say=told.append)
    assert [(each.exit_code, each.kept) for each in outcomes] == [(3, False), (3, False), (3, False)]
    assert told[2] == "not decided made/pifa/tasks.json: compare-tasks pifa needs made/dense/tasks"
    assert verdict(outcomes) == ExitCode.NOT_DECIDED
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == ["error: lm-eval does not load (hidden); pip install 'pifa-deploy[lm-eval]'"]
    assert list(json.loads((tmp_path / "made/steps.json").read_text())["steps"]) == ["made/report"]
    made = json.loads((tmp_path / "made/report/report.json").read_text())
    assert made["verdict"] == "not decided"
    assert {gate["label"]: gate["reason"] for gate in made["gates"]} == {
        "tasks dense": "this machine lacks something that it needs; its message is in the log",
        "compare-tasks pifa": "needs made/dense/tasks",
        "baseline-report": "no.json is not there; make it from the report.json of a good run",
    }
    for page in ("report.md", "report.xml", "report.html"):
        assert "needs made/dense/tasks" in (tmp_path / "made/report" / page).read_text()


def test_why_a_step_is_run_again_is_told(tmp_path: Path) -> None:
    (tmp_path / "pifa-deploy.toml").write_text('[variants.a]\ncheckpoint = "c"\n')
    file = read_pipeline(tmp_path / "pifa-deploy.toml")
    step = Step(title="v", arguments=("--version",), output=file.output / "o.json")
    (tmp_path / file.output).mkdir()
    (tmp_path / step.output).write_text("{}")
    told: list[str] = []
    for force in (False, False, True):
        run_steps(file, [step], force=force, say=told.append)
    assert told == [
        f"again {step.output}: nothing says what it was made from",
        "pifa-deploy --version",
        f"kept {step.output}: v",
        "pifa-deploy --version",
    ]


def test_gates_about_what_is_not_there_are_left_out_of_the_command() -> None:
    baseline = OnlyWith(option="--baseline-report", arguments=("--max-regression", "0.1"), otherwise="gone")
    engine = OnlyWith(option="--engine", arguments=("--require-plugin",), otherwise="none")
    reads = (("--baseline-report", "", Path("b")), ("--engine", "a", Path("a")), ("--engine", "c", Path("c")))
    step = Step(title="r", arguments=("report",), output=Path("o"), reads_too=reads, only_with=(baseline, engine))
    assert step.command(lambda place: place == Path("c")) == ("report", "--engine", "c=c", "--require-plugin")
    assert step.lacking(lambda place: place == Path("c")) == (baseline,)
    assert step.command(lambda place: place == Path("b")) == (
        *("report", "--baseline-report", "b", "--max-regression", "0.1"),
    )


def report_options(path: Path, stage: str) -> str:
    """Returns what follows the output in the command report of a stage, with everything there."""
    *_, report = steps_of(read_pipeline(path), stage, arguments_of)
    return " ".join(report.command(lambda place: "made" not in str(place) or place.name == "engine")).partition(
        "--force "
    )[2]


def test_a_report_asks_about_engines_where_there_are_any_and_has_a_baseline_for_each_stage(
    file: Callable[[str], Path],
) -> None:
    asked = '[report]\nrequire-precision = "fp16"\nbaseline-report = "{stage}.json"\nmax-regression = 0.1\n'
    rtx = file(f"{WHOLE}[build]\n{asked}")
    engines = "--engine dense=made/dense/engine --engine pifa=made/pifa/engine"
    with_limit = "--max-regression 0.1 --require-precision fp16"
    assert report_options(rtx, "cpu") == f"{engines} --baseline-report cpu.json {with_limit}"
    assert report_options(rtx, "gpu") == f"{engines} --baseline-report gpu.json {with_limit}"
    jetson = file(f'{WHOLE}[build]\nbackend = "tensorrt"\n{asked}')
    assert report_options(jetson, "cpu") == f"{engines} --baseline-report cpu.json --max-regression 0.1"
    assert report_options(jetson, "gpu") == f"{engines} --baseline-report gpu.json {with_limit}"


@pytest.mark.parametrize(
    ("report", "pattern"),
    [
        ('baseline-report = "made/report/report.json"', r"which this run replaces; copy it elsewhere"),
        ("baseline-report = 3", r"\[report\]: baseline-report is 3, expected text"),
        ("require-plugin = true", r"\[report\]: require-plugin asks about engines and none is built; add \[build\]"),
        ('undecided = ["a=b"]', r"unknown key 'undecided'"),
    ],
)
def test_a_report_that_cannot_be_made_is_refused(file: Callable[[str], Path], report: str, pattern: str) -> None:
    with pytest.raises(InputRefusedError, match=pattern):
        steps_of(read_pipeline(file(f"{WHOLE}[report]\n{report}\n")), "cpu", arguments_of)


BENCH = """[bench.t]
contenders = ["pifa"]
prefill = [8]
target = "rtx3090"
cuda_graph = true
require-plugin = true
[bench.t.cpu]
threads = 2
bandwidth = 20.0
peak-tflops = 0.1
[bench.t.gpu]
prefill = [16]
"""


def test_each_stage_is_measured_with_its_own_options(file: Callable[[str], Path]) -> None:
    path = file(f"{WHOLE}[build]\n{BENCH}")
    steps = {stage: steps_of(read_pipeline(path), stage, arguments_of)[-1] for stage in ("cpu", "gpu")}
    assert {stage: " ".join(step.arguments) for stage, step in steps.items()} == {
        "cpu": "bench pifa=made/pifa/onnx --device cpu --prefill 8 --threads 2 --bandwidth 20.0 --peak-tflops 0.1 "
        "--json made/bench-t-onnx.json",
        "gpu": "bench pifa=made/pifa/engine --device cuda --prefill 16 --target rtx3090 --cuda-graph --require-plugin "
        "--json made/bench-t-engine.json",
    }


@pytest.mark.parametrize(
    ("bench", "pattern"),
    [
        ("bandwidth = 20.0", r"\[bench\.t\]: bandwidth is of one machine; give it in \[bench\.t\.cpu\] or \.gpu"),
        ("[bench.t.gpu]\nmeasure-limits = true", r"\[bench\.t\]: measure-limits in \.gpu is about a CPU"),
        ('[bench.t.cpu]\ntarget = "rtx3090"', r"\[bench\.t\]: target in \.cpu is about a GPU; give it in \[bench\.t\]"),
        ("[bench.t.gpu]\nprefil = [8]", r"\[bench\.t\]: unknown key 'prefil'; did you mean prefill\?"),
    ],
)
def test_an_option_of_the_wrong_stage_is_refused(file: Callable[[str], Path], bench: str, pattern: str) -> None:
    pipeline = read_pipeline(file(f"{WHOLE}[build]\n[bench.t]\n{bench}\n"))
    with pytest.raises(InputRefusedError, match=pattern):
        [steps_of(pipeline, stage, arguments_of) for stage in ("cpu", "gpu")]


def test_engines_are_measured_of_contenders_that_have_one(file: Callable[[str], Path]) -> None:
    def measured(text: str) -> dict[str, list[str]]:
        pipeline = read_pipeline(file(f"{WHOLE}{text}[report]\n"))
        stages = {stage: steps_of(pipeline, stage, arguments_of) for stage in ("cpu", "gpu")}
        report = stages["gpu"][-1]
        return {
            **{
                stage: [" ".join(step.arguments) for step in steps if "bench" in step.title]
                for stage, steps in stages.items()
            },
            "report": [label for option, label, _ in report.reads_too if option == "--bench"],
        }

    jetson = '[variants.jetson]\ncheckpoint = "c"\nbuild = { backend = "tensorrt" }\n[bench.t]\nprefill = [8]\n'
    assert measured(jetson) == {
        "cpu": [
            "bench dense=made/dense/onnx pifa=made/pifa/onnx jetson=made/jetson/onnx --device cpu --prefill 8 "
            "--json made/bench-t-onnx.json"
        ],
        "gpu": ["bench jetson=made/jetson/engine --device cuda --prefill 8 --json made/bench-t-engine.json"],
        "report": ["t", "t engines"],
    }
    none = measured("[bench.t]\nprefill = [8]\n")
    assert (len(none["cpu"]), none["gpu"], none["report"]) == (1, [], ["t"])
    with pytest.raises(InputRefusedError, match=r"\[bench\.t\]: gate-speed-up is against dense, which has no engine"):
        measured(f'{jetson}[bench.t.gpu]\ngate-speed-up = ["jetson=1.1"]\n')


def test_limits_are_measured_in_the_cpu_stage_only(file: Callable[[str], Path]) -> None:
    pipeline = read_pipeline(file(f"{WHOLE}[build]\n[bench.t]\nmeasure-limits = true\n"))
    found = {stage: steps_of(pipeline, stage, arguments_of)[-1].arguments for stage in ("cpu", "gpu")}
    assert {stage: "--measure-limits" in arguments for stage, arguments in found.items()} == {"cpu": True, "gpu": False}


def test_results_depend_on_what_ran_them(file: Callable[[str], Path]) -> None:
    text = f'{WHOLE}{BENCH}[build]\n[verify]\n[variants.jetson]\ncheckpoint = "c"\n'
    text += 'build = { backend = "tensorrt", plugin = "p.so" }\n'
    pipeline = read_pipeline(file(text))
    found = {
        step.title: step.depends_on for stage in ("cpu", "gpu") for step in steps_of(pipeline, stage, arguments_of)
    }
    assert {title: parts for title, parts in found.items() if parts} == {
        "verify onnx dense": ("torch", "onnxruntime"),
        "build dense": ("tensorrt_rtx",),
        "verify onnx pifa": ("torch", "onnxruntime"),
        "build pifa": ("tensorrt_rtx",),
        "verify onnx jetson": ("torch", "onnxruntime"),
        "bench t onnx": ("torch", "onnxruntime", "cpu"),
        "verify engine dense": ("tensorrt_rtx", "gpu"),
        "verify engine pifa": ("tensorrt_rtx", "gpu"),
        "build jetson": ("tensorrt", "gpu", "plugin"),
        "verify engine jetson": ("tensorrt", "gpu", "plugin"),
        "bench t engine": ("tensorrt_rtx", "gpu", "cpu"),
    }


def test_an_engine_that_could_not_be_built_leaves_out_only_what_needs_it(file: Callable[[str], Path]) -> None:
    pipeline = read_pipeline(file(f"{WHOLE}[build]\n[verify]\n"))
    for place in ("dense", "made/dense/onnx", "made/pifa/onnx", "made/pifa/checkpoint"):
        (pipeline.path.parent / place).mkdir(parents=True)
    others = [step for step in steps_of(pipeline, "cpu", arguments_of) if step.arguments[0] == "build"]
    told: list[str] = []
    outcomes = run_steps(pipeline, steps_of(pipeline, "gpu", arguments_of), others=others, say=told.append)
    assert verdict(outcomes) == ExitCode.NOT_DECIDED
    assert told == [
        f"not decided made/{name}/verify-engine.json: verify engine {name} needs made/{name}/engine, which is not "
        "there or not up to date"
        for name in ("dense", "pifa")
    ]


def test_the_stage_gpu_builds_what_needs_the_device_and_checks_engines(file: Callable[[str], Path]) -> None:
    text = WHOLE + '[build]\n[verify]\n[variants.jetson]\ncheckpoint = "c"\nbuild = { backend = "tensorrt" }\n'
    titles = [step.title for step in steps_of(read_pipeline(file(text)), "gpu", arguments_of)]
    assert titles == ["verify engine dense", "verify engine pifa", "build jetson", "verify engine jetson"]
    first = steps_of(read_pipeline(file(text)), "gpu", arguments_of)[0]
    assert " ".join(first.arguments).startswith(
        "verify made/dense/onnx --reference dense --engine made/dense/engine --decode-steps 2"
    )


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], ExitCode.PASSED),
        ([0, 3], ExitCode.NOT_DECIDED),
        ([3, 1, 0], ExitCode.GATE_FAILED),
        ([], None),
    ],
)
def test_the_verdict_is_the_worst_that_a_step_decided(codes: list[int], expected: ExitCode | None) -> None:
    judging = Step(title="t", arguments=("verify",), output=Path("o"), judges=True)
    making = Step(title="m", arguments=("export",), output=Path("o"))
    outcomes = [StepOutcome(step=judging, exit_code=code, kept=False) for code in codes]
    outcomes.append(StepOutcome(step=judging, exit_code=0, kept=False, ungated=True))
    assert verdict([StepOutcome(step=making, exit_code=0, kept=False), *outcomes]) == expected


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a file was run once. Do not change it, take `copied`."""
    folder = tmp_path_factory.mktemp("pipeline")
    save_dense(folder / "dense")
    shutil.copy(packaged_text(HELD_OUT_TEXT), folder / "held-out.txt")
    (folder / "pifa-deploy.toml").write_text(RUN)
    assert ci(folder) == ExitCode.PASSED
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The same folder as an artefact store and a checkout give it back: the same bytes, other times."""
    return Path(shutil.copytree(made, tmp_path / "copied", copy_function=shutil.copyfile))


def ci(folder: Path) -> int:
    return run(["ci", str(folder / "pifa-deploy.toml"), "--json", str(folder / "ci.json")])


def test_a_whole_run_passes_and_leaves_every_artefact(made: Path) -> None:
    result = json.loads((made / "ci.json").read_text())
    assert result["verdict"] == "passed"
    assert [step["title"] for step in result["steps"]] == [
        *("export dense", "verify onnx dense", "compress pifa", "evaluate")
    ]
    assert all((made / step["output"]).exists() and not step["kept"] for step in result["steps"])
    assert len(json.loads((made / "made/evaluate.json").read_text())["rows"]) == 2


def test_a_second_run_keeps_all_but_what_was_changed(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changed = RUN.replace("decode-steps = 2", "decode-steps = 3, gate-mean-kl = 0.0")
    (copied / "pifa-deploy.toml").write_text(changed)
    text = copied / "held-out.txt"
    text.write_text(text.read_text().replace("e", "a"))
    assert ci(copied) == ExitCode.GATE_FAILED
    steps = json.loads((copied / "ci.json").read_text())["steps"]
    assert [step["title"] for step in steps if not step["kept"]] == ["verify onnx dense", "evaluate"]
    told = capfd.readouterr().err
    assert "FAILED: verify onnx dense" in told
    assert "== again made/dense/verify-onnx.json: another command made it" in told
    assert "== again made/evaluate.json: held-out.txt is another" in told


def test_a_result_that_is_damaged_is_made_again(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = copied / "made/evaluate.json"
    whole = result.read_text()
    result.write_text(whole[:1000])
    assert ci(copied) == ExitCode.PASSED
    assert json.loads(result.read_text())["rows"][0]["name"] == json.loads(whole)["rows"][0]["name"]
    told = capfd.readouterr().err.splitlines()
    assert "== again made/evaluate.json: it is not as it was written" in told
    assert "== kept made/dense/verify-onnx.json: verify onnx dense" in told


def test_measurements_without_a_gate_are_not_said_to_pass(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bench = "prefill = [4]\nduration = 0\nrounds = 2\niterations = 2\nwarm-up = 0\n"
    pipeline, path = f"{RUN}[bench.t]\ncontenders = ['dense']\n{bench}", copied / "pifa-deploy.toml"
    path.write_text(pipeline)
    assert ci(copied) == ExitCode.PASSED
    results = {step["title"]: step["result"] for step in json.loads((copied / "ci.json").read_text())["steps"]}
    assert results == {
        **dict.fromkeys(("export dense", "compress pifa", "evaluate"), "made"),
        "verify onnx dense": "passed",
        "bench t onnx": "measured",
    }
    # A kept bench says the same, and a report of it alone agrees with the run.
    for table in ("", "[report]\n"):
        path.write_text(pipeline.replace("verify = {", "#") + table)
        capfd.readouterr()
        assert ci(copied) == ExitCode.NOT_DECIDED
        out, err = capfd.readouterr()
        assert out.endswith("pifa-deploy.toml, stage cpu: not decided, nothing was gated\n")
        assert "== kept made/bench-t-onnx.json: bench t onnx\n" in err
        assert "measured: bench t onnx\n" in err
        assert "passed" not in out + err
    assert "not decided, nothing was gated: report\n" in err


def test_two_runs_of_one_output_folder_do_not_mix(
    file: Callable[[str], Path], pifa_deploy: Callable[..., Outcome]
) -> None:
    path = file(WHOLE + "[report]\n")
    (path.parent / "made/report").mkdir(parents=True)
    (path.parent / "made/report/report.json").write_text("{}")
    with held_output(read_pipeline(path)):
        outcome = pifa_deploy("ci", path)
        outcome.failed(
            ExitCode.OUTPUT_HELD, r"/made is being written by another process; wait for it or name another output"
        )
        assert (path.parent / "made/report").exists()
        assert pifa_deploy("ci", path, "--dry-run").code == ExitCode.PASSED
    # A run that was killed leaves the file of the lock, and nobody holds it.
    (path.parent / "made/.pifa-deploy.lock").touch()
    pifa_deploy("ci", path).failed(ExitCode.USAGE, r"held-out\.txt: is not there")
    assert not (path.parent / "made/report").exists()


def test_an_output_folder_that_cannot_be_written_is_named(
    file: Callable[[str], Path], pifa_deploy: Callable[..., Outcome]
) -> None:
    path = file(WHOLE.replace('"made"', '"taken/made"'))
    (path.parent / "taken").write_text("")
    pifa_deploy("ci", path).failed(
        ExitCode.STAGE_FAILED, r"toml: \[output\] folder: .*taken/made could not be written: .*Not a directory"
    )
    assert (path.parent / "taken").read_text() == ""


def test_a_report_has_only_what_the_file_asks_for_and_a_run_that_fails_leaves_none(
    copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(copied / "made/dense/verify-onnx.json", copied / "made/pifa/verify-onnx.json")
    (copied / "pifa-deploy.toml").write_text(RUN + "[report]\n")
    assert ci(copied) == ExitCode.PASSED
    result = json.loads((copied / "ci.json").read_text())
    assert [step["title"] for step in result["steps"] if not step["kept"]] == ["report"]
    stages = json.loads((copied / "made/report/report.json").read_text())["stages"]
    assert [entry["label"] for entry in stages["verify"]] == ["dense"]
    assert [entry["label"] for entry in stages["checkpoint"]] == ["pifa"]

    (copied / "held-out.txt").write_text("")
    capfd.readouterr()
    assert ci(copied) == ExitCode.INPUT_REFUSED
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: evaluate ended with exit code 6; its own message stands above")
    assert not (copied / "made/report").exists()


def test_a_run_that_is_ended_leaves_nothing_half_written(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense")
    (tmp_path / "pifa-deploy.toml").write_text('[model]\ndense = "dense"\n[variants.dense]\n[export]\n')
    command = [sys.executable, "-m", "pifa_deploy.cli.main", "ci", "pifa-deploy.toml"]
    other = ["ci", str(tmp_path / "pifa-deploy.toml")]
    assert run([*other, "--dry-run"]) == ExitCode.PASSED  # which loads what the second run needs
    started = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "pifa-ci/dense/.onnx.partial").exists() and started.poll() is None:
            time.sleep(0.02)
        assert run(other) == ExitCode.OUTPUT_HELD
        started.send_signal(signal.SIGTERM)
        _, told = started.communicate()
    finally:
        started.kill()  # nothing, where it has ended
    assert started.returncode == 128 + signal.SIGTERM, told
    assert told.count("error: terminated; what existed before is untouched\n") == 2  # the step's and ci's
    assert [place.name for place in (tmp_path / "pifa-ci").rglob("*")] == ["dense"]


def test_what_the_other_stage_made_is_read_while_it_is_up_to_date(tmp_path: Path) -> None:
    (tmp_path / "pifa-deploy.toml").write_text('[variants.a]\ncheckpoint = "c"\n')
    file = read_pipeline(tmp_path / "pifa-deploy.toml")
    (tmp_path / "in").write_text("x")
    (tmp_path / file.output).mkdir()
    onnx = Step(title="o", arguments=("export", "in"), output=file.output / "onnx")
    engine = Step(
        title="e", arguments=("build",), output=file.output / "engine", needs=(onnx.output,), depends_on=("cpu",)
    )
    record = StepRecord(tmp_path, tmp_path / file.output / "steps.json")
    for step in (onnx, engine):
        (tmp_path / step.output).write_text("{}")
        # As a machine of another processor would have noted it.
        made = {**record.made_from(step, step.arguments), "machine": {"cpu": "another"}}
        record.add(step, made, ExitCode.PASSED)
    bench = Step(title="b", arguments=("--version",), output=Path("b"), needs=(engine.output,))
    reads = Step(title="r", arguments=("--version",), output=Path("r"), reads_too=(("--engine", "a", engine.output),))
    shown: list[str] = []
    for _ in range(2):
        with contextlib.suppress(StepFailedError):  # --version takes no other option
            run_steps(file, [bench, reads], others=[onnx, engine], say=shown.append)
        (tmp_path / "in").write_text("changed")
    assert shown == [
        "pifa-deploy --version",
        f"pifa-deploy --version --engine a={engine.output}",
        f"not up to date {onnx.output}: in is another",
        f"not up to date {engine.output}: {onnx.output} is not",
        f"not decided b: b needs {engine.output}, which is not there or not up to date",
        "pifa-deploy --version",
    ]


def noted(root: Path, file: PipelineFile, *steps: Step) -> None:
    """Leaves outputs of steps, and notes that they were made from what is there."""
    (root / file.output).mkdir(exist_ok=True)
    record = StepRecord(root, root / file.output / "steps.json")
    for step in steps:
        (root / step.output).write_text("old")
        record.add(step, record.made_from(step, step.arguments), ExitCode.PASSED)


def test_what_the_other_stage_found_of_an_artefact_that_is_made_again_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "pifa-deploy.toml").write_text('[variants.a]\ncheckpoint = "c"\n')
    file = read_pipeline(tmp_path / "pifa-deploy.toml")
    (tmp_path / "in").write_text("x")
    onnx = Step(title="o", arguments=("--version", "in"), output=file.output / "onnx")
    verify = Step(
        title="v", arguments=("verify", str(onnx.output)), output=file.output / "v.json", needs=(onnx.output,)
    )
    after = Step(title="w", arguments=("bench",), output=file.output / "w.json", needs=(verify.output,))
    reads = tuple(("--version", step.title, step.output) for step in (verify, after))
    report = Step(title="r", arguments=("--version",), output=Path("r"), reads_too=reads, reports=True)
    noted(tmp_path, file, onnx, verify, after)
    told: list[str] = []

    def say(line: str) -> None:
        told.append(line)
        if line == "pifa-deploy --version in":  # The command prints and makes nothing.
            (tmp_path / onnx.output).write_text("new")

    for _ in range(2):
        run_steps(file, [onnx, report], others=[verify, after], say=say)
        (tmp_path / "in").write_text("changed")
    assert told == [
        f"kept {onnx.output}: o",
        f"pifa-deploy --version --version v={verify.output} --version w={after.output}",
        f"again {onnx.output}: in is another",
        "pifa-deploy --version in",
        f"not up to date {verify.output}: {onnx.output} is another",
        f"not up to date {after.output}: {verify.output} is not",
        "pifa-deploy --version",
    ]


def test_what_the_other_stage_found_of_an_artefact_that_cannot_be_made_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "pifa-deploy.toml").write_text('[variants.a]\ncheckpoint = "c"\n')
    file = read_pipeline(tmp_path / "pifa-deploy.toml")
    (tmp_path / "in").write_text("x")
    first = Step(title="f", arguments=("export", "in"), output=file.output / "f")
    engine = Step(title="e", arguments=("build",), output=file.output / "e", needs=(first.output / "part",))
    verify = Step(title="v", arguments=("verify",), output=file.output / "v.json", needs=(engine.output,))
    reads = (("--version", "v", verify.output),)
    report = Step(title="r", arguments=("--version",), output=Path("r"), reads_too=reads, reports=True)
    noted(tmp_path, file, first, engine, verify)
    (tmp_path / "in").write_text("changed")
    told: list[str] = []
    # What is made of `first` is a part of a folder in a real run; its name is enough here.
    optional = replace(first, optional=True)
    with contextlib.suppress(StepFailedError):  # --version takes no other option
        run_steps(file, [engine, report], others=[optional, verify], say=told.append)
    reason = f"e=needs {first.output}/part, which is not there or not up to date"
    assert told == [
        f"not up to date {first.output}: in is another",
        f"not decided {engine.output}: e needs {first.output}/part, which is not there or not up to date",
        f"not up to date {verify.output}: {engine.output} is not",
        f"pifa-deploy --version --undecided '{reason}'",
    ]


def test_an_interpreter_that_never_comes_to_the_command_is_no_gate_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pifa-deploy.toml").write_text('[variants.a]\ncheckpoint = "c"\n')
    file = read_pipeline(tmp_path / "pifa-deploy.toml")
    for folder in (tmp_path, tmp_path / "first"):
        folder.mkdir(exist_ok=True)
        (folder / "pifa_deploy.py").write_text("raise ImportError('shadowed')")
    step = Step(title="v", arguments=("--version",), output=file.output / "v.json", judges=True)
    if sys.version_info >= (3, 11):
        assert verdict(run_steps(file, [step], say=print)) == ExitCode.PASSED
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "first"))
    (tmp_path / file.output).mkdir(exist_ok=True)
    (tmp_path / step.output).write_text("of an earlier run")
    with pytest.raises(StepFailedError, match=r"v ended with exit code 1; its own message stands above") as caught:
        run_steps(file, [step], force=True, say=print)
    assert caught.value.exit_code == ExitCode.STAGE_FAILED


def test_the_gpu_stage_without_a_gpu_decides_nothing(
    file: Callable[[str], Path], pifa_deploy: Callable[..., Outcome]
) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    path = file(WHOLE + "[build]\n[report]\n")
    earlier = path.parent / "made/report"
    earlier.mkdir(parents=True)
    (earlier / "report.json").write_text("{}")
    outcome = pifa_deploy("ci", path, "--stage", "gpu")
    assert not earlier.exists()
    outcome.failed(
        ExitCode.NOT_DECIDED, r"no NVIDIA GPU, so the stage gpu decides nothing; run it on the target device"
    )


def test_an_input_that_is_not_there_is_named_before_its_step(
    file: Callable[[str], Path], pifa_deploy: Callable[..., Outcome]
) -> None:
    outcome = pifa_deploy("ci", file('[variants.a]\ncheckpoint = "gone"\n[export]\n'))
    outcome.failed(
        ExitCode.USAGE, r"gone: is not there, export a needs it; make it, or bring the folder of --stage cpu"
    )


@pytest.mark.parametrize(
    ("change", "code", "pattern"),
    [
        (('"held-out=held-out.txt"', '"gone.txt"'), ExitCode.USAGE, r"gone\.txt: is not there, evaluate reads it"),
        (("decode-steps = 2", 'text = "no.txt"'), ExitCode.USAGE, r"no\.txt: is not there, verify onnx dense reads it"),
        (
            ('"svd"', '"svd", calibration = ["mixture", "c.txt"]'),
            ExitCode.USAGE,
            r"c\.txt: is not there, compress pifa",
        ),
        (('dtype = "fp32"', 'plan = "p.json"'), ExitCode.USAGE, r"p\.json: is not there, export dense reads it"),
        (("context = 64", "context = 1"), ExitCode.INPUT_REFUSED, r"toml: evaluate: 2 windows of 1 tokens"),
        (("density = 0.6", "density = 1.5"), ExitCode.INPUT_REFUSED, r"toml: compress pifa: .*1\.5"),
        (("decode-steps = 2", "positions = -5"), ExitCode.INPUT_REFUSED, r"verify onnx dense: positions is -5"),
        (("decode-steps = 2", "gate-mean-kl = -1"), ExitCode.INPUT_REFUSED, r"verify onnx dense: gate mean_kl is -1"),
        (('text = ["held-out=held-out.txt"]', ""), ExitCode.INPUT_REFUSED, r"toml: evaluate: text is missing"),
        (('"held-out=', '"='), ExitCode.INPUT_REFUSED, r"toml: evaluate: --text is '=held-out\.txt', expected"),
        (
            ("[evaluate]", '[bench.t]\ngate-speed-up = ["pifx=1.1"]\n[evaluate]'),
            ExitCode.INPUT_REFUSED,
            r"'pifx' is no",
        ),
        (("[evaluate]", "[bench.t]\nrounds = 0\n[evaluate]"), ExitCode.INPUT_REFUSED, r"toml: bench t onnx: .*rounds"),
        *(
            (("[evaluate]", f"{table}\n[evaluate]"), ExitCode.INPUT_REFUSED, pattern)
            for table, pattern in (
                ("[bench.t]\ngate-speed-up = ['pifa=3', 'pifa=0.1']", r"bench t onnx: .* names 'pifa' twice"),
                ("[bench.t]\ngate-speed-up = ['dense=1']", r"bench t onnx: a gate asks about 'dense', the baseline"),
                ("[report]\nmax-regression = 0.05", r"toml: report: max_regression is 0\.05 with no baseline"),
                ('[report]\nbaseline-report = "b"\nmax-regression = -1', r"toml: report: max_regression is -1\.0"),
                ('[report]\nbaseline-report = "b"\nmax-regression = nan', r"toml: report: max_regression is nan"),
                ('[tasks]\ntask = ["t"]\nmargin = -1', r"toml: compare-tasks pifa: margin is -1\.0"),
                ('[tasks]\ntask = ["t"]\nlimit = -3', r"toml: tasks dense: limit is -3, expected at least 1"),
            )
        ),
        (
            ("[evaluate]", '[report]\nbaseline-report = "held-out.txt"\n[evaluate]'),
            ExitCode.INPUT_REFUSED,
            r"held-out\.txt: not JSON",
        ),
    ],
)
def test_what_no_run_takes_is_refused_before_the_first_step(
    file: Callable[[str], Path],
    pifa_deploy: Callable[..., Outcome],
    change: tuple[str, str],
    code: ExitCode,
    pattern: str,
) -> None:
    assert change[0] in WHOLE
    path = file(WHOLE.replace(*change))
    (path.parent / "dense").mkdir()
    (path.parent / "held-out.txt").write_text("text")
    pifa_deploy("ci", path).failed(code, pattern)
    if code == ExitCode.INPUT_REFUSED and "not JSON" not in pattern:
        pifa_deploy("ci", path, "--dry-run").failed(code, pattern)
    assert not (path.parent / "made").exists()


def test_an_option_may_name_what_a_step_before_makes(file: Callable[[str], Path]) -> None:
    def steps(source: str) -> tuple[PipelineFile, list[Step]]:
        verify = f'[variants.low]\nrelayout = {{ from = "pifa" }}\nverify = {{ source = "{source}" }}\n'
        pipeline = read_pipeline(file(f"{WHOLE}{verify}"))
        (pipeline.path.parent / "dense").mkdir(exist_ok=True)
        (pipeline.path.parent / "held-out.txt").write_text("text")
        return pipeline, steps_of(pipeline, "cpu", arguments_of)

    for source in ("made/pifa/checkpoint", "./made/pifa/checkpoint/model", "hf:org/name"):
        pipeline, found = steps(source)
        check_files(pipeline, found)
        verify = next(step for step in found if step.title == "verify onnx low")
        assert verify.needs[-1] == Path(source)
    for source in ("made/pifa/other", "made/low/verify-onnx.json"):
        with pytest.raises(InputMissingError, match=rf"{source}: is not there, verify onnx low reads it"):
            check_files(*steps(source))


def test_a_folder_of_somebody_else_where_the_report_goes_is_left(file: Callable[[str], Path]) -> None:
    pipeline = read_pipeline(file(WHOLE + "[report]\n"))
    folder = pipeline.path.parent / "made/report"
    remove_report(pipeline)
    folder.mkdir(parents=True)
    remove_report(pipeline)
    (folder / "mine").write_text("")
    with pytest.raises(OutputExistsError, match=r"made/report stands where the report goes and is none; remove it"):
        remove_report(pipeline)
    assert (folder / "mine").exists()


def test_the_folder_of_a_file_is_shown_from_where_one_stands(
    file: Callable[[str], Path], pifa_deploy: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(WHOLE.replace('"made"', '"../made"'))
    monkeypatch.chdir(path.parent)
    assert pifa_deploy("ci", path, "--show-folder").out == "../made\n"
    monkeypatch.chdir(path.parents[1])
    assert pifa_deploy("ci", path, "--show-folder").out == "made\n"


def test_a_dry_run_shows_commands_and_makes_nothing(
    file: Callable[[str], Path], pifa_deploy: Callable[..., Outcome]
) -> None:
    path = file(WHOLE)
    outcome = pifa_deploy("ci", path, "--dry-run")
    assert outcome.out.splitlines()[0] == "pifa-deploy export dense made/dense/onnx --force --dtype fp32"
    assert list(path.parent.iterdir()) == [path]
