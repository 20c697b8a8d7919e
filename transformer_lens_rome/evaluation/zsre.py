"""zsRE: question answering by edits (Levy et al. 2017; Meng et al. 2022, appendix C).

Efficacy and paraphrase: the share of the new answer's tokens that are the top token, each given the
tokens before it. Specificity: the same share for the true answer to an unrelated question. A
record's value is the mean over tokens, a table's value is the mean over records, and S is the
harmonic mean of the three.

The released code cuts each prompt after every token and encodes it again. Here a question and its
answer are encoded once, together. The two are equal unless a token is only part of a character.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from transformer_lens_rome.edits.kinds import EditRequest
from transformer_lens_rome.evaluation.records import leave_out, read_items
from transformer_lens_rome.files.cache import cache_folder
from transformer_lens_rome.files.strict_json import stripped

URL = "https://rome.baulab.info/data/dsets/zsre_mend_eval.json"
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
class Zsre(Sequence[ZsreRecord]):
    """A list of records, and the reasons why other records of the file were left out.

    Attributes:
        records: The records in the file's order.
        skipped: The reason for each record that was left out.
        digest: sha256 of the file.
    """

    records: tuple[ZsreRecord, ...]
    skipped: tuple[str, ...] = ()
    digest: str = ""

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
        items, digest = read_items(path)
        records: list[ZsreRecord] = []
        faults: list[str] = []
        for i, item in enumerate(items[:limit]):
            try:
                records.append(_record(i, item))
            except ValueError as error:
                faults.append(f"record {i}: {error}")
        leave_out(path, faults, len(items), strict or not records)
        return cls(tuple(records), tuple(faults), digest)

    @overload
    def __getitem__(self, index: int) -> ZsreRecord: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[ZsreRecord, ...]: ...

    def __getitem__(self, index: int | slice) -> ZsreRecord | tuple[ZsreRecord, ...]:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)


def _record(i: int, item: Any) -> ZsreRecord:
    """Return one record, or raise ValueError with the name of the invalid field."""
    if not isinstance(item, Mapping):
        raise ValueError(f"it is a {type(item).__name__}, not an object")
    subject, question, rephrase, locality, answer = (_text(item, name) for name in _FIELDS)
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


def _text(item: Mapping[str, Any], name: str) -> str:
    text = item.get(name)
    if not isinstance(text, str) or not stripped(text):
        raise ValueError(f"{name}: it is {text!r:.60}, not a text")
    return text
