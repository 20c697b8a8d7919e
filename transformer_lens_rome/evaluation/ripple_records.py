"""RippleEdits' records (Cohen et al. 2024, arXiv:2307.12976): edits, and tests of what they imply.

    {"edit": {"prompt": "The name of the mother of A is B.", "relation": "MOTHER",
              "original_fact": {"prompt": "The name of the mother of A is C.", ...}, ...},
     criterion: [{"test_queries": [query, ...], "test_condition": "OR" or "AND",
                  "condition_queries": [query, ...]}, ...], ...}
    query: {"prompt", "answers": [{"value", "aliases"}, ...], ...}

The file has sentences, no subjects and targets. They are found by the relation's template: the
sentences of the new and of the true fact begin with the same filled template. As in the released
code, an answer of one character that is no digit is not looked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformer_lens_rome.edits.kinds import EditRequest
from transformer_lens_rome.evaluation.record_list import RecordList, read_records
from transformer_lens_rome.evaluation.records import field_of, text_of

CRITERIA = {
    "Logical_Generalization": "LG",
    "Compositionality_I": "CI",
    "Compositionality_II": "CII",
    "Subject_Aliasing": "SA",
    "Forgetfulness": "PV",
    "Relation_Specificity": "RS",
}
"""The criteria of the file, with the paper's abbreviations (PV: preservation)."""
_NAMES = {
    "ANTHEM": "anthem of {}",
    "AUTHOR": "author of {}",
    "AWARD_RECEIVED": "award {} won",
    "CAPITAL": "capital city of {}",
    "CHILD": "child of {}",
    "COMPOSER": "composer of {}",
    "CONTINENT": "continent which {} is part of",
    "COUNTRY": "country which {} is associated with",
    "COUNTRY_OF_CITIZENSHIP": "country of citizenship of {}",
    "CURRENCY": "currency in {}",
    "DIRECTOR": "director of {}",
    "EMPLOYER": "employer of {}",
    "ETHNIC_GROUP": "ethnic group which {} is associated with",
    "FATHER": "father of {}",
    "FIELD_OF_WORK": "field of work of {}",
    "HEAD_OF_GOVERNMENT": "head of government of {}",
    "HEAD_OF_STATE": "head of state of {}",
    "LEAGUE": "league which {} plays in",
    "MEMBER_OF_SPORTS_TEAM": "sports team which {} is a member of",
    "MOTHER": "mother of {}",
    "POSITION_HELD": "position held by {}",
    "RELIGION": "religion which {} is associated with",
    "SCREENWRITER": "screenwriter of {}",
    "SPOUSE": "spouse of {}",
}
TEMPLATES = {relation: f"The name of the {name} is" for relation, name in _NAMES.items()} | {
    "CAST_MEMBER": "The names of the cast members of {} are",
    "EYE_COLOR": "The eye color of {} is",
    "FOLLOWED_BY": "{} is followed by",
    "FOLLOWS": "{} follows",
    "OCCUPATION": "The occupation of {} is",
    "OFFICIAL_LANGUAGE": "The official language of {} is",
    "PLACE_OF_BIRTH": "The place of birth of {} is",
    "PLACE_OF_BURIAL": "The place of burial of {} is",
    "PLACE_OF_DEATH": "The place of death of {} is",
    "SEX_OR_GENDER": "The gender of {} is",
    "SEXUAL_ORIENTATION": "The sexual orientation of {} is",
    "SIBLING": "The names of the siblings of {} are",
}
"""The template of each relation."""


@dataclass(frozen=True)
class Query:
    """A prompt, and for each answer to it the texts of which one must be written."""

    prompt: str
    answers: tuple[tuple[str, ...], ...]

    def answered_by(self, text: str) -> bool:
        """Return whether a text contains every answer, by its name or an alias."""
        return all(any(one in text for one in names) for names in self.answers)


@dataclass(frozen=True)
class RippleTest:
    """A test of what an edit implies.

    Attributes:
        queries: The queries of the test.
        conditions: The queries that the unedited model must answer, or the test does not count.
        all_of: Whether all queries must be answered; else one is enough.
    """

    queries: tuple[Query, ...]
    conditions: tuple[Query, ...] = ()
    all_of: bool = False


@dataclass(frozen=True)
class RippleRecord:
    """A fact to write, and tests of what it implies.

    Attributes:
        case_id: The record's index in the file, from 0.
        request: The fact, with its true target.
        relation: The relation's name.
        tests: The tests by criterion.
    """

    case_id: int
    request: EditRequest
    relation: str
    tests: Mapping[str, tuple[RippleTest, ...]]


