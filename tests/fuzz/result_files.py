"""Runs, sequences of edits and traces, to be fuzzed."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from fuzz.format import LINES, REQUEST, TENSORS, Format, saved

from transformer_lens_rome.evaluation import Results
from transformer_lens_rome.evaluation.results import latex, markdown
from transformer_lens_rome.sequential import Guard, Step
from transformer_lens_rome.sequential.steps import steps_file
from transformer_lens_rome.tracing.averages import AverageTrace, average_traces
from transformer_lens_rome.tracing.results import CausalTrace

MADE_WITH = {"torch": "2", "data": {"sha256": "0" * 64, "schema": "published"}}


def _row(case: int, **more: Any) -> dict[str, Any]:
    each = [[-1.0, -2.0], [-3.0], [True, False], [True]]
    scores = {"rewrite": [each], "paraphrase": [each, each], "neighborhood": [each]}
    return {"case_id": case, "record": f"r{case}", "scores": scores, "seconds": 0.5, **more}


def _run() -> tuple[bytes, bytes]:
    shared = {"protocol": "counterfact", "model": "tiny", "model_hash": "0" * 64}
    head = {"format": "transformer_lens_rome.run.1", "setting": shared, "made_with": MADE_WITH}
    method = {"method": {"name": "rome", "options": {"layer": 1}}, "seed": 0}
    edited = {**head, "setting": shared | method}
    failed = {"case_id": 3, "record": "r3", "failed": "ValueError: too long"}
    generation = {"texts": ["a b c"], "GE": 5.5, "RS": 0.3}
    kl = {"neighborhood": [0.5], "neighborhood_plus": [0.25]}
    after = [
        _row(1, edit_seconds=1.0, kl=kl),
        _row(2, edit_seconds=2, generation=generation),
        failed,
    ]
    before = [_row(1), _row(2), _row(3)]
    lines = [[edited, *after], [head, *before]]
    return tuple(b"".join(json.dumps(row).encode() + b"\n" for row in rows) for rows in lines)


def _use_run(found: Results) -> None:
    assert "<script" not in markdown([found])  # in LaTeX that is no more than its letters
    for style in (markdown, latex):
        assert len(style([found]).splitlines()) < 12
    found.scores(), found.seconds, found.failed, found._repr_html_(), repr(found)
    if found.after and found.metrics():
        found.compare(found)


def run() -> Format:
    """A run of a method."""
    edited, unedited = _run()

    def read(path: Path) -> Results:
        path.with_name("unedited.jsonl").write_bytes(unedited)
        return Results.load(path)

    return Format([edited], LINES, read, _use_run)


def unedited() -> Format:
    """The unedited model's scores beside it."""
    edited, before = _run()

    def read(path: Path) -> Results:
        path.with_name("unedited.jsonl").write_bytes(path.read_bytes())
        path.with_name("rome.jsonl").write_bytes(edited)
        return Results.load(path.with_name("rome.jsonl"))

    return Format([before], LINES, read, _use_run)


def steps() -> Format:
    """The steps of a sequence of edits."""
    step = Step(1, REQUEST, 2.5, True, "", 0.9, 0.1)
    rows = [
        step,
        dataclasses.replace(step, number=2, nll=None, kept=False, reason="no edit: too long"),
    ]
    setting = {"model": "tiny", "seed": 0, "guard": dataclasses.asdict(Guard())}
    first = {"format": "transformer_lens_rome.run.1", "setting": setting, "made_with": {}}
    lines = [first, *(dataclasses.asdict(row) for row in rows)]
    seed = b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    def read(path: Path) -> list[Step]:
        with steps_file(path, setting) as file:
            return list(file.rows.values())

    return Format([seed], LINES, read, lambda found: [f"{s.number:05d}{s.reason}" for s in found])


def trace() -> Format:
    """A causal trace."""
    made = CausalTrace(
        samples=torch.rand(2, 3, 4),
        corrupted_samples=torch.rand(2),
        p_clean=0.9,
        tokens=("The", " Space", " Needle", " is"),
        subject_positions=(0, 1, 2),
        answer=" Seattle",
        kind="mlp",
        window=10,
        metric="probability",
        info={"model": "tiny", "prompt": "The Space Needle is", "seed": 0},
    )

    def use(found: CausalTrace) -> None:
        assert "<script>alert" not in found.show().body and "<img src=x" not in found.show().body
        average_traces([found]).show()

    return Format(saved(made), TENSORS, CausalTrace.load, use)


def average() -> Format:
    """An average of traces."""
    loaded = trace()
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(loaded.seeds[0])
        made = average_traces([CausalTrace.load(file.name)] * 2)
    return Format(saved(made), TENSORS, AverageTrace.load, lambda found: found.show())
