"""What the GEAR page can be set to, and what each setting weighs. No model and nothing of a page."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from transformers import PretrainedConfig

from zq_lib.gear import PRESETS, GearConfig
from zq_lib.gear.cache import GearLayer
from zq_lib.gear.measure import PROMPT, TEXTS
from zq_lib.gear.view import NAME

LAYERS, HEADS, WIDTH = 30, 3, 64  # of the page's model
STEPS = 128  # scored tokens; the library's own protocol takes 192
LATER = 256  # tokens that the growth of the cache is followed for
EVERY = 4  # tokens between two points of it
LONG = 256  # tokens of a prompt's segment, also where the buffer is too long for the library's own rule
MOST_NEW, MOST_CHARACTERS = 48, 300
SIDES = ("keys", "values")
BEGINS = {
    "reasoning": "Question: A bakery sells rolls in bags of 6 and loaves one by one.",
    "technical": 'The "assert" statement',
    "scripture": "In the beginning God created the heaven and the earth.",
    "encyclopedia": "In May 1983, she married Nikos Karvelas, a composer",
}
MORE = {  # what follows the first PROMPT tokens of a text, so that its answer needs them
    "reasoning": ". After how many minutes is the tank full?\nAnswer: Let us work it out step by step.",
    "technical": " the syntax definitions.)\n\nIn short, the assert statement is",
    "scripture": " light upon the earth.\n\nAnd the evening and the morning were the first day. In the beginning",
    "encyclopedia": ".\n\nQuestion: Whom did she marry?\nAnswer: In May 1983, she married",
}
WHOLE = {"group": (16, 32, 64, 128), "buffer": (16, 32, 64, 128)}
LIMITS = {
    "rank": 16, "rank_decode": 16, "sinks": 4, "layer": LAYERS - 1, "head": HEADS - 1, "new_tokens": MOST_NEW,
}  # fmt: skip
CONFIGS = {
    **{name: PRESETS[name]() for name in ("paper_2bit", "lite", "small", "balanced", "near_lossless")},
    **{f"plain {bits} bit": GearConfig.plain(bits) for bits in (2, 3, 4, 8)},
}
PLAIN = {  # what plain quantisation offers between 2.5 and 8.5 bits
    "plain 2 bit": GearConfig.plain(2),
    "plain K3 V2": GearConfig.plain((3, 2)),
    "plain 3 bit": GearConfig.plain(3),
    "plain K4 V3": GearConfig.plain((4, 3)),
    "plain 4 bit": GearConfig.plain(4),
    "plain 8 bit": GearConfig.plain(8),
}


@dataclass(frozen=True)
class Settings:
    """What the controls say. Up to `factor_bits` they are the library's. The text goes on with `more`, by default
    MORE's, and then with the answer; `side`, `layer` and `head` choose the map."""

    key_bits: int = 2
    value_bits: int = 2
    scheme: str = "kivi"
    group: int = 64
    key_outliers: float = 0.02
    value_outliers: float = 0.02
    rank: int = 4
    rank_decode: int = 2
    buffer: int = 64
    sinks: int = 0
    clip: bool = False
    factor_bits: int = 16
    text: str = "encyclopedia"
    more: str = ""
    new_tokens: int = 24
    side: str = "values"
    layer: int = 10
    head: int = 0

    def __post_init__(self) -> None:
        for name, allowed in {"text": TEXTS, "side": SIDES, **WHOLE}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not offered here; choose one of {', '.join(map(str, allowed))}"
                )
        for name, most in LIMITS.items():
            low = 1 if name == "new_tokens" else 0
            if not low <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range; choose {low} to {most}")
        for name in ("key_outliers", "value_outliers"):
            if not 0 <= getattr(self, name) <= 0.05:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is out of range; choose 0 to 0.05, a share of every vector"
                )
        if not self.more:
            object.__setattr__(self, "more", MORE[self.text])
        if len(self.more) > MOST_CHARACTERS:
            raise ValueError(
                f"more has {len(self.more)} characters, over the {MOST_CHARACTERS} this page takes; shorten it"
            )
        _ = self.config

    @property
    def config(self) -> GearConfig:
        """The library's settings. Raises ValueError where it would."""
        return GearConfig(
            bits=_pair(self.key_bits, self.value_bits),
            outliers=_pair(self.key_outliers, self.value_outliers),
            scheme=self.scheme, group=self.group, rank=self.rank, rank_decode=self.rank_decode,
            buffer=self.buffer, sinks=self.sinks, clip=self.clip,
            factor_bits=self.factor_bits, prompt_segment=LONG if 4 * self.buffer > LONG else None,
        )  # fmt: skip

    @classmethod
    def of(cls, preset: str, **more: Any) -> Settings:
        """A preset of `CONFIGS` on this page."""
        gear = CONFIGS[preset]
        shared = {f.name for f in fields(cls)} & {f.name for f in fields(gear)}
        sides = {
            f"{side}_{name}": value
            for name in ("bits", "outliers")
            for side, value in zip(("key", "value"), gear.pair(name), strict=True)
        }
        return cls(**{**sides, **{n: getattr(gear, n) for n in shared}, **more})

    @property
    def preset(self) -> str | None:
        """The name in `CONFIGS` of these settings, if they have one."""
        return next((name for name, gear in CONFIGS.items() if gear == self.config), None)

    def python(self) -> str:
        """A program that measures these settings and gives the compressed answer."""
        more = "\n".join(f"    {part!r}" for part in re.findall(r".{1,70}(?:\s|$)|.{1,70}", self.more, re.DOTALL))
        return (
            "import torch\n\n"
            "from zq_lib import gear\n"
            "from zq_lib.core.models import load\n"
            "from zq_lib.gear import measure\n\n"
            "model, tokenizer = load()\n"
            f"setting = {expression(self.config)}\n"
            f"text = measure.texts(tokenizer, {PROMPT + STEPS})[{self.text!r}]\n"
            f"print(measure.teacher_forced(model, text, setting, steps={STEPS}).row())\n\n"
            f"more = (\n{more}\n)\n"
            f"memory = text[:, :{PROMPT}]\n"
            "prompt = torch.cat([memory, tokenizer(more, return_tensors='pt').input_ids], 1)\n"
            "cache = gear.GearCache(model.config, setting)\n"
            "with torch.no_grad():\n"
            "    model(memory, past_key_values=cache)  # read once, kept compressed\n"
            f"options = dict(do_sample=False, max_new_tokens={self.new_tokens})\n"
            "output = model.generate(prompt, past_key_values=cache, **options)\n"
            "print(tokenizer.decode(output[0, prompt.shape[1]:], skip_special_tokens=True))\n"
            "print(cache.report())\n"
        )


