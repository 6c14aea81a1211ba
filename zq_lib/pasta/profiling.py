"""Which heads to steer: score every (layer, head) alone (section 3.2, Algorithm 1), without one pass per head.

| method      | how                                                                      | cost of L x H heads    |
| ----------- | ------------------------------------------------------------------------ | ---------------------- |
| "loop"      | one forward per head, as published                                       | L H passes             |
| "batched"   | each row of a batch steers another head                                  | L H rows               |
| "staircase" | rows join at the layer they steer, having shared everything below        | about L H / 2 rows     |
| "gradient"  | a gate multiplies each head's bias; one backward gives d score / d gate  | a forward + a backward |

The first three give the same table; the fourth is its first-order estimate, good for a shortlist.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from zq_lib.core.attach import Gate, KeyBias, attention_modules, decoder_blocks, key_bias
from zq_lib.pasta.config import Heads, PastaConfig, head_map
from zq_lib.pasta.profiles import Fingerprint, HeadProfile, as_map
from zq_lib.pasta.prompt import Source, encode
from zq_lib.pasta.steering import attach, prompt_bias

METHODS = ("gradient", "staircase", "batched", "loop")


@dataclass(frozen=True)
class Probe:
    """One scored prompt. With a competitor the score is log p(target) - log p(competitor), first tokens; without one it
    is the mean log p of the target's tokens, a reference answer."""

    source: Source
    target: str
    competitor: str | None = None


@dataclass(frozen=True)
class HeadScores:
    """Gain of steering one head alone, [N probes, L, H]; NaN where a head was left out."""

    table: Tensor
    method: str
    alpha: float

    def mean(self) -> Tensor:
        """Mean gain over probes, [L, H]."""
        return self.table.mean(0)

    def rank_interval(self, level: float = 0.9, draws: int = 500, seed: int = 0) -> Tensor:
        """Bootstrap interval of each head's rank over probes, [L, H, 2]; rank 0 is the best."""
        flat = self.table.flatten(1).nan_to_num(nan=-torch.inf)
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(len(flat), (draws, len(flat)), generator=generator)
        ranks = torch.stack([flat[p].mean(0).argsort(descending=True, stable=True).argsort() for p in picks])
        bounds = torch.tensor([(1 - level) / 2, (1 + level) / 2])
        return ranks.float().quantile(bounds, 0).T.reshape(*self.table.shape[1:], 2)

    def profile(self, model: PreTrainedModel, task: str, k: int, seed: int = 0) -> HeadProfile:
        """The k best heads as a profile for this model; ties by (layer, head)."""
        mean = self.mean().nan_to_num(nan=-1e9)
        full = HeadProfile(
            as_map([(0, 0)]), task, self.method, self.alpha, len(self.table), seed,
            model.config.name_or_path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or model.config.model_type,
            Fingerprint.of(model), mean.tolist(),
        )  # fmt: skip
        return full.top(k)


def profile_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    *,
    k: int = 10,
    task: str = "custom",
    shortlist: int | None = None,
    **options: object,
) -> HeadProfile:
    """The k best heads of a task: gradient gates alone, or with `shortlist=n` the staircase over their n best.

    Other options are `score_heads`'. Raises its errors, and ValueError when k exceeds the number of heads.
    """
    if shortlist is not None and k > shortlist:
        raise ValueError(f"k={k} heads cannot be taken from shortlist={shortlist}; raise shortlist or lower k")
    if shortlist is None:
        return score_heads(model, tokenizer, probes, **options).profile(model, task, k)
    rough = score_heads(model, tokenizer, probes, **{**options, "method": "gradient"}).profile(model, task, shortlist)
    exact = score_heads(model, tokenizer, probes, **{**options, "method": "staircase", "heads": rough.heads})
    return exact.profile(model, task, k)


