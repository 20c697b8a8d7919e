"""The guide: it builds, its links lead somewhere, its code is code, and its examples run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, make_model, newest
from helpers.evaluation_setting import RandomEdits
from helpers.rome_setting import LAYER, NEAR, REQUEST, keys_and_values, random_moment
from helpers.tiny_tokenizer import tiny_tokenizer
from transformers import AutoTokenizer

import transformer_lens_rome
from transformer_lens_rome import RomeConfig, applied, compute_rome_edit
from transformer_lens_rome.evaluation import CounterFactRecord, benchmarks
from transformer_lens_rome.methods import base as methods
from transformer_lens_rome.model import adapter
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.scores import target_log_probs

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "examples" / "guide"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(GUIDE.glob("*.md"))]
NAME = transformer_lens_rome.__name__
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page: Path, language: str = "python") -> list[str]:
    """The fenced blocks of a page in one language."""
    return [
        text for name, text in FENCE.findall(page.read_text(encoding="utf-8")) if name == language
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors that a code host and the site give a page's headings."""
    heads = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def broken(page: Path, root: Path = ROOT) -> list[str]:
    """Relative links of a page that lead nowhere, or out of the repository."""
    found = []
    for link in LINK.findall(prose(page)):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            target = (page.parent / path).resolve() if path else page
            there = target.exists() and target.is_relative_to(root)
            if not there or (anchor and anchor not in anchors(target)):
                found.append(link)
    return found


