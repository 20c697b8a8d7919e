"""What the tests of KE and MEND share: a text to write, its gradient, and how a model was found."""

import torch

from transformer_lens_rome import EditRequest, get_method
from transformer_lens_rome.methods.hypernetworks.hypernetwork import gradient_factors, mlp_matrices
from transformer_lens_rome.methods.hypernetworks.trained_editor import trained_on
from transformer_lens_rome.methods.hypernetworks.training_data import to_sample
from transformer_lens_rome.model import adapter
from transformer_lens_rome.prompts.encoder import Encoder

REQUEST = EditRequest("The {} is located in", "Space Needle", "the city of Rome", "Seattle")
OTHERS = ("Rome is the capital of Italy.", "He plays", "The mother tongue of Angela Merkel is")


def sample_of(model, request=REQUEST, n_labels=None):
    """The tokens of a request and its target."""
    return to_sample(Encoder.of(model), request, n_labels)


def others_of(model, texts=OTHERS):
    """Token ids of texts of unequal length."""
    rows = [Encoder.of(model).row(text).ids for text in texts]
    assert len({len(ids) for ids in rows}) == len(rows)
    return rows


def factors_of(model, request=REQUEST, matrices=None):
    """The gradient of every matrix of the MLPs, by token."""
    return gradient_factors(model, sample_of(model, request), matrices or mlp_matrices(model))[1]


def dense(factors):
    """The change that two factors make."""
    left, right = factors
    return left @ right


def gradient(factors):
    """The gradient that the factors of all tokens make."""
    return factors.x.T @ factors.delta


def found(model):
    """All that a method must leave as it was: weights, flags, modes, hooks."""
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))  # a bridge sets some hooks of its own at its first pass
    return {
        "weights": {k: adapter.weight_hash(v) for k, v in model.state_dict().items()},
        "flags": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad is None for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "points": [len(point.fwd_hooks) for point in model.hook_dict.values()],
    }


def same_tensors(some, others):
    """Whether two states hold the same bits."""
    return some.keys() == others.keys() and all(torch.equal(some[k], others[k]) for k in some)


def shapes_of(model, matrices=None):
    """The shapes of all matrices of the MLPs, or of some."""
    chosen = matrices or mlp_matrices(model)
    return {where: tuple(adapter.parameter(model, where).shape) for where in chosen}


def random_editor(model, kind, *, seed=0, matrices=None):
    """An editor of random tensors, whose edits are small changes; no training needed."""
    ids = torch.tensor(sorted(set(sample_of(model).ids[2:])))
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        method, shapes = get_method(kind), shapes_of(model, matrices)
        network = method.new_network(shapes, adapter.embeddings(model, ids).cpu(), ids)
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                if kind.startswith("mend"):
                    redraw_mend(name, tensor)
                elif tensor.is_floating_point():
                    tensor.add_(0.05 * torch.randn(tensor.shape))
    own = {"kind": method.kind, "counterfact": method.counterfact, "settings": {}}
    own["prepend_bos"] = Encoder.of(model).prepends_bos
    texts = [REQUEST.text], [OTHERS[0]]
    info = own | trained_on(model, list(shapes), texts, texts)
    return method.trained(network.state_dict(), info)


def redraw_mend(name, tensor):
    """Random values for a tensor of MEND's network, of a size that lets both layers matter."""
    last = name.split(".")[-1]
    if last == "n":
        tensor.fill_(50.0)
    elif last == "squares":
        tensor.uniform_(10.0, 100.0)
    elif last == "alpha":
        tensor.copy_(torch.linspace(1e-3, 5e-3, len(tensor)))
    else:
        scale = {"u": 0.05, "v": 0.05, "scale": 1.0}.get(last, 0.1)
        tensor.add_(scale * torch.randn(tensor.shape))
