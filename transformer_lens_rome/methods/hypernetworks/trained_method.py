"""What KE and MEND have in common as methods: `fit`, `save`, `load`, `compute`."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from transformer_lens_rome.edits.kinds import EditRequest, FactoredEdit
from transformer_lens_rome.edits.ledger import check_unedited
from transformer_lens_rome.edits.measure import measured
from transformer_lens_rome.methods.base import provenance
from transformer_lens_rome.methods.hypernetworks.hypernetwork import (
    Text,
    gradient_factors,
    mlp_matrices,
)
from transformer_lens_rome.methods.hypernetworks.trained_editor import TrainedEditor, trained_on
from transformer_lens_rome.methods.hypernetworks.training import Training, run_info, train
from transformer_lens_rome.methods.hypernetworks.training_data import Corpus, Fact, split, to_sample
from transformer_lens_rome.methods.hypernetworks.training_state import State
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Weight
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.prompts.encoder import Encoder, check_texts
from transformer_lens_rome.prompts.sampling import sampled_texts
from transformer_lens_rome.torch_states import torch_defaults

logger = logging.getLogger(__name__)

Shapes = Mapping[Weight, tuple[int, int]]


@dataclass(frozen=True)
class TrainedMethod(ABC):
    """A method whose edits a trained network makes.

    Attributes:
        editor: What was trained, or the file that holds it; None: `fit` has to be called.
        counterfact: The variant that is trained on CounterFact.
        scale: What every change is multiplied by.
        prepend_bos: Overrides the checkpoint's own rule; an editor has the one it was trained with.
    """

    editor: TrainedEditor | str | Path | None = None
    counterfact: bool = False
    scale: float = 1.0
    prepend_bos: bool | None = None
    _network: nn.Module | None = field(default=None, init=False, repr=False, compare=False)

    kind: ClassVar[str]

    @abstractmethod
    def new_network(
        self, shapes: Shapes, embeddings: Float[Tensor, "n d_model"], tokens: Int[Tensor, "n"]
    ) -> nn.Module:
        """A network as it is before training; tokens are those of the texts, with embeddings."""

    def for_editing(self, network: nn.Module) -> nn.Module:
        """A trained network, as it is to make edits."""
        return network

    @abstractmethod
    def settings(self) -> Training:
        """The settings that `fit` takes if none are given."""

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return f"{self.kind}-cf" if self.counterfact else self.kind

    # ------------------------------------------------------------ training

    @model_call
    @torch.enable_grad()
    def fit(
        self,
        model: Any,
        data: Sequence[Fact] | None = None,
        *,
        validation: Sequence[Fact] | None = None,
        locality: Sequence[str] | None = None,
        settings: Training | None = None,
        out: Any = None,
        progress: bool = True,
    ) -> TrainedMethod:
        """Train an editor for a model; the model stays as it is.

        Args:
            model: A HookedTransformer or TransformerBridge without edits on it.
            data: Records or requests, or texts whose last tokens are the target; None: texts of 32
                tokens that the model writes.
            validation: More of the kind; None: the last tenth of the data.
            locality: Texts on which the model should stay as it is; the last tenth is for
                validation. None: the data, if they are texts, else texts that the model writes.
            settings: See `Training`; None: the published ones.
            out: A file for the best editor so far; beside it `<out>.training` holds what a run
                that was stopped goes on with, and may be deleted at the end.
            progress: Show progress bars.

        Raises:
            ValueError: edits on the model, unfit data, or `out` holds another run.
            NotImplementedError: a model whose matrices cannot be edited.
        """
        settings, encoder = settings or self.settings(), Encoder.of(model, self.prepend_bos)
        check_unedited(model)
        matrices = mlp_matrices(model, settings.layers, settings.matrices)
        if data is None:
            data = _written(model, 1000, 32, settings.seed, progress)
        facts = others = split(data, validation)
        if locality is not None or not isinstance(data[0], str):
            if locality is None:
                locality = _written(model, 200, 64, settings.seed, progress)
            check_texts("locality", locality)
            others = split(locality)
        lengths = (settings.n_labels, settings.locality_tokens)
        corpora = tuple(
            Corpus.of(encoder, *some, *lengths, crop=settings.crop)
            for some in zip(facts, others, strict=True)
        )
        plain = {"prepend_bos": encoder.prepends_bos, "settings": run_info(settings)}
        known = {"kind": self.kind, "counterfact": self.counterfact, **plain}
        info = known | trained_on(model, matrices, facts, others)
        state = State.new(self._new(model, matrices, corpora[0], settings.seed), settings)
        path = None if out is None else Path(f"{out}.training")
        if path is not None and path.exists():
            state.load(path, info)
            logger.info("going on at step %d of %s", state.step, path)
        elif path is not None and Path(out).exists():
            raise ValueError(f"there is a file {out} already, but no {path}; give another name")

        def saved(state: State) -> None:
            if path is not None:
                state.save(path, info)
                self._trained(state, info).save(out)

        train(model, matrices, state, settings, corpora, saved=saved, progress=progress)
        editor = self._trained(state, info)
        if path is not None:  # also if a run was stopped between its two files
            editor.save(out)
        return replace(self, editor=editor)

    def _new(self, model: Any, matrices: Sequence[Weight], corpus: Corpus, seed: int) -> nn.Module:
        """A new network, drawn from a seed without a trace in the global random state."""
        ids = torch.tensor([i for sample in corpus.samples for i in sample.ids]).unique()
        embeddings = adapter.embeddings(model, ids).cpu()
        shapes = {where: tuple(adapter.parameter(model, where).shape) for where in matrices}
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
            network = self.new_network(shapes, embeddings, ids)
        return network.to(adapter.parameter(model, matrices[0]).device)

    def _trained(self, state: State, info: Mapping[str, Any]) -> TrainedEditor:
        run = {"step": state.best_step, "seconds": state.seconds, "curve": state.curve}
        return TrainedEditor(state.best, {**info, **run})

    # ------------------------------------------------------------ files

    def save(self, path: Any) -> None:
        """Write the editor as safetensors with JSON metadata."""
        self._loaded().save(path)

    @classmethod
    @torch_defaults()
    def load(cls, path: Any, **options: Any) -> TrainedMethod:
        """A method with the editor in a file, and the variant that it was trained as.

        Raises:
            FileNotFoundError, ValueError: see `TrainedEditor.load`.
        """
        editor = TrainedEditor.load(path)
        method = cls(editor=editor, counterfact=editor.info["counterfact"], **options)
        method._loaded()
        return method

    def _loaded(self) -> TrainedEditor:
        """The editor, read if it is a file, and of this kind."""
        editor = self.editor
        if editor is None:
            raise ValueError(
                f"{self.name} has to be trained: get_method({self.name!r}).fit(model, ...), or "
                f"get_method({self.name!r}, editor=path) with a file that it saved"
            )
        if not isinstance(editor, TrainedEditor):
            editor = TrainedEditor.load(editor)
        own = (editor.info["kind"], editor.info["counterfact"])
        if own != (self.kind, self.counterfact):
            name = f"{own[0]}-cf" if own[1] else own[0]
            raise ValueError(f"this is an editor of {name}; use get_method({name!r}, editor=...)")
        return editor

    # ------------------------------------------------------------ editing

    def has_seen(self, fact: Fact) -> bool:
        """Whether the editor was trained or validated on a fact."""
        return self._loaded().has_seen(fact)

    @model_call
    def prepared(self, model: Any, *, seed: int = 0) -> TrainedMethod:
        """The same with its network ready for a model.

        Raises:
            ValueError: no editor, or one that was trained for another model.
        """
        if self._network is not None:
            return self
        editor = self._loaded()
        editor.check(model)
        shapes = {w: tuple(adapter.parameter(model, w).shape) for w in editor.matrices}
        return replace(self, editor=editor)._with_network(shapes)

    @torch_defaults()
    def _with_network(self, shapes: Shapes) -> TrainedMethod:
        """This, which has its editor, with the editor's network; a change in place."""
        editor = self.editor
        tokens = editor.tensors.get("condition.tokens", torch.zeros(0, dtype=torch.long))
        with torch.random.fork_rng(devices=[]):
            rows = torch.zeros(len(tokens), editor.info["d_model"])
            network = self.new_network(shapes, rows, tokens)
        try:
            network.load_state_dict(editor.tensors)
        except RuntimeError as error:
            raise ValueError(
                f"the editor's tensors are not those of {self.name}: {error}"
            ) from error
        network.shapes = dict(shapes)
        network = self.for_editing(network.eval().requires_grad_(False))
        object.__setattr__(self, "_network", network)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For workers: shapes in place of the network, which not every pickle can hold."""
        shapes = None if self._network is None else self._network.shapes
        return {**vars(self), "_network": shapes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "_network": None})
        if state["_network"] is not None:
            self._with_network(state["_network"])

    @model_call
    def compute(self, model: Any, request: EditRequest, *, seed: int = 0) -> FactoredEdit:
        """The edit that the network makes of the request's gradient; nothing in it is random.

        Raises:
            ValueError: no editor, or one for another model.
        """
        method = self.prepared(model)
        editor = method.editor
        weights = {w: adapter.parameter(model, w).detach() for w in editor.matrices}
        hashes = {where: adapter.weight_hash(weight) for where, weight in weights.items()}
        if [*hashes.values()] != editor.info["hashes"]:  # there are edits on it, or it is another
            editor.check(model)
        network = method._network.to(next(iter(weights.values())).device)
        encoder = Encoder.of(model, editor.info["prepend_bos"])
        sample = to_sample(encoder, request, None)
        before, factors = gradient_factors(model, sample, editor.matrices)
        with torch.no_grad():
            changes = network(factors, Text.of(model, sample))
        edit = FactoredEdit.of(
            {w: (left.cpu(), self.scale * right.cpu()) for w, (left, right) in changes.items()},
            hashes,
            request=request,
            config=method._config(),
            provenance=provenance(model, encoder.prepends_bos),
        )
        health = replace(measured(model, encoder, edit), losses=(before,))
        return replace(edit, health=health)

    def _config(self) -> dict[str, Any]:
        """The method's options, and which editor it used."""
        options = asdict(replace(self, editor=None))
        return {**options, "editor": repr(self.editor)}


def _written(model: Any, n: int, length: int, seed: int, progress: bool) -> list[str]:
    logger.info("sampling %d texts of %d tokens from the model", n, length)
    return sampled_texts(model, n, length=length, seed=seed, progress=progress)
