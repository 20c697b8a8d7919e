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
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from transformer_lens_rome.files.strict_json import check_text, stripped

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
            if _probe(found) != _probe(tokenizer):
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


def _probe(tokenizer: Any) -> list[int]:
    """Ids of some text, by which tokenizers are told apart."""
    text = "The 12 Eiffel Towers — “Zoë” ﬁnds ＡＢ, e\u0301 and 東京 in <b>it</b>.\n"
    return tokenizer(text, add_special_tokens=False).input_ids


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def pad(rows: Sequence[Row], device: Any = None) -> Int[Tensor, "batch pos"]:
    """Rows as one batch, padded on the right; `adapter` says why it is no matter with what."""
    width = max(len(row.ids) for row in rows)
    return torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in rows], device=device)