def score_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    *,
    method: str = "gradient",
    alpha: float = 0.01,
    heads: Heads = "all",
    batch: int = 8,
    max_rows: int = 512,
    resume: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HeadScores:
    """Score each head of `heads` alone on every probe.

    Args: `batch` probes share one gradient pass; `max_rows` bounds the rows of one forward of the other methods
    (memory); `resume` names a file to which finished probes are appended and from which they are read again; `progress`
    is called with (done, total).

    Raises ValueError for no probes, an unknown method, heads that do not exist, or a probe without marks or whose two
    answers start with the same token.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; choose one of {', '.join(METHODS)}")
    if not probes:
        raise ValueError("probes=[] scores nothing; give at least one")
    for name, value, least in (("batch", batch, 1), ("max_rows", max_rows, 2)):
        if value < least:
            raise ValueError(f"{name}={value} is too small; use {least} or more")
    config = PastaConfig(alpha=alpha, heads="all")
    modules = attention_modules(model)
    count = model.config.get_text_config().num_attention_heads
    chosen = head_map(heads, max(modules) + 1, count)
    if not chosen:
        raise ValueError(f"heads={heads!r} scores nothing; give at least one head, or 'all'")
    ready = [_prepare(tokenizer, p, config) for p in probes]
    keys = [_key(model, p, method, alpha, chosen) for p in probes]
    done = _read(resume)
    rows: dict[int, Tensor] = {i: torch.tensor(done[k]) for i, k in enumerate(keys) if k in done}
    todo = [i for i in range(len(probes)) if i not in rows]
    step = batch if method == "gradient" else 1
    # Longest first wastes least padding, and shows at once whether memory suffices.
    todo.sort(key=lambda i: -len(ready[i].ids))
    with attach(model, config), _frozen(model):
        for start in range(0, len(todo), step):
            part = todo[start : start + step]
            tables = _RUN[method](model, modules, [ready[i] for i in part], chosen, count, max_rows)
            for i, table in zip(part, tables, strict=True):
                rows[i] = torch.full((max(modules) + 1, count), torch.nan)
                for layer, hs in chosen.items():
                    rows[i][layer, list(hs)] = table[layer, list(hs)]
                _append(resume, keys[i], rows[i])
            if progress is not None:
                progress(len(rows), len(probes))
    return HeadScores(torch.stack([rows[i] for i in range(len(probes))]), method, alpha)


@dataclass(frozen=True)
class _Ready:
    """A probe as tensors: ids [T] with all but the last answer token, its bias, and what the last n logits predict."""

    ids: Tensor
    bias: KeyBias
    target: Tensor  # [n]
    competitor: int | None

    def score(self, logits: Tensor) -> Tensor:
        """[R, n or more, V] -> [R]."""
        last = logits[:, -len(self.target) :].float()
        if self.competitor is not None:
            return last[:, 0, self.target[0]] - last[:, 0, self.competitor]
        return last.log_softmax(-1).gather(-1, self.target[None, :, None].expand(len(last), -1, 1)).mean((1, 2))


def _prepare(tokenizer: PreTrainedTokenizerBase, probe: Probe, config: PastaConfig) -> _Ready:
    prompt = encode(tokenizer, probe.source)
    if not bool(prompt.marked.any()):
        raise ValueError(f"probe {prompt.texts[0][:40]!r} marks nothing, so no head can help; mark what should count")
    target = torch.tensor(_answer(tokenizer, "target", probe.target))
    bias = prompt_bias(prompt, config)
    if probe.competitor is None:
        return _Ready(torch.cat([prompt.input_ids[0], target[:-1]]), bias, target, None)
    other = _answer(tokenizer, "competitor", probe.competitor)[0]
    if other == target[0]:
        raise ValueError(
            f"target {probe.target!r} and competitor {probe.competitor!r} start with the same token; choose others"
        )
    return _Ready(prompt.input_ids[0], bias, target[:1], other)


def _answer(tokenizer: PreTrainedTokenizerBase, name: str, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"{name} {text!r} has no token; give at least one word")
    return ids


def _forward(model: PreTrainedModel, ready: _Ready, rows: int, prefix: _SharedPrefix | None = None) -> Tensor:
    ids = ready.ids.to(model.device).expand(rows, -1)
    cache: dict = {"use_cache": False}
    if prefix is not None:
        ids, cache = ids[:, prefix.get_seq_length() :], {"use_cache": True, "past_key_values": prefix}
    return model(input_ids=ids, logits_to_keep=len(ready.target), **cache).logits


class _SharedPrefix(DynamicCache):
    """Keys and values of the tokens before the first mark, which steering cannot change: one copy for all rows."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        if len(self.layers) <= layer_idx or not self.layers[layer_idx].is_initialized:
            return super().update(key_states, value_states, layer_idx)
        kept, rows = self.layers[layer_idx], len(key_states)
        keys = torch.cat([kept.keys.expand(rows, -1, -1, -1), key_states], -2)
        return keys, torch.cat([kept.values.expand(rows, -1, -1, -1), value_states], -2)

    @classmethod
    def of(cls, model: PreTrainedModel, ready: _Ready) -> _SharedPrefix | None:
        first = int(ready.bias.favoured[0].int().argmax())
        if first == 0:
            return None
        prefix = cls()
        model(
            input_ids=ready.ids[None, :first].to(model.device), use_cache=True, past_key_values=prefix, logits_to_keep=1
        )
        return prefix


