"""What is fuzzed: for each format small whole files, ways to damage them, how one is read and used.

`read` may end in ValueError or FileNotFoundError with the file's name; `use`, of what was read, in
ValueError or NotImplementedError. A `use` fails with AssertionError where something was accepted
that should not have been. The tiny models and networks are those of the tests.
"""

import dataclasses
import io
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fuzz_mutations as mutate
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import released_editors
import tiny_models
from editor_setting import OTHERS, random_editor
from rome_setting import factored_edit, random_edit
from tiny_tokenizer import tiny_tokenizer

from transformer_lens_rome import EditRequest, RomeConfig, SecondMoment, get_method, load_edit, rome
from transformer_lens_rome.adapter import Weight
from transformer_lens_rome.average_trace import AverageTrace, average_traces
from transformer_lens_rome.baselines import knowledge_editor
from transformer_lens_rome.baselines.mend import MendNetwork
from transformer_lens_rome.baselines.published_editors import convert_editor
from transformer_lens_rome.baselines.training import Training
from transformer_lens_rome.baselines.training_state import State
from transformer_lens_rome.causal_trace import CausalTrace
from transformer_lens_rome.counterfact import CounterFact, References, Results, Zsre
from transformer_lens_rome.counterfact.evaluate import record_digest
from transformer_lens_rome.counterfact.generation import TfIdf
from transformer_lens_rome.counterfact.results import latex, markdown
from transformer_lens_rome.edits import DenseEdit
from transformer_lens_rome.files import safe_name
from transformer_lens_rome.known_facts import load_known_facts
from transformer_lens_rome.prompts import Encoder
from transformer_lens_rome.sequential import Guard, Step, _as_step, _StepsFile
from transformer_lens_rome.strict_json import read_json
from transformer_lens_rome.sweep import _layer_score, _read

REQUEST = EditRequest("{} is in", "The Space Needle", "Paris", "Seattle")
TENSORS = (
    mutate.damaged_metadata,
    mutate.damaged_metadata,
    mutate.damaged_header,
    mutate.damaged_tensors,
    mutate.damaged_bytes,
)
JSON = (mutate.damaged_json, mutate.damaged_json, mutate.damaged_json, mutate.damaged_bytes)
LINES = (mutate.damaged_lines, mutate.damaged_lines, mutate.damaged_bytes)
ZIP = (mutate.damaged_zip, mutate.damaged_bytes)


@dataclass
class Format:
    """One kind of file.

    Attributes:
        seeds: Whole files.
        mutators: Ways to damage one; each is as likely.
        read: From a path to what the file holds.
        use: What users do with that.
    """

    seeds: list[bytes]
    mutators: tuple[Callable[..., bytes], ...]
    read: Callable[[Path], Any]
    use: Callable[[Any], None]


def saved(*items: Any) -> list[bytes]:
    """The files that things with a `save` write."""
    with tempfile.TemporaryDirectory() as folder:
        for i, item in enumerate(items):
            item.save(Path(folder) / str(i))
        return [(Path(folder) / str(i)).read_bytes() for i in range(len(items))]


@cache
def model() -> Any:
    """A tiny GPT-2."""
    make = tiny_models.tiny_bridge if tiny_models.has_bridge() else tiny_models.tiny_hooked
    return make("gpt2", tokenizer())


@cache
def tokenizer() -> Any:
    """Its tokenizer, in a folder that stays until the end."""
    tokenizer.folder = tempfile.TemporaryDirectory()
    return tiny_tokenizer(tokenizer.folder.name, bos=False)


# ---------------------------------------------------------------- edits


def _use_edit(edit: Any) -> None:
    tensors = edit.tensors()
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    for where, change in edit.changes().items():
        assert where.layer >= 0 and change.ndim == (1 if where.name == "b_out" else 2)
    edit.scale(-0.5).digest, edit._repr_html_(), repr(edit)
    with tempfile.NamedTemporaryFile() as file:
        edit.save(file.name)
        other = load_edit(file.name)
    assert other.digest == edit.digest and other.request == edit.request


def _edits(*chosen: Any) -> Format:
    return Format(saved(*chosen), TENSORS, load_edit, _use_edit)


