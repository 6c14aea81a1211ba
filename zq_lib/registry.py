"""The nine methods in teaching order: the README table, the gallery, the CLI and the test matrices read this file."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType


@dataclass(frozen=True)
class Method:
    """One method. Dotted names are resolved only when asked for, so that reading the table costs nothing."""

    slug: str
    number: int  # place in the course, and the prefix of the notebook
    title: str
    paper: str
    arxiv: str
    sentence: str  # what it does, for the card and the README
    asks: str  # the question that its notebook answers
    plugs_into: str
    minutes: int = 0  # reading and doing the notebook
    built: bool = False

    @property
    def notebook(self) -> str:
        return f"notebooks/{self.number:02d}_{self.slug}.ipynb"

    @property
    def app(self) -> str:
        return f"apps.{self.slug}"

    @property
    def config(self) -> str:
        return f"zq_lib.{self.slug}.config"

    @property
    def lab(self) -> str:
        return f"zq_lib.{self.slug}.lab"

    @property
    def kernels(self) -> str:
        return f"zq_lib.{self.slug}.kernels"

    @property
    def exercises(self) -> str:
        return f"zq_lib.{self.slug}.exercises"

    @property
    def benchmark(self) -> str:
        return f"zq_lib.{self.slug}.benchmark"

    def load(self, part: str) -> ModuleType:
        """Import one of `config`, `lab`, `kernels`, `exercises`, `benchmark`, `app`."""
        return import_module(getattr(self, part))


METHODS: dict[str, Method] = {
    m.slug: m
    for m in (
        Method(
            "pasta",
            1,
            "PASTA",
            "Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs (ICLR 2024)",
            "2311.02262",
            "Steers a few attention heads towards the words you mark. No training.",
            "Can a model be told where to look?",
            "any causal LM in transformers",
            45,
            built=True,
        ),
        Method(
            "masformer",
            2,
            "MASFormer",
            "Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily at Every Layer "
            "(EMNLP Findings 2023)",
            "2310.12442",
            "Keeps full attention at a few layers and local attention elsewhere.",
            "Which layers need the whole text?",
            "transformers models",
            45,
            built=True,
        ),
        Method(
            "gear",
            3,
            "GEAR",
            "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM (2024)",
            "2403.05527",
            "Stores the KV cache as low-bit codes, a low-rank residual and sparse outliers.",
            "How few bits can memory have?",
            "transformers `Cache` in `generate`",
            45,
            built=True,
        ),
        Method(
            "adalora",
            4,
            "AdaLoRA",
            "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (ICLR 2023)",
            "2303.10512",
            "Fine-tunes with adapters in SVD form whose ranks go where they matter.",
            "Where does fine-tuning need rank?",
            "transformers models, PEFT checkpoints",
            45,
            built=True,
        ),
        Method(
            "losparse",
            5,
            "LoSparse",
            "LoSparse: Structured Compression of Large Language Models based on Low-Rank and Sparse Approximation "
            "(ICML 2023)",
            "2306.11222",
            "Writes each weight matrix as low-rank plus structured-sparse, and really shrinks it.",
            "Which part of a weight matters?",
            "transformers models",
            45,
            built=True,
        ),
        Method(
            "ted",
            6,
            "TED",
            "Less is More: Task-aware Layer-wise Distillation for Language Model Compression (ICML 2023)",
            "2210.01351",
            "Distils layer by layer through filters that keep what the task needs.",
            "What should a student copy?",
            "transformers models, `Trainer`",
            45,
            built=True,
        ),
        Method(
            "adashift",
            7,
            "AdaShift",
            "AdaShift: Decorrelation and Convergence of Adaptive Learning Rate Methods (ICLR 2019)",
            "1810.00143",
            "Adam with a second moment taken from shifted, decorrelated gradients.",
            "Why can Adam walk the wrong way?",
            "`torch.optim.Optimizer`",
            45,
            built=True,
        ),
        Method(
            "r3m",
            8,
            "R3M",
            "Robust Reinforcement Learning from Corrupted Human Feedback (NeurIPS 2024)",
            "2406.15568",
            "Learns a reward while finding the preference labels that are wrong.",
            "What if the annotators lie?",
            "reward models, DPO, TRL data format",
        ),
        Method(
            "ernie",
            9,
            "ERNIE",
            "Robust Multi-Agent Reinforcement Learning via Adversarial Regularization: Theoretical Foundation and "
            "Stable Algorithms (NeurIPS 2023)",
            "2310.10810",
            "Regularises multi-agent policies against adversarial observations.",
            "What if the sensors shake?",
            "PettingZoo parallel environments",
        ),
    )
}


def markdown_table() -> str:
    """The README's table. Methods that do not exist yet say so."""
    rows = ["| no. | method | what it does | plugs into | paper |", "| ---: | --- | --- | --- | --- |"]
    for m in METHODS.values():
        name = f"[{m.title}]({m.notebook})" if m.built else f"{m.title} (to come)"
        paper = f"[{m.paper}](https://arxiv.org/abs/{m.arxiv})"
        rows.append(f"| {m.number} | {name} | {m.sentence} | {m.plugs_into} | {paper} |")
    return "\n".join(rows)


def built() -> list[Method]:
    """The methods that exist in this version, in teaching order."""
    return [m for m in METHODS.values() if m.built]
