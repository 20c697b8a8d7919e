"""The base class of KE and MEND as methods: `fit`, `save`, `load`, `compute`."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_rome.edits.kinds import EditRequest, FactoredEdit
from transformer_lens_rome.edits.ledger import check_unedited
from transformer_lens_rome.edits.measure import measured
from transformer_lens_rome.methods.base import provenance
from transformer_lens_rome.methods.hypernetworks.hypernetwork import (
    EditorNetwork,
    Shapes,
    Text,
    gradient_factors,
    matrix,
    matrix_shapes,
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


@dataclass(frozen=True)
class TrainedMethod(ABC):
    """A method whose edits are computed by a trained network.

    Attributes:
        editor: The trained editor, or its file. None: call `fit` first.
        counterfact: Use the variant that is trained on CounterFact.
        scale: Factor of every change.
        prepend_bos: Whether `fit` prepends BOS. None: as the checkpoint's tokenizer does. Edits use
            the rule of the editor's training.
    """

    editor: TrainedEditor | str | Path | None = None
    counterfact: bool = False
    scale: float = 1.0
    prepend_bos: bool | None = None
    _network: EditorNetwork | None = field(default=None, init=False, repr=False, compare=False)

    kind: ClassVar[str]

    @abstractmethod
    def new_network(
        self, shapes: Shapes, embeddings: Float[Tensor, "n d_model"], tokens: Int[Tensor, "n"]
    ) -> EditorNetwork:
        """Construct an untrained network.

        Args:
            shapes: `[d_in, d_out]` of each matrix to edit.
            embeddings: The model's embeddings of `tokens`.
            tokens: Ids of all tokens of the training texts, in order.
        """

    def for_editing(self, network: EditorNetwork) -> EditorNetwork:
        """Prepare a trained network for editing; the default changes nothing."""
        return network

    @abstractmethod
    def settings(self) -> Training:
        """Return the default settings of `fit`."""

    @property
    def name(self) -> str:
        """Return the method's name in tables."""
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
        """Train an editor for a model; the model stays unchanged.

        Args:
            model: A HookedTransformer or TransformerBridge without edits on it.
            data: Records or requests, or texts whose last tokens are the target. None: texts of 32
                tokens sampled from the model.
            validation: Validation data of the same kind. None: the last tenth of the data.
            locality: Texts on which the model should stay unchanged; the last tenth is for
                validation. None: the data if they are texts, else texts sampled from the model.
            settings: See `Training`. None: the published settings.
            out: A file for the best editor so far. A stopped run resumes from `<out>.training`,
                which may be deleted at the end.
            progress: Show progress bars.

        Raises:
            ValueError: there are edits on the model, the data do not fit, or `out` has another run.
            NotImplementedError: the model's matrices cannot be edited.
        """
        settings, encoder = settings or self.settings(), Encoder.of(model, self.prepend_bos)
        check_unedited(model)
        matrices = mlp_matrices(model, settings.layers, settings.matrices)
        if data is None:
            data = _sample_texts(model, 1000, 32, settings.seed, progress)
        facts = others = split(data, validation)
        if locality is not None or not isinstance(data[0], str):
            if locality is None:
                locality = _sample_texts(model, 200, 64, settings.seed, progress)
            check_texts("locality", locality)
            others = split(locality)
        lengths = (settings.n_labels, settings.locality_tokens)
        train_on, validate_on = (
            Corpus.of(encoder, *both, *lengths, crop=settings.crop)
            for both in zip(facts, others, strict=True)
        )
        run = {"prepend_bos": encoder.prepends_bos, "settings": run_info(settings)}
        variant = {"kind": self.kind, "counterfact": self.counterfact, **run}
        info = variant | trained_on(model, matrices, facts, others)
        state = State.new(self._initialised(model, matrices, train_on, settings.seed), settings)
        path = None if out is None else Path(f"{out}.training")
        if path is not None and path.exists():
            state.load(path, info)
            logger.info("resuming at step %d of %s", state.step, path)
        elif path is not None and Path(out).exists():
            raise ValueError(f"there is a file {out} already, but no {path}; pass another name")

        def saved(state: State) -> None:
            if path is not None:
                state.save(path, info)
                self._best_editor(state, info).save(out)

        corpora = (train_on, validate_on)
        train(model, matrices, state, settings, corpora, saved=saved, progress=progress)
        editor = self._best_editor(state, info)
        if path is not None:  # needed if a run was stopped between writing its two files
            editor.save(out)
        return replace(self, editor=editor)

    def _initialised(
        self, model: Any, matrices: Sequence[Weight], corpus: Corpus, seed: int
    ) -> EditorNetwork:
        """Draw a new network from a seed; the global random state stays unchanged."""
        ids = torch.tensor([i for sample in corpus.samples for i in sample.ids]).unique()
        embeddings = adapter.embeddings(model, ids).cpu()
        shapes = matrix_shapes(model, matrices)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
            network = self.new_network(shapes, embeddings, ids)
        return network.to(matrix(model, matrices[0]).device)

    def _best_editor(self, state: State, info: Mapping[str, Any]) -> TrainedEditor:
        """Construct the editor of the best validation."""
        run = {"step": state.best_step, "seconds": state.seconds, "curve": state.curve}
        return TrainedEditor(state.best, {**info, **run})

    # ------------------------------------------------------------ files

    def save(self, path: Any) -> None:
        """Write the editor as safetensors with JSON metadata."""
        self._loaded().save(path)

    @classmethod
    @torch_defaults()
    def load(cls, path: Any, **options: Any) -> TrainedMethod:
        """Construct a method with the editor in a file, in the variant of its training.

        Raises:
            FileNotFoundError, ValueError: see `TrainedEditor.load`.
        """
        editor = TrainedEditor.load(path)
        method = cls(editor=editor, counterfact=editor.info["counterfact"], **options)
        method._loaded()
        return method

    def _loaded(self) -> TrainedEditor:
        """Return the editor, read if it is a file; raise ValueError unless it is of this kind."""
        editor = self.editor
        if editor is None:
            raise ValueError(
                f"{self.name} has to be trained: get_method({self.name!r}).fit(model, ...), or "
                f"get_method({self.name!r}, editor=path) with a file that it saved"
            )
        if not isinstance(editor, TrainedEditor):
            editor = TrainedEditor.load(editor)
        kind, counterfact = editor.info["kind"], editor.info["counterfact"]
        if (kind, counterfact) != (self.kind, self.counterfact):
            name = f"{kind}-cf" if counterfact else kind
            raise ValueError(f"this is an editor of {name}; use get_method({name!r}, editor=...)")
        return editor

    # ------------------------------------------------------------ editing

    def has_seen(self, fact: Fact) -> bool:
        """Return whether the editor was trained or validated on a fact."""
        return self._loaded().has_seen(fact)

    @model_call
    def prepared(self, model: Any, *, seed: int = 0) -> TrainedMethod:
        """Return a copy whose network is ready to edit a model.

        Raises:
            ValueError: there is no editor, or it was trained for another model.
        """
        if self._network is not None:
            return self
        editor = self._loaded()
        editor.check(model)
        shapes = matrix_shapes(model, editor.matrices)
        return replace(self, editor=editor)._with_network(shapes)

    @torch_defaults()
    def _with_network(self, shapes: Shapes) -> TrainedMethod:
        """Construct the editor's network, store it in this method, and return the method."""
        editor = self._loaded()
        tokens = editor.tensors.get("condition.tokens", torch.zeros(0, dtype=torch.long))
        with torch.random.fork_rng(devices=[]):
            rows = torch.zeros(len(tokens), editor.info["d_model"])
            network = self.new_network(shapes, rows, tokens)
        try:
            network.load_state_dict(editor.tensors)
        except RuntimeError as error:
            raise ValueError(f"the editor's tensors do not fit {self.name}: {error}") from error
        network = self.for_editing(network.eval().requires_grad_(False))
        object.__setattr__(self, "_network", network)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with shapes instead of the network, which may not be picklable."""
        shapes = None if self._network is None else self._network.shapes
        return {**vars(self), "_network": shapes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state and construct the network again."""
        vars(self).update({**state, "_network": None})
        if state["_network"] is not None:
            self._with_network(state["_network"])

    @model_call
    def compute(self, model: Any, request: EditRequest, *, seed: int = 0) -> FactoredEdit:
        """Compute the edit with the network from the request's gradient; no step is random.

        Raises:
            ValueError: there is no editor, or it was trained for another model.
        """
        method = self.prepared(model)
        editor, network = method._loaded(), method._network
        assert network is not None  # `prepared` sets it
        weights = {where: matrix(model, where).detach() for where in editor.matrices}
        hashes = {where: adapter.weight_hash(weight) for where, weight in weights.items()}
        if [*hashes.values()] != editor.info["hashes"]:  # an edited model, or another one
            editor.check(model)
        network.to(next(iter(weights.values())).device)
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
        """Return the method's options and the name and sha256 of its editor."""
        options = asdict(replace(self, editor=None))
        return {**options, "editor": repr(self.editor)}


def _sample_texts(model: Any, n: int, length: int, seed: int, progress: bool) -> list[str]:
    """Sample texts from the model and log it."""
    logger.info("sampling %d texts of %d tokens from the model", n, length)
    return sampled_texts(model, n, length=length, seed=seed, progress=progress)
