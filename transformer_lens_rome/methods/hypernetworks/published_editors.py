"""Convert the trained editors of the ROME paper without running code from a pickle.

    GPT-2 XL     efk-1tok-gpt2-xl.pt                               ke
                 efk-1tok-counterfact-gpt2-xl.pt                   ke-cf
                 mend-10tok-gpt2-xl.pt                             mend
                 mend-1tok-counterfact-gpt2-xl.pt                  mend-cf
    GPT-J        mend-10tok-gpt-j-6b.pt                            mend

Such a file is a zip that contains a pickle. The tensors are under "model". The optimizer's state is
never loaded into memory. A Hugging Face configuration object is replaced by an inert one. A file
that needs any other class is rejected before any of its code runs.

The published names of the tensors, and the names here:

    MEND  mend.(d_in, d_out).u_mean, u_std, k           moments of x; with v: of delta
          mend.(d_in, d_out).mlp.layers.0, 1            the layers for that shape
          edit_lrs                                      alpha
    KE    editor.condition.embedding.weight             rows, of all tokens
          editor.condition.lstm._module, .linear        the LSTM, the linear layer
          editor.conditioners                           the heads

MEND numbers the matrices of a shape, and the alphas, in a configuration file's order, `_ORDER`. Its
factors are x and delta for any layout of a matrix; KE's are rows and columns of GPT-2's
`[d_in, d_out]`. So both fit without a change. The training facts of these editors are not known,
and `has_seen` is always False.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformer_lens_rome.methods.hypernetworks.hypernetwork import MatrixName, Shapes, base_matrix
from transformer_lens_rome.methods.hypernetworks.knowledge_editor import KnowledgeEditor
from transformer_lens_rome.methods.hypernetworks.mend import Mend
from transformer_lens_rome.methods.hypernetworks.recipe import Recipe
from transformer_lens_rome.methods.hypernetworks.trained_editor import TrainedEditor
from transformer_lens_rome.model import adapter, refusals
from transformer_lens_rome.model.adapter import Weight
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model

_ORDER: dict[str, tuple[MatrixName, ...]] = {
    "GPT2LMHeadModel": ("W_out", "W_in"),
    "GPTJForCausalLM": ("W_in", "W_out"),
}
_STRIP = (
    "If you trust the file enough to let it run code, strip it once, in a separate process with "
    "transformers installed, and convert the new file:\n"
    "python -c \"import sys, torch; found = torch.load(sys.argv[1], map_location='cpu', "
    "weights_only=False)['model']; torch.save({k: v for k, v in found.items() if "
    'torch.is_tensor(v)}, sys.argv[2])" old.pt new.pt'
)


class _Config:
    """An inert replacement of a Hugging Face configuration; it only stores the values."""

    values: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.values = dict(state)


_STAND_INS = [
    type(f"{name}Config", (_Config,), {"__module__": f"transformers.models.{file}"})
    for name, file in (("GPT2", "gpt2.configuration_gpt2"), ("GPTJ", "gptj.configuration_gptj"))
]


@model_call
def convert_editor(path: Any, model: Model, *, counterfact: bool, out: Any = None) -> TrainedEditor:
    """Turn one of the paper's editor files into a trained editor.

    Args:
        path: A local copy of the published file, or that file stripped to its tensors.
        model: The model that the editor was trained for, loaded without weight processing, in the
            dtype in which it will be edited; edits on it do not matter.
        counterfact: Whether the editor was trained on CounterFact; see the file's name.
        out: A safetensors file to write the editor to.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError, NotImplementedError: the file contains no such editor; or the model is another
            one, or its weights were processed.
    """
    weights = {where: base_matrix(model, where) for where in _matrices(model)}
    state = dict(_read(Path(path)))
    _check_config(path, model, state.pop("model_config", None))
    kind = "ke" if "editor.condition.embedding.weight" in state else "mend"
    if kind == "ke" and "GPT2" not in adapter.architecture(model):
        raise ValueError(f"{path} is a KE editor, and those are for GPT-2 only; load GPT-2 XL")
    recipe = (Mend if kind == "mend" else KnowledgeEditor)(counterfact=counterfact)
    tensors = _converted(path, recipe, state, model, weights)
    info = {
        "kind": kind,
        "counterfact": counterfact,
        "matrices": [[*where] for where in weights],
        "hashes": [adapter.weight_hash(weight) for weight in weights.values()],
        "d_model": model.cfg.d_model,
        "model": adapter.model_name(model),
        "prepend_bos": False,
        "settings": {"published": Path(path).name, "trained on": "records that are not known"},
        "train": [],
        "validation": [],
    }
    editor = recipe.trained(tensors, info)
    if out is not None:
        editor.save(out)
    return editor


def _matrices(model: Model) -> list[Weight]:
    """Return the edited matrices in the published order.

    Raises:
        ValueError, NotImplementedError: the weights were processed, or there are no editors for
            this architecture.
    """
    if (order := _ORDER.get(adapter.architecture(model))) is None:
        raise NotImplementedError(
            f"no editors were published for {adapter.architecture(model)}, only for GPT-2 and "
            "GPT-J; train one with fit(model, ...)"
        )
    layers = range(max(0, model.cfg.n_layers - 3), model.cfg.n_layers)
    refusals.check_editable(model, layers)
    last = base_matrix(model, Weight("W_out", layers[-1])).float()
    centred = last.mean(1).norm() < 1e-3 * last.std(1).norm()
    if centred or model.cfg.normalization_type == "LNPre":
        raise ValueError(
            "this model's weights were folded or centred, so they differ from those that the "
            "editor was trained for; load it with from_pretrained_no_processing(...)"
        )
    adapter.hf_model(model)  # raises for a bridge that was processed in other ways
    return [Weight(name, layer) for layer in layers for name in order]


def _read(path: Path) -> Mapping[str, Any]:
    """Read the entries under "model", or all entries of a stripped file, without running code."""
    if not path.is_file():
        kind = ValueError if path.exists() else FileNotFoundError
        raise kind(f"no file {path}; give the .pt file itself")
    allowed = getattr(torch.serialization, "safe_globals", lambda classes: nullcontext())
    try:
        with zipfile.ZipFile(path) as file:
            if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
                raise ValueError("its parts are compressed, which torch.save never does")
        with allowed(_STAND_INS):  # mmap: only the tensors that are used leave the disk
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken pickle can end in any error
        needed = re.search(r"GLOBAL (\S+)", str(error))  # torch's advice does not fit such files
        reason = f"it needs {needed[1]}" if needed else str(error)[:200]
        raise ValueError(
            f"{path} cannot be read without running code from it, or is truncated: compare its "
            f"size with the published file's ({type(error).__name__}: {reason}). {_STRIP}"
        ) from error
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f'{path} has no dictionary of tensors, at the top level or under "model"')
    return {re.sub(r"^gtn\.", "mend.", name): value for name, value in state.items()}


def _check_config(path: Any, model: Model, config: Any) -> None:
    """Raise ValueError if the file has the configuration of another model."""
    if not isinstance(config, _Config):
        return
    own = (adapter.architecture(model)[:4], model.cfg.n_layers, model.cfg.d_model)
    sizes = [config.values.get(name) for name in ("n_layer", "n_embd")]
    sizes = [size if type(size) is int else None for size in sizes]  # a file may contain anything
    if (other := (type(config).__name__[:4], *sizes)) != own:
        raise ValueError(
            f"{path} is for the model {other} (architecture, depth, width), got {own}; load the "
            "model that the editor was trained for"
        )


def _mend_names(shapes: Shapes) -> Iterator[tuple[str, str]]:
    """Yield pairs of the name here and the published name; `?` marks one that is only checked."""
    yield "alpha", "edit_lrs"
    for key in {str(shape): None for shape in shapes.values()}:
        own, their = f"editors.{key}", f"mend.{key}"
        for side, letter in (("x", "u"), ("delta", "v")):
            yield f"{own}.{side}.mean", f"{their}.{letter}_mean"
            yield f"{own}.{side}.squares", f"{their}.{letter}_std"
            yield f"?{own}.{side}.squares", f"{their}.{letter}_s"
            yield f"{own}.{side}.n", f"{their}.k"
        for i in (0, 1):
            for name in ("u", "v", "bias"):
                yield f"{own}.layers.{i}.{name}", f"{their}.mlp.layers.{i}.{name}"
            for name in ("scale", "shift"):
                yield f"{own}.layers.{i}.{name}", f"{their}.mlp.layers.{i}.mode_{name}.weight"


def _ke_names(shapes: Shapes) -> Iterator[tuple[str, str]]:
    """Yield pairs of the name here and the published name."""
    yield "condition.rows", "editor.condition.embedding.weight"
    for direction in ("", "_reverse"):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            name = f"lstm.{{}}{name}_l0{direction}"
            yield f"condition.{name.format('')}", f"editor.condition.{name.format('_module.')}"
    for name in ("weight", "bias"):
        yield f"condition.linear.{name}", f"editor.condition.linear._linear_layers.0.{name}"
    for where in shapes:
        matrix = {"W_out": "c_proj", "W_in": "c_fc"}[where.name]
        head = f"editor.conditioners.transformer_h_{where.layer}_mlp_{matrix}_weight_conditioner"
        for i, name in ((0, "inner"), (2, "outer")):
            own, their = f"heads.{where.name}_{where.layer}.{name}", f"{head}.conditioners.{i}"
            yield f"{own}.bias", f"{their}.bias"
            yield f"{own}.parametrizations.weight.original0", f"{their}.weight_g"
            yield f"{own}.parametrizations.weight.original1", f"{their}.weight_v"


def _converted(
    path: Any,
    recipe: Recipe,
    state: Mapping[str, Any],
    model: Model,
    weights: Mapping[Weight, Tensor],
) -> dict[str, Tensor]:
    """Return the network's tensors under the names used here; check every published tensor."""
    shapes = {where: (weight.shape[0], weight.shape[1]) for where, weight in weights.items()}
    names = dict((_mend_names if recipe.kind == "mend" else _ke_names)(shapes))
    missing, other = set(names.values()) - set(state), set(state) - set(names.values())
    if missing or other:
        raise ValueError(
            f"{path} is not a {recipe.kind} editor for this model: it lacks {sorted(missing)[:3]} "
            f"({len(missing)} tensors) and has the unknown {sorted(other)[:3]} ({len(other)}); "
            "load the model that the editor was trained for"
        )
    n_tokens, d_model = model.cfg.d_vocab, model.cfg.d_model
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        rows, tokens = torch.zeros(n_tokens + 1, d_model), torch.arange(n_tokens + 1)
        network = recipe.new_network(shapes, rows, tokens).state_dict()
    tensors = {}
    for own, their in names.items():
        tensor = _checked(path, their, state[their], tuple(network[own.lstrip("?")].shape))
        if not own.startswith("?"):
            tensors[own] = tensor.detach().clone(memory_format=torch.contiguous_format)
    if recipe.kind == "ke":  # the last row is of [PAD], which no text contains
        tensors["condition.rows"] = tensors["condition.rows"][:-1].clone()
        tensors["condition.tokens"] = torch.arange(n_tokens)
    for own in [own for own in tensors if own.endswith(".squares")]:
        n, std = tensors[own.replace("squares", "n")].double(), tensors[own].double()
        if n < 2 or (std < 0).any():
            raise ValueError(f"{path}: {names[own]} is not a standard deviation; use another file")
        tensors[own] = (std.square() * (n - 1)).float()  # from which `Moments` computes that std
    return tensors


def _checked(path: Any, name: str, tensor: Any, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor; raise ValueError unless it is dense, float32, finite and of this shape."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        received = type(tensor).__name__
    elif tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
        received = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
    elif not torch.isfinite(tensor).all():
        raise ValueError(f"{path}: {name} contains NaN or infinity; download the file again")
    else:
        return tensor
    raise ValueError(
        f"{path}: {name} should be a dense torch.float32 of shape {shape} for this model, it is a "
        f"{received}; load the model that the editor was trained for"
    )
