"""The whole way on a real pretrained model, in each model class."""

from __future__ import annotations

import pytest
import torch

from transformer_lens_rome import (
    EditRequest,
    RankOneEdit,
    applied,
    compute_rome_edit,
    target_log_probs,
    top_tokens,
)
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.model.default_layer import default_layer
from transformer_lens_rome.prompts.encoder import Encoder

pytestmark = pytest.mark.real_model

REQUEST = EditRequest("{} is located in the city of", "The Space Needle", "Paris", "Seattle")
PARAPHRASE = "To visit the Space Needle, you have to travel to the city of"
NEIGHBOUR = "The Brandenburg Gate is located in the city of"


@pytest.fixture(scope="module")
def edit(gemma, gemma_moment):
    """An edit with default settings and statistics from text that the model wrote itself."""
    layer = default_layer(gemma)
    prefixes = ["", "The first thing.", "He said.", "A few days ago, I was reading about."]
    before = w_out(gemma, layer).clone()
    known = {"second_moment": gemma_moment, "prefixes": prefixes}
    found = compute_rome_edit(gemma, REQUEST, progress=False, **known)
    assert torch.equal(w_out(gemma, layer), before)
    return found


def p(model, prompt: str, target: str) -> float:
    (scores,) = target_log_probs(model, [prompt], [target])
    return scores.sum().exp().item()


def test_the_fact_changes_and_generalises(gemma, edit):
    assert top_tokens(gemma, REQUEST.text, 1)[0][0] == " Seattle"
    paraphrase, neighbour = p(gemma, PARAPHRASE, "Paris"), p(gemma, NEIGHBOUR, "Berlin")
    with applied(gemma, edit):
        assert top_tokens(gemma, REQUEST.text, 1)[0][0] == " Paris"
        assert p(gemma, PARAPHRASE, "Paris") > 3 * paraphrase
        assert top_tokens(gemma, NEIGHBOUR, 1)[0][0] == " Berlin"
        assert p(gemma, NEIGHBOUR, "Berlin") > 0.5 * neighbour
    assert top_tokens(gemma, REQUEST.text, 1)[0][0] == " Seattle"


def test_words_are_not_letters(gemma):
    """The tokenizer joins its pieces, in every version of transformers, and knows every text."""
    encoder = Encoder.of(gemma)
    words = ["▁Space", "▁Needle"]
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.ids(" Space Needle")) == words
    assert encoder.ids("hi there") == [2202, 993] and encoder.prepends_bos
    text = "Zoë naïve 東京 🗼 don’t\n\tend"
    assert encoder.tokenizer.decode(encoder.ids(text)) == text


def test_the_subject_token_is_the_last_one(edit):
    assert edit.health.subject_token.strip() == "Needle"


def test_saved_and_loaded_it_does_the_same(gemma, edit, tmp_path):
    edit.save(tmp_path / "edit.safetensors")
    assert (tmp_path / "edit.safetensors").stat().st_size < 40_000
    again = RankOneEdit.load(tmp_path / "edit.safetensors")
    before = w_out(gemma, edit.layer).clone()
    with applied(gemma, edit):
        once = w_out(gemma, edit.layer).clone()
    with applied(gemma, again):
        assert torch.equal(w_out(gemma, edit.layer), once)
    assert torch.equal(w_out(gemma, edit.layer), before)
