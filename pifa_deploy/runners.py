"""The right runner for a folder."""

from __future__ import annotations

from pathlib import Path

from pifa_deploy.engine_record import ENGINE_JSON, is_engine
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.onnx_runner import OnnxRuntimeRunner
from pifa_deploy.tensorrt_runner import TensorRTRunner


def open_runner(
    path: Path | str, *, device: str = "cpu", plugin_library: Path | None = None
) -> OnnxRuntimeRunner | TensorRTRunner:
    """Returns the runner of an ONNX folder, or of an engine folder.

    Args:
        path: the folder.
        device: "cpu" or "cuda", for an ONNX folder; an engine takes its GPU.
        plugin_library: for an engine; see `engine_fit.check_fit`.

    Raises:
        ValueError: a plugin for an ONNX folder, whose operators bring their bodies along.
        PifaDeployError: as the runners and `open_folder`.
    """
    if is_engine(path):
        place = Path(path)
        folder = place.parent if place.name == ENGINE_JSON else place
        return TensorRTRunner(folder, plugin_library=plugin_library)
    if plugin_library is not None:
        raise ValueError(f"{plugin_library} is a plugin of TensorRT, and {path} is no engine folder; leave it out")
    return OnnxRuntimeRunner(open_folder(path), device=device)
