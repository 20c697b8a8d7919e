"""A sweep over layers: test edits on a few records, scored with CounterFact's metrics.

Use it to choose the layer and the constants of ROME. For each record, with p the geometric mean
over a target's tokens:

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

from tqdm.auto import tqdm

from transformer_lens_rome.edits.ledger import applied
from transformer_lens_rome.evaluation.records import CounterFactRecord, as_record
from transformer_lens_rome.files.fields import fits
from transformer_lens_rome.files.strict_json import parse, read_bytes
from transformer_lens_rome.methods.rome import Rome, RomeConfig
from transformer_lens_rome.model import adapter, refusals
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.sampling import sample_prefixes
from transformer_lens_rome.prompts.scores import target_log_probs
from transformer_lens_rome.statistics.second_moment import SecondMoment
from transformer_lens_rome.statistics.sources import default_second_moment

logger = logging.getLogger(__name__)

_METRICS = ("ES", "PS", "NS")


@dataclass(frozen=True)
class LayerScore:
    """Scores of test edits at one layer, in percent; `before`: scores of the unedited model."""

    layer: int
    n: int
    ES: float
    PS: float
    NS: float
    S: float
    before: Mapping[str, float]


@model_call
def sweep_layers(
    model: Any,
    records: Sequence[CounterFactRecord | Mapping[str, Any]],
    layers: Sequence[int],
    *,
    second_moments: Mapping[int, SecondMoment] | None = None,
    prefixes: Sequence[str] | None = None,
    config: RomeConfig = RomeConfig(),
    seed: int = 0,
    out: Any = None,
    progress: bool = True,
) -> list[LayerScore]:
    """Edit each record at each layer, score the edit, undo it; the best layer has the highest S.

    Args:
        model: A HookedTransformer or TransformerBridge.
        records: From `CounterFact.load`, or dictionaries of either of its schemas. The first
            paraphrase and the first neighbourhood prompt of each record are scored.
        layers: Layers to try, from 0.
        second_moments: C by layer, as `collect_second_moment(model, texts, layers)` returns it.
        prefixes: As in `compute_rome_edit`.
        config: As in `compute_rome_edit`.
        seed: As in `compute_rome_edit`.
        out: A JSON Lines file to which each record's numbers are written as soon as they are known.
            A stopped sweep continues from it.
        progress: Show a progress bar.

    Raises:
        ValueError: There are no records, a record is invalid, a layer is out of range, or `out`
            contains rows of another setting.
    """
    if not records:
        raise ValueError("records is empty; give sweep_layers a few dozen CounterFact records")
    refusals.check_editable(model, layers)
    records = [as_record(record) for record in records]
    encoder = Encoder.of(model)
    if prefixes is None:
        prefixes = sample_prefixes(model, config.prefix_lengths, seed=seed, encoder=encoder)
    done = _read(out)
    before: dict[int, dict[str, list[float]]] = {}
    scores = []
    for layer in layers:
        if second_moments is None:
            moment = default_second_moment(model, layer, prepend_bos=encoder.prepends_bos)
        else:
            moment = second_moments[layer]
        method = Rome(layer, moment, tuple(prefixes), config)
        setting = _setting(model, method, layer, moment, seed)
        rows = []
        for record in tqdm(records, desc=f"edits at layer {layer}", disable=not progress):
            case = record.case_id
            if case not in before:
                before[case] = _score(model, encoder, record)
            if (row := done.get((layer, case))) is None:
                row = _test_edit(model, encoder, record, method, seed)
                row = {"layer": layer, "case_id": case, "before": before[case]} | row | setting
                _append(out, row)
            elif any(row.get(name) != value for name, value in setting.items()) or not (
                _close(row["before"], before[case])
            ):
                raise ValueError(
                    f"{out} contains edits at layer {layer} of another model, other records, "
                    "another configuration, seed, prefixes or statistics; give another file"
                )
            rows.append(row)
        scores.append(_layer_score(layer, rows))
        logger.info("%s", scores[-1])
    return scores


def _setting(
    model: Any, method: Rome, layer: int, moment: SecondMoment, seed: int
) -> dict[str, Any]:
    """Return the setting of a row, apart from its record, as it is after reading from JSON."""
    setting = {
        "seed": seed,
        "config": dataclasses.asdict(method.config),
        "prefixes": method.prefixes,
        "model_hash": adapter.weight_hash(adapter.w_out(model, layer)),
        "second_moment": adapter.weight_hash(moment.sum_kk),
    }
    return json.loads(json.dumps(setting))


def _close(one: Mapping[str, list[float]], other: Mapping[str, list[float]]) -> bool:
    """Return whether scores are of the same record and model; devices differ by far less."""
    return all(abs(a - b) < 0.1 for m in _METRICS for a, b in zip(one[m], other[m], strict=True))


def _test_edit(
    model: Any, encoder: Encoder, record: CounterFactRecord, method: Rome, seed: int
) -> dict[str, Any]:
    """Make one edit; return the mean log-probabilities [new, true] of each prompt after it."""
    started = time.perf_counter()
    edit = method.compute(model, record.request, seed=seed)
    seconds = time.perf_counter() - started
    with applied(model, edit):
        after = _score(model, encoder, record)
    return {
        "seconds": round(seconds, 2),
        "p_after": edit.health.p_after,
        "relative_norm": edit.health.relative_norm,
        "after": after,
    }


def _layer_score(layer: int, rows: Sequence[Mapping[str, Any]]) -> LayerScore:
    before, after = (_percent([row[when] for row in rows]) for when in ("before", "after"))
    return LayerScore(layer, len(rows), **after, before=before)


def _score(model: Any, encoder: Encoder, record: CounterFactRecord) -> dict[str, list[float]]:
    """Return the mean log-probabilities [new, true] after each of the three prompts."""
    request = record.request
    if request.target_true is None:
        raise ValueError(
            f"record {record.case_id} has no true target; a sweep scores both targets, so give "
            "the request target_true="
        )
    asked = [request.text, record.paraphrase_prompts[0], record.neighborhood_prompts[0]]
    prompts = [prompt for prompt in asked for _ in range(2)]
    targets = [request.target_new, request.target_true] * len(asked)
    means = [s.mean().item() for s in target_log_probs(model, prompts, targets, encoder=encoder)]
    return {metric: means[2 * i : 2 * i + 2] for i, metric in enumerate(_METRICS)}


def _percent(rows: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Return ES, PS, NS and S of the records."""

    def wins(metric: str, new: float, true: float) -> bool:
        return true > new if metric == "NS" else new > true

    percents = {m: 100 * fmean(wins(m, *row[m]) for row in rows) for m in _METRICS}
    return percents | {"S": harmonic_mean(list(percents.values()))}


