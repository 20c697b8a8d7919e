"""Statistics are made once, found again, and never taken for those of another model."""

import json

import numpy as np
import pytest
import torch
from conftest import make_model
from helpers.rome_setting import random_edit
from safetensors import SafetensorError

from transformer_lens_rome import applied
from transformer_lens_rome.files import tensors as files
from transformer_lens_rome.files.cache import cache_folder
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.prompts.sampling import sampled_texts
from transformer_lens_rome.statistics import sources as default_statistics
from transformer_lens_rome.statistics.collect import collect_second_moment
from transformer_lens_rome.statistics.sources import (
    cached_second_moment,
    default_second_moment,
    sampled_second_moment,
)

LAYER = 1
TEXTS = ["The Eiffel Tower is located in the city of Paris.", "Rome is the capital of Italy."] * 6


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSFORMER_LENS_ROME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch):
    """Nothing is fetched: both ways to the network fail, and say which was tried."""
    tried = []

    def fail(name, error=OSError):
        def raise_error(*args):
            tried.append(name)
            raise error(f"no network\nsecond line of {name}")

        return raise_error

    monkeypatch.setattr(default_statistics, "_published", fail("published"))
    monkeypatch.setattr(
        default_statistics, "_articles", fail("wikipedia", default_statistics._NoCorpus)
    )
    return tried


