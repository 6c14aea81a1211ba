"""What the LoSparse page's three parts can be set to, and the program that each setting is. Nothing of a page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zq_lib.losparse import LoSparseConfig

MODELS: dict[str, tuple[str, int, dict[str, str]]] = {  # model -> path of its blocks, their number, their matrices
    "minilm-l6": (
        "encoder.layer",
        6,
        {
            "query": "attention.self.query",
            "key": "attention.self.key",
            "value": "attention.self.value",
            "attn out": "attention.output.dense",
            "FFN in": "intermediate.dense",
            "FFN out": "output.dense",
        },
    ),
    "smollm2": (
        "model.layers",
        30,
        {
            "query": "self_attn.q_proj",
            "key": "self_attn.k_proj",
            "value": "self_attn.v_proj",
            "attn out": "self_attn.o_proj",
            "FFN gate": "mlp.gate_proj",
            "FFN in": "mlp.up_proj",
            "FFN out": "mlp.down_proj",
        },
    ),
}
TIMED = (1, 32, 256)  # tokens of a timed call
RATIOS = (0.1, 0.15, 0.2, 0.3, 0.5)  # of a training
RATES = {"one for all": False, "each way's best": True}
STEPS = 60
QUESTIONS = ("Who wrote the opera Carmen?", "How far is it to the moon?", "Where do penguins live?")
MOST_QUESTIONS, MOST_QUESTION = 5, 150  # typed sentences, and the characters of one
TOTALS = (0.9, 0.8, 0.7, 0.5)  # of a language model
SHARES = (0.0, 0.05, 0.2, 0.4)
INITS = {"the layer's inputs": "activation", "the weight alone": "svd"}
PROMPT = "The capital of France is"
MOST_PROMPT = 200  # characters
CALIBRATED, SCORED, WRITTEN = 4, 2, 24  # windows of 256 tokens for factors and for scores, and tokens written


def _offered(name: str, value: Any, offered: Any) -> None:
    if value not in tuple(offered) or isinstance(value, bool) != isinstance(next(iter(offered)), bool):
        raise ValueError(f"{name}={value!r} is not offered here; choose one of {', '.join(map(str, offered))}")


@dataclass(frozen=True)
class Matrix:
    """One matrix of `model`; shares of its entries in the low-rank part, and of its rows that S keeps."""

    model: str = "minilm-l6"
    layer: int = 0
    matrix: str = "FFN in"
    low_rank: float = 0.05
    remaining: float = 0.15

    def __post_init__(self) -> None:
        _offered("model", self.model, MODELS)
        _, layers, matrices = MODELS[self.model]
        _offered("matrix", self.matrix, matrices)
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or not 0 <= self.layer < layers:
            raise ValueError(
                f"layer={self.layer!r} is not in {self.model}; choose a whole number from 0 to {layers - 1}"
            )
        self.config  # noqa: B018 - it checks the shares

    @property
    def name(self) -> str:
        """The module's name in its model."""
        blocks, _, matrices = MODELS[self.model]
        return f"{blocks}.{self.layer}.{matrices[self.matrix]}"

    @property
    def config(self) -> LoSparseConfig:
        """The library's settings. Raises ValueError for shares that leave nothing or more than there is."""
        return LoSparseConfig(low_rank=self.low_rank, remaining=self.remaining)

    def python(self) -> str:
        """A program that splits, cuts and times the layer."""
        return (
            "from zq_lib.core.models import load\n"
            "from zq_lib.losparse import LoSparseConfig, LowRankSparse\n"
            "from zq_lib.losparse.prices import time_layer\n\n"
            f"model, _ = load({self.model!r})\n"
            f"dense = model.get_submodule({self.name!r})\n"
            "outputs, inputs = dense.weight.shape\n"
            f"config = LoSparseConfig(low_rank={self.low_rank:g}, remaining={self.remaining:g})\n"
            "layer = LowRankSparse.from_dense(dense, config.rank(outputs, inputs))  # the same function, as U V + S\n"
            "energy = layer.sparse.detach().square().sum(1)  # what U V leaves of every row\n"
            "rows = energy.topk(round(config.remaining * outputs)).indices.sort().values\n"
            "layer.shrink(rows)\n\n"
            "missed = (layer.weight - dense.weight).square().sum() / dense.weight.square().sum()\n"
            'print("squared error", missed.item())\n'
            'print("numbers", dense.weight.numel(), layer.flops())\n'
            f"for tokens in {TIMED}:\n"
            "    print(time_layer(outputs, inputs, layer.rank, len(rows), tokens))\n"
        )


