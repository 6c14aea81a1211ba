"""Steering a model: equal to the paper's form, exact where it must be, and gone without trace afterwards."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from oracle import ARCHITECTURES, paper_form, random_prompt, row, run, some_heads
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from zq_lib import pasta
from zq_lib.core import backend
from zq_lib.core.models import tiny
from zq_lib.core.numerics import relative_rms


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("padding", ["left", "right", None])
def test_prefill_equals_the_papers_form_in_double_precision(arch: str, padding: str | None) -> None:
    model, prompt = tiny(arch), random_prompt(padding=padding)
    heads = some_heads(model)
    with paper_form(model, prompt, heads, 0.01) as reference:
        expected = run(reference, prompt)
    with pasta.attach(model, heads=heads) as steering, steering.steer(prompt):
        actual = run(model, prompt)
    valid = prompt.attention_mask.bool()
    assert relative_rms(actual[valid], expected[valid]) < 1e-6
    assert relative_rms(run(model, prompt)[valid], expected[valid]) > 1e-3  # the effect is far above the tolerance


def _decode_errors(arch: str, heads: dict) -> list[float]:
    """Error of the prompt's last row and of 12 decode steps against the paper's form in float64."""
    model, prompt = tiny(arch), random_prompt(rows=1, padding=None)
    later, outputs = torch.randint(3, 128, (12, 1, 1), generator=torch.Generator().manual_seed(0)), []
    with pasta.attach(model, heads=heads) as steering, torch.no_grad():
        for context in (paper_form(model, prompt, heads, 0.01), steering.steer(prompt)):
            with context as subject:
                net = model if subject is steering else subject
                cache, steps = DynamicCache(config=net.config), []
                for ids in (prompt.input_ids, *later):  # gemma3's window of 8 leaves the marks behind on the way
                    steps.append(net(ids, past_key_values=cache).logits[:, -1])
                outputs.append(steps)
    return [relative_rms(a, b) for a, b in zip(outputs[1], outputs[0], strict=True)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_decode_step_equals_the_papers_form(arch: str) -> None:
    """Within 1e-6, or within one and a half times the rounding of the unsteered model where that is larger."""
    plain, steered = _decode_errors(arch, {}), _decode_errors(arch, some_heads(tiny(arch)))
    assert max(steered) < max(1e-6, 1.5 * max(plain))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cached_decoding_equals_one_forward(arch: str) -> None:
    model, prompt = tiny(arch), random_prompt(rows=1, padding=None)
    with pasta.attach(model, heads=some_heads(model)) as steering:
        ids = steering.generate(
            prompt, max_new_tokens=12, min_new_tokens=12, output_logits=True, return_dict_in_generate=True
        )
        with steering.steer(prompt), torch.no_grad():
            full = model(ids.sequences).logits[0, prompt.input_ids.shape[1] - 1 : -1]
    assert torch.allclose(torch.cat(ids.logits), full, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_tolerance(arch: str, dtype: torch.dtype) -> None:
    """The steered model in half precision is no further from its float64 form than the unsteered one, times two."""
    model, prompt = tiny(arch).to(dtype), random_prompt()
    heads, valid = some_heads(model), prompt.attention_mask.bool()
    plain = relative_rms(run(model, prompt)[valid].float(), run(copy.deepcopy(model).double(), prompt)[valid])
    with paper_form(model, prompt, heads, 0.01) as reference:
        expected = run(reference, prompt)
    with pasta.attach(model, heads=heads) as steering, steering.steer(prompt):
        error = relative_rms(run(model, prompt)[valid].float(), expected[valid])
    assert error < 2 * max(plain, {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}[dtype])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_marks_alpha_one_and_no_heads_change_nothing_bit_for_bit(arch: str) -> None:
    model, prompt = tiny(arch), random_prompt()
    plain = run(model, prompt)
    unmarked = copy.copy(prompt)
    object.__setattr__(unmarked, "marked", torch.zeros_like(prompt.marked))
    object.__setattr__(unmarked, "weights", torch.zeros_like(prompt.weights))
    for settings, given in (
        ({"alpha": 1.0, "heads": "all"}, prompt),
        ({"heads": {}}, prompt),
        ({"heads": "all"}, unmarked),
    ):
        with pasta.attach(model, **settings) as steering, steering.steer(given):
            assert torch.equal(run(model, prompt), plain)
    with pasta.attach(model, heads="all"):
        assert torch.equal(run(model, prompt), plain)


def test_rows_without_marks_in_a_batch_are_not_steered() -> None:
    model, prompt = tiny("llama"), random_prompt(padding=None)
    prompt.marked[1] = False
    prompt.weights[1] = 0
    plain = run(model, prompt)
    with pasta.attach(model, heads="all") as steering, steering.steer(prompt):
        steered = run(model, prompt)
    assert torch.allclose(steered[1], plain[1], atol=1e-5)
    assert not torch.allclose(steered[0], plain[0], atol=1e-2)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_left_padded_batch_equals_its_single_rows(arch: str) -> None:
    model, prompt = tiny(arch), random_prompt()
    with pasta.attach(model, heads=some_heads(model)) as steering:
        with steering.steer(prompt):
            batch = run(model, prompt)
        for b in range(3):
            single = row(prompt, b)
            with steering.steer(single):
                assert torch.allclose(run(model, single)[0], batch[b, prompt.attention_mask[b].bool()], atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox"])
def test_what_comes_before_the_first_mark_is_untouched(arch: str) -> None:
    model, prompt = tiny(arch), random_prompt(rows=1, padding=None)
    first = int(prompt.marked[0].int().argmax())
    plain = run(model, prompt)
    for protect in ("none", "first"):
        with pasta.attach(model, heads="all", protect=protect) as steering, steering.steer(prompt):
            steered = run(model, prompt)
        assert torch.allclose(steered[:, :first], plain[:, :first], atol=1e-5)
        assert not torch.allclose(steered[:, first:], plain[:, first:], atol=1e-2)


def test_beams_are_each_steered_by_their_own_prompt() -> None:
    model, prompt = tiny("llama"), random_prompt()
    options = {"num_beams": 3, "max_new_tokens": 6, "num_return_sequences": 2}
    with pasta.attach(model, heads=some_heads(model)) as steering:
        batch = steering.generate(prompt, **options)
        for b in range(3):
            alone = steering.generate(row(prompt, b), **options)
            together = batch[2 * b : 2 * b + 2, prompt.input_ids.shape[1] :]
            width = min(together.shape[1], alone.shape[1] - int(prompt.attention_mask[b].sum()))
            assert torch.equal(
                together[:, :width], alone[:, -alone.shape[1] + int(prompt.attention_mask[b].sum()) :][:, :width]
            )


def test_sampling_with_several_sequences_runs_steered() -> None:
    model, prompt = tiny("llama"), random_prompt()
    with pasta.attach(model, heads="all") as steering:
        torch.manual_seed(0)
        out = steering.generate(prompt, do_sample=True, num_return_sequences=2, max_new_tokens=3)
    assert out.shape[0] == 6


def test_a_preallocated_cache_gives_the_same_tokens() -> None:
    model, prompt = tiny("llama"), random_prompt()
    with pasta.attach(model, heads=some_heads(model)) as steering:
        grown = steering.generate(prompt, max_new_tokens=8)
        static = StaticCache(config=model.config, max_cache_len=40)
        fixed = steering.generate(prompt, max_new_tokens=8, past_key_values=static)
    assert torch.equal(grown, fixed)


def test_a_prompt_in_chunks_equals_one_prefill() -> None:
    model, prompt = tiny("qwen2"), random_prompt(rows=1, padding=None)
    with pasta.attach(model, heads="all") as steering, steering.steer(prompt), torch.no_grad():
        whole = model(prompt.input_ids).logits
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in prompt.input_ids.split(5, 1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


def test_two_spans_equal_the_scaled_up_form_with_the_inverse_alpha() -> None:
    """Scaling the union up by 1 / alpha and scaling the rest down by alpha agree while nothing has been generated."""
    model, prompt = tiny("llama"), random_prompt(rows=1, padding=None)
    prompt.marked[0, 8:10], prompt.weights[0, 8:10] = True, 1.0
    logits = []
    for mode in ("exclude", "include"):
        with pasta.attach(model, heads="all", mode=mode) as steering, steering.steer(prompt):
            logits.append(run(model, prompt))
    assert torch.allclose(*logits, atol=1e-4)


def test_scaling_up_differs_once_tokens_are_generated() -> None:
    model, prompt = tiny("llama"), random_prompt(rows=1, padding=None)
    longer = torch.cat([prompt.input_ids, torch.full((1, 4), 7)], 1)
    logits = []
    for mode in ("exclude", "include", "generation"):
        with pasta.attach(model, heads="all", mode=mode) as steering, steering.steer(prompt), torch.no_grad():
            logits.append(model(longer).logits[:, -1])
    assert not torch.allclose(logits[0], logits[1], atol=1e-2)
    assert not torch.allclose(logits[0], logits[2], atol=1e-2)


def test_target_mass_gives_the_marks_their_share_of_every_row() -> None:
    model, prompt = tiny("llama", num_hidden_layers=1), random_prompt(rows=1, padding=None)
    with pasta.attach(model, heads="all", mode="target_mass", share=0.7) as steering, steering.steer(prompt):
        ours = run(model, prompt)
    expected = _closed_form_share(model, prompt, 0.7)
    assert torch.allclose(ours, expected, atol=1e-4)


def _closed_form_share(model, prompt, share):  # noqa: ANN001, ANN202
    """The share by `alpha_for_share`, row by row and head by head, in a model of one layer."""
    from transformers import AttentionInterface

    from zq_lib.pasta.reference import alpha_for_share

    def forward(module, query, key, value, mask, scaling=None, **_):  # noqa: ANN001, ANN202
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        probs = (query @ key.transpose(2, 3) * scaling).masked_fill(~causal, -torch.inf).softmax(-1)
        marked = prompt.marked[:, None, None]
        mass = (probs * marked).sum(-1, keepdim=True)
        alpha = alpha_for_share(mass, share)
        steered = torch.where(marked, probs, alpha * probs)
        steered = torch.where(mass > 0, steered / steered.sum(-1, keepdim=True), probs)
        return (steered @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("closed_form", forward)
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("closed_form")
    return run(twin, prompt)


def test_weights_move_the_odds_between_and_beyond_marked_and_unmarked() -> None:
    """Multiplier alpha ** (1 - w): weight 0 equals no mark, a larger weight takes a larger share, below 0 hides."""
    model = tiny("llama")
    shares = []
    for weight in (-1.0, 0.0, 0.5, 1.0, 2.0):
        prompt = random_prompt(rows=1, padding=None)
        prompt.weights[prompt.marked] = weight
        with pasta.attach(model, heads={0: [0]}) as steering:
            with steering.steer(prompt, record=True):
                run(model, prompt)
            shares.append(float(steering.report().after[0, 0, 0]))
            before = float(steering.report().before[0, 0, 0])
    assert shares == sorted(shares)
    assert shares[1] == pytest.approx(before, abs=1e-5)
    assert shares[0] < before < shares[2]


def test_the_report_gives_the_log_odds_shift_of_minus_log_alpha() -> None:
    model, prompt = tiny("llama"), random_prompt()
    with pasta.attach(model, heads="all") as steering:
        with steering.steer(prompt, record=True):
            run(model, prompt)
        report = steering.report()
    shift = report.after[0].logit() - report.before[0].logit()  # the first layer sees the same input either way
    assert torch.allclose(shift, torch.full_like(shift, 4.60517), atol=1e-3)
    assert report.heads == {layer: (0, 1, 2, 3) for layer in range(3)}
    assert report.marked_tokens == 6 and report.scaled_tokens == int(prompt.attention_mask.sum()) - 6
    assert report.calls == 3


def test_an_empty_report_is_an_error() -> None:
    model = tiny("llama")
    with pasta.attach(model, heads="all") as steering:
        with pytest.raises(RuntimeError, match="nothing has been steered yet"):
            steering.report()
        with pytest.raises(RuntimeError, match="nothing was recorded"):
            steering.last_row()


def test_protected_tokens_and_other_messages_are_not_scaled() -> None:
    prompt = random_prompt(rows=1, padding=None)
    prompt.special[0, -1] = True
    prompt.message[0, 8:] = 1
    count = {}
    for name, settings in {
        "paper": {},
        "first": {"protect": "first"},
        "special": {"protect": "special"},
        "message": {"scope": "message"},
    }.items():
        from zq_lib.pasta.steering import prompt_bias

        count[name] = int((prompt_bias(prompt, pasta.PastaConfig(heads="all", **settings)).beta != 0).sum())
    assert count == {"paper": 12, "first": 11, "special": 11, "message": 6}


def test_detaching_leaves_no_trace_even_after_an_error() -> None:
    model, prompt = tiny("gpt2"), random_prompt()
    plain, hooks = run(model, prompt), len(model.base_model._forward_pre_hooks)
    with pytest.raises(KeyError), pasta.attach(model, heads="all") as steering, steering.steer(prompt):
        run(model, prompt)
        raise KeyError("the user's own")
    assert model.config._attn_implementation == "sdpa"
    assert len(model.base_model._forward_pre_hooks) == hooks
    assert torch.equal(run(model, prompt), plain)
    steering.detach()
    with pytest.raises(RuntimeError, match="detached"), steering.steer(prompt):
        pass


def test_two_handles_on_one_model_may_be_detached_in_any_order() -> None:
    model, prompt = tiny("llama"), random_prompt()
    plain = run(model, prompt)
    first, second = pasta.attach(model, heads={0: [0]}), pasta.attach(model, heads="all")
    first.detach()
    with second.steer(prompt):
        assert not torch.allclose(run(model, prompt), plain, atol=1e-3)
    second.detach()
    assert model.config._attn_implementation == "sdpa"


def test_interleaved_blocks_leave_no_steering_behind() -> None:
    """Generators that steer may be closed in any order, as a server does with its users."""
    model, prompt = tiny("llama"), random_prompt()
    plain = run(model, prompt)
    with pasta.attach(model, heads="all") as steering:

        def session():  # noqa: ANN202
            with steering.steer(prompt):
                yield

        first, second = session(), session()
        next(first), next(second)
        first.close(), second.close()
        assert torch.equal(run(model, prompt), plain)


def test_a_copy_of_an_attached_model_can_be_attached_and_released() -> None:
    model = tiny("llama")
    with pasta.attach(model, heads="all"):
        twin = copy.deepcopy(model)
    with pasta.attach(twin, heads="all"):
        pass
    assert twin.config._attn_implementation == "sdpa"


def test_an_implementation_chosen_while_attached_stays_chosen() -> None:
    model = tiny("llama")
    with pasta.attach(model, heads="all"):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_encoders_are_refused(kind: str) -> None:
    small = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    if kind == "t5":
        config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        model = T5ForConditionalGeneration(config)
    else:
        model = BertModel(BertConfig(**small))
    with pytest.raises(ValueError, match="no causal attention layers"):
        pasta.attach(model, heads="all")


def test_nested_blocks_restore_the_outer_emphasis() -> None:
    model, outer, inner = tiny("llama"), random_prompt(), random_prompt(seed=1)
    inner.marked[:] = outer.marked.roll(1, 1)
    with pasta.attach(model, heads="all") as steering, steering.steer(outer):
        before = run(model, outer)
        with steering.steer(inner):
            assert not torch.equal(run(model, outer), before)
        assert torch.equal(run(model, outer), before)


def test_another_thread_is_not_steered() -> None:
    model, prompt = tiny("llama"), random_prompt()
    plain, seen = run(model, prompt), []
    with pasta.attach(model, heads="all") as steering, steering.steer(prompt):
        thread = threading.Thread(target=lambda: seen.append(run(model, prompt)))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], plain)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_an_unsupported_attention_implementation_is_refused_and_left(implementation: str) -> None:
    model = tiny("llama")
    model.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match=f"{implementation}.*set_attn_implementation"):
        pasta.attach(model, heads="all")
    assert model.config._attn_implementation == implementation


def test_a_model_without_attention_is_refused() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="MambaForCausalLM has no causal attention layers.*use a decoder"):
        pasta.attach(model, heads="all")


def test_a_model_that_soft_caps_its_scores_is_refused_in_one_sentence_and_left_alone() -> None:
    """SDPA has no cap, and such a model cannot be switched to it: advice to do so would lead in a circle."""
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, attn_logit_softcapping=50.0,
        )
    )  # fmt: skip
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM soft-caps .*=50\).*use a model without"):
        pasta.attach(model, heads="all")
    assert model.config._attn_implementation == before and not model.base_model._forward_pre_hooks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": {7: [0]}}, "layer 7, head 0, but this model has layers 0-2 with heads 0-3"),
        ({"heads": [(0, 4)]}, "layer 0, head 4"),
        ({"alpha": 0}, "alpha=0 must be above 0"),
        ({"alpha": 1.5}, "alpha=1.5 must be"),
        ({"alpha": float("nan")}, "alpha=nan must be"),
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"mode": "exlude"}, "mode='exlude' is not known; choose one of exclude"),
        ({"share": 1.0, "mode": "target_mass"}, "share=1.0"),
        ({"heads": "most"}, "heads='most' is not known"),
    ],
)
def test_bad_settings_say_what_would_do_and_leave_the_model(settings: dict, message: str) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=message):
        pasta.attach(model, **settings)
    assert model.config._attn_implementation == "sdpa"
    assert not model.base_model._forward_pre_hooks


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    model, prompt = tiny("llama", max_position_embeddings=8), random_prompt()
    with pasta.attach(model, heads="all") as steering:
        with pytest.raises(ValueError, match="prompt has 14 tokens, but this model reads 8"), steering.steer(prompt):
            pass


def test_a_batch_of_another_size_is_refused() -> None:
    model, prompt = tiny("llama"), random_prompt(rows=3)
    with pasta.attach(model, heads="all") as steering, steering.steer(prompt):
        with pytest.raises(ValueError, match="runs 2 rows but the emphasis has 3"):
            model(prompt.input_ids[:2])


def test_marking_everything_warns_and_does_not_steer() -> None:
    model, prompt = tiny("llama"), random_prompt(rows=1, padding=None)
    prompt.marked[:], prompt.weights[:] = True, 1.0
    plain = run(model, prompt)
    with pasta.attach(model, heads="all") as steering:
        with pytest.warns(UserWarning, match="all of the prompt is marked"), steering.steer(prompt):
            assert torch.equal(run(model, prompt), plain)


def test_no_square_mask_per_head_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that SDPA is given stays linear in T per head, and unsteered heads get the stock call."""
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):  # noqa: ANN001, ANN202
        calls.append((q.shape, None if attn_mask is None else attn_mask.shape, options["is_causal"]))
        return real(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model, prompt = tiny("llama", num_hidden_layers=1), random_prompt(rows=1, padding=None)
    with pasta.attach(model, heads={0: [2]}) as steering, steering.steer(prompt):
        run(model, prompt)
    width = model.config.hidden_size // model.config.num_attention_heads
    assert calls == [((1, 1, 14, width + 1), None, True), ((1, 4, 14, width), None, True)]


def test_the_kernel_and_the_torch_path_agree_in_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (backend.interpreting() or torch.cuda.is_available()):
        pytest.skip("runs where TRITON_INTERPRET=1 or a GPU is present; tests/kernels covers the kernel itself")
    model, prompt = tiny("llama", num_hidden_layers=1), random_prompt(rows=1, padding=None)
    outputs = []
    for name in ("torch", "triton"):
        with pasta.attach(model, heads={0: [0, 2]}, backend=name) as steering, steering.steer(prompt):
            outputs.append(run(model, prompt))
    assert torch.allclose(*outputs, atol=1e-5)


def test_steering_is_differentiable_in_the_inputs() -> None:
    model, prompt = tiny("llama"), random_prompt()
    embeds = model.get_input_embeddings()(prompt.input_ids).detach().requires_grad_()
    with pasta.attach(model, heads="all") as steering, steering.steer(prompt):
        model(inputs_embeds=embeds, attention_mask=prompt.attention_mask).logits.sum().backward()
    assert embeds.grad.isfinite().all() and embeds.grad.abs().sum() > 0


def test_a_compiled_model_is_steered_like_the_plain_one_and_follows_new_marks() -> None:
    model, first, second = tiny("llama", num_hidden_layers=1), random_prompt(padding=None), random_prompt(padding=None)
    second.marked[:], second.weights[:] = first.marked.roll(4, 1), first.weights.roll(4, 1)
    compiled = torch.compile(model, backend="eager")
    with pasta.attach(model, heads="all") as steering, torch.no_grad():
        for prompt in (first, second):
            with steering.steer(prompt):
                assert torch.allclose(compiled(**prompt.inputs).logits, model(**prompt.inputs).logits, atol=1e-5)
