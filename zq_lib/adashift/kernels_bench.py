"""What `make gpu` times for AdaShift: one step over a model's parameters, beside torch's Adam.

Goals at 100 million parameters or more: 85 % of the memory's speed; 0.95 times the speed of torch's fused Adam, 1.1
times with a bf16 ring and 2.0 times with beta1 = 0; 3.5 times that of pytorch_optimizer. Also 1,000 small tensors,
where the launches are what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from zq_lib.adashift.optimizer import AdaShift
from zq_lib.core.kernels import GpuCase
from zq_lib.core.kernels_launch import INTERPRETED
from zq_lib.core.numerics import relative_rms, tolerance

# name, settings, bytes of reads and writes per fp32 parameter (section 5.2)
VARIANTS: tuple[tuple[str, dict, int], ...] = (
    ("max", dict(phi="max"), 28),
    ("mean", dict(phi="mean"), 28),
    ("max, bf16 ring", dict(phi="max", ring_dtype=torch.bfloat16), 24),
    ("max, beta1 0", dict(phi="max", betas=(0.0, 0.999)), 12),
    ("none", dict(phi="none"), 40),
    ("max by rows", dict(phi="max", block="row"), 28),
)
_LAYER = ((768, 2304), (2304,), (768, 768), (768, 3072), (3072,), (3072, 768), *((768,),) * 6)
GPT2: tuple[tuple[int, ...], ...] = ((50_257, 768), (1024, 768), *_LAYER * 12, (768,), (768,))  # small: 124.4 million
SMALL: tuple[tuple[int, ...], ...] = ((64, 16),) * 500 + ((100,),) * 500
CHECKED = 4  # steps after the first n that are compared


def cases(
    device: str = "cuda",
    *,
    models: Sequence[tuple[str, Sequence[tuple[int, ...]]]] = (("gpt2", GPT2), ("1,000 tensors", SMALL)),
    variants: Sequence[str] = tuple(name for name, _, _ in VARIANTS),
    n: int = 10,
) -> Iterator[GpuCase]:
    """Each variant on the large model, and the first alone on small tensors."""
    for model, shapes in models:
        for name, settings, moved in VARIANTS:
            if name in variants and (model == models[0][0] or name == VARIANTS[0][0]):
                yield _case(name, model, shapes, {**settings, "n": n}, moved, device)


def _case(name: str, model: str, shapes: Sequence[tuple], settings: dict, moved: int, device: str) -> GpuCase:
    source = torch.Generator(device=device).manual_seed(0)

    def draw() -> list[Tensor]:
        return [torch.randn(shape, generator=source, device=device) for shape in shapes]

    def parameters(values: Sequence[Tensor], grads: Sequence[Tensor]) -> list[nn.Parameter]:
        found = [nn.Parameter(x.clone()) for x in values]
        for param, grad in zip(found, grads, strict=True):
            param.grad = grad
        return found

    values, grads = [0.02 * x for x in draw()], draw()

    def parity() -> tuple[float, float]:
        """The largest error of a tensor against the torch path in fp64, in units of what is allowed."""
        one = parameters(values, grads)
        two = parameters([x.double() for x in values], [x.double() for x in grads])
        mine, exact = AdaShift(one, fused=True, **settings), AdaShift(two, fused=False, **settings)
        for _ in range(settings["n"] + CHECKED):
            for a, b in zip(one, two, strict=True):  # another gradient each step: half the old one, turned round
                a.grad = -0.5 * a.grad + 0.5 * a.detach()
                b.grad = a.grad.double()
            mine.step()
            exact.step()
        bound = tolerance(torch.float32, "interpreter" if INTERPRETED else "triton").output
        return max(relative_rms(a, b) for a, b in zip(one, two, strict=True)) / bound, 1.0

    def ours(fused: bool) -> Callable[[], object]:
        return _step(lambda: AdaShift(parameters(values, grads), fused=fused, **settings))

    runs = {"triton": ours(True), "torch path": ours(False)}
    for peer, given in (("torch fused Adam", dict(fused=True)), ("torch foreach Adam", dict(foreach=True))):
        runs[peer] = _step(lambda given=given: torch.optim.Adam(parameters(values, grads), **given))

    def kozistr() -> torch.optim.Optimizer:
        from pytorch_optimizer import AdaShift as Other

        return Other(parameters(values, grads), foreach=True)

    if name == VARIANTS[0][0]:
        runs["pytorch_optimizer foreach"] = _step(kozistr)
    count = sum(x.numel() for x in values)
    size = dict(model=model.replace(" ", "_"), parameters=count, tensors=len(values), n=settings["n"])
    return GpuCase(name, size, parity, runs, 10 * count, moved * count)


def _step(make: Callable[[], torch.optim.Optimizer]) -> Callable[[], object]:
    """A step of an optimiser that exists from the first call on, so that only one at a time takes memory up front."""
    made: list[torch.optim.Optimizer] = []

    def run() -> object:
        if not made:
            made.append(make())
        return made[0].step()

    return run
