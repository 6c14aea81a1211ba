"""Without training: the factors are the best of their kind, the scores are the formula's, and the call cuts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from zq_lib.core.models import tiny
from zq_lib.losparse import LoSparseConfig, attach, reference
from zq_lib.losparse.calibration import calibrate, compress_once, keep_rows, magnitudes, masked, mean_loss, row_scores
from zq_lib.losparse.factors import RIDGE, covariances, cut, factorise, find_factors, matrix
from zq_lib.losparse.layer import LowRankSparse
from zq_lib.losparse.targets import find_layers


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def token_batches(count: int = 2, rows: int = 2, length: int = 12) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 128, (count, rows, length), generator=source())
    return [{"input_ids": x, "labels": x} for x in ids]


@pytest.fixture
def llama():
    return tiny("llama")


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (8, 8)])
def test_plain_factors_are_those_of_the_singular_value_decomposition(shape) -> None:
    weight = torch.randn(*shape, dtype=torch.float64, generator=source())
    u, v = factorise(weight, 3)
    left, right, _ = reference.decompose(weight, 3)
    torch.testing.assert_close(u @ v, left @ right)
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1))  # the scale is shared, as in equation 4
    torch.testing.assert_close(u[:, :2] @ v[:2], (lambda a, b, _: a @ b)(*reference.decompose(weight, 2)))


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_aware_factors_have_the_least_error_of_the_outputs(shape) -> None:
    weight = torch.randn(*shape, dtype=torch.float64, generator=source())
    x = torch.randn(200, shape[1], dtype=torch.float64, generator=source(1)) * torch.logspace(-1, 1, shape[1])
    covariance = x.T @ x
    u, v = factorise(weight, 4, covariance)
    ridged = covariance + RIDGE * covariance.diagonal().mean() * torch.eye(shape[1], dtype=torch.float64)

    def error(product: torch.Tensor) -> float:
        rest = weight - product
        return float((rest @ ridged * rest).sum())

    sigma = torch.linalg.svdvals(weight @ torch.linalg.cholesky(ridged))
    assert error(u @ v) == pytest.approx(float(sigma[4:].square().sum()))  # Eckart and Young's bound
    left, right, _ = reference.decompose(weight, 4)
    assert error(u @ v) < 0.5 * error(left @ right)


def test_a_weight_of_lower_rank_than_asked_for_gives_finite_factors() -> None:
    weight = torch.randn(6, 2, generator=source()) @ torch.randn(2, 10, generator=source(1))
    for given in (weight, weight.T.contiguous(), torch.zeros(4, 5)):
        u, v = factorise(given, 4, torch.eye(given.shape[1]))
        assert torch.isfinite(u).all() and torch.isfinite(v).all()
        torch.testing.assert_close(u @ v, given, atol=1e-4, rtol=1e-4)


def test_rank_zero_gives_empty_factors() -> None:
    u, v = factorise(torch.ones(3, 5), 0)
    assert u.shape == (3, 0) and v.shape == (0, 5)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_inputs_that_say_nothing_are_refused(value) -> None:
    with pytest.raises(ValueError, match="only zeros or values that are not finite"):
        factorise(torch.ones(3, 5), 1, torch.full((5, 5), value))


class Pair(nn.Module):
    """Two layers in a block, one a Conv1D; `attention_mask` marks padding as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 7), "down": Conv1D(5, 7)})])
        self.inputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.block[0]["down"](torch.tanh(self.block[0]["up"](x)))


def test_covariances_sum_over_batches_leave_padding_out_and_respect_the_memory_limit() -> None:
    torch.manual_seed(0)
    model = Pair()
    batches = [{"x": torch.randn(2, 6, 4)}, {"x": torch.randn(3, 5, 4)}]
    batches[1]["attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    layers, _ = find_layers(model)
    tokens = torch.cat([batches[0]["x"].flatten(0, 1), batches[1]["x"][batches[1]["attention_mask"].bool()]])
    inner = torch.tanh(model.block[0]["up"](tokens)).detach()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    for limit, expected in ((1 << 20, 2), (1, 4)):
        passes.clear()
        found = dict(covariances(model, layers, batches, limit))
        assert len(passes) == expected
        torch.testing.assert_close(found["block.0.up"], tokens.T @ tokens)
        torch.testing.assert_close(found["block.0.down"], inner.T @ inner)
    assert not model.block[0]["up"]._forward_pre_hooks


def test_a_layer_that_no_batch_reaches_is_named(llama) -> None:
    idle = len(llama.model.layers)
    llama.model.layers.append(copy.deepcopy(llama.model.layers[0]))  # the model runs only as many as its config says
    with pytest.raises(ValueError, match=f"'model.layers.{idle}.*saw no input"):
        calibrate(llama, token_batches(), LoSparseConfig(init="activation"))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_row_scores_are_the_formulas_and_leave_the_model_as_it_was(arch) -> None:
    model, batches = tiny(arch), token_batches()
    model.lm_head.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    layers, _ = find_layers(model)
    factors = find_factors(model, layers, LoSparseConfig(low_rank=0.2), batches)
    found = row_scores(model, layers, factors, batches)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    with attach(copy.deepcopy(model), LoSparseConfig(low_rank=0.2), factors=factors) as handle:
        expected = {name: torch.zeros(m.out_features) for name, m in handle.layers.items()}
        for batch in batches:
            handle.model.zero_grad()
            handle.model(**batch).loss.backward()
            for name, m in handle.layers.items():
                expected[name] += reference.neuron_scores(reference.importance(m.sparse.detach(), m.sparse.grad)) / 2
    for name in layers:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-7)


