"""BOS, subject positions and target log-probabilities: what an edit aims at, and what it scores."""

from pathlib import Path

import pytest
import torch
from conftest import CLASSES, make_model
from helpers.tiny_models import SHAPES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from transformer_lens_rome.model import passes
from transformer_lens_rome.prompts.encoder import Encoder, checkpoint_tokenizer, join, pad
from transformer_lens_rome.prompts.scores import score_rows, target_log_probs, top_tokens

PROMPTS = [
    "The Eiffel Tower is located in the city of",
    "Paris is",
    "The mother tongue of Danielle Darrieux is",
    "LeBron James plays the sport of",
    "It was",
]
TARGETS = ["Paris", "in France", " English", "basketball", "the best of times"]
SUBJECTS = [
    "Danielle Darrieux",
    "Zoë Åkerblöm",
    "東京タワー",
    "L'Oréal",
    "🗼 Tower",
    "a",
    "Rome",
    "é",
]
subjects = st.one_of(
    st.sampled_from(SUBJECTS),
    st.text(
        st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp", "Zs")),
        min_size=1,
        max_size=9,
    ),
)
# a word on either side that may hold the subject itself
sides = st.sampled_from(["", "The ", "Rome, Rome and ", "l'", "("])
ends = st.sampled_from(["", " is", "'s mother tongue is", ", said Rome's Danielle Darrieux,"])
prefixes = st.sampled_from(["", "He said.", "Rome is Rome. Danielle Darrieux.", "東京 é 🗼 "])
few = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Shell:
    """As much of a model as the encoder asks for."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


@pytest.fixture(scope="module", params=[False, True], ids=["nobos", "bos"])
def encoder(request, tokenizer, bos_tokenizer):
    return Encoder.of(Shell(bos_tokenizer if request.param else tokenizer))


# ---------------------------------------------------------------- BOS


@pytest.mark.parametrize("adds", [False, True])
def test_rows_start_with_bos_exactly_when_the_checkpoint_says_so(
    model_class, adds, tokenizer, bos_tokenizer
):
    given_tokenizer = bos_tokenizer if adds else tokenizer
    model, bos = make_model(model_class, "gpt2", given_tokenizer), given_tokenizer.bos_token_id
    found = Encoder.of(model)
    assert found.prepends_bos == adds
    plain = given_tokenizer("Rome is", add_special_tokens=False).input_ids
    assert list(found.row("Rome is").ids) == [bos] * adds + plain
    assert list(found.row("Rome is").ids) == given_tokenizer("Rome is").input_ids
    assert found.ids("Rome is") == plain
    assert found.start_id == bos
    for override in (True, False):
        forced = Encoder.of(model, prepend_bos=override)
        assert forced.prepends_bos == override
        assert list(forced.row("Rome is").ids) == [bos] * override + plain


def test_bos_switched_on_after_loading_does_not_count(tokenizer, bos_tokenizer):
    """TransformerLens 3 and 4 reload a GPT-2 tokenizer so that encoding adds a BOS."""
    for original, adds in ((tokenizer, False), (bos_tokenizer, True)):
        again = AutoTokenizer.from_pretrained(original.name_or_path, add_bos_token=True)
        assert Encoder.of(Shell(again)).prepends_bos == adds


@pytest.mark.parametrize("adds", [False, True])
def test_a_rule_that_cannot_be_read_any_more_is_asked_for(
    adds, tokenizer, bos_tokenizer, tmp_path, monkeypatch
):
    """A relative path leads nowhere from another folder, and BOS may be TransformerLens's doing."""
    files = Path((bos_tokenizer if adds else tokenizer).name_or_path)
    monkeypatch.chdir(files.parent)
    lost = AutoTokenizer.from_pretrained(files.name, add_bos_token=True)
    remembered = AutoTokenizer.from_pretrained(lost.name_or_path, add_bos_token=True)
    assert Encoder.of(Shell(remembered)).prepends_bos == adds
    monkeypatch.chdir(tmp_path)
    assert Encoder.of(Shell(remembered)).prepends_bos == adds  # it was read while it could be
    if lost("a").input_ids[0] == lost.bos_token_id:
        with pytest.raises(ValueError, match="absolute path, or pass prepend_bos="):
            Encoder.of(Shell(lost))
    else:  # transformers 4 has no such switch for this class, so there is nothing to doubt
        assert not adds and not Encoder.of(Shell(lost)).prepends_bos
    assert Encoder.of(Shell(lost), prepend_bos=True).prepends_bos
    assert not Encoder.of(Shell(lost), prepend_bos=False).prepends_bos


def test_without_files_a_tokenizer_that_adds_no_bos_has_none(tokenizer):
    lost = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    lost.name_or_path = "nowhere"
    assert not Encoder.of(Shell(lost)).prepends_bos


def test_an_empty_target_is_refused(gpt2):
    with pytest.raises(ValueError, match="the target after 'Rome is' is empty"):
        target_log_probs(gpt2, ["Rome is"], [" "])


