"""ROME as an `EditMethod`: its options, and the way from requests to edits; see `rome`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.kinds import EditRequest, RankOneEdit
from transformer_lens_rome.edits.ledger import applied
from transformer_lens_rome.files.strict_json import check_text
from transformer_lens_rome.methods.base import provenance, register_method
from transformer_lens_rome.methods.batches import Shape, in_batches
from transformer_lens_rome.methods.rank_one import solve_rank_one
from transformer_lens_rome.methods.rome_config import RomeConfig, default_clamp, released_clamp
from transformer_lens_rome.methods.rome_health import measure_health
from transformer_lens_rome.methods.v_star import Batch, Search, keys_and_values, optimise, passes_of
from transformer_lens_rome.model import adapter, refusals
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.default_layer import default_layer
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.sampling import sample_prefixes
from transformer_lens_rome.statistics.second_moment import SecondMoment
from transformer_lens_rome.statistics.sources import default_second_moment

logger = logging.getLogger(__name__)


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
    def compute(
        self, model: Model, request: EditRequest | Mapping[str, Any], *, seed: int = 0
    ) -> RankOneEdit:
        """Compute the edit that writes one fact."""
        (edit,) = self.in_order(model, [EditRequest.of(request)], seed)
        return edit

    @model_call
    def compute_each(
        self,
        model: Model,
        requests: Sequence[EditRequest | Mapping[str, Any]],
        *,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> list[RankOneEdit | Exception]:
        """Compute an edit for each request on the model as it is, or return why there is none.

        The searches of up to `batch_size` requests share passes; None: as many as memory allows.
        """
        encoder = Encoder.of(model, self.prepend_bos)
        method = self._prepared(model, encoder, seed)

        def shape(request: EditRequest) -> Shape:
            groups = method._groups(encoder, request)
            pairs = [(len(ids), at) for one in groups for ids, at in zip(one.rows, one.lookup)]
            tails = [length - int(at) for length, at in pairs]
            return Shape(max(len(one.rows) for one in groups), max(pairs)[0], max(tails))

        def compute(some: Sequence[EditRequest]) -> list[RankOneEdit | Exception]:
            return method._compute(model, encoder, some, seed)

        parsed = [EditRequest.of(request) for request in requests]
        return in_batches(model, parsed, shape, compute, batch_size=batch_size)

    @model_call
    def in_order(
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
                (found,) = method._compute(model, encoder, [request], seed)
                if isinstance(found, Exception):
                    raise found
                edits.append(found)
        return edits

    def _prepared(self, model: Model, encoder: Encoder, seed: int) -> Rome:
        """Check the given options; choose the defaults of the others and log them."""
        layer = default_layer(model) if self.layer is None else self.layer
        refusals.check_editable(model, [layer])
        prefixes, moment, config = self.prefixes, self.second_moment, self.config
        if prefixes is not None:
            check_prefixes(prefixes, bare_first=config.key == "released")
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

    def _groups(self, encoder: Encoder, request: EditRequest) -> list[Batch]:
        """Return the rows of a request's search, in groups that take turns.

        Each group has a row for each of its prefixes, and perhaps the KL row. The bare prompt is in
        the first group.
        """
        assert self.prefixes is not None  # see `_prepared`
        rows = [
            encoder.templated_row(request.prompt, request.subject, prefix, request.target_new)
            for prefix in self.prefixes
        ]
        kl_row = encoder.templated_row("{} is a", request.subject)
        n_groups = -(-len(rows) // (self.config.prefixes_a_step or len(rows)))
        return [Batch.of(rows[i::n_groups], kl_row) for i in range(n_groups)]

    def _compute(
        self, model: Model, encoder: Encoder, requests: Sequence[EditRequest], seed: int
    ) -> list[RankOneEdit | Exception]:
        """Compute edits whose searches share passes; a search that fails gives its error."""
        layer, released = self.layer, self.config.key == "released"
        assert layer is not None  # see `_prepared`
        groups = [self._groups(encoder, request) for request in requests]
        forwards = passes_of(model, layer, groups)
        pairs = list(keys_and_values(forwards, layer, groups))
        searches = [
            Search(some, values[0] if released else values.mean(0), self.config)
            for some, (_, values) in zip(groups, pairs, strict=True)
        ]
        optimise(forwards, layer, searches, progress=self.progress)
        made = self._made(model, encoder, seed)
        each: list[RankOneEdit | Exception] = []
        for request, (k, v), search in zip(requests, pairs, searches, strict=True):
            try:
                each.append(self._edit(request, k, v, search, made))
            except ValueError as error:
                each.append(error)
        k_means = [key.mean(0) for key, _ in pairs]
        return self._with_health(model, encoder, each, k_means, searches)

    def _made(self, model: Model, encoder: Encoder, seed: int) -> dict[str, Any]:
        """Return the fields that all edits of this call share."""
        layer, moment = self.layer, self.second_moment
        assert layer is not None and moment is not None  # see `_prepared`
        known = {"prefixes": self.prefixes, "seed": seed, "second_moment": moment.summary()}
        return {
            "layer": layer,
            "config": dataclasses.asdict(self.config),
            "model_hash": adapter.weight_hash(adapter.w_out(model, layer)),
            "provenance": provenance(model, encoder.prepends_bos) | known,
        }

    def _edit(
        self,
        request: EditRequest,
        keys: Float[Tensor, "prefix d_mlp"],
        values: Float[Tensor, "prefix d_model"],
        search: Search,
        made: Mapping[str, Any],
    ) -> RankOneEdit:
        """Return the edit that a search gives, by the rank-one solve."""
        assert self.second_moment is not None  # see `_prepared`
        v_star = search.v + search.found.delta
        update = solve_rank_one(keys, values, v_star, self.second_moment, self.config)
        tensors = {name: tensor.float().cpu() for name, tensor in update._asdict().items()}
        return RankOneEdit(**tensors, request=request, **made)

    def _with_health(
        self,
        model: Model,
        encoder: Encoder,
        each: Sequence[RankOneEdit | Exception],
        k_means: Sequence[Float[Tensor, "d_mlp"]],
        searches: Sequence[Search],
    ) -> list[RankOneEdit | Exception]:
        """Return the edits with their health, and the errors as they are."""
        assert self.second_moment is not None  # see `_prepared`
        edits = {i: edit for i, edit in enumerate(each) if isinstance(edit, RankOneEdit)}
        optimised = [searches[i].found for i in edits]
        healths = measure_health(
            model,
            encoder,
            list(edits.values()),
            [k_means[i] for i in edits],
            optimised,
            self.second_moment,
        )
        for (i, edit), health in zip(edits.items(), healths, strict=True):
            for warning in health.warnings:
                logger.warning("%s -> %s: %s", edit.request.text, edit.request.target_new, warning)
            edits[i] = dataclasses.replace(edit, health=health)
        return [edits.get(i, one) for i, one in enumerate(each)]


def check_prefixes(prefixes: Sequence[str], *, bare_first: bool = True) -> None:
    """Raise ValueError if `prefixes` is not a list of texts, with "" first where it is needed."""
    several = isinstance(prefixes, Sequence) and not isinstance(prefixes, str)
    texts = prefixes if several else ()
    if not texts or not all(isinstance(text, str) and "{}" not in text for text in texts):
        raise ValueError(
            'prefixes is a list of texts to put before the prompt, with "" for the bare prompt '
            f"(write 'Hello.' for the template 'Hello. {{}}'); got {prefixes!r:.200}"
        )
    for text in texts:
        check_text(text)
    if bare_first and prefixes[0] != "":
        raise ValueError('the bare prompt "" must be the first prefix, as keys are weighed by it')


register_method("rome", Rome)
