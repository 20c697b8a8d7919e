"""What is written, what is asked, and which data and settings are refused."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import make_model
from helpers.editor_setting import OTHERS, REQUEST

from transformer_lens_rome import EditRequest, get_method
from transformer_lens_rome.methods import Training
from transformer_lens_rome.methods.hypernetworks.training_data import (
    Corpus,
    fact_digest,
    split,
    to_sample,
)
from transformer_lens_rome.prompts.encoder import Encoder

FACTS = [EditRequest("{} is in", name, "Rome") for name in ("Paris", "Berlin", "London")]


@pytest.fixture(params=("gpt2", "gemma3"))
def encoder(request, model_class, tokenizer, bos_tokenizer):
    """Without BOS, and with it."""
    own = bos_tokenizer if request.param == "gemma3" else tokenizer
    return Encoder.of(make_model(model_class, request.param, own))


def corpus(encoder, facts, n_labels=None, *, crop=True):
    return Corpus.of(encoder, facts, OTHERS, n_labels, 5, crop=crop)


@pytest.mark.parametrize("fact", (REQUEST, OTHERS[0], "a b c d e"), ids=("request", "text", "odd"))
def test_crops_leave_at_least_half_of_the_prompt(encoder, fact):
    data = corpus(encoder, [fact], 2)
    (inner,), bos = data.samples, int(encoder.prepends_bos)
    given = len(inner.ids) - inner.n_labels - bos
    generator, dropped = torch.Generator().manual_seed(0), Counter()
    for _ in range(600):
        item = data.item(generator, 1)
        n = len(inner.ids) - len(item.outer.ids)
        assert item.inner == inner and item.outer.n_labels == inner.n_labels
        assert item.outer.ids == inner.ids[:bos] + inner.ids[bos + n :]
        dropped[n] += 1
    assert set(dropped) == set(range(given // 2 + 1)) and given > 2
    assert max(dropped.values()) < 2 * min(dropped.values())  # each as likely as another
    whole = corpus(encoder, [fact], 2, crop=False).item(generator, 1)
    assert whole.outer == whole.inner == inner


def test_labels_are_the_last_tokens(encoder):
    whole, two = to_sample(encoder, REQUEST, None), to_sample(encoder, REQUEST, 2)
    text = f"{REQUEST.text} {REQUEST.target_new}"
    assert list(whole.ids) == [encoder.bos_id] * encoder.prepends_bos + encoder.ids(text)
    target = encoder.ids(f" {REQUEST.target_new}")
    assert whole.labels.tolist() == target and two.labels.tolist() == target[-2:]
    assert two.ids == whole.ids and whole.inputs == whole.ids[:-1]
    assert [whole.ids[p + 1] for p in whole.at] == target  # said from the position before
    assert to_sample(encoder, REQUEST, 1000) == whole
    plain = to_sample(encoder, text, 2)
    assert plain == two
    record = type("Record", (), {"request": REQUEST})()
    assert to_sample(encoder, record, None) == whole


def test_a_given_sample_and_its_others(encoder):
    data = corpus(encoder, FACTS)
    generator = torch.Generator().manual_seed(0)
    assert [data.item(generator, 1, sample=i).inner for i in range(3)] == data.samples
    assert {data.item(generator, 1).inner for _ in range(60)} == set(data.samples)
    item = data.item(generator, 40)
    assert len(item.others) == 40 and set(item.others) == set(data.others)
    assert all(len(ids) <= 5 for ids in data.others) and max(map(len, data.others)) == 5


def test_the_last_tenth_is_for_validation():
    data = [f"text {i}" for i in range(25)]
    assert split(data) == (data[:23], data[23:])
    assert split(data[:5]) == (data[:4], data[4:5])
    assert split(data[:4], data[4:]) == (data[:4], data[4:])


def test_a_fact_is_known_by_its_prompt():
    again = EditRequest("{} is in", "Paris", "Spain")
    record = type("Record", (), {"request": again})()
    assert fact_digest(again) == fact_digest(FACTS[0]) == fact_digest(record)
    assert fact_digest(FACTS[0]) == fact_digest("Paris is in") != fact_digest(FACTS[1])
    # duplicates at the end are dropped, and refused where someone chose them
    train, last = split([again, *FACTS[1:], *["x"] * 17, FACTS[0], "y"])
    assert last == ["y"] and again in train
    with pytest.raises(ValueError, match="1 validation facts are among the data"):
        split([again, FACTS[1]], [FACTS[0], FACTS[2]])


@pytest.mark.parametrize(
    ("data", "validation"),
    [([], None), (["a"], None), (["a", "a"], None), (["a"], []), ([], ["a"])],
)
def test_too_few_data_are_refused(data, validation):
    with pytest.raises(ValueError, match="at least two different"):
        split(data, validation)


@pytest.mark.parametrize(
    ("known", "complaint"),
    [
        ({"data": ["Rome is in Italy.", "No.", "It is."]}, "tokens, too few for 10 labels"),
        ({"data": [*OTHERS, 5]}, "got a int"),
        ({"data": FACTS, "locality": []}, "two different facts or texts"),
        ({"data": FACTS, "locality": ["", " "]}, "pass locality="),
        ({"data": OTHERS, "settings": Training(lr=1e-4)}, "a text has no target"),
        ({"data": FACTS, "settings": Training(lr=1e-4, layers=(7,))}, "out of range"),
    ],
    ids=("short", "no text", "none", "empty", "no target", "layer"),
)
def test_unfit_data_are_refused_before_any_work(gpt2, known, complaint, tmp_path):
    out = tmp_path / "editor"
    with pytest.raises(ValueError, match=complaint):
        get_method("mend").fit(gpt2, **{"locality": OTHERS, "out": out, "progress": False} | known)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"lr": 0.0, "accumulate": 0}, "lr, accumulate must be positive"),
        ({"n_locality": -1}, "n_locality must be positive"),
        ({"validate_every": 15}, "multiple of accumulate"),
        ({"max_steps": 4_999}, "less than validate_every"),
    ],
)
def test_bad_settings_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        Training(**{"lr": 1e-4} | settings)
