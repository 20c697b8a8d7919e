"""Which layer, which constants: test edits on a few records, scored as CounterFact scores them.

For each record, with p the geometric mean over a target's tokens:
    ES  efficacy        p(new) > p(true) after the prompt
    PS  generalisation  the same after a paraphrase
    NS  specificity     p(true) > p(new) after a prompt on a neighbouring subject
    S   the harmonic mean of the three averages                      (Meng et al. 2022, section 3.4)
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

from transformer_lens_rome.edits import EditRequest
from transformer_lens_rome.ledger import applied
from transformer_lens_rome.prompts import Encoder, target_log_probs
from transformer_lens_rome.rome import RomeConfig, compute_rome_edit
from transformer_lens_rome.second_moment import SecondMoment

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerScore:
    """Scores of test edits at one layer, in percent; `before` are those of the unedited model."""

    layer: int
    n: int
    ES: float
    PS: float
    NS: float
    S: float
    before: Mapping[str, float]


def sweep_layers(
    model: Any,
    records: Sequence[Mapping[str, Any]],
    layers: Sequence[int],
    *,
    second_moments: Mapping[int, SecondMoment] | None = None,
    prefixes: Sequence[str] | None = None,
    config: RomeConfig = RomeConfig(),
    seed: int = 0,
    out: Any = None,
    progress: bool = True,
) -> list[LayerScore]:
    """Edit each record at each layer, score it, undo it; the best layer has the highest S.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        records: Flat CounterFact records: `case_id, prompt, subject, target_new, ground_truth,
            rephrase_prompt, locality_prompt`.
        layers: Layers to try, from 0.
        second_moments: C by layer, as `collect_second_moment(model, texts, layers)` gives it.
        prefixes: As in `compute_rome_edit`.
        config: As in `compute_rome_edit`.
        seed: As in `compute_rome_edit`.
        out: A JSON Lines file that gets every record's numbers as they come; a sweep that was
            stopped goes on where it was.
        progress: Show progress bars.
    """
    if not records:
        raise ValueError("records is empty; give sweep_layers a few dozen flat CounterFact records")
    setting = {"seed": seed, "config": json.loads(json.dumps(dataclasses.asdict(config)))}
    done = _read(out, setting)
    encoder = Encoder.of(model)
    scores = []
    for layer in layers:
        rows = []
        for record in records:
            key = (layer, record["case_id"])
            if key not in done:
                options = {
                    "second_moment": second_moments[layer] if second_moments else None,
                    "prefixes": prefixes,
                    "config": config,
                    "seed": seed,
                    "progress": progress,
                }
                done[key] = setting | _test_edit(model, encoder, record, layer, options)
                _append(out, done[key])
            rows.append(done[key])
        before, after = (_percent([row[when] for row in rows]) for when in ("before", "after"))
        scores.append(LayerScore(layer, len(rows), **after, before=before))
        logger.info("%s", scores[-1])
    return scores


def _test_edit(
    model: Any, encoder: Encoder, record: Mapping[str, Any], layer: int, options: dict[str, Any]
) -> dict[str, Any]:
    """One edit: mean log-probabilities [new, true] of each prompt before and after."""
    started = time.perf_counter()
    edit = compute_rome_edit(model, EditRequest.from_dict(record), layer=layer, **options)
    seconds = time.perf_counter() - started
    before = _score(model, encoder, record)
    with applied(model, edit):
        after = _score(model, encoder, record)
    return {
        "layer": layer,
        "case_id": record["case_id"],
        "seconds": round(seconds, 2),
        "p_after": edit.health.p_after,
        "relative_norm": edit.health.relative_norm,
        "before": before,
        "after": after,
    }


_PROMPTS = {"ES": "prompt", "PS": "rephrase_prompt", "NS": "locality_prompt"}


def _score(model: Any, encoder: Encoder, record: Mapping[str, Any]) -> dict[str, list[float]]:
    prompts = [record[field] for field in _PROMPTS.values() for _ in range(2)]
    targets = [record["target_new"], record["ground_truth"]] * len(_PROMPTS)
    means = [s.mean().item() for s in target_log_probs(model, prompts, targets, encoder=encoder)]
    return {metric: means[2 * i : 2 * i + 2] for i, metric in enumerate(_PROMPTS)}


def _percent(rows: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """ES, PS, NS and S of some records."""
    wins = {
        metric: [true > new if metric == "NS" else new > true for new, true in pairs]
        for metric in _PROMPTS
        if (pairs := [row[metric] for row in rows])
    }
    found = {metric: 100 * fmean(values) for metric, values in wins.items()}
    return found | {"S": harmonic_mean(list(found.values()))}


def _read(out: Any, setting: Mapping[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    """Rows that an earlier run wrote; a last line cut short by a crash does not count.

    Raises:
        ValueError: the file holds rows of another configuration or seed.
    """
    path = None if out is None else Path(out)
    if path is None or not path.is_file():
        return {}
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    rows = [json.loads(line) for line in whole.splitlines()]
    if any(row[name] != value for row in rows for name, value in setting.items()):
        raise ValueError(
            f"{path} holds a sweep with another configuration or seed; choose another file"
        )
    return {(row["layer"], row["case_id"]): row for row in rows}


def _append(out: Any, row: dict[str, Any]) -> None:
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with Path(out).open("a") as file:
            file.write(json.dumps(row) + "\n")