def test_bos_shifts_positions_by_one(model_class, bos_tokenizer):
    model = make_model(model_class, "gpt2", bos_tokenizer)
    bare, with_bos = (
        Encoder.of(model, prepend_bos=b).row("Rome is", (0, 4), "old") for b in (0, 1)
    )
    assert with_bos.subject == tuple(p + 1 for p in bare.subject)
    assert with_bos.target == tuple(p + 1 for p in bare.target)


def test_unusable_tokenizers_are_refused(tokenizer):
    class Slow:
        is_fast = False

    for bad in (Slow(), None):
        with pytest.raises(ValueError, match="character offsets"):
            Encoder.of(Shell(bad))
    no_bos = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert Encoder.of(Shell(no_bos)).bos_id is None
    with pytest.raises(ValueError, match="no BOS token"):
        Encoder.of(Shell(no_bos), prepend_bos=True)
    assert checkpoint_tokenizer(no_bos) is no_bos  # no files to reload


# ---------------------------------------------------------------- subject


def check_subject(encoder, row, text, start, end):
    """The tokens chosen are those, and only those, that share a character with the subject."""
    shift = int(encoder.prepends_bos)
    data = text.encode()
    first, last = len(text[:start].encode()), len(text[:end].encode())
    pieces = encoder.tokenizer.convert_ids_to_tokens(row.ids[shift:])  # one character for each byte
    edges = [0]
    for piece in pieces:
        edges.append(edges[-1] + len(piece))
    assert edges[-1] == len(data)
    overlap = {p + shift for p in range(len(pieces)) if edges[p] < last and edges[p + 1] > first}
    assert overlap <= set(row.subject)
    # beyond these only other pieces of a character that is half inside a chosen token
    assert row.subject == tuple(range(row.subject[0], row.subject[-1] + 1))
    for p in set(row.subject) - overlap:
        spilt = data[edges[p - shift] : edges[p - shift + 1]]
        assert spilt.strip() == b"" or any(byte >= 0x80 for byte in spilt)
    assert text[start:end] in encoder.tokenizer.decode([row.ids[p] for p in row.subject])


@few
@given(subject=subjects, before=sides, after=ends, prefix=prefixes)
def test_subject_tokens_cover_the_subject_and_no_more(encoder, subject, before, after, prefix):
    template = before + "{}" + after
    row = encoder.templated_row(template, subject, prefix)
    start = len(join(prefix, template).split("{}")[0])
    text = join(prefix, template).replace("{}", subject)
    check_subject(encoder, row, text, start, start + len(subject))
    last, shift = row.subject[-1], int(encoder.prepends_bos)
    rest = encoder.tokenizer.decode(row.ids[last + 1 :])
    assert len(rest) <= len(text) - start - len(subject)  # nothing of the subject is left for later
    head = encoder.tokenizer.decode(row.ids[shift:last])
    assert len(head) < start + len(subject) or not text.startswith(head)


def test_the_braces_choose_among_equal_names(encoder):
    name = "Danielle Darrieux"
    template = f"{name} met {{}} and {name}"
    row = encoder.templated_row(template, name, prefix=f"{name}.")
    decoded = encoder.tokenizer.decode(row.ids[int(encoder.prepends_bos) : row.subject[0]])
    assert decoded.count(name) == 2
    assert encoder.tokenizer.decode(row.ids[row.subject[-1] + 1 :]).count(name) == 1


def test_a_prefix_shifts_the_subject_by_its_own_tokens(encoder):
    bare = encoder.templated_row(" {} is", "Rome")
    prefix = "He said that the city was old."
    moved = encoder.templated_row("{} is", "Rome", prefix)
    by = len(encoder.ids(prefix))
    assert moved.subject == tuple(p + by for p in bare.subject)
    assert [moved.ids[p] for p in moved.subject] == [bare.ids[p] for p in bare.subject]


def test_the_subject_may_be_first_or_everything(encoder):
    shift = int(encoder.prepends_bos)
    assert encoder.templated_row("{} is", "Rome").subject[0] == shift
    whole = encoder.templated_row("{}", "Danielle Darrieux")
    assert whole.subject == tuple(range(shift, len(whole.ids)))
    spaced = encoder.templated_row("The{}is", " Rome ")
    assert encoder.tokenizer.decode([spaced.ids[p] for p in spaced.subject]).strip() == "Rome"


def test_a_subject_without_tokens_is_an_error(encoder):
    with pytest.raises(ValueError, match="no token covers the subject"):
        encoder.row("Rome is old", (4, 4))


def test_join_puts_one_space_between():
    assert join("", "Rome") == "Rome"
    assert join("Yes.", "Rome") == "Yes. Rome"
    assert join("Yes. ", "Rome") == "Yes. Rome" and join("Yes.\n", "Rome") == "Yes.\nRome"


# ---------------------------------------------------------------- target


@pytest.mark.parametrize("target", ["French", " French", "éclair 東京", "the 🗼"])
def test_target_tokens_spell_the_target(encoder, target):
    for prompt in PROMPTS:
        row = encoder.row(prompt, target=target)
        assert encoder.tokenizer.decode([row.ids[p] for p in row.target]) == " " + target.lstrip()
        assert row.target[-1] == len(row.ids) - 1
        assert row.ids[: row.target[0]] == encoder.row(prompt).ids
        assert row.target[0] > 0


