"""Measures each factorised layer in every form it can take, and chooses the fastest that is as exact as low-rank.

On a CPU the forms run as ONNX models of one layer in ONNX Runtime, written as the exporter writes them; on a GPU as
PyTorch modules, and through the plugin's kernels where its library is found. Layers of one shape, rank and layout are
measured once.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from pifa_deploy.digest import model_sha256
from pifa_deploy.errors import InputMissingError, InputRefusedError, MissingCapabilityError
from pifa_deploy.latency import ClockOptions, Laps, measure
from pifa_deploy.layer_forms import FORMS, LOW_RANK, STORED, as_form
from pifa_deploy.layer_graph import layer_model
from pifa_deploy.layer_plan import PLUGIN, LayerPlan, Plan
from pifa_deploy.layouts import layout_of, low_rank_pair
from pifa_deploy.linear import LowRankLinear
from pifa_deploy.model_folder import load_model, torch_dtype
from pifa_deploy.timed_call import PreparedCall
from pifa_deploy.timing_statistics import speed_up
from pifa_deploy.transformers_quantizer import FactorisedLinear, factorised_modules

# x [tokens, n] -> the call that computes y, and y [tokens, m] when it has run.
Prepared = Callable[[torch.Tensor], tuple[PreparedCall, Callable[[], torch.Tensor]]]


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions:
    """What to choose for.

    Attributes:
        dtype: of weights and activations.
        prompt: tokens of the one prefill of a request; 0 weighs decode alone.
        generated: tokens that follow, one pass each; 0 weighs prefill alone.
        tokens: further token counts to measure, for `LayerPlan.fastest`.
        device: "cpu" or "cuda".
        threads: of ONNX Runtime; 0 leaves the choice to it.
        least_gain: speed-up over the stored form from which on another one is worth its bytes.
        error_ratio: largest relative error of a form, as a multiple of the low-rank pair's.
        clock: how long to measure one shape at one token count.
    """

    dtype: str = "fp32"
    prompt: int = 512
    generated: int = 128
    tokens: tuple[int, ...] = ()
    device: str = "cpu"
    threads: int = 0
    least_gain: float = 1.02
    error_ratio: float = 4.0
    clock: ClockOptions = field(default_factory=lambda: ClockOptions(warm_up_ms=20, duration_s=0.5, rounds=15))

    def __post_init__(self) -> None:
        """Raises ValueError for a workload without tokens or a count below 1."""
        torch_dtype(self.dtype)
        if min(self.prompt, self.generated) < 0 or self.prompt + self.generated == 0:
            raise ValueError(f"the workload is {self.prompt} + {self.generated} tokens, expected at least 1")
        if any(count < 1 for count in self.tokens):
            raise ValueError(f"tokens are {list(self.tokens)}, expected counts of at least 1")

    def counts(self) -> list[int]:
        """Returns the token counts to measure, ascending."""
        asked = {*self.tokens, *([self.prompt] if self.prompt else []), *([1] if self.generated else [])}
        return sorted(asked)


def choose(checkpoint: Path | str, options: ChoiceOptions) -> Plan:
    """Returns the plan of a checkpoint on this machine.

    Raises:
        InputMissingError: not a folder of this machine.
        InputRefusedError: malformed, or without factorised layers.
        MissingCapabilityError: no such device, or no ONNX Runtime.
    """
    if not Path(checkpoint).exists():
        raise InputMissingError(
            f"{checkpoint}: no such folder; a plan is bound to a checkpoint on this machine by its hash"
        )
    model = load_model(checkpoint, dtype=torch_dtype(options.dtype))
    layers = factorised_modules(model)
    if not layers:
        raise InputRefusedError(f"{checkpoint}: has no factorised layers; give a PIFA or low-rank checkpoint")
    shapes: dict[str, list[str]] = {}
    for name, layer in layers.items():
        shapes.setdefault(_shape(layer), []).append(name)
    runtime, device, forms = _machine(options)
    chosen: dict[str, LayerPlan] = {}
    measurements: dict[str, Any] = {}
    for shape, names in tqdm(shapes.items(), desc="choose", unit="shape", disable=None, leave=False):
        found = _measured(layers[names[0]], forms(layers[names[0]]), options)
        measurements[shape] = {form: one.to_json() for form, one in found.items()}
        plan = decide(shape, found, options)
        chosen |= dict.fromkeys(names, plan)
    return Plan(
        source_sha256=model_sha256(Path(checkpoint)),
        dtype=options.dtype,
        runtime=runtime,
        device=device,
        workload={"prompt": options.prompt, "generated": options.generated},
        layers={name: chosen[name] for name in layers},
        measurements=measurements,
    )


@dataclass(frozen=True, kw_only=True)
class FormTimes:
    """One form of one shape: relative error against float64, and tokens -> median milliseconds of each round."""

    error: float
    rounds_ms: Mapping[int, list[float]]

    def total_ms(self, options: ChoiceOptions) -> list[float]:
        """Returns, round by round, the time of the workload."""
        parts = [(self.rounds_ms[options.prompt], 1)] if options.prompt else []
        parts += [(self.rounds_ms[1], options.generated)] if options.generated else []
        return [float(sum(ms[i] * times for ms, times in parts)) for i in range(len(parts[0][0]))]

    def to_json(self) -> dict[str, Any]:
        """Returns error and median microseconds."""
        times = {str(count): round(float(np.median(ms)) * 1e3, 2) for count, ms in self.rounds_ms.items()}
        return {"error": self.error, "us": times}


def decide(shape: str, found: Mapping[str, FormTimes], options: ChoiceOptions) -> LayerPlan:
    """Returns the fastest form that is exact enough; another than the stored one only where that is beyond the noise.

    A form is faster when the whole 95 % interval of its speed-up over the stored one is above `least_gain`. The stored
    form stays where no form is exact enough: `verify` then says so of the whole model.
    """
    limit = options.error_ratio * found.get(LOW_RANK, found[STORED]).error
    exact = {form: times for form, times in found.items() if times.error <= limit} or {STORED: found[STORED]}
    reference = STORED if STORED in exact else next(iter(exact))

    def best(rounds: Mapping[str, list[float]]) -> str:
        fastest = min(exact, key=lambda form: float(np.median(rounds[form])))
        sure = fastest == reference or speed_up(rounds[reference], rounds[fastest]).low > options.least_gain
        return fastest if sure else reference

    return LayerPlan(
        form=best({form: times.total_ms(options) for form, times in exact.items()}),
        fastest={
            str(count): best({form: times.rounds_ms[count] for form, times in exact.items()})
            for count in options.counts()
        },
        shape=shape,
    )


def _measured(layer: FactorisedLinear, forms: Mapping[str, Prepared], options: ChoiceOptions) -> dict[str, FormTimes]:
    u, v = low_rank_pair(layer)
    weight, bias = u @ v, None if layer.bias is None else layer.bias.detach().double()
    errors: dict[str, float] = {}
    rounds: dict[str, dict[int, list[float]]] = {form: {} for form in forms}
    for count in options.counts():
        x = torch.randn(count, layer.in_features, generator=torch.Generator().manual_seed(count))
        x = x.to(torch_dtype(options.dtype))
        exact = nn.functional.linear(x.double(), weight, bias)
        ready = {form: prepare(x) for form, prepare in forms.items()}
        for form, (call, result) in ready.items():
            call.launch()
            call.wait()
            error = float((result().double().cpu() - exact).norm() / exact.norm())
            errors[form] = max(errors.get(form, 0.0), error)
        laps = measure({form: call for form, (call, _) in ready.items()}, options.clock)
        for form, times in laps.items():
            rounds[form][count] = _round_ms(times)
        for call, _ in ready.values():
            call.close()
    return {form: FormTimes(error=errors[form], rounds_ms=rounds[form]) for form in forms}


def _round_ms(laps: Laps) -> list[float]:
    """Returns the median of every round, on the GPU's clock where there is one."""
    if laps.gpu_compute_ms is None:
        return laps.round_ms
    return [float(np.median([lap.gpu_compute_ms for lap in turn])) for turn in laps.rounds]