@dataclass(frozen=True)
class Training:
    """A pruning run to `ratio` of the replaced weights, and `questions` to answer after it.

    `own_rates` gives each way the learning rate that was best for it; else there is one for all.
    """

    ratio: float = 0.15
    own_rates: bool = False
    questions: tuple[str, ...] = QUESTIONS

    def __post_init__(self) -> None:
        _offered("ratio", self.ratio, RATIOS)
        _offered("own_rates", self.own_rates, RATES.values())
        texts = self.questions if isinstance(self.questions, list | tuple) else [self.questions]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"questions={texts!r} must be a list of texts")
        texts = tuple(text.strip() for text in texts if text.strip())
        if len(texts) > MOST_QUESTIONS:
            raise ValueError(f"questions has {len(texts)} lines, more than {MOST_QUESTIONS}; leave some out")
        if long := next((text for text in texts if len(text) > MOST_QUESTION), None):
            raise ValueError(
                f"questions has a line of {len(long)} characters, more than {MOST_QUESTION}; shorten {long[:30]!r}…"
            )
        object.__setattr__(self, "questions", texts)

    def python(self) -> str:
        """A program that trains all ways to the same size."""
        return (
            "from zq_lib.losparse import lab\n\n"
            "problem = lab.questions()  # two layers of MiniLM and a new head learn TREC's six kinds of question\n"
            "ways = (lab.DENSE, *lab.METHODS)\n"
            f"rates = {'lab.OWN_RATES' if self.own_rates else 'None  # one for all'}\n"
            f"for moment in lab.watch(problem, {self.ratio:g}, {STEPS}, ways, rates):\n"
            "    if moment.row:\n"
            "        print(moment.row)\n"
            "        if moment.method == lab.LOSPARSE:\n"
            "            for layer in moment.handle.report().layers:\n"
            "                print(layer.name, layer.density)\n"
        )


@dataclass(frozen=True)
class Language:
    """SmolLM2 compressed once to `total` of its blocks' weights, `low_rank` of them as U V, and a text to go on with.

    `init` is "activation" for factors that see the layers' inputs, or "svd".
    """

    total: float = 0.9
    low_rank: float = 0.05
    init: str = "activation"
    prompt: str = PROMPT

    def __post_init__(self) -> None:
        _offered("total", self.total, TOTALS)
        _offered("low_rank", self.low_rank, SHARES)
        _offered("init", self.init, INITS.values())
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"prompt={self.prompt!r} has no words; write how the text begins")
        if len(self.prompt) > MOST_PROMPT:
            raise ValueError(f"prompt has {len(self.prompt)} characters, more than {MOST_PROMPT}; shorten it")

    @property
    def config(self) -> LoSparseConfig:
        """The library's settings."""
        return LoSparseConfig(low_rank=self.low_rank, remaining=round(self.total - self.low_rank, 4), init=self.init)

    @property
    def label(self) -> str:
        """What the page calls it."""
        return f"LoSparse {self.low_rank:.0%} of {self.total:.0%}" if self.low_rank else f"rows only, {self.total:.0%}"

    def python(self) -> str:
        """A program that compresses, measures and writes."""
        config = self.config
        return (
            "import torch\n\n"
            "from zq_lib import losparse\n"
            "from zq_lib.core.language import perplexity\n"
            "from zq_lib.core.models import load\n"
            "from zq_lib.losparse.oneshot import TESTS, help_text, windows\n\n"
            "model, tokenizer = load()\n"
            "ids = help_text(tokenizer)  # Python's own help\n"
            f"pair = torch.stack(windows(ids, 0, {SCORED}))  # scores rows, by their loss\n"
            f"inputs = [{{'input_ids': w[None]}} for w in windows(ids, 512, {CALIBRATED})]  # for the factors\n"
            f"config = losparse.LoSparseConfig({config.low_rank:g}, {config.remaining:g}, init={config.init!r})\n"
            "batches = [{'input_ids': pair, 'labels': pair}]\n"
            "handle = losparse.compress_once(model, config, batches, inputs=inputs)\n"
            "print(handle.report().ratio, handle.report().model_ratio)\n\n"
            "print(perplexity(model, [w for start in TESTS for w in windows(ids, start)]))\n"
            f"prompt = tokenizer({self.prompt!r}, return_tensors='pt')\n"
            f"written = model.generate(**prompt, do_sample=False, max_new_tokens={WRITTEN})\n"
            "print(tokenizer.decode(written[0], skip_special_tokens=True))\n"
        )
