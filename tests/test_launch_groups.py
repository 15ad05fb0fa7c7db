"""Layers that read the same tensor run together; the reference operator stands in for the kernels."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from decoder_fixtures import dense_decoder, factorised_decoder, mixed
from kernel_fixtures import host_kernels
from torch import nn

from pifa_deploy import cuda_kernels
from pifa_deploy.cuda_kernels import Kernels, PivotLayer
from pifa_deploy.errors import PifaDeployError
from pifa_deploy.launch_groups import group_launches
from pifa_deploy.linear import PifaLinear, pifa_linear
from pifa_deploy.plugin_library import find_library


class Recorder:
    """Applies layers with the reference operator, and remembers how many came at once."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def __call__(self, layers: Sequence[PivotLayer], x: torch.Tensor) -> list[torch.Tensor]:
        self.counts.append(len(layers))
        return [pifa_linear(x, each.pivot_weight, each.coefficients, each.index, each.bias) for each in layers]


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    model, _ = factorised_decoder(dense_decoder(), mixed)
    return model


def expected_paths(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    attention = ("q_proj", "k_proj", "v_proj")
    return tuple(
        group
        for number in range(model.config.num_hidden_layers)
        for prefix in [f"model.layers.{number}"]
        for group in (
            tuple(f"{prefix}.self_attn.{name}" for name in attention),
            (f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"),
        )
    )


def test_a_decoder_launches_qkv_and_gate_up_together_and_answers_the_same(decoder: nn.Module) -> None:
    ids = torch.arange(7)[None]
    with torch.no_grad():
        expected, tokens = decoder(ids).logits, decoder.generate(ids, max_new_tokens=5, do_sample=False)
    recorder = Recorder()
    groups = group_launches(decoder, recorder)
    try:
        assert groups.paths == expected_paths(decoder)
        assert recorder.counts == []
        with torch.no_grad():
            assert torch.equal(decoder(ids).logits, expected)
            assert recorder.counts == [3, 2] * decoder.config.num_hidden_layers
            assert torch.equal(decoder.generate(ids, max_new_tokens=5, do_sample=False), tokens)
        with torch.inference_mode():
            assert torch.equal(decoder(ids).logits, expected)
        assert set(recorder.counts) == {2, 3}
    finally:
        groups.remove()
    recorder.counts.clear()
    with torch.no_grad():
        assert torch.equal(decoder(ids).logits, expected)
    assert recorder.counts == []


def test_a_prompt_and_a_token_go_through_the_host_twins_of_the_kernels(
    decoder: nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kernels = host_kernels(tmp_path_factory.getbasetemp())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = decoder(ids).logits
        groups = group_launches(decoder, partial(cuda_kernels.apply_group, kernels))
        try:
            cache = decoder(ids[:, :-1], use_cache=True)
            last = decoder(ids[:, -1:], past_key_values=cache.past_key_values).logits
        finally:
            groups.remove()
    torch.testing.assert_close(cache.logits, expected[:, :-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, expected[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_on_a_gpu_shared_launches_answer_as_the_layers_alone(decoder: nn.Module) -> None:
    try:
        kernels = Kernels(find_library())
    except PifaDeployError as error:
        pytest.skip(str(error))
    model, counts = copy.deepcopy(decoder).to("cuda"), []

    def apply(layers: Sequence[PivotLayer], x: torch.Tensor) -> list[torch.Tensor]:
        counts.append(len(layers))
        return cuda_kernels.apply_group(kernels, layers, x)

    ids = torch.arange(20, device="cuda")[None]
    with torch.no_grad():
        expected = model(ids).logits  # plain operators: no kernels are enabled
        assert group_launches(model, apply).paths == expected_paths(model)
        cache = model(ids[:, :-1], use_cache=True)
        last = model(ids[:, -1:], past_key_values=cache.past_key_values).logits
    assert counts == [3, 2] * model.config.num_hidden_layers * 2
    torch.testing.assert_close(cache.logits, expected[:, :-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, expected[:, -1:], rtol=1e-4, atol=1e-4)


def test_gradients_go_through_the_layers_themselves(decoder: nn.Module) -> None:
    recorder = Recorder()
    groups = group_launches(decoder, recorder)
    try:
        decoder(torch.arange(4)[None]).logits.sum().backward()
    finally:
        groups.remove()
    assert recorder.counts == []
    assert all(each.grad is not None for each in decoder.model.layers[0].mlp.gate_proj.parameters())
    decoder.zero_grad()


class Siblings(nn.Module):
    """Three layers of one x, which `between` may change between the calls."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("a", "b", "c"):
            layer = PifaLinear(16, 12, 4)
            nn.init.normal_(layer.pivot_weight)
            nn.init.normal_(layer.coefficients)
            layer.pivot_rows.copy_(torch.arange(4))
            layer.derive_output_index()
            self.add_module(name, layer.requires_grad_(False))
        self.between = lambda x: x
        self.skips: set[str] = set()

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        results = []
        for name in ("a", "b", "c"):
            if name not in self.skips:
                results.append(self.get_submodule(name)(x))
            x = self.between(x)
        return results


@pytest.fixture
def siblings() -> Siblings:
    torch.manual_seed(0)
    return Siblings()


def test_another_tensor_or_one_changed_in_place_is_not_taken_for_the_same(siblings: Siblings) -> None:
    recorder, x = Recorder(), torch.randn(2, 16)
    alone = copy.deepcopy(siblings)
    group_launches(siblings, recorder, example={"x": x})
    for between in (lambda t: t.clone().mul_(2), lambda t: t.mul_(2)):
        siblings.between = alone.between = between
        found, expected = siblings(x.clone()), alone(x.clone())
        assert all(torch.equal(y, exact) for y, exact in zip(found, expected, strict=True))


def test_what_an_interrupted_pass_left_is_not_used(siblings: Siblings) -> None:
    recorder, x = Recorder(), torch.randn(2, 16)
    group_launches(siblings, recorder, example={"x": x})
    with torch.inference_mode():  # there are no versions here
        x = x.clone()
        siblings.skips = {"c"}
        siblings(x)
        x.mul_(3)
        siblings.skips = set()
        found = siblings(x)
    expected = [PifaLinear.forward(siblings.get_submodule(name), x.clone()) for name in ("a", "b", "c")]
    assert all(torch.equal(y, exact) for y, exact in zip(found, expected, strict=True))


def test_layers_whose_inputs_differ_or_that_are_called_twice_are_in_no_group(siblings: Siblings) -> None:
    x = torch.randn(2, 16)
    siblings.between = torch.clone
    assert group_launches(siblings, Recorder(), example={"x": x}).paths == ()
    siblings.between = lambda t: t
    siblings.c = siblings.a  # the same module under two names
    assert group_launches(siblings, Recorder(), example={"x": x}).paths == ()


def test_what_the_kernels_do_not_take_runs_alone(siblings: Siblings) -> None:
    recorder, x = Recorder(), torch.randn(2, 16)
    group_launches(siblings.double(), recorder, example={"x": x.double()})
    assert len(siblings(x.double())) == 3
    assert recorder.counts == []
    siblings.float()(x)
    assert recorder.counts == [3]


def test_threads_and_copies_do_not_take_each_others_shares(siblings: Siblings) -> None:
    recorder = Recorder()
    group_launches(siblings, recorder, example={"x": torch.randn(2, 16)})
    twin = copy.deepcopy(siblings)
    with torch.no_grad():
        twin.a.pivot_weight.zero_()
    assert bool(siblings(torch.ones(1, 16))[0].any())
    assert not bool(twin(torch.ones(1, 16))[0].any())
    wrong = []

    def repeat(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(50):
            x = torch.randn(3, 16, generator=generator)
            exact = [PifaLinear.forward(siblings.get_submodule(name), x) for name in ("a", "b", "c")]
            wrong.extend(not torch.equal(y, each) for y, each in zip(siblings(x), exact, strict=True))

    threads = [threading.Thread(target=repeat, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 600
    assert not any(wrong)


def test_an_export_sees_the_layers_themselves(siblings: Siblings) -> None:
    recorder, x = Recorder(), torch.randn(2, 16)
    group_launches(siblings, recorder, example={"x": x})
    program = torch.export.export(siblings, (x,), strict=False)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("pifa.linear" in target for target in targets) == 3
    assert recorder.counts == []


def test_groups_of_groups_are_refused(siblings: Siblings) -> None:
    example = {"x": torch.randn(2, 16)}
    groups = group_launches(siblings, Recorder(), example=example)
    with pytest.raises(ValueError, match=r"a shares launches already; call remove\(\)"):
        group_launches(siblings, Recorder(), example=example)
    groups.remove()
    assert group_launches(siblings, Recorder(), example=example).paths == (("a", "b", "c"),)
