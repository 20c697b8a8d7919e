"""The released KE and MEND once more: on Hugging Face models, and token by token.

A second writing of what the paper's repository computes, by which our own can be told right or
wrong. The modules are nested and named so that their state dicts are those of the published files.
"""

from collections import OrderedDict
from datetime import datetime

import torch
from torch import nn

from transformer_lens_rome.model.adapter import Weight

MODULES = {"gpt2": ("c_proj", "c_fc"), "gptj": ("fc_in", "fc_out")}
OURS = {"c_proj": "W_out", "c_fc": "W_in", "fc_in": "W_in", "fc_out": "W_out"}


class LowRank(nn.Module):
    def __init__(self, width, n_modes):
        super().__init__()
        self.u = nn.Parameter(torch.randn(width, width) / width)
        self.v = nn.Parameter(torch.randn(width, width) / 4)
        self.mode_shift = nn.Embedding(n_modes, width)
        self.mode_scale = nn.Embedding(n_modes, width)
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, z, mode):
        y = self.u @ (self.v @ z) + self.bias
        y = y * self.mode_scale.weight[mode] + self.mode_shift.weight[mode]
        return z + torch.where(y > 0, y, torch.zeros_like(y))


class Transform(nn.Module):
    """One shape's network; in training mode its first token starts the statistics anew."""

    def __init__(self, d_in, d_out, n_modes):
        super().__init__()
        for name, width in (("u", d_in), ("v", d_out)):
            for part in ("mean", "std", "s"):
                self.register_buffer(f"{name}_{part}", torch.full((width,), torch.nan))
        self.register_buffer("k", torch.full((1,), torch.nan))
        self.mlp = nn.Module()
        self.mlp.layers = nn.ModuleList(LowRank(d_in + d_out, n_modes) for _ in range(2))
        self.started = False

    def see(self, name, vector):
        mean, s = getattr(self, f"{name}_mean"), getattr(self, f"{name}_s")
        if self.k == 1:
            mean, s = vector.clone(), torch.zeros_like(vector)
        else:
            new = mean + (vector - mean) / self.k
            mean, s = new, s + (vector - mean) * (vector - new)
        setattr(self, f"{name}_mean", mean)
        setattr(self, f"{name}_s", s)
        setattr(self, f"{name}_std", (s / (self.k - 1)) ** 0.5)

    def forward(self, x, delta, mode):
        pairs = [(a, b) for a, b in zip(x, delta, strict=True) if a.any() and b.any()]
        for a, b in pairs if self.training else ():
            self.k = self.k + 1 if self.started else torch.ones(1)
            self.started = True
            self.see("u", a)
            self.see("v", b)
        total = 0
        for a, b in pairs:
            z = torch.cat(
                [
                    (a - self.u_mean) / (self.u_std + 1e-7),
                    (b - self.v_mean) / (self.v_std + 1e-7),
                ]
            )
            for layer in self.mlp.layers:
                z = layer(z, mode)
            total = total + torch.outer(z[: len(a)], z[len(a) :])
        return total


class ReleasedMend(nn.Module):
    """MEND for the last three blocks; `names` are in the order of the configuration file."""

    def __init__(self, hf, names):
        super().__init__()
        self.names, found = names, dict(hf.named_parameters())
        self.conv = type(hf).__name__.startswith("GPT2")
        self.shapes = {
            n: tuple(found[n].shape) if self.conv else tuple(found[n].shape)[::-1] for n in names
        }
        self.edit_lrs = nn.Parameter(torch.rand(len(names)) / 100)
        self.mend = nn.ModuleDict(
            {str(s): Transform(*s, len(self.modes(s))) for s in {*self.shapes.values()}}
        )
        for transform in self.mend.values():  # as if trained
            for _ in range(9):
                transform.k = transform.k + 1 if transform.started else torch.ones(1)
                transform.started = True
                transform.see("u", torch.randn(len(transform.u_mean)) + 0.5)
                transform.see("v", torch.randn(len(transform.v_mean)) / 50)
            transform.started = False  # which no file holds

    def modes(self, shape):
        return [n for n in self.names if self.shapes[n] == shape]

    @torch.no_grad()
    def updates(self, hf, factors, released):
        """Each matrix's update in its own layout: as released, or as it was trained to be."""
        self.train(released)
        sums = {}
        for name in self.names:
            shape = self.shapes[name]
            sums[name] = self.mend[str(shape)](*factors[name], self.modes(shape).index(name))
        order = [n for n, _ in hf.named_parameters() if n in sums] if released else self.names
        rates = dict(zip(order, self.edit_lrs, strict=True))
        return {n: rates[n] * (s if self.conv else s.T) for n, s in sums.items()}


