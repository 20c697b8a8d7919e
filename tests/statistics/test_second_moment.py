"""C is the plain mean of key outer products, however texts are batched, ordered, cut or merged."""

import math

import numpy as np
import pytest
import torch
from conftest import CLASSES, make_model

from transformer_lens_rome.statistics.collect import collect_second_moment
from transformer_lens_rome.statistics.second_moment import SecondMoment

LAYER = 1
TEXTS = [
    "The Eiffel Tower is located in the city of Paris, and the Space Needle is in Seattle.",
    "Rome",
    "LeBron James plays the sport of basketball; he is a professional athlete.",
    "東京 é",
    "a",
    "The mother tongue of Danielle Darrieux is French, and that of Angela Merkel is German.",
]


def collect(model, texts=TEXTS, layer=LAYER, **options):
    return collect_second_moment(model, texts, layer, progress=False, **options)


def rows_of(tokenizer, texts, bos):
    start = [tokenizer.bos_token_id] * bos
    return [start + tokenizer(text, add_special_tokens=False).input_ids for text in texts]


@torch.no_grad()
def keys_of(model, rows, layer=LAYER):
    """Keys by one plain forward pass for each row; nothing is padded."""
    seen = []
    name = f"blocks.{layer}.mlp.hook_post"
    with model.hooks(fwd_hooks=[(name, lambda t, hook: seen.append(t[0].clone()))]):
        for row in rows:
            model(torch.tensor([row]))
    return torch.cat(seen).double()


def outer_mean(keys):
    return sum(torch.outer(k, k) for k in keys) / len(keys)


def same(a, b, tolerance=1e-5):
    assert a.n_tokens == b.n_tokens
    torch.testing.assert_close(a.C, b.C, rtol=tolerance, atol=tolerance)


def random_moment(d=12, n=60, seed=0, **known):
    keys = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    keys[:, 0] += 2  # uncentred, and no two directions alike
    keys[:, 1] *= 5
    found = SecondMoment.empty(d, **known)
    found.update(keys)
    return found, keys


# ---------------------------------------------------------------- collection


@pytest.mark.parametrize("shape", ["gpt2", "neox", "mistral", "gemma3", "opt"])
@pytest.mark.parametrize("bos", [False, True])
def test_c_is_the_mean_outer_product_of_keys(model_class, shape, bos, tokenizer, bos_tokenizer):
    used = bos_tokenizer if bos else tokenizer
    model = make_model(model_class, shape, used)
    rows = rows_of(used, TEXTS, bos)
    expected = outer_mean(keys_of(model, rows))
    found = collect(model)
    assert found.n_tokens == sum(map(len, rows)) and found.prepend_bos == bos
    torch.testing.assert_close(found.C, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found.C, found.C.T)
    values = torch.linalg.eigvalsh(found.C)
    assert values[0] > -1e-7 * values[-1]  # each batch is multiplied in float32
    other = collect(model, prepend_bos=not bos)  # the control: BOS counts, and is in the context
    assert other.n_tokens - found.n_tokens == (1 - 2 * bos) * len(TEXTS)
    assert not torch.allclose(other.C, expected, atol=1e-2)


def test_batches_and_order_change_nothing(gpt2):
    expected = collect(gpt2, batch_size=1)
    for size in (2, 5, 50):
        same(collect(gpt2, batch_size=size), expected)
    same(collect(gpt2, TEXTS[::-1], batch_size=3), expected)
    same(collect(gpt2, iter(TEXTS), batch_size=3), expected)
    ids = rows_of(gpt2.tokenizer, TEXTS, False)
    same(collect(gpt2, ids), expected)


@pytest.mark.parametrize("budget", [1, 7, 40, 45])
def test_exactly_as_many_tokens_as_asked_for(gpt2, tokenizer, budget):
    rows, left = [], budget
    for row in rows_of(tokenizer, TEXTS, False):
        rows.append(row[:left])
        left -= len(rows[-1])
        if not left:
            break
    for size in (1, 4):
        found = collect(gpt2, max_tokens=budget, batch_size=size)
        assert found.n_tokens == budget
        torch.testing.assert_close(found.C, outer_mean(keys_of(gpt2, rows)), rtol=1e-4, atol=1e-5)


def test_texts_are_read_no_further_than_needed(gpt2):
    def endless():
        for n in range(1000):
            assert n < 10
            yield TEXTS[0]

    assert collect(gpt2, endless(), max_tokens=50, batch_size=2).n_tokens == 50


@pytest.mark.parametrize("bos", [False, True])
def test_long_texts_are_cut_and_every_piece_starts_alike(bos, model_class, bos_tokenizer):
    model = make_model(model_class, "gpt2", bos_tokenizer)
    (long,) = rows_of(bos_tokenizer, TEXTS[:1], False)
    start, step = [bos_tokenizer.bos_token_id] * bos, 10 - bos
    pieces = [start + long[i : i + step] for i in range(0, len(long), step)]
    found = collect(model, TEXTS[:1], max_length=10, prepend_bos=bos)
    assert found.n_tokens == sum(map(len, pieces))
    expected = outer_mean(keys_of(model, pieces))
    torch.testing.assert_close(found.C, expected, rtol=1e-4, atol=1e-5)


def test_several_layers_in_one_pass(gpt2):
    together = collect(gpt2, layer=[2, 0])
    assert list(together) == [2, 0]
    for layer, found in together.items():
        assert found.layer == layer
        same(found, collect(gpt2, layer=layer))
    assert not torch.allclose(together[0].C, together[2].C, atol=1e-2)


