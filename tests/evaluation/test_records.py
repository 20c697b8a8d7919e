"""CounterFact records: both schemas, and what is said about those that are not whole."""

from __future__ import annotations

import copy
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_lens_rome import EditRequest
from transformer_lens_rome.evaluation import CounterFact, records
from transformer_lens_rome.files import download as downloads

PUBLISHED = {
    "case_id": 0,
    "pararel_idx": 2796,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native", "Danielle Darrieux spoke"],
    "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
    "attribute_prompts": ["J.\u00a0R.\u00a0R. Tolkien is a native speaker of"],
    "generation_prompts": ["Danielle Darrieux's mother tongue is"] * 2,
}
FLAT = {
    "case_id": 2,
    "prompt": "Toko Yasuda, the",
    "target_new": "piano",
    "subject": "Toko Yasuda",
    "ground_truth": "guitar",
    "rephrase_prompt": "Toko Yasuda is incredible at",
    "locality_prompt": "John Lennon performs on the",
    "locality_ground_truth": "guitar",
}


def load(tmp_path, items, **options):
    path = tmp_path / "counterfact.json"
    path.write_text(items if isinstance(items, str) else json.dumps(items))
    return CounterFact.load(path, **options)


def test_both_schemas(tmp_path):
    (one,), found = load(tmp_path, [PUBLISHED]), load(tmp_path, [FLAT])
    (two,) = found
    assert one.request == EditRequest(
        "The mother tongue of {} is", "Danielle Darrieux", "English", "French"
    )
    assert one.paraphrase_prompts == tuple(PUBLISHED["paraphrase_prompts"])
    assert one.attribute_prompts[0] == PUBLISHED["attribute_prompts"][0]  # spaces as they were
    assert len(one.generation_prompts) == 2
    assert (one.relation_id, one.target_new_id, one.target_true_id) == ("P103", "Q1860", "Q150")
    assert two.request == EditRequest("{}, the", "Toko Yasuda", "piano", "guitar")
    assert two.neighborhood_prompts == (FLAT["locality_prompt"],)
    assert (one.case_id, two.case_id, len(found), found[0], found.schema) == (0, 2, 1, two, "flat")
    assert found[:1].records == (two,) and found[:1].digest == found.digest


def test_the_flat_column_is_a_paraphrase_only_where_that_is_known(tmp_path):
    (record,) = load(tmp_path, [FLAT])
    assert record.continuation_prompts == (FLAT["rephrase_prompt"],)
    assert record.paraphrase_prompts == ()
    (record,) = load(tmp_path, [FLAT], true_paraphrases=[FLAT["case_id"]])
    assert record.paraphrase_prompts == (FLAT["rephrase_prompt"],)
    assert record.continuation_prompts == ()


def test_schemas_do_not_mix(tmp_path):
    with pytest.raises(ValueError, match="record 1: it has the flat schema, and the first record"):
        load(tmp_path, [PUBLISHED, FLAT])
    found = load(tmp_path, [PUBLISHED, FLAT], strict=False)
    assert len(found) == len(found.skipped) == 1 and found.schema == "published"


