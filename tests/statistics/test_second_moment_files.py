"""Statistics on disk, and statistics that belong to another model, layer or BOS rule."""

import numpy as np
import pytest
import torch
from conftest import CLASSES, make_model

from transformer_lens_rome.files.tensors import write_tensors
from transformer_lens_rome.model import adapter
from transformer_lens_rome.statistics.collect import collect_second_moment
from transformer_lens_rome.statistics.second_moment import SecondMoment

LAYER = 1
TEXTS = ["The Eiffel Tower is located in the city of Paris.", "Rome is the capital of Italy."]


def collect(model, **options):
    return collect_second_moment(model, TEXTS, LAYER, progress=False, **options)


def test_what_is_saved_is_what_is_loaded(gpt2, tmp_path):
    found = collect(gpt2, source="two texts")
    found.half_agreement = 0.75
    path = tmp_path / "deep" / "moment.safetensors"
    found.save(path)
    again = SecondMoment.load(path)
    assert torch.equal(again.sum_kk, found.sum_kk) and torch.equal(again.probe, found.probe)
    assert again.sum_kk.dtype == torch.float64
    assert again.report() == found.report() and again.summary() == found.summary()
    again.check_fits(gpt2, LAYER, False)
    bare = SecondMoment.from_moment(torch.eye(4), 9)
    bare.save(path)  # over the old one
    assert SecondMoment.load(path).probe is None and SecondMoment.load(path).layer is None
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "moment.safetensors"
    SecondMoment.identity(8).save(path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"not a tensor" * 20):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            SecondMoment.load(path)
    torch.save({"sum_kk": torch.eye(3)}, path)  # a pickle is never read
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        SecondMoment.load(path)
    write_tensors(path, {"sum_kk": torch.eye(3)}, {"format": "transformer_lens_rome.edit.1"})
    with pytest.raises(ValueError, match=r"is a transformer_lens_rome\.edit"):
        SecondMoment.load(path)
    write_tensors(path, {"sum_kk": torch.eye(3)}, {})
    with pytest.raises(ValueError, match="another program"):
        SecondMoment.load(path)
    with pytest.raises(FileNotFoundError):
        SecondMoment.load(tmp_path / "none")


def test_the_authors_files_hold_a_sum(tmp_path):
    keys = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    path = tmp_path / "transformer.h.17.mlp.c_proj_float32_mom2_100000.npz"
    np.savez(path, **{"mom2.mom2": keys.T @ keys, "mom2.count": 50, "mom2.constructor": "x"})
    found = SecondMoment.from_npz(path)
    assert (found.layer, found.prepend_bos, found.n_tokens) == (17, False, 50)
    expected = torch.from_numpy((keys.T @ keys) / 50)
    torch.testing.assert_close(found.C, expected)
    again = SecondMoment.from_moment(expected, 50)
    torch.testing.assert_close(again.sum_kk, found.sum_kk.double(), rtol=1e-5, atol=1e-5)
    k = torch.from_numpy(keys[0]).double()
    torch.testing.assert_close(expected.double() @ found.solve(k), k, rtol=1e-5, atol=1e-5)
    assert SecondMoment.from_npz(path, layer=3, prepend_bos=True).layer == 3
    other = tmp_path / "mine.npz"
    np.savez(other, **{"mom2.mom2": keys.T @ keys})
    with pytest.raises(ValueError, match="mom2.count"):
        SecondMoment.from_npz(other)
    with pytest.raises(ValueError, match="square"):
        SecondMoment.from_moment(torch.zeros(3, 4), 5)


@pytest.mark.parametrize("shape", ["gpt2", "neox", "llama", "gemma3"])
def test_statistics_fit_their_own_model_in_any_dress(model_class, shape, tokenizer):
    found = collect(make_model(model_class, shape, tokenizer))
    for name in CLASSES:
        for processed in (False, True):
            same = make_model(name, shape, tokenizer, processed=processed)
            found.check_fits(same, LAYER, False)
            with torch.no_grad():  # an edit of the layer itself leaves its keys alone
                adapter.w_out(same, LAYER).add_(1.0)
            found.check_fits(same, LAYER, False)


def test_statistics_of_something_else_are_refused(gpt2, model_class, tokenizer):
    found = collect(gpt2)
    cases = [
        (gpt2, 0, False, "have layer 1, the edit needs 0"),
        (gpt2, LAYER, True, "have prepend_bos False, the edit needs True"),
        (make_model(model_class, "neox", tokenizer), LAYER, False, "have d_mlp 128"),
        (make_model(model_class, "gpt2", tokenizer, seed=1), LAYER, False, "not from this model"),
    ]
    for model, layer, bos, message in cases:
        with pytest.raises(ValueError, match=f"{message}.*(\n|.)*collect_second_moment"):
            found.check_fits(model, layer, bos)
    with torch.no_grad():
        adapter.w_out(gpt2, 0).mul_(-1)  # a change below moves the keys
    with pytest.raises(ValueError, match="not from this model"):
        found.check_fits(gpt2, LAYER, False)
    SecondMoment.identity(128).check_fits(gpt2, LAYER, True)  # nothing known, nothing refused
