"""Pivots in other places: the same function, natural order where it was promised, and honest refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_fixtures import content
from conftest import projections
from decoder_fixtures import dense_decoder, export, factorised_decoder, mixed, plain_step, save_decoder
from family_fixtures import FAMILIES, family_model
from safetensors.torch import load_file
from scipy.linalg import qr
from torch import nn

from pifa_deploy.checkpoint import ModuleSpec, validate
from pifa_deploy.column_linear import PifaColumnLinear
from pifa_deploy.equal_rank import to_low_rank
from pifa_deploy.errors import FactorizationError
from pifa_deploy.hidden_features import HiddenFeatures, hidden_features
from pifa_deploy.layouts import apply_layout, describe_layout, layout_of, low_rank_pair
from pifa_deploy.linear import PifaLinear
from pifa_deploy.model_folder import load_model
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.onnx_runner import OnnxRuntimeRunner
from pifa_deploy.refit import refitted_coefficients
from pifa_deploy.relayout import RelayoutOptions, relayout_checkpoint
from pifa_deploy.shared_pivots import shared_pivots
from pifa_deploy.transformers_quantizer import attach, factorised_modules

pytest_plugins = ("cli_plugin",)

EPS32 = float(torch.finfo(torch.float32).eps)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class TestColumnLinear:
    # (m, n, r): odd sizes, rank 1, every input a pivot, one output.
    SHAPES = ((7, 13, 3), (5, 9, 1), (9, 5, 5), (1, 8, 1), (64, 64, 24))

    @pytest.mark.parametrize(("m", "n", "r"), SHAPES)
    @pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3), (0,), (2, 0)], ids=str)
    @pytest.mark.parametrize("bias", [False, True])
    def test_is_the_dense_product(self, m: int, n: int, r: int, batch: tuple[int, ...], bias: bool) -> None:
        w, d, x = random(m, r), random(r, n - r, seed=1), random(*batch, n, seed=2)
        b = random(m, seed=3) if bias else None
        dense = np.concatenate([w.numpy(), w.numpy() @ d.numpy()], axis=1)
        expected = np.einsum("...n,mn->...m", x.numpy(), dense) + (b.numpy() if bias else 0)
        found = torch.ops.pifa.column_linear(x, w, d, b)
        assert found.shape == (*batch, m)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
    def test_operator_passes_opcheck(self, batch: tuple[int, ...]) -> None:
        tensors = [random(*batch, 13), random(7, 3), random(3, 10), random(7)]
        for tensor in tensors:
            tensor.requires_grad_()
        torch.library.opcheck(torch.ops.pifa.column_linear.default, tuple(tensors))
        torch.library.opcheck(torch.ops.pifa.column_linear.default, (*tensors[:3], None))

    @pytest.mark.parametrize("bias", [False, True])
    def test_gradients_agree_with_finite_differences(self, bias: bool) -> None:
        tensors = [random(2, 3, 9), random(5, 4), random(4, 5), *([random(5)] if bias else [])]
        assert torch.autograd.gradcheck(
            torch.ops.pifa.column_linear.default, tuple(tensor.requires_grad_() for tensor in tensors)
        )

    @pytest.mark.parametrize("rank", [0, 6])
    def test_a_rank_that_no_layer_can_have_is_refused(self, rank: int) -> None:
        with pytest.raises(ValueError, match=rf"rank is {rank}, expected 1 <= rank <= 5"):
            PifaColumnLinear(9, 5, rank)

    def test_the_record_knows_its_tensors_and_size(self) -> None:
        spec = ModuleSpec(rank=3, in_features=13, out_features=7, format="pifa-column")
        assert spec.tensors() == {"pivot_weight": (7, 3), "coefficients": (3, 10)}
        assert spec.parameters() == 7 * 3 + 3 * 10


class TestRefit:
    def test_without_rounding_it_is_the_exact_solution(self) -> None:
        w = random(6, 20) @ random(20, 20, seed=1)
        left, right = random(9, 6, seed=2), w
        found = refitted_coefficients(w, left, right)
        torch.testing.assert_close(found @ w, left @ right, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("known", [False, True])
    def test_it_minimises_error_and_noise_together(self, dtype: torch.dtype, known: bool) -> None:
        pivots = (random(6, 12) * 0.3).to(dtype)
        left, right = random(5, 8, seed=3), random(8, 12, seed=4)
        root = torch.linalg.cholesky(random(12, 30, seed=5) @ random(12, 30, seed=5).T) if known else None
        found = refitted_coefficients(pivots, left, right, root=root)
        metric = torch.eye(12, dtype=torch.float64) if root is None else root
        unit = torch.finfo(dtype).eps / 2

        def objective(c: torch.Tensor) -> torch.Tensor:
            seen = pivots.double() @ metric
            noise = 2 / 3 * unit**2 * seen.square().sum(dim=1)
            return ((left @ right @ metric - c @ seen) ** 2).sum() + (c**2 * noise).sum()

        c = found.clone().requires_grad_()
        (slope,) = torch.autograd.grad(objective(c), c)
        # Zero slope of a convex function; measured against that at the origin.
        origin = torch.zeros_like(found).requires_grad_()
        (start,) = torch.autograd.grad(objective(origin), origin)
        assert float(slope.norm()) <= 1e-9 * float(start.norm())

    def test_a_pivot_that_is_zero_gets_no_coefficient(self) -> None:
        pivots = random(4, 9)
        pivots[2] = 0
        found = refitted_coefficients(pivots, random(5, 4, seed=1), random(4, 9, seed=2))
        assert bool((found[:, 2] == 0).all())
        assert bool(torch.isfinite(found).all())

    def test_nearly_dependent_pivots_get_smaller_coefficients_and_less_error_in_float16(self) -> None:
        exact = random(16, 40, seed=1)
        base = exact.clone()
        base[15] = base[14] + 1e-4 * base[15]
        left = random(24, 16, seed=2)
        stored, truth, x = base.half(), left @ exact, random(40, 200, seed=3)
        plain = torch.linalg.lstsq(base.T, truth.T, driver="gelsd").solution.T
        refit = refitted_coefficients(stored, left, exact)

        def error(c: torch.Tensor) -> float:
            y_p = (stored.double() @ x).half().double()
            return float((c.half().double() @ y_p - truth @ x).norm() / (truth @ x).norm())

        assert float(refit.abs().max()) < 0.5 * float(plain.abs().max())
        assert error(refit) < 0.8 * error(plain)


class TestSharedPivots:
    def spaces(self, m: int, k: int, count: int) -> list[torch.Tensor]:
        return [torch.linalg.qr(random(m, k, seed=seed)).Q for seed in range(count)]

    def norm(self, space: torch.Tensor, rows: torch.Tensor) -> float:
        """rms row norm of the coefficients of the other rows, by least squares."""
        rest = [row for row in range(len(space)) if row not in set(rows.tolist())]
        found = np.linalg.lstsq(space[rows].numpy().T, space[rest].numpy().T, rcond=None)[0]
        return float(np.sqrt((found**2).sum(axis=0).mean()))

    @pytest.mark.parametrize("count", [1, 3])
    def test_come_close_to_the_pivots_each_matrix_would_choose(self, count: int) -> None:
        spaces = self.spaces(120, 24, count)
        rows = shared_pivots(spaces, 24)
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert len(rows) == 24
        for space in spaces:
            own = torch.from_numpy(qr(space.numpy().T, mode="r", pivoting=True)[1][:24].copy()).long()
            assert self.norm(space, rows) <= (1.05 if count == 1 else 2.5) * self.norm(space, own)

    def test_are_far_better_than_the_first_rows(self) -> None:
        spaces = self.spaces(120, 24, 3)
        worst = max(self.norm(space, shared_pivots(spaces, 24)) for space in spaces)
        first = max(self.norm(space, torch.arange(24)) for space in spaces)
        assert worst < first / 3

    def test_rows_that_no_other_can_replace_are_kept(self) -> None:
        space = torch.zeros(40, 5, dtype=torch.float64)
        space[:, :4] = torch.linalg.qr(random(40, 4)).Q
        space[17] = 0
        space[17, 4] = 1
        assert 17 in shared_pivots([torch.linalg.qr(space).Q], 5).tolist()

    def test_more_rows_than_the_rank_and_all_rows(self) -> None:
        spaces = self.spaces(30, 6, 2)
        assert len(shared_pivots(spaces, 9)) == 9
        assert shared_pivots(spaces, 30).tolist() == list(range(30))

    @pytest.mark.parametrize("count", [5, 31])
    def test_a_count_out_of_range_is_refused(self, count: int) -> None:
        with pytest.raises(ValueError, match=rf"count is {count}, expected 6 <= count <= 30"):
            shared_pivots(self.spaces(30, 6, 2), count)


class TestHiddenFeatures:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_mlp_of_an_architecture_is_found_and_nothing_else(self, family: str) -> None:
        found = hidden_features(family_model(family))
        paths = {path for group in found for path in group.paths()}
        assert not [path for path in paths if "attn" in path or "attention" in path]
        # Phi-3 makes gate and up in one linear, and Bloom's MLP takes the residual as a second argument.
        assert bool(found) == (family not in {"phi3", "bloom"})

    def test_names_producers_and_consumer(self) -> None:
        found = hidden_features(dense_decoder("llama"))
        assert found[0] == HiddenFeatures(
            module="model.layers.0.mlp", producers=("gate_proj", "up_proj"), consumer="down_proj"
        )
        assert len(found) == 2

    def test_a_module_that_mixes_its_features_is_not_taken(self) -> None:
        class Mixing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.down(torch.softmax(self.up(x), -1).cumsum(-1))

        assert hidden_features(Mixing()) == []


def even(name: str, m: int, n: int) -> tuple[int, list[int]]:
    """The same rank for m x n and n x m, rows scattered."""
    rank = min(m, n) * 3 // 8
    rows = torch.randperm(m - 1, generator=torch.Generator().manual_seed(len(name)))[:rank] + 1
    return rank, sorted(rows.tolist())


def even_first(name: str, m: int, n: int) -> tuple[int, range]:
    return even(name, m, n)[0], range(even(name, m, n)[0])


def decoder(layout: Any = even, kind: str = "llama", **changes: Any) -> tuple[Any, Any]:
    return factorised_decoder(dense_decoder(kind, **changes), layout)


def logits(model: Any, ids: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.double()


def assert_same_function(model: Any, exact: Any, row_norm: float) -> None:
    ids = np.random.default_rng(0).integers(3, 30, (2, 9))
    found, expected = logits(model, ids), logits(exact, ids)
    # 2 layers of 7 products, two roundings each, amplified by the row norms.
    assert float((found - expected).norm() / expected.norm()) <= 2 * 7 * 2 * max(row_norm, 1) * 4 * EPS32


class TestApplyLayout:
    BIASED = {"attention_bias": True, "mlp_bias": True}  # noqa: RUF012

    @pytest.mark.parametrize("layout", [even, even_first])
    @pytest.mark.parametrize("changes", [{}, BIASED], ids=["no bias", "bias"])
    def test_shared_mlp_is_the_same_function_without_an_index_in_the_mlp(self, layout: Any, changes: Any) -> None:
        model, exact = decoder(layout, **changes)
        before = {name: layer.rank for name, layer in factorised_modules(model).items()}
        summary = apply_layout(model, "shared-mlp")
        assert summary.modules == {"column": 2, "ordered": 4, "pivoted": 8}
        layers = factorised_modules(model)
        assert {name: layer.rank for name, layer in layers.items()} == before
        for name, layer in layers.items():
            kind = "column" if "down" in name else "ordered" if "mlp" in name else "pivoted"
            assert layout_of(layer) == kind
        assert_same_function(model, exact, summary.rms_row_norm)

    def test_it_can_be_taken_back(self) -> None:
        model, exact = decoder()
        apply_layout(model, "shared-mlp")
        summary = apply_layout(model, "pivoted")
        assert summary.modules == {"pivoted": 14}
        assert all(isinstance(layer, PifaLinear) for layer in factorised_modules(model).values())
        assert_same_function(model, exact, summary.rms_row_norm)

    def test_pivots_that_are_pivoted_already_stay_bit_for_bit(self) -> None:
        model, _ = decoder()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        apply_layout(model, "pivoted")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_low_rank_pairs_stay_as_they_are(self) -> None:
        model, _ = factorised_decoder(dense_decoder(), form="lowrank")
        summary = apply_layout(model, "auto")
        assert summary.modules == {"lowrank": 14}
        assert (summary.max_coefficient, summary.rms_row_norm) == (0.0, 0.0)

    def test_auto_says_which_mlp_it_leaves_and_why(self) -> None:
        model, _ = decoder(mixed)  # other ranks for gate than for up
        summary = apply_layout(model, "auto")
        assert summary.kept.keys() == {"model.layers.0.mlp", "model.layers.1.mlp"}
        assert all("differ" in reason for reason in summary.kept.values())
        assert "column" not in summary.modules

    def test_asked_for_by_name_it_is_refused_with_the_reason(self) -> None:
        model, _ = decoder(mixed)
        with pytest.raises(FactorizationError, match=r"model\.layers\.0\.mlp: ranks .* differ; use --layout auto"):
            apply_layout(model, "shared-mlp")

    def test_auto_keeps_an_mlp_whose_coefficients_would_be_large(self) -> None:
        # gate lives on the first features alone and down on the last: no set of pivots serves both.
        model, _ = decoder()
        for layer in (model.get_submodule(f"model.layers.{i}.mlp") for i in range(2)):
            for name in ("gate_proj", "down_proj"):
                linear = layer.get_submodule(name)
                u, v = low_rank_pair(linear)
                hidden = u if name == "gate_proj" else v.T
                half = len(hidden) // 2
                (hidden[half:] if name == "gate_proj" else hidden[:half]).mul_(1e-4)
                rebuilt = PifaLinear.from_factors(_factors(u, v))
                layer.set_submodule(name, rebuilt)
        summary = apply_layout(model, "auto")
        assert summary.kept.keys() == {"model.layers.0.mlp", "model.layers.1.mlp"}
        assert all("row norm" in reason for reason in summary.kept.values())
        with pytest.raises(FactorizationError, match=r"row norm of .*, above 50; use --layout auto or pivoted"):
            apply_layout(model, "shared-mlp")

    def test_a_model_without_such_an_mlp(self) -> None:
        model, _ = decoder()
        for i in range(2):
            model.model.layers[i].mlp = model.model.layers[i].self_attn.q_proj
        with pytest.raises(FactorizationError, match="no module has features that may be renumbered"):
            apply_layout(model, "shared-mlp")
        assert apply_layout(model, "auto").kept == {}

    def test_an_unknown_layout_is_refused(self) -> None:
        with pytest.raises(ValueError, match="layout is 'best', expected one of"):
            apply_layout(nn.Module(), "best")


def _factors(u: torch.Tensor, v: torch.Tensor) -> Any:
    import warnings

    from pifa_deploy.factorization import factors_from_low_rank

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return factors_from_low_rank(u, v, dtype=torch.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("layouts")
    model, exact = decoder(mlp_bias=True)
    save_decoder(model, root / "pivoted")
    relayout_checkpoint(root / "pivoted", root / "shared", RelayoutOptions(layout="shared-mlp"))
    return {"root": root, "exact": exact}


class TestCheckpointAndExport:
    def test_a_checkpoint_keeps_its_layout(self, folders: dict[str, Any]) -> None:
        record = validate(folders["root"] / "shared")
        formats = {name: spec.format for name, spec in record.modules.items()}
        assert {name for name, kind in formats.items() if kind == "pifa-column"} == {
            f"model.layers.{i}.mlp.down_proj" for i in range(2)
        }
        assert record.details["layout"]["asked"] == "shared-mlp"
        model = load_model(folders["root"] / "shared", dtype=torch.float32)
        summary = describe_layout(model)
        assert summary.modules == {"column": 2, "ordered": 4, "pivoted": 8}
        assert_same_function(model, folders["exact"], summary.rms_row_norm)

    def test_relayout_and_back_keep_ranks_dtype_and_everything_else(
        self, folders: dict[str, Any], tmp_path: Path, pifa_deploy: Any
    ) -> None:
        root = folders["root"]
        assert pifa_deploy("relayout", root / "shared", tmp_path / "back", "--layout", "pivoted").code == 0
        before, after = (load_file(folder / "model.safetensors") for folder in (root / "pivoted", tmp_path / "back"))
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype
            if "proj" not in name:
                assert torch.equal(tensor, after[name])
        assert_same_function(load_model(tmp_path / "back", dtype=torch.float32), folders["exact"], 3.0)

    def test_exported_it_has_one_operator_for_each_form(self, folders: dict[str, Any], tmp_path: Path) -> None:
        export(folders["root"] / "shared", tmp_path / "onnx", dtype="fp32")
        folder = open_folder(tmp_path / "onnx")
        nodes = {node.name: node.op_type for node in folder.model.graph.node if node.domain == "pifa"}
        assert nodes.keys() == set(projections(folders["exact"]))
        for name, op_type in nodes.items():
            expected = "PifaColumnLinear" if "down" in name else "PifaOrderedLinear" if "mlp" in name else "PifaLinear"
            assert op_type == expected
        ids = np.random.default_rng(1).integers(3, 30, (1, 7))
        found, _ = OnnxRuntimeRunner(folder).step(plain_step(ids), None)
        expected_logits = logits(folders["exact"], ids).numpy()
        assert np.linalg.norm(found - expected_logits) <= 2e-5 * np.linalg.norm(expected_logits)

    def test_format_auto_leaves_dense_what_factors_do_not_speed_up(
        self, folders: dict[str, Any], tmp_path: Path
    ) -> None:
        def high(name: str, m: int, n: int) -> tuple[int, list[int]]:
            # q, o: r (m + n) is above m n; gate, up: r (m + n - r) is below.
            rank = min(m, n) * 3 // 4
            return rank, sorted(torch.randperm(m, generator=torch.Generator().manual_seed(1))[:rank].tolist())

        model, exact = decoder(high)
        apply_layout(model, "shared-mlp")
        attach(model, source="svd", density=0.5, details={})
        save_decoder(model, tmp_path / "checkpoint")
        summary = export(tmp_path / "checkpoint", tmp_path / "onnx", dtype="fp32", format="auto")
        layers = factorised_modules(model)
        slow = {
            name
            for name, layer in layers.items()
            if "mlp" not in name
            and layer.rank * (layer.in_features + layer.out_features) >= layer.in_features * layer.out_features
        }
        assert slow
        assert set(summary.left_dense) == slow
        folder = open_folder(tmp_path / "onnx")
        assert set(folder.manifest["left_dense"]) == slow
        assert {node.name for node in folder.model.graph.node if node.domain == "pifa"} == layers.keys() - slow
        ids = np.random.default_rng(1).integers(3, 30, (1, 7))
        found, _ = OnnxRuntimeRunner(folder).step(plain_step(ids), None)
        expected_logits = logits(exact, ids).numpy()
        assert np.linalg.norm(found - expected_logits) <= 2e-5 * np.linalg.norm(expected_logits)

    def test_the_low_rank_model_of_equal_rank_has_no_pivots_left(self, folders: dict[str, Any]) -> None:
        twin = load_model(folders["root"] / "shared", dtype=torch.float32)
        to_low_rank(twin)
        assert describe_layout(twin).modules == {"lowrank": 14}
        assert_same_function(twin, folders["exact"], 3.0)

    def test_inspect_shows_where_the_pivots_lie(self, folders: dict[str, Any], pifa_deploy: Any) -> None:
        shown = pifa_deploy("inspect", folders["root"] / "shared")
        assert shown.code == 0
        assert "pifa-column" in shown.out
        assert "shared-mlp" in shown.out

    def test_bad_input(self, folders: dict[str, Any], tmp_path: Path, pifa_deploy: Any) -> None:
        dense = save_decoder(dense_decoder(), tmp_path / "dense")
        cases = [
            (6, "has no factorised layers", [dense, tmp_path / "out"]),
            (2, "no such folder", [tmp_path / "nothing", tmp_path / "out"]),
            (2, "Invalid value for '--layout'", [folders["root"] / "shared", tmp_path / "out", "--layout", "best"]),
        ]
        before = content(tmp_path)
        for code, message, arguments in cases:
            told = pifa_deploy("relayout", *arguments)
            assert (told.code, message in told.err) == (code, True), told.err
        assert content(tmp_path) == before

    def test_a_column_module_that_misses_a_tensor_is_refused(
        self, folders: dict[str, Any], tmp_path: Path, pifa_deploy: Any
    ) -> None:
        model = load_model(folders["root"] / "shared", dtype=None)
        layer = model.get_submodule("model.layers.0.mlp.down_proj")
        layer.coefficients = nn.Parameter(layer.coefficients[:, :-1].clone())
        attach(model, source="svd", density=0.5, details={})
        model.save_pretrained(tmp_path / "bad")
        told = pifa_deploy("inspect", tmp_path / "bad")
        assert told.code == 6
        assert "model.layers.0.mlp.down_proj.coefficients" in told.err