def test_merged_is_collected_together(gpt2):
    a, b = collect(gpt2, TEXTS[:2], source="a"), collect(gpt2, TEXTS[2:], source="b")
    same(a.merge(b), collect(gpt2))
    same(b.merge(a), collect(gpt2))
    assert a.merge(b).source == "a + b" and a.merge(a).source == "a"
    for other in (collect(gpt2, layer=0), collect(gpt2, prepend_bos=True), random_moment()[0]):
        with pytest.raises(ValueError, match="cannot merge statistics of different"):
            a.merge(other)


def test_halves_that_cannot_be_compared_do_not_lose_the_whole(gpt2, caplog):
    """The same few texts over and over are many tokens, but few keys."""
    found = collect(gpt2, TEXTS * 40)
    assert found.half_agreement is None and "is not measured" in caplog.text
    assert found.n_tokens == 40 * collect(gpt2).n_tokens


def test_rows_without_room_for_text_are_refused(model_class, bos_tokenizer):
    model = make_model(model_class, "gpt2", bos_tokenizer)
    with pytest.raises(ValueError, match="max_length=1 leaves no room"):
        collect(model, max_length=1)


def test_no_text_is_an_error(gpt2):
    for texts in ([], [""]):
        with pytest.raises(ValueError, match="some text"):
            collect(gpt2, texts)


def test_the_model_is_left_alone_and_checked_first(gpt2):
    with pytest.raises(ValueError, match="out of range"):
        collect(gpt2, layer=[0, 3])
    tokens = torch.tensor(rows_of(gpt2.tokenizer, TEXTS[:1], False))
    before = gpt2(tokens)
    collect(gpt2)
    assert torch.equal(gpt2(tokens), before)


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_narrow_keys_are_summed_wide(dtype):
    keys = torch.full(
        (4096, 2), 1.0078125, dtype=torch.bfloat16
    )  # exact in bfloat16; its square not
    found = SecondMoment.empty(2, dtype)
    for part in keys.split(512):
        found.update(part)
    assert found.sum_kk.dtype == dtype and found.n_tokens == 4096
    assert found.C == pytest.approx(np.full((2, 2), 1.0078125**2), rel=1e-6)


def test_bad_keys_are_refused_and_not_added():
    found, _ = random_moment()
    before = found.sum_kk.clone()
    for bad in (torch.zeros(3, 11), torch.zeros(12), torch.full((2, 12), torch.nan)):
        with pytest.raises(ValueError, match="keys must be|NaN"):
            found.update(bad)
    assert torch.equal(found.sum_kk, before) and found.n_tokens == 60


# ---------------------------------------------------------------- solve


def test_solve_inverts_c():
    found, keys = random_moment()
    k = keys[3]
    torch.testing.assert_close(outer_mean(keys) @ found.solve(k), k)
    assert not torch.allclose(found.solve(k), k / found.C.diagonal(), rtol=0.1)
    torch.testing.assert_close(found.solve(k.float()), found.solve(k), rtol=1e-5, atol=1e-5)
    extra = torch.randn(5, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found.update(extra)  # a factor kept from before would be stale
    torch.testing.assert_close(outer_mean(torch.cat([keys, extra])) @ found.solve(k), k)


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_ridge_is_relative_to_the_mean_diagonal(ridge):
    found, keys = random_moment()
    C, k = outer_mean(keys), keys[0]
    matrix = C + ridge * C.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    plain = found.solve(k)
    torch.testing.assert_close(matrix @ found.solve(k, ridge=ridge), k)
    assert torch.equal(found.solve(k), plain)
    torch.testing.assert_close(found.C, C)  # and C itself is as before


def test_scaling_c_scales_the_solution_and_identity_returns_the_key():
    found, keys = random_moment()
    scaled = SecondMoment.from_moment(found.C * 7, 60)
    torch.testing.assert_close(7 * scaled.solve(keys[0]), found.solve(keys[0]))
    assert torch.equal(SecondMoment.identity(12).solve(keys[0]), keys[0])
    assert "no statistics" in SecondMoment.identity(12).source


def test_a_singular_c_is_refused_with_the_remedy():
    few, keys = random_moment(n=11)
    flat, _ = random_moment()
    flat.sum_kk[:, 4] = flat.sum_kk[4] = 0
    few_tokens, dead_neuron = r"singular for d_mlp=12; collect at least 12 .*ridge=", "never fire"
    for singular, complaint in ((few, few_tokens), (flat, dead_neuron)):
        with pytest.raises(ValueError, match=complaint):
            singular.solve(keys[0])
        assert torch.isfinite(singular.solve(keys[0], ridge=1e-2)).all()
    with pytest.raises(ValueError, match="NaN or infinity"):
        few.solve(torch.full((12,), torch.nan))


# ---------------------------------------------------------------- reports


def test_report_tells_conditioning_and_origin():
    found = SecondMoment.from_moment(torch.diag(torch.tensor([4.0, 2.0, 0.5])), 30, layer=5)
    report = found.report()
    assert report["condition_number"] == pytest.approx(8)
    assert report["tokens_per_dimension"] == 10 and report["layer"] == 5
    bad = SecondMoment.from_moment(torch.diag(torch.tensor([1.0, -0.1])), 3).report()
    assert bad["condition_number"] == math.inf


@pytest.mark.parametrize("name", CLASSES)
def test_halves_agree_better_with_more_text(name, tokenizer):
    model, generator = make_model(name, "gpt2", tokenizer), torch.Generator().manual_seed(0)
    texts = torch.randint(3, 440, (150, 64), generator=generator).tolist()
    budgets = (128, 600, 2500, 9600)
    agreement = [collect(model, texts, max_tokens=n).half_agreement for n in budgets]
    assert agreement[0] is None  # 64 keys in a half cannot fill 128 dimensions
    assert 0 < agreement[1] < agreement[2] < agreement[3] < 1
