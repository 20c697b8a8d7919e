"""RippleEdits: records from sentences, conditions, and tests of written answers."""

from __future__ import annotations

import copy
import json

import pytest
from helpers.evaluation_setting import RandomEdits, assert_alike, seconds_apart

from transformer_lens_rome.evaluation import (
    Results,
    RippleEdits,
    WrittenScore,
    evaluate_benchmark,
    get_benchmark,
)
from transformer_lens_rome.evaluation.ripple import has_condition_met, ripple_metrics
from transformer_lens_rome.evaluation.ripple_records import TEMPLATES, Query, request_of
from transformer_lens_rome.prompts.continuations import greedy_continuations
from transformer_lens_rome.prompts.encoder import Encoder


def query(prompt, *answers):
    listed = [{"value": first, "aliases": list(rest)} for first, *rest in answers]
    return {"prompt": prompt, "answers": listed, "relation": "X"}


def case(queries, conditions=(), how="OR"):
    return {"test_queries": queries, "condition_queries": list(conditions), "test_condition": how}


def item(**tests):
    edit = {
        "prompt": "The name of the mother of Ida is Lea.",
        "relation": "MOTHER",
        "original_fact": {"prompt": "The name of the mother of Ida is Eva."},
    }
    empty = dict.fromkeys(get_benchmark("rippleedits").kinds, [])
    criteria = {kind: [] for kind in empty if "condition" not in kind and kind != "rewrite"}
    return {"edit": edit, **criteria, **tests}


TESTED = {
    "Relation_Specificity": [case([query("Ida is", ("Ida",))], [query("Ida was", ("was", "no"))])],
    "Compositionality_I": [
        case([query("Lea is", ("zzz",)), query("Eva is", ("Eva",))], [query("Eva", ("zzz",))]),
        case([query("Lea is", ("zzz",)), query("Eva is", ("Eva",))], [], "OR"),
        case([query("Lea is", ("zzz",)), query("Eva is", ("Eva",))], [], "AND"),
    ],
}


@pytest.fixture
def path(tmp_path):
    def write(*items):
        path = tmp_path / "ripple.json"
        path.write_text(json.dumps(items))
        return path

    return write


def test_sentences_become_requests(path):
    (record,) = RippleEdits.load(path(item(**TESTED)))
    request = record.request
    assert (request.prompt, request.subject) == ("The name of the mother of {} is", "Ida")
    assert (request.target_new, request.target_true) == ("Lea", "Eva")
    assert list(record.tests) == ["Compositionality_I", "Relation_Specificity"]
    assert [test.all_of for test in record.tests["Compositionality_I"]] == [False, False, True]
    found = request_of("FOLLOWS", "What is to come follows a.", "What is to come follows b.")
    assert found.subject == "What is to come"
    assert (
        request_of(
            "MOTHER",
            f"{TEMPLATES['MOTHER']} is Lea.".format("What"),
            f"{TEMPLATES['MOTHER']} Eva.".format("What"),
        ).target_new
        == "is Lea"
    )


@pytest.mark.parametrize(
    ("relation", "new", "true", "words"),
    [
        ("NOTHING", "a is b.", "a is c.", "no template of the relation 'NOTHING'"),
        ("FOLLOWS", "a precedes b.", "a precedes c.", "0 subjects fit the template"),
        ("FOLLOWS", "a follows b follows c.", "a follows b follows d.", "2 subjects fit"),
        ("FOLLOWS", "a follows b.", "c follows d.", "0 subjects fit"),  # another subject
        ("FOLLOWS", "a follows b", "a follows c.", "0 subjects fit"),
        ("FOLLOWS", " follows b.", " follows c.", "0 subjects fit"),
    ],
)
def test_a_sentence_without_a_subject_is_named(relation, new, true, words):
    with pytest.raises(ValueError, match=words):
        request_of(relation, new, true)


def without(part, name):
    return {key: value for key, value in part.items() if key != name}


GOOD = case([query("Ida is", ("Ida",))])


@pytest.mark.parametrize(
    ("test", "words"),
    [
        (case([query("Ida is")]), r"RS\[0\]: answers: there are none to 'Ida is'"),
        (case([query("Ida is", ("a",))]), "answers: 'a' has one character"),
        (case([{"prompt": "a b", "answers": [{"value": "ab"}]}]), "aliases: it is missing"),
        (case([query("Ida is", ("ab", ""))]), "aliases: not all are texts"),
        (case([query("Ida is", ("ab", 3))]), "aliases: not all are texts"),
        (case([query("Ida is", ("",))]), "value: it is empty"),
        (case([query("", ("ab",))]), "prompt: it is empty"),
        (case([]), "test_queries: it is empty"),
        (case([3]), "a query is a int"),
        (case([query("a b", ("ab",))], [query("a b")]), "answers: there are none"),
        (case([query("a b", ("ab",))], how="XOR"), "test_condition: it is 'XOR'"),
        (without(GOOD, "condition_queries"), "condition_queries: it is missing"),
        ("test", "it is a str"),
    ],
)
def test_an_invalid_test_is_left_out_and_named(path, test, words):
    words = words.replace("RS", "Relation_Specificity")
    file = path(item(Relation_Specificity=[test, GOOD]))
    found = RippleEdits.load(file)
    assert len(found[0].tests["Relation_Specificity"]) == 1 and len(found.skipped) == 1
    with pytest.raises(ValueError, match=words):
        RippleEdits.load(file, strict=True)
    with pytest.raises(ValueError, match="record 0: it has no test"):
        RippleEdits.load(path(item(Relation_Specificity=[test])))


