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
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from tqdm.auto import tqdm

from transformer_lens_rome.edits.ledger import applied
from transformer_lens_rome.evaluation.metrics import PromptScore, record_metrics, score
from transformer_lens_rome.evaluation.records import CounterFactRecord, as_record
from transformer_lens_rome.evaluation.rows import check_log_probs, record_digest
from transformer_lens_rome.evaluation.scoring import CounterFactScoring, score_records
from transformer_lens_rome.files.fields import make
from transformer_lens_rome.files.run_file import RunFile
from transformer_lens_rome.methods.rome import Rome, RomeConfig
from transformer_lens_rome.model import adapter, refusals
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.fingerprint import Fingerprint
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.sampling import sample_prefixes
from transformer_lens_rome.statistics.second_moment import SecondMoment
from transformer_lens_rome.statistics.sources import default_second_moment

logger = logging.getLogger(__name__)


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
        out: A file (`.jsonl`) to which each record's numbers are written as soon as they are known.
            A stopped sweep continues from it, with the same or more records and layers.
        progress: Show a progress bar.

    Raises:
        ValueError: There are no records, a record is invalid, a layer is out of range, or `out`
            contains another sweep.
    """
    if not records:
        raise ValueError("records is empty; give sweep_layers a few dozen CounterFact records")
    refusals.check_editable(model, layers)
    records = [as_record(record) for record in records]
    encoder = Encoder.of(model)
    if prefixes is None:
        prefixes = sample_prefixes(model, config.prefix_lengths, seed=seed, encoder=encoder)
    scores = []
    with _opened(out, model, encoder, config, prefixes, seed) as file:
        sweep = _Sweep(model, encoder, tuple(prefixes), config, seed, file, {})
        for layer in layers:
            if second_moments is None:
                moment = default_second_moment(model, layer, prepend_bos=encoder.prepends_bos)
            else:
                moment = second_moments[layer]
            each = tqdm(records, desc=f"edits at layer {layer}", disable=not progress)
            scores.append(_layer_score(layer, list(sweep.rows(layer, moment, each))))
            logger.info("%s", scores[-1])
    return scores


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Means:
    """Mean log-probabilities of the tokens of the new and the true target, in nats.

    Attributes:
        ES: After the request's prompt.
        PS: After the first paraphrase.
        NS: After the first prompt about a neighbour.
    """

    ES: tuple[float, float]
    PS: tuple[float, float]
    NS: tuple[float, float]

    def __post_init__(self) -> None:
        for name, pair in dataclasses.asdict(self).items():
            check_log_probs(name, pair)

    @classmethod
    def of(cls, model: Model, encoder: Encoder, record: CounterFactRecord) -> Means:
        """Score the first prompt of each kind with the model as it is now."""
        if not (record.paraphrase_prompts and record.neighborhood_prompts):
            raise ValueError(
                f"record {record.case_id} has no paraphrase or no neighbour, which a sweep scores; "
                "the flat file has paraphrases for some records only, see true_paraphrases of "
                "CounterFact.load"
            )
        first = dataclasses.replace(
            record,
            continuation_prompts=(),
            paraphrase_prompts=record.paraphrase_prompts[:1],
            neighborhood_prompts=record.neighborhood_prompts[:1],
        )
        (scores,) = score_records(model, encoder, CounterFactScoring(), [first])
        return cls(*((_mean(prompt.new), _mean(prompt.true)) for (prompt,) in scores.values()))

    def metrics(self) -> dict[str, float]:
        """Return ES, PS and NS of the record; a mean stands for a target of one token."""
        pairs = {"rewrite": self.ES, "paraphrase": self.PS, "neighborhood": self.NS}.items()
        scores = {kind: [PromptScore([new], [true], (), ())] for kind, (new, true) in pairs}
        return record_metrics(scores)


def _mean(log_probs: Sequence[float]) -> float:
    return torch.tensor(log_probs, dtype=torch.float32).mean().item()


@dataclass(frozen=True)
class SweepRow:
    """A test edit of one record at one layer.

    Attributes:
        layer: The layer, from 0.
        case_id: The record's number in the data set.
        record: Digits of a sha256 of the record, from `record_digest`.
        second_moment: sha256 of the sum of C at this layer.
        before: The scores of the unedited model.
        after: The scores of the edited model.
        seconds: Duration of the edit.
        p_after: Probability of the target after the edit.
        relative_norm: ||delta W|| / ||W||.
    """

    layer: int
    case_id: int
    record: str
    second_moment: str
    before: Means
    after: Means
    seconds: float
    p_after: float | None
    relative_norm: float | None

    @property
    def key(self) -> tuple[int, int]:
        """The layer and the record's number."""
        return self.layer, self.case_id

    def to_json(self) -> dict[str, Any]:
        """Return the row as a JSON object."""
        return dataclasses.asdict(self)


