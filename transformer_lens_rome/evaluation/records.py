"""CounterFact's records (Meng et al. 2022, section 3.4 and App. D), from either of two schemas.

    published   {"case_id", "requested_rewrite": {"prompt", "subject", "relation_id", "target_new":
                {"str", "id"}, "target_true": {"str", "id"}}, "paraphrase_prompts", ...}
    flat        {"case_id", "prompt", "subject", "target_new", "ground_truth", "rephrase_prompt",
                "locality_prompt"}, the subject already in the prompt

A file has one schema. In the flat one, `rephrase_prompt` is a paraphrase in one record of six: in
18,180 of 21,919 records it is one of the published record's generation prompts, such as "Toko
Yasuda is incredible at" for the fact "Toko Yasuda, the guitar". So it becomes a continuation
prompt, its metrics are CS, CM and CA, and there is no PS and no S. `true_paraphrases=` names the
records in which it is a paraphrase. Text is not changed: non-breaking spaces stay.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from transformer_lens_rome.edits.kinds import EditRequest
from transformer_lens_rome.files.cache import cache_folder
from transformer_lens_rome.files.download import Published, download
from transformer_lens_rome.files.strict_json import parse, read_bytes, stripped

logger = logging.getLogger(__name__)

URL = "https://rome.baulab.info/data/dsets/counterfact.json"
_SIZE = 45_108_470
_SHA256 = "d017056125178a13728594e66a801357a8db9ed7973a7425554bb4271de9fc6f"


@dataclass(frozen=True)
class CounterFactRecord:
    """One counterfactual to write, and the prompts that test it.

    Attributes:
        case_id: The record's number in the data set.
        request: Prompt, subject, new and true target.
        paraphrase_prompts: Other wordings with the same subject; they test generalisation.
        neighborhood_prompts: Prompts with the same relation and other subjects, whose true object
            is the request's true target; they test specificity.
        attribute_prompts: Prompts with the same relation and other subjects, whose true object is
            the new target.
        generation_prompts: Beginnings of text about the subject.
        continuation_prompts: The flat schema's `rephrase_prompt`, see above.
        relation_id: The relation's Wikidata identifier, such as "P103"; empty in the flat schema.
        target_new_id: The new target's Wikidata identifier, such as "Q1860".
        target_true_id: The true target's Wikidata identifier.
    """

    case_id: int
    request: EditRequest
    paraphrase_prompts: tuple[str, ...]
    neighborhood_prompts: tuple[str, ...]
    attribute_prompts: tuple[str, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    continuation_prompts: tuple[str, ...] = ()
    relation_id: str = ""
    target_new_id: str = ""
    target_true_id: str = ""


@dataclass(frozen=True)
class CounterFact(Sequence[CounterFactRecord]):
    """A list of records, and the reasons why other records of the file were left out.

    Attributes:
        records: The records in the file's order.
        skipped: The reason for each record that was left out.
        digest: sha256 of the file.
        schema: "published" or "flat"; empty for a file without records.
    """

    records: tuple[CounterFactRecord, ...]
    skipped: tuple[str, ...] = ()
    digest: str = ""
    schema: str = ""

    @classmethod
    def load(
        cls,
        path: Any = None,
        *,
        limit: int | None = None,
        strict: bool = True,
        true_paraphrases: Iterable[int] = (),
    ) -> CounterFact:
        """Read records from a JSON file.

        Args:
            path: The file. None: the published file, which is downloaded once to the cache folder
                and checked (45 MB, sha256).
            limit: The largest number of records to keep, from the start of the file.
            strict: Raise if a record is invalid. False: leave it out and list it in `skipped`.
            true_paraphrases: For a flat file, the case ids of records whose `rephrase_prompt` is a
                paraphrase.

        Raises:
            ValueError: The file is not JSON or not a list, or (with `strict`) records are invalid
                or have another schema than the first one; the message names them and the reasons.
            OSError: There is no such file, or no network.
        """
        if path is None:
            path = cache_folder() / "counterfact.json"
            if not path.is_file():
                download(Published(URL, _SIZE, _SHA256), path)
        items, digest = read_items(path)
        records, faults, schema = _parse(items, limit, frozenset(true_paraphrases))
        leave_out(path, faults, len(items), strict)
        return cls(tuple(records), tuple(faults), digest, schema)

    @overload
    def __getitem__(self, index: int) -> CounterFactRecord: ...

    @overload
    def __getitem__(self, index: slice) -> CounterFact: ...

    def __getitem__(self, index: int | slice) -> CounterFactRecord | CounterFact:
        """Return a record; for a slice, some records of the same file."""
        if isinstance(index, slice):
            return dataclasses.replace(self, records=self.records[index], skipped=())
        return self.records[index]

    def only(self, case_ids: Iterable[int]) -> CounterFact:
        """Return the records with these case ids, in the file's order.

        Raises:
            ValueError: There is no record of a case id.
        """
        wanted = set(case_ids)
        records = tuple(record for record in self.records if record.case_id in wanted)
        if missing := sorted(wanted - {record.case_id for record in records}):
            raise ValueError(f"there are no records of case ids {missing[:10]}")
        return dataclasses.replace(self, records=records, skipped=())

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[CounterFactRecord]:
        return iter(self.records)


def read_items(path: Any) -> tuple[list[Any], str]:
    """Return the items of a JSON file that contains a list, and the file's sha256.

    Raises:
        ValueError: The file is not JSON, not a list, or larger than any data set.
        OSError: There is no such file.
    """
    data = read_bytes(path)
    items = parse(data, str(path))
    if not isinstance(items, list):
        raise ValueError(f"{path} contains a {type(items).__name__}, not a list of records")
    return items, hashlib.sha256(data).hexdigest()


def leave_out(path: Any, faults: Sequence[str], total: int, strict: bool) -> None:
    """Raise ValueError if `strict` and records are invalid; else log how many are left out."""
    if faults and strict:
        shown = "\n  ".join(faults[:20]) + ("\n  ..." if len(faults) > 20 else "")
        raise ValueError(
            f"{path}: {len(faults)} of {total} records are invalid; strict=False leaves "
            f"them out\n  {shown}"
        )
    if faults:
        logger.warning("%s: %d records left out; see .skipped", path, len(faults))


def _schema(item: Mapping[str, Any]) -> str:
    """Return the name of a record's schema."""
    return "published" if "requested_rewrite" in item else "flat"


