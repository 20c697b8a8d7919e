"""MQuAKE: questions over several edited facts (Zhong et al. 2023, arXiv:2305.14795).

    {"case_id", "requested_rewrite": [{"prompt", "subject", "target_new": {"str"},
     "target_true": {"str"}}, ...], "questions": [three wordings], "answer", "answer_alias",
     "new_answer", "new_answer_alias", ...}

All facts of a case are written, together by a method that can (`compute_many`), else one after
another. A case is answered if the model answers any of its questions with the new answer or an
alias. The answer is written greedily after the published few-shot prompt, which is read from a file
at each run and is not part of this package:

    multihop-prompts.txt        "Q: ... A: ..."         the answer is the rest of the line
    multihop-cot-prompts.txt    "Question: ...          the answer is the rest of the line after
                                Thoughts: ...           "Answer:"
                                Answer: ..."

A final full stop is not part of an answer; letters count as they are. The published evaluation also
asks for each single fact with prompts of its relation; here an edit is checked by its own prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

from transformer_lens_rome.edits.kinds import EditRequest
from transformer_lens_rome.evaluation.benchmarks import Benchmark, Scores, register_benchmark
from transformer_lens_rome.evaluation.metrics import AnswerScore
from transformer_lens_rome.evaluation.record_list import RecordList, read_records
from transformer_lens_rome.evaluation.records import field_of, text_of
from transformer_lens_rome.evaluation.scoring import Asked, Scoring
from transformer_lens_rome.evaluation.written import Ask
from transformer_lens_rome.files.strict_json import check_text, read_bytes

LEGEND = (
    "MQuAKE, in percent, half of the 95% interval in brackets. EA: edits after whose prompt all "
    "tokens of the new target are top tokens; AE: cases of which this holds for all edits; MH: "
    "cases of which any of the questions gets the new answer, by greedy text after few-shot "
    "examples; MQ: questions that get it; OA: cases of which any question gets the old answer."
)
_MOST = 10_000  # characters of a few-shot prompt


@dataclass(frozen=True)
class MquakeRecord:
    """Facts to write, and questions that need all of them.

    Attributes:
        case_id: The case's number in the data set.
        requests: The facts.
        questions: Wordings of one question.
        answers: The answer after the edits, and its aliases.
        old_answers: The answer before, and its aliases.
    """

    case_id: int
    requests: tuple[EditRequest, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    old_answers: tuple[str, ...]

    @property
    def request(self) -> EditRequest:
        """The first fact."""
        return self.requests[0]


@dataclass(frozen=True)
class Mquake(RecordList[MquakeRecord]):
    """The cases of a file, see `RecordList`."""

    @classmethod
    def load(cls, path: Any, *, limit: int | None = None, strict: bool = False) -> Mquake:
        """Read a file of MQuAKE.

        Args:
            path: The file.
            limit: The number of cases to read, from the start of the file; None: all.
            strict: Raise if a case is invalid. False: leave it out.

        Raises:
            ValueError: The file is not one of MQuAKE, or (with `strict`) cases are invalid.
            OSError: There is no such file.
        """
        read = partial(_record, set())
        return cls(*read_records(path, read, limit=limit, strict=strict))


def _record(seen: set[int], i: int, item: Any) -> MquakeRecord:
    """Return one case, or raise ValueError with the name of the invalid field."""
    if not isinstance(item, Mapping):
        raise ValueError(f"it is a {type(item).__name__}, not an object")
    if type(case_id := item.get("case_id")) is not int or case_id in seen:
        raise ValueError(f"case_id: {case_id!r:.60} is not an integer, or is used already")
    rewrites = field_of(item, "requested_rewrite", list)
    requests = tuple(_request(j, one) for j, one in enumerate(rewrites))
    if not requests or len({request.text for request in requests}) < len(requests):
        raise ValueError("requested_rewrite: it is empty, or two of its prompts are the same")
    questions = field_of(item, "questions", list)
    if not questions or not all(isinstance(one, str) and one.strip() for one in questions):
        raise ValueError(f"questions: it is {questions!r:.80}, not a list of texts")
    new, old = (_answers(item, name) for name in ("new_answer", "answer"))
    seen.add(case_id)
    return MquakeRecord(case_id, requests, tuple(questions), new, old)


def _request(j: int, item: Any) -> EditRequest:
    """Return one fact of a case."""
    place = f"requested_rewrite[{j}]"
    if not isinstance(item, Mapping):
        raise ValueError(f"{place}: it is a {type(item).__name__}, not an object")
    texts = [field_of(item, name, str, within=place) for name in ("prompt", "subject")]
    for name in ("target_new", "target_true"):
        target = field_of(item, name, Mapping, within=place)
        texts.append(field_of(target, "str", str, within=f"{place}.{name}"))
    try:
        return EditRequest(*texts)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _answers(item: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return an answer and its aliases."""
    answer, aliases = text_of(item, name), field_of(item, f"{name}_alias", list)
    if not all(isinstance(alias, str) and alias.strip() for alias in aliases):
        raise ValueError(f"{name}_alias: not all are texts in {aliases!r:.80}")
    return answer, *aliases