def missing_imports(code: str) -> list[str]:
    """What some code imports and is not there; modules of others that are not installed pass."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if not _there(a.name)]
        elif isinstance(node, ast.ImportFrom):
            if not _there(node.module):
                found.append(node.module)
            elif node.module.split(".")[0] == NAME:
                found += [a.name for a in node.names if not _has(node.module, a.name)]
    return found


def _there(module: str) -> bool:
    if module.split(".")[0] != NAME:
        return True
    return importlib.util.find_spec(module) is not None


def _has(module: str, name: str) -> bool:
    return hasattr(importlib.import_module(module), name) or _there(f"{module}.{name}")


def run(code: str, space: dict) -> None:
    """Run a block as a module of its own would run."""
    exec(compile(code, "block", "exec", dont_inherit=True), space)


def named(page: Path) -> list[tuple[str, str]]:
    """What a page says stands in a file of the package: `name` (and `others`) in `file.py`."""
    found = []
    pattern = r"((?:`[\w.]+`(?:, | and |,\n| and\n)?)+)\s+in\s+`([\w/]+\.py)`"
    for names, file in re.findall(pattern, prose(page)):
        found += [(name, file) for name in re.findall(r"`([\w.]+)`", names)]
    return found


def test_the_finders_find(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A b\n[x](#a-b) [y](#c) [z](none.md) ![p](p.png)\n```python\n[q](q)\n```\n")
    assert broken(page, tmp_path) == ["#c", "none.md", "p.png"]
    assert "#a-b" in broken(page)
    assert blocks(page) == ["[q](q)\n"]
    code = f"import {NAME}.nothing, os\nfrom {NAME} import methods, nobody\nfrom {NAME}.no import x"
    assert missing_imports(code) == [f"{NAME}.nothing", "nobody", f"{NAME}.no"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert not broken(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_parses_and_imports_what_exists(page):
    for code in blocks(page):
        assert not missing_imports(code), code


def test_every_page_is_in_the_site_and_every_page_of_the_site_is_there():
    config = (GUIDE / "mkdocs.yml").read_text()
    listed = set(re.findall(r"^ +- guide/(\w+\.md)$", config, re.MULTILINE))
    assert listed == {page.name for page in GUIDE.glob("*.md")}


def test_how_it_works_names_what_exists():
    found = named(GUIDE / "how_it_works.md")
    assert len(found) > 20
    for name, file in found:
        module = f"{NAME}.{file.removesuffix('.py').replace('/', '.')}"
        thing = importlib.import_module(module)
        for part in name.split("."):
            thing = getattr(thing, part)
        assert thing.__module__ == module, (name, file)


def test_how_it_works_derives_a_true_formula():
    (code,) = blocks(GUIDE / "how_it_works.md")
    run(code, {})
    assert code.count("assert ") == 5
    with pytest.raises(AssertionError):
        run(code.replace("moment.solve(k_star)", "k_star"), {})  # C = I does not move text least


def test_every_public_name_is_in_the_reference():
    directives = re.findall(rf"^::: {NAME}\.([\w.]+)$", (GUIDE / "api.md").read_text(), re.M)
    assert len(directives) == len(set(directives))
    documented = {path.split(".")[-1] for path in directives}
    assert set(transformer_lens_rome.__all__) <= documented
    for path in directives:
        module, _, name = f"{NAME}.{path}".rpartition(".")
        assert _has(module, name), path
        public = getattr(transformer_lens_rome, name, None)
        if name in transformer_lens_rome.__all__ and not path.startswith(("causal", "severed")):
            assert getattr(importlib.import_module(module), name) is public, path


def test_one_version_everywhere():
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    (built,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert cited == built == version("transformer-lens-rome") == transformer_lens_rome.__version__
    assert f"## {built}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(params=CLASSES)
def several_keys(request, tokenizer, monkeypatch):
    """A tiny model, and what the two blocks of the page define when they have run."""
    monkeypatch.setattr(methods, "_REGISTRY", dict(methods._REGISTRY))
    model = make_model(request.param, "gpt2", tokenizer)
    C = random_moment(len(adapter.w_out(model, LAYER)))
    record = CounterFactRecord(3, REQUEST, ("Look: The Space Needle",), ("Pike Place is in",))
    space = {"model": model, "C": C, "layer": LAYER, "records": [record], "__name__": "page"}
    method, evaluation = blocks(GUIDE / "adding_a_method.md")
    run(method, space)
    return space, evaluation


def test_the_added_method_gives_every_key_the_value(several_keys):
    space, _ = several_keys
    model, config = space["model"], RomeConfig(steps=4, lr=0.2, clamp=4.0)
    method = methods.get_method(
        "several keys", layer=LAYER, second_moment=space["C"], config=config
    )
    options = {"layer": LAYER, "second_moment": space["C"], "prefixes": method.prefixes}
    rome = compute_rome_edit(model, NEAR, config=config, progress=False, **options)
    encoder = Encoder.of(model)
    rows = [encoder.templated_row(NEAR.prompt, NEAR.subject, x) for x in method.prefixes]
    before = keys_and_values(model, rows)[1]
    lacking = (rome.v_star - before).norm(dim=1)
    for edit, holds in ((method.compute(model, NEAR), True), (rome, False)):
        with applied(model, edit):
            left = (rome.v_star - keys_and_values(model, rows)[1]).norm(dim=1)
        assert (left <= 1e-3 * lacking).all() == holds
    assert torch.equal(keys_and_values(model, rows)[1], before)


@pytest.mark.slow
def test_a_chat_model_is_edited_and_traced_as_the_page_says(model_class, tmp_path):
    tokenizer = tiny_tokenizer(tmp_path, bos=True)
    marks = {"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}
    tokenizer.add_special_tokens(marks)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for turn in messages %}<start_of_turn>{{ turn.role }}\n"
        "{{ turn.content }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = make_model(model_class, "llama", tokenizer)
    C = random_moment(len(adapter.w_out(model, LAYER)))
    space = {"model": model, "C": C, "layer": LAYER, "__name__": "page"}
    (code,) = blocks(GUIDE / "your_setup.md")
    run(code, space)
    prompt, edit, trace = space["prompt"], space["edit"], space["trace"]
    assert prompt.startswith("<bos><start_of_turn>user\n") and prompt.count("{}") == 1
    assert "edle" in edit.health.subject_token
    assert trace.tokens[:2] == ("<bos>", "<start_of_turn>") and trace.tokens.count("<bos>") == 1
    bare, *others = edit.provenance["prefixes"]
    row = Encoder.of(model).templated_row(prompt, "the Space Needle", others[0])
    head = "<bos><start_of_turn>user\n"
    assert bare == "" and tokenizer.decode(row.ids).startswith(head + others[0][:3])


def test_the_added_method_is_evaluated(several_keys, capsys):
    space, evaluation = several_keys
    run(evaluation, space)
    assert not space["results"].failed
    said = capsys.readouterr().out
    assert "| several keys | 1 | 0 |" in said and "| rome | 1 | 0 |" in said


def test_the_added_benchmark_is_evaluated(gpt2, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmarks, "_REGISTRY", dict(benchmarks._REGISTRY))
    path = tmp_path / "requests.json"
    one = {"prompt": "{} is in", "subject": "The tower", "target_new": "Paris"}
    path.write_text(json.dumps([one, {"prompt": "no subject"}]))
    space = {"model": gpt2, "method": RandomEdits(), "path": path, "__name__": "page"}
    for block in blocks(GUIDE / "adding_a_benchmark.md"):
        run(block, space)
    results = space["results"]
    assert "the request lacks" in space["records"].skipped[0] and len(results.after) == 1
    question = "Question: Is it true that The tower is in Paris? Answer:"
    expected = target_log_probs(gpt2, [question] * 2, ["Yes", "No"])
    score = results.before[0].scores["judgement"][0]
    for found, log_probs in zip((score.new, score.true), expected, strict=True):
        assert list(found) == pytest.approx(log_probs.tolist(), abs=1e-3)
    yes, no = (one.mean().item() for one in expected)
    assert results.metrics(edited=False)[0]["J"] == float(yes > no)
    assert "| RandomEdits | 1 | 0 |" in capsys.readouterr().out


@newest
@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason="the docs extra is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(GUIDE / "mkdocs.yml")]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    for page in GUIDE.glob("*.md"):
        html = (tmp_path / "site" / page.with_suffix(".html").name).read_text()
        fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="?(https?:[^">\s]+)', html)
        assert not fetched, (page.name, "the site must need no network")
    api = (tmp_path / "site" / "api.html").read_text()
    for name in transformer_lens_rome.__all__:
        assert re.search(rf'id="{NAME}\.(\w+\.)*{name}"', api), name
