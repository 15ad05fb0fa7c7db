"""lm-eval's tasks on a checkpoint or ONNX folder -> a folder with every example's answer, as lm-eval writes it."""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pifa_deploy import lm_eval_adapter
from pifa_deploy.contenders import check_runnable, is_onnx
from pifa_deploy.errors import InputMissingError, MissingCapabilityError, StageFailedError
from pifa_deploy.output_folder import new_folder, write_json
from pifa_deploy.task_samples import sample_files

TASKS_JSON = "tasks.json"


@dataclass(frozen=True, kw_only=True)
class TaskRunOptions:
    """What lm-eval is asked to do; what is left out is as in lm-eval's own command line.

    Attributes:
        tasks: names of tasks, groups or tags; "*" stands for any letters.
        include_path: folder with task files (YAML) that lm-eval does not have.
        limit: examples of each task, all when None.
        num_fewshot: solved examples in a prompt, the task's own number when None.
        apply_chat_template: put prompts into the tokenizer's chat template.
        dtype: of a checkpoint, fp32 when None; an ONNX folder has its own.
        device: "cpu" or "cuda", of a checkpoint.
        batch_size: prompts that are run together.
    """

    tasks: tuple[str, ...]
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    dtype: str | None = None
    device: str = "cpu"
    batch_size: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for no task, another device, or a number out of range."""
        if not self.tasks:
            raise ValueError("there is no task to run; name one with --task")
        for name, least in (("limit", 1), ("batch_size", 1), ("num_fewshot", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}, expected cpu or cuda")


def run_tasks(place: str, out: Path | str, options: TaskRunOptions, *, force: bool = False) -> dict[str, Any]:
    """Runs tasks and writes the folder `out`: samples_TASK_DATE.jsonl and results_DATE.json of lm-eval, tasks.json.

    Args:
        place: a checkpoint as `load_model` takes it, or an ONNX folder.
        out: folder to make.
        options: see TaskRunOptions.
        force: replace an earlier one.

    Returns:
        What tasks.json holds: model, options, seconds, and of each task the number of examples and the metrics.

    Raises:
        MissingCapabilityError: lm-eval or accelerate is not installed, or the device is not there.
        ValueError: a task that lm-eval does not know; names the nearest that it knows.
        InputMissingError: no such folder of tasks.
        StageFailedError: lm-eval did not write the samples of every task.
        PifaDeployError: as `check_runnable`, `lm_eval_adapter.open_model` and `new_folder`.
    """
    lm_eval_adapter.register()
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    check_runnable(place, options.device)
    if options.device != "cpu" and is_onnx(place):
        raise MissingCapabilityError(f"{place}: tasks run ONNX folders on the CPU only; use --device cpu")
    manager, names = _known_tasks(options)
    with new_folder(out, force=force) as folder:
        started = time.monotonic()
        tracker = EvaluationTracker(output_path=str(folder))
        results = simple_evaluate(
            model=lm_eval_adapter.NAME,
            model_args={"path": place, **({"dtype": options.dtype} if options.dtype else {})},
            tasks=names,
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            batch_size=options.batch_size,
            device=options.device,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.apply_chat_template,
            log_samples=True,
            evaluation_tracker=tracker,
        )
        summary = _summary(place, options, results) | {"seconds": time.monotonic() - started}
        _save(results, tracker, folder)
        write_json(folder / TASKS_JSON, summary)
    return summary


def _known_tasks(options: TaskRunOptions) -> tuple[Any, list[str]]:
    """Returns lm-eval's task manager and the names that the options mean."""
    from lm_eval.tasks import TaskManager

    include = options.include_path
    if include is not None and not include.is_dir():
        raise InputMissingError(f"{include}: no such folder; expected one with YAML files of lm-eval tasks")
    manager = TaskManager(include_path=None if include is None else str(include))
    found: dict[str, None] = {}
    for name in options.tasks:
        matches = manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            advice = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"lm-eval has no task {name!r}; {advice}--include-path FOLDER adds tasks of your own")
        found.update(dict.fromkeys(matches))
    return manager, list(found)


def _summary(place: str, options: TaskRunOptions, results: Mapping[str, Any]) -> dict[str, Any]:
    tasks = {}
    for name in results["configs"]:
        # "acc,none" is a metric and the filter of the answers before it; other keys are names and remarks.
        figures = {key: value for key, value in results["results"][name].items() if "," in key}
        metrics = {key: value for key, value in figures.items() if isinstance(value, int | float)}
        tasks[name] = {"examples": results["n-samples"][name]["effective"], "metrics": metrics}
    stated = {**asdict(options), "include_path": None if options.include_path is None else str(options.include_path)}
    return {"artefact": "tasks", "schema": 1, "model": place, "options": stated, "tasks": tasks}


def _save(results: dict[str, Any], tracker: Any, folder: Path) -> None:
    """Lets lm-eval write its files; it only warns where it cannot."""
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in samples:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    files = sample_files(folder)
    for task, expected in samples.items():
        lines = files[task].read_text(encoding="utf-8").count("\n") if task in files else 0
        if lines != len(expected):
            raise StageFailedError(
                f"{task}: lm-eval wrote {lines} of {len(expected)} samples; its warning stands above"
            )
