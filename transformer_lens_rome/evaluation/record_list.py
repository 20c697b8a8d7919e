"""A list of records, with what was left out of its file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

from transformer_lens_rome.evaluation.records import leave_out, read_items

R = TypeVar("R")


@dataclass(frozen=True)
class RecordList(Sequence[R], Generic[R]):
    """A list of records, and the reasons why other records of the file were left out.

    Attributes:
        records: The records in the file's order.
        skipped: The reason for each record that was left out.
        digest: sha256 of the file.
    """

    records: tuple[R, ...]
    skipped: tuple[str, ...] = ()
    digest: str = ""

    @overload
    def __getitem__(self, index: int) -> R: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[R, ...]: ...

    def __getitem__(self, index: int | slice) -> R | tuple[R, ...]:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)


def read_records(
    path: Any, record: Callable[[int, Any], R], *, limit: int | None, strict: bool
) -> tuple[tuple[R, ...], tuple[str, ...], str]:
    """Return the records of a JSON list, the reasons why others were left out, and its sha256.

    Args:
        path: The file.
        record: Makes the record of an index and an item, or raises ValueError.
        limit: The number of items to read, from the start of the file; None: all.
        strict: Raise if a record is invalid. False: leave it out, unless none is left.

    Raises:
        ValueError: The file is not a JSON list, or (with `strict`) records are invalid.
        OSError: There is no such file.
    """
    items, digest = read_items(path)
    records: list[R] = []
    faults: list[str] = []
    for i, item in enumerate(items[:limit]):
        try:
            records.append(record(i, item))
        except ValueError as error:
            faults.append(f"record {i}: {error}")
    leave_out(path, faults, len(items), strict or not records)
    return tuple(records), tuple(faults), digest
