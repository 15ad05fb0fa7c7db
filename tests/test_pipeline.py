"""Pipeline files: what is refused, which commands they become, and a whole run of a small model."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_fixtures import Outcome, save_dense

from pifa_deploy.calibration import HELD_OUT_TEXT, packaged_text
from pifa_deploy.cli.ci import arguments_of
from pifa_deploy.errors import ExitCode, InputMissingError, InputRefusedError
from pifa_deploy.pipeline import Outcome as StepOutcome
from pifa_deploy.pipeline import StepFailedError, _key, run_steps, verdict
from pifa_deploy.pipeline_file import read_pipeline
from pifa_deploy.pipeline_steps import Step, steps_of

pytest_plugins = ("cli_plugin",)

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
        ("variants = 3\n", r"variants is 3, expected a table"),
        ("[variants.a]\n", r"\[variants\.a\]: needs the dense model; give it as dense in \[model\]"),
        (f"[variants.a]\n{COMPRESS}\n", r"needs the dense model"),
        ('[variants.a]\ncheckpoint = "c"\nimport = "i"\n', r"has checkpoint and import, expected one of"),
        ('[variants.a]\nchekpoint = "c"\n', r"\[variants\.a\]: unknown key 'chekpoint'; did you mean checkpoint\?"),
        ('[variants.a]\ncheckpoint = "c"\n[bench.t]\n', r"\[bench\.t\]: a is measured as ONNX; add \[export\]"),
        ('[variants.a]\ncheckpoint = "c"\n[verify]\n', r"\[verify\] of a works on ONNX; add \[export\]"),
        ('[variants.report]\ncheckpoint = "c"\n', r"the name 'report' is that of a result in the output folder"),
        ('[variants."../a"]\ncheckpoint = "c"\n', r"the name '\.\./a' is not one of letters"),
        ('[variants.a]\nrelayout = {layout = "auto"}\n', r"relayout has no from"),
        (
            '[variants.a]\nrelayout = {from = "b"}\n',
            r"relayout is from 'b', expected a variant above it \(there is none\)",
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


@pytest.mark.parametrize(
    ("build", "pattern"),
    [
        ('target = ["rtx4900"]', r"\[build\] of dense: .*rtx4900.*rtx4090"),
        ('target = ["orin-agx"]', r"\[build\] of dense: .*8\.7"),
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
        ([], ExitCode.NOT_DECIDED),
    ],
)
def test_the_verdict_is_the_worst_that_a_step_decided(codes: list[int], expected: ExitCode) -> None:
    judging = Step(title="t", arguments=("verify",), output=Path("o"), judges=True)
    making = Step(title="m", arguments=("export",), output=Path("o"))
    outcomes = [StepOutcome(step=judging, exit_code=code, kept=False) for code in codes]
    assert verdict([StepOutcome(step=making, exit_code=0, kept=False), *outcomes]) == expected


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder in which a whole file was run once, and what the program said."""
    folder = tmp_path_factory.mktemp("pipeline")
    save_dense(folder / "dense")
    shutil.copy(packaged_text(HELD_OUT_TEXT), folder / "held-out.txt")
    (folder / "pifa-deploy.toml").write_text(WHOLE)
    return folder, ci(folder)


