"""The type of the models that this package runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn


class Model(Protocol):
    """A TransformerLens model: `HookedTransformer` (2.x, 3.x) or `TransformerBridge` (3.x, 4.x).

    These are the members that both classes have in every version and that this package uses;
    `adapter` reads what differs.
    """

    @property
    def cfg(self) -> Any:
        """The configuration."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        ...

    @property
    def blocks(self) -> Any:
        """The transformer blocks, from 0."""
        ...

    @property
    def ln_final(self) -> Any:
        """The norm before the unembedding."""
        ...

    @property
    def unembed(self) -> Any:
        """The module of the unembedding."""
        ...

    @property
    def W_E(self) -> Tensor:
        """The embeddings, `[d_vocab, d_model]`."""
        ...

    @property
    def W_U(self) -> Tensor:
        """The unembedding, `[d_model, d_vocab]`."""
        ...

    @property
    def b_U(self) -> Tensor:
        """The bias of the logits, `[d_vocab]`."""
        ...

    @property
    def hook_dict(self) -> dict[str, Any]:
        """The hook points by name."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one forward pass."""
        ...

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Run one forward pass with temporary hooks."""
        ...

    def hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        """Set hooks within a context."""
        ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the parameters."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters with their names."""
        ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules with their names."""
        ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the buffers with their names."""
        ...

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move the model to a device or convert it to a dtype."""
        ...