@dataclass(frozen=True)
class RippleEdits(RecordList[RippleRecord]):
    """The records of a file, see `RecordList`; `skipped` also names tests that are left out."""

    @classmethod
    def load(cls, path: Any, *, limit: int | None = None, strict: bool = False) -> RippleEdits:
        """Read a file of RippleEdits.

        Args:
            path: The file.
            limit: The number of records to read, from the start of the file; None: all.
            strict: Raise if a record or a test is invalid, for example if a query has no answers.
                False: leave out such tests, and records without a subject or a test.

        Raises:
            ValueError: The file is not one of RippleEdits, or (with `strict`) a part is invalid.
            OSError: There is no such file.
        """
        left_out: list[str] = []
        make = partial(_record, None if strict else left_out)
        records, skipped, digest = read_records(path, make, limit=limit, strict=strict)
        return cls(records, (*skipped, *left_out), digest)


def _record(left_out: list[str] | None, i: int, item: Any) -> RippleRecord:
    """Return one record; tests that are invalid go to `left_out`, or raise ValueError if None."""
    if not isinstance(item, Mapping):
        raise ValueError(f"it is a {type(item).__name__}, not an object")
    edit = field_of(item, "edit", Mapping)
    original = field_of(edit, "original_fact", Mapping, within="edit")
    relation = text_of(edit, "relation")
    request = request_of(relation, text_of(edit, "prompt"), text_of(original, "prompt"))
    tests: dict[str, tuple[RippleTest, ...]] = {}
    for criterion in CRITERIA:
        kept = []
        for j, one in enumerate(field_of(item, criterion, list)):
            try:
                kept.append(_test(one))
            except ValueError as error:
                reason = f"{criterion}[{j}]: {error}"
                if left_out is None:
                    raise ValueError(reason) from error
                left_out.append(f"record {i}: {reason}")
        if kept:
            tests[criterion] = tuple(kept)
    if not tests:
        raise ValueError("it has no test")
    return RippleRecord(i, request, relation, tests)


def request_of(relation: str, new: str, true: str) -> EditRequest:
    """Return the request of which `new` and `true` are the sentences, by the relation's template.

    Raises:
        ValueError: The relation has no template, or a sentence does not have its form, or has it
            in more than one way.
    """
    if relation not in TEMPLATES:
        raise ValueError(f"edit: there is no template of the relation {relation!r:.60}")
    before, after = TEMPLATES[relation].split("{}")
    found = []
    for end in re.finditer(re.escape(after + " "), new):
        stem = new[: end.end()]
        subject, targets = stem[len(before) : end.start()], (new[len(stem) :], true[len(stem) :])
        if stem.startswith(before) and subject and true.startswith(stem):
            if all(target.endswith(".") and len(target) > 1 for target in targets):
                found.append((subject, *(target[:-1] for target in targets)))
    if len(found) != 1:
        raise ValueError(
            f"edit: {len(found)} subjects fit the template {TEMPLATES[relation]!r} in {new!r:.100} "
            f"and {true!r:.100}"
        )
    return EditRequest(TEMPLATES[relation], *found[0])


def _test(item: Any) -> RippleTest:
    """Return a test, or raise ValueError with the name of the invalid field."""
    if not isinstance(item, Mapping):
        raise ValueError(f"it is a {type(item).__name__}, not an object")
    how = text_of(item, "test_condition")
    if how not in ("OR", "AND"):
        raise ValueError(f"test_condition: it is {how!r:.40}, not OR or AND")
    queries, conditions = (
        tuple(map(_query, field_of(item, name, list)))
        for name in ("test_queries", "condition_queries")
    )
    if not queries:
        raise ValueError("test_queries: it is empty")
    return RippleTest(queries, conditions, how == "AND")


def _query(item: Any) -> Query:
    """Return a query, or raise ValueError with the name of the invalid field."""
    if not isinstance(item, Mapping):
        raise ValueError(f"a query is a {type(item).__name__}, not an object")
    prompt, answers = text_of(item, "prompt"), field_of(item, "answers", list)
    if not answers:
        raise ValueError(f"answers: there are none to {prompt!r:.80}")
    return Query(prompt, tuple(map(_names, answers)))


def _names(answer: Any) -> tuple[str, ...]:
    """Return the name and the aliases of an answer that are looked for."""
    if not isinstance(answer, Mapping):
        raise ValueError(f"an answer is a {type(answer).__name__}, not an object")
    aliases: Sequence[Any] = field_of(answer, "aliases", list)
    names = (text_of(answer, "value"), *aliases)
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"aliases: not all are texts in {aliases!r:.80}")
    kept = tuple(name for name in names if len(name) > 1 or name.isdigit())
    if not kept:
        raise ValueError(f"answers: {names[0]!r:.40} has one character")
    return kept
