"""CounterFact's metrics from raw log-probabilities (Meng et al. 2022, section 3.4).

For one prompt, p(t) is the geometric mean of the probabilities of the target's tokens, as in the
released code; a joint probability would favour short targets.

    ES, PS      p(new) > p(true)    after the request's prompt, and after paraphrases
    EM, PM      p(new) - p(true)    at the same prompts
    NS          p(true) > p(new)    at prompts about neighbours
    NM          p(true) - p(new)
    EA, PA      every token of the new target is the top token; NA: of the true one, at neighbours
    GE, RS      fluency and consistency of generated text, see `generation`
    S           the harmonic mean of the averages of ES, PS and NS

Beyond the paper's:

    AS, AM      as ES, EM, at attribute prompts: other subjects, of which the new target is true. A
                rise shows that the edit makes the model say the new target about everything.
    NS+, NM+    as NS, NM, with the edited fact in front of the neighbour's prompt
    NKL, NKL+   KL(edited || unedited) of the next token after these two prompts, in nats
                (CounterFact+, arXiv:2305.17553; there divided by the size of the vocabulary)
    CS, CM, CA  as PS, PM, PA, at the flat schema's continuation prompts, see `records`

A metric is absent if a record has no prompt of its kind. EA is also the share of prompts that
greedy decoding continues with exactly the new target.

zsRE has no pairs of targets: there EA, PA and NA are shares of correct tokens, and S is the
harmonic mean of their averages.

A record's value is the mean over its prompts. A table's value is the mean over records, in percent,
with the 95% interval from the real number of records. S is not a mean, so it has a bootstrap
interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, harmonic_mean, stdev
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.files.intervals import half_width
from transformer_lens_rome.torch_states import torch_defaults

KINDS = {
    "rewrite": ("ES", "EM", "EA"),
    "paraphrase": ("PS", "PM", "PA"),
    "continuation": ("CS", "CM", "CA"),
    "neighborhood": ("NS", "NM", "NA"),
    "neighborhood_plus": ("NS+", "NM+", "NA+"),
    "attribute": ("AS", "AM", "AA"),
}
"""The kinds of prompts, with the names of success, magnitude and accuracy."""
KL_NAMES = {"neighborhood": "NKL", "neighborhood_plus": "NKL+"}
OF_TRUE = ("neighborhood", "neighborhood_plus")
"""The kinds of prompts after which the true target should be more probable."""
NAMES = (
    *("S", "ES", "EM", "PS", "PM", "CS", "CM", "NS", "NM", "NS+", "NM+", "NKL", "NKL+"),
    *("AS", "AM", "GE", "RS", "EA", "PA", "CA", "NA"),
)
"""The columns of a table, in order."""
S_OF = ("ES", "PS", "NS")


class PromptScore(NamedTuple):
    """The model's log-probabilities of both targets after one prompt.

    Attributes:
        new: Log-probability of each token of the new target, in nats.
        true: The same for the true target.
        new_correct: Whether each token of the new target is the top token.
        true_correct: The same for the true target.
    """

    new: Sequence[float]
    true: Sequence[float]
    new_correct: Sequence[bool]
    true_correct: Sequence[bool]


class AnswerScore(NamedTuple):
    """The model's log-probabilities of the only target of a prompt, as in zsRE.

    Attributes:
        answer: Log-probability of each token of the target, in nats.
        correct: Whether each token of the target is the top token.
    """

    answer: Sequence[float]
    correct: Sequence[bool]


class Estimate(NamedTuple):
    """An average in percent, half the width of its 95% interval, and the number of records.

    The half width is 1.96 standard errors; for S, half the width of the bootstrap interval.
    """

    mean: float
    half_width: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} ({self.half_width:.1f})"


def record_metrics(scores: Mapping[str, Sequence[PromptScore]]) -> dict[str, float]:
    """Return ES to AA of one record, as fractions; each is the mean over the prompts of its kind.

    Args:
        scores: Scores by kind of prompt, a key of `KINDS`.

    Raises:
        ValueError: A target has no tokens, or a log-probability is not a number.
    """
    metrics = {}
    for kind, names in KINDS.items():
        if prompts := scores.get(kind, ()):
            each = [_prompt_metrics(prompt, kind in OF_TRUE) for prompt in prompts]
            for name, values in zip(names, zip(*each), strict=True):
                metrics[name] = fmean(values)
    return metrics


def zsre_metrics(scores: Mapping[str, Sequence[AnswerScore]]) -> dict[str, float]:
    """Return EA, PA and NA of one zsRE record: the shares of answer tokens that are the top token.

    Args:
        scores: Scores by kind of prompt, as in `record_metrics`.
    """
    return {
        accuracy: fmean(float(c) for prompt in scores[kind] for c in prompt.correct)
        for kind, (_, _, accuracy) in KINDS.items()
        if kind in scores
    }


def _prompt_metrics(score: PromptScore, for_true: bool) -> tuple[float, float, float]:
    """Return success, magnitude and accuracy at one prompt."""
    if not score.new or not score.true:
        raise ValueError("a target without tokens has no probability")
    p_new, p_true = math.exp(fmean(score.new)), math.exp(fmean(score.true))
    if math.isnan(p_new) or math.isnan(p_true):
        raise ValueError("a log-probability is not a number")
    # compare in log space, where tiny probabilities still differ
    advantage = fmean(score.new) - fmean(score.true)
    if for_true:
        return float(advantage < 0), p_true - p_new, float(all(score.true_correct))
    return float(advantage > 0), p_new - p_true, float(all(score.new_correct))


def summarise(
    rows: Sequence[Mapping[str, float]],
    *,
    columns: Sequence[str] = NAMES,
    s_of: Sequence[str] = S_OF,
    plain: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Estimate]:
    """Return averages over records, in percent, with 95% intervals.

    GE is in hundredths of bits, NKL and NKL+ in hundredths of nats.

    Args:
        rows: The metrics of each record, by name. A metric that no record has is left out.
        columns: The names of the metrics, in order.
        s_of: The metrics of which S is the harmonic mean; empty for no S.
        plain: The metrics that are no fractions, and are averaged as they are.
        seed: The seed of the bootstrap of S.
    """
    estimates = {}
    for name in columns:
        scale = 1 if name in plain else 100
        if values := [scale * row[name] for row in rows if name in row]:
            half = half_width(stdev(values), len(values)) if len(values) > 1 else math.nan
            estimates[name] = Estimate(fmean(values), half, len(values))
    complete = [[row[part] for part in s_of] for row in rows if s_of and set(s_of) <= set(row)]
    if complete:
        estimates = {"S": _score(complete, seed)} | estimates
    return estimates


def score(es: float, ps: float, ns: float) -> float:
    """Return S: the harmonic mean of three averages in percent; 0 if one of them is 0."""
    return harmonic_mean([es, ps, ns])


@torch_defaults()
def _score(rows: Sequence[Sequence[float]], seed: int, times: int = 1000) -> Estimate:
    """Return S, with half the width of the 95% interval of a bootstrap over records."""
    values = 100 * torch.tensor(rows, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(values), (times, len(values)), generator=generator)
    means = values[chosen].mean(1)
    resampled = torch.where((means > 0).all(1), 3 / (1 / means).sum(1), 0.0)
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    half = (high - low) / 2 if len(values) > 1 else math.nan
    return Estimate(score(*values.mean(0).tolist()), half, len(values))


@torch_defaults()
def paired_difference(
    one: Sequence[Mapping[str, float]],
    other: Sequence[Mapping[str, float]],
    name: str,
    *,
    scale: float = 100,
) -> tuple[Estimate, float]:
    """Compare two methods on the same records: mean difference, and a sign-flip test's p-value.

    Args:
        one: Rows of `record_metrics`, for the same records in the same order as `other`.
        other: The rows to subtract.
        name: A metric that is a mean over records (not S).
        scale: 100 for a fraction, 1 for another number.

    Returns:
        The difference in percentage points, or the metric's unit, with its interval, and the
        two-sided p-value from 10,000 random choices of signs (or from all if there are fewer).
    """
    if len(one) != len(other):
        raise ValueError(f"the runs have {len(one)} and {len(other)} records; pair them first")
    differences = torch.tensor(
        [scale * (a[name] - b[name]) for a, b in zip(one, other, strict=True)], dtype=torch.float64
    )
    n = len(differences)
    half = half_width(differences.std().item(), n) if n > 1 else math.nan
    estimate = Estimate(differences.mean().item(), half, n)
    return estimate, _sign_flip(differences)


def _sign_flip(differences: Float[Tensor, "record"], times: int = 10_000) -> float:
    """Return the share of sign choices that give a mean at least as far from 0."""
    n = len(differences)
    signs: Iterable[Tensor]
    if 2**n <= times:
        signs, observed = [torch.arange(2**n)[:, None] >> torch.arange(n) & 1], 0
    else:
        generator = torch.Generator().manual_seed(0)
        signs = (torch.randint(2, (100, n), generator=generator) for _ in range(times // 100))
        observed = 1  # the observed signs are one of the possible choices
    means = torch.cat([((1 - 2 * bits).double() @ differences / n).abs() for bits in signs])
    as_far = (means >= differences.mean().abs() - 1e-12).sum().item()
    return (as_far + observed) / (len(means) + observed)
