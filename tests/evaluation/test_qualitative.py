"""Generated text before and after edits, side by side."""

from __future__ import annotations

import pytest
import torch
from helpers.rome_setting import LAYER, random_edit

from transformer_lens_rome import applied
from transformer_lens_rome.evaluation import compare_generations
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.prompts.continuations import sample_continuations

PROMPTS = ("The best of", "In the city of Rome is")


def test_each_model_writes_what_it_would_alone(gpt2):
    base, edit = w_out(gpt2, LAYER).detach().clone(), random_edit(gpt2, strength=0.5)
    found = compare_generations(gpt2, PROMPTS, {"random": edit, "none": edit.scale(0.0)}, length=16)
    assert torch.equal(w_out(gpt2, LAYER), base)
    with applied(gpt2, edit):
        edited = sample_continuations(gpt2, PROMPTS, 16)
    assert [p + t for p, t in zip(PROMPTS, found.texts["random"], strict=True)] == edited
    assert found.texts["none"] == found.texts["unedited"] != found.texts["random"]
    rows = found.rows()
    assert [row[:2] for row in rows[:4]] == [
        ("The best of", "unedited"),
        ("", "random"),
        ("", "none"),
        ("In the city of Rome is", "unedited"),
    ]
    assert rows[1][2] == " ".join(found.texts["random"][0].split())
    assert found.table().count("\n") == 7 and "goes on" in found._repr_html_()


def test_what_would_mislead_is_refused(gpt2):
    edit = random_edit(gpt2)
    with pytest.raises(ValueError, match="tokens or more already"):
        compare_generations(gpt2, PROMPTS, {"random": edit}, length=4)
    with pytest.raises(ValueError, match="model without edits"):
        compare_generations(gpt2, PROMPTS, {"unedited": edit})
    with applied(gpt2, edit), pytest.raises(ValueError, match="revert_all"):
        compare_generations(gpt2, PROMPTS, {})
