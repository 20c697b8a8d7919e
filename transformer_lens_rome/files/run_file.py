"""A run on disk: one JSON line a record, which survives being killed at any moment.

The first line says what the run is; a file of another run is refused. Each later line is written
with one call and flushed to the disk. A last line that was cut short is taken off when the file is
opened again, so its record is made anew; while a file is open, a second process is refused.
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
"""From a run's first line, what raises a ValueError for a row that such a run does not write."""


class RunFile:
    """Rows of a run by case, read from a file and appended to it; use it in a `with` statement.

    Attributes:
        path: The file.
        rows: What is in it, by `key`.
        key: The field by which rows are told apart.
    """

    def __init__(
        self,
        path: Any,
        setting: Mapping[str, Any],
        made_with: Mapping[str, Any],
        checker: Checker,
        key: str = "case_id",
    ) -> None:
        """Open or make the file.

        Args:
            path: Where.
            setting: What the rows depend on; a file with another setting is refused.
            made_with: What is good to know besides, such as versions.
            checker: What a row of such a run may hold.
            key: The field by which rows are told apart.

        Raises:
            ValueError: the file is of another run, is damaged, or is in another process's hands.
            OSError: it cannot be written.
        """
        self.path, self.key, self._checker = Path(path), key, checker
        self.rows: dict[int, dict[str, Any]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            lock(
                self._file,
                ValueError(
                    f"another process is writing to {path}; wait for it, or give another file"
                ),
            )
            self._read(json.loads(json.dumps(dict(setting))), dict(made_with))
        except BaseException:
            self._file.close()
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one record's row; it is on the disk when this returns."""
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
        lines, kept = read_lines(data, self.path)
        if lines:
            check_setting(self.path, lines[0], setting)
            _check_rows(self.path, lines, self._checker)
        elif not _HEAD.startswith(data[: len(_HEAD)]):
            raise ValueError(f"{self.path} holds something else than a run; give another file")
        self._file.truncate(kept)  # what was cut short, of our own lines only
        if not lines:
            self._write({"format": _FORMAT, "setting": setting, "made_with": made_with})
            return
        self.rows = {row[self.key]: row for row in lines[1:]}


def read_run(path: Any, checker: Checker) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line and the rows of a run's file; a last line that was cut short is left out.

    Raises:
        ValueError: not a run's file, or a damaged one.
        OSError: no such file.
    """
    lines, _ = read_lines(read_bytes(path), Path(path))
    if not lines or lines[0].get("format") != _FORMAT:
        raise ValueError(f"{path} is not a run's file; evaluate_counterfact writes them with out=")
    _check_rows(Path(path), lines, checker)
    return lines[0], lines[1:]


def _check_rows(path: Path, lines: list[dict[str, Any]], checker: Checker) -> None:
    """Refuse a file with a line that no such run writes."""
    i = 0
    try:
        check = checker(lines[0])
        for i, line in enumerate(lines[1:], 1):
            check(line)
    except ValueError as error:
        raise ValueError(f"{path}: line {i + 1} is damaged ({error})") from error


def read_lines(data: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """Whole lines, and how many bytes they are; only the last line may be broken."""
    lines: list[dict[str, Any]] = []
    kept = 0
    pieces = data.splitlines(keepends=True)
    for i, piece in enumerate(pieces):
        try:
            line = parse(piece, "it")
            if not piece.endswith(b"\n") or not isinstance(line, dict):
                raise ValueError("it is cut short")
        except ValueError as error:
            if i + 1 < len(pieces):
                raise ValueError(f"{path}: line {i + 1} is damaged ({error})") from error
            break
        lines.append(line)
        kept += len(piece)
    return lines, kept


def check_setting(path: Path, first: Mapping[str, Any], setting: Mapping[str, Any]) -> None:
    """Refuse the file of another run, and say in what it differs."""
    found = first.get("setting")
    if first.get("format") != _FORMAT or not isinstance(found, Mapping):
        raise ValueError(f"{path} holds something else than a run; give another file")
    if other := [name for name in {**setting, **found} if setting.get(name) != found.get(name)]:
        raise ValueError(
            f"{path} holds a run with another {', '.join(sorted(other))}; give another file, or "
            "load the run with Results.load"
        )
