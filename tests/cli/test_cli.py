"""The command line, on a tiny model in a folder."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import tiny_models
from safetensors.torch import load_file

from transformer_lens_rome import (
    EditRequest,
    RankOneEdit,
    SecondMoment,
    get_method,
    load_edit,
    target_log_probs,
)
from transformer_lens_rome.cli.commands import main
from transformer_lens_rome.cli.diff import aligned
from transformer_lens_rome.cli.load_model import load_model
from transformer_lens_rome.methods.base import methods_with
from transformer_lens_rome.methods.mass_config import default_layers
from transformer_lens_rome.model.load import wrap
from transformer_lens_rome.statistics.sources import sampled_second_moment
from transformer_lens_rome.tracing.results import CausalTrace

needs_bridge = pytest.mark.skipif(
    not tiny_models.has_bridge(), reason="a folder is loaded as a bridge, which this version lacks"
)
PROMPT, SUBJECT, TARGET = "The mother tongue of {} is", "Danielle Darrieux", "English"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_models.tiny_hf("gpt2", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def statistics(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("statistics") / "C.safetensors"
    arguments = ["statistics", str(checkpoint), str(path), "--layer", "1", "--max-tokens", "1000"]
    assert main([*arguments, "--json"]) == 0
    return path


def test_tokens_and_weights_meet_where_there_is_a_gpu(model_class, tokenizer, monkeypatch):
    """TransformerLens would take the GPU for tokens, and leave a given model's weights behind."""
    hf = tiny_models.tiny_hf("gpt2", tokenizer)
    hf.config._name_or_path = "gpt2"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if model_class == "hooked":
        from transformer_lens import HookedTransformer

        given = []
        load = lambda *args, **options: given.append(options) or torch.nn.Identity()  # noqa: E731
        monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", load)
        wrap("gpt2", hf, tokenizer, model_class)
        assert given[0]["device"] == "cpu"
    else:
        with torch.random.fork_rng(devices=[]):
            model = wrap("gpt2", hf, tokenizer, model_class)
        assert str(model.cfg.device) == "cpu"
        assert target_log_probs(model, ["Rome is in"], ["Italy"])[0].isfinite().all()


@needs_bridge
def test_statistics_are_those_of_the_layer(statistics):
    moment = SecondMoment.load(statistics)
    assert (moment.layer, moment.n_tokens, moment.prepend_bos) == (1, 1000, False)
    assert moment.source == "sampled"


@needs_bridge
def test_edit_reports_what_it_did(checkpoint, statistics, tmp_path, capsys):
    saved, exported = tmp_path / "edit.safetensors", tmp_path / "edited"
    arguments = ["edit", str(checkpoint), PROMPT, SUBJECT, TARGET, "--layer", "1", "--json"]
    arguments += ["--statistics", str(statistics), "--ask", "The Space Needle is in"]
    assert main([*arguments, "--save", str(saved), "--export", str(exported)]) == 0
    report = json.loads(capsys.readouterr().out)
    edited = report["answers"][0]
    assert edited["after"]["p_target"] > edited["before"]["p_target"]
    assert edited["after"]["p_target"] == pytest.approx(report["health"]["p_after"], rel=1e-3)
    assert report["answers"][1]["prompt"] == "The Space Needle is in"
    assert report["byte_identical"] and report["file"]["reloads_equal"]
    edit = RankOneEdit.load(saved)
    name = "transformer.h.1.mlp.c_proj.weight"
    before = load_file(checkpoint / "model.safetensors")[name]
    after = load_file(exported / "model.safetensors")[name]
    assert (after - before - edit.delta()).abs().max() < 1e-5 < (after - before).abs().max()


@needs_bridge
def test_edit_prints_for_people(checkpoint, statistics, capsys):
    arguments = ["edit", str(checkpoint), PROMPT, SUBJECT, TARGET, "--layer", "1"]
    assert main([*arguments, "--statistics", str(statistics), "--released", "--diff"]) == 0
    shown = capsys.readouterr().out
    assert "P(target)" in shown and "byte_identical: True" in shown
    before, after = (
        next(x for x in shown.splitlines() if f"  {w}" in x) for w in ("before", "after")
    )
    assert before.split("...")[0] != after.split("...")[0] and "[" in before + after


def test_equal_words_are_aligned():
    before, after = aligned("in Seattle, Washington. It is old", "in Paris. It is very old")
    assert before == "in [Seattle, Washington.] It is        old"
    assert after == "in [Paris.]               It is [very] old"
    assert aligned("the same", "the same") == ("the same", "the same")
    assert aligned("", "new") == ("", "[new]")


