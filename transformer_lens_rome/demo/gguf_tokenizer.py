"""The tokenizers of the demo models, built from their model files.

Gemma: transformers 4 (used by TransformerLens 2) builds it without its merges, so words are split
into letters. transformers 5 builds the same tokenizer as this module, again at each load. Like
SentencePiece, the file contains pieces and their scores. BPE needs merges: all pairs of pieces that
join to a piece, in order of decreasing score.

SmolLM2: the file contains byte-level pieces and merges, as GPT-2's files do. The digits of a number
are separate tokens. The converters of transformers give the same tokens, but that of transformers 4
gives another end-of-text token and no padding token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTROL, _USER_DEFINED = 3, 4  # kinds of pieces in the file


def gemma_tokenizer(path: Path) -> Any:
    """Build the tokenizer of a Gemma model file."""
    from transformers import PreTrainedTokenizerFast

    pieces, scores, kinds = _read(path)
    special = [p for p, kind in zip(pieces, kinds, strict=True) if kind == _CONTROL]
    added = [p for p, kind in zip(pieces, kinds, strict=True) if kind == _USER_DEFINED]
    return PreTrainedTokenizerFast(
        tokenizer_object=_bpe(pieces, scores, special, added),
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


def _read(path: Path) -> tuple[list[str], list[float], list[int]]:
    """Read the pieces, scores and kinds of the vocabulary."""
    values = _fields(path)
    pieces = [bytes(piece).decode("utf-8") for piece in values("tokens")]
    return pieces, [s.item() for s in values("scores")], [k.item() for k in values("token_type")]


def _fields(path: Path) -> Callable[[str], list[Any]]:
    """Return a function from the name of a field of the tokenizer to its values."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields

    def values(name: str) -> list[Any]:
        field = fields[f"tokenizer.ggml.{name}"]
        return [field.parts[i] for i in field.data]

    return values


def smollm2_tokenizer(path: Path) -> Any:
    """Build the tokenizer of a SmolLM2 model file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    values = _fields(path)
    pieces = [bytes(piece).decode("utf-8") for piece in values("tokens")]
    kinds = [kind.item() for kind in values("token_type")]
    halves = (bytes(merge).decode("utf-8").partition(" ") for merge in values("merges"))
    pairs = [(left, right) for left, _, right in halves]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, pairs)
    tokenizer = Tokenizer(model)
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    special = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
    )


def merges(pieces: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Return all pairs of pieces that join to a piece, in the order in which BPE must try them."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    candidates = []
    for piece, score in zip(pieces, scores, strict=True):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                candidates.append((-score, ids[piece], ids[left], ids[right], (left, right)))
    return [pair for *_, pair in sorted(candidates)]


def _bpe(pieces: list[str], scores: list[float], special: list[str], added: list[str]) -> Any:
    """Build Gemma's pipeline: spaces become "▁", unknown characters become bytes, BOS is first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(
        vocabulary, merges(pieces, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A <bos> $B",
        special_tokens=[("<bos>", vocabulary["<bos>"])],
    )
    tokenizer.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in special])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in added])
    return tokenizer
