"""The evaluation items of PASTA (section 5 of the paper, scaled to a small model) and the scorers of free text.

Four sets, written for this project and shipped as JSON. No subject of a test item occurs in profiling.

conflict      an old fact, a new fact that contradicts it, and the start of a sentence; the new fact is marked.
pick          two sentences that answer a question equally well; every prompt comes twice, each sentence marked once.
keyword       a question and the marked wish to use a word that has nothing to do with it.
instructions  a question or a sentence and a marked order: capital letters, JSON or French.

Every prompt marks one span with `*stars*`, read by `zq_lib.pasta.parse`. This module needs the standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

SPLITS = ("profile", "test")
INSTRUCTIONS = ("caps", "json", "french")

_WORD = re.compile(r"[^\W_]+")
_FRENCH = frozenset(
    "le la les l un une des du de et est sont il elle je j vous nous dans que qui pour avec sur ce se pas au".split()
)
_ENGLISH = frozenset("the a an of and is are it he she i you we in that which for with on this not to as be".split())


@dataclass(frozen=True)
class Item:
    """A forced choice: which of two words does the model prefer as the next one?

    prompt      marked text without a final space.
    target      the answer that the marked span asks for, `competitor` the other one; both begin with a space, and
                their first tokens differ.
    paraphrase  the same facts and mark before another wording of the question; empty for pick items.
    """

    name: str
    kind: str
    split: str
    subjects: tuple[str, ...]
    prompt: str
    target: str
    competitor: str
    paraphrase: str = ""


@dataclass(frozen=True)
class Keyword:
    """A question for the chat template whose answer must include `keyword`.

    kept       words of which a sensible answer has at least one; none of them stands in the prompt.
    reference  an answer that has both, for profiling by mean log-probability; empty in the test split.
    """

    name: str
    split: str
    prompt: str
    keyword: str
    kept: tuple[str, ...]
    reference: str = ""


@dataclass(frozen=True)
class Instruction:
    """An order for the chat template. A right answer has at least one of the words `kept` (for JSON: as a value)."""

    name: str
    kind: str
    prompt: str
    kept: tuple[str, ...]

    def followed(self, answer: str) -> bool:
        """Whether the form is right, whatever the content."""
        return {"caps": all_caps, "json": is_json, "french": is_french}[self.kind](answer)

    def answered(self, answer: str) -> bool:
        """Whether the form is right and the content is there."""
        if self.kind == "json":
            return any(json_holds(answer, value) for value in self.kept)
        return self.followed(answer) and keeps(answer, self.kept)


@cache
def _read(name: str) -> dict[str, Any]:
    return json.loads((files("zq_lib.pasta") / "data" / f"{name}.json").read_text(encoding="utf-8"))


def _splits(split: str | None) -> tuple[str, ...]:
    if split is None:
        return SPLITS
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not known; choose 'profile', 'test' or None for both")
    return (split,)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def conflict(split: str | None = None) -> list[Item]:
    """90 knowledge conflicts (24 profile, 66 test): `target` is the new fact's answer, `competitor` the old one's."""
    data = _read("conflict")
    items = []
    for part in _splits(split):
        for kind, family in data["kinds"].items():
            for subject, old, new in family[part]:
                was = family["was"].format(subject=subject, answer=old)
                now = family["now"].format(subject=subject, answer=new)
                prompt, paraphrase = (
                    data["frame"].format(was=was, now=now, prompt=_capital(family[key].format(subject=subject)))
                    for key in ("prompt", "paraphrase")
                )
                items.append(
                    Item(f"{kind}/{subject}", kind, part, (subject,), prompt, f" {new}", f" {old}", paraphrase)
                )
    return items


def pick(split: str | None = None) -> list[Item]:
    """180 items (48 profile, 132 test): 90 prompts, each with the first and then with the second sentence marked."""
    data = _read("pick")
    items = []
    for part in _splits(split):
        for kind, family in data["kinds"].items():
            for first_name, first, second_name, second in family[part]:
                one = family["sentence"].format(name=first_name, answer=first)
                two = family["sentence"].format(name=second_name, answer=second)
                name, subjects = f"{kind}/{first_name}-{second_name}", (first_name, second_name)
                for marked, sentences, target, competitor in (
                    ("first", (f"*{one}*", two), first, second),
                    ("second", (one, f"*{two}*"), second, first),
                ):
                    prompt = data["frame"].format(first=sentences[0], second=sentences[1], question=family["question"])
                    items.append(Item(f"{name}/{marked}", kind, part, subjects, prompt, f" {target}", f" {competitor}"))
    return items


def keywords(split: str | None = None) -> list[Keyword]:
    """32 questions (12 profile with a reference answer, 20 test); no keyword and no question is in both splits."""
    data = _read("keyword")
    return [
        Keyword(
            name=f"keyword/{keyword}",
            split=part,
            prompt=f"{question} *{data['instruction'].format(keyword=keyword)}*",
            keyword=keyword,
            kept=tuple(kept),
            reference="".join(reference),
        )
        for part in _splits(split)
        for question, keyword, kept, *reference in data[part]
    ]


def instructions(kind: str) -> list[Instruction]:
    """14 prompts of one kind: `caps`, `json` or `french`."""
    if kind not in INSTRUCTIONS:
        raise ValueError(f"kind={kind!r} is not known; choose one of {', '.join(INSTRUCTIONS)}")
    return [
        Instruction(f"{kind}/{number}", kind, prompt, tuple(kept))
        for number, (prompt, kept) in enumerate(_read("instructions")[kind], 1)
    ]


def has_word(text: str, word: str) -> bool:
    """Whether `word` stands in `text` as a whole word, in any case: "Teas" has no "tea"."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def keeps(text: str, words: Iterable[str]) -> bool:
    """Whether `text` has at least one of the words that an answer to its question would have.

    A cheap check in the answer's favour: it asks for the topic, not for truth.
    """
    return any(has_word(text, word) for word in words)


def repeated_bigrams(text: str) -> float:
    """Share of word pairs that occurred before in `text`: 0 without repetition, near 1 in a loop."""
    words = _WORD.findall(text.lower())
    pairs = list(zip(words, words[1:], strict=False))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def all_caps(text: str, share: float = 0.9) -> bool:
    """Whether at least `share` of the cased letters are capitals; a text without letters is not."""
    letters = [letter for letter in text if letter.isupper() or letter.islower()]
    return bool(letters) and sum(letter.isupper() for letter in letters) >= share * len(letters)


def json_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in `text`, whatever stands around it, or None."""
    for brace in re.finditer(r"\{", text):
        try:
            return json.JSONDecoder().raw_decode(text, brace.start())[0]
        except ValueError:
            continue
    return None


def is_json(text: str) -> bool:
    """Whether `text` has a JSON object that is not empty."""
    return bool(json_object(text))


def json_holds(text: str, value: str) -> bool:
    """Whether one of the values of the first JSON object, at any depth, has the word `value`."""

    def strings(node: Any) -> Iterable[str]:
        if isinstance(node, dict | list):
            for child in node.values() if isinstance(node, dict) else node:
                yield from strings(child)
        else:
            yield str(node)

    return any(has_word(string, value) for string in strings(json_object(text) or {}))


def is_french(text: str) -> bool:
    """Whether `text` has at least two French function words, and more of them than of English ones."""
    words = _WORD.findall(text.lower())
    french, english = (sum(word in known for word in words) for known in (_FRENCH, _ENGLISH))
    return french >= 2 and french > english