def test_a_smaller_ranks_factors_are_the_leading_part(llama) -> None:
    layers, _ = find_layers(llama)
    batches = token_batches()
    for init in ("svd", "activation"):
        large, small = LoSparseConfig(0.5, 0.1, init=init), LoSparseConfig(0.1, 0.1, init=init)
        cut_down = cut(find_factors(llama, layers, large, batches), small)
        for name, (u, v) in find_factors(llama, layers, small, batches).items():
            torch.testing.assert_close(cut_down[name][0] @ cut_down[name][1], u @ v, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "qwen2"])
@pytest.mark.parametrize("init", ["svd", "activation"])
def test_one_call_gives_a_shrunk_model_of_the_ratio_that_computes_what_masking_computes(arch, init) -> None:
    model, batches = tiny(arch), token_batches()
    config = LoSparseConfig(low_rank=0.1, remaining=0.4, init=init, auto_dense=False)
    layers, _ = find_layers(model)
    found = calibrate(model, batches, config)
    weights = {name: matrix(m).clone() for name, m in layers.items()}
    with masked(layers, found.factors, keep_rows(layers, found.scores, 0.4)), torch.no_grad():
        expected = model(**batches[0]).logits
    for name, m in layers.items():
        torch.testing.assert_close(matrix(m), weights[name], rtol=0, atol=0)
    handle = compress_once(model, config, batches)
    assert all(isinstance(handle.module(name), LowRankSparse) for name in layers)
    with torch.no_grad():
        torch.testing.assert_close(model(**batches[0]).logits, expected, rtol=1e-4, atol=1e-4)
    assert handle.report().share == 0.4 and 0.45 < handle.report().ratio < 0.65
    handle.merge()
    with torch.no_grad():
        torch.testing.assert_close(model(**batches[0]).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_baselines_are_settings_of_the_same_call() -> None:
    batches = token_batches()
    for settings, ranks, rows in (
        ({"low_rank": 0.0, "remaining": 0.5}, False, True),
        ({"low_rank": 0.5, "remaining": 0.0}, True, False),
        ({"low_rank": 0.1, "remaining": 0.4, "score": "magnitude"}, True, True),
        ({"low_rank": 0.1, "remaining": 0.4, "score": "random"}, True, True),
    ):
        torch.manual_seed(0)
        handle = compress_once(tiny("llama"), LoSparseConfig(**settings, auto_dense=False), batches)
        layers = handle.report().layers
        assert any(x.rank for x in layers) is ranks and any(x.rows for x in layers) is rows


def test_the_gradient_chooses_better_rows_than_chance_or_their_size(llama) -> None:
    batches = token_batches(4, 4, 16)
    losses = {}
    for score in ("sensitivity", "magnitude", "random"):
        model = copy.deepcopy(llama)
        torch.manual_seed(0)
        compress_once(model, LoSparseConfig(low_rank=0.05, remaining=0.6, score=score), batches)
        losses[score] = abs(mean_loss(model, batches) - mean_loss(llama, batches))
    assert losses["sensitivity"] < min(losses["magnitude"], losses["random"])


def test_magnitudes_are_those_of_the_handle(llama) -> None:
    config = LoSparseConfig(low_rank=0.1, score="magnitude")
    layers, _ = find_layers(llama)
    factors = find_factors(llama, layers, config, [])
    found = magnitudes(layers, factors)
    with attach(llama, config, factors=factors) as handle:
        for name, scores in handle.scores().items():
            torch.testing.assert_close(found[name], scores)


def test_batches_without_a_loss_and_no_batches_at_all_are_refused(llama) -> None:
    config = LoSparseConfig()
    with pytest.raises(ValueError, match="add labels"):
        compress_once(llama, config, [{"input_ids": token_batches()[0]["input_ids"]}])
    with pytest.raises(ValueError, match="batches is empty"):
        compress_once(llama, config)
    assert isinstance(llama.model.layers[0].mlp.up_proj, nn.Linear)
    assert all(p.requires_grad for p in llama.parameters())


def test_a_loss_of_ones_own_and_a_training_model_are_respected(llama) -> None:
    llama.train()
    modes = []

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        modes.append(model.training)
        return model(batch["input_ids"]).logits.square().mean()

    calibrate(llama, token_batches(), LoSparseConfig(), loss=loss)
    assert modes == [False, False] and llama.training
