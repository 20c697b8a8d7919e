"""Metrics against values computed by hand, and against the published tables' own identities."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from transformer_lens_rome.evaluation.metrics import (
    PromptScore,
    paired_difference,
    record_metrics,
    score,
    summarise,
)


def log(*probabilities):
    return [math.log(p) for p in probabilities]


def prompt(new, true, new_correct=(True,), true_correct=(True,)):
    return PromptScore(log(*new), log(*true), list(new_correct), list(true_correct))


RECORD = {
    "rewrite": [prompt([0.4, 0.1], [0.3])],  # 0.2 against 0.3, though a joint would be 0.04
    "paraphrase": [prompt([0.5], [0.25]), prompt([0.1], [0.2], [True, False])],
    "neighborhood": [prompt([0.1], [0.7]), prompt([0.3], [0.2], [True], [False])],
}


def test_a_record_by_hand():
    found = record_metrics(RECORD)
    wanted = {
        "ES": 0.0,
        "EM": 0.2 - 0.3,
        "EA": 1.0,
        "PS": 0.5,
        "PM": (0.25 - 0.1) / 2,
        "PA": 0.5,
        "NS": 0.5,
        "NM": (0.6 - 0.1) / 2,
        "NA": 0.5,
    }
    assert found == pytest.approx(wanted)


def test_equal_probabilities_are_no_success_either_way():
    tie = [prompt([0.5], [0.5])]
    found = record_metrics({"rewrite": tie, "neighborhood": tie})
    assert found["ES"] == found["NS"] == 0.0 and "PS" not in found


def test_tiny_probabilities_still_compare():
    one = PromptScore([-800.0], [-900.0], [False], [False])
    found = record_metrics({"rewrite": [one], "neighborhood": [one]})
    assert (found["ES"], found["NS"], found["EM"]) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "bad", (PromptScore([], [-1.0], [], [True]), PromptScore([math.nan], [-1.0], [True], [True]))
)
def test_what_is_no_probability_is_refused(bad):
    with pytest.raises(ValueError):
        record_metrics({"rewrite": [bad]})


def test_averages_and_intervals_by_hand():
    rows = [{"ES": 1.0, "PS": 1.0, "NS": 0.5}, {"ES": 1.0, "PS": 0.0, "NS": 0.7}, {"ES": 0.0}]
    found = summarise(rows)
    assert found["ES"].mean == pytest.approx(200 / 3) and found["ES"].n == 3
    assert found["ES"].half_width == pytest.approx(1.96 * (1e4 / 3) ** 0.5 / 3**0.5)
    assert found["NS"] == pytest.approx((60.0, 1.96 * 200**0.5 / 2**0.5, 2))
    assert found["S"].mean == pytest.approx(3 / (1 / 100 + 1 / 50 + 1 / 60)) and found["S"].n == 2
    assert str(found["NS"]) == "60.0 (19.6)" and "EM" not in found


def test_the_bootstrap_is_seeded_and_covers():
    """Of 200 samples with a known S, about 95% of the intervals hold it."""
    generator = torch.Generator().manual_seed(1)
    truth, hits = score(90.0, 60.0, 80.0), 0
    for seed in range(200):
        draws = torch.rand(60, 3, generator=generator) < torch.tensor([0.9, 0.6, 0.8])
        rows = [
            dict(zip(("ES", "PS", "NS"), map(float, row), strict=True)) for row in draws.tolist()
        ]
        found = summarise(rows, seed=seed)["S"]
        assert found == summarise(rows, seed=seed)["S"]
        hits += abs(found.mean - truth) <= found.half_width
    assert 180 <= hits <= 199


def test_one_record_has_no_interval():
    found = summarise([{"ES": 1.0, "PS": 1.0, "NS": 1.0}])
    assert found["S"].mean == 100 and math.isnan(found["S"].half_width)
    assert math.isnan(found["ES"].half_width)
    assert summarise([{"ES": 0.0, "PS": 1.0, "NS": 1.0}])["S"].mean == 0


PUBLISHED = """
unedited 30.5 22.2 24.7 78.1
FT 65.1 100.0 87.9 40.4
FT+L 66.9 99.1 48.7 70.3
KN 35.6 28.7 28.0 72.9
KE 52.2 84.3 75.4 30.9
KE-CF 18.1 99.9 95.8 6.9
MEND 57.9 99.1 65.4 37.9
MEND-CF 14.9 100.0 97.0 5.5
ROME 89.2 100.0 96.4 75.4
GPT-J 23.6 16.3 18.6 83.0
GPT-J-FT 25.5 100.0 96.6 10.3
GPT-J-FT+L 68.7 99.6 47.9 78.6
GPT-J-MEND 63.2 97.4 53.6 53.9
GPT-J-ROME 91.5 99.9 99.1 78.9
medium 33.4 25.0 27.4 74.9
medium-FT+L 68.0 100.0 68.5 51.3
medium-ROME 87.4 100.0 96.4 71.8
large 32.8 23.9 27.4 75.7
large-FT+L 71.2 100.0 63.0 61.5
large-ROME 88.2 99.9 96.3 73.4
"""


@pytest.mark.parametrize("row", PUBLISHED.strip().splitlines())
def test_s_of_the_published_rows(row):
    """The table's S lies within what its rounded ES, PS and NS allow."""
    _, s, *parts = row.split()
    allowed = [
        score(*(max(0.0, float(x) + dx) for x, dx in zip(parts, shifts, strict=True)))
        for shifts in product((-0.05, 0.05), repeat=3)
    ]
    assert min(allowed) - 0.05 <= float(s) <= max(allowed) + 0.05


def test_paired_differences_by_hand():
    one = [{"ES": x} for x in (1.0, 1.0, 1.0, 0.0)]
    other = [{"ES": x} for x in (0.0, 0.0, 0.0, 0.0)]
    estimate, p = paired_difference(one, other, "ES")
    assert estimate.mean == 75.0 and estimate.n == 4
    assert p == pytest.approx(2 * 2 / 16)  # +++. and ---., and the last sign does not matter
    assert paired_difference(one, one, "ES")[1] == 1.0
    many = [{"ES": float(i % 5 != 0)} for i in range(100)]
    assert paired_difference(many, [{"ES": 0.0}] * 100, "ES")[1] < 1e-3
    with pytest.raises(ValueError, match="pair them"):
        paired_difference(one, other[:2], "ES")
