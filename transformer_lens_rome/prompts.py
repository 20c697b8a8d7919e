"""Tokens, subject positions, and log-probabilities: BOS and padding are decided here only.

BOS: a prompt starts with the BOS token exactly when the checkpoint's own tokenizer adds one (Gemma
and Llama do; GPT-2 and GPT-J do not, as in the paper). TransformerLens reloads tokenizers with BOS
switched on, so the answer is read from the tokenizer's own files. `prepend_bos=` overrides it. A
text that begins with BOS already, as chat templates write it, gets no second one.

Prefix: a text that is put before a prompt follows the head of a chat template, if there is one:
everything up to the last special token before the subject, and the rest of that line.

Subject: tokens are matched to the subject by character offsets in the real token sequence. Every
token that shares a character with the subject belongs to it, so tokens that straddle its edge and
all byte-level pieces of a split character count; "the last subject token" is the last of these.

Target: prompt and target are tokenised together, joined by one space, and a target token is one
that ends inside the target. White space around a target is not part of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_rome import passes
from transformer_lens_rome.model_call import model_call
from transformer_lens_rome.strict_json import check_text, stripped

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One tokenised text.

    Attributes:
        ids: Token ids, BOS included where the rule asks for it.
        subject: Positions of the subject's tokens (empty if no subject was given).
        target: Positions of the target's tokens (empty if no target was given). The logits that
            predict them stand one position earlier.
    """

    ids: tuple[int, ...]
    subject: tuple[int, ...] = ()
    target: tuple[int, ...] = ()


@dataclass(frozen=True)
class Encoder:
    """Turns texts into rows of tokens.

    Attributes:
        tokenizer: The model's tokenizer; it is always called without special tokens.
        bos_id: The id that starts every row; None where rows start with their first token.
        start_id: The id from which text is sampled: BOS, else the end-of-text token.
    """

    tokenizer: Any
    bos_id: int | None
    start_id: int

    @classmethod
    def of(cls, model: Any, prepend_bos: bool | None = None) -> Encoder:
        """The encoder of a model; `prepend_bos=None` follows the checkpoint's own tokenizer.

        Raises:
            ValueError: no tokenizer, one without character offsets, or no BOS to prepend.
        """
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None or not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "subject positions need a tokenizer with character offsets (a fast tokenizer), got "
                f"{type(tokenizer).__name__}; load it with AutoTokenizer.from_pretrained(name, "
                "use_fast=True) and pass it as tokenizer= when the model is wrapped"
            )
        bos = tokenizer.bos_token_id
        if prepend_bos is None:
            own = checkpoint_tokenizer(tokenizer)
            bos = bos if own.bos_token_id is None else own.bos_token_id
            prepend_bos = bos is not None and own("a").input_ids[:1] == [bos]
            logger.info(
                "prompts start %s BOS, as the tokenizer has it", ("without", "with")[prepend_bos]
            )
        if prepend_bos and bos is None:
            raise ValueError("prepend_bos=True, but the tokenizer has no BOS token")
        start = bos if bos is not None else tokenizer.eos_token_id
        return cls(tokenizer, bos if prepend_bos else None, 0 if start is None else start)

    @property
    def prepends_bos(self) -> bool:
        """Whether every row starts with BOS."""
        return self.bos_id is not None

    @property
    def special_ids(self) -> set[int]:
        """Ids of special tokens, also of those that a chat template marks turns with."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        marks = {i for i, token in added.items() if token.special or _MARK.fullmatch(str(token))}
        return marks | set(self.tokenizer.all_special_ids)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, no BOS or other special token added.

        Raises:
            ValueError: it is no text, or holds half a character.
        """
        _check_is_text(text)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def bos_before(self, ids: Sequence[int]) -> list[int]:
        """BOS, if these tokens of a text's start are to follow one and do not begin with it."""
        given = len(ids) > 0 and ids[0] == self.bos_id
        return [] if self.bos_id is None or given else [self.bos_id]

    def row(
        self, text: str, subject: tuple[int, int] | None = None, target: str | None = None
    ) -> Row:
        """Tokenise a text, with its subject at `text[start:end]` and a target to follow it."""
        _check_is_text(text)
        if target is not None:
            _check_is_text(target)
            target = stripped(target)
        if target == "":
            raise ValueError(f"the target after {text!r} is empty")
        gap = "" if text[-1:].isspace() else " "
        full = text if target is None else f"{text}{gap}{target}"
        encoded = self.tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
        bos = self.bos_before(encoded.input_ids)
        ids = bos + encoded.input_ids
        spans = list(enumerate(encoded.offset_mapping, start=len(bos)))
        subject_tokens: tuple[int, ...] = ()
        if subject is not None:
            first, end = subject
            inside = [p for p, (a, b) in spans if b > a and a < end and b > first]
            if not inside:
                raise ValueError(f"no token covers the subject {text[first:end]!r} in {text!r}")
            # a range: a space that is a token of its own may have an empty span between two words
            subject_tokens = tuple(range(inside[0], inside[-1] + 1))
        target_tokens = () if target is None else tuple(p for p, (_, b) in spans if b > len(text))
        if target is not None and (not target_tokens or target_tokens[0] == 0):
            raise ValueError(
                f"no token before the target {target!r} in {full!r} to predict it from"
            )
        return Row(tuple(ids), subject_tokens, target_tokens)

    def templated_row(
        self, template: str, subject: str, prefix: str = "", target: str | None = None
    ) -> Row:
        """A row from a prompt with one `{}`, the subject filled in, and a text put before it."""
        head = self._head(template) if prefix else 0
        template = template[:head] + join(prefix, template[head:])
        before, after = template.rsplit("{}", 1)
        start = len(before) + len(subject) - len(subject.lstrip())
        end = start + len(subject.strip())
        return self.row(before + subject + after, (start, end), target)

    def _head(self, template: str) -> int:
        """Where a chat template's head ends, in characters; 0 where there is no special token."""
        before = template[: template.index("{}")]
        encoded = self.tokenizer(before, add_special_tokens=False, return_offsets_mapping=True)
        special = self.special_ids - {self.tokenizer.unk_token_id}
        ends = [
            (end, i)
            for i, (_, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
            if i in special
        ]
        end, last = max(ends, default=(0, None))
        after = r"[^\r\n]*[\r\n]+\s*|\s*"  # the rest of the line, such as the role's name
        if last in (None, self.tokenizer.bos_token_id):  # nobody's turn begins there
            after = r"\s*" if end else ""
        return end + len(re.match(after, before[end:])[0])


_MARK = re.compile(r"<[|\uff5c].*[|\uff5c]>")
"""How some tokenizers write marks of turns that they do not call special."""


def _check_is_text(text: Any) -> None:
    """Refuse what is no text, which tokenizers would read as a list of texts, or as its name."""
    if not isinstance(text, str):
        raise ValueError(f"expected a text, got a {type(text).__name__}: {text!r:.60}")
    check_text(text)


def check_texts(name: str, texts: Any) -> None:
    """Refuse what is no list of texts.

    Raises:
        ValueError: it is a single text, bytes, a mapping, or holds something else than texts.
    """
    several = isinstance(texts, Sequence) and not isinstance(texts, (str, bytes, bytearray))
    if not several or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} is a list of texts, got {texts!r:.100}; write [text]")


