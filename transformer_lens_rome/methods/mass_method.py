"""MEMIT, EMMET and AlphaEdit as one `EditMethod`: the way from requests to an edit; see `memit`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.kinds import Edit, EditRequest, FactoredEdit
from transformer_lens_rome.methods.base import provenance, register_method
from transformer_lens_rome.methods.mass_config import (
    MemitConfig,
    Solve,
    check_layers,
    default_layers,
)
from transformer_lens_rome.methods.mass_health import health_of
from transformer_lens_rome.methods.mass_history import History, extended_history
from transformer_lens_rome.methods.mass_solve import (
    Metric,
    Solved,
    metric_of,
    solve_many,
)
from transformer_lens_rome.methods.mass_targets import Target, residual_weights, search_targets
from transformer_lens_rome.methods.mass_write import check_distinct, check_size, write_layers
from transformer_lens_rome.methods.rome_method import check_prefixes
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Point, Weight
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.sampling import opened_prefixes
from transformer_lens_rome.statistics.second_moment import SecondMoment
from transformer_lens_rome.statistics.sources import default_second_moment

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Memit:
    """MEMIT, EMMET or AlphaEdit as an `EditMethod`.

    The fields but the last ones are the arguments of `compute_memit_edit`.

    Attributes:
        solve: The closed form.
        projectors: AlphaEdit: P of each layer, `[d_mlp, d_mlp]`. None: from the second moments.
        skip_failed: Leave out a request that fails, and name it in the log and in the edit's
            provenance. False: raise an error that names all that fail; nothing is written.
    """

    layers: Sequence[int] | None = None
    second_moments: Mapping[int, SecondMoment] | None = None
    prefixes: Sequence[str] | None = None
    history: History | None = None
    config: MemitConfig = MemitConfig()
    solve: Solve = "memit"
    projectors: Mapping[int, Float[Tensor, "d_mlp d_mlp"]] | None = None
    skip_failed: bool = False
    prepend_bos: bool | None = None
    progress: bool = field(default=False, metadata={"identifies": False})
    _metrics: Mapping[int, Metric] | None = field(default=None, repr=False, compare=False)
    _normed: bool = field(default=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        """Return the method's name in tables."""
        return self.solve

    @model_call
    def prepared(self, model: Model, *, seed: int = 0) -> Memit:
        """Check the options; return a copy with every default chosen, for all edits of a run."""
        return self._prepared(model, Encoder.of(model, self.prepend_bos), seed)

    @model_call
    def compute(
        self, model: Model, request: EditRequest | Mapping[str, Any], *, seed: int = 0
    ) -> FactoredEdit:
        """Compute the edit that writes one fact."""
        return self.compute_many(model, [request], seed=seed)

    @model_call
    def compute_many(
        self,
        model: Model,
        requests: Sequence[EditRequest | Mapping[str, Any]],
        *,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> FactoredEdit:
        """Compute one edit that writes all facts at once; the model stays unchanged.

        The searches of up to `batch_size` requests share passes; None: as many as memory allows.

        Raises:
            ValueError: As `compute_memit_edit`.
        """
        parsed = [EditRequest.of(request) for request in requests]
        check_distinct(parsed)
        encoder = Encoder.of(model, self.prepend_bos)
        method = self._prepared(model, encoder, seed)
        check_size(adapter.w_out(model, method._layers[0]), len(parsed))
        parsed, targets, failed = method._searched(model, encoder, parsed, batch_size)
        layers = method._layers
        hashes = {Weight("W_out", n): adapter.weight_hash(adapter.w_out(model, n)) for n in layers}
        written = write_layers(
            model,
            encoder,
            parsed,
            targets,
            prefixes=method._texts,
            point=method._point,
            hashes=hashes,
            weights=residual_weights(len(method._texts), self.config),
            solve=method._solved,
        )
        moments = method._moments
        known: dict[str, Any] = {"prefixes": method._texts, "seed": seed, "failed": failed}
        known["second_moments"] = {str(n): moments[n].summary() for n in layers}
        known["metrics"] = {str(n): method._metric(n).summary() for n in layers}
        known["n_earlier_facts"] = 0 if method.history is None else method.history.n_facts
        edit = FactoredEdit.of(
            written.factors,
            hashes,
            request=parsed[0],
            requests=tuple(parsed),
            config=dataclasses.asdict(method.config) | {"solve": self.solve},
            provenance=provenance(model, encoder.prepends_bos) | known,
        )
        health = health_of(model, edit, written.facts, written.keys, moments)
        for warning in health.warnings:
            logger.warning("%s", warning)
        return dataclasses.replace(edit, health=health)

    @model_call
    def after(self, model: Model, edit: Edit) -> Memit:
        """Return the method for the next batch: with this edit's facts in the history."""
        return dataclasses.replace(self, history=extended_history(model, edit, self.history))

    # ------------------------------------------------------------ options

    @property
    def _layers(self) -> tuple[int, ...]:
        assert self.layers is not None  # see `_prepared`
        return tuple(self.layers)

    @property
    def _moments(self) -> Mapping[int, SecondMoment]:
        assert self.second_moments is not None  # see `_prepared`
        return self.second_moments

    @property
    def _texts(self) -> tuple[str, ...]:
        assert self.prefixes is not None  # see `_prepared`
        return tuple(self.prefixes)

    def _metric(self, layer: int) -> Metric:
        assert self._metrics is not None  # see `_prepared`
        return self._metrics[layer]

    def _prepared(self, model: Model, encoder: Encoder, seed: int) -> Memit:
        """Check the given options; choose the defaults of the others and log them."""
        layers = tuple(default_layers(model) if self.layers is None else self.layers)
        normed = check_layers(model, layers) if self._metrics is None else self._normed
        bos, config = encoder.prepends_bos, self.config
        if self.history is not None:
            self.history.check_fits(model, layers, bos)
        if self.prefixes is not None:
            check_prefixes(self.prefixes)
        moments = self._moments_of(model, layers, bos)
        metrics = self._metrics or self._factored(layers, moments)
        prefixes = self.prefixes
        if prefixes is None:
            prefixes = opened_prefixes(model, config.prefix_length, seed=seed, encoder=encoder)
            logger.info("%d context prefixes, continued with seed %d", len(prefixes), seed)
        return dataclasses.replace(
            self,
            layers=layers,
            second_moments=moments,
            prefixes=tuple(prefixes),
            _metrics=metrics,
            _normed=normed,
        )

    def _moments_of(
        self, model: Model, layers: Sequence[int], bos: bool
    ) -> dict[int, SecondMoment]:
        """Return the statistics of each layer, checked.

        Once the method is prepared, only those of the first layer are checked again, because edits
        of lower layers change the keys that identify the model.
        """
        given = self.second_moments
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(
                f"second_moments is a {type(given).__name__}; pass a dict with one for each layer, "
                f"as collect_second_moment(model, texts, {list(layers)}) returns it"
            )
        if missing := [n for n in layers if given is not None and n not in given]:
            raise ValueError(f"second_moments has none for the layers {missing}")
        moments = dict(given or {})
        for layer in layers:
            if given is None:
                moments[layer] = default_second_moment(
                    model, layer, prepend_bos=bos, progress=self.progress
                )
            if self._metrics is None or layer == layers[0]:
                moments[layer].check_fits(model, layer, bos)
        return {layer: moments[layer] for layer in layers}

    def _factored(
        self, layers: Sequence[int], moments: Mapping[int, SecondMoment]
    ) -> dict[int, Metric]:
        """Factor G of each layer, once for all batches."""
        given = self.projectors or {}
        if self.solve not in ("memit", "emmet", "alphaedit"):
            raise ValueError(f"solve must be memit, emmet or alphaedit, got {self.solve!r}")
        if given and (self.solve != "alphaedit" or set(given) != set(layers)):
            raise ValueError(f"projectors are for alphaedit, one for each of {list(layers)}")
        return {n: metric_of(self.solve, self.config, moments[n], given.get(n)) for n in layers}

    # ------------------------------------------------------------ the work

    def _searched(
        self,
        model: Model,
        encoder: Encoder,
        requests: Sequence[EditRequest],
        batch_size: int | None,
    ) -> tuple[list[EditRequest], list[Target], list[str]]:
        """Return the requests with a target, their targets, and why the others have none."""
        each = search_targets(
            model,
            encoder,
            requests,
            self._texts,
            self._point,
            self.config,
            batch_size=batch_size,
            progress=self.progress,
        )
        failed = [
            f"request {i} ({requests[i].text!r:.80}): {error}"
            for i, error in enumerate(each)
            if isinstance(error, Exception)
        ]
        if failed and (not self.skip_failed or len(failed) == len(each)):
            raise ValueError(
                f"{len(failed)} of {len(each)} requests failed, and nothing was written "
                f"({'; '.join(failed[:5]):.1000}); skip_failed=True writes the others"
            )
        for reason in failed:
            logger.warning("left out: %s", reason)
        found = [(r, t) for r, t in zip(requests, each, strict=True) if isinstance(t, Target)]
        return [request for request, _ in found], [target for _, target in found], failed

    @property
    def _point(self) -> Point:
        """Return the point of z: the residual after the last layer, or the value before a norm."""
        return Point("value" if self._normed else "resid_post", self._layers[-1])

    def _solved(self, layer: int, keys: Float[Tensor, "d_mlp n"]) -> Solved:
        """Solve one layer; σ is 1, but ε in EMMET."""
        slack, relative = 1.0, False
        if self.solve == "emmet":
            released = self.config.variant == "released"
            slack = 0.0 if released and keys.shape[1] == 1 else self.config.slack
            relative = not released
        earlier = None if self.history is None else self.history.keys[layer]
        return solve_many(self._metric(layer), keys, earlier, slack=slack, relative=relative)


register_method("memit", Memit)
register_method("emmet", partial(Memit, solve="emmet"))
register_method("alphaedit", partial(Memit, solve="alphaedit"))
