"""Tokenise texts; all rules for BOS, subject positions, target positions and padding are here.

BOS: a prompt starts with the BOS token exactly when the tokenizer of the checkpoint adds one (Gemma
and Llama do; GPT-2 and GPT-J do not, as in the paper). TransformerLens reloads tokenizers with BOS
switched on, so the rule is read from the tokenizer's files. `prepend_bos=` overrides it. A text
that already begins with BOS, as chat templates write it, gets no second one.

Prefix: a prefix is inserted after the head of a chat template, if there is one. The head is
everything up to the last special token before the subject, and the rest of that line.

Subject: tokens are matched to the subject by character offsets in the real token sequence. Every
token that shares a character with the subject belongs to it. This includes tokens that cross its
edge and all byte-level pieces of a split character. "The last subject token" is the last of these.

Target: prompt and target are joined by one space and tokenised together. A target token is a token
that ends inside the target. White space around a target is not part of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from transformer_lens_rome.extras import first_line
from transformer_lens_rome.files.strict_json import check_text, stripped
from transformer_lens_rome.model.protocol import Model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One tokenised text.

    Attributes:
        ids: Token ids, including BOS if the BOS rule adds it.
        subject: Positions of the subject's tokens (empty if no subject was given).
        target: Positions of the target's tokens (empty if no target was given). The logits that
            predict a token are one position earlier.
    """

    ids: tuple[int, ...]
    subject: tuple[int, ...] = ()
    target: tuple[int, ...] = ()