def sweep_file(path: Any, setting: Mapping[str, Any]) -> RunFile[SweepRow]:
    """Open the file of a sweep's rows; raise ValueError if it belongs to another sweep."""
    return RunFile(path, setting, {}, lambda _first: partial(make, SweepRow))


def _opened(
    out: Any,
    model: Model,
    encoder: Encoder,
    config: RomeConfig,
    prefixes: Sequence[str],
    seed: int,
) -> AbstractContextManager[RunFile[SweepRow] | None]:
    """Open the file of a sweep, if there is one."""
    if out is None:
        return nullcontext()
    setting = {
        "protocol": "sweep",
        "model": adapter.model_name(model),
        "model_hash": Fingerprint.of(model).digest,
        "prepend_bos": encoder.prepends_bos,
        "seed": seed,
        "config": dataclasses.asdict(config),
        "prefixes": prefixes,
    }
    return sweep_file(out, setting)


# ---------------------------------------------------------------- the sweep


@dataclass(frozen=True)
class _Sweep:
    """The data that all layers share; `before` has the scores of the unedited model, by case."""

    model: Model
    encoder: Encoder
    prefixes: tuple[str, ...]
    config: RomeConfig
    seed: int
    file: RunFile[SweepRow] | None
    before: dict[int, Means]

    def rows(
        self, layer: int, moment: SecondMoment, records: Iterable[CounterFactRecord]
    ) -> Iterator[SweepRow]:
        """Yield every record's row, from the file, or measured and written to the file."""
        method = Rome(layer, moment, self.prefixes, self.config)
        statistics = adapter.weight_hash(moment.sum_kk)
        for record in records:
            if self.file and (row := self.file.rows.get((layer, record.case_id))):
                if (row.record, row.second_moment) != (record_digest(record), statistics):
                    raise ValueError(
                        f"{self.file.path} contains edits at layer {layer} of other records or "
                        "with other statistics; give another file"
                    )
                yield row
                continue
            row = self._measured_row(record, method, layer, statistics)
            if self.file:
                self.file.append(row)
            yield row

    def _measured_row(
        self, record: CounterFactRecord, method: Rome, layer: int, statistics: str
    ) -> SweepRow:
        """Score one record before and after a test edit, and undo the edit."""
        case = record.case_id
        if case not in self.before:
            self.before[case] = Means.of(self.model, self.encoder, record)
        started = time.perf_counter()
        edit = method.compute(self.model, record.request, seed=self.seed)
        seconds = round(time.perf_counter() - started, 2)
        with applied(self.model, edit):
            after = Means.of(self.model, self.encoder, record)
        return SweepRow(
            layer,
            case,
            record_digest(record),
            statistics,
            self.before[case],
            after,
            seconds,
            edit.health.p_after,
            edit.health.relative_norm,
        )


def _layer_score(layer: int, rows: Sequence[SweepRow]) -> LayerScore:
    """Average the rows of a layer."""
    after, before = _percent([row.after for row in rows]), _percent([row.before for row in rows])
    return LayerScore(layer, len(rows), **after, before=before)


def _percent(rows: Sequence[Means]) -> dict[str, float]:
    """Return ES, PS, NS and S of the records."""
    each = [row.metrics() for row in rows]
    percents = {name: 100 * fmean(one[name] for one in each) for name in ("ES", "PS", "NS")}
    return percents | {"S": score(*percents.values())}