def join(prefix: str, prompt: str) -> str:
    """A prefix in front of a prompt, with a space between them unless the prefix ends in one."""
    gap = " " if prefix and not prefix[-1].isspace() else ""
    return prefix + gap + prompt


def checkpoint_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer as its own files define it, before TransformerLens switched BOS on.

    Loaded once and then remembered on the tokenizer; the tokenizer itself where it has no files.

    Raises:
        ValueError: the files are not there any more, and whether BOS is added is the question.
    """
    if not hasattr(tokenizer, "_rome_checkpoint"):
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(tokenizer.name_or_path, local_files_only=True)
            if not found.get_vocab().items() <= tokenizer.get_vocab().items():
                raise OSError("what is there now has another vocabulary")
        except (OSError, ValueError, TypeError, KeyError) as error:
            if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
                raise ValueError(
                    f"the tokenizer's files are not at {tokenizer.name_or_path!r} any more, and "
                    "without them nobody knows whether BOS is the checkpoint's own or was switched "
                    "on by TransformerLens; load the model by an absolute path, or pass "
                    f"prepend_bos= ({_first_line(error)})"
                ) from error
            found = None  # not the tokenizer itself: it would hold a reference to itself
        tokenizer._rome_checkpoint = found
    return tokenizer._rome_checkpoint or tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def pad(rows: Sequence[Row], device: Any = None) -> Int[Tensor, "batch pos"]:
    """Rows as one batch, padded on the right; `adapter` says why it is no matter with what."""
    width = max(len(row.ids) for row in rows)
    return torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in rows], device=device)


@model_call
def target_log_probs(
    model: Any,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    batch_size: int = 16,
    prepend_bos: bool | None = None,
    encoder: Encoder | None = None,
) -> list[Float[Tensor, "n_target_tokens"]]:
    """Teacher-forced log P(target token | everything before it) for each target, in nats.

    One tensor for each (prompt, target) pair, in the order given; batching changes nothing beyond
    float rounding. The mean of a tensor is minus the paper's length-normalised NLL, its sum the
    log-probability of the whole target.
    """
    check_texts("prompts", prompts)
    check_texts("targets", targets)
    encoder = encoder or Encoder.of(model, prepend_bos)
    rows = [encoder.row(text, target=goal) for text, goal in zip(prompts, targets, strict=True)]
    return [score.log_probs for score in score_rows(model, rows, batch_size=batch_size)]


class TargetScore(NamedTuple):
    """How a model rates one row's target, given everything before it.

    Attributes:
        log_probs: log P of each target token, in nats, on the CPU in float32.
        correct: Whether each target token is the most probable one.
    """

    log_probs: Float[Tensor, "n_target_tokens"]
    correct: Bool[Tensor, "n_target_tokens"]


@model_call
@torch.no_grad()
def score_rows(model: Any, rows: Sequence[Row], *, batch_size: int = 16) -> list[TargetScore]:
    """Score every row's target, in the order given.

    Rows that begin alike up to their last target token, such as one prompt with two targets, are
    one text in the batch, and each place in it is unembedded once. Short texts share batches.
    """
    found: dict[int, TargetScore] = {}
    asked = [row.ids[: row.target[-1]] for row in rows]
    for side in passes.apart(model, [len(ids) for ids in asked]):
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, ids in zip(side, _longest([asked[i] for i in side]), strict=True):
            groups.setdefault(ids, []).append(i)
        texts = sorted(groups, key=len)
        for first in range(0, len(texts), batch_size):
            some = texts[first : first + batch_size]
            chosen = [i for ids in some for i in groups[ids]]
            text_of = [k for k, ids in enumerate(some) for _ in groups[ids]]
            scores = _scores(model, some, text_of, [rows[i] for i in chosen])
            found.update(zip(chosen, scores, strict=True))
    return [found[i] for i in range(len(rows))]


def _scores(
    model: Any, texts: Sequence[tuple[int, ...]], text_of: Sequence[int], rows: Sequence[Row]
) -> list[TargetScore]:
    """Scores of some rows, each of which begins one of some texts, from one pass."""
    triples = [(k, p - 1, row.ids[p]) for k, row in zip(text_of, rows) for p in row.target]
    where, at, labels = torch.tensor(triples).T
    places, which = torch.stack([where, at], 1).unique(dim=0, return_inverse=True)
    logits = passes.logits_at(model, pad([Row(ids) for ids in texts]), *places.T)
    log_probs = logits.float().log_softmax(-1).cpu()
    picked, correct = log_probs[which, labels], log_probs.argmax(-1)[which] == labels
    sizes = [len(row.target) for row in rows]
    return list(map(TargetScore, picked.split(sizes), correct.split(sizes)))


def _longest(texts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """For each text, one of them that begins with it and that no other begins with."""
    longest: dict[tuple[int, ...], tuple[int, ...]] = {}
    after: tuple[int, ...] = ()
    for text in sorted(set(texts), reverse=True):  # what begins with a text comes right after it
        longest[text] = longest[after] if after[: len(text)] == text else text
        after = text
    return [longest[text] for text in texts]


def target_index(
    rows: Sequence[Row],
) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"], Int[Tensor, "n"]]:
    """(row, position that predicts it, token id) of every target token of every row."""
    triples = [(i, p - 1, row.ids[p]) for i, row in enumerate(rows) for p in row.target]
    where, at, labels = torch.tensor(triples).T
    return where, at, labels


@model_call
@torch.no_grad()
def top_tokens(
    model: Any,
    prompt: str,
    k: int = 5,
    *,
    prepend_bos: bool | None = None,
    encoder: Encoder | None = None,
) -> list[tuple[str, float]]:
    """The k most probable next tokens after a prompt, with their probabilities."""
    encoder = encoder or Encoder.of(model, prepend_bos)
    row = encoder.row(prompt)
    if not row.ids:
        raise ValueError("the prompt holds no token to predict from; give some text")
    last = torch.tensor([len(row.ids) - 1])
    logits = passes.logits_at(model, pad([row]), torch.tensor([0]), last)[0]
    best = logits.float().softmax(-1).topk(k)
    return [(encoder.tokenizer.decode([i]), p) for p, i in zip(best.values.tolist(), best.indices)]