@dataclass(frozen=True)
class Encoder:
    """Converts texts to rows of tokens.

    Attributes:
        tokenizer: The tokenizer of the model; it is always called without special tokens.
        bos_id: The id that starts every row; None if rows start without BOS.
        start_id: The first id of a sampled text: BOS, or the end-of-text token if there is no BOS.
    """

    tokenizer: Any
    bos_id: int | None
    start_id: int

    @classmethod
    def of(cls, model: Model, prepend_bos: bool | None = None) -> Encoder:
        """Return the encoder of a model; `prepend_bos=None` follows the checkpoint's tokenizer.

        Raises:
            ValueError: There is no tokenizer, it has no character offsets, or it has no BOS token
                although `prepend_bos` is True.
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
            original = checkpoint_tokenizer(tokenizer)
            bos = bos if original.bos_token_id is None else original.bos_token_id
            prepend_bos = bos is not None and original("a").input_ids[:1] == [bos]
            logger.info(
                "prompts start %s BOS, as the tokenizer of the checkpoint does",
                ("without", "with")[prepend_bos],
            )
        if prepend_bos and bos is None:
            raise ValueError(
                "prepend_bos=True, but the tokenizer has no BOS token; pass prepend_bos=False"
            )
        start = bos if bos is not None else tokenizer.eos_token_id
        return cls(tokenizer, bos if prepend_bos else None, 0 if start is None else start)

    @property
    def prepends_bos(self) -> bool:
        """True if every row starts with BOS."""
        return self.bos_id is not None

    @cached_property
    def special_ids(self) -> set[int]:
        """Ids of the special tokens, including those that mark turns in a chat template."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        marks = {i for i, token in added.items() if token.special or _MARK.fullmatch(str(token))}
        return marks | set(self.tokenizer.all_special_ids)

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text, without BOS or other added special tokens.

        Raises:
            ValueError: `text` is not a string, or contains a lone surrogate.
        """
        _check_is_text(text)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def bos_before(self, ids: Sequence[int]) -> list[int]:
        """Return the BOS to put before these tokens, as a list that is empty if none is needed."""
        present = len(ids) > 0 and ids[0] == self.bos_id
        return [] if self.bos_id is None or present else [self.bos_id]

    def row(
        self, text: str, subject: tuple[int, int] | None = None, target: str | None = None
    ) -> Row:
        """Tokenise a text with its subject at `text[start:end]`, followed by a target.

        Raises:
            ValueError: A text is not valid, the target is empty, or no token matches the subject
                or the target.
        """
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
            # a range, because a space token between two words may have an empty span
            subject_tokens = tuple(range(inside[0], inside[-1] + 1))
        target_tokens = () if target is None else tuple(p for p, (_, b) in spans if b > len(text))
        if target is not None and (not target_tokens or target_tokens[0] == 0):
            raise ValueError(
                f"no token before the target {target!r} in {full!r} that could predict it"
            )
        return Row(tuple(ids), subject_tokens, target_tokens)

    def templated_row(
        self, template: str, subject: str, prefix: str = "", target: str | None = None
    ) -> Row:
        """Return the row of a template with one `{}`, filled with the subject, after a prefix."""
        head = self._head(template) if prefix else 0
        template = template[:head] + join(prefix, template[head:])
        before, after = template.rsplit("{}", 1)
        start = len(before) + len(subject) - len(subject.lstrip())
        end = start + len(subject.strip())
        return self.row(before + subject + after, (start, end), target)

    def _head(self, template: str) -> int:
        """Return the length of the head of a chat template in characters; 0 if it has none."""
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
        if last in (None, self.tokenizer.bos_token_id):  # no turn begins after this token
            after = r"\s*" if end else ""
        rest = re.match(after, before[end:])
        assert rest is not None  # the pattern also matches the empty text
        return end + rest.end()


_MARK = re.compile(r"<[|\uff5c].*[|\uff5c]>")
"""Turn marks that some tokenizers do not list as special tokens."""


def _check_is_text(text: Any) -> None:
    """Raise ValueError if a value is not a string; tokenizers accept other types silently."""
    if not isinstance(text, str):
        raise ValueError(f"expected a text, got a {type(text).__name__}: {text!r:.60}")
    check_text(text)


def check_texts(name: str, texts: Any) -> None:
    """Check that a value is a list of strings; `name` is used in the message.

    Raises:
        ValueError: The value is a single string, bytes or a mapping, or an item is not a string.
    """
    is_list = isinstance(texts, Sequence) and not isinstance(texts, (str, bytes, bytearray))
    if not is_list or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a list of texts, got {texts!r:.100}; write [text]")


def join(prefix: str, prompt: str) -> str:
    """Join a prefix and a prompt, with a space between them if the prefix does not end in one."""
    gap = " " if prefix and not prefix[-1].isspace() else ""
    return prefix + gap + prompt


def checkpoint_tokenizer(tokenizer: Any) -> Any:
    """Return the tokenizer as its files define it, before TransformerLens switched BOS on.

    It is loaded once and cached on the given tokenizer. If the files are missing and the given
    tokenizer adds no BOS, the given tokenizer is returned.

    Raises:
        ValueError: The files are missing, and the given tokenizer adds BOS.
    """
    if not hasattr(tokenizer, "_rome_checkpoint"):
        from transformers import AutoTokenizer

        try:
            original = AutoTokenizer.from_pretrained(tokenizer.name_or_path, local_files_only=True)
            if not original.get_vocab().items() <= tokenizer.get_vocab().items():
                raise OSError("the files there now have another vocabulary")
        except (OSError, ValueError, TypeError, KeyError) as error:
            if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
                raise ValueError(
                    f"the files of the tokenizer are missing at {tokenizer.name_or_path!r}, and "
                    "without them it is unknown whether the checkpoint adds BOS or TransformerLens "
                    "switched it on; load the model by an absolute path, or pass "
                    f"prepend_bos= ({first_line(error)})"
                ) from error
            original = None  # not the tokenizer, which would then refer to itself
        tokenizer._rome_checkpoint = original
    return tokenizer._rome_checkpoint or tokenizer


def pad(rows: Sequence[Row], device: Any = None) -> Int[Tensor, "batch pos"]:
    """Return rows as one batch, padded on the right with 0; `adapter` explains why 0 is safe."""
    width = max(len(row.ids) for row in rows)
    return torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in rows], device=device)
