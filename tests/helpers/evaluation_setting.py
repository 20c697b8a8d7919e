"""Small records, a method with random edits, and comparisons of rows."""

import dataclasses
from dataclasses import dataclass

import pytest
from helpers.rome_setting import random_edit

from transformer_lens_rome import EditRequest
from transformer_lens_rome.evaluation import CounterFactRecord, evaluate_counterfact
from transformer_lens_rome.files.fields import as_read


def record(case, subject, new="Paris", true="Rome", **changed):
    known = {
        "case_id": case,
        "request": EditRequest("{} is in", subject, new, true),
        "paraphrase_prompts": (f"In the city {subject} is", f"The old {subject}"),
        "neighborhood_prompts": ("Cuba is in", "The best of times is"),
        "attribute_prompts": ("London is in",),
    }
    return CounterFactRecord(**(known | changed))


RECORDS = [record(i, name) for i, name in enumerate(("Space Needle", "The tower", "Old man"))]
RECORDS.append(record(7, "Cuba", "the best", "London"))


@dataclass(frozen=True)
class RandomEdits:
    """A method whose edits are random, other ones for each request."""

    strength: float = 0.3
    broken: tuple[str, ...] = ()

    def compute(self, model, request, *, seed=0):
        if request.subject in self.broken:
            raise ValueError("no such subject")
        edit = random_edit(model, seed=seed + len(request.subject), strength=self.strength)
        return dataclasses.replace(edit, request=request)


def evaluate(model, method=RandomEdits(), records=RECORDS, **options):
    return evaluate_counterfact(model, records, method, progress=False, **options)


def seconds_apart(rows):
    """Rows without what a clock gives."""
    return {
        case: {k: v for k, v in as_read(row.to_json()).items() if "seconds" not in k}
        for case, row in rows.items()
    }


def assert_alike(found, expected):
    """Equal but for rounding, which depends on how many threads share a product."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_alike(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    else:
        assert found == expected


def referred(case, relation, target, **changed):
    return record(case, "The tower", relation_id=relation, target_new_id=target, **changed)