def _parse(
    items: list[Any], limit: int | None, true_paraphrases: frozenset[int]
) -> tuple[list[CounterFactRecord], list[str], str]:
    """Return the valid records, the faults of the others, and the schema of the first record."""
    records: list[CounterFactRecord] = []
    faults: list[str] = []
    index_of_case: dict[int, int] = {}
    expected = ""
    for i, item in enumerate(items):
        if limit is not None and len(records) >= limit:
            break
        try:
            record = as_record(item, true_paraphrases)
            if (schema := _schema(item)) != (expected := expected or schema):
                raise ValueError(
                    f"it has the {schema} schema, and the first record the {expected} one; they "
                    "measure different things, so load them from two files"
                )
            if (first := index_of_case.setdefault(record.case_id, i)) != i:
                raise ValueError(f"case_id: {record.case_id} is already used by record {first}")
            records.append(record)
        except ValueError as error:
            faults.append(f"record {i}: {error}")
    return records, faults, expected


def as_record(item: Any, true_paraphrases: Collection[int] = ()) -> CounterFactRecord:
    """Return the record itself, or a record made from a dictionary of either schema.

    `true_paraphrases` are the case ids of flat records whose `rephrase_prompt` is a paraphrase.

    Raises:
        ValueError: A field is missing or invalid; the message names the field.
    """
    if isinstance(item, CounterFactRecord):
        return item
    if not isinstance(item, Mapping):
        raise ValueError(f"it is a {type(item).__name__}, not an object")
    return _published(item) if _schema(item) == "published" else _flat(item, true_paraphrases)


