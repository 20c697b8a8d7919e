"""Files from strangers: whatever is in them, they are refused in words, or fit to be used.

The damage is that of `tests/fuzz/`, with other seeds and fewer files.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, make_model
from helpers.evaluation_setting import referred
from helpers.rome_setting import random_edit
from safetensors.torch import save_file

from transformer_lens_rome import EditRequest, RankOneEdit, SecondMoment, load_edit, viz
from transformer_lens_rome.edits.kinds import EditHealth
from transformer_lens_rome.evaluation import CounterFact, References, Results, Zsre
from transformer_lens_rome.evaluation.generation import TfIdf
from transformer_lens_rome.evaluation.metrics import KINDS, PromptScore
from transformer_lens_rome.evaluation.results import latex, markdown
from transformer_lens_rome.evaluation.rows import RecordRow
from transformer_lens_rome.files.cache import safe_name
from transformer_lens_rome.files.strict_json import MAX_DATA, MAX_DEPTH, parse, read_json
from transformer_lens_rome.files.tensors import read_tensors, write_tensors
from transformer_lens_rome.methods.hypernetworks import knowledge_editor
from transformer_lens_rome.sequential.steps import steps_file
from transformer_lens_rome.tracing.known_facts import load_known_facts
from transformer_lens_rome.tracing.results import CausalTrace

NAMES = """rank_one dense factored history statistics npz editor training published counterfact zsre
known snippets vocabulary idf run unedited steps trace average request prefixes""".split()


@pytest.fixture(scope="module")
def fuzzing():
    """The script, and its formats; the widths of KE are what they were afterwards."""
    widths = ("LSTM_WIDTH", "H_WIDTH", "HEAD_WIDTH")
    before = {name: getattr(knowledge_editor, name) for name in widths}
    yield importlib.import_module("fuzz.__main__"), importlib.import_module("fuzz.formats")
    for name, value in before.items():
        setattr(knowledge_editor, name, value)


def test_every_format_is_here(fuzzing):
    assert list(fuzzing[1].FORMATS) == NAMES


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_refused_or_fit_to_be_used(fuzzing, tmp_path, name):
    fuzz, formats = fuzzing
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(torch.Generator().manual_seed(1).get_state())
        chosen, path = formats.FORMATS[name](), tmp_path / "stranger.jsonl"
        found = []
        for number in range(40 if name in ("editor", "published") else 200):
            path.write_bytes(fuzz.damaged(chosen, name, "test", number))
            found.append(fuzz.outcome(chosen, path))
            assert found[-1] in ("accepted", "refused"), f"--one {number}: {found[-1]}"
    assert found[0] == "accepted"  # the control: file 0 is whole
    assert found.count("refused") > len(found) / 5


# ---------------------------------------------------------------- headers that promise too much


OWN = {"__metadata__": {"transformer_lens_rome": '{"format": "mine"}'}}


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(OWN | header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, begin=0, end=0, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "huge header": safetensors({}, length=2**63),
    "header of the largest size": safetensors({}, length=2**64 - 1),
    "nothing but spaces": safetensors(b" " * 2**25),
    "huge shape": safetensors({"u": entry([2**40], 0, 2**42)}),
    "shape that wraps around": safetensors({"u": entry([2**32, 2**32, 2**32], 0, 0)}),
    "shape with a zero": safetensors({"u": entry([0, 2**63])}),
    "negative shape": safetensors({"u": entry([-1, -1], 0, 4)}, b"1234"),
    "shape in floats": safetensors({"u": entry([1.0], 0, 4)}, b"1234"),
    "shape true": safetensors({"u": entry([True], 0, 4)}, b"1234"),
    "overlap": safetensors({"u": entry([1], 0, 4), "v": entry([1], 0, 4)}, b"1234"),
    "gap": safetensors({"u": entry([1], 4, 8)}, b"12345678"),
    "more than is said": safetensors({"u": entry([1], 0, 4)}, b"12345678"),
    "unknown type": safetensors({"u": entry([1], 0, 4, "F128")}, b"1234"),
    "a type without arithmetic": safetensors({"u": entry([4], 0, 4, "F8_E5M2")}, b"1234"),
    "a name twice": safetensors(b'{"u": 1, "u": 2}'),
    "metadata of numbers": safetensors({"__metadata__": {"a": 1}}),
    "metadata a list": safetensors({"__metadata__": []}),
    "deep": safetensors(b"[" * 100_000 + b"]" * 100_000),
    "no JSON": safetensors(b"\xff" * 100),
    "seven bytes": b"1234567",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_cannot_be_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "stranger.safetensors"
    path.write_bytes(safetensors({"u": entry([1], 0, 4)}, b"1234"))
    assert list(read_tensors(path, "mine")[0]) == ["u"]  # the control
    path.write_bytes(HEADERS[kind])
    words = "unknown type" if kind == "a type without arithmetic" else "not a complete safetensors"
    with pytest.raises(ValueError, match=f"stranger.safetensors.*{words}"):
        read_tensors(path, "mine")
    for read in (load_edit, SecondMoment.load):
        with pytest.raises(ValueError, match=r"stranger.safetensors is"):
            read(path)


def test_what_was_read_stays_when_the_file_changes(tmp_path):
    path = tmp_path / "moment.safetensors"
    SecondMoment.from_moment(torch.eye(64), 10).save(path)
    moment, content = SecondMoment.load(path), path.read_bytes()
    with path.open("r+b") as file:  # in place, as no program of this package does it
        file.write(bytes(len(content)))
    assert torch.equal(moment.sum_kk, 10 * torch.eye(64).double())


def npz(parts, packed=zipfile.ZIP_STORED):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", packed) as file:
        for name, content in parts:
            file.writestr(name, content)
    return target.getvalue()


def npy(header, data=b"", version=b"\x01\x00"):
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + data


def described(descr="<f4", order="False", shape="(2, 2)"):
    return f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()


GOOD, COUNT = npy(described(), np.eye(2, dtype="f4").tobytes()), npy(described("<i8", shape="()"))
COUNT += struct.pack("<q", 9)
ARRAYS = {
    "huge": npy(described(shape="(99999999, 99999999)"), b"1234"),
    "larger than whole numbers": npy(described(shape=f"({10**11}, {10**11})"), b"1234"),
    "negative": npy(described(shape="(-1, 2)"), b"1234"),
    "objects": npy(described("|O"), b"\x80\x04N."),
    "texts": npy(described("<U4"), b"1234" * 16),
    "code": npy(b"__import__('os').abort()\n"),
    "a power": npy(described(shape="(9**9**9,)")),
    "brackets": npy(b"(" * 9000 + b"\n"),
    "a long header": npy(described() + b" " * 60_000),
    "another version": npy(described(), b"1234" * 4, b"\x02\x00"),
    "not square": npy(described(shape="(1, 4)"), np.ones(4, "f4").tobytes()),
    "not symmetric": npy(described(), np.array([1, 5, 0, 1], "f4").tobytes()),
    "below zero": npy(described(), np.array([1, 0, 0, -1], "f4").tobytes()),
    "not finite": npy(described(), np.array([1, 0, 0, np.nan], "f4").tobytes()),
    "short": npy(described(), b"1234"),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_that_cannot_be_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "transformer.h.3.mlp.npz"
    for content, good in ((ARRAYS[kind], False), (GOOD, True)):
        path.write_bytes(npz([("mom2.mom2.npy", content), ("mom2.count.npy", COUNT)]))
        if good:  # the control
            assert (SecondMoment.from_npz(path).layer, SecondMoment.from_npz(path).n_tokens) == (
                3,
                9,
            )
            break
        with pytest.raises(ValueError, match="h.3.mlp.npz is not a complete statistics"):
            SecondMoment.from_npz(path)


def test_a_zip_bomb_is_not_opened(tmp_path):
    """Ten kilobytes that would become a matrix of four gigabytes, were the zip's word taken."""
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("mom2.count.npy", COUNT)
        with file.open("mom2.mom2.npy", "w", force_zip64=True) as part:
            part.write(npy(described(shape="(2048, 2048)")) + bytes(2**24))
    tracemalloc.start()
    with pytest.raises(ValueError, match="is compressed"):
        SecondMoment.from_npz(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_two_vectors_do_not_become_a_matrix_that_no_memory_holds(tmp_path):
    tensors = {name: torch.ones(50_000) for name in ("k_star", "u", "lam", "v_star")}
    request = EditRequest("{} is in", "Rome", "France")
    small = RankOneEdit(layer=0, request=request, **{n: t[:4] for n, t in tensors.items()})
    small.save(tmp_path / "edit")
    assert load_edit(tmp_path / "edit").delta().shape == (4, 4)
    RankOneEdit(layer=0, request=request, **tensors).save(tmp_path / "edit")
    with pytest.raises(ValueError, match=r"no model has a matrix of \(50000, 50000\)"):
        load_edit(tmp_path / "edit")


# ---------------------------------------------------------------- fields of an edit


def _changed(path, model, where, value):
    """An edit's file with one field of its description changed."""
    random_edit(model).save(path)
    tensors, info = read_tensors(path, "transformer_lens_rome.edit.1")
    inside = info
    for key in where[:-1]:
        inside = inside[key]
    inside[where[-1]] = value
    save_file(tensors, path, metadata={"transformer_lens_rome": json.dumps(info)})


@pytest.mark.parametrize("text", ["\ud800", "x" * 1_000_001])
def test_what_could_not_be_read_is_not_written(tmp_path, text):
    with pytest.raises(ValueError, match="its description"):
        write_tensors(tmp_path / "C", {"C": torch.eye(2)}, {"format": "mine", "source": text})
    assert not list(tmp_path.iterdir())


FIELDS = [
    (("layer",), -1),
    (("layer",), 10**6),
    (("layer",), 1.0),
    (("request", "prompt"), 5),
    (("request", "prompt"), "{} \ud800"),
    (("request", "subject"), ["x"]),
    (("request", "target_true"), 3),
    (("request", "extra"), 3),
    (("request", "target_new"), "x" * 1_000_001),
    (("health", "losses"), "abc"),
    (("health", "losses"), [1.0, "a"]),
    (("health", "warnings"), 5),
    (("health", "warnings"), [5]),
    (("health", "clamp_hits"), "3"),
    (("health", "p_after"), "0.5"),
    (("health", "nothing"), 1),
    (("config",), []),
    (("provenance",), "x"),
    (("kind",), "_Edit"),
]


@pytest.mark.parametrize(("where", "value"), FIELDS)
def test_each_field_of_an_edit_has_its_type(tokenizer, tmp_path, where, value):
    model, path = make_model(CLASSES[-1], "gpt2", tokenizer), tmp_path / "edit"
    _changed(path, model, ("health", "p_after"), 0.5)
    assert load_edit(path).health.p_after == 0.5  # the control
    _changed(path, model, where, value)
    with pytest.raises(ValueError, match=r"edit (is an incomplete edit file|contains no JSON)"):
        load_edit(path)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["k_star", "u", "lam", "v_star"])