def _bias(ready: _Ready, modules: dict[int, nn.Module], device: torch.device) -> KeyBias:
    return replace(
        ready.bias, beta=ready.bias.beta.to(device), favoured=ready.bias.favoured.to(device), gates={},
        layers={m: layer for layer, m in modules.items()}, calls={},
    )  # fmt: skip


@torch.no_grad()
def _loop(model, modules, probes, chosen, count, max_rows) -> list[Tensor]:  # noqa: ANN001
    (ready,) = probes
    table = torch.zeros(max(modules) + 1, count)
    base = ready.score(_forward(model, ready, 1))
    with key_bias(_bias(ready, modules, model.device)) as bias:
        for layer, heads in chosen.items():
            for head in heads:
                bias.gates = {modules[layer]: Gate(_one_hot([head], count, model.device), (head,))}
                table[layer, head] = ready.score(_forward(model, ready, 1)) - base
    return [table]


@torch.no_grad()
def _batched(model, modules, probes, chosen, count, max_rows) -> list[Tensor]:  # noqa: ANN001
    (ready,) = probes
    table = torch.zeros(max(modules) + 1, count)
    base = ready.score(_forward(model, ready, 1))
    pairs = [(layer, h) for layer, hs in chosen.items() for h in hs]
    with key_bias(_bias(ready, modules, model.device)) as bias:
        for start in range(0, len(pairs), max_rows):
            part = pairs[start : start + max_rows]
            bias.gates = {}
            for layer in {p[0] for p in part}:
                strength = torch.zeros(len(part), count, device=model.device)
                for row, (at, head) in enumerate(part):
                    strength[row, head] = float(at == layer)
                bias.gates[modules[layer]] = Gate(strength, tuple(range(count)))
            gains = ready.score(_forward(model, ready, len(part))) - base
            for (layer, head), gain in zip(part, gains, strict=True):
                table[layer, head] = gain
    return [table]


@torch.no_grad()
def _staircase(model, modules, probes, chosen, count, max_rows) -> list[Tensor]:  # noqa: ANN001
    """Row 0 runs unsteered; when it reaches layer l, one copy per head of l joins, steered in that layer only."""
    (ready,) = probes
    table = torch.zeros(max(modules) + 1, count)
    _, blocks = decoder_blocks(model, modules)
    pairs = [(layer, h) for layer, hs in chosen.items() for h in hs]
    prefix = _SharedPrefix.of(model, ready)
    with key_bias(_bias(ready, modules, model.device)) as bias:
        for start in range(0, len(pairs), max_rows - 1):
            part, bias.gates = as_map(pairs[start : start + max_rows - 1]), {}
            with _joining(blocks, modules, part, bias, count):
                scores = ready.score(_forward(model, ready, 1, prefix))
            gains = iter(scores[1:] - scores[0])
            for layer, heads in part.items():
                for head in heads:
                    table[layer, head] = next(gains)
    return [table]