class Maker:
    """Collects from one model, and counts how often it was asked to."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def __call__(self):
        self.calls += 1
        return collect_second_moment(self.model, TEXTS, LAYER, progress=False)

    def cached(self, layer=LAYER, bos=False, corpus="mine"):
        return cached_second_moment(self.model, layer, bos, corpus, self)


def test_made_once_then_read(gpt2, folder):
    make = Maker(gpt2)
    first, second = make.cached(), make.cached()
    assert make.calls == 1 and len(list(folder.iterdir())) == 1
    assert torch.equal(first.sum_kk, second.sum_kk) and first.report() == second.report()
    make.cached(corpus="other")
    assert make.calls == 2  # another corpus is another file


def test_another_model_of_the_same_name_gets_its_own(gpt2, model_class, tokenizer, folder, caplog):
    make, other = Maker(gpt2), Maker(make_model(model_class, "gpt2", tokenizer, seed=1))
    assert gpt2.cfg.model_name == other.model.cfg.model_name
    mine = make.cached()
    with caplog.at_level("WARNING"):
        theirs = other.cached()
    assert other.calls == 1 and "not from this model" in caplog.text
    assert not torch.allclose(mine.C, theirs.C, atol=1e-2)
    make.cached()
    assert make.calls == 2  # the file is the other model's by now


def test_statistics_of_an_edited_model_are_not_kept(gpt2, folder, caplog):
    make = Maker(gpt2)
    with applied(gpt2, random_edit(gpt2, layer=0)), caplog.at_level("WARNING"):
        edited = make.cached()
    assert "edited model are not kept" in caplog.text and not folder.exists()
    assert not torch.equal(make.cached().sum_kk, edited.sum_kk) and make.calls == 2


def test_a_broken_file_is_not_used(gpt2, folder, caplog):
    make = Maker(gpt2)
    first = make.cached()
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with caplog.at_level("WARNING"):
        again = make.cached()
    assert make.calls == 2 and "is not used" in caplog.text
    assert torch.equal(again.sum_kk, first.sum_kk)
    make.cached()
    assert make.calls == 2  # and it was replaced by a whole one


def test_a_folder_that_cannot_be_written_is_no_obstacle(gpt2, folder, caplog):
    folder.write_text("a file where the folder should be")
    make = Maker(gpt2)
    with caplog.at_level("WARNING"):
        found = make.cached()
    assert make.calls == 1 and "cannot save statistics" in caplog.text
    expected = collect_second_moment(gpt2, TEXTS, LAYER, progress=False)
    assert torch.equal(found.sum_kk, expected.sum_kk)
    assert folder.read_text().startswith("a file")


def test_offline_the_error_names_both_remedies(gpt2, folder, offline):
    with pytest.raises(ValueError) as caught:
        default_second_moment(gpt2, LAYER, prepend_bos=False, progress=False)
    message = str(caught.value)
    assert offline == ["wikipedia"]  # the authors publish nothing for a tiny model
    assert "collect_second_moment(model" in message and "sampled_texts(model" in message
    assert str(folder) in message
    texts = sampled_texts(gpt2, 3, length=20, progress=False)  # the remedy is one that works
    assert collect_second_moment(gpt2, texts, LAYER, progress=False).n_tokens > 0


def test_the_authors_files_come_before_wikipedia_and_never_with_bos(
    gpt2, folder, offline, monkeypatch
):
    monkeypatch.setattr(default_statistics, "short_name", lambda model: "gpt2-xl")
    for bos, expected in ((False, ["published", "wikipedia"]), (True, ["wikipedia"])):
        offline.clear()
        with pytest.raises(ValueError, match="no corpus could be read"):
            default_second_moment(gpt2, LAYER, prepend_bos=bos, progress=False)
        assert offline == expected


@pytest.mark.parametrize("corpus", ["sampled", "wikipedia"])
def test_the_cache_comes_before_the_network(gpt2, folder, offline, corpus):
    kept = Maker(gpt2).cached(corpus=corpus)
    found = default_second_moment(gpt2, LAYER, prepend_bos=False, progress=False)
    assert torch.equal(found.sum_kk, kept.sum_kk) and offline == []
    for layer, bos in ((0, False), (LAYER, True)):  # neither another layer's nor another rule's
        with pytest.raises(ValueError, match="no second moment"):
            default_second_moment(gpt2, layer, prepend_bos=bos, progress=False)


def test_what_wikipedia_gives_is_kept(gpt2, folder, monkeypatch):
    make = Maker(gpt2)
    monkeypatch.setattr(default_statistics, "_from_wikipedia", lambda *args: make())
    for _ in range(2):
        found = default_second_moment(gpt2, LAYER, prepend_bos=False, progress=False)
    assert make.calls == 1 and found.layer == LAYER


def test_too_few_tokens_in_the_cache_are_not_used(gpt2, folder, offline, caplog):
    few = collect_second_moment(gpt2, TEXTS[:1], LAYER, progress=False)
    cached_second_moment(gpt2, LAYER, False, "sampled", lambda: few)
    with caplog.at_level("WARNING"), pytest.raises(ValueError, match="no second moment"):
        default_second_moment(gpt2, LAYER, prepend_bos=False, progress=False)
    assert "too few for d_mlp=128" in caplog.text


def test_a_disk_that_is_full_is_no_obstacle(gpt2, folder, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with caplog.at_level("WARNING"):
        found = Maker(gpt2).cached()
    assert found.n_tokens > 128 and "cannot save statistics" in caplog.text
    assert list(folder.iterdir()) == []


def test_the_authors_file_is_used_if_it_is_there_and_never_downloaded(
    gpt2, folder, offline, monkeypatch, caplog
):
    monkeypatch.undo()
    monkeypatch.setenv("TRANSFORMER_LENS_ROME_CACHE", str(folder))
    monkeypatch.setattr(default_statistics, "short_name", lambda model: "gpt2-xl")
    with pytest.raises(FileNotFoundError, match="without a checksum.*save it as"):
        default_statistics._published(gpt2, LAYER)
    path = folder / "gpt2-xl" / f"transformer.h.{LAYER}.mlp.c_proj_float32_mom2_100000.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, **{"mom2.mom2": np.eye(128, dtype=np.float32), "mom2.count": 500})
    found = default_second_moment(gpt2, LAYER, prepend_bos=False, progress=False)
    assert (found.n_tokens, found.layer, found.d_mlp) == (500, LAYER, 128)


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/passwd", "a/b\\c", "nul\0l", "n" * 5000, "..", "é"]
)
def test_no_name_leads_out_of_the_folder_or_is_too_long(gpt2, folder, monkeypatch, name):
    monkeypatch.setattr(default_statistics.adapter, "model_name", lambda model: name)
    make = Maker(gpt2)
    make.cached(corpus=name)
    make.cached(corpus=name)
    assert make.calls == 1
    (path,) = folder.parent.rglob("*.safetensors")
    assert path.parent == folder and len(path.name) < 255


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TRANSFORMER_LENS_ROME_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("TRANSFORMER_LENS_ROME_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "transformer_lens_rome"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "transformer_lens_rome"


# ---------------------------------------------------------------- text that ships


@pytest.fixture
def shipped(gpt2, tmp_path, monkeypatch):
    """A package folder with text of a tiny model; returns how to change what is in it."""
    path = tmp_path / "package" / "sampled" / "tiny-gpt2.json"
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(default_statistics.resources, "files", lambda name: tmp_path / "package")

    def write(**changed):
        norms = default_statistics.key_norms(gpt2).tolist()
        known = {"model": gpt2.cfg.model_name, "key_norms": norms, "texts": TEXTS * 9}
        path.write_text(json.dumps({**known, **changed}), encoding="utf-8")

    write()
    return write


def test_shipped_text_is_the_first_source(gpt2, shipped, folder, offline, monkeypatch):
    monkeypatch.setattr(default_statistics, "sampled_texts", lambda *_, **__: 1 / 0)
    found = default_second_moment(gpt2, LAYER, prepend_bos=False, progress=False)
    d_mlp = len(w_out(gpt2, LAYER))
    by_hand = collect_second_moment(gpt2, TEXTS * 9, LAYER, max_tokens=4 * d_mlp, progress=False)
    assert torch.equal(found.sum_kk, by_hand.sum_kk) and found.source == "sampled"
    assert not offline  # nothing else was asked
    again = default_second_moment(gpt2, LAYER, prepend_bos=False, progress=False)
    assert torch.equal(again.sum_kk, found.sum_kk) and len(list(folder.iterdir())) == 1


def test_shipped_text_of_another_model_is_not_used(
    gpt2, shipped, model_class, tokenizer, folder, offline, caplog
):
    other = make_model(model_class, "gpt2", tokenizer, seed=1)
    with pytest.raises(ValueError, match="no second moment"), caplog.at_level("WARNING"):
        default_second_moment(other, LAYER, prepend_bos=False, progress=False)
    assert "this model has other keys" in caplog.text
    assert default_statistics.bundled_texts(gpt2) == tuple(TEXTS * 9)


def test_an_edited_model_knows_its_own_text(gpt2, shipped, folder):
    with applied(gpt2, random_edit(gpt2, layer=0), random_edit(gpt2, layer=1)):
        assert default_statistics.bundled_texts(gpt2) == tuple(TEXTS * 9)
    gpt2.to(torch.bfloat16)
    assert default_statistics.bundled_texts(gpt2) == tuple(TEXTS * 9)


def test_more_tokens_than_ship_are_sampled(gpt2, shipped, folder, monkeypatch):
    asked = []

    def written(model, n, **_):
        asked.append(n)
        return TEXTS * 99

    monkeypatch.setattr(default_statistics, "sampled_texts", written)
    few = sampled_second_moment(gpt2, LAYER, max_tokens=200, progress=False)
    assert not asked and few.n_tokens == 200
    many = sampled_second_moment(gpt2, LAYER, max_tokens=1200, progress=False)
    assert asked == [10] and many.n_tokens == 1200