class HopScore(NamedTuple):
    """The model's answer to a question over several facts.

    Attributes:
        text: What the model wrote after the question.
        new: Whether it is the new answer.
        old: Whether it is the old answer.
    """

    text: str
    new: bool
    old: bool


@dataclass(frozen=True)
class MquakeScoring(Scoring):
    """Score the target after each prompt, and let the model answer the questions.

    Attributes:
        few_shot: The path of the published few-shot prompt, in one of the two formats above.
        n_tokens: The number of tokens of an answer. None: 16, or 128 after "Thoughts:".

    Raises:
        ValueError: There is no few-shot prompt, or it has another format.
    """

    protocol: ClassVar[str] = "mquake"
    few_shot: Any = None
    n_tokens: int | None = None
    _examples: str = field(init=False, repr=False, default="")

    def __post_init__(self) -> None:
        if self.few_shot is None:
            raise ValueError(
                "MQuAKE's questions are asked after few-shot examples; pass few_shot=, the path of "
                "the published multihop-prompts.txt"
            )
        data = read_bytes(self.few_shot, _MOST)
        try:
            text = data.decode("utf-8-sig").strip()
            check_text(text)
        except ValueError as error:
            raise ValueError(f"{self.few_shot} is not UTF-8 text ({error})") from error
        if not text.startswith(("Q:", "Question:")):
            raise ValueError(
                f"{self.few_shot} begins with {text[:20]!r}, not with 'Q:' or 'Question:', so it "
                "is not a published few-shot prompt of MQuAKE"
            )
        object.__setattr__(self, "_examples", text)
        object.__setattr__(self, "few_shot", Path(self.few_shot).name)

    @property
    def setting(self) -> dict[str, Any]:
        """The few-shot prompt's sha256, and the length of an answer."""
        digest = hashlib.sha256(self._examples.encode()).hexdigest()
        return {"few_shot": digest, "n_tokens": self.n_tokens}

    @property
    def _thinks(self) -> bool:
        """True if the examples have thoughts before the answer."""
        return self._examples.startswith("Question:")

    def requests(self, record: MquakeRecord) -> tuple[EditRequest, ...]:
        """Return all facts of a case."""
        return record.requests

    def asked(self, record: MquakeRecord) -> Asked:
        """Return the prompt of each fact, with its new target."""
        return {"rewrite": [(one.text, (one.target_new,)) for one in record.requests]}

    def written(self, record: MquakeRecord, edited: bool) -> list[Ask]:
        """Return the questions after the few-shot examples."""
        form = "{}\n\nQuestion: {}\nThoughts:" if self._thinks else "{}\nQ: {} A:"
        n_tokens = self.n_tokens or (128 if self._thinks else 16)
        return [Ask(form.format(self._examples, one), n_tokens) for one in record.questions]

    def judged(self, record: MquakeRecord, edited: bool, texts: Sequence[str]) -> Scores:
        """Return whether each text has the new or the old answer."""
        scores = []
        for text in texts:
            _, _, said = text.partition("Answer:") if self._thinks else ("", "", text)
            new, old = (is_answer(said, some) for some in (record.answers, record.old_answers))
            scores.append(HopScore(text, new, old))
        return {"multihop": scores}


def is_answer(text: str, answers: Sequence[str]) -> bool:
    """Return whether the first line of a text is an answer, with or without a final full stop."""
    line = text.lstrip(" ").split("\n", 1)[0].strip()
    return line in answers or line.removesuffix(".") in answers


def mquake_metrics(scores: Scores, before: Scores) -> dict[str, float]:
    """Return the metrics of a case."""
    edits = [float(all(one.correct)) for one in scores["rewrite"]]
    new, old = zip(*((one.new, one.old) for one in scores["multihop"]))
    return {
        "EA": fmean(edits),
        "AE": float(all(edits)),
        "MH": float(any(new)),
        "MQ": fmean(map(float, new)),
        "OA": float(any(old)),
    }


register_benchmark(
    Benchmark(
        name="mquake",
        load=Mquake.load,
        scoring=MquakeScoring,
        kinds={"rewrite": AnswerScore, "multihop": HopScore},
        metrics=mquake_metrics,
        columns=("EA", "AE", "MH", "MQ", "OA"),
        legend=LEGEND,
        panels={"EA": "efficacy", "MH": "new answer", "OA": "old answer"},
    )
)
