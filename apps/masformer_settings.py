"""What the MASFormer page can be set to, and what each plan costs by count. No model and nothing of a page."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from apps.masformer_text import story
from zq_lib.masformer import SpanPlan, placement, receptive_field, shipped

LAYERS, HEADS, KV_HEADS, WIDTH, CHANNELS, VOCABULARY = 30, 9, 3, 64, 576, 49152  # of the page's model
DENSE = 3_540_096  # weights of one of its layers
ITEMSIZE = 4  # bytes of a number: the model runs in 32 bits
PLACES = ("profiled", "bottom", "top", "even", "none")
KINDS = ("window", "block")
LENGTHS = (("512", 512), *((f"{k}k", 1024 * k) for k in (1, 2, 4, 8, 32)))  # as the page calls them
LIMITS = {"window": (4, 512), "sinks": (0, 16), "length": (64, 32768), "words": (150, 1550)}
CODE = re.compile(r"[0-9]{3,8}")
NEEDLE = "The secret number of this document is {code}. Keep it in mind."
QUESTION = "\nThe secret number of this document is "
LEAST_TOKENS, MOST_TOKENS, MOST_CHARACTERS = 200, 1800, 12_000


def layers_of(place: str, count: int) -> tuple[int, ...]:
    """The `count` layers that stay full under one of PLACES. Raises ValueError for another name or count."""
    if place not in PLACES:
        raise ValueError(f"placement={place!r} is not offered here; choose one of {', '.join(PLACES)}")
    if place == "profiled":
        return shipped().choose(count)
    return () if place == "none" else placement(place, LAYERS, count)


def place_of(full: tuple[int, ...]) -> str | None:
    """The name in PLACES of these layers, if they have one."""
    if not full:
        return "none"
    return next((name for name in PLACES[:-1] if layers_of(name, len(full)) == full), None)


@dataclass(frozen=True)
class Settings:
    """What the controls say: the plan, the length of the text that its price is counted for, and the question.

    `document` "" is the page's story, cut to `words`; the code stands at `depth`, from 0 (start) to 1.
    """

    full: tuple[int, ...] = field(default_factory=lambda: layers_of("profiled", 8))
    window: int = 64
    kind: str = "window"
    sinks: int = 4
    length: int = 8192
    words: int = 450
    document: str = ""
    code: str = "482913"
    depth: float = 0.2

    def __post_init__(self) -> None:
        if isinstance(self.full, list | tuple):
            object.__setattr__(self, "full", tuple(sorted(set(self.full))))
        for name, (low, most) in LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= most:
                raise ValueError(f"{name}={value!r} is out of range; choose a whole number from {low} to {most}")
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not offered here; choose one of {', '.join(KINDS)}")
        if not isinstance(self.code, str) or not CODE.fullmatch(self.code):
            raise ValueError(f"code={self.code!r} is no pass code; give 3 to 8 digits, for example 482913")
        if not isinstance(self.depth, int | float) or not 0 <= self.depth <= 1:
            raise ValueError(f"depth={self.depth!r} is out of range; choose 0 (start of the document) to 1 (its end)")
        if len(self.document) > MOST_CHARACTERS:
            raise ValueError(
                f"document has {len(self.document)} characters, more than the {MOST_CHARACTERS} this page takes; "
                "shorten it"
            )
        if self.document.strip() == story(self.words):
            object.__setattr__(self, "document", "")
        _ = self.plan

    @property
    def plan(self) -> SpanPlan:
        """The library's plan. Raises ValueError where it would."""
        return SpanPlan.mixed(LAYERS, full=self.full, span=self.window, kind=self.kind, sinks=self.sinks)

    @property
    def label(self) -> str:
        """What the page calls the plan."""
        if len(self.full) == LAYERS:
            return "every layer full"
        where = f"{place_of(self.full) or 'own choice of'} {len(self.full)}" if self.full else "all local"
        local = ", blocks" if self.kind == "block" else ""
        return f"{where}{local}{'' if self.sinks else ', no sinks'}"

    @property
    def text(self) -> str:
        """The document with the code in it, between two sentences, or between two words where there is one sentence."""
        text = self.document.strip() or story(self.words)
        breaks = [m.end() for m in re.finditer(r"(?<=[.!?])\s+", text)] or [m.end() for m in re.finditer(r"\s+", text)]
        at = min([0, *breaks, len(text)], key=lambda place: abs(place - self.depth * len(text)))
        parts = text[:at].rstrip(" "), NEEDLE.format(code=self.code), text[at:].lstrip(" ")
        return " ".join(part for part in parts if part).replace("\n ", "\n")

    def python(self) -> str:
        """A program that asks the model for the code under this plan and prints its price."""
        if self.full == layers_of("profiled", len(self.full)):
            how = f"masformer.shipped().plan({len(self.full)}, span={self.window}"
        else:
            how = f"masformer.SpanPlan.mixed({LAYERS}, full={self.full}, span={self.window}"
        if self.document:
            text = "(\n" + "\n".join(f"    {part!r}" for part in _pieces(self.text + QUESTION)) + "\n)"
        else:
            text = (
                f"Settings(words={self.words}, code={self.code!r}, depth={self.depth:g}).text\n"
                f"text += {QUESTION!r}"
            )  # fmt: skip
        return (
            ("" if self.document else "from apps.masformer_settings import Settings\n")
            + "from zq_lib import masformer\n"
            "from zq_lib.core.models import load\n\n"
            f"plan = {how}, kind={self.kind!r}, sinks={self.sinks})\n"
            f"print(plan.cost({self.length}).share)  # score entries, of full attention's\n"
            f"print(plan.speedup({self.length}, {CHANNELS}, {VOCABULARY}, {DENSE}))\n\n"
            f"text = {text}\n"
            "model, tokenizer = load()\n"
            "inputs = tokenizer(text, return_tensors='pt')\n"
            "with masformer.attach(model, plan):\n"
            "    cache = masformer.SpanCache(plan)\n"
            f"    options = dict(do_sample=False, max_new_tokens={len(self.code)})\n"
            "    output = model.generate(**inputs, past_key_values=cache, **options)\n"
            "print(tokenizer.decode(output[0, inputs.input_ids.shape[1]:]), cache.nbytes())\n"
        )


def _pieces(text: str) -> list[str]:
    return re.findall(r".{1,70}(?:\s|$)|.{1,70}", text, re.DOTALL)


@dataclass(frozen=True)
class Price:
    """What a plan costs on a text of `length` tokens, by count. Gains are of FLOP, against full attention."""

    length: int
    score_entries: float  # per head, all layers
    full_score_entries: int
    cache_bytes: int
    full_cache_bytes: int
    attention_share: float  # of the full model's FLOP
    attention_gain: float
    whole_gain: float
    reached: int  # tokens that can change the last one's final state


def price(plan: SpanPlan, length: int) -> Price:
    """Count."""
    cost, gain = plan.cost(length), plan.speedup(length, CHANNELS, VOCABULARY, DENSE)
    return Price(
        length, cost.total, cost.full, plan.kv_bytes(length, KV_HEADS, WIDTH, ITEMSIZE),
        2 * LAYERS * length * KV_HEADS * WIDTH * ITEMSIZE, gain.attention_share, gain.attention, gain.end_to_end,
        int(receptive_field(plan, length)[0].sum()),
    )  # fmt: skip
