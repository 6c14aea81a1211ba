"""Scoring heads: the four ways agree, on every architecture, and leave the model as it was."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from oracle import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from zq_lib.core.attach import Gate, attention_modules, key_bias
from zq_lib.pasta import HeadScores, Probe, attach, encode, profile_heads, profiling, score_heads

ARCHITECTURES = ("llama", "gpt2", "opt", "gpt_neox", "gemma3")
PROBES = [
    Probe("w10 w11 *w12 w13* w14 w15 w16", "w20", "w30"),  # marks behind a prefix
    Probe("*w40 w41* w42 w43 w44", "w21", "w31"),  # no prefix to share
    Probe("w50 w51 *w52* w53 *w54* w55 w56 w57 w58 w59", "w22 w23 w24"),  # a reference answer of three tokens
    Probe("w60 *w61* w62", "w25"),
]


@cache
def words() -> PreTrainedTokenizerFast:
    """One token per word, w2 to w127."""
    vocabulary = {"<pad>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, 128)}}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>")


@cache
def scores(arch: str, method: str, max_rows: int = 512) -> torch.Tensor:
    return score_heads(tiny(arch), words(), PROBES, method=method, max_rows=max_rows).table


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("method", ["batched", "staircase"])
@pytest.mark.parametrize("max_rows", [512, 3])
def test_the_exact_methods_give_the_table_of_the_loop(arch: str, method: str, max_rows: int) -> None:
    loop = scores(arch, "loop")
    assert torch.allclose(scores(arch, method, max_rows), loop, atol=1e-4)
    assert (loop.abs().amax((1, 2)) > 1e-2).all()  # and it is not a table of zeros


def test_the_loop_scores_what_steering_that_head_alone_scores() -> None:
    model, tokenizer = tiny("llama"), words()
    for probe, table in zip(PROBES, scores("llama", "loop"), strict=True):
        prompt = encode(tokenizer, probe.source)
        answer = torch.tensor([tokenizer(probe.target)["input_ids"]])
        ids, start = torch.cat([prompt.input_ids, answer], 1), prompt.input_ids.shape[1] - 1

        def score(ids=ids, start=start, probe=probe, answer=answer) -> float:  # noqa: ANN001
            with torch.no_grad():
                logs = model(ids).logits[0, start:-1].log_softmax(-1)
            if probe.competitor is None:
                return float(logs.gather(-1, answer.T).mean())
            return float(logs[0, answer[0, 0]] - logs[0, tokenizer(probe.competitor)["input_ids"][0]])

        base = score()
        for layer, head in ((0, 0), (1, 3), (2, 2)):
            with attach(model, heads={layer: [head]}) as steering, steering.steer(prompt):
                assert score() - base == pytest.approx(float(table[layer, head]), abs=1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_gradient_is_the_slope_of_the_score_in_the_gates_strength(arch: str) -> None:
    """Against a central difference, in double precision; where norms compute in single, with a wider step."""
    model = tiny(arch).double()
    width = 2e-3 if arch in ("llama", "gemma3") else 1e-4
    slopes = score_heads(model, words(), PROBES, method="gradient").table
    modules = attention_modules(model)
    config = profiling.PastaConfig(heads="all")
    with attach(model, config), torch.no_grad():
        for i, probe in enumerate(PROBES):
            ready = profiling._prepare(words(), probe, config)
            bias = profiling._bias(ready, modules, model.device)
            for layer, head in ((0, 1), (max(modules), 3)):
                moved = []
                for step in (width, -width):
                    strength = torch.zeros(1, 4)
                    strength[0, head] = step
                    bias.gates = {modules[layer]: Gate(strength, (head,))}
                    with key_bias(bias):
                        moved.append(_double_score(model, ready))
                slope = (moved[0] - moved[1]) / (2 * width)
                assert float(slopes[i, layer, head]) == pytest.approx(slope, rel=1e-2, abs=1e-3)


def _double_score(model: nn.Module, ready: profiling._Ready) -> float:
    logits = model(ready.ids[None], logits_to_keep=len(ready.target)).logits[0]
    if ready.competitor is not None:
        return float(logits[0, ready.target[0]] - logits[0, ready.competitor])
    return float(logits.log_softmax(-1).gather(-1, ready.target[:, None]).mean())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_padding_in_a_gradient_batch_does_not_change_a_probe(arch: str) -> None:
    alone = score_heads(tiny(arch), words(), PROBES, method="gradient", batch=1).table
    assert torch.allclose(scores(arch, "gradient"), alone, atol=2e-4, rtol=1e-3)


def test_a_gradient_ranks_heads_nearly_as_the_exact_score_when_steering_is_gentle() -> None:
    model = tiny("llama")
    exact = score_heads(model, words(), PROBES, method="staircase", alpha=0.97).table.flatten(1)
    slope = score_heads(model, words(), PROBES, method="gradient", alpha=0.97).table.flatten(1)
    assert torch.corrcoef(torch.stack([exact.flatten(), slope.flatten()]))[0, 1] > 0.99


@pytest.mark.parametrize("method", profiling.METHODS)
def test_heads_that_are_left_out_are_nan_and_the_others_unchanged(method: str) -> None:
    table = score_heads(tiny("llama"), words(), PROBES[:2], method=method, heads={0: [1], 2: [0, 3]}, max_rows=3).table
    kept = torch.zeros(3, 4, dtype=torch.bool)
    kept[0, 1] = kept[2, 0] = kept[2, 3] = True
    assert torch.equal(~table.isnan(), kept.expand(2, -1, -1))
    assert torch.allclose(table[:, kept], scores("llama", method)[:2, kept], atol=2e-4, rtol=1e-3)


def test_progress_counts_probes() -> None:
    seen = []
    score_heads(tiny("llama"), words(), PROBES, method="staircase", progress=lambda *x: seen.append(x))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


# resume ------------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_continues_and_ends_with_the_same_table(tmp_path: Path) -> None:
    path, done = tmp_path / "scores.jsonl", []

    def stop(finished: int, _: int) -> None:
        done.append(finished)
        if finished == 2 and len(done) == 2:
            raise KeyboardInterrupt

    options = {"method": "staircase", "resume": path, "progress": stop}
    with pytest.raises(KeyboardInterrupt):
        score_heads(tiny("llama"), words(), PROBES, **options)
    assert len(path.read_text().split()) > 2
    table = score_heads(tiny("llama"), words(), PROBES, **options).table
    assert done == [1, 2, 3, 4] and torch.allclose(table, scores("llama", "staircase"), atol=1e-6)


def test_a_finished_run_is_read_without_running_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.jsonl"
    heads = {1: [2]}
    first = score_heads(tiny("llama"), words(), PROBES, method="loop", heads=heads, resume=path).table
    monkeypatch.setitem(profiling._RUN, "loop", None)
    again = score_heads(tiny("llama"), words(), PROBES, method="loop", heads=heads, resume=path).table
    assert torch.equal(first.nan_to_num(), again.nan_to_num()) and torch.equal(first.isnan(), again.isnan())


@pytest.mark.parametrize("cut", [0, 1, 60])
def test_a_last_line_that_was_cut_short_is_done_again_and_costs_no_other(tmp_path: Path, cut: int) -> None:
    path, seen = tmp_path / "scores.jsonl", []
    score_heads(tiny("llama"), words(), PROBES[:2], method="batched", resume=path)
    path.write_text(path.read_text()[: -cut or None])
    table = score_heads(
        tiny("llama"), words(), PROBES, method="batched", resume=path, progress=lambda *x: seen.append(x)
    ).table
    assert torch.allclose(table, scores("llama", "batched"), atol=1e-6)
    assert len(seen) == (3 if cut else 2)
    seen.clear()
    score_heads(tiny("llama"), words(), PROBES, method="batched", resume=path, progress=lambda *x: seen.append(x))
    assert not seen  # everything that was done is now on file


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 0.1},
        {"method": "staircase"},
        {"heads": {0: [0]}},
        {"model": "qwen2"},
        {"probes": [Probe(PROBES[0].source, "w77", "w30")]},
    ],
)
def test_scores_on_file_are_not_used_for_another_question(tmp_path: Path, change: dict) -> None:
    path, seen = tmp_path / "scores.jsonl", []
    settings = {"alpha": 0.01, "method": "batched", "heads": "all", "probes": PROBES[:1], "model": "llama"}
    for options in (settings, {**settings, **change}):
        options = {**options, "model": tiny(options["model"]), "tokenizer": words()}
        seen.clear()
        score_heads(**options, resume=path, progress=lambda *x: seen.append(x))
        assert seen == [(1, 1)]


def test_a_file_that_holds_something_else_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text('{"a": 1}\n[1, 2, 3]\n7\n"ab"\n')
    table = score_heads(tiny("llama"), words(), PROBES[:1], method="batched", resume=path).table
    assert torch.allclose(table[0], scores("llama", "batched")[0], atol=1e-6)
    assert json.loads(path.read_text().splitlines()[-1])[1]


# results -----------------------------------------------------------------------------------------------------------


def test_profile_heads_takes_the_best_and_says_where_they_come_from() -> None:
    model = tiny("llama")
    profile = profile_heads(model, words(), PROBES, k=3, task="words", method="batched")
    best = scores("llama", "batched").mean(0).flatten().topk(3).indices
    assert profile.pairs == sorted((int(i) // 4, int(i) % 4) for i in best)
    assert (profile.task, profile.method, profile.alpha, profile.items) == ("words", "batched", 0.01, 4)
    profile.check(model)
    with pytest.raises(ValueError, match="made for"):
        profile.check(tiny("qwen2"))


def test_a_shortlist_is_found_by_gradient_and_ranked_exactly() -> None:
    profile = profile_heads(tiny("llama"), words(), PROBES, k=2, shortlist=5)
    rough = scores("llama", "gradient").mean(0).flatten().topk(5).indices.tolist()
    exact = scores("llama", "loop").mean(0).flatten()
    best = sorted(sorted(rough, key=lambda i: -exact[i])[:2])
    assert profile.pairs == [(i // 4, i % 4) for i in best] and profile.method == "staircase"


def test_more_heads_than_the_shortlist_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="k=6 heads cannot be taken from shortlist=4; raise shortlist or lower k"):
        profile_heads(tiny("llama"), words(), PROBES[:1], k=6, shortlist=4)


@pytest.mark.parametrize("k", [0, 13])
def test_more_heads_than_the_model_has_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} heads cannot be taken from 12; choose 1 to 12"):
        profile_heads(tiny("llama"), words(), PROBES[:1], k=k)


def test_rank_intervals_are_seeded_ordered_and_narrow_where_probes_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    clear = torch.arange(12.0).flip(0).reshape(3, 4) + 0.01 * torch.randn(20, 3, 4, generator=generator)
    interval = HeadScores(clear, "loop", 0.01).rank_interval()
    assert interval.shape == (3, 4, 2)
    assert torch.equal(interval[..., 0], interval[..., 1])
    assert interval[..., 0].flatten().tolist() == list(range(12))
    noisy = HeadScores(torch.randn(20, 3, 4, generator=generator), "loop", 0.01)
    wide = noisy.rank_interval()
    assert torch.equal(wide, noisy.rank_interval()) and not torch.equal(wide, noisy.rank_interval(seed=1))
    assert (wide[..., 0] <= wide[..., 1]).all() and (wide >= 0).all() and (wide <= 11).all()
    assert (wide[..., 1] - wide[..., 0]).mean() > 3
    assert (noisy.rank_interval(0.5)[..., 1] <= wide[..., 1]).all()


def test_heads_that_were_left_out_rank_last() -> None:
    table = torch.full((5, 1, 4), torch.nan)
    table[:, 0, 2] = -3.0
    interval = HeadScores(table, "loop", 0.01).rank_interval()
    assert interval[0, 2].tolist() == [0, 0] and (interval[0, [0, 1, 3]] >= 1).all()


# no trace, and errors ----------------------------------------------------------------------------------------------


def _state(model: nn.Module) -> tuple:
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    grads = [p.requires_grad for p in model.parameters()]
    return hooks, grads, model.training, model.config._attn_implementation, [m.training for m in model.modules()]


@pytest.mark.parametrize("method", profiling.METHODS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_even_after_an_error(method: str, fails: bool) -> None:
    model = tiny("llama").train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    before, weights = _state(model), {n: p.clone() for n, p in model.named_parameters()}
    hook = model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0) if fails else None
    if fails:
        with pytest.raises(ZeroDivisionError):
            score_heads(model, words(), PROBES, method=method)
        hook.remove()
    else:
        score_heads(model, words(), PROBES, method=method)
    assert _state(model) == before
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probes": []}, r"probes=\[\] scores nothing; give at least one"),
        ({"method": "fast"}, "method='fast' is not known; choose one of gradient, staircase, batched, loop"),
        ({"heads": {9: [0]}}, "layer 9, head 0, but this model has layers 0-2"),
        ({"alpha": 2}, "alpha=2 must be above 0"),
        ({"probes": [Probe("no marks here", "w5")]}, "probe 'no marks here' marks nothing, so no head can help"),
        (
            {"probes": [Probe("*w5*", "w6 w7", "w6 w8")]},
            "target 'w6 w7' and competitor 'w6 w8' start with the same token; choose",
        ),
        ({"probes": [Probe("w4 *w5*", "")]}, "target '' has no token; give at least one word"),
        ({"probes": [Probe("w4 *w5*", "w6", "")]}, "competitor '' "),
        ({"max_rows": 1}, "max_rows=1 is too small; use 2 or more"),
        ({"max_rows": 0, "method": "batched"}, "max_rows=0 "),
        ({"batch": 0, "method": "gradient"}, "batch=0 "),
        ({"heads": {}}, r"heads=\{\} scores nothing; give at least one head, or 'all'"),
    ],
)
def test_what_cannot_be_scored_is_refused_and_leaves_the_model(settings: dict, message: str) -> None:
    model = tiny("llama")
    before = _state(model)
    with pytest.raises(ValueError, match=message):
        score_heads(**{"model": model, "tokenizer": words(), "probes": PROBES, "method": "staircase", **settings})
    assert _state(model) == before