def _shape(layer: FactorisedLinear) -> str:
    bias = "" if layer.bias is None else " + bias"
    return f"{layer.out_features} x {layer.in_features}, rank {layer.rank}, {layout_of(layer)}{bias}"


def _forms_of(layer: FactorisedLinear) -> tuple[str, ...]:
    """Returns the forms that differ: a low-rank layer is stored in that form."""
    return tuple(form for form in FORMS if form != LOW_RANK or not isinstance(layer, LowRankLinear))


def _machine(options: ChoiceOptions) -> tuple[str, str, Callable[[FactorisedLinear], dict[str, Prepared]]]:
    """Returns the runtime and its version, the device's name, and what prepares a layer's forms on it."""
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise MissingCapabilityError(f"torch {torch.__version__} finds no CUDA device; use --device cpu")
        return f"torch {torch.__version__}", torch.cuda.get_device_name(), _on_gpu
    if options.dtype == "bf16":
        raise MissingCapabilityError("ONNX Runtime has no bf16 kernels on a CPU; choose for fp32 or fp16, or on a GPU")
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingCapabilityError("ONNX Runtime is not installed; pip install 'pifa-deploy[cpu]'") from error

    def forms(layer: FactorisedLinear) -> dict[str, Prepared]:
        return {form: _in_onnx_runtime(as_form(layer, form), options.threads) for form in _forms_of(layer)}

    return f"onnxruntime {onnxruntime.__version__}", platform.machine(), forms


