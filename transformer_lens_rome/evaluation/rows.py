"""What a row of a run's file may hold, so that whatever was read can be made into tables.

every row      case_id, record (a sha256)
one that       scores: {kind: [[log-probabilities of each target, correctness of each], ...]},
was scored     seconds, edit_seconds, health, generation: {texts, GE, RS}
else           failed: why
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from transformer_lens_rome.evaluation.metrics import KINDS
from transformer_lens_rome.files.fields import fits

TARGETS = {"counterfact": 2, "zsre": 1}
"""Targets that a prompt is scored with, by protocol."""
_ABOVE_ZERO = 1e-3  # by which rounding lifts a log-probability
_MOST = {"GE": 64.0, "RS": 1.001, "seconds": 1e9, "edit_seconds": 1e9}


def check_setting_row(first: Mapping[str, Any]) -> str:
    """The protocol of a run, from its first line.

    Raises:
        ValueError: what the run depends on is not said, or not as it is written.
    """
    setting = first.get("setting")
    if not isinstance(setting, Mapping):
        raise ValueError("it does not say what the run depends on")
    method, protocol = setting.get("method", {"name": ""}), setting.get("protocol", "counterfact")
    if not isinstance(method, Mapping) or not isinstance(method.get("name"), str):
        raise ValueError("its method has no name")
    if not isinstance(protocol, str) or protocol not in TARGETS:
        raise ValueError(f"its protocol is {protocol!r:.40}")
    return protocol


def row_checker(first: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], None]:
    """What refuses, with a ValueError, a row that a run with this first line does not write."""
    return partial(check_row, protocol=check_setting_row(first))


def check_row(row: Mapping[str, Any], protocol: str) -> None:
    """Refuse a row that no evaluation writes.

    Raises:
        ValueError: a field is missing, or is not what it should be.
    """
    if type(row.get("case_id")) is not int or not isinstance(row.get("record"), str):
        raise ValueError("case_id or record is missing")
    if "failed" in row:
        if not isinstance(row["failed"], str) or "scores" in row:
            raise ValueError("failed is not a reason, or there are scores as well")
        return
    generation = row.get("generation", {})
    if not isinstance(generation, Mapping):
        raise ValueError("generation is no object")
    for name, most in _MOST.items():
        value = (row if "seconds" in name else generation).get(name, 0)
        if not fits(value, float) or not 0 <= value <= most:
            raise ValueError(f"{name} is {value!r:.40}")
    if ("seconds" in row) < ("edit_seconds" in row):
        raise ValueError("seconds is missing")
    _check_scores(row.get("scores"), TARGETS[protocol])


def _check_scores(scores: Any, targets: int) -> None:
    """Refuse scores that are not numbers, or not those of all three kinds of prompt."""
    if not isinstance(scores, Mapping) or not set(KINDS) <= set(scores):
        raise ValueError(f"scores are not of {', '.join(KINDS)}")
    for kind, prompts in scores.items():
        if not fits(prompts, list[list]) or (kind in KINDS and not prompts):
            raise ValueError(f"scores of {kind[:40]!r} are not a list of prompts")
        for prompt in prompts:
            values, correct = prompt[:targets], prompt[targets:]
            if len(prompt) != 2 * targets or not fits(correct, list[list[bool]]):
                raise ValueError(f"scores of {kind[:40]!r} are not of {targets} targets")
            if not fits(values, list[list[float]]) or not all(
                number <= _ABOVE_ZERO and number > -1e39 for one in values for number in one
            ):
                raise ValueError(f"scores of {kind[:40]!r} are not log-probabilities")
            if [len(one) for one in values] != [len(one) for one in correct] or not all(values):
                raise ValueError(f"scores of {kind[:40]!r} do not belong together")
