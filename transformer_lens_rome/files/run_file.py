"""Files of runs: one JSON line for each record, so a killed process loses no finished record.

The first line describes the run; a file of another run is refused. Each later line is written with
one call and flushed to the disk. An incomplete last line is removed when the file is opened again,
so its record is computed again. While a file is open, other processes cannot open it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformer_lens_rome.files.cache import lock
from transformer_lens_rome.files.strict_json import parse, read_bytes

_FORMAT = "transformer_lens_rome.run.1"
_HEAD = f'{{"format": "{_FORMAT}"'.encode()


Checker = Callable[[Mapping[str, Any]], Callable[[Mapping[str, Any]], Any]]
"""Maps the first line of a run to a check, which raises a ValueError for an invalid row."""


class RunFile:
    """The rows of a run, read from a file and appended to it; use it in a `with` statement.

    Attributes:
        path: The file.
        rows: The rows in the file, by the value of `key`.
        key: The field that identifies a row.
    """

    def __init__(
        self,
        path: Any,
        setting: Mapping[str, Any],
        made_with: Mapping[str, Any],
        checker: Checker,
        key: str = "case_id",
    ) -> None:
        """Open or create the file.

        Args:
            path: The path of the file.
            setting: Everything that the rows depend on; a file with another setting is refused.
            made_with: Further information to save, such as versions.
            checker: Checks the rows of the file.
            key: The field that identifies a row.

        Raises:
            ValueError: The file is of another run, is damaged, or is open in another process.
            OSError: The file cannot be written.
        """
        self.path, self.key, self._checker = Path(path), key, checker
        self.rows: dict[int, dict[str, Any]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            lock(
                self._file,
                ValueError(
                    f"another process is writing to {path}; wait for it, or pass another file"
                ),
            )
            self._read(json.loads(json.dumps(dict(setting))), dict(made_with))
        except BaseException:
            self._file.close()
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one row to the file; the row is on the disk when this method returns."""
        self._write(row)
        self.rows[row[self.key]] = dict(row)

    def __enter__(self) -> RunFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, setting: dict[str, Any], made_with: dict[str, Any]) -> None:
        self._file.seek(0)
        data = self._file.read()
        lines, size = read_lines(data, self.path)
        if lines:
            check_setting(self.path, lines[0], setting)
            _check_rows(self.path, lines, self._checker)
        elif not _HEAD.startswith(data[: len(_HEAD)]):
            raise ValueError(f"{self.path} is not the file of a run; pass another file")
        self._file.truncate(size)  # remove an incomplete last line of this format only
        if not lines:
            self._write({"format": _FORMAT, "setting": setting, "made_with": made_with})
            return
        self.rows = {row[self.key]: row for row in lines[1:]}


def read_run(path: Any, checker: Checker) -> tuple[dict[str, Any], list[dict[str, Any]]]:
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
    _check_rows(Path(path), lines, checker)
    return lines[0], lines[1:]


def _check_rows(path: Path, lines: list[dict[str, Any]], checker: Checker) -> None:
    """Raise ValueError if a line is not one that such a run writes."""
    i = 0
    try:
        check = checker(lines[0])
        for i, line in enumerate(lines[1:], 1):
            check(line)
    except ValueError as error:
        raise ValueError(f"{path}: line {i + 1} is damaged ({error})") from error


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
