"""Read an edit in tokens: what its change of a W_out writes, and which tokens get it.

A change of W_out adds `k delta W` to the value of each key k. For a rank-one edit that is
`(k . u) Lambda`, so Lambda is what the edit writes and u is what its key listens to. The added
vector is read as the logit lens reads a state: through the final norm and the unembedding. It skips
all blocks above, and the norm that some models have after the MLP, so it is a hint and no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.added_values import AddedValues
from transformer_lens_rome.model import passes
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder

_TOP = 10
"""The number of tokens of each kind."""


@dataclass(frozen=True)
class Heard:
    """A token whose value gets some of what the edit writes.

    Attributes:
        token: The token as text.
        prompt: The number of its prompt; 0 is the edited one.
        position: Its position there.
        share: `<k delta W, a> / ||a||^2`, with its key k and the vector a that is added at the
            edited prompt's last subject token, where the share is 1. For a rank-one edit it is the
            ratio of the keys' products with u.
    """

    token: str
    prompt: int
    position: int
    share: float


@dataclass(frozen=True)
class EditLens:
    """An edit's change of one W_out, read in tokens.

    Attributes:
        layer: The layer of that W_out.
        raises: The tokens whose logits the written vector raises most, and by how much if the
            vector alone were the last state.
        lowers: The tokens whose logits it lowers most.
        target_rank: The place of the target's first token among all tokens, 1 if it is raised most.
            A late place says that the blocks above make the target of what is written.
        hears: The tokens of all prompts whose values get most of it, BOS left out.
    """

    layer: int
    raises: tuple[tuple[str, float], ...]
    lowers: tuple[tuple[str, float], ...]
    target_rank: int
    hears: tuple[Heard, ...]


def edit_lens(
    model: Model,
    encoder: Encoder,
    added: AddedValues,
    rows: Sequence[Sequence[int]],
    target: int,
) -> EditLens:
    """Read what an edit adds to the values of some texts.

    Args:
        model: The model; only its final norm and its unembedding are used.
        encoder: The encoder of the rows.
        added: What the edit adds in the layer to be read.
        rows: Token ids of the texts that `added` is about, the edited prompt first.
        target: The id of the target's first token.
    """
    decode = encoder.tokenizer.decode
    logits = passes.logits_of_vector(model, added.vector)
    raises, lowers = (
        tuple((decode([i]), logits[i].item()) for i in _highest(signed))
        for signed in (logits, -logits)
    )
    heard = []
    for prompt, (row, shares) in enumerate(zip(rows, added.parts, strict=True)):
        start = 1 if encoder.prepends_bos and len(row) > 1 else 0
        for position in range(start, len(row)):
            share = shares[position].item()
            heard.append(Heard(decode([row[position]]), prompt, position, share))
    hears = sorted(heard, key=lambda one: one.share, reverse=True)[:_TOP]
    rank = 1 + int((logits > logits[target]).sum())
    return EditLens(added.layer, raises, lowers, rank, tuple(hears))


def _highest(logits: Float[Tensor, "d_vocab"]) -> list[int]:
    indices: list[int] = logits.topk(min(_TOP, len(logits))).indices.tolist()
    return indices