def _in_onnx_runtime(layer: nn.Module, threads: int) -> Prepared:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        layer_model(layer).SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )

    def prepare(x: torch.Tensor) -> tuple[PreparedCall, Callable[[], torch.Tensor]]:
        y = torch.empty(len(x), int(layer.out_features), dtype=x.dtype)  # type: ignore[arg-type]
        binding = session.io_binding()
        # An output that ONNX Runtime allocates anew in every run costs more than a small layer takes.
        for bind, name, tensor in ((binding.bind_input, "x", x), (binding.bind_output, "y", y)):
            kind = torch.empty(0, dtype=tensor.dtype).numpy().dtype.type
            bind(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())

        def run(held: tuple[torch.Tensor, ...] = (x, y)) -> None:  # the binding knows addresses only
            session.run_with_iobinding(binding)

        return PreparedCall(run), lambda: y

    return prepare


def _on_gpu(layer: FactorisedLinear) -> dict[str, Prepared]:
    """Returns the forms as captured CUDA graphs, with the plugin's kernels where their library is found."""
    from pifa_deploy import cuda_kernels

    forms = {form: _in_torch(as_form(layer, form)) for form in _forms_of(layer)}
    if isinstance(layer, LowRankLinear):
        return forms

    def with_kernels(x: torch.Tensor) -> tuple[PreparedCall, Callable[[], torch.Tensor]]:
        cuda_kernels.enable()
        try:
            return forms[STORED](x)
        finally:
            cuda_kernels.disable()

    return {**forms, PLUGIN: with_kernels} if _has_kernels() else forms


def _has_kernels() -> bool:
    """Whether there is a library of the plugin; raises InputMissingError where one is named that is not there."""
    from pifa_deploy.plugin_library import find_library

    try:
        find_library()
    except MissingCapabilityError:
        return False
    return True


def _in_torch(layer: nn.Module) -> Prepared:
    moved = copy.deepcopy(layer).to("cuda")

    @torch.no_grad()
    def prepare(x: torch.Tensor) -> tuple[PreparedCall, Callable[[], torch.Tensor]]:
        held, result = x.to("cuda"), {}

        def run() -> None:
            with torch.no_grad():
                result["y"] = moved(held)

        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        return PreparedCall(run, stream=stream, cuda_graph=True), lambda: result["y"]

    return prepare
