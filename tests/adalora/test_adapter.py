"""The four kinds of layer: updates, merging, gradients, and which layers a pattern means."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from zq_lib.adalora import attach, reference
from zq_lib.adalora.targets import find_targets, matches
from zq_lib.core import models

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), lambda s: torch.randn(3, 4, 6, generator=s)),
    "no bias": (lambda: nn.Linear(6, 5, bias=False), lambda s: torch.randn(4, 6, generator=s)),
    "conv1d": (lambda: Conv1D(5, 6), lambda s: torch.randn(2, 3, 6, generator=s)),
    "embedding": (lambda: nn.Embedding(9, 5), lambda s: torch.randint(9, (2, 7), generator=s)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=2, padding=1), lambda s: torch.randn(2, 3, 8, 7, generator=s)),
    "conv2d reflect": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        lambda s: torch.randn(2, 3, 8, 7, generator=s),
    ),
}


def _attached(kind: str, rank: int = 3, **settings):
    make, data = LAYERS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    handle = attach(model, targets="0", init_rank=rank, target_rank=1, total_steps=20, **settings)
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_()
    return model, handle, data(torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_changes_before_training_bit_for_bit(kind: str) -> None:
    make, data = LAYERS[kind]
    torch.manual_seed(0)
    model, x = nn.Sequential(make()), data(torch.Generator().manual_seed(1))
    before = model(x)
    with attach(model, targets="0", total_steps=20):
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_update_equals_the_layer_with_the_changed_weight(kind: str) -> None:
    model, handle, x = _attached(kind)
    with torch.no_grad():
        apart = model(x)
        handle.merge()
        merged = model(x)
        assert (apart - merged).abs().max() <= 2e-6 * apart.abs().max()
        handle.unmerge()
        assert torch.equal(model(x), apart)


@pytest.mark.parametrize("kind", LAYERS)
def test_detaching_gives_the_same_layer_object_with_the_same_weights(kind: str) -> None:
    make, _ = LAYERS[kind]
    model = nn.Sequential(make())
    layer, before = model[0], copy.deepcopy(model.state_dict())
    handle = attach(model, targets="0", total_steps=20)
    handle.merge()
    handle.detach()
    handle.detach()
    assert model[0] is layer and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and list(model.state_dict()) == list(before)


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_passes_gradcheck_in_double_precision(kind: str) -> None:
    make, data = LAYERS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make()).double()
    handle = attach(model, targets="0", init_rank=2, target_rank=1, total_steps=20)
    (adapter,) = handle.adapters
    x = data(torch.Generator().manual_seed(1))
    x = x.double().requires_grad_() if x.is_floating_point() else x
    inputs = [torch.randn_like(p).requires_grad_() for p in (adapter.left, adapter.values, adapter.right)]

    def run(left, values, right):
        names = [f"0.adapters.default.{part}" for part in ("left", "values", "right")]
        return torch.func.functional_call(model, dict(zip(names, (left, values, right), strict=True)), (x,))

    assert torch.autograd.gradcheck(run, inputs)


def test_a_linear_layer_agrees_with_the_reference_outputs_and_gradients() -> None:
    model, handle, x = _attached("linear")
    (adapter,), base = handle.adapters, model[0].base
    x.requires_grad_()
    out = model(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad(out, (x, adapter.left, adapter.values, adapter.right), grad)
    double = [t.detach().double() for t in (base.weight, adapter.left, adapter.values, adapter.right)]
    theirs = reference.adapted_linear_gradients(
        grad.flatten(0, 1).double(), x.detach().flatten(0, 1).double(), *double, adapter.scale
    )
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), right.view(mine.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_type_and_their_adapters_stay_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16)).to(dtype)
    handle = attach(model, targets="0", init_rank=4, target_rank=2, total_steps=20)
    with torch.no_grad():
        handle.adapters[0].values.fill_(1.0)
    x = torch.randn(3, 16).to(dtype)
    out = model(x)
    out.sum().backward()
    adapter = handle.adapters[0]
    assert out.dtype == dtype and adapter.left.dtype == adapter.left.grad.dtype == torch.float32
    want = reference.adapted_linear(
        x.double(), model[0].base.weight.double(), model[0].base.bias.double(),
        adapter.left.double(), adapter.values.double(), adapter.right.double(), adapter.scale,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), want, rtol=3e-2, atol=3e-2)


def test_two_adapters_add_up_and_each_can_be_switched_off_or_detached() -> None:
    model, first, x = _attached("linear")
    one = model(x)
    second = attach(model, targets="0", name="other", init_rank=2, target_rank=1, total_steps=20)
    assert torch.equal(model(x), one) and not first.adapters[0].left.requires_grad
    with torch.no_grad():
        second.adapters[0].values.fill_(1.0)
    both = model(x)
    with first.disabled():
        alone = model(x)
    with second.disabled():
        assert torch.equal(model(x), one)
    torch.testing.assert_close(both - model[0].base(x), (one - model[0].base(x)) + (alone - model[0].base(x)))
    second.detach()
    assert torch.equal(model(x), one) and first.adapters[0].left.requires_grad
    with pytest.raises(ValueError, match="name='default' is attached to this model already"):
        attach(model, targets="0", total_steps=20)


def test_a_layer_used_in_two_places_gets_one_adapter_and_comes_back_to_both() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    handle = attach(model, targets=("0",), total_steps=20)
    assert len(handle.adapters) == 1 and model[0] is model[2] is not layer
    handle.merge()
    handle.detach()
    assert model[0] is layer and model[2] is layer


def test_merging_a_weight_that_another_layer_shares_is_refused() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    handle = attach(model, targets="embed", total_steps=20)
    with pytest.raises(ValueError, match="'embed' shares its weight with 'head'"):
        handle.merge()


def test_an_adapted_layer_answers_for_the_attributes_of_the_original() -> None:
    model, _, _ = _attached("linear")
    assert model[0].in_features == 6 and model[0].weight is model[0].base.weight
    with pytest.raises(AttributeError, match="nonsense"):
        _ = model[0].nonsense


def test_a_copy_of_the_model_is_independent() -> None:
    model, handle, x = _attached("linear")
    twin = copy.deepcopy(model)
    before = twin(x)
    with torch.no_grad():
        handle.adapters[0].values.zero_()
    assert torch.equal(twin(x), before) and not torch.equal(model(x), before)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "opt", "gpt_neox", "gemma"])
def test_all_linear_means_the_blocks_of_every_architecture_and_neither_head_nor_embedding(arch: str) -> None:
    model = models.tiny(arch)
    found = find_targets(model, "all-linear")
    assert len(found) >= 2 * 4 and not any("head" in n or "embed" in n or "wte" in n for n in found)


def test_patterns_match_names_from_the_end_at_a_dot() -> None:
    assert matches("a.0.query", "query") and matches("a.0.query", "0.query") and matches("a.0.query", "a.*.query")
    assert not matches("a.0.query", "uery")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("qurey", "targets has 'qurey', which matches no module of this Toy; there are for example"),
        ("blocks", "'blocks' is a ModuleList, and only Linear, Conv1D, Embedding, Conv2d can be adapted"),
        (("up", "nothing"), "targets has 'nothing'"),
    ],
)
def test_targets_that_mean_nothing_are_refused_and_the_model_stays_as_it_was(toy, targets, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        attach(toy, targets=targets, total_steps=20)
    assert message in str(caught.value)
    assert all(p.requires_grad for p in toy.parameters()) and "adapters" not in str(list(toy.state_dict()))


def test_a_model_without_blocks_is_told_to_name_its_layers() -> None:
    with pytest.raises(ValueError, match="targets='all-linear' matches nothing"):
        attach(nn.ModuleDict({"fc": nn.Linear(3, 3)}), total_steps=20)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "Conv2d with 2 groups"),
        (nn.Embedding(4, 4, max_norm=1.0), "Embedding with max_norm"),
        (nn.LayerNorm(4), "is a LayerNorm"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused_with_the_reason(layer: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(nn.Sequential(layer), targets="0", total_steps=20)


def test_bounds_for_layers_that_do_not_exist_are_refused(toy) -> None:
    with pytest.raises(ValueError, match="min_rank has 'query', which matches none of the 6 adapted layers"):
        attach(toy, min_rank={"query": 1}, total_steps=20)
    with pytest.raises(ValueError, match="needs 24 ranks, but the final budget is 12"):
        attach(toy, init_rank=4, target_rank=2, min_rank=4, total_steps=20)
    assert "adapters" not in str(list(toy.state_dict())) and all(p.requires_grad for p in toy.parameters())