@pytest.mark.parametrize(
    "field",
    ("paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "generation_prompts"),
)
@pytest.mark.parametrize("value", (..., []))
def test_a_record_may_lack_prompts_of_a_kind(tmp_path, field, value):
    (record,) = load(tmp_path, [changed(PUBLISHED, field, value)])
    assert getattr(record, field) == ()


def test_records_are_chosen_by_their_case_ids(tmp_path):
    found = load(tmp_path, [changed(FLAT, "case_id", i) for i in (5, 3, 4)])
    some = found.only([4, 5])
    assert [record.case_id for record in some] == [5, 4] and some.digest == found.digest
    with pytest.raises(ValueError, match=r"no records of case ids \[7\]"):
        found.only([3, 7])


def test_real_records(shared):
    found = CounterFact.load(shared / "data" / "counterfact_train.json")
    assert len(found) == 10_000 and not found.skipped
    assert all(record.request.text.count(record.request.subject) >= 1 for record in found)
    few = CounterFact.load(shared / "data" / "counterfact_train.json", limit=7)
    assert few == found[:7]
    published = CounterFact.load(shared / "data" / "counterfact_full_300.json")
    assert (found.schema, published.schema) == ("flat", "published")
    kinds = ("paraphrase", "neighborhood", "attribute", "generation")
    sizes = {tuple(len(getattr(r, f"{kind}_prompts")) for kind in kinds) for r in published}
    assert sizes == {(2, 10, 10, 10)}


def test_what_the_flat_column_is_on_real_records(shared):
    """For 5 records of 6 it is one of the published record's generation prompts."""
    flat = CounterFact.load(shared / "data" / "counterfact_train.json")
    full = CounterFact.load(shared / "data" / "counterfact_full_300.json")
    ids = json.loads((shared / "data" / "case_ids_with_true_paraphrase.json").read_text())
    published = {record.case_id: record for record in full}
    both = [record for record in flat if record.case_id in published]
    assert len(both) > 100
    paraphrases = 0
    for record in both:
        (prompt,), other = record.continuation_prompts, published[record.case_id]
        is_paraphrase = prompt in other.paraphrase_prompts
        assert is_paraphrase == (record.case_id in ids)
        assert is_paraphrase or prompt in other.generation_prompts
        paraphrases += is_paraphrase
    assert 0.1 < paraphrases / len(both) < 0.25


def changed(record, path, value):
    """A copy with one field replaced; the field is left out for `...`."""
    record = copy.deepcopy(record)
    *parents, last = path.split(".")
    inner = record
    for name in parents:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return record


FAULTS = (
    (PUBLISHED, "case_id", "7", "case_id"),
    (PUBLISHED, "case_id", True, "case_id"),
    (PUBLISHED, "requested_rewrite", [], "requested_rewrite"),
    (PUBLISHED, "requested_rewrite.prompt", "no hole", "request"),
    (PUBLISHED, "requested_rewrite.subject", " ", "request"),
    (PUBLISHED, "requested_rewrite.subject", ..., "subject"),
    (PUBLISHED, "requested_rewrite.target_new", "English", "target_new"),
    (PUBLISHED, "requested_rewrite.target_new.str", ..., "target_new.str"),
    (PUBLISHED, "requested_rewrite.target_new.str", "", "request"),
    (PUBLISHED, "requested_rewrite.target_true.str", "", "target_true"),
    (PUBLISHED, "paraphrase_prompts", "text", "paraphrase_prompts"),
    (PUBLISHED, "neighborhood_prompts", ["a", 3], r"neighborhood_prompts\[1\]"),
    (FLAT, "prompt", "Somebody else, the", "subject"),
    (FLAT, "prompt", "Toko Yasuda and Toko Yasuda, the", "subject"),
    (FLAT, "target_new", None, "target_new"),
    (FLAT, "locality_prompt", "", "locality_prompt"),
)


@pytest.mark.parametrize(("record", "path", "value", "field"), FAULTS)
def test_a_record_that_is_not_whole_is_named_with_its_field(tmp_path, record, path, value, field):
    items = [changed(record, "case_id", 99), changed(record, path, value)]
    with pytest.raises(ValueError, match=f"(?s)1 of 2 records.*record 1: {field}"):
        load(tmp_path, items)
    found = load(tmp_path, items, strict=False)
    assert len(found) == 1 == len(found.skipped)


def test_a_case_id_stands_once(tmp_path):
    with pytest.raises(ValueError, match="record 1: case_id: 2 is already used by record 0"):
        load(tmp_path, [FLAT, FLAT])


@pytest.mark.parametrize(
    ("content", "words"), (("[{", "not JSON"), ("{}", "a dict"), ("[3]", "a int"), ("", "not JSON"))
)
def test_a_file_of_something_else(tmp_path, content, words):
    with pytest.raises(ValueError, match=words):
        load(tmp_path, content)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
FIELDS = [f for f in PUBLISHED if f != "requested_rewrite"]
FIELDS += ["requested_rewrite", *(f"requested_rewrite.{f}" for f in PUBLISHED["requested_rewrite"])]
FIELDS += ["requested_rewrite.target_new.str", "requested_rewrite.target_true.str"]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_is_either_read_or_named(tmp_path_factory, data):
    """Some hundred files with a damaged record: none lost, and each fault says where."""
    record, fields = data.draw(st.sampled_from(((PUBLISHED, FIELDS), (FLAT, list(FLAT)))))
    damage = data.draw(st.sampled_from(fields))
    broken = changed(record, damage, data.draw(st.just(...) | ANYTHING))
    items = [changed(record, "case_id", -1), broken]
    folder = tmp_path_factory.getbasetemp()
    found = load(folder, items, strict=False)
    assert len(found) + len(found.skipped) == 2 and found[0].case_id == -1
    for fault in found.skipped:
        where, _, field = fault.partition(": ")
        assert where == "record 1"
        name = field.split(":")[0].split("[")[0]
        own = [*PUBLISHED, *FLAT, "request", "target_true", "target_new", "relation_id"]
        assert name.split(".")[0] in own


def test_the_published_file_is_downloaded_once_and_checked(monkeypatch, tmp_path):
    content = json.dumps([PUBLISHED]).encode()

    class Answer(io.BytesIO):
        headers = {"Content-Length": str(len(content))}

    monkeypatch.setenv("TRANSFORMER_LENS_ROME_CACHE", str(tmp_path))
    monkeypatch.setattr(downloads, "_open", lambda request: Answer(content))
    with pytest.raises(ValueError, match="not the published file"):
        CounterFact.load()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(records, "_SIZE", len(content))
    digest = records.hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(records, "_SHA256", digest)
    assert CounterFact.load().digest == digest
    monkeypatch.setattr(downloads, "_open", None)
    assert len(CounterFact.load()) == 1