@contextlib.contextmanager
def _joining(
    blocks: dict[int, nn.Module], modules: dict[int, nn.Module], part: dict[int, list[int]], bias: KeyBias, count: int
) -> Iterator[None]:
    """Hooks that let the rows of `part` join the batch in front of their layer."""

    def join(layer: int) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            hidden = args[0] if args else kwargs["hidden_states"]  # [R, T, C]
            new = len(part[layer])
            grown = torch.cat([hidden, hidden[:1].expand(new, -1, -1)])
            strength = torch.zeros(len(grown), count, device=hidden.device)
            strength[len(hidden) :] = _one_hot(part[layer], count, hidden.device)
            bias.gates = {modules[layer]: Gate(strength, tuple(part[layer]))}
            if args:
                return (grown, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": grown}

        return hook

    handles = [blocks[layer].register_forward_pre_hook(join(layer), with_kwargs=True) for layer in part]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gradient(model, modules, probes, chosen, count, max_rows) -> list[Tensor]:  # noqa: ANN001
    """d score / d gate at gate 0, for a left-padded batch of probes."""
    width = max(len(p.ids) for p in probes)
    ids = torch.stack([nn.functional.pad(p.ids, (width - len(p.ids), 0)) for p in probes]).to(model.device)
    lengths = torch.tensor([len(p.ids) for p in probes], device=model.device)
    mask = (torch.arange(width, device=model.device) >= (width - lengths)[:, None]).long()

    def line_up(name: str) -> Tensor:  # [1, P] each -> [B, width]; answer tokens follow the prompt, unbiased
        rows = []
        for p in probes:
            row = getattr(p.bias, name)
            answer = len(p.ids) - row.shape[1]
            rows.append(nn.functional.pad(row, (width - len(p.ids), answer)))
        return torch.cat(rows)

    bias = _bias(replace(probes[0], bias=KeyBias(line_up("beta"), line_up("favoured"), {})), modules, model.device)
    gates = {
        layer: torch.zeros(len(probes), count, device=model.device, requires_grad=True) for layer in chosen
    }  # [B, H] per layer
    bias.gates = {modules[layer]: Gate(gate, tuple(range(count))) for layer, gate in gates.items()}
    extra = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    keep = max(len(p.target) for p in probes)
    with torch.enable_grad(), key_bias(bias):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep, **extra).logits
        total = sum(p.score(logits[i : i + 1]).sum() for i, p in enumerate(probes))
        slopes = torch.autograd.grad(total, list(gates.values()))
    tables = torch.zeros(len(probes), max(modules) + 1, count)
    for layer, slope in zip(gates, slopes, strict=True):
        tables[:, layer] = slope.cpu()
    return list(tables)


_RUN = {"loop": _loop, "batched": _batched, "staircase": _staircase, "gradient": _gradient}


@contextlib.contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, no gradients for weights (the gates need none, and they would double the backward pass), and a head
    that gets contiguous rows: on a slice, torch multiplies row by row and reads the vocabulary matrix R times."""
    head = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    wanted = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in model.modules() if m.training]
    model.eval()
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        head.remove()
        for module in training:
            module.training = True
        for p in wanted:
            p.requires_grad_(True)


def _one_hot(heads: Sequence[int], count: int, device: torch.device) -> Tensor:
    return nn.functional.one_hot(torch.tensor(list(heads)), count).float().to(device)


def _key(model: PreTrainedModel, probe: Probe, method: str, alpha: float, chosen: dict) -> str:
    """Identifies a finished probe: model, probe, method, alpha and heads."""
    said = [asdict(Fingerprint.of(model)), repr(probe), method, alpha, sorted(chosen.items())]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:24]


def _read(path: str | Path | None) -> dict[str, list]:
    """Finished probes; a last line cut short by an interruption is left out."""
    found = {}
    if path is not None and Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError):
                found.update([json.loads(line)])
    return found


def _append(path: str | Path | None, key: str, table: Tensor) -> None:
    if path is not None:
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps([key, table.tolist()]))  # a line cut short must not swallow the next