def ci(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pifa_deploy.cli.main", "ci", "pifa-deploy.toml", "--json", "ci.json", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_a_whole_run_passes_and_leaves_every_artefact(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = made
    assert done.returncode == ExitCode.PASSED, done.stderr
    result = json.loads((folder / "ci.json").read_text())
    assert result["verdict"] == "passed"
    assert [step["title"] for step in result["steps"]] == [
        *("export dense", "verify onnx dense", "compress pifa", "export pifa", "evaluate")
    ]
    assert all((folder / step["output"]).exists() and not step["kept"] for step in result["steps"])
    assert len(json.loads((folder / "made/evaluate.json").read_text())["rows"]) == 2


def test_a_second_run_keeps_all_but_what_was_changed(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = made
    (folder / "pifa-deploy.toml").write_text(WHOLE.replace("decode-steps = 2", "decode-steps = 3, gate-mean-kl = 0.0"))
    done = ci(folder)
    (folder / "pifa-deploy.toml").write_text(WHOLE)
    assert done.returncode == ExitCode.GATE_FAILED, done.stderr
    steps = json.loads((folder / "ci.json").read_text())["steps"]
    assert [step["title"] for step in steps if not step["kept"]] == ["verify onnx dense"]
    assert "FAILED: verify onnx dense" in done.stderr


def test_a_text_that_changed_is_read_again(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = made
    ci(folder)
    text = folder / "held-out.txt"
    text.write_text(text.read_text()[100:])
    assert ci(folder).returncode == ExitCode.PASSED
    steps = json.loads((folder / "ci.json").read_text())["steps"]
    assert [step["title"] for step in steps if not step["kept"]] == ["evaluate"]


def test_a_report_has_only_what_the_file_asks_for_and_what_is_up_to_date(
    made: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = made
    stale = folder / "made/pifa/verify-onnx.json"
    shutil.copy(folder / "made/dense/verify-onnx.json", stale)
    (folder / "pifa-deploy.toml").write_text(WHOLE + "[report]\n")
    done = ci(folder, "--force", "--json", "-")
    (folder / "pifa-deploy.toml").write_text(WHOLE)
    stale.unlink()
    assert done.returncode == ExitCode.PASSED, done.stderr
    assert json.loads(done.stdout)["verdict"] == "passed"
    stages = json.loads((folder / "made/report/report.json").read_text())["stages"]
    assert [entry["label"] for entry in stages["verify"]] == ["dense"]
    assert [entry["label"] for entry in stages["checkpoint"]] == ["pifa"]


def test_results_of_the_other_stage_are_reported_while_they_are_up_to_date(tmp_path: Path) -> None:
    (tmp_path / "pifa-deploy.toml").write_text('[variants.a]\ncheckpoint = "c"\n')
    file = read_pipeline(tmp_path / "pifa-deploy.toml")
    (tmp_path / "in").write_text("x")
    (tmp_path / file.output).mkdir()
    other = Step(title="o", arguments=("inspect", "in"), output=file.output / "o.json", judges=True)
    (tmp_path / other.output).write_text("{}")
    key = _key(tmp_path, other, other.arguments)
    record = {"schema": 1, "artefact": "steps", "steps": {str(other.output): {"key": key, "exit_code": 0}}}
    (tmp_path / file.output / "steps.json").write_text(json.dumps(record))
    reads = Step(title="r", arguments=("--version",), output=Path("r"), reads_too=(("--verify", "a", other.output),))
    shown: list[str] = []
    for _ in range(2):
        with contextlib.suppress(StepFailedError):
            run_steps(file, [reads], others=[other], say=shown.append)
        (tmp_path / "in").write_text("changed")
    assert shown == [f"pifa-deploy --version --verify a={other.output}", "pifa-deploy --version"]


def test_a_step_that_fails_ends_the_run_with_its_exit_code(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = made
    (folder / "pifa-deploy.toml").write_text(WHOLE.replace("context = 64", "context = 1"))
    done = ci(folder)
    (folder / "pifa-deploy.toml").write_text(WHOLE)
    assert done.returncode == ExitCode.USAGE
    assert done.stderr.splitlines()[-1].startswith(
        "error: evaluate ended with exit code 2; its own message stands above"
    )


def test_the_gpu_stage_without_a_gpu_decides_nothing(
    file: Callable[[str], Path], pifa_deploy: Callable[..., Outcome]
) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    outcome = pifa_deploy("ci", file(WHOLE + "[build]\n"), "--stage", "gpu")
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


def test_a_dry_run_shows_commands_and_makes_nothing(
    file: Callable[[str], Path], pifa_deploy: Callable[..., Outcome]
) -> None:
    path = file(WHOLE)
    outcome = pifa_deploy("ci", path, "--dry-run")
    assert outcome.out.splitlines()[0] == "pifa-deploy export dense made/dense/onnx --force --dtype fp32"
    assert list(path.parent.iterdir()) == [path]