def test_an_invalid_record_is_named(path):
    bad = [copy.deepcopy(item(**TESTED)) for _ in range(3)]
    bad[0]["edit"]["relation"] = "FATHER"
    del bad[1]["edit"]["original_fact"]
    del bad[2]["Subject_Aliasing"]
    found = RippleEdits.load(path(*bad, 7, item(**TESTED)))
    reasons = [text.split(": ", 1) for text in found.skipped]
    assert [name for name, _ in reasons] == [f"record {i}" for i in range(4)]
    for words, (_, text) in zip(
        ("edit: 0 subjects", "edit.original_fact: it is missing", "Subject_Aliasing", "a int"),
        reasons,
        strict=True,
    ):
        assert words in text
    assert [record.case_id for record in found] == [4]


def test_answers_are_found_by_name_or_alias():
    both = Query("The capitals are", (("Rome", "Roma"), ("Paris",)))
    assert both.answered_by("The capitals are Roma and Paris")
    assert not both.answered_by("The capitals are Rome and roma")
    assert not both.answered_by("paris, Rome")  # letters count, as released


def scores(took, **passed):
    """By criterion, pairs of a test's outcome and its condition's."""
    found = {"rewrite": [WrittenScore(["a"], took)]}
    for kind, pairs in passed.items():
        found[kind] = [WrittenScore([], test) for test, _ in pairs]
        found[f"{kind}, condition"] = [WrittenScore([], known) for _, known in pairs]
    return found


def test_metrics_by_hand():
    pairs = [(True, True), (False, True), (True, False)]
    before = scores(False, Compositionality_I=pairs, Relation_Specificity=[(True, False)])
    assert ripple_metrics(before, before) == {"EA": 0.0, "CI": 0.5, "met": 0.5}
    other = {"Compositionality_I": [(True, None)] * 3, "Relation_Specificity": [(True, None)]}
    after = {kind: some for kind, some in scores(True, **other).items() if "cond" not in kind}
    assert ripple_metrics(after, before) == {"EA": 1.0, "CI": 1.0, "met": 0.5}
    failed = after | {"rewrite": [WrittenScore([""], False)]}
    assert ripple_metrics(failed, before) == {"EA": 0.0, "met": 0.5}
    assert has_condition_met(before)
    assert not has_condition_met(scores(True, Relation_Specificity=[(True, False)]))


def test_tests_are_scored_on_the_models_own_words(gpt2, path, tmp_path):
    records = RippleEdits.load(path(item(**TESTED), item(**TESTED)))
    out = tmp_path / "run" / "random.jsonl"
    run = {"options": {"n_tokens": 4}, "out": out, "progress": False}
    found = evaluate_benchmark(gpt2, "rippleedits", records, RandomEdits(), **run)
    row = found.before[0].scores
    assert [one.passed for one in row["Compositionality_I"]] == [True, True, False]
    assert [one.passed for one in row["Compositionality_I, condition"]] == [False, True, True]
    assert [one.passed for one in row["Relation_Specificity"]] == [True]  # the prompt has "Ida"
    expected = greedy_continuations(gpt2, ["Lea is", "Eva is"], 4)
    assert row["Compositionality_I"][0].texts == expected
    after = found.after[0].scores
    assert "Compositionality_I, condition" not in after
    assert after["Compositionality_I"][0].texts != expected
    assert found.metrics(edited=False)[0]["CI"] == 0.5 and not found.failed
    assert "Numbers of records: unedited: EA 2, CI 2, RS 2, met 2" in found.table()
    loaded = Results.load(out)
    assert loaded.table() == found.table() and loaded.after == found.after
    alone = evaluate_benchmark(
        gpt2, "rippleedits", records, RandomEdits(), **run | {"out": None, "batch_size": 2}
    )
    assert_alike(seconds_apart(alone.after), seconds_apart(found.after))
    strict = run["options"] | {"in_prompt": False}
    other = evaluate_benchmark(gpt2, "rippleedits", records, None, options=strict, progress=False)
    assert not other.before[0].scores["Relation_Specificity"][0].passed


def test_tests_are_asked_only_if_a_condition_is_met(gpt2, path):
    unmet = {"Relation_Specificity": [case([query("Eva", ("Eva",))], [query("Ida", ("zzz",))])]}
    records = RippleEdits.load(path(item(**unmet), item(**TESTED)))
    options = {"n_tokens": 2}
    found = evaluate_benchmark(
        gpt2, "rippleedits", records, RandomEdits(), options=options, progress=False
    )
    assert found.unmet == {0} and found.after[1].scores
    assert set(found.before[0].scores) == {"rewrite", "Relation_Specificity, condition"}
    assert "1 of 2 records count" in found.table()


def test_an_answer_is_as_long_as_released(gpt2, path):
    (record,) = RippleEdits.load(path(item(Relation_Specificity=[GOOD])))
    found = evaluate_benchmark(gpt2, "rippleedits", [record], None, progress=False)
    (text,) = found.before[0].scores["Relation_Specificity"][0].texts
    encoder = Encoder.of(gpt2)
    n_tokens = len("Ida is") + 30 - len(encoder.ids("Ida is"))
    assert [text] == greedy_continuations(gpt2, ["Ida is"], n_tokens)