def _small(edit: Any) -> Any:
    health = dataclasses.replace(edit.health, losses=(2.0, 1.0), p_after=0.9, warnings=("look",))
    known = {"config": {"steps": 20, "prefix_lengths": [[5, 10]]}, "health": health}
    return dataclasses.replace(edit, **known, provenance={"model": "tiny", "prefixes": ["", "a"]})


def rank_one() -> Format:
    """RankOneEdit."""
    return _edits(_small(random_edit(model())), random_edit(model(), seed=1))


def dense() -> Format:
    """DenseEdit: of low rank, with a bias, and without factors."""
    edits = [random_edit(model(), rank=2), random_edit(model(), rank=2, bias=True)]
    whole = DenseEdit(layer=0, request=REQUEST, left=torch.randn(6, 4))
    return _edits(*map(_small, edits), whole)


def factored() -> Format:
    """FactoredEdit."""
    places = [Weight("W_out", 1), Weight("W_in", 0)]
    return _edits(_small(factored_edit(model(), places)), factored_edit(model(), places[:1]))


# ---------------------------------------------------------------- statistics


def _use_moment(found: SecondMoment) -> None:
    total = found.sum_kk
    assert torch.isfinite(total).all() and total.shape == total.T.shape
    assert (total.diagonal() >= 0).all()
    found.summary(), repr(found)
    found.solve(torch.ones(found.d_mlp), ridge=1e-3)
    found.merge(found)


def statistics() -> Format:
    """SecondMoment."""
    keys = torch.randn(50, 6, dtype=torch.float64)
    full = SecondMoment(keys.T @ keys, 50, 3, False, torch.randn(8), "two texts", 0.5)
    return Format(saved(full, SecondMoment.identity(4)), TENSORS, SecondMoment.load, _use_moment)


def npz() -> Format:
    """The authors' statistics."""
    seeds, keys = [], np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    for dtype in (np.float32, np.float64):
        file = io.BytesIO()
        total = (keys.T @ keys).astype(dtype)
        np.savez(file, **{"mom2.mom2": total, "mom2.count": 50, "mom2.constructor": "x"})
        seeds.append(file.getvalue())
    return Format(seeds, ZIP, SecondMoment.from_npz, _use_moment)


# ---------------------------------------------------------------- trained editors


def _narrow() -> None:
    for width in ("LSTM_WIDTH", "H_WIDTH", "HEAD_WIDTH"):
        setattr(knowledge_editor, width, 8)


def _use_editor(method: Any) -> None:
    method.has_seen(REQUEST), repr(method)
    _use_edit(method.prepared(model()).compute(model(), REQUEST))


def _read_editor(path: Path) -> Any:
    kind = "ke" if b'\\"kind\\": \\"ke' in path.read_bytes()[:5000] else "mend"
    return type(get_method(kind)).load(path)


def editor() -> Format:
    """A trained editor: KE and MEND of tiny width."""
    _narrow()
    places = [Weight("W_out", 1)]
    editors = [random_editor(model(), kind, matrices=places) for kind in ("ke", "mend")]
    return Format(saved(*editors), TENSORS, _read_editor, _use_editor)


INFO = {"kind": "mend", "hashes": ["0" * 64], "train": ["a1", "b2"], "settings": {"lr": 0.1}}


def _state(steps: int) -> State:
    torch.set_rng_state(torch.Generator().manual_seed(5).get_state())
    network = MendNetwork({Weight("W_out", 1): (4, 3)})
    state = State.new(network, Training(lr=1e-3, alpha_lr=1e-2))
    for state.step in range(1, steps + 1):
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        state.adam.step()
        state.curve.append({"step": state.step, "before": 3.0, "loss": 1 / state.step})
        state.best = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return state


def _read_state(path: Path) -> State:
    state = _state(0)
    state.load(path, INFO)
    return state


def _use_state(state: State) -> None:
    assert 0 <= state.best_step <= state.step
    for parameter in state.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.adam.step()
    state.network.load_state_dict(state.best)
    f"{state.seconds:.1f}"


