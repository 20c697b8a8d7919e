"""Analyse raters' answers: shares with intervals over items and raters, and agreement.

A share is the part of all answers to a question that prefer a method; the shares of all methods and
of "no difference" add up to 100%. Its interval is a bootstrap's over both: items and raters are
drawn anew, with replacement and independently, and an answer counts as often as its item times its
rater (the pigeonhole bootstrap, Owen 2007, doi:10.1214/07-AOAS122). With one rater it is over items
only, and says nothing about other raters.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot

from transformer_lens_rome.files.markdown import escaped, table
from transformer_lens_rome.rate.agreement import krippendorff_alpha
from transformer_lens_rome.rate.answers import Rater, read_rater
from transformer_lens_rome.rate.key import QUESTIONS, SAME, Key
from transformer_lens_rome.showing import Shown, figure
from transformer_lens_rome.torch_states import torch_defaults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TIMES = 2000


class Share(NamedTuple):
    """The share of answers that prefer a method, in percent.

    Attributes:
        mean: The share.
        low: The lower end of its 95% interval.
        high: The upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} ({self.low:.1f} to {self.high:.1f})"


@dataclass(frozen=True)
class Preferences(Shown):
    """The preferences of some raters.

    Attributes:
        shares: By question, the share of each method, and of "no difference".
        agreement: By question, Krippendorff's alpha of the raters; not a number if it is undefined,
            as for one rater.
        n_answers: By question, the number of answers.
        n_items: The number of items of the page.
        raters: The random digits that the page gave each rater.
        simulated: Whether programs answered, and no people.
        notes: What a reader of the shares should know, such as missing answers.
    """

    shares: Mapping[str, Mapping[str, Share]]
    agreement: Mapping[str, float]
    n_answers: Mapping[str, int]
    n_items: int
    raters: tuple[str, ...]
    simulated: bool
    notes: tuple[str, ...] = ()

    @property
    def who(self) -> str:
        """The number of raters, and whether they are people."""
        n, kind = len(self.raters), "simulated rater" if self.simulated else "rater"
        return f"{n} {kind}{'s' * (n != 1)}{' (no people)' * self.simulated}"

    def table(self) -> str:
        """Return the shares as a Markdown table, with a legend."""
        head, rows = self.cells()
        return "\n".join([table([*map(escaped, head)], rows), "", self.legend])

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Return the columns of the table, and its rows: one per question."""
        names = list(next(iter(self.shares.values())))
        rows = [
            [
                question,
                str(self.n_answers[question]),
                *(str(shares[name]) for name in names),
                "-" if math.isnan(alpha := self.agreement[question]) else f"{alpha:.2f}",
            ]
            for question, shares in self.shares.items()
        ]
        return ["question", "answers", *names, "alpha"], rows

    @property
    def legend(self) -> str:
        """What the numbers are, and the notes."""
        return " ".join(
            [
                f"Answers of {self.who} to {self.n_items} items: the share that prefers each "
                "method, in percent, with its 95% interval from a bootstrap over items and "
                "raters; alpha: Krippendorff's, the raters' agreement.",
                *self.notes,
            ]
        )

    def plot(self) -> Figure:
        """Plot the shares as bars, one panel per question."""
        return figure(self)


def analyse(files: Any, *, key: Any, seed: int = 0) -> Preferences:
    """Return which methods raters prefer, from the files that they exported.

    A question without an answer is left out and counted in the notes. A file that cannot be used is
    refused; leave it out of `files` to go on.

    Args:
        files: The path of one file, or paths.
        key: The page's `Key`, or the path of its `.key.json`.
        seed: The seed of the bootstrap.

    Raises:
        ValueError: There is no file; one is damaged, altered, without answers, or of another page
            or another version of the page; two are of one rater; or only some are simulated.
        OSError: A file does not exist.
    """
    key = key if isinstance(key, Key) else Key.load(key)
    paths = [files] if isinstance(files, (str, os.PathLike)) else list(files)
    raters = [read_rater(path, key) for path in paths]
    _check_raters(paths, raters)
    answers = _tensor(raters)
    shares, agreement, n_answers = {}, {}, {}
    for i, question in enumerate(QUESTIONS):
        some = answers[:, :, i]
        n_answers[question] = int((some >= 0).sum())
        shares[question] = _shares(some, [*key.methods, SAME], seed)
        agreement[question] = krippendorff_alpha([rater.answers[question] for rater in raters])
    return Preferences(
        shares,
        agreement,
        n_answers,
        len(key.items),
        tuple(rater.name for rater in raters),
        raters[0].simulated,
        tuple(_notes(raters, len(key.items))),
    )


def _check_raters(paths: Sequence[Any], raters: Sequence[Rater]) -> None:
    """Raise ValueError if there are no raters, one twice, or people and programs together."""
    if not raters:
        raise ValueError("there is no file to analyse; pass the files that raters exported")
    seen: dict[str, Any] = {}
    for path, rater in zip(paths, raters, strict=True):
        if rater.name in seen:
            raise ValueError(
                f"{seen[rater.name]} and {path} are of one rater, {rater.name}; pass the last of "
                "them only"
            )
        seen[rater.name] = path
    programs = [path for path, rater in zip(paths, raters, strict=True) if rater.simulated]
    if 0 < len(programs) < len(raters):
        raise ValueError(
            f"{programs[0]} is of a simulated rater, and other files are of people; analyse them "
            "apart"
        )


def _notes(raters: Sequence[Rater], n_items: int) -> Iterable[str]:
    """Yield a sentence about each thing that readers should know."""
    whole = len(QUESTIONS) * n_items
    for rater in raters:
        if rater.missing:
            yield f"Rater {rater.name} left {rater.missing} of {whole} questions unanswered."
    if len(raters) == 1:
        yield "With one rater, the intervals are over items only, and there is no agreement."


def _tensor(raters: Sequence[Rater]) -> Tensor:
    """Return the answers by rater, item and question; -1 where there is none."""
    rows = [list(zip(*(rater.answers[name] for name in QUESTIONS))) for rater in raters]
    return torch.tensor(
        [[[-1 if one is None else one for one in item] for item in row] for row in rows]
    )


@torch_defaults()
def _shares(answers: Tensor, names: Sequence[str], seed: int) -> dict[str, Share]:
    """Return the share of each method, from the answers by rater and item to one question."""
    given = one_hot(answers + 1, len(names) + 1)[..., 1:].double()  # rater, item, method
    if not given.any():
        return {name: Share(math.nan, math.nan, math.nan) for name in names}
    generator = torch.Generator().manual_seed(seed)
    by_rater, by_item = (_weights(n, generator) for n in answers.shape)
    drawn = torch.einsum("tr,rim,ti->tm", by_rater, given, by_item)
    drawn = drawn[drawn.sum(1) > 0]  # a draw may have no answer, if many are missing
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = (100 * drawn / drawn.sum(1, keepdim=True)).quantile(ends, dim=0)
    mean = 100 * given.sum((0, 1)) / given.sum()
    several = answers.shape[1] > 1
    return {
        name: Share(*values) if several else Share(values[0], math.nan, math.nan)
        for name, *values in zip(names, mean.tolist(), low.tolist(), high.tolist())
    }


def _weights(n: int, generator: torch.Generator) -> Float[Tensor, "draw n"]:
    """Return how often each of n things is drawn, in each of the bootstrap's draws."""
    chosen = torch.randint(n, (_TIMES, n), generator=generator)
    return torch.zeros(_TIMES, n, dtype=torch.float64).scatter_add_(
        1, chosen, torch.ones_like(chosen, dtype=torch.float64)
    )
