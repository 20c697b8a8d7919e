"""zsRE: question answering by edits (Levy et al. 2017; Meng et al. 2022, appendix C).

Efficacy and paraphrase: the share of the new answer's tokens that are the top token, each given the
tokens before it. Specificity: the same share for the true answer to an unrelated question. A
record's value is the mean over tokens, a table's value is the mean over records, and S is the
harmonic mean of the three.

The released code cuts each prompt after every token and encodes it again. Here a question and its
answer are encoded once, together. The two are equal unless a token is only part of a character.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transformer_lens_rome.edits.kinds import EditRequest
from transformer_lens_rome.evaluation.benchmarks import Benchmark, register_benchmark
from transformer_lens_rome.evaluation.metrics import AnswerScore, zsre_metrics
from transformer_lens_rome.evaluation.record_list import RecordList, read_records
from transformer_lens_rome.evaluation.records import text_of
from transformer_lens_rome.evaluation.scoring import Asked, Scoring
from transformer_lens_rome.files.cache import cache_folder

URL = "https://rome.baulab.info/data/dsets/zsre_mend_eval.json"
LEGEND = (
    "zsRE, in percent, half of the 95% interval in brackets. EA, PA: tokens of the new answer "
    "that are top tokens, teacher-forced, after the question and its rephrasing; NA: the same "
    "of the true answer to an unrelated question; S: the harmonic mean of the three, with a "
    "bootstrap's interval."
)
_FIELDS = ("subject", "src", "rephrase", "loc", "loc_ans")


@dataclass(frozen=True)
class ZsreRecord:
    """One answer to write, and the questions that test it.

    Attributes:
        case_id: The record's index in the file, from 0.
        request: The question as prompt, and the new answer.
        rephrase: The question in other words.
        locality_prompt: An unrelated question.
        locality_answer: The true answer to `locality_prompt`.
    """

    case_id: int
    request: EditRequest
    rephrase: str
    locality_prompt: str
    locality_answer: str


@dataclass(frozen=True)
class Zsre(RecordList[ZsreRecord]):
    """The records of a zsRE file, see `RecordList`."""

    @classmethod
    def load(cls, path: Any = None, *, limit: int | None = 10_000, strict: bool = False) -> Zsre:
        """Read `zsre_mend_eval.json`.

        Args:
            path: The file. None: the file of that name in the cache folder. It is not downloaded,
                because no checksum of it is published.
            limit: The number of records to read, from the start of the file; the paper reads
                10,000.
            strict: Raise if a record is invalid, for example if its subject does not occur exactly
                once in its question. False: leave such records out.

        Raises:
            ValueError: The file is not a zsRE file, or (with `strict`) records are invalid.
            OSError: There is no such file; the message says where to get it.
        """
        if path is None:
            path = cache_folder() / "zsre_mend_eval.json"
            if not path.is_file():
                raise FileNotFoundError(
                    f"zsRE is published without a checksum, so it is not downloaded; get {URL} and "
                    f"give its path, or save it as {path}"
                )
        return cls(*read_records(path, _record, limit=limit, strict=strict))


def _record(i: int, item: Any) -> ZsreRecord:
    """Return one record, or raise ValueError with the name of the invalid field."""
    if not isinstance(item, Mapping):
        raise ValueError(f"it is a {type(item).__name__}, not an object")
    subject, question, rephrase, locality, answer = (text_of(item, name) for name in _FIELDS)
    answers = item.get("answers")
    if not isinstance(answers, list) or not answers or not isinstance(answers[0], str):
        raise ValueError(f"answers: it is {answers!r:.60}, not a list of texts")
    if (times := question.count(subject)) != 1:
        raise ValueError(f"subject: {subject!r:.60} occurs {times} times in {question!r:.200}")
    if not locality.startswith("nq question: "):
        raise ValueError(f"loc: it begins with {locality[:13]!r}, not with 'nq question: '")
    try:
        request = EditRequest(question.replace(subject, "{}"), subject, answers[0])
    except ValueError as error:
        raise ValueError(f"request: {error}") from error
    return ZsreRecord(i, request, rephrase, f"{locality}?", answer)


@dataclass(frozen=True)
class ZsreScoring(Scoring):
    """Score the answer to a question and its rephrasing, and the answer to an unrelated one."""

    protocol: ClassVar[str] = "zsre"

    def asked(self, record: ZsreRecord) -> Asked:
        """Return the three questions, each with its answer."""
        new = (record.request.target_new,)
        return {
            "rewrite": [(record.request.text, new)],
            "paraphrase": [(record.rephrase, new)],
            "neighborhood": [(record.locality_prompt, (record.locality_answer,))],
        }


register_benchmark(
    Benchmark(
        name="zsre",
        load=Zsre.load,
        scoring=ZsreScoring,
        kinds=dict.fromkeys(("rewrite", "paraphrase", "neighborhood"), AnswerScore),
        metrics=lambda scores, before: zsre_metrics(scores),
        columns=("S", "EA", "PA", "NA"),
        legend=LEGEND,
        s_of=("EA", "PA", "NA"),
        panels={
            "S": "score",
            "EA": "efficacy",
            "PA": "generalization",
            "NA": "specificity",
        },
    )
)