def _pair(keys: Any, values: Any) -> Any:
    return keys if keys == values else (keys, values)


def expression(gear: GearConfig) -> str:
    """The shortest Python that makes these settings."""
    for name in PRESETS:
        if PRESETS[name]() == gear:
            return f"gear.PRESETS[{name!r}]()"
    if GearConfig.plain(gear.bits) == gear:
        return f"gear.GearConfig.plain({gear.bits!r})"
    changed = {f.name: getattr(gear, f.name) for f in fields(gear) if getattr(gear, f.name) != f.default}
    return f"gear.GearConfig({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


@dataclass(frozen=True)
class Weight:
    """What a cache weighs, from the prompt on. `parts` are bytes by component after the prompt, `bits` those of a
    compressed element of it, `growth` (tokens, bytes) while the text goes on token by token."""

    parts: dict[str, int]
    bits: float
    growth: list[list[int]]

    @property
    def bytes(self) -> int:
        """After the prompt."""
        return sum(self.parts.values())

    @property
    def ratio(self) -> float:
        """How many times smaller than 16 bits after the prompt."""
        return dense_bytes(PROMPT) / self.bytes


def dense_bytes(tokens: int) -> int:
    """Bytes of so many tokens in 16 bits."""
    return 2 * 2 * LAYERS * HEADS * WIDTH * tokens


@lru_cache(maxsize=256)
def weigh(gear: GearConfig) -> Weight:
    """Sizes do not depend on what is stored, so one layer with random numbers is filled, and counted for all."""
    layer = GearLayer(gear, PretrainedConfig(attn_implementation=NAME))
    numbers = torch.randn(1, HEADS, PROMPT + LATER, WIDTH, generator=torch.Generator().manual_seed(0))
    growth, at, sizes = [], 0, []
    for stop in range(PROMPT, PROMPT + LATER + 1, EVERY):
        layer.update(numbers[:, :, at:stop], numbers[:, :, at:stop])
        sizes.append(layer.nbytes())
        if not at:
            packed = 2 * HEADS * WIDTH * sum(block.length for block in layer.blocks)
        growth.append([stop, LAYERS * sum(sizes[-1].values())])
        at = stop
    bits = 8 * (sum(sizes[0].values()) - sizes[0]["exact"]) / packed
    return Weight({name: LAYERS * size for name, size in sizes[0].items() if size}, bits, growth)
