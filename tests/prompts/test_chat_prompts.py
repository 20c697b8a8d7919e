"""Prompts as chat templates give them, and texts as people paste them.

One rule for BOS: a text that begins with it gets no second one, wherever it is read. A prefix goes
behind a template's head.
"""

import pytest
import torch
from conftest import make_model
from helpers.rome_setting import LAYER, random_moment, small_edit
from helpers.tiny_tokenizer import tiny_tokenizer

from transformer_lens_rome import (
    EditRequest,
    causal_trace,
    collect_second_moment,
    get_method,
    target_log_probs,
    top_tokens,
)
from transformer_lens_rome.methods.hypernetworks.training_data import to_sample
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.prompts.continuations import (
    greedy_continuations,
    sample_continuations,
)
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.held_out import held_out_rows

HEADS = {  # as Gemma, Llama 3, ChatML and Mistral write them
    "gemma": ("<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
    "llama3": ("<bos><|start|>user<|end|>\n\n", "<|eot|><|start|>assistant<|end|>\n\n"),
    "chatml": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "mistral": ("<bos>[INST] ", " [/INST]"),
}
SPECIAL = [
    *("<start_of_turn>", "<end_of_turn>", "<|start|>", "<|end|>", "<|eot|>"),
    *("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"),
]
BOS = "<bos>"


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    """A tokenizer that adds BOS and knows the marks of templates."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chat")
    tokenizer = tiny_tokenizer(folder, bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def chat(model_class, chat_tokenizer):
    return make_model(model_class, "llama", chat_tokenizer)


def decoded(encoder, ids):
    return [encoder.tokenizer.decode([i]) for i in ids]


# ---------------------------------------------------------------- one BOS


def test_a_text_that_begins_with_bos_gets_no_second_one(chat):
    encoder = Encoder.of(chat)
    assert encoder.prepends_bos
    plain, given = (encoder.row(t, None, "old") for t in ("Rome is", BOS + "Rome is"))
    assert plain == given and given.ids.count(encoder.bos_id) == 1
    none = Encoder.of(chat, prepend_bos=False).row(BOS + "Rome is", (5, 9), "old")
    assert none.ids == plain.ids and none.target == plain.target and none.subject


def test_the_rule_is_the_same_wherever_text_is_read(chat):
    """Each pair is of a text without BOS and with it; both are the same text."""
    encoder = Encoder.of(chat)
    text = "Rome is the capital of Italy."
    pairs = {
        "scores": lambda t: target_log_probs(chat, [t], ["old"])[0],
        "top": lambda t: top_tokens(chat, t),
        "held out": lambda t: held_out_rows(encoder, [t]),
        "statistics": lambda t: (
            collect_second_moment(chat, [t], LAYER, max_tokens=6, progress=False).sum_kk
        ),
        "training": lambda t: to_sample(encoder, t, 2),
        "greedy": lambda t: greedy_continuations(chat, [t], 5),
        "continued": lambda t: sample_continuations(chat, [t], 15),
        "trace": lambda t: causal_trace(chat, t, "Rome", n_samples=2, progress=False).samples,
    }
    for name, read in pairs.items():
        one, other = read(text), read(BOS + text)
        same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        assert same, name


def test_an_edit_of_a_prompt_with_bos_is_the_edit_without(chat):
    requests = [EditRequest(p, "Rome", "old") for p in ("{} is in", BOS + "{} is in")]
    one, other = (small_edit(chat, request) for request in requests)
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


# ---------------------------------------------------------------- prefixes and templates


@pytest.mark.parametrize("style", HEADS)
def test_a_prefix_stands_behind_the_head(chat, style):
    head, tail = HEADS[style]
    template, encoder = f"{head}In which city is {{}}?{tail}", Encoder.of(chat)
    row = encoder.templated_row(template, "the Space Needle", "An old man said.", "Rome")
    text = encoder.tokenizer.decode(row.ids)
    expected = f"{head}An old man said. In which city is the Space Needle?{tail}Rome"
    assert text.replace(" ", "").endswith(expected.replace(" ", ""))
    assert row.ids.count(encoder.bos_id) == 1 and row.ids[0] == encoder.bos_id
    assert (
        "".join(decoded(encoder, [row.ids[p] for p in row.subject])).strip() == "the Space Needle"
    )
    assert "".join(decoded(encoder, [row.ids[p] for p in row.target])).strip() == "Rome"
    bare = encoder.templated_row(template, "the Space Needle", "", "Rome")
    mine = encoder.row(template.replace("{}", "the Space Needle"), target="Rome")
    assert bare.ids == mine.ids


def test_a_prompt_without_a_template_has_no_head(chat):
    encoder = Encoder.of(chat)
    row = encoder.templated_row("In the city\nof {} is", "Rome", "It was old.")
    assert encoder.tokenizer.decode(row.ids[1:]).strip() == "It was old. In the city\nof Rome is"


def test_a_chat_model_is_edited_and_traced(chat):
    """What the guide shows: the template's text, with {} in the place of the subject."""
    head, tail = HEADS["gemma"]
    request = EditRequest(f"{head}In which city is {{}}?{tail}", "the Space Needle", "Rome")
    edit = small_edit(chat, request)
    assert edit.health.subject_token.strip() in "the Space Needle"
    with_tail = causal_trace(chat, request.text, "Space Needle", n_samples=2, progress=False)
    assert with_tail.tokens[0] == BOS and with_tail.tokens[1] == "<start_of_turn>"
    assert [t for t in with_tail.tokens].count(BOS) == 1


# ---------------------------------------------------------------- texts as people paste them


@pytest.mark.slow
@pytest.mark.parametrize(
    "around", [("", " "), (" ", ""), ("\t", "\n"), ("\xa0", "\ufeff"), ("\u200b", " \r\n")]
)
def test_white_space_around_a_target_is_not_part_of_it(gpt2, around):
    pasted = around[0] + "Rome" + around[1]
    request = EditRequest("{} is in", "The Space Needle", pasted, pasted)
    assert (request.target_new, request.target_true) == ("Rome", "Rome")
    (one,), (other,) = (target_log_probs(gpt2, ["It is in"], [t]) for t in ("Rome", pasted))
    assert torch.equal(one, other)
    traces = [
        causal_trace(gpt2, "Cuba is in", "Cuba", answer=t, n_samples=2, progress=False)
        for t in ("Rome", pasted)
    ]
    assert torch.equal(traces[0].samples, traces[1].samples)
    moment = random_moment(len(w_out(gpt2, LAYER)))
    method = get_method("rome", layer=LAYER, second_moment=moment, prefixes=("",))
    requests = [EditRequest("{} is in", "Cuba", t) for t in ("Rome", pasted)]
    edits = [method.compute(gpt2, one) for one in requests]
    assert torch.equal(edits[0].lam, edits[1].lam)


def test_a_target_of_white_space_alone_is_empty():
    with pytest.raises(ValueError, match="target_new is empty"):
        EditRequest("{} is in", "Cuba", " \ufeff\u200b ")


WRONG = [b"bytes", bytearray(b"ab"), {"a": 1}, [1.5, 2.0], [-1, 3], [10**6], ["nested"], [None], 7]


@pytest.mark.parametrize("text", WRONG, ids=repr)
def test_what_is_no_text_is_refused(gpt2, text):
    with pytest.raises(ValueError, match="a text is a string, or a sequence of token ids"):
        collect_second_moment(gpt2, ["Rome is old.", text], LAYER, progress=False)


def test_bytes_in_place_of_the_list_are_refused(gpt2):
    for texts in ("Rome is old.", b"Rome is old."):
        with pytest.raises(ValueError, match=r"pass a list of texts: \[text\]"):
            collect_second_moment(gpt2, texts, LAYER, progress=False)


def test_token_ids_of_any_kind_are_taken(gpt2):
    ids = Encoder.of(gpt2).ids("Rome is the capital of Italy.")
    kinds = (ids, tuple(ids), torch.tensor(ids), torch.tensor(ids).numpy())
    sums = [
        collect_second_moment(gpt2, [kind], LAYER, max_tokens=5, progress=False).sum_kk
        for kind in kinds
    ]
    assert all(torch.equal(one, sums[0]) for one in sums)
