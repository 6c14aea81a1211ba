"""The notebook's exercises: checkers, solutions, and the wrong answers that each must recognise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zq_lib.core.exercises import Exercise
from zq_lib.ted import reference
from zq_lib.ted.config import TedConfig


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# 1. What filters cost -------------------------------------------------------------------------------------------------
_SIZES = ((384, 768, 768, 12), (96, 384, 16, 3), (4, 6, 2, 1))  # student's and teacher's width, d_f, pairs


def _solve_parameters(student: int, teacher: int, dim: int, pairs: int) -> tuple[int, int]:
    return pairs * dim * (student + 1 + teacher + 1), 0


def _check_parameters(answer: Callable[[int, int, int, int], tuple[int, int]]) -> str | None:
    for student, teacher, dim, pairs in _SIZES:
        got, want = answer(student, teacher, dim, pairs), _solve_parameters(student, teacher, dim, pairs)
        if not isinstance(got, tuple) or len(got) != 2:
            return "Return two numbers: parameters while training, and how many the delivered student carries."
        what = f"{pairs} pairs, {student} and {teacher} to {dim}"
        trained, delivered = got
        if trained == want[0] and not delivered:
            continue
        if trained == want[0]:
            return f"For {what} the count is right, but filters are dropped after training: the student carries none."
        if trained == want[0] - 2 * pairs * dim:
            return f"For {what} the {2 * pairs * dim} biases are missing, one for each output of every filter."
        if trained == want[0] // pairs and pairs > 1:
            return f"For {what} that is one pair: every matched layer has filters of its own."
        if trained == pairs * dim * (student + 1):
            return f"For {what} only the student's filters were counted: the teacher has as many."
        return f"For {what}, {want[0]} parameters train: a filter is a matrix [d_f, d] and a bias [d_f]."
    return None


PARAMETERS = Exercise(
    name="parameters",
    title="Exercise 1",
    prompt="How many parameters have all linear filters of student and teacher for K pairs, and how many of them does "
    "the delivered student carry?",
    check=_check_parameters,
    solution=_solve_parameters,
    wrong=[
        (lambda s, t, d, k: (k * d * (s + t), 0), "biases are missing"),
        (lambda s, t, d, k: (k * d * (s + t + 2), k * d * (s + 1)), "the student carries none"),
        (lambda s, t, d, k: (d * (s + t + 2), 0), "filters of its own"),
        (lambda s, t, d, k: (k * d * (s + 1), 0), "the teacher has as many"),
        (lambda s, t, d, k: (k * (s + 1) * (t + 1), 0), "a matrix [d_f, d] and a bias"),
        (lambda s, t, d, k: k * d * (s + t + 2), "Return two numbers"),
    ],
    hint="One filter has d_f rows of d weights and one bias.",
)


# 2. How wide a filter ------------------------------------------------------------------------------------------------
Probes = Sequence[tuple[int, float, float]]  # (d_f, accuracy on what the task needs, accuracy on what it does not)
_CURVES: tuple[Probes, ...] = (
    ((4, 0.90, 0.25), (8, 0.99, 0.45), (16, 0.99, 0.80), (64, 1.00, 1.00)),
    ((64, 1.00, 1.00), (16, 0.98, 0.60), (8, 0.93, 0.20), (4, 0.60, 0.15)),
    ((8, 0.70, 0.10), (16, 0.85, 0.20), (32, 0.96, 0.30)),
)


def _solve_width(rows: Probes, least: float) -> int | None:
    good = [dim for dim, needed, _ in rows if needed >= least]
    return min(good) if good else None


def _check_width(answer: Callable[[Probes, float], int | None]) -> str | None:
    for curve in _CURVES:
        for least in (0.97, 0.95, 0.999):
            got, want = answer(curve, least), _solve_width(curve, least)
            if got == want:
                continue
            known = {dim: (needed, other) for dim, needed, other in curve}
            if want is None:
                return f"No width reaches {least} in {list(curve)}: return None, and train longer or wider."
            if got not in known:
                return f"{got} is not among the widths that were measured: {sorted(known)}."
            if known[got][0] < least:
                return (
                    f"Width {got} forgets too much of the task: {known[got][0]:.2f} is below {least}. Forgetting what "
                    "is not needed is only good while the rest stays."
                )
            return (
                f"Width {got} knows the task, but so does {want}, which keeps {known[want][1]:.2f} of what nobody "
                f"needs, not {known[got][1]:.2f}."
            )
    return None


WIDTH = Exercise(
    name="width",
    title="Exercise 2",
    prompt="Choose d_f from a probe curve: the narrowest filter behind which a probe still reads the task with an "
    "accuracy of `least`.",
    check=_check_width,
    solution=_solve_width,
    wrong=[
        (lambda rows, least: max(dim for dim, *_ in rows), "which keeps"),
        (lambda rows, least: min(rows, key=lambda r: r[2])[0], "forgets too much"),
        (lambda rows, least: min((d for d, needed, _ in rows if needed >= least), default=max(rows)[0]), "return None"),
        (lambda rows, least: 0, "is not among the widths"),
    ],
    hint="Which widths reach `least` at all? Of these, which one is the smallest?",
)


# 3. Three methods in one loss -----------------------------------------------------------------------------------------
_METHODS = ("fine-tuning", "KD", "LWD")
_WIDTH = 5


def _solve_limits(method: str, width: int) -> tuple[TedConfig, Tensor]:
    kd, layer = {"fine-tuning": (0.0, 0.0), "KD": (1.0, 0.0), "LWD": (1.0, 1.0)}[method]
    return TedConfig(kd_weight=kd, layer_weight=layer, scale="none"), torch.eye(width, dtype=torch.float64)


def _check_limits(answer: Callable[[str, int], tuple[TedConfig, Tensor]]) -> str | None:
    task = torch.tensor(0.7, dtype=torch.float64)
    states = _normal(6, _WIDTH), _normal(6, _WIDTH, seed=1)
    kl = reference.divergence(_normal(6, 4, seed=2), _normal(6, 4, seed=3), 2.0)
    for method in _METHODS:
        got = answer(method, _WIDTH)
        if not isinstance(got, tuple) or len(got) != 2 or not isinstance(got[0], TedConfig):
            return "Return a TedConfig and the teacher's filter, a matrix [width, width]."
        config, matrix = got[0], torch.as_tensor(got[1], dtype=torch.float64)
        if matrix.shape != (_WIDTH, _WIDTH):
            return f"The teacher's filter maps {_WIDTH} numbers to {_WIDTH}; yours has shape {tuple(matrix.shape)}."
        kd, layer = config.kd_weight, config.layer_weight
        if not config.task_weight:
            return f"{method} still learns from the labels: leave task_weight at 1."
        if method == "fine-tuning" and (kd or layer):
            return f"Fine-tuning has no teacher, but your weights are {kd:g} and {layer:g}: both must be 0."
        if method == "KD" and layer:
            return f"KD matches the output alone, but layer_weight is {layer:g}."
        if method == "KD" and not kd:
            return "KD without kd_weight is fine-tuning: the output must count."
        if method == "LWD" and not layer:
            return "LWD copies hidden states: layer_weight must be above 0."
        if method == "LWD" and config.scale != "none":
            return "LWD takes the error as it is, but scale='variance' divides it: set scale='none'."
        error = (states[0] - states[1] @ matrix.T).square().mean()
        found = reference.stage_two(config.task_weight * task, kl, [error], kd, layer)
        raw = (states[0] - states[1]).square().mean()
        wanted = reference.stage_two(config.task_weight * task, kl, [raw], kd, layer)
        if not torch.allclose(found, wanted):
            return (
                f"{method} gives {float(found):.3f} where the plain formula gives {float(wanted):.3f}: it matches the "
                "teacher's states as they are, so that filter is the identity."
            )
    return None


def _variance(method: str, width: int) -> tuple[TedConfig, Tensor]:
    config, matrix = _solve_limits(method, width)
    return TedConfig(kd_weight=config.kd_weight, layer_weight=config.layer_weight), matrix


def _with(method: str, width: int, **changed: float) -> tuple[TedConfig, Tensor]:
    config, matrix = _solve_limits(method, width)
    weights = dict(kd_weight=config.kd_weight, layer_weight=config.layer_weight) | changed
    return TedConfig(**weights, scale="none"), matrix


LIMITS = Exercise(
    name="limits",
    title="Exercise 3",
    prompt="Turn TED into fine-tuning, KD and LWD by settings alone: for each name a TedConfig, and the matrix that "
    "stands for the teacher's filter.",
    check=_check_limits,
    solution=_solve_limits,
    wrong=[
        (lambda method, width: _with(method, width, kd_weight=1.0), "Fine-tuning has no teacher"),
        (lambda method, width: _with(method, width, layer_weight=float(method != "fine-tuning")), "the output alone"),
        (lambda method, width: _with(method, width, kd_weight=0.0), "the output must count"),
        (lambda method, width: _with(method, width, layer_weight=0.0), "copies hidden states"),
        (_variance, "divides it"),
        (lambda method, width: (_solve_limits(method, width)[0], _normal(width, width)), "that filter is the identity"),
        (lambda method, width: (_solve_limits(method, width)[0], torch.eye(width + 1)), "yours has shape"),
        (lambda method, width: _solve_limits(method, width)[0], "Return a TedConfig and"),
    ],
    hint="Which of kd_weight and layer_weight is 0 for which method? And what would a filter do that filters nothing?",
)


# 4. Padding counts nowhere --------------------------------------------------------------------------------------------
def _mean_over_all(own: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    return (own - theirs).square().mean()


def _zeros_but_counted(own: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    return ((own - theirs) * mask[..., None]).square().mean()


def _rows_first(own: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    errors = (own - theirs).square().mean(-1)
    return ((errors * mask).sum(1) / mask.sum(1)).mean()


def _masked(own: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    return (own - theirs)[mask.bool()].square().mean()


# Shown in the notebook; only one gives every real token, and nothing else, the same weight.
SNIPPETS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "a": _mean_over_all,
    "b": _zeros_but_counted,
    "c": _rows_first,
    "d": _masked,
}


def _check_padding(answer: str) -> str | None:
    if answer not in SNIPPETS:
        return f"Answer with one letter of {', '.join(SNIPPETS)}."
    loss = SNIPPETS[answer]
    own, theirs, mask = _normal(2, 4, 3), _normal(2, 4, 3, seed=1), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    before = float(loss(own, theirs, mask))
    noise = torch.where(mask[..., None] == 1, own, 10 * own)
    if not math.isclose(float(loss(noise, theirs, mask)), before):
        return f"({answer}) reads padding: change what lies there, and the loss moves."
    longer = [F.pad(x, (0, 0, 0, 4)) for x in (own, theirs)]
    after = float(loss(*longer, F.pad(mask, (0, 4))))
    if not math.isclose(after, before):
        return f"({answer}) divides by padding: with four more empty positions {before:.3f} becomes {after:.3f}."
    if not math.isclose(before, float(reference.layer_error(own, theirs, mask))):
        return (
            f"({answer}) ignores padding but is a mean of sentence means: a token of a short one weighs twice as much."
        )
    return None


PADDING = Exercise(
    name="padding",
    title="Exercise 4",
    prompt="Four ways to write the distance of filtered states. Which one is the mean over all real tokens, whatever "
    "the padding?",
    check=_check_padding,
    solution="d",
    wrong=[
        ("a", "reads padding"),
        ("b", "divides by padding"),
        ("c", "a mean of sentence means"),
        ("e", "Answer with one letter"),
    ],
    hint="Change what lies in the padding, then make it longer: the loss must not move.",
)


# 5. One output --------------------------------------------------------------------------------------------------------
def _solve_output(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    if student.shape[-1] == 1:
        return (student - teacher).square().mean()
    return reference.divergence(student, teacher, temperature)


def _check_output(answer: Callable[[Tensor, Tensor, float], Tensor]) -> str | None:
    for classes in (1, 5):
        s, t = _normal(6, classes).requires_grad_(), _normal(6, classes, seed=1)
        got, want = answer(s, t, 2.0), _solve_output(s, t, 2.0)
        if not isinstance(got, Tensor) or got.dim():
            return "Return one number, the mean over the rows."
        if torch.allclose(got, want):
            continue
        found = f"it is {want.item():.4f}, not {got.item():.4f}"
        if classes == 1:
            (slope,) = torch.autograd.grad(got, s, allow_unused=True) if got.requires_grad else (None,)
            if slope is None or not slope.any():
                return (
                    "For one output that is 0 with no gradient, whatever the models say: the softmax of one number is "
                    "1. Compare the predictions themselves."
                )
            return f"For one output, where the mean squared difference is asked for, {found}."
        if torch.allclose(4 * got, want):
            return "The square of the temperature is missing: without it the gradient shrinks with T."
        if torch.allclose(classes * got, want):
            return "That is a mean over classes too: sum over the vocabulary, then take the mean over rows."
        if torch.allclose(got, reference.reverse_divergence(s, t, 2.0)):
            return "That is KL(student || teacher); the teacher's probabilities come first."
        return f"For {classes} classes {found}: divide both logits by T."
    return None


def _unscaled(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    if student.shape[-1] == 1:
        return F.mse_loss(student, teacher)
    return reference.divergence(student, teacher, temperature, squared=False)


ONE_OUTPUT = Exercise(
    name="one_output",
    title="Exercise 5",
    prompt="The published code distils a regression head with a divergence and learns nothing from it. Write the "
    "output's loss [rows, classes], T^2 KL(teacher || student), so that it works for one output as well.",
    check=_check_output,
    solution=_solve_output,
    wrong=[
        (lambda s, t, T: reference.divergence(s, t, T), "the softmax of one number is 1"),
        (lambda s, t, T: (s - t).square().sum(), "the mean squared difference is asked for"),
        (_unscaled, "the gradient shrinks with T"),
        (lambda s, t, T: _solve_output(s, t, T) / s.shape[-1], "sum over the vocabulary"),
        (lambda s, t, T: reference.reverse_divergence(s, t, T) if s.shape[-1] > 1 else F.mse_loss(s, t),
         "the teacher's probabilities come first"),
        (lambda s, t, T: F.mse_loss(s, t), "divide both logits by T"),
        (lambda s, t, T: (s - t).square(), "Return one number, the mean"),
    ],
    hint="`student.shape[-1] == 1` is the case apart; otherwise log-softmax, softmax and F.kl_div with 'batchmean'.",
)  # fmt: skip


# 6. A divergence in one pass ------------------------------------------------------------------------------------------
_ROWS = (
    ([1.0, 2.0, 0.5], [2.0, 1.0, 0.0]),  # the first block holds the maximum
    ([0.0, 0.5, 1.0, 3.0, 2.0, 5.0], [0.5, 0.0, 2.0, 1.0, 4.0, 6.0]),  # it rises from block to block
    ([600.0, 900.0, 1200.0, 1201.0], [601.0, 899.0, 1201.0, 1200.0]),  # e^1200 is no number
)


def _solve_online(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    top_s = top_t = torch.tensor(-1e30, dtype=torch.float64)
    sum_s = sum_t = gap = torch.tensor(0.0, dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        higher_s, higher_t = torch.maximum(top_s, s.max()), torch.maximum(top_t, t.max())
        shrink, weight = (top_t - higher_t).exp(), (t - higher_t).exp()
        sum_s = sum_s * (top_s - higher_s).exp() + (s - higher_s).exp().sum()
        sum_t = sum_t * shrink + weight.sum()
        gap = gap * shrink + (weight * (t - s)).sum()
        top_s, top_t = higher_s, higher_t
    return gap / sum_t - (top_t + sum_t.log()) + (top_s + sum_s.log())


def _check_online(answer: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]) -> str | None:
    for s, t in _ROWS:
        blocks = [torch.tensor(x, dtype=torch.float64).split(2) for x in (s, t)]
        seen: list[int] = []
        got = answer(_once(blocks[0], seen), _once(blocks[1], seen))
        whole = [F.log_softmax(torch.cat(list(of)), 0) for of in blocks]
        want = float((whole[1].exp() * (whole[1] - whole[0])).sum())
        if not isinstance(got, Tensor | float):
            return "Return one number, the divergence of the row."
        got = float(got)
        if len(seen) > 2 * len(blocks[0]):
            return f"{len(seen)} blocks were read and there are {2 * len(blocks[0])}: every one may be read only once."
        if math.isclose(got, want, rel_tol=1e-9, abs_tol=1e-12):
            continue
        case = f"For the student's logits {s} and the teacher's {t}"
        if not math.isfinite(got):
            return f"{case} the result is {got}: e^1200 is no number, so subtract the largest logit seen so far."
        reverse = float((whole[0].exp() * (whole[0] - whole[1])).sum())
        if math.isclose(got, reverse, rel_tol=1e-9):
            return f"{case} that is KL(student || teacher): the expectation is the teacher's."
        if math.isclose(got, _stale(*blocks), rel_tol=1e-9):
            return f"{case} it is {got:.4g}, not {want:.4g}: A holds weights e^(t - m_t), so it shrinks when m_t rises."
        return f"{case} it is {got:.4g}, not {want:.4g}: KL = A / S_t - log-sum of t + log-sum of s."
    return None


def _once(blocks: Sequence[Tensor], seen: list[int]) -> Sequence[Tensor]:
    """The blocks, with a note in `seen` whenever one is read."""

    class Watched(Sequence):
        def __len__(self) -> int:
            return len(blocks)

        def __getitem__(self, i: int) -> Tensor:
            block = blocks[i].clone()
            seen.append(i)
            return block

    return Watched()


def _stale(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> float:
    """What comes out if A is not rescaled."""
    top, gap = torch.tensor(-1e30, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        top = torch.maximum(top, t.max())
        gap = gap + ((t - top).exp() * (t - s)).sum()
    s, t = torch.cat(list(student)), torch.cat(list(teacher))
    return float(gap / (t - top).exp().sum() - t.logsumexp(0) + s.logsumexp(0))


def _twice(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    tops = max(float(t.max()) for t in teacher), max(float(s.max()) for s in student)
    sum_t, sum_s = sum((t - tops[0]).exp().sum() for t in teacher), sum((s - tops[1]).exp().sum() for s in student)
    gap = sum(((t - tops[0]).exp() * (t - s)).sum() for s, t in zip(student, teacher, strict=True))
    return gap / sum_t - (tops[0] + sum_t.log()) + (tops[1] + sum_s.log())


def _overflowing(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    gap = sum_s = sum_t = torch.tensor(0.0, dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        gap, sum_s, sum_t = gap + (t.exp() * (t - s)).sum(), sum_s + s.exp().sum(), sum_t + t.exp().sum()
    return gap / sum_t - sum_t.log() + sum_s.log()


ONLINE = Exercise(
    name="online",
    title="Exercise 6",
    prompt="The logits of one row come in blocks, each read once. Compute KL(teacher || student) at temperature 1 with "
    "five running numbers: m_s, S_s, m_t, S_t and A.",
    check=_check_online,
    solution=_solve_online,
    wrong=[
        (lambda s, t: _stale(list(s), list(t)), "it shrinks when m_t rises"),
        (_twice, "read only once"),
        (_overflowing, "e^1200 is no number"),
        (lambda s, t: _solve_online(t, s), "the expectation is the teacher's"),
        (lambda s, t: sum(_solve_online([a], [b]) for a, b in zip(s, t, strict=True)), "log-sum of t + log-sum of s"),
        (lambda s, t: [a - b for a, b in zip(s, t, strict=True)], "Return one number"),
    ],
    hint="When m_t rises by d, everything that was summed with e^(t - m_t) is multiplied by e^(-d).",
)

ALL: Sequence[Exercise] = [PARAMETERS, WIDTH, LIMITS, PADDING, ONE_OUTPUT, ONLINE]