@needs_bridge
def test_many_facts_are_written_and_undone(checkpoint, statistics, tmp_path, capsys):
    subjects = ("The Space Needle", "The tower", "The old city")
    facts = [{"prompt": "{} is in", "subject": x, "target_new": "Rome"} for x in subjects]
    path, saved = tmp_path / "facts.json", tmp_path / "edit.safetensors"
    path.write_text(json.dumps(facts))
    arguments = ["edit-many", str(checkpoint), str(path), "--layers", "1", "--json"]
    arguments += ["--statistics", str(statistics)]
    assert main([*arguments, "--save", str(saved)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["written"] == 3 and report["layers"] == [1] and not report["left out"]
    assert report["P(target)"]["after"] > report["P(target)"]["before"]
    assert report["byte_identical"] and report["file"]["reloads_equal"]
    assert [request.subject for request in load_edit(saved).requests] == list(subjects)
    path.write_text(json.dumps(facts[:1] * 2))
    assert main(arguments) == 2 and "leave one out" in capsys.readouterr().err
    path.write_text("{}")
    assert main(arguments) == 2 and "no list of facts" in capsys.readouterr().err


def test_a_bad_request_is_one_line_and_status_2(capsys):
    assert main(["edit", "demo", "no hole here", SUBJECT, TARGET]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the prompt needs exactly one '{}'") and error.count("\n") == 1


@needs_bridge
def test_trace_says_where(checkpoint, tmp_path, capsys):
    saved, shown = tmp_path / "trace.safetensors", tmp_path / "trace.html"
    arguments = ["trace", str(checkpoint), "In the city Space Needle is", "Space Needle"]
    arguments += ["--kind", "mlp", "--window", "2", "--samples", "3", "--seed", "1", "--json"]
    assert main([*arguments, "--save", str(saved), "--html", str(shown)]) == 0
    report, trace = json.loads(capsys.readouterr().out), CausalTrace.load(saved)
    assert (trace.kind, trace.window, trace.samples.shape[0]) == ("mlp", 2, 3)
    assert report["p_corrupted"] == pytest.approx(trace.p_corrupted)
    assert report["last_subject_token"] == trace.scores[:, trace.subject_last].tolist()
    assert f"{trace.scores.max().item():.3g}" in report["best"][0]
    assert "new HeatMap(" in shown.read_text()
    assert main([*arguments, "--method", "gradient"]) == 0
    assert "Spearman" in json.loads(capsys.readouterr().out)["estimate"]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "records.json"
    items = [
        {
            "case_id": i,
            "prompt": f"{subject} is in",
            "subject": subject,
            "target_new": "Paris",
            "ground_truth": "Rome",
            "rephrase_prompt": f"The old {subject}",
            "locality_prompt": "Cuba is in",
        }
        for i, subject in enumerate(("The tower", "Space Needle", "Old man", ""))
    ]
    path.write_text(json.dumps(items))
    return path


@needs_bridge
def test_evaluate_then_table(checkpoint, records, tmp_path, capsys):
    def evaluate(method, *more):
        out = str(tmp_path / f"{method}.jsonl")
        arguments = ["evaluate", str(checkpoint), method, out, "--records", str(records), "--json"]
        status = main([*arguments, *more])
        return status, capsys.readouterr()

    status, said = evaluate("ft", "--layer", "1")
    assert status == 2 and "record 3: subject" in said.err and "strict=False" in said.err
    status, said = evaluate("ft", "--layer", "1", "--lenient")
    report = json.loads(said.out)
    assert status == 0 and len(report["left_out"]) == 1 and report["failed"] == {}
    assert "| ft | 3 | 0 |" in report["table"] and report["seconds"]["edit_seconds"] > 0
    assert evaluate("ft+l", "--layer", "1", "--lenient")[0] == 0
    mine = ["evaluate", str(checkpoint), "unedited", str(tmp_path / "mine.jsonl"), "--lenient"]
    assert main([*mine, "--records", str(records), "--json"]) == 2  # not renamed without a word
    assert f"pass {tmp_path / 'unedited.jsonl'}, got" in capsys.readouterr().err
    status, said = evaluate("unedited", "--lenient")
    assert status == 0 and "| unedited | 3 | 0 |" in json.loads(said.out)["table"]
    for more, words in (
        (["--statistics", "file"], "--statistics is for rome, not for 'ft'"),
        (["--snippets", "file"], "give --generate too"),
        (["--dataset", "zsre", "--generate"], "zsre has none of this; leave out --generate"),
        (["--n-tokens", "5"], "counterfact has none of this; leave out --n-tokens"),
        (["--editor", "file"], "--editor is for ke, ke-cf, mend, mend-cf, not for 'ft'"),
    ):
        status, said = evaluate("ft", *more)
        assert status == 2 and words in said.err
    layered = ", ".join(methods_with("layer"))
    for name, more, words in (
        ("kn", ["--layer", "1"], f"--layer is for {layered}, not for 'kn'"),
        ("unedited", ["--layer", "1"], f"--layer is for {layered}, not for 'unedited'"),
        ("ke", [], "'ke' has to be trained; give the editor's file, --editor"),
        ("mend", ["--editor", str(tmp_path / "none")], "no file"),
    ):
        status, said = evaluate(name, "--lenient", *more)
        assert status == 2 and words in said.err
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"ft.jsonl", "ft+l.jsonl", "unedited.jsonl"}

    runs = [str(tmp_path / name) for name in ("ft.jsonl", "ft+l.jsonl")]
    assert main(["table", *runs, "--compare"]) == 0
    shown = capsys.readouterr().out
    assert (
        report["table"].splitlines()[-3] in shown and "| ft less ft+l | difference | p |" in shown
    )
    assert main(["table", *runs, "--style", "latex", "--json"]) == 0
    latex = json.loads(capsys.readouterr().out)["table"]
    assert r"\begin{tabular}{lrr" in latex and r"ft+l & 3 & 0 &" in latex
    assert main(["table", str(records)]) == 2
    assert "is not the file of a run" in capsys.readouterr().err


@needs_bridge
@pytest.mark.slow
def test_many_facts_are_evaluated_together(checkpoint, records, tmp_path, capsys):
    model = load_model(str(checkpoint), None)
    sampled_second_moment(model, default_layers(model)[0], progress=False)  # kept in the cache
    arguments = ["evaluate", str(checkpoint), "memit", str(tmp_path / "run.jsonl"), "--lenient"]
    arguments += ["--records", str(records), "--json", "--together", "2"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["failed"] == {} and "| memit | 3 | 0 |" in report["table"]
    assert "Facts written by one edit (memit: 2)" in report["table"]
    arguments[2] = "ft"
    assert main(arguments) == 2
    assert "needs a method that writes many facts" in capsys.readouterr().err


@needs_bridge
def test_an_editor_is_evaluated(checkpoint, records, tmp_path, capsys):
    model = load_model(str(checkpoint), None)
    facts = [EditRequest("{} was born in", name, "Rome") for name in ("Ida", "Kai", "Lea")]
    method = get_method("mend-cf")
    settings = replace(method.settings(), accumulate=1, max_steps=1, validate_every=1)
    method.fit(
        model, facts, locality=["the sea", "the sun"], settings=settings, out=tmp_path / "editor"
    )
    arguments = ["evaluate", str(checkpoint), "mend-cf", str(tmp_path / "run.jsonl"), "--lenient"]
    arguments += ["--records", str(records), "--editor", str(tmp_path / "editor"), "--json"]
    capsys.readouterr()
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert "| mend-cf | 3 | 0 |" in report["table"] and not report["failed"]


# ---------------------------------------------------------------- reports are never lost

WORDS = "Zoë lebt in Århus – 東京 🗼"


@pytest.fixture
def console(monkeypatch):
    """Put a console of another encoding in the place of stdout; gives what was printed to it."""

    def use(encoding):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        return lambda: (sys.stdout.flush(), written.getvalue().decode(encoding))[1]

    return use


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
@pytest.mark.parametrize("how", [[], ["--json"]])
def test_a_report_is_printed_whatever_the_console_encodes(console, monkeypatch, encoding, how):
    report = {"model": WORDS, "answers": [], "numbers": {"p": 0.5, "text": WORDS}}
    monkeypatch.setattr("transformer_lens_rome.cli.commands.run_demo", lambda options: report)
    said = console(encoding)
    assert main(["demo", *how]) == 0
    if how:
        assert json.loads(said()) == report  # nothing is lost
    else:
        assert WORDS.encode(encoding, "backslashreplace").decode(encoding) in said()


@needs_bridge
def test_a_text_file_is_read_as_utf_8(checkpoint, tmp_path, capsys):
    file, out = tmp_path / "text", tmp_path / "C"
    arguments = ["statistics", str(checkpoint), str(out), "--layer", "1", "--text", str(file)]
    arguments += ["--max-tokens", "60", "--json"]
    sums = []
    for text in (WORDS * 20, "\ufeff" + WORDS * 20):  # without and with a byte order mark
        file.write_text(text, encoding="utf-8")
        assert main(arguments) == 0
        sums.append(SecondMoment.load(out).sum_kk)
    assert torch.equal(*sums)
    file.write_bytes(WORDS.encode("utf-16"))
    capsys.readouterr()
    assert main(arguments) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err


def test_peak_memory_is_left_out_where_nothing_tells_it(monkeypatch):
    from transformer_lens_rome.cli.commands import _peak_memory_gb

    assert _peak_memory_gb() > 0
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert _peak_memory_gb() is None


@pytest.mark.slow
@needs_bridge
def test_nothing_is_read_or_written_in_the_locales_encoding(checkpoint, tmp_path):
    """Python warns of files that are opened without an encoding; none of them is ours."""
    (tmp_path / "text").write_text(WORDS * 9, encoding="utf-8")
    code = f"""
import sys, warnings
from transformer_lens_rome.__main__ import main
place = r"transformer_lens_rome(\\.|$)"
warnings.filterwarnings("error", category=EncodingWarning, module=place)
model, text, out = {str(checkpoint)!r}, {str(tmp_path / "text")!r}, {str(tmp_path / "out")!r}
status = main(["statistics", model, out, "--layer", "1", "--text", text, "--max-tokens", "30"])
status += main(["trace", model, "Rome is in", "Rome", "--samples", "2", "--html", out + ".html"])
sys.exit(status)
"""
    run = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-c", code],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode(errors="replace")[-2000:]