def _published(item: Mapping[str, Any]) -> CounterFactRecord:
    rewrite = field_of(item, "requested_rewrite", Mapping)
    new, true = (field_of(rewrite, name, Mapping) for name in ("target_new", "target_true"))
    return CounterFactRecord(
        case_id=_case_id(item),
        request=_request(
            prompt=field_of(rewrite, "prompt", str),
            subject=field_of(rewrite, "subject", str),
            new=field_of(new, "str", str, within="target_new"),
            true=field_of(true, "str", str, within="target_true"),
        ),
        paraphrase_prompts=_texts(item, "paraphrase_prompts"),
        neighborhood_prompts=_texts(item, "neighborhood_prompts"),
        attribute_prompts=_texts(item, "attribute_prompts"),
        generation_prompts=_texts(item, "generation_prompts"),
        relation_id=_name(rewrite, "relation_id"),
        target_new_id=_name(new, "id", within="target_new"),
        target_true_id=_name(true, "id", within="target_true"),
    )


def _flat(item: Mapping[str, Any], true_paraphrases: Collection[int]) -> CounterFactRecord:
    prompt, subject = field_of(item, "prompt", str), field_of(item, "subject", str)
    if "{}" not in prompt:
        if (times := prompt.count(subject) if subject else 0) != 1:
            raise ValueError(
                f"subject: {subject!r:.60} occurs {times} times in the prompt {prompt!r:.200}"
            )
        prompt = prompt.replace(subject, "{}")
    case_id, other = _case_id(item), (text_of(item, "rephrase_prompt"),)
    is_paraphrase = case_id in true_paraphrases
    return CounterFactRecord(
        case_id=case_id,
        request=_request(
            prompt=prompt,
            subject=subject,
            new=field_of(item, "target_new", str),
            true=field_of(item, "ground_truth", str),
        ),
        paraphrase_prompts=other if is_paraphrase else (),
        continuation_prompts=() if is_paraphrase else other,
        neighborhood_prompts=(text_of(item, "locality_prompt"),),
    )


def _request(*, prompt: str, subject: str, new: str, true: str) -> EditRequest:
    if not stripped(true):
        raise ValueError("target_true: it is empty")
    try:
        return EditRequest(prompt, subject, new, true)
    except ValueError as error:
        raise ValueError(f"request: {error}") from error


def field_of(item: Mapping[str, Any], name: str, kind: type, within: str = "") -> Any:
    """Return a field of an item; `within` is the field's place, for messages.

    Raises:
        ValueError: The field is missing or of another type.
    """
    full = f"{within}.{name}" if within else name
    if name not in item:
        raise ValueError(f"{full}: it is missing")
    if not isinstance(item[name], kind):
        raise ValueError(f"{full}: it is {item[name]!r:.60}, a {type(item[name]).__name__}")
    return item[name]


def _name(item: Mapping[str, Any], name: str, within: str = "") -> str:
    """Return an optional text field, or "" if it is missing."""
    return "" if item.get(name) is None else field_of(item, name, str, within)


def _case_id(item: Mapping[str, Any]) -> int:
    case_id = item.get("case_id")
    if type(case_id) is not int:
        raise ValueError(f"case_id: it is {case_id!r:.60}, not an integer")
    return case_id


def text_of(item: Mapping[str, Any], name: str) -> str:
    """Return a text of an item.

    Raises:
        ValueError: The text is missing, of another type, or empty.
    """
    if not stripped(text := field_of(item, name, str)):
        raise ValueError(f"{name}: it is empty")
    return text


def _texts(item: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return a list of texts; it may be missing or empty, and then there is no such metric."""
    if name not in item:
        return ()
    texts = field_of(item, name, list)
    for j, text in enumerate(texts):
        if not isinstance(text, str) or not stripped(text):
            raise ValueError(f"{name}[{j}]: it is {text!r:.60}, not a text")
    return tuple(texts)
