"""`advise`: bounds for model folders from their configuration alone, and what it says of bad input."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_fixtures import SIZES, Outcome, change_config

from pifa_deploy.advice import AdviseOptions, advise
from pifa_deploy.checkpoint import read_config
from pifa_deploy.density import density_for_rank
from pifa_deploy.errors import ExitCode, InputRefusedError
from pifa_deploy.gpu_limits import LimitOptions
from pifa_deploy.roofline import PIFA, SPARSE
from pifa_deploy.targets import TARGETS

pytest_plugins = ("cli_plugin",)

LINEARS = 7 * SIZES["num_hidden_layers"]  # type: ignore[operator]


@pytest.fixture
def config_only(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint's config.json and nothing else."""
    shutil.copy(checkpoint / "config.json", tmp_path)
    return tmp_path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Two layers of LLaMA-2-70B's shapes."""
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    config = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 32000, **shape}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_checkpoint_is_bounded_from_its_configuration_alone(config_only: Path) -> None:
    advice = advise(config_only, TARGETS["orin-agx"], AdviseOptions(tokens=(1, 512)))
    recorded = read_config(config_only)["quantization_config"]["modules"]
    assert {one.layer.name: one.layer.rank for one in advice.layers} == {k: v["rank"] for k, v in recorded.items()}
    assert [layer.name for layer in advice.kept] == ["lm_head"]
    q_proj = advice.layers[0].layer
    assert q_proj.density == density_for_rank(q_proj.out_features, q_proj.in_features, q_proj.rank or 0)
    assert advice.bound(SPARSE, 512)
    # 14 layers of two kernels and the head; q, k, v and gate, up of a dense layer are one each.
    assert {one.variant: one.launches for one in advice.decoder}[PIFA] == 2 * LINEARS + 1
    assert {one.variant: one.launches for one in advice.decoder}["dense"] == 4 * 2 + 1


def test_a_low_rank_checkpoint_is_bounded_at_its_ranks(config_only: Path) -> None:
    ranks = [(one.layer.name, one.layer.rank) for one in advise(config_only, TARGETS["l4"], AdviseOptions()).layers]

    def stored_as_pairs(config: dict[str, Any]) -> None:
        for spec in config["quantization_config"]["modules"].values():
            spec["format"] = "lowrank"

    change_config(stored_as_pairs)(config_only)
    found = advise(config_only, TARGETS["l4"], AdviseOptions()).layers
    assert [(one.layer.name, one.layer.rank) for one in found] == ranks


def test_a_dense_model_is_bounded_at_the_ranks_that_compress_would_choose(dense: Path, checkpoint: Path) -> None:
    bounded = advise(dense, TARGETS["l4"], AdviseOptions(density=0.5))
    stored = advise(checkpoint, TARGETS["l4"], AdviseOptions())
    assert [(one.layer.name, one.layer.rank) for one in bounded.layers] == [
        (one.layer.name, one.layer.rank) for one in stored.layers
    ]


def test_layers_that_lose_are_named_with_the_counts_at_which_they_do(llama: Path) -> None:
    options = AdviseOptions(tokens=(1, 4096), density=0.5, limits=LimitOptions(launch_us=10))
    advice = advise(llama, TARGETS["b200"], options)
    losing = {one.layer.name.rpartition(".")[2]: one.leave_dense for one in advice.layers}
    assert losing["k_proj"] == losing["v_proj"] == (1,)
    assert losing["gate_proj"] == ()
    for one in advice.layers:
        assert [1, 4096][: len(one.leave_dense)] == list(one.leave_dense)
        assert all(
            (below < one.layer.density) == (count in one.leave_dense)
            for count, below in zip((1, 4096), one.break_even_density, strict=True)
        )


def test_rounding_ranks_to_tiles_saves_time_in_prefill(llama: Path) -> None:
    advice = advise(llama, TARGETS["h200"], AdviseOptions(tokens=(4096,), density=0.5))
    found = {one.multiple: one for one in advice.multiples}
    assert list(found) == [1, 8, 16, 32, 64, 128]
    assert found[64].seconds[0] < found[1].seconds[0]
    assert found[64].density < found[8].density <= found[1].density == advice.density
    unpadded = advice.bound(PIFA, 4096)
    assert unpadded
    assert found[1].seconds[0] > unpadded.seconds


