"""Datasets, texts and what users give as JSON, to be fuzzed."""

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from fuzz import mutations as mutate
from fuzz.format import JSON, Format, model
from helpers.editor_setting import OTHERS

from transformer_lens_rome import EditRequest
from transformer_lens_rome.evaluation import CounterFact, References, Zsre
from transformer_lens_rome.evaluation.generation import TfIdf
from transformer_lens_rome.evaluation.rows import record_digest
from transformer_lens_rome.files.cache import safe_name
from transformer_lens_rome.files.strict_json import read_json
from transformer_lens_rome.methods import rome_method
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.tracing.known_facts import load_known_facts

# ---------------------------------------------------------------- data


PUBLISHED = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native"],
    "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
    "attribute_prompts": ["Tolkien is a native speaker of"],
    "generation_prompts": ["Danielle Darrieux's mother tongue is"],
}
FLAT = {
    "case_id": 1,
    "prompt": "The Space Needle is in",
    "subject": "The Space Needle",
    "target_new": "Paris",
    "ground_truth": "Seattle",
    "rephrase_prompt": "You find the Space Needle in",
    "locality_prompt": "The Colosseum is in",
}


def _tokens(*texts: str) -> None:
    """What a tokenizer makes of texts, which has to be the same twice."""
    encoder = Encoder.of(model())
    for text in texts:
        assert isinstance(text, str) and encoder.row(text[:1000]) == encoder.row(text[:1000])


def _use_records(found: CounterFact) -> None:
    for record in found:
        record_digest(record)
        _tokens(record.request.text, *record.paraphrase_prompts, *record.neighborhood_prompts)
        assert all(isinstance(n, str) for n in (record.relation_id, record.target_new_id))


def counterfact() -> Format:
    """CounterFact, both schemas."""
    seeds = [json.dumps(items).encode() for items in ([PUBLISHED], [FLAT, PUBLISHED])]
    read = lambda path: CounterFact.load(path, strict=path.stat().st_size % 2 == 0)  # noqa: E731
    return Format(seeds, JSON, read, _use_records)


def zsre() -> Format:
    """Questions and answers, zsRE."""
    item = {
        "subject": "The tower",
        "src": "Where is The tower in Rome?",
        "rephrase": "In what city is The tower?",
        "answers": ["Paris"],
        "loc": "nq question: who is the best in Cuba",
        "loc_ans": "the old man",
    }

    def use(found: Zsre) -> None:
        for record in found:
            record_digest(record)
            _tokens(record.request.text, record.rephrase, record.locality_prompt)

    return Format([json.dumps([item] * n).encode() for n in (1, 2)], JSON, Zsre.load, use)


def known() -> Format:
    """Known facts; their numbers become names of files."""
    fact = {
        "known_id": 7,
        "subject": "Vinson Massif",
        "attribute": "Antarctica",
        "prompt": "Vinson Massif is located in the continent of",
        "relation_id": "P30",
    }

    def use(facts: list[Any]) -> None:
        for one in facts:
            _tokens(one.prompt, one.subject, one.attribute)
            assert Path("f", safe_name(f"{one.known_id}.safetensors")).resolve().parent.name == "f"

    return Format([json.dumps([fact] * n).encode() for n in (1, 2)], JSON, load_known_facts, use)


DOCUMENTS = ("The cat sat on the mat", "The dog", "A bird sat")


def snippets() -> Format:
    """Reference texts for RS."""
    item = {
        "relation_id": "P103",
        "target_id": "Q1860",
        "samples": [{"name": "x", "text": "A cat"}],
    }
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        Path(file.name).write_text(json.dumps([PUBLISHED]), encoding="utf-8")
        (record,) = CounterFact.load(file.name)
    weights = TfIdf.fit(DOCUMENTS)
    return Format(
        [json.dumps([item] * n).encode() for n in (1, 3)],
        JSON,
        lambda path: References.extract([record], path, weights),
        lambda found: found.consistency(record, ["the cat sat"]),
    )


def _weights_files() -> tuple[bytes, bytes]:
    idf, file = TfIdf.fit(DOCUMENTS).idf, io.BytesIO()
    np.save(file, np.array([[idf[term] for term in sorted(idf)]]))
    return json.dumps({term: i for i, term in enumerate(sorted(idf))}).encode(), file.getvalue()


def _use_weights(found: TfIdf) -> None:
    assert 0 <= found.similarity("the cat sat", "the cat sat") < 1.001


def vocabulary() -> Format:
    """The vocabulary of RS."""
    words, idf = _weights_files()

    def read(path: Path) -> TfIdf:
        path.with_name("idf.npy").write_bytes(idf)
        return TfIdf.load(path, path.with_name("idf.npy"))

    return Format([words], JSON, read, _use_weights)


def idf() -> Format:
    """Its weights, a `.npy` file."""
    words, weights = _weights_files()

    def read(path: Path) -> TfIdf:
        path.with_name("words.json").write_bytes(words)
        return TfIdf.load(path.with_name("words.json"), path)

    return Format([weights], (mutate.damaged_npy, mutate.damaged_bytes), read, _use_weights)


# ---------------------------------------------------------------- what users give as JSON


def request() -> Format:
    """Requests, as dicts of both schemas."""
    seeds = [json.dumps({**PUBLISHED["requested_rewrite"]}).encode(), json.dumps(FLAT).encode()]

    def read(path: Path) -> Any:
        return read_json(path)

    def use(found: Any) -> None:
        request = EditRequest.from_dict(found)
        encoder = Encoder.of(model())
        short = (request.prompt[:500], request.subject[:500])
        if "{}" in short[0] and short[1].strip():
            encoder.templated_row(*short, target=request.target_new[:500])

    return Format(seeds, JSON, read, use)


def prefixes() -> Format:
    """Prefixes, as a list."""

    def use(found: Any) -> None:
        rome_method.check_prefixes(found, bare_first=False)
        _tokens(*(f"{prefix} The tower" for prefix in found))

    return Format([json.dumps(["", *OTHERS]).encode()], JSON, read_json, use)