def training() -> Format:
    """A training run that was stopped."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        seeds = []
        for steps in (2, 3):
            _state(steps).save(path, INFO)
            seeds.append(path.read_bytes())
    return Format(seeds, TENSORS, _read_state, _use_state)


def published() -> Format:
    """The paper's editors: pickles in a zip, as published and stripped."""
    hf, seeds = tiny_models.tiny_hf("gpt2", tokenizer()), []
    network = released_editors.ReleasedMend(hf, released_editors.inner_names("gpt2"))
    whole = released_editors.published(network, hf.config)
    for content in (whole, dict(network.state_dict())):
        file = io.BytesIO()
        torch.save(content, file)
        seeds.append(file.getvalue())
    read = lambda path: convert_editor(path, model(), counterfact=False)  # noqa: E731
    return Format(seeds, (*ZIP, mutate.damaged_pickle), read, lambda found: saved(found))


# ---------------------------------------------------------------- data


PUBLISHED = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native"],
    "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
    "attribute_prompts": ["Tolkien is a native speaker of"],
    "generation_prompts": ["Danielle Darrieux's mother tongue is"],
}
FLAT = {
    "case_id": 1,
    "prompt": "The Space Needle is in",
    "subject": "The Space Needle",
    "target_new": "Paris",
    "ground_truth": "Seattle",
    "rephrase_prompt": "You find the Space Needle in",
    "locality_prompt": "The Colosseum is in",
}


def _tokens(*texts: str) -> None:
    """What a tokenizer makes of texts, which has to be the same twice."""
    encoder = Encoder.of(model())
    for text in texts:
        assert isinstance(text, str) and encoder.row(text[:1000]) == encoder.row(text[:1000])


def _use_records(found: CounterFact) -> None:
    for record in found:
        record_digest(record)
        _tokens(record.request.text, *record.paraphrase_prompts, *record.neighborhood_prompts)
        assert all(isinstance(n, str) for n in (record.relation_id, record.target_new_id))


def counterfact() -> Format:
    """CounterFact, both schemas."""
    seeds = [json.dumps(items).encode() for items in ([PUBLISHED], [FLAT, PUBLISHED])]
    read = lambda path: CounterFact.load(path, strict=path.stat().st_size % 2 == 0)  # noqa: E731
    return Format(seeds, JSON, read, _use_records)


def zsre() -> Format:
    """Questions and answers, zsRE."""
    item = {
        "subject": "The tower",
        "src": "Where is The tower in Rome?",
        "rephrase": "In what city is The tower?",
        "answers": ["Paris"],
        "loc": "nq question: who is the best in Cuba",
        "loc_ans": "the old man",
    }

    def use(found: Zsre) -> None:
        for record in found:
            record_digest(record)
            _tokens(record.request.text, record.rephrase, record.locality_prompt)

    return Format([json.dumps([item] * n).encode() for n in (1, 2)], JSON, Zsre.load, use)


def known() -> Format:
    """Known facts; their numbers become names of files."""
    fact = {
        "known_id": 7,
        "subject": "Vinson Massif",
        "attribute": "Antarctica",
        "prompt": "Vinson Massif is located in the continent of",
        "relation_id": "P30",
    }

    def use(facts: list[Any]) -> None:
        for one in facts:
            _tokens(one.prompt, one.subject, one.attribute)
            assert Path("f", safe_name(f"{one.known_id}.safetensors")).resolve().parent.name == "f"

    return Format([json.dumps([fact] * n).encode() for n in (1, 2)], JSON, load_known_facts, use)


DOCUMENTS = ("The cat sat on the mat", "The dog", "A bird sat")


def snippets() -> Format:
    """Reference texts for RS."""
    item = {
        "relation_id": "P103",
        "target_id": "Q1860",
        "samples": [{"name": "x", "text": "A cat"}],
    }
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        Path(file.name).write_text(json.dumps([PUBLISHED]))
        (record,) = CounterFact.load(file.name)
    weights = TfIdf.fit(DOCUMENTS)
    return Format(
        [json.dumps([item] * n).encode() for n in (1, 3)],
        JSON,
        lambda path: References.extract([record], path, weights),
        lambda found: found.consistency(record, ["the cat sat"]),
    )


