"""Checks of the rows of a run's file, so that tables can be made from every row that was read.

every row      case_id, record (a sha256)
scored row     scores: {kind: [[log-probabilities of each target, correctness of each], ...]},
               seconds, edit_seconds, health, generation: {texts, GE, RS}
failed row     failed: the reason
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from transformer_lens_rome.evaluation.metrics import KINDS
from transformer_lens_rome.files.fields import fits

TARGETS = {"counterfact": 2, "zsre": 1}
"""The number of targets that are scored after each prompt, by protocol."""
_ABOVE_ZERO = 1e-3  # rounding may lift a log-probability above 0 by this much
_MOST = {"GE": 64.0, "RS": 1.001, "seconds": 1e9, "edit_seconds": 1e9}


def check_setting_row(first: Mapping[str, Any]) -> str:
    """Return the protocol of a run, from its first line.

    Raises:
        ValueError: The setting is missing or invalid.
    """
    setting = first.get("setting")
    if not isinstance(setting, Mapping):
        raise ValueError("the setting of the run is missing")
    method, protocol = setting.get("method", {"name": ""}), setting.get("protocol", "counterfact")
    if not isinstance(method, Mapping) or not isinstance(method.get("name"), str):
        raise ValueError("its method has no name")
    if not isinstance(protocol, str) or protocol not in TARGETS:
        raise ValueError(f"its protocol is {protocol!r:.40}")
    return protocol


def row_checker(first: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that raises ValueError for a row that does not fit this first line."""
    return partial(check_row, protocol=check_setting_row(first))


def check_row(row: Mapping[str, Any], protocol: str) -> None:
    """Check a row.

    Raises:
        ValueError: A field is missing or has an invalid value.
    """
    if type(row.get("case_id")) is not int or not isinstance(row.get("record"), str):
        raise ValueError("case_id or record is missing")
    if "failed" in row:
        if not isinstance(row["failed"], str) or "scores" in row:
            raise ValueError("failed is not a text, or the row also has scores")
        return
    generation = row.get("generation", {})
    if not isinstance(generation, Mapping):
        raise ValueError("generation is not an object")
    for name, most in _MOST.items():
        value = (row if "seconds" in name else generation).get(name, 0)
        if not fits(value, float) or not 0 <= value <= most:
            raise ValueError(f"{name} is {value!r:.40}")
    if ("seconds" in row) < ("edit_seconds" in row):
        raise ValueError("seconds is missing")
    _check_scores(row.get("scores"), TARGETS[protocol])


def _check_scores(scores: Any, targets: int) -> None:
    """Raise ValueError if scores are not numbers, or a kind of prompt is missing."""
    if not isinstance(scores, Mapping) or not set(KINDS) <= set(scores):
        raise ValueError(f"scores need the kinds {', '.join(KINDS)}")
    for kind, prompts in scores.items():
        if not fits(prompts, list[list]) or (kind in KINDS and not prompts):
            raise ValueError(f"scores of {kind[:40]!r} are not a list of prompts")
        for prompt in prompts:
            values, correct = prompt[:targets], prompt[targets:]
            if len(prompt) != 2 * targets or not fits(correct, list[list[bool]]):
                raise ValueError(f"scores of {kind[:40]!r} need {targets} targets a prompt")
            if not fits(values, list[list[float]]) or not all(
                number <= _ABOVE_ZERO and number > -1e39 for one in values for number in one
            ):
                raise ValueError(f"scores of {kind[:40]!r} are not log-probabilities")
            if [len(one) for one in values] != [len(one) for one in correct] or not all(values):
                raise ValueError(f"scores of {kind[:40]!r} differ in length or are empty")