def _read(out: Any) -> dict[tuple[int, int], dict[str, Any]]:
    """Read the rows of an earlier run, and remove a last line that a crash cut short.

    Raises:
        ValueError: A line is not a row of a sweep; the file is then not changed.
    """
    if out is None or not Path(out).is_file():
        return {}
    data = read_bytes(out)
    whole = data[: data.rfind(b"\n") + 1]
    rows = {}
    for i, line in enumerate(whole.splitlines()):
        row = parse(line, f"{out}: line {i + 1}")
        if not _is_row(row):
            raise ValueError(f"{out}: line {i + 1} is not a row of a sweep; give another file")
        rows[row["layer"], row["case_id"]] = row
    if not rows and data[:1] not in (b"", b"{"):
        raise ValueError(f"{out} is not the file of a sweep; give another file")
    if whole != data:
        Path(out).write_bytes(whole)
    return rows


def _is_row(row: Any) -> bool:
    """Return whether a line has the fields from which scores are computed."""
    if not isinstance(row, dict) or not all(type(row.get(n)) is int for n in ("layer", "case_id")):
        return False
    for scores in (row.get("before"), row.get("after")):
        if not isinstance(scores, dict):
            return False
        for metric in _METRICS:
            if not fits(scores.get(metric), list[float]) or len(scores[metric]) != 2:
                return False
    return True


def _append(out: Any, row: dict[str, Any]) -> None:
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with Path(out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
