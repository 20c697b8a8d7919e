"""GE and RS: entropies by hand, TF-IDF as scikit-learn defines it, sampling of ragged prompts."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import once_a_class
from helpers.evaluation_setting import RECORDS, RandomEdits, evaluate, referred, seconds_apart

from transformer_lens_rome.evaluation import References, TfIdf
from transformer_lens_rome.evaluation.generation import cleaned, fluency, key, ngram_entropy, words
from transformer_lens_rome.prompts.continuations import continue_each, sample_continuations
from transformer_lens_rome.prompts.encoder import Encoder

PROMPTS = ("The best", "In the city of the old tower is", "Cuba is in")


# ---------------------------------------------------------------- sampling


def test_texts_begin_with_their_prompts_and_have_the_length(gpt2):
    encoder = Encoder.of(gpt2)
    texts = sample_continuations(gpt2, PROMPTS, 20, encoder=encoder)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, PROMPTS, strict=True))
    assert len({text[-10:] for text in texts}) == 3
    again = sample_continuations(gpt2, PROMPTS, 20, encoder=encoder)
    assert texts == again != sample_continuations(gpt2, PROMPTS, 20, seed=1)


def test_with_one_choice_sampling_is_greedy(gpt2):
    """Each row goes its own way, whatever stands beside it."""
    encoder = Encoder.of(gpt2)
    together = sample_continuations(gpt2, PROMPTS, 16, top_k=1, encoder=encoder)
    for prompt, found in zip(PROMPTS, together, strict=True):
        ids = list(encoder.row(prompt).ids)
        while len(ids) < 16 + encoder.prepends_bos:
            with torch.no_grad():
                logits = gpt2(torch.tensor([ids]))[0, -1]
            logits[list(encoder.tokenizer.all_special_ids)] = -torch.inf
            ids.append(int(logits.argmax()))
        assert found == encoder.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_group_of_texts_does_not_depend_on_the_others(gpt2):
    """Prompts of other lengths, one longer than its text, and other seeds stand beside it."""
    groups, seeds = [PROMPTS, ("The old tower of the old city " * 4, "It"), PROMPTS[:1]], [3, 5, 3]
    together = continue_each(gpt2, groups, seeds, 20)
    alone = [
        sample_continuations(gpt2, group, 20, seed=seed)
        for group, seed in zip(groups, seeds, strict=True)
    ]
    assert together == alone
    assert alone[0] != sample_continuations(gpt2, PROMPTS, 20, seed=4)  # the control
    encoder = Encoder.of(gpt2)
    assert len(encoder.row(together[1][0]).ids) <= 20 + encoder.prepends_bos  # it is cut


def test_a_prompt_without_tokens_is_refused(gpt2):
    encoder = Encoder.of(gpt2, prepend_bos=False)
    with pytest.raises(ValueError, match="contains no token"):
        sample_continuations(gpt2, ["", "The"], encoder=encoder)


# ---------------------------------------------------------------- GE


def test_entropy_by_hand():
    assert ngram_entropy(["a"]) == 0 and ngram_entropy([]) == 0
    assert ngram_entropy("a a a a".split()) == 0
    five = "a b c d e".split()  # 4 bigrams, 3 trigrams, each once
    assert ngram_entropy(five) == pytest.approx((2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)
    two = "a b a b a".split()  # bigrams ab ba ab ba: 1 bit; trigrams aba bab aba
    h3 = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert ngram_entropy(two) == pytest.approx((2 / 3 * 1 + 4 / 3 * h3) / 2)


def test_words_are_treebanks():
    pytest.importorskip("nltk", reason="the generation extra is not installed")
    assert words("It's John's cat. He didn't go.") == [
        *("It", "'s", "John", "'s", "cat", ".", "He", "did", "n't", "go", "."),
    ]
    assert fluency(["a b c d e", "a a a"]) == pytest.approx(ngram_entropy("a b c d e".split()) / 2)


def test_texts_are_cleaned_as_released():
    assert cleaned("a\n\nb\u00a0c\ufb01") == "a b cfi"


# ---------------------------------------------------------------- RS


DOCUMENTS = ("The cat sat. The cat!", "A dog sat", "the the bird a")


def test_tfidf_by_hand():
    found = TfIdf.fit(DOCUMENTS)
    assert set(found.idf) == {"the", "cat", "sat", "dog", "bird"}  # "a" has one letter
    assert found.idf["the"] == pytest.approx(math.log(4 / 3) + 1)
    assert found.idf["cat"] == pytest.approx(math.log(4 / 2) + 1)
    the, cat, sat = (found.idf[word] for word in ("the", "cat", "sat"))
    length = math.sqrt((2 * the) ** 2 + (2 * cat) ** 2 + sat**2)
    vector = found.vector(DOCUMENTS[0])
    assert vector["cat"] == pytest.approx(2 * cat / length)
    assert sum(value**2 for value in vector.values()) == pytest.approx(1)
    assert found.similarity(DOCUMENTS[0], DOCUMENTS[0]) == pytest.approx(1)
    assert found.similarity("dog", "bird") == 0 == found.similarity("unknown", "words")
    both = found.similarity(DOCUMENTS[0], "cat")
    assert both == pytest.approx(vector["cat"]) and 0 < both < 1


@pytest.fixture
def published(tmp_path):
    """Files with the layout of the authors'."""
    known = TfIdf.fit(DOCUMENTS)
    terms = sorted(known.idf)
    (tmp_path / "tfidf_vocab.json").write_text(json.dumps({t: i for i, t in enumerate(terms)}))
    np.save(tmp_path / "idf.npy", np.array([[known.idf[term] for term in terms]]))
    snippets = [
        {
            "relation_id": relation,
            "target_id": target,
            "samples": [{"name": "x", "text": text} for text in texts],
        }
        for relation, target, texts in (
            ("P1", "Q1", ["The cat sat.", "The dog"]),
            ("P1", "Q2", ["A bird"]),
            ("P2", "Q1", ["not needed"]),
            ("P1", "Q1", ["cat again"]),
        )
    ]
    (tmp_path / "snippets.json").write_text(json.dumps(snippets))
    return tmp_path


