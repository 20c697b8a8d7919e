"""Reversal: does the fact s -> o* also change what the model says about o*?

An edit is made by a prompt about its subject s. The paper found that the model then does not
complete the reverse question about the new object o* with s (Meng et al. 2022, section 3.7). Here
this is measured before and after the edit, on pairs of the LRE data set (Hernandez et al. 2024,
arXiv:2308.09124) whose relation is nearly one-to-one. The templates of both directions are ours:

    forward     The capital of s is -> o      the edit replaces o by o*, the object of s'
    backward    o is the capital of -> s      known before the edit, like the line above
    reverse     o* is the capital of -> ?     s and other subjects of the relation are scored

A fact counts only if the unedited model knows it in both directions: every token of the answer is
the top token. Otherwise no change of the reverse direction could be expected.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

from transformer_lens_rome.edits.kinds import EditRequest
from transformer_lens_rome.evaluation.benchmarks import Benchmark, Scores, register_benchmark
from transformer_lens_rome.evaluation.metrics import AnswerScore
from transformer_lens_rome.evaluation.record_list import RecordList
from transformer_lens_rome.evaluation.records import field_of, leave_out, text_of
from transformer_lens_rome.evaluation.scoring import Asked, Scoring
from transformer_lens_rome.files.strict_json import parse, read_bytes, stripped


class Templates(NamedTuple):
    """The two directions of a relation, each with `{}` for what the question is about."""

    forward: str
    reverse: str


RELATIONS = {
    "company CEO": Templates("The CEO of {} is", "{} is the CEO of"),
    "country capital city": Templates("The capital of {} is", "{} is the capital of"),
    "country largest city": Templates("The largest city in {} is", "{} is the largest city in"),
    "person father": Templates("{}'s father is named", "{} is the father of"),
    "person lead singer of band": Templates("{} is the lead singer of", "The lead singer of {} is"),
    "person mother": Templates("{}'s mother is named", "{} is the mother of"),
    "pokemon evolution": Templates("{} evolves into", "{} evolves from"),
    "superhero archnemesis": Templates("The archnemesis of {} is", "{} is the archnemesis of"),
    "superhero person": Templates("{}'s secret identity is", "{} is the secret identity of"),
}
"""The relations of LRE that are nearly one-to-one, by their name there."""
LEGEND = (
    "Reversal, half of the 95% interval in brackets. EA: all tokens of o* are top tokens after the "
    "edited prompt. After the reverse question about o*: p: the geometric mean of the "
    "probabilities of s's tokens, in percent; log p: its logarithm in nats; rise: log p less that "
    "of the unedited model; rank: that of s by p among subjects of its relation, at most {n}; "
    "first: rank 1, in percent. BA: s is still what the model says after the reverse question "
    "about its old object, in percent."
)
MOST = 50
"""The largest number of subjects that are ranked."""


@dataclass(frozen=True)
class ReversalRecord:
    """A fact to write, and the reverse question about its new object.

    Attributes:
        case_id: The record's place among all pairs that were read.
        request: The fact s -> o*, and its true object o.
        relation: The relation's name.
        reverse: The template of the reverse question.
        subjects: s, then the subject s' of which o* is the true object, then others.
    """

    case_id: int
    request: EditRequest
    relation: str
    reverse: str
    subjects: tuple[str, ...]

    @property
    def reverse_request(self) -> EditRequest:
        """The reverse fact o* -> s."""
        new, true = self.subjects[:2]
        return EditRequest(self.reverse, self.request.target_new, new, true)


@dataclass(frozen=True)
class Reversal(RecordList[ReversalRecord]):
    """The records of some relations, see `RecordList`."""

    @classmethod
    def load(cls, path: Any, *, limit: int | None = None, strict: bool = False) -> Reversal:
        """Read LRE's files of relations.

        A pair is left out if its subject or object occurs in another pair of its relation. The new
        object of a pair is the object of the next pair. Relations take turns, so that a limit
        leaves out none.

        Args:
            path: A file, or a folder of files, of which those of `RELATIONS` are read.
            limit: The number of records to keep; None: all.
            strict: Raise if a pair is invalid or left out. False: list it in `skipped`.

        Raises:
            ValueError: A file is not one of LRE's, none is of one of `RELATIONS`, or (with
                `strict`) pairs are invalid.
            OSError: There is no such file.
        """
        files = sorted(Path(path).glob("*.json")) if Path(path).is_dir() else [Path(path)]
        relations: list[list[ReversalRecord]] = []
        faults: list[str] = []
        unused: list[str] = []
        digests = []
        for file in files:
            data = read_bytes(file)
            name, samples = _relation(parse(data, str(file)), file)
            if name in RELATIONS:
                relations.append(_records(name, _pairs(name, samples, faults, unused)))
                digests.append(hashlib.sha256(data).hexdigest())
        turns = [one for turn in zip_longest(*relations) for one in turn if one is not None]
        if not turns:
            raise ValueError(f"{path} has no pairs of LRE's relations {', '.join(RELATIONS)}")
        leave_out(path, faults, len(turns) + len(faults) + len(unused), strict)
        records = (replace(one, case_id=i) for i, one in enumerate(turns[:limit]))
        digest = hashlib.sha256("".join(digests).encode()).hexdigest()
        return cls(tuple(records), (*faults, *unused), digest)


def _relation(content: Any, file: Path) -> tuple[str, list[Any]]:
    """Return the name and the samples of a file of LRE."""
    if not isinstance(content, dict):
        raise ValueError(f"{file} contains a {type(content).__name__}, not a relation of LRE")
    try:
        return text_of(content, "name"), field_of(content, "samples", list)
    except ValueError as error:
        raise ValueError(f"{file} is not a relation of LRE ({error})") from error


def _pairs(
    name: str, samples: Sequence[Any], faults: list[str], unused: list[str]
) -> list[tuple[str, str]]:
    """Return the pairs whose subject and object occur once; add the reasons for the others."""
    pairs: list[tuple[str, str]] = []
    for i, sample in enumerate(samples):
        try:
            if not isinstance(sample, dict):
                raise ValueError(f"it is a {type(sample).__name__}, not an object")
            pair = stripped(text_of(sample, "subject")), stripped(text_of(sample, "object"))
            EditRequest(RELATIONS[name].forward, *pair)
            EditRequest(RELATIONS[name].reverse, *reversed(pair))
            if "\\u" in "".join(pair):
                raise ValueError(f"{pair!r:.60} contains the code of a character")
            pairs.append(pair)
        except ValueError as error:
            faults.append(f"{name}, sample {i}: {error}")
    subjects, objects = (Counter(side) for side in zip(*pairs)) if pairs else (Counter(),) * 2
    kept = [(s, o) for s, o in pairs if subjects[s] == objects[o] == 1]
    unused += [f"{name}: {s} - {o} is not one-to-one" for s, o in pairs if (s, o) not in kept]
    return kept


def _records(name: str, pairs: Sequence[tuple[str, str]]) -> list[ReversalRecord]:
    """Return the records of a relation; the last pair gets the object of the first one."""
    templates, records = RELATIONS[name], []
    for i, (subject, true) in enumerate(pairs if len(pairs) > 1 else ()):
        after = [*pairs[i + 1 :], *pairs[:i]]
        request = EditRequest(templates.forward, subject, after[0][1], true)
        subjects = (subject, *(other for other, _ in after[: MOST - 1]))
        records.append(ReversalRecord(0, request, name, templates.reverse, subjects))
    return records


@dataclass(frozen=True)
class ReversalScoring(Scoring):
    """Score a fact in both directions, and some subjects after the reverse question.

    Attributes:
        both: Also write the reverse fact o* -> s, as a second request.
    """

    protocol: ClassVar[str] = "reversal"
    both: bool = False
    _first: bool = field(default=False, repr=False)

    @property
    def first(self) -> ReversalScoring:
        """A scoring of whether the fact is known in both directions."""
        return replace(self, _first=True)

    @property
    def edit_setting(self) -> dict[str, Any]:
        """The option `both`, if it is set."""
        return {"both": True} if self.both else {}

    def requests(self, record: ReversalRecord) -> tuple[EditRequest, ...]:
        """Return the fact, and the reverse fact if it is written too."""
        return (record.request, record.reverse_request) if self.both else (record.request,)

    def asked(self, record: ReversalRecord) -> Asked:
        """Return the question in both directions, and the reverse question for each subject."""
        request = record.request
        old = record.reverse.replace("{}", str(request.target_true))
        new = record.reverse.replace("{}", request.target_new)
        asked: dict[str, list[tuple[str, tuple[str, ...]]]] = {
            "rewrite": [(request.text, (request.target_new,))],
            "forward": [(request.text, (str(request.target_true),))],
            "backward": [(old, (request.subject,))],
        }
        if not self._first:
            asked["reverse"] = [(new, (subject,)) for subject in record.subjects]
        return asked


def is_known(scores: Scores) -> bool:
    """Return whether the model knows a fact in both directions."""
    return all(all(scores[kind][0].correct) for kind in ("forward", "backward"))


def reversal_metrics(scores: Scores, before: Scores) -> dict[str, float]:
    """Return the metrics of a record; `rise` only for other scores than the unedited model's."""
    means = [fmean(one.answer) for one in scores["reverse"]]
    rank = 1 + sum(mean > means[0] for mean in means[1:])
    metrics = {
        "EA": float(all(scores["rewrite"][0].correct)),
        "p": math.exp(means[0]),
        "log p": means[0],
        "rank": float(rank),
        "first": float(rank == 1),
        "BA": float(all(scores["backward"][0].correct)),
    }
    if before and before is not scores:
        metrics["rise"] = means[0] - fmean(before["reverse"][0].answer)
    return metrics


register_benchmark(
    Benchmark(
        name="reversal",
        load=Reversal.load,
        scoring=ReversalScoring,
        kinds=dict.fromkeys(("rewrite", "forward", "backward", "reverse"), AnswerScore),
        metrics=reversal_metrics,
        columns=("EA", "p", "log p", "rise", "rank", "first", "BA"),
        legend=LEGEND.replace("{n}", str(MOST)),
        plain=("log p", "rise", "rank"),
        panels={"EA": "efficacy", "first": "reversal", "BA": "old reverse"},
        counts=is_known,
        condition="the unedited model knows the true fact in both directions",
    )
)