def test_turing_has_no_2_4_row(llama: Path) -> None:
    advice = advise(llama, TARGETS["rtx2080ti"], AdviseOptions(density=0.5))
    assert advice.bound(SPARSE, 1) is None
    assert advice.speed_up(SPARSE, 1) is None
    assert advice.speed_up(PIFA, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["quantization_config"].update(quant_method="awq"), "quantization_config is not a PIFA record"),
        (lambda c: c.update(model_type="bogus"), "model_type is 'bogus'"),
        (lambda c: c.update(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, expected at most"),
        (lambda c: c.update(hidden_size=56), r"proj is recorded as 48 x \d+, the model has 56 x \d+ there"),
        (lambda c: c.update(num_hidden_layers=1), "model has no linear layer there"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    config_only: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    change_config(change)(config_only)
    with pytest.raises(InputRefusedError, match=message):
        advise(config_only, TARGETS["l4"], AdviseOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": ()}, r"tokens are \[\], expected different counts of at least 1"),
        ({"tokens": (1, 0)}, r"tokens are \[1, 0\]"),
        ({"tokens": (4, 4)}, r"tokens are \[4, 4\]"),
        ({"density": 1.5}, "density is 1.5"),
    ],
)
def test_options_check_themselves(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdviseOptions(**options)


def test_the_command_shows_a_table_and_says_that_nothing_was_measured(
    checkpoint: Path, pifa_deploy: Callable[..., Outcome]
) -> None:
    outcome = pifa_deploy("advise", checkpoint, "--target", "orin-agx", "--tokens", "1,512", "--layers")
    assert (outcome.code, outcome.err) == (0, "")
    assert "bounds from datasheets, not measurements" in outcome.out
    assert "204.8 GB/s (NVIDIA Jetson AGX Orin Series technical brief)" in outcome.out
    assert all(f"\n{variant} " in outcome.out for variant in ("dense", "2:4", "low-rank, same rank", "pifa", "q_proj"))
    assert re.search(
        r"The plugin over plain operators, .*: 1\.\d\d x at 1 \(0\.\d\d x\), 1\.\d\d x at 512 \(", outcome.out
    )
    last = outcome.out.splitlines()[-1]
    assert last.startswith(f"{checkpoint}: at density 0.4")
    assert "tokens; " in last


def test_the_json_has_every_bound_and_source(checkpoint: Path, pifa_deploy: Callable[..., Outcome]) -> None:
    outcome = pifa_deploy("advise", checkpoint, "--target", "Orin AGX", "--json", "-")
    assert outcome.code == 0
    found = json.loads(outcome.out)
    assert found["target"]["name"] == "orin-agx"
    assert found["notice"].startswith("These are bounds from datasheets")
    assert len(found["decoder"]) == 8 * 3
    assert len(found["layers"]) == LINEARS
    assert found["target"]["datasheet"]["tensor_tflops"]["source"]
    assert {one["speed_up"] for one in found["decoder"] if one["variant"] == "dense"} == {1}
    seconds = {(one["variant"], one["tokens"]): one["seconds"] for one in found["decoder"]}
    for gains in found["plugin_speed_up"]:
        tokens = gains.pop("tokens")
        assert gains == {name: seconds[name, tokens] / seconds["pifa", tokens] for name in gains}
        assert gains["pifa, plain operators fused"] < 1 < gains["pifa, plain operators"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--target", "rtx4900"], ExitCode.USAGE, r"target 'rtx4900' is unknown; did you mean rtx4090, .*\?$"),
        (
            ["--target", "rtx4090-laptop"],
            ExitCode.NOT_DECIDED,
            r"4090 laptop: .*memory bandwidth .give --bandwidth GB/s",
        ),
        (["--target", "xavier-agx", "--dtype", "bf16"], ExitCode.MISFIT, "bf16 needs 8.0"),
        (["--target", "l4", "--density", "0.5"], ExitCode.USAGE, "is factorised already; --density is for a dense"),
        (["--target", "l4", "--tokens", "1,x"], ExitCode.USAGE, "expected token counts such as 1,512,2048"),
        (["--target", "l4", "--bandwidth", "-3"], ExitCode.USAGE, "bandwidth_gb_s is -3.0"),
    ],
)
def test_bad_arguments_end_with_their_exit_code(
    checkpoint: Path, pifa_deploy: Callable[..., Outcome], arguments: list[str], code: int, message: str
) -> None:
    pifa_deploy("advise", checkpoint, *arguments).failed(code, message)


def test_bad_folders_end_with_their_exit_code(dense: Path, tmp_path: Path, pifa_deploy: Callable[..., Outcome]) -> None:
    pifa_deploy("advise", dense, "--target", "l4").failed(ExitCode.USAGE, "is a dense model; give the --density")
    pifa_deploy("advise", tmp_path / "no", "--target", "l4").failed(ExitCode.USAGE, "no such folder")
    pifa_deploy("advise", tmp_path, "--target", "l4").failed(ExitCode.INPUT_REFUSED, "has no config.json")