def test_the_extract_holds_what_the_records_need(published):
    pytest.importorskip("ijson", reason="the generation extra is not installed")
    weights = TfIdf.load(published / "tfidf_vocab.json", published / "idf.npy")
    assert weights.idf == pytest.approx(TfIdf.fit(DOCUMENTS).idf)
    records = [referred(0, "P1", "Q1"), referred(1, "P1", "Q9")]
    found = References.extract(records, published / "snippets.json", weights)
    assert found.texts == {"P1/Q1": "The cat sat. The dog cat again"}
    assert found.consistency(records[0], ["The cat", "sat"]) == pytest.approx(
        weights.similarity("The cat sat", "The cat sat. The dog cat again")
    )
    assert found.consistency(records[1], ["The cat"]) is None
    assert key(records[0]) == "P1/Q1"
    assert found.digest != References.of({"P1/Q1": "cat"}, weights).digest


@pytest.mark.parametrize("damage", ("{", "[1]", '[{"relation_id": "P1", "target_id": "Q1"}]'))
def test_a_damaged_snippets_file_is_named(published, damage):
    pytest.importorskip("ijson", reason="the generation extra is not installed")
    (published / "bad.json").write_text(damage)
    with pytest.raises(ValueError, match="bad.json is not a snippets file"):
        References.extract([referred(0, "P1", "Q1")], published / "bad.json", TfIdf.fit(DOCUMENTS))


def test_weights_of_another_vocabulary_are_refused(published):
    (published / "tfidf_vocab.json").write_text(json.dumps({"cat": 0}))
    with pytest.raises(ValueError, match="tfidf_vocab.json and .*idf.npy do not fit together"):
        TfIdf.load(published / "tfidf_vocab.json", published / "idf.npy")
    np.save(published / "evil.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="evil.npy is not a complete array of numbers"):
        TfIdf.load(published / "tfidf_vocab.json", published / "evil.npy")


# ---------------------------------------------------------------- in an evaluation


@once_a_class
@pytest.mark.slow
def test_generation_is_part_of_a_run_if_asked_for(gpt2, tmp_path):
    pytest.importorskip("nltk", reason="the generation extra is not installed")
    own = ("The best of times", "Cuba is")
    records = [
        referred(0, "P1", "Q1", generation_prompts=own),
        referred(5, "P1", "Q2", generation_prompts=own),
        RECORDS[0],
    ]
    references = References.of({"P1/Q1": "The best of cities"}, TfIdf.fit(["the best", "times"]))
    known = {"generate": True, "references": references, "out": tmp_path / "run.jsonl"}
    found = evaluate(gpt2, RandomEdits(), records[:2], **known)
    text, other = found.after[0].generation, found.after[5].generation
    assert [text.startswith(p) for text, p in zip(text.texts, own, strict=True)] == [True, True]
    assert text.GE == pytest.approx(fluency(text.texts))
    assert text.RS == pytest.approx(references.consistency(records[0], text.texts))
    assert other.RS is None and "RS" not in found.metrics()[5]  # absent, not zero
    scores = found.scores()
    assert scores["RS"].n == 1 and scores["GE"].n == 2
    assert scores["GE"].mean == pytest.approx(50 * (text.GE + other.GE))
    assert text.texts != other.texts  # each record has its own draws
    assert "GE" in found.table() and "hundredths of bits" in found.table()
    again = evaluate(gpt2, RandomEdits(), records[:2], generate=True, references=references)
    assert seconds_apart(again.after) == seconds_apart(found.after)
    with pytest.raises(ValueError, match="another generate"):
        evaluate(gpt2, RandomEdits(), records[:2], out=tmp_path / "run.jsonl")
    plain = evaluate(gpt2, RandomEdits(), records[2:], generate=True)
    assert len(plain.after[0].generation.texts) == 3  # its prompt and two paraphrases


def test_without_nltk_it_says_which_extra(gpt2, monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ImportError, match=r"\[generation\]"):
        evaluate(gpt2, None, RECORDS[:1], generate=True)


def test_without_ijson_it_says_which_extra(published, monkeypatch):
    monkeypatch.setitem(sys.modules, "ijson", None)
    with pytest.raises(ImportError, match=r"\[generation\]"):
        References.extract([], published / "snippets.json", TfIdf.fit(["a cat"]))