def _weights_files() -> tuple[bytes, bytes]:
    idf, file = TfIdf.fit(DOCUMENTS).idf, io.BytesIO()
    np.save(file, np.array([[idf[term] for term in sorted(idf)]]))
    return json.dumps({term: i for i, term in enumerate(sorted(idf))}).encode(), file.getvalue()


def _use_weights(found: TfIdf) -> None:
    assert 0 <= found.similarity("the cat sat", "the cat sat") < 1.001


def vocabulary() -> Format:
    """The vocabulary of RS."""
    words, idf = _weights_files()

    def read(path: Path) -> TfIdf:
        path.with_name("idf.npy").write_bytes(idf)
        return TfIdf.load(path, path.with_name("idf.npy"))

    return Format([words], JSON, read, _use_weights)


def idf() -> Format:
    """Its weights, a `.npy` file."""
    words, weights = _weights_files()

    def read(path: Path) -> TfIdf:
        path.with_name("words.json").write_bytes(words)
        return TfIdf.load(path.with_name("words.json"), path)

    return Format([weights], (mutate.damaged_npy, mutate.damaged_bytes), read, _use_weights)


# ---------------------------------------------------------------- results


def _row(case: int, **more: Any) -> dict[str, Any]:
    each = [[-1.0, -2.0], [-3.0], [True, False], [True]]
    scores = {"rewrite": [each], "paraphrase": [each, each], "neighborhood": [each]}
    return {"case_id": case, "record": f"r{case}", "scores": scores, "seconds": 0.5, **more}


def _run() -> tuple[bytes, bytes]:
    shared = {"protocol": "counterfact", "model": "tiny", "model_hash": "0" * 64}
    head = {"format": "transformer_lens_rome.run.1", "setting": shared, "made_with": {"torch": "2"}}
    method = {"method": {"name": "rome", "options": {"layer": 1}}, "seed": 0}
    edited = {**head, "setting": shared | method}
    failed = {"case_id": 3, "record": "r3", "failed": "ValueError: too long"}
    generation = {"texts": ["a b c"], "GE": 5.5, "RS": 0.3}
    after = [_row(1, edit_seconds=1.0), _row(2, edit_seconds=2, generation=generation), failed]
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


def sweep() -> Format:
    """A sweep over layers."""
    three = {name: [-1.0, -2.0] for name in ("ES", "PS", "NS")}
    more = {"seconds": 1.5, "p_after": 0.9, "relative_norm": 0.1, "after": three, "seed": 0}
    rows = [{"layer": 0, "case_id": i, "before": three, **more, "prefixes": [""]} for i in (1, 2)]
    seed = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    return Format([seed], LINES, _read, lambda rows: rows and _layer_score(0, list(rows.values())))


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
        with _StepsFile(path, setting, {}) as file:
            return [_as_step(row) for row in file.rows.values()]

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


# ---------------------------------------------------------------- what users give as JSON


def request() -> Format:
    """Requests, as dicts of both schemas."""
    seeds = [json.dumps({**PUBLISHED["requested_rewrite"]}).encode(), json.dumps(FLAT).encode()]

    def read(path: Path) -> Any:
        return read_json(path)

    def use(found: Any) -> None:
        request = EditRequest.from_dict(found)
        encoder = Encoder.of(model())
        short = (request.prompt[:500], request.subject[:500])
        if "{}" in short[0] and short[1].strip():
            encoder.templated_row(*short, target=request.target_new[:500])

    return Format(seeds, JSON, read, use)


def prefixes() -> Format:
    """Prefixes, as a list."""

    def use(found: Any) -> None:
        rome._check_prefixes(found, RomeConfig())
        _tokens(*(f"{prefix} The tower" for prefix in found))

    return Format([json.dumps(["", *OTHERS]).encode()], JSON, read_json, use)


FORMATS = {
    make.__name__: make
    for make in (
        rank_one,
        dense,
        factored,
        statistics,
        npz,
        editor,
        training,
        published,
        counterfact,
        zsre,
        known,
        snippets,
        vocabulary,
        idf,
        run,
        unedited,
        sweep,
        steps,
        trace,
        average,
        request,
        prefixes,
    )
}
