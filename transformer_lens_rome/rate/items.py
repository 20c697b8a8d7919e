"""The items of a rating page: records and texts are drawn, and their order on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch

from transformer_lens_rome.evaluation.results import Results, check_comparable
from transformer_lens_rome.evaluation.rows import RecordRow, record_digest
from transformer_lens_rome.files.strict_json import check_text
from transformer_lens_rome.rate.key import KeyItem
from transformer_lens_rome.torch_states import torch_defaults


@dataclass(frozen=True)
class Item:
    """What a rater sees of one item.

    Attributes:
        prompt: The fact's prompt with its subject.
        target: The fact's new target.
        texts: The texts from left to right.
    """

    prompt: str
    target: str
    texts: tuple[str, ...]


def drawn_items(
    runs: Sequence[Results], records: Sequence[Any], n_items: int | None, seed: int
) -> tuple[tuple[KeyItem, ...], tuple[Item, ...]]:
    """Return the items of a page, as the key and as raters see them.

    Records and, for each, one of its texts are drawn without replacement. Each order of the methods
    is used equally often, or once more than others.

    Raises:
        ValueError: The runs are of other models or records, or too few records have texts in all
            of them.
    """
    check_comparable(runs)
    texts = _common_texts(runs, {record.case_id: record for record in records})
    if n_items is not None and not 1 <= n_items <= len(texts):
        raise ValueError(
            f"n_items={n_items}, but {len(texts)} records have generated text in all runs; pass a "
            "number from 1 to that, or evaluate more records with generate=True"
        )
    draws = _draws([len(some[0]) for some in texts.values()], len(runs), n_items, seed)
    by_case = {record.case_id: record.request for record in records}
    cases = list(texts)
    key_items, items = [], []
    for place, text, order in draws:
        case = cases[place]
        request, shown = by_case[case], tuple(texts[case][method][text] for method in order)
        for one in (request.text, request.target_new, *shown):
            check_text(one)
        key_items.append(KeyItem(case, text, order))
        items.append(Item(request.text.rstrip(), request.target_new.strip(), shown))
    return tuple(key_items), tuple(items)


def _common_texts(
    runs: Sequence[Results], records: Mapping[int, Any]
) -> dict[int, list[tuple[str, ...]]]:
    """Return, by case, the texts of each run about the records that have texts in all runs.

    Raises:
        ValueError: A record is another one than in the runs, or no record has texts in all.
    """
    rows = [run.after or run.before for run in runs]
    common = {}
    for case, record in records.items():
        some = [row for by_case in rows if (row := by_case.get(case))]
        if any(row.record != record_digest(record) for row in some):
            raise ValueError(f"record {case} is not the one of the runs; pass the same records")
        texts = [row.generation.texts for row in some if row.generation]
        if len(texts) == len(runs):
            _check_texts(case, texts)
            common[case] = texts
    if not common:
        raise ValueError(
            f"no record has generated text in all runs ({_counts(runs, rows)}); evaluate the same "
            "records with generate=True"
        )
    return common


def _check_texts(case: int, texts: Sequence[tuple[str, ...]]) -> None:
    """Raise ValueError if runs have other numbers of texts about a record, or none."""
    if len(set(map(len, texts))) > 1 or not texts[0]:
        numbers = ", ".join(str(len(some)) for some in texts)
        raise ValueError(f"the runs have {numbers} texts about record {case}; compare equal runs")


def _counts(runs: Sequence[Results], rows: Sequence[Mapping[int, RecordRow]]) -> str:
    """Return how many records of each run have texts."""
    return ", ".join(
        f"{run.name}: {sum(row.generation is not None for row in by_case.values())}"
        for run, by_case in zip(runs, rows, strict=True)
    )


@torch_defaults()
def _draws(
    n_texts: Sequence[int], n_methods: int, n_items: int | None, seed: int
) -> list[tuple[int, int, tuple[int, ...]]]:
    """Return the record, the text and the order of methods of each item, as positions."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(len(n_texts), generator=generator)[:n_items].tolist()
    orders = list(permutations(range(n_methods)))
    found = []
    for i, place in enumerate(places):
        if i % len(orders) == 0:
            shuffled = torch.randperm(len(orders), generator=generator).tolist()
        text = int(torch.randint(n_texts[place], (), generator=generator))
        found.append((place, text, orders[shuffled[i % len(orders)]]))
    return found
