"""ROME: write one fact into one MLP (Meng et al. 2022, arXiv:2202.05262v5, section 3).

    k* = mean over prefixes of the key at the last subject token                          (Eq. 3)
    v* = the value with which the model predicts the target, by gradient descent          (Eq. 4)
    W_out  <-  W_out + u Λᵀ,   u = C⁻¹ k*,   Λ = (v* - value(k*)) / (u · k*)               (Eq. 2)

Where paper, released code and this module differ:

    what                     paper            released code            here
    key in u                 mean             mean over prefixes       mean over prefixes
    key in Λ                 the same         bare prompt's            mean over prefixes
    v* starts at             -                bare prompt's value      mean value over prefixes
    norm for decay, clamp    -                bare prompt's value      mean value over prefixes
    clamp ||delta||          none             4 (3 for GPT-2 M)        the same; 0.75 behind a norm
    prefixes                 50 of 2-10       1 + 10 of 5 + 10 of 10   1 + 10 of 5 + 10 of 10
    weight decay, KL factor  1.5e-3, 1e2      0.5, 0.0625              0.5, 0.0625
    stop at loss             5e-2             5e-2                     5e-2
    steps                    20               20 losses, 19 updates    20 losses, 19 updates

`RomeConfig()` is the last column, `RomeConfig.released()` the one before it. If u and Λ use one
key, the mean key gets the value v* exactly. r-ROME (arXiv:2403.07175) showed that some edits
destroy the model because the released code mixes two keys.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar, overload

from transformer_lens_rome.edits.kinds import EditRequest, RankOneEdit
from transformer_lens_rome.edits.ledger import AppliedEdit, applied, apply_edit
from transformer_lens_rome.files.strict_json import check_text
from transformer_lens_rome.methods.base import provenance, register_method
from transformer_lens_rome.methods.rank_one import solve_rank_one
from transformer_lens_rome.methods.rome_config import RomeConfig, default_clamp, released_clamp
from transformer_lens_rome.methods.rome_health import measure_health
from transformer_lens_rome.methods.v_star import Batch, optimise
from transformer_lens_rome.model import adapter, refusals
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.default_layer import default_layer
from transformer_lens_rome.model.keys import read_keys_and_values
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.sampling import sample_prefixes
from transformer_lens_rome.statistics.second_moment import SecondMoment
from transformer_lens_rome.statistics.sources import default_second_moment

logger = logging.getLogger(__name__)

Request = EditRequest | Mapping[str, Any]


@model_call
def rome_edit(
    model: Model,
    request: Request | Sequence[Request],
    *,
    layer: int | None = None,
    second_moment: SecondMoment | None = None,
    prefixes: Sequence[str] | None = None,
    config: RomeConfig = RomeConfig(),
    seed: int = 0,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> AppliedEdit:
    """Write a fact, or a list of facts in order, into one MLP of the model, in place.

    The arguments are those of `compute_rome_edit`. Use the result in a `with` statement, or call
    its `revert()`, to restore exactly the old weights.
    """
    method = Rome(layer, second_moment, prefixes, config, prepend_bos, progress)
    edits = method._in_order(model, _as_list(request), seed)
    with ExitStack() as undo_on_error:
        done = [undo_on_error.enter_context(apply_edit(model, edit)) for edit in edits]
        undo_on_error.pop_all()
    return AppliedEdit.of(model, done)


@overload
def compute_rome_edit(
    model: Model,
    request: Request,
    *,
    layer: int | None = ...,
    second_moment: SecondMoment | None = ...,
    prefixes: Sequence[str] | None = ...,
    config: RomeConfig = ...,
    seed: int = ...,
    prepend_bos: bool | None = ...,
    progress: bool = ...,
) -> RankOneEdit: ...


@overload
def compute_rome_edit(
    model: Model,
    request: Sequence[Request],
    *,
    layer: int | None = ...,
    second_moment: SecondMoment | None = ...,
    prefixes: Sequence[str] | None = ...,
    config: RomeConfig = ...,
    seed: int = ...,
    prepend_bos: bool | None = ...,
    progress: bool = ...,
) -> list[RankOneEdit]: ...


@model_call
def compute_rome_edit(
    model: Model,
    request: Request | Sequence[Request],
    *,
    layer: int | None = None,
    second_moment: SecondMoment | None = None,
    prefixes: Sequence[str] | None = None,
    config: RomeConfig = RomeConfig(),
    seed: int = 0,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> RankOneEdit | list[RankOneEdit]:
    """Compute the rank-one edit that writes a fact; the model stays unchanged.

    Args:
        model: A HookedTransformer or TransformerBridge.
        request: An `EditRequest`, a dict in the released ROME format, or a list of them. For a
            list, each edit is computed with the edits before it applied, and a list is returned.
        layer: The block to edit, from 0. None: the model's default layer.
        second_moment: C at that layer. None: from the cache, the authors' files or a streamed
            corpus, see `default_second_moment`.
        prefixes: Texts to put before the prompt, `""` for the bare prompt. None: sampled from the
            model, as in the paper.
        config: The constants.
        seed: Seed of the sampled prefixes; nothing else is random.
        prepend_bos: Whether to prepend BOS. None: as the checkpoint's tokenizer does.
        progress: Show progress bars.

    Raises:
        ValueError: a request, layer, prefixes or statistics that do not fit.
        NotImplementedError: a model that cannot be edited.
    """
    method = Rome(layer, second_moment, prefixes, config, prepend_bos, progress)
    edits = method._in_order(model, _as_list(request), seed)
    return edits[0] if isinstance(request, (EditRequest, Mapping)) else edits


def _as_list(request: Request | Sequence[Request]) -> list[EditRequest]:
    """Return the requests of a list, or a single request as a list."""
    if isinstance(request, (EditRequest, Mapping, str)) or not isinstance(request, Iterable):
        return [EditRequest.of(request)]
    return [EditRequest.of(one) for one in request]


@dataclass(frozen=True)
class Rome:
    """ROME as an `EditMethod`; the fields are the arguments of `compute_rome_edit`."""

    name: ClassVar[str] = "rome"
    layer: int | None = None
    second_moment: SecondMoment | None = None
    prefixes: Sequence[str] | None = None
    config: RomeConfig = RomeConfig()
    prepend_bos: bool | None = None
    progress: bool = field(default=False, metadata={"identifies": False})

    @model_call
    def prepared(self, model: Model, *, seed: int = 0) -> Rome:
        """Check the options; return a copy with every default chosen, for all edits of a run."""
        return self._prepared(model, Encoder.of(model, self.prepend_bos), seed)

    @model_call
    def compute(self, model: Model, request: Request, *, seed: int = 0) -> RankOneEdit:
        """Compute the edit that writes one fact."""
        (edit,) = self._in_order(model, [EditRequest.of(request)], seed)
        return edit

    def _in_order(
        self, model: Model, requests: Sequence[EditRequest], seed: int
    ) -> list[RankOneEdit]:
        """Compute edits, each with those before it applied; the model stays unchanged."""
        if not requests:
            raise ValueError("the list of requests is empty; give at least one EditRequest")
        encoder = Encoder.of(model, self.prepend_bos)
        method = self._prepared(model, encoder, seed)
        edits: list[RankOneEdit] = []
        with ExitStack() as stack:
            for request in requests:
                if edits:
                    stack.enter_context(applied(model, edits[-1]))
                edits.append(method._compute(model, encoder, request, seed))
        return edits

    def _prepared(self, model: Model, encoder: Encoder, seed: int) -> Rome:
        """Check the given options; choose the defaults of the others and log them."""
        layer = default_layer(model) if self.layer is None else self.layer
        refusals.check_editable(model, [layer])
        prefixes, moment, config = self.prefixes, self.second_moment, self.config
        if prefixes is not None:
            _check_prefixes(prefixes, config)
        if isinstance(moment, Mapping):
            raise ValueError(f"second_moment is a dict; pass second_moment=moments[{layer}]")
        bos = encoder.prepends_bos
        if moment is None:
            moment = default_second_moment(model, layer, prepend_bos=bos, progress=self.progress)
        moment.check_fits(model, layer, bos)
        if prefixes is None:
            prefixes = sample_prefixes(model, config.prefix_lengths, seed=seed, encoder=encoder)
            logger.info("%d context prefixes, sampled with seed %d", len(prefixes), seed)
        if config.clamp is None:
            released = config.key == "released"
            clamp = released_clamp(model) if released else default_clamp(model, layer)
            config = dataclasses.replace(config, clamp=clamp)
        return dataclasses.replace(
            self, layer=layer, second_moment=moment, prefixes=tuple(prefixes), config=config
        )

    def _compute(
        self, model: Model, encoder: Encoder, request: EditRequest, seed: int
    ) -> RankOneEdit:
        """Compute one edit: keys and values, v*, the rank-one solve, and the edit's health."""
        layer, moment, prefixes = self.layer, self.second_moment, self.prefixes
        assert layer is not None and moment is not None and prefixes is not None  # see `_prepared`
        config = self.config
        rows = [
            encoder.templated_row(request.prompt, request.subject, prefix, request.target_new)
            for prefix in prefixes
        ]
        batch = Batch.of(rows, encoder.templated_row("{} is a", request.subject))
        forward = PartialForward(model, layer, batch.rows, batch.lookup.tolist())
        keys, values = (read[: len(rows)] for read in read_keys_and_values(forward, layer))
        v = values[0] if config.key == "released" else values.mean(0)
        optimised = optimise(forward, layer, batch, v, config, progress=self.progress)
        update = solve_rank_one(keys, values, v + optimised.delta, moment, config)
        made = {"prefixes": prefixes, "seed": seed, "second_moment": moment.summary()}
        edit = RankOneEdit(
            **{name: tensor.float().cpu() for name, tensor in update._asdict().items()},
            layer=layer,
            request=request,
            config=dataclasses.asdict(config),
            model_hash=adapter.weight_hash(adapter.w_out(model, layer)),
            provenance=provenance(model, encoder.prepends_bos) | made,
        )
        health = measure_health(model, encoder, edit, keys.mean(0), optimised, moment)
        for warning in health.warnings:
            logger.warning("%s -> %s: %s", request.text, request.target_new, warning)
        return dataclasses.replace(edit, health=health)


def _check_prefixes(prefixes: Sequence[str], config: RomeConfig) -> None:
    """Raise ValueError if `prefixes` is not a list of texts that suits the configuration."""
    several = isinstance(prefixes, Sequence) and not isinstance(prefixes, str)
    texts = prefixes if several else ()
    if not texts or not all(isinstance(text, str) and "{}" not in text for text in texts):
        raise ValueError(
            'prefixes is a list of texts to put before the prompt, with "" for the bare prompt '
            f"(write 'Hello.' for the template 'Hello. {{}}'); got {prefixes!r:.200}"
        )
    for text in texts:
        check_text(text)
    if config.key == "released" and prefixes[0] != "":
        raise ValueError('the released configuration needs the bare prompt "" as its first prefix')


register_method("rome", Rome)