def test_a_target_needs_something_before_it(encoder):
    if encoder.prepends_bos:
        assert encoder.row("", target="Rome").target[0] == 1
    else:
        with pytest.raises(ValueError, match="no token before the target"):
            encoder.row("", target="Rome")


@pytest.mark.parametrize(("name", "shape"), [(c, s) for c in CLASSES for s in SHAPES])
def test_scores_do_not_depend_on_the_batch(name, shape, tokenizer):
    model = make_model(name, shape, tokenizer)
    encoder = Encoder.of(model)
    rows = [encoder.row(p, target=t) for p, t in zip(PROMPTS, TARGETS, strict=True)]
    assert len({len(row.ids) for row in rows}) > 2
    alone = [score_rows(model, [row])[0] for row in rows]
    for batch_size, order in ((16, [0, 1, 2, 3, 4]), (2, [3, 0, 4, 2, 1]), (3, [4, 3, 2, 1, 0])):
        found = score_rows(model, [rows[i] for i in order], batch_size=batch_size)
        for i, score in zip(order, found, strict=True):
            torch.testing.assert_close(score.log_probs, alone[i].log_probs, rtol=0, atol=5e-5)
            assert torch.equal(score.correct, alone[i].correct)
    for row, score in zip(rows, alone, strict=True):  # by hand, from the full forward
        with torch.no_grad():
            full = model(torch.tensor([row.ids]))[0].log_softmax(-1)
        by_hand = torch.stack([full[p - 1, row.ids[p]] for p in row.target])
        torch.testing.assert_close(score.log_probs, by_hand, rtol=0, atol=5e-5)
        best = torch.tensor([full[p - 1].argmax() == row.ids[p] for p in row.target])
        assert torch.equal(score.correct, best)


def test_target_log_probs_are_those_of_the_rows(gpt2):
    encoder = Encoder.of(gpt2)
    rows = [encoder.row(p, target=t) for p, t in zip(PROMPTS, TARGETS, strict=True)]
    expected = [score.log_probs for score in score_rows(gpt2, rows)]
    for found in (
        target_log_probs(gpt2, PROMPTS, TARGETS, batch_size=2),
        target_log_probs(gpt2, PROMPTS, TARGETS, encoder=encoder),
        target_log_probs(gpt2, PROMPTS, TARGETS, prepend_bos=False),
    ):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=5e-5)
    other = target_log_probs(gpt2, PROMPTS, TARGETS, prepend_bos=True)
    assert not torch.allclose(other[0], expected[0], atol=1e-2)
    with pytest.raises(ValueError):
        target_log_probs(gpt2, PROMPTS, TARGETS[:-1])


def test_top_tokens_are_the_most_probable(gpt2):
    row = Encoder.of(gpt2).row("Rome is")
    with torch.no_grad():
        p = gpt2(pad([row]))[0, -1].softmax(-1)
    found = top_tokens(gpt2, "Rome is", k=7)
    best = p.sort(descending=True)
    torch.testing.assert_close(torch.tensor([q for _, q in found]), best.values[:7])
    assert [t for t, _ in found] == [gpt2.tokenizer.decode([i]) for i in best.indices[:7]]


def test_a_score_follows_the_token_named_best(gpt2):
    encoder = Encoder.of(gpt2)
    row = encoder.row("Rome is", target="old")
    best, p = top_tokens(gpt2, "Rome is", k=1)[0]
    index = encoder.tokenizer.encode(best, add_special_tokens=False)
    row = type(row)(
        (*encoder.row("Rome is").ids, *index[:1]), (), (len(encoder.row("Rome is").ids),)
    )
    score = score_rows(gpt2, [row])[0]
    if len(index) == 1:
        assert score.correct.all()
        torch.testing.assert_close(score.log_probs.exp(), torch.tensor([p]), rtol=1e-4, atol=1e-5)


def test_texts_that_begin_alike_run_once(gpt2, monkeypatch):
    encoder, seen = Encoder.of(gpt2), []
    pairs = [(p, t) for p in ("Rome is", "The old man") for t in ("Paris", "Rome", "the best of")]
    pairs.append(("The", "old man"))  # a beginning of the other prompt
    rows = [encoder.row(p, target=t) for p, t in pairs]
    alone = [score_rows(gpt2, [row])[0] for row in rows]
    plain = passes.logits_at

    def counted(model, tokens, where, at):
        seen.append((len(tokens), len(where)))
        return plain(model, tokens, where, at)

    monkeypatch.setattr(passes, "logits_at", counted)
    for one, other in zip(score_rows(gpt2, rows), alone, strict=True):
        torch.testing.assert_close(one.log_probs, other.log_probs, rtol=0, atol=5e-5)
        assert torch.equal(one.correct, other.correct)
    places = {(row.ids[:p]) for row in rows for p in row.target}
    assert seen == [(2, len(places))] and len(places) < sum(len(row.target) for row in rows)
