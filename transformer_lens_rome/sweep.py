"""A sweep over layers: test edits on a few records, scored with CounterFact's metrics.

Use it to choose the layer and the constants of ROME. Each layer is a run of `evaluate_counterfact`,
on all prompts of the records.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformer_lens_rome.evaluation.evaluate import evaluate_counterfact
from transformer_lens_rome.evaluation.records import CounterFact, CounterFactRecord, as_record
from transformer_lens_rome.evaluation.results import Results
from transformer_lens_rome.methods.rome import Rome, RomeConfig
from transformer_lens_rome.model import refusals
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.statistics.second_moment import SecondMoment

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LayerScore:
    """Scores of test edits at one layer.

    Attributes:
        layer: The layer, from 0.
        results: The run; it has every metric, with intervals, before and after the edits.
    """

    layer: int
    results: Results

    ES = property(lambda self: self._percent("ES"), doc="Efficacy, in percent.")
    PS = property(lambda self: self._percent("PS"), doc="Generalisation, in percent.")
    NS = property(lambda self: self._percent("NS"), doc="Specificity, in percent.")
    S = property(lambda self: self._percent("S"), doc="The harmonic mean of ES, PS and NS.")

    def _percent(self, name: str) -> float:
        if not (scores := self.results.scores()):
            reason = next(iter(self.results.failed.values()))
            raise ValueError(f"every edit at layer {self.layer} failed, the first one: {reason}")
        return scores[name].mean

    def __str__(self) -> str:
        scores, failed = self.results.scores(), len(self.results.failed)
        shown = ", ".join(f"{name} {scores[name]}" for name in ("ES", "PS", "NS", "S") if scores)
        return f"layer {self.layer}: {shown}" + (f", {failed} failed" if failed else "")


@model_call
def sweep_layers(
    model: Model,
    records: Sequence[CounterFactRecord | Mapping[str, Any]],
    layers: Sequence[int],
    *,
    second_moments: Mapping[int, SecondMoment] | None = None,
    prefixes: Sequence[str] | None = None,
    config: RomeConfig = RomeConfig(),
    seed: int = 0,
    out: Any = None,
    progress: bool = True,
    batch_size: int | None = None,
) -> list[LayerScore]:
    """Edit each record at each layer, score the edit, undo it; the best layer has the highest S.

    Args:
        model: A HookedTransformer or TransformerBridge.
        records: From `CounterFact.load`, or dictionaries of either of its schemas. All their
            prompts are scored.
        layers: Layers to try, from 0.
        second_moments: C by layer, as `collect_second_moment(model, texts, layers)` returns it.
        prefixes: As in `compute_rome_edit`.
        config: As in `compute_rome_edit`.
        seed: As in `compute_rome_edit`.
        out: A folder, to which each record's numbers are written as soon as they are known, a file
            for each layer. A stopped sweep continues from them, with the same or more records and
            layers. `Results.load` reads the files.
        progress: Show a progress bar.
        batch_size: As in `evaluate_counterfact`.

    Raises:
        ValueError: There are no records, a record is invalid or has no paraphrase or no neighbour,
            a layer is out of range, or `out` contains another sweep.
    """
    if not records:
        raise ValueError("records is empty; give sweep_layers a few dozen CounterFact records")
    refusals.check_editable(model, layers)
    parsed = records if isinstance(records, CounterFact) else list(map(as_record, records))
    _check_prompts(parsed)
    scores = []
    for layer in layers:
        moment = None if second_moments is None else second_moments[layer]
        results = evaluate_counterfact(
            model,
            parsed,
            Rome(layer, moment, prefixes, config),
            out=None if out is None else Path(out) / f"layer_{layer}.jsonl",
            seed=seed,
            progress=progress,
            batch_size=batch_size,
        )
        scores.append(LayerScore(layer, results))
        logger.info("%s", scores[-1])
    return scores


def _check_prompts(records: Sequence[CounterFactRecord]) -> None:
    """Raise ValueError if a record lacks prompts for PS or NS."""
    for record in records:
        if not (record.paraphrase_prompts and record.neighborhood_prompts):
            raise ValueError(
                f"record {record.case_id} has no paraphrase or no neighbour, which a sweep scores; "
                "the flat file has paraphrases for some records only, see true_paraphrases of "
                "CounterFact.load"
            )
