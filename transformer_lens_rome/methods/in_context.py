"""In-context editing: the new fact stands before every prompt, and no weight changes.

RippleEdits found this to be better than the editing of weights (Cohen et al. 2024,
arXiv:2307.12976, section 5), so it is the baseline of what an edit implies. The released code of
that paper writes "Imagine that" before the fact: `InContext(template="Imagine that {}.")`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from transformer_lens_rome.edits.context_edit import ContextEdit
from transformer_lens_rome.edits.kinds import EditRequest
from transformer_lens_rome.methods.base import register_method
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import join


@dataclass(frozen=True)
class InContext:
    """Statements of facts as an `EditMethod`.

    Attributes:
        template: The statement of a fact, with one `{}` for its prompt and its new target.
    """

    name: ClassVar[str] = "in-context"
    template: str = "{}."

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1:
            raise ValueError(
                f"the template {self.template!r:.80} needs exactly one '{{}}', which the fact "
                "replaces, as in 'Imagine that {}.'"
            )

    @model_call
    def compute(self, model: Model, request: EditRequest, *, seed: int = 0) -> ContextEdit:
        """Return the statement of one fact."""
        return self.compute_many(model, [request], seed=seed)

    @model_call
    def compute_each(
        self,
        model: Model,
        requests: Sequence[EditRequest],
        *,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> list[ContextEdit]:
        """Return the statement of each fact."""
        return [self.compute(model, request, seed=seed) for request in requests]

    @model_call
    def compute_many(
        self, model: Model, requests: Sequence[EditRequest], *, seed: int = 0
    ) -> ContextEdit:
        """Return one text with the statements of all facts, in their order."""
        facts = [join(request.text, request.target_new) for request in requests]
        text = "".join(self.template.replace("{}", fact) + " " for fact in facts)
        config = {"template": self.template}
        return ContextEdit(request=requests[0], text=text, facts=tuple(requests), config=config)


register_method("in-context", InContext)