class Wrapped(nn.Module):
    """Keeps a module, or several, under a name."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class ReleasedKE(nn.Module):
    def __init__(self, hf, names):
        super().__init__()
        d_model, found = hf.config.n_embd, dict(hf.named_parameters())
        norm = nn.utils.weight_norm
        self.names = names
        self.shapes = {name: tuple(found[name].shape) for name in names}
        heads = {
            name.replace(".", "_") + "_conditioner": Wrapped(
                conditioners=nn.Sequential(
                    norm(nn.Linear(768, 512)), nn.Tanh(), norm(nn.Linear(512, 2 * sum(shape) + 1))
                )
            )
            for name, shape in self.shapes.items()
        }
        rows = torch.randn(hf.config.vocab_size + 1, d_model)  # the last is that of [PAD]
        lstm = nn.LSTM(d_model, 512, bidirectional=True, batch_first=True)
        linear = nn.ModuleList([nn.Linear(1024, 768)])
        condition = Wrapped(
            embedding=nn.Embedding(*rows.shape, padding_idx=0, _weight=rows),
            lstm=Wrapped(_module=lstm),
            linear=Wrapped(_linear_layers=linear),
        )
        self.editor = Wrapped(conditioners=nn.ModuleDict(heads), condition=condition)
        with torch.no_grad():  # far from flat, so that each softmax and gate matters
            for head in heads.values():
                for i in (0, 2):
                    head.conditioners[i].weight_g.mul_(5)

    @torch.no_grad()
    def updates(self, ids, gradients):
        """Each matrix's update in its own layout."""
        condition = self.editor.condition
        state = condition.lstm._module(condition.embedding(ids[None]))[1][0]
        h = condition.linear._linear_layers[0](torch.cat([state[0, 0], state[1, 0]])).tanh()
        found = {}
        for name in self.names:
            rows, columns = self.shapes[name]
            out = self.editor.conditioners[f"{name.replace('.', '_')}_conditioner"].conditioners(h)
            col_a, out = out[:columns], out[columns:]
            row_a, out = out[:rows], out[rows:]
            col_b, out = out[:columns], out[columns:]
            row_b, eta = out[:rows], out[rows:]
            a = row_a.softmax(0)[:, None] @ col_a[None]
            b = row_b.softmax(0)[:, None] @ col_b[None]
            found[name] = eta.sigmoid() * (gradients[name] * a + b)
        return found


def inner_names(shape):
    return [f"transformer.h.{i}.mlp.{name}.weight" for i in range(3) for name in MODULES[shape]]


def ours(name):
    _, _, layer, _, module, _ = name.split(".")
    return Weight(OURS[module], int(layer))


def tokens_of(tokenizer, request):
    target = f" {request.target_new}"
    ids = tokenizer(request.text + target).input_ids
    return torch.tensor(ids), len(tokenizer(target).input_ids)


def gradients(hf, names, ids, n_labels):
    """Of the labels' mean NLL: for each matrix x and delta of every token, and the whole."""
    inputs, outputs, handles = {}, {}, []
    for name in names:

        def keep(module, given, output, name=name):
            inputs[name], outputs[name] = given[0], output

        handles.append(hf.get_submodule(name.removesuffix(".weight")).register_forward_hook(keep))
    log_p = hf(ids[None]).logits[0, :-1].log_softmax(-1)
    loss = -log_p[range(len(ids) - 1), ids[1:]][-n_labels:].mean()
    for handle in handles:
        handle.remove()
    parameters = dict(hf.named_parameters())
    n = len(names)
    found = torch.autograd.grad(
        loss, [outputs[name] for name in names] + [parameters[name] for name in names]
    )
    factors = {
        name: (inputs[name][0].detach(), d[0]) for name, d in zip(names, found[:n], strict=True)
    }
    return factors, dict(zip(names, found[n:], strict=True))


def published(module, config, prefix="mend."):
    """What the released trainer writes."""
    state = OrderedDict(
        (name.replace("mend.", prefix), tensor) for name, tensor in module.state_dict().items()
    )
    state["model_config"] = config
    some = [*module.parameters()][:4]  # in truth all of them
    adam = torch.optim.Adam(some, lr=1e-6)
    for parameter in some:
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    return {
        "model": state,
        "opt": adam.state_dict(),
        "lr_opt": None,
        "val_stats": {"loss/total_val": 1.5, "memory/alloc_max_val": 7},
        "start_time": datetime(2021, 10, 1).strftime("%d/%m/%Y-%H:%M:%S/%f"),
        "elapsed_time": 12.5,
        "step": 5000,
    }