def test_an_edit_holds_numbers(tokenizer, tmp_path, name, number):
    edit = random_edit(make_model(CLASSES[-1], "gpt2", tokenizer))
    getattr(edit, name)[3] = number
    edit.save(tmp_path / "edit")
    with pytest.raises(ValueError, match=f"edit is an incomplete edit file.*{name} contains NaN"):
        load_edit(tmp_path / "edit")


# ---------------------------------------------------------------- JSON


BAD_JSON = {
    "deep": "[" * (MAX_DEPTH + 3) + "]" * (MAX_DEPTH + 3),
    "very deep": "[" * 10**6,
    "a key twice": '{"a": 1, "b": {"c": 1, "c": 1}}',
    "half a character": '["\\ud83d"]',
    "half a character as a key": '{"\\udc00": 1}',
    "a long text": json.dumps(["x" * 1_000_001]),
    "another encoding": '["ä"]'.encode("utf-16"),
    "bytes that are no text": b'["\xff"]',
    "nothing": "",
    "two values": "[] []",
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_json_that_is_refused(tmp_path, kind):
    text, path = BAD_JSON[kind], tmp_path / "stranger.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (read_json, CounterFact.load, Zsre.load, load_known_facts):
        with pytest.raises(ValueError, match="stranger.json is not JSON"):
            read(path)


def test_json_that_is_read():
    assert parse("[" * MAX_DEPTH + "]" * MAX_DEPTH, "it") is not None
    assert parse('{"a": "\\ud83d\\ude00"}'.encode(), "it") == {"a": "😀"}
    assert parse(b"\xef\xbb\xbf[1]", "it") == [1]
    assert parse(f"[{2**64 - 1}, {-(2**63)}]", "it") == [2**64 - 1, -(2**63)]
    big, huge = parse(f"[{2**64}, 1{'0' * 5000}]", "it")
    assert (type(big), big, huge) == (float, 2.0**64, float("inf"))


def test_a_file_of_any_size_is_not_read(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(MAX_DATA + 1)  # a hole: no disk is used
    tracemalloc.start()
    steps = partial(steps_file, setting={})
    for read in (read_json, CounterFact.load, load_known_facts, Results.load, steps):
        with pytest.raises(ValueError, match="large.json is larger than"):
            read(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes of this kind on this system")
def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        for read in (load_edit, SecondMoment.load, SecondMoment.from_npz, CounterFact.load):
            with pytest.raises(FileNotFoundError):
                read(path)


SNIPPET = {"relation_id": "P1", "target_id": "Q1", "samples": [{"text": "a cat", "n": [1.5, {}]}]}
NOT_SNIPPETS = {
    **{
        text: text.encode()
        for text in ("[1,]", "[1", "[1 2]", "[,1]", "{}", "[1]]", '{"item": []}')
    },
    "a long number": b"[" + b"9" * 5000 + b"]",
    "a large exponent": b"[1e99999999999999999999]",
    "very deep": b"[" * 100_000,
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "bytes that are no text": b'["\xff"]',
    "nothing": b"",
    "a text that is a number": json.dumps([SNIPPET | {"target_id": 1}]).encode(),
    "samples that are texts": json.dumps([SNIPPET | {"samples": ["a cat"]}]).encode(),
}


@pytest.mark.parametrize("kind", NOT_SNIPPETS)
def test_snippets_that_are_refused(tmp_path, kind):
    pytest.importorskip("ijson", reason="the generation extra is not installed")
    path, weights = tmp_path / "snippets.json", TfIdf.fit(["a cat"])
    path.write_text(json.dumps([SNIPPET] * 2, indent=3))
    found = References.extract([referred(0, "P1", "Q1")], path, weights)
    assert found.texts == {"P1/Q1": "a cat a cat"}  # the control
    path.write_bytes(NOT_SNIPPETS[kind])
    with pytest.raises(ValueError, match="snippets.json is not a snippets file"):
        References.extract([referred(0, "P1", "Q1")], path, weights)


def test_a_pile_of_small_snippets_does_not_take_the_square_of_their_number(tmp_path):
    pytest.importorskip("ijson", reason="the generation extra is not installed")
    path = tmp_path / "snippets.json"
    item = {"relation_id": "P1", "target_id": "Q1", "samples": [{"text": "a cat sat on the mat"}]}
    path.write_text(json.dumps([item] * 20_000))
    found = References.extract([referred(0, "P1", "Q1")], path, TfIdf.fit(["a cat"]))
    assert len(found.texts["P1/Q1"]) == 21 * 20_000 - 1


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "text", ["../../x", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "a\0b", ".hidden", "n" * 5000]
)
def test_a_name_is_one_plain_name(tmp_path, text):
    name = safe_name(text)
    (tmp_path / name).write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert not name.startswith(".") and len(name) <= 100


def test_long_names_that_differ_at_the_end_stay_different():
    assert safe_name("n" * 200 + "a") != safe_name("n" * 200 + "b")
    assert safe_name("google/gemma-3-270m") == "google_gemma-3-270m"


@pytest.mark.parametrize("known_id", ["../../evil", "/tmp/evil", 7.5, True, None, [1]])
def test_the_number_of_a_fact_is_a_number(tmp_path, known_id):
    fact = {"subject": "A", "attribute": "B", "prompt": "A is", "relation_id": "P1"}
    path = tmp_path / "known.json"
    path.write_text(json.dumps([fact | {"known_id": 7}]))
    assert load_known_facts(path)[0].known_id == 7
    path.write_text(json.dumps([fact | {"known_id": known_id}]))
    with pytest.raises(ValueError, match="known_id should be int"):
        load_known_facts(path)


# ---------------------------------------------------------------- a stranger's text, as shown


EVIL = '<script>alert(1)</script><img src=x onerror="alert(1)">'


def test_a_strangers_text_is_no_html(tokenizer, tmp_path):
    model = make_model(CLASSES[-1], "gpt2", tokenizer)
    path = tmp_path / "edit"
    _changed(path, model, ("request", "subject"), EVIL)
    edit = load_edit(path)
    health = EditHealth(subject_token=EVIL, warnings=(EVIL,))
    cells = torch.ones(1, 2, 1)
    trace = CausalTrace(
        cells, cells[:, 0, 0], 0.9, (EVIL,), (0,), EVIL, "mlp", 1, "probability", {"model": "tiny"}
    )
    viz.save_html(tmp_path / "page.html", edit, health, trace, EVIL, title=EVIL)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    shown = [edit._repr_html_(), health._repr_html_(), trace._repr_html_(), page]
    for text in shown:
        assert "<script>alert" not in text and "<img src=x" not in text
        assert "&lt;script&gt;alert" in text


def test_a_strangers_name_breaks_no_table(tmp_path):
    name = "a|b\n\n<script>alert(1)</script>\\input{/etc/passwd} $x$ ~^"
    scores = {kind: [PromptScore([-1.0], [-2.0], [True], [True])] for kind in KINDS}
    rows = {1: RecordRow(1, "r", scores)}
    run = Results(name, {"method": {"name": name}}, rows, rows)
    table, source = markdown([run]), latex([run])
    assert "<script" not in table and len(table.splitlines()) == len(markdown([run]).splitlines())
    (line,) = [line for line in table.splitlines() if "script" in line]
    assert line.replace("\\|", "").count("|") == table.splitlines()[0].count("|")
    assert "\\input" not in source and r"\textbackslash{}input\{" in source
    assert r"\$x\$ \textasciitilde{}\textasciicircum{}" in source
    figure = pytest.importorskip("matplotlib") and run.plot()
    figure.savefig(io.BytesIO())  # where an odd number of dollars would be a formula


# ---------------------------------------------------------------- what a file can make happen


_RUN = """
import sys
from transformer_lens_rome import load_edit
from transformer_lens_rome.methods.hypernetworks.published_editors import _read
from transformer_lens_rome.evaluation.generation import TfIdf
from transformer_lens_rome.statistics.second_moment import SecondMoment
from pathlib import Path
opened = []
sys.addaudithook(lambda name, args: opened.append((name, args)))
both = lambda path: TfIdf.load(path, path)
for path in map(Path, sys.argv[1:]):
    for read in (load_edit, SecondMoment.load, SecondMoment.from_npz, _read, both):
        try:
            read(path)
            raise SystemExit("it was read")
        except ValueError:
            pass
run = ("os.mkdir", "os.system", "os.exec", "subprocess.Popen", "pickle.find_class")
bad = [e for e in opened if e[0] in run or e[0] == "open" and "w" in str(e[1][1])]
print(bad or "quiet")
"""


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _pickled_in_three_ways(folder, made):
    """Files that make a folder when they are unpickled, and how that is done."""
    torch.save({"model": Evil(made)}, folder / "torch")
    with (folder / "numpy").open("wb") as file:
        np.savez(file, **{"mom2.mom2": np.array([Evil(made)], dtype=object), "mom2.count": 3})
    (folder / "pickle").write_bytes(pickle.dumps(Evil(made)))
    return {
        folder / "torch": lambda path: torch.load(path, weights_only=False),
        folder / "numpy": lambda path: np.load(path, allow_pickle=True)["mom2.mom2"],
        folder / "pickle": lambda path: pickle.loads(path.read_bytes()),
    }


@pytest.mark.slow
def test_nothing_in_a_file_is_run(tmp_path):
    made = tmp_path / "made"
    files = _pickled_in_three_ways(tmp_path, made)
    for path, load in files.items():  # the control: each does what it should not
        load(path)
        assert made.is_dir()
        made.rmdir()
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *map(str, files)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "quiet", done.stdout + done.stderr
    assert not made.exists()


def test_an_array_takes_little_more_memory_than_its_file(tmp_path):
    """A matrix of 32 MB: its own memory, and no second copy of it on the way."""
    path = tmp_path / "moment.npz"
    np.savez(path, **{"mom2.mom2": np.eye(2048), "mom2.count": np.array(10)})
    SecondMoment.from_npz(path)
    tracemalloc.start()
    found = SecondMoment.from_npz(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 2**25 <= peak < 1.2 * 2**25 and found.d_mlp == 2048


_PEAK = """
import re, sys
from transformer_lens_rome.files.tensors import read_tensors
peak = lambda: int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
before = peak()
tensors, _ = read_tensors(sys.argv[1], "mine")
print((peak() - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="no /proc/self/status")
def test_tensors_take_their_memory_once_beside_the_map_of_the_file(tmp_path):
    size, path = 2**27, tmp_path / "tensors"
    write_tensors(path, {"a": torch.ones(size // 4)}, {"format": "mine"})
    command = [sys.executable, "-W", "ignore", "-c", _PEAK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert size / 2 < int(done.stdout.split()[-1]) < 2.3 * size
