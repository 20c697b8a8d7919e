"""Recipes of KE and MEND: their settings; `fit` trains an editor, and `load` reads one."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Signature, signature
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_rome.edits.kinds import EditRequest
from transformer_lens_rome.edits.ledger import check_unedited
from transformer_lens_rome.methods.hypernetworks.hypernetwork import (
    EditorNetwork,
    Shapes,
    matrix,
    matrix_shapes,
    mlp_matrices,
)
from transformer_lens_rome.methods.hypernetworks.trained_editor import (
    TrainedEditor,
    read_editor,
    trained_on,
)
from transformer_lens_rome.methods.hypernetworks.training import Training, run_info, train
from transformer_lens_rome.methods.hypernetworks.training_data import Corpus, Fact, split
from transformer_lens_rome.methods.hypernetworks.training_state import State
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Weight
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder, check_texts
from transformer_lens_rome.prompts.sampling import sampled_texts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe(ABC):
    """A method whose edits are computed by a trained network, before there is one.

    Attributes:
        counterfact: Use the variant that is trained on CounterFact.
        scale: Factor of every change.
        prepend_bos: Whether `fit` prepends BOS. None: as the checkpoint's tokenizer does. Edits use
            the rule of the editor's training.
    """

    counterfact: bool = False
    scale: float = 1.0
    prepend_bos: bool | None = None

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
        model: Model,
        data: Sequence[Fact] | None = None,
        *,
        validation: Sequence[Fact] | None = None,
        locality: Sequence[str] | None = None,
        settings: Training | None = None,
        out: Any = None,
        progress: bool = True,
    ) -> TrainedEditor:
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
        if locality is None and not isinstance(data[0], str):
            locality = _sample_texts(model, 200, 64, settings.seed, progress)
        if locality is not None:
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
        return editor

    def _initialised(
        self, model: Model, matrices: Sequence[Weight], corpus: Corpus, seed: int
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
        tensors = {name: tensor.cpu() for name, tensor in state.best.items()}
        return TrainedEditor(self, tensors, {**info, **run})

    # ------------------------------------------------------------ trained editors

    def load(self, path: Any) -> TrainedEditor:
        """Read an editor that `TrainedEditor.save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a complete editor file, or is an editor of another method.
        """
        return self.trained(*read_editor(path), source=path)

    def trained(
        self, tensors: Mapping[str, Tensor], info: Mapping[str, Any], *, source: Any = "this"
    ) -> TrainedEditor:
        """Return the editor with these tensors and this description.

        Raises:
            ValueError: it is an editor of another method; the message names the `source`.
        """
        kind, counterfact = info["kind"], info["counterfact"]
        if (kind, counterfact) != (self.kind, self.counterfact):
            name = f"{kind:.40}-cf" if counterfact else f"{kind:.40}"
            raise ValueError(
                f"{source} is an editor of {name}; use get_method({name!r}, editor=...)"
            )
        return TrainedEditor(self, tensors, info)

    def prepared(self, model: Model, *, seed: int = 0) -> NoReturn:
        """Raise ValueError: only a trained editor edits."""
        raise ValueError(
            f"{self.name} has to be trained: get_method({self.name!r}).fit(model, ...), or "
            f"get_method({self.name!r}, editor=path) with a file that an editor's save wrote"
        )

    def compute(self, model: Model, request: EditRequest, *, seed: int = 0) -> NoReturn:
        """Raise ValueError: only a trained editor edits."""
        self.prepared(model)


def with_editor(recipe: Callable[..., Recipe]) -> Callable[..., Recipe | TrainedEditor]:
    """Return a factory that has one option more: `editor`, a trained editor or its file.

    Without it the factory returns the recipe, with it the trained editor.
    """

    def make(
        editor: TrainedEditor | str | Path | None = None, **options: Any
    ) -> Recipe | TrainedEditor:
        made = recipe(**options)
        if isinstance(editor, TrainedEditor):
            return made.trained(editor.tensors, editor.info)
        return made if editor is None else made.load(editor)

    own, others = signature(make).parameters, signature(recipe).parameters
    setattr(make, "__signature__", Signature([own["editor"], *others.values()]))
    return make


def _sample_texts(model: Model, n: int, length: int, seed: int, progress: bool) -> list[str]:
    """Sample texts from the model and log it."""
    logger.info("sampling %d texts of %d tokens from the model", n, length)
    return sampled_texts(model, n, length=length, seed=seed, progress=progress)
