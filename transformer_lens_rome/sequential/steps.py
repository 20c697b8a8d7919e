"""The steps of a sequence of edits, and the folder in which they and the edits are saved."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformer_lens_rome.edits.kinds import EditRequest
from transformer_lens_rome.files.fields import make
from transformer_lens_rome.files.run_file import RunFile
from transformer_lens_rome.methods.base import EditMethod, described
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.fingerprint import Fingerprint
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder, Row
from transformer_lens_rome.sequential.guard import Guard


@dataclass(frozen=True)
class Step:
    """One request of a sequence.

    Attributes:
        number: The request's number, from 1.
        request: The request.
        nll: Held-out NLL with this edit on the model, nats a token; None if no edit was made or
            the NLL was not finite.
        kept: Whether the edit was kept on the model.
        reason: The reason why it was not kept.
        p_after: Probability of its target just after the edit; None if the method does not measure
            it.
        relative_norm: ||delta W|| / ||W||; None if the method does not measure it.
    """

    number: int
    request: EditRequest
    nll: float | None
    kept: bool
    reason: str = ""
    p_after: float | None = None
    relative_norm: float | None = None

    @property
    def key(self) -> int:
        """The request's number."""
        return self.number

    def to_json(self) -> dict[str, Any]:
        """Return the step as a JSON object."""
        return dataclasses.asdict(self)


def sequence_file(
    model: Model,
    encoder: Encoder,
    method: EditMethod,
    guard: Guard | None,
    rows: list[Row],
    seed: int,
    folder: Any,
    known: Mapping[str, Any],
) -> AbstractContextManager[RunFile[Step] | None]:
    """Open the file of a sequence's steps; raise ValueError if it belongs to another sequence.

    `known` are further settings.
    """
    if folder is None:
        return nullcontext()
    ids = json.dumps([row.ids for row in rows]).encode()
    setting = {
        "model": adapter.model_name(model),
        "model_hash": Fingerprint.of(model).digest,
        "prepend_bos": encoder.prepends_bos,
        "method": described(method),
        "guard": dataclasses.asdict(guard) if guard else None,
        "texts": hashlib.sha256(ids).hexdigest(),
        "seed": seed,
        **known,
    }
    return steps_file(Path(folder) / "steps.jsonl", setting)


def steps_file(path: Any, setting: Mapping[str, Any]) -> RunFile[Step]:
    """Open a file whose rows are steps."""
    return RunFile(path, setting, {}, lambda _first: partial(make, Step))


def edit_path(file: RunFile[Step], number: int) -> Path:
    """Return the path of the edit that a step has kept, or a batch from this step on."""
    return file.path.parent / f"{number:05d}.safetensors"
