"""Log-probabilities and the loss from hidden states: equal to the reference, small in memory, not slower."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zq_lib.core.backend import launches
from zq_lib.core.numerics import TOLERANCES, relative_rms
from zq_lib.core.timing import cpu_seconds
from zq_lib.r3m import (
    Head,
    R3MConfig,
    RobustDPOLoss,
    Rule,
    logits_logps,
    logps,
    preference_from_hidden,
    sequence_logps,
)
from zq_lib.r3m import reference as ref


def _case(pairs=3, length=6, width=7, words=11, dtype=torch.float64, seed=0):
    """Hidden states, weight, bias, labels with a ragged fifth masked, and a reference near the policy."""
    torch.manual_seed(seed)
    hidden = torch.randn(2 * pairs, length, width, dtype=dtype, requires_grad=True)
    weight, bias = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((words, width), (words,)))
    labels = torch.randint(words, (2 * pairs, length))
    labels[torch.rand(labels.shape) < 0.3] = -100
    labels[torch.arange(2 * pairs), torch.arange(2 * pairs) % length] = 0
    return hidden, weight, bias, labels, torch.randn(2 * pairs, dtype=dtype) - 5


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None) -> Tensor:
    z = hidden @ weight.T + (0 if bias is None else bias)
    return z if cap is None else cap * torch.tanh(z / cap)


CHUNKS = (2**24, 60, 1)  # all rows at once; several pairs, or parts of one; row by row


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("lam", [1e-3, 0.5, 1.0])
def test_loss_and_all_gradients_are_the_references(chunk: int, cap: float | None, lam: float, monkeypatch) -> None:
    monkeypatch.setattr(logps, "CHUNK", chunk)
    hidden, weight, bias, labels, given = _case()
    policy = ref.sequence_logps(_logits(hidden, weight, bias, cap), labels)
    expected = ref.dpo_loss(policy, given, 0.7, lam)
    grads = torch.autograd.grad(3 * expected, (hidden, weight, bias))
    with launches() as seen:
        terms = preference_from_hidden(
            hidden, Head(weight, bias, cap), labels, given, Rule(lam=lam, beta=0.7), backend="torch"
        )
    assert [(s.kernel, s.path) for s in seen] == [("r3m.preference", "torch")]
    found = torch.autograd.grad(3 * terms.loss, (hidden, weight, bias))
    torch.testing.assert_close(terms.loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(terms.logps, policy.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(terms.margin, ref.implicit_margin(policy, given, 0.7).detach(), rtol=0, atol=1e-12)
    for a, b in zip(found, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("cap", [None, 2.0])
def test_sequence_log_probabilities_have_the_references_gradients(chunk: int, cap: float | None, monkeypatch) -> None:
    monkeypatch.setattr(logps, "CHUNK", chunk)
    hidden, weight, bias, labels, pull = _case()
    expected = ref.sequence_logps(_logits(hidden, weight, bias, cap), labels)
    found = sequence_logps(hidden, Head(weight, bias, cap), labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    theirs = torch.autograd.grad(expected @ pull, (hidden, weight, bias))
    ours = torch.autograd.grad(found @ pull, (hidden, weight, bias), retain_graph=True)
    again = torch.autograd.grad(found @ pull, (hidden, weight, bias))
    for a, b, c in zip(ours, theirs, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert torch.equal(a, c), "a second backward pass finds everything as it was"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_given_logits_have_the_references_gradient(overwrite: bool, chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(logps, "CHUNK", chunk)
    hidden, weight, bias, labels, pull = _case()
    expected = ref.sequence_logps(_logits(hidden, weight, bias, None), labels)
    theirs = torch.autograd.grad(expected @ pull, (hidden, weight, bias))
    with launches() as seen:
        found = logits_logps(_logits(hidden, weight, bias, None), labels, overwrite=overwrite)
    assert [s.kernel for s in seen] == ["r3m.row_logps"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(found @ pull, (hidden, weight, bias)), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_logits_that_someone_else_needs_cannot_be_overwritten_in_silence() -> None:
    hidden, weight, _, labels, _ = _case()
    logits = hidden @ weight.T
    total = logits.square().sum() + logits_logps(logits, labels, overwrite=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_averages_divide_by_the_words_that_count(monkeypatch) -> None:
    monkeypatch.setattr(logps, "CHUNK", 60)
    hidden, weight, _, labels, given = _case()
    policy = ref.sequence_logps(hidden @ weight.T, labels) / (labels != -100).sum(1)
    torch.testing.assert_close(sequence_logps(hidden, Head(weight), labels, average=True), policy)
    torch.testing.assert_close(logits_logps(hidden @ weight.T, labels, average=True), policy)
    expected = ref.dpo_loss(policy, given, 0.7, 0.4)
    terms = preference_from_hidden(hidden, Head(weight), labels, given, Rule(lam=0.4, beta=0.7), average=True)
    torch.testing.assert_close(terms.loss, expected, rtol=0, atol=1e-12)
    grads = (torch.autograd.grad(t, (hidden, weight)) for t in (terms.loss, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "rdpo", "ipo", "hinge", "ropo"])
def test_every_peer_takes_the_same_road(loss: str) -> None:
    hidden, weight, _, labels, given = _case()
    module = RobustDPOLoss(R3MConfig(loss=loss, beta=0.3))
    expected = module(ref.sequence_logps(hidden @ weight.T, labels), given)
    terms = preference_from_hidden(hidden, Head(weight), labels, given, module.rule)
    a, b = (torch.autograd.grad(t, hidden)[0] for t in (terms.loss, expected))
    torch.testing.assert_close(terms.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_is_that_of_the_shared_table(dtype: torch.dtype) -> None:
    hidden, weight, bias, labels, _ = (
        x if x.dtype == torch.int64 else x.detach().to(dtype) for x in _case(4, 9, 40, 203)
    )
    weight = weight * 0.4  # logits deviate by 2.5, as a trained model's; half precision rounds them before the loss
    exact = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    policy = ref.sequence_logps(_logits(*exact, None), labels)
    given = (policy + torch.linspace(-4, 4, 8, dtype=torch.float64)).detach()
    expected = ref.dpo_loss(policy, given, 0.3, 0.4)
    theirs = torch.autograd.grad(expected, exact)
    tensors = [x.requires_grad_() for x in (hidden, weight, bias)]
    terms = preference_from_hidden(hidden, Head(weight, bias), labels, given.float(), Rule(lam=0.4, beta=0.3))
    ours = torch.autograd.grad(terms.loss, tensors)
    row = TOLERANCES[{torch.float32: "reference_fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]]
    assert terms.loss.dtype == torch.float32 and relative_rms(terms.logps, policy) <= row.output
    for a, b, x in zip(ours, theirs, tensors, strict=True):
        assert a.dtype == x.dtype and relative_rms(a, b) <= row.gradient


def test_a_shift_of_all_logits_of_a_row_changes_nothing_and_rare_words_stay_finite() -> None:
    logits = torch.randn(2, 3, 50)
    labels = torch.randint(50, (2, 3))
    shift = torch.tensor([1e4, -1e4]).view(2, 1, 1)
    torch.testing.assert_close(logits_logps(logits + shift, labels), logits_logps(logits, labels), rtol=0, atol=1e-2)
    hidden, weight = torch.eye(2)[None].repeat(2, 1, 1), torch.tensor([[300.0, 0.0], [0.0, 300.0], [-300.0, -300.0]])
    terms = preference_from_hidden(
        hidden.requires_grad_(), Head(weight), torch.full((2, 2), 2), torch.zeros(2), Rule(lam=0.3, beta=0.1)
    )
    terms.loss.backward()
    torch.testing.assert_close(terms.logps, torch.full((2,), -1200.0))
    assert bool(hidden.grad.isfinite().all())


@pytest.mark.parametrize(("pairs", "length", "words"), [(1, 1, 1), (1, 1, 2), (5, 1, 13), (1, 17, 3)])
def test_odd_sizes(pairs: int, length: int, words: int) -> None:
    hidden, weight, _, _, given = _case(pairs, length, 4, words)
    labels = torch.randint(words, (2 * pairs, length))
    expected = ref.dpo_loss(ref.sequence_logps(hidden @ weight.T, labels), given, 0.5, 0.4)
    terms = preference_from_hidden(hidden, Head(weight), labels, given, Rule(lam=0.4, beta=0.5))
    torch.testing.assert_close(terms.loss, expected)
    grads = torch.autograd.grad(terms.loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_states_that_are_not_next_to_each_other_are_read_and_nothing_is_changed() -> None:
    hidden, weight, bias, labels, given = _case()
    wide = torch.stack([hidden.detach(), hidden.detach()], 2)[:, :, 0]
    copies = [x.detach().clone() for x in (wide, weight, bias, labels, given)]
    assert not wide.is_contiguous()
    a, b = (
        preference_from_hidden(h, Head(weight, bias), labels, given, Rule(lam=0.4, beta=0.7)).loss
        for h in (wide.requires_grad_(), hidden)
    )
    (a + b).backward()
    assert torch.equal(a, b)
    torch.testing.assert_close(wide.grad, hidden.grad)
    assert all(torch.equal(x, y) for x, y in zip((wide, weight, bias, labels, given), copies, strict=True))


def test_without_gradients_none_is_formed_and_the_loss_is_the_same() -> None:
    hidden, weight, _, labels, given = _case(4, 30, 8, 500, torch.float32)
    rule = Rule(lam=0.4, beta=0.7)
    with torch.no_grad():
        terms = preference_from_hidden(hidden, Head(weight), labels, given, rule)
    with_gradient = preference_from_hidden(hidden, Head(weight), labels, given, rule)
    assert not terms.loss.requires_grad and not with_gradient.margin.requires_grad
    torch.testing.assert_close(terms.loss, with_gradient.loss.detach())
    with_gradient.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradient was used already"):
        with_gradient.loss.backward()


def test_memory_does_not_grow_with_the_vocabulary(peak, monkeypatch) -> None:
    """A frozen head: only the chunk is left. A trained one: its gradient, and that of a pair larger than the chunk."""
    monkeypatch.setattr(logps, "CHUNK", 2**16)
    found = {}
    for words in (1000, 8000):
        for trained in (False, True):
            hidden, weight, _, labels, given = _case(4, 60, 16, words, torch.float32)
            weight = weight.detach().requires_grad_(trained)
            call = lambda h=hidden, w=weight, y=labels, g=given: preference_from_hidden(  # noqa: E731
                h, Head(w), y, g, Rule(lam=0.4, beta=0.1)
            ).loss.backward()
            found[words, trained] = peak(call), weight.nbytes
    assert found[8000, False][0] <= 1.1 * found[1000, False][0]
    assert found[8000, False][0] <= 4 * 4 * 2**16
    for words in (1000, 8000):
        assert found[words, True][0] - found[words, False][0] <= 2.1 * found[words, True][1]
    hidden, weight, _, labels, _ = _case(4, 60, 16, 8000, torch.float32)
    two_pass = peak(lambda: sequence_logps(hidden, Head(weight.detach()), labels).sum().backward())
    assert two_pass <= 4 * 4 * 2**16
    composed = peak(lambda: ref.sequence_logps(hidden @ weight.T, labels).sum().backward())
    assert composed >= 3 * 4 * 480 * 8000, "the measure sees what the composed path needs"


@pytest.mark.parametrize("trained", [False, True])
def test_it_takes_at_most_a_tenth_more_time_than_the_composed_path(trained: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 140, 256, requires_grad=True)
    weight = (torch.randn(32_768, 256) * 0.02).requires_grad_(trained)
    labels, given = torch.randint(32_768, (4, 140)), torch.full((4,), -1600.0)

    def composed() -> None:
        logps_ = (hidden @ weight.T).log_softmax(-1).gather(-1, labels[..., None])[..., 0].sum(1)
        chosen, rejected = (logps_ - given).chunk(2)
        (-F.logsigmoid(0.1 * (chosen - rejected)).mean()).backward()

    def ours() -> None:
        preference_from_hidden(hidden, Head(weight), labels, given, Rule(lam=0.4, beta=0.1)).loss.backward()

    times = [(cpu_seconds(ours), cpu_seconds(composed)) for _ in range(3)]
    assert min(a for a, _ in times) <= 1.1 * min(b for _, b in times)


def test_bad_input_is_one_clear_sentence() -> None:
    hidden, weight, _, labels, given = _case()
    rule = Rule(lam=0.4, beta=0.1)
    empty = labels.clone()
    empty[4] = -100
    for call in (
        lambda y: sequence_logps(hidden, Head(weight), y),
        lambda y: logits_logps(hidden @ weight.T, y),
        lambda y: preference_from_hidden(hidden, Head(weight), y, given, rule),
    ):
        with pytest.raises(ValueError, match="sequence 4 has no completion tokens: all its labels are -100"):
            call(empty)
        with pytest.raises(ValueError, match="labels reach from 0 to 11 but there are 11 words; shift them first"):
            call(labels.masked_fill(labels == 0, 11).index_fill(0, torch.tensor([0]), 0))
        with pytest.raises(ValueError, match=r"labels have shape \(6, 5\) and the states \(6, 6,"):
            call(labels[:, :5])
    with pytest.raises(ValueError, match=r"the head's weight has shape \(11, 7\) and the states width 6"):
        sequence_logps(hidden[..., :6], Head(weight), labels)
    with pytest.raises(ValueError, match=r"there are 5 sequences and a reference of shape \(5,\); give \[2B\] of both"):
        preference_from_hidden(hidden[:5], Head(weight), labels[:5].clamp(min=0), given[:5], rule)
