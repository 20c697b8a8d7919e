"""Files of runs: one JSON line for each record, so a killed process loses no finished record.

The first line describes the run; a file of another run is refused. Each later line is a row. It is
written with one call and flushed to the disk. An incomplete last line is removed when the file is
opened again, so its record is computed again. While a file is open, other processes cannot open it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from transformer_lens_rome.files.cache import lock
from transformer_lens_rome.files.fields import as_read
from transformer_lens_rome.files.strict_json import parse, read_bytes

_FORMAT = "transformer_lens_rome.run.1"
_HEAD = f'{{"format": "{_FORMAT}"'.encode()


class Row(Protocol):
    """A row of a run: a frozen dataclass that is written as one JSON object."""

    @property
    def key(self) -> Hashable:
        """The key that identifies the row in its file."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return the row as a JSON object."""
        ...


R = TypeVar("R", bound=Row)
Reader = Callable[[Mapping[str, Any]], Callable[[Mapping[str, Any]], R]]
"""Maps the first line of a run to a function that makes a row from a JSON object. Both raise a
ValueError for a line that such a run does not write."""


class RunFile(Generic[R]):
    """The rows of a run, read from a file and appended to it; use it in a `with` statement.

    Attributes:
        path: The file.
        rows: The rows in the file, by their key.
    """

    def __init__(
        self,
        path: Any,
        setting: Mapping[str, Any],
        made_with: Mapping[str, Any],
        reader: Reader[R],
    ) -> None:
        """Open or create the file.

        Args:
            path: The path of the file.
            setting: Everything that the rows depend on; a file with another setting is refused.
            made_with: Further information to save, such as versions.
            reader: Makes the rows of the file.

        Raises:
            ValueError: The file is of another run, is damaged, or is open in another process.
            OSError: The file cannot be written.
        """
        self.path = Path(path)
        self.rows: dict[Hashable, R] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            lock(
                self._file,
                ValueError(
                    f"another process is writing to {path}; wait for it, or pass another file"
                ),
            )
            self._read(as_read(dict(setting)), dict(made_with), reader)
        except BaseException:
            self._file.close()
            raise

    def append(self, row: R) -> None:
        """Append one row to the file; the row is on the disk when this method returns."""
        self._write(row.to_json())
        self.rows[row.key] = row

    def __enter__(self) -> RunFile[R]:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, setting: dict[str, Any], made_with: dict[str, Any], reader: Reader[R]) -> None:
        data = read_bytes(self.path)
        lines, size = read_lines(data, self.path)
        rows: list[R] = []
        if lines:
            check_setting(self.path, lines[0], setting)
            rows = _rows(self.path, lines, reader)
        elif not _HEAD.startswith(data[: len(_HEAD)]):
            raise ValueError(f"{self.path} is not the file of a run; pass another file")
        self._file.truncate(size)  # remove an incomplete last line of this format only
        if not lines:
            self._write({"format": _FORMAT, "setting": setting, "made_with": made_with})
        self.rows = {row.key: row for row in rows}


def read_run(path: Any, reader: Reader[R]) -> tuple[dict[str, Any], list[R]]:
    """Return the first line and the rows of a run's file, without an incomplete last line.

    Raises:
        ValueError: The file is not the file of a run, or it is damaged.
        OSError: The file does not exist.
    """
    lines, _ = read_lines(read_bytes(path), Path(path))
    if not lines or lines[0].get("format") != _FORMAT:
        raise ValueError(
            f"{path} is not the file of a run; evaluate_counterfact writes one with out="
        )
    return lines[0], _rows(Path(path), lines, reader)


def _rows(path: Path, lines: list[dict[str, Any]], reader: Reader[R]) -> list[R]:
    """Return the rows; raise ValueError if a line is not one that such a run writes."""
    rows: list[R] = []
    i = 0
    try:
        row_of = reader(lines[0])
        for i, line in enumerate(lines[1:], 1):
            rows.append(row_of(line))
    except ValueError as error:
        raise ValueError(f"{path}: line {i + 1} is damaged ({error})") from error
    return rows


def read_lines(data: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the complete lines and their size in bytes; only the last line may be incomplete.

    Raises:
        ValueError: A line before the last one is damaged.
    """
    lines: list[dict[str, Any]] = []
    size = 0
    pieces = data.splitlines(keepends=True)
    for i, piece in enumerate(pieces):
        try:
            line = parse(piece, "the line")
            if not piece.endswith(b"\n") or not isinstance(line, dict):
                raise ValueError("the line is incomplete")
        except ValueError as error:
            if i + 1 < len(pieces):
                raise ValueError(f"{path}: line {i + 1} is damaged ({error})") from error
            break
        lines.append(line)
        size += len(piece)
    return lines, size


def check_setting(path: Path, first: Mapping[str, Any], setting: Mapping[str, Any]) -> None:
    """Raise ValueError if the file is of another run; the message names the differences."""
    saved = first.get("setting")
    if first.get("format") != _FORMAT or not isinstance(saved, Mapping):
        raise ValueError(f"{path} is not the file of a run; pass another file")
    if other := [name for name in {**setting, **saved} if setting.get(name) != saved.get(name)]:
        raise ValueError(
            f"{path} is the file of a run with another {', '.join(sorted(other))}; pass another "
            "file, or load the run with Results.load"
        )
