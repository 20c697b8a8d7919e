"""The methods that ROME is compared with, on a real pretrained model."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import newest, once_a_class

from transformer_lens_rome import EditRequest, applied, get_method, top_tokens
from transformer_lens_rome.model.fingerprint import Fingerprint

pytestmark = [pytest.mark.real_model, once_a_class]

REQUEST = EditRequest("{} is located in the city of", "The Space Needle", "Paris", "Seattle")
PLACES = {
    "The Colosseum": "Oslo",
    "The Brandenburg Gate": "Madrid",
    "Big Ben": "Cairo",
    "The Kremlin": "Lima",
    "The Alhambra": "Dublin",
    "Red Square": "Vienna",
}
TEXTS = [
    "The river rises in the hills to the north and flows through three lakes before it is wide.",
    "In 1912 the company built a second factory, which made parts of engines for small ships.",
    "She studied mathematics and physics, and later taught at a school near the old harbour.",
    "The film was shot in forty days and was shown to the public in the spring of that year.",
]


@newest
def test_mend_learns_to_edit_and_to_leave_other_text_alone(gemma):
    """Twelve steps: from a loss above the model's own to a tenth of it; other text stays."""
    before = Fingerprint.of(gemma)
    facts = [EditRequest(REQUEST.prompt, name, city) for name, city in PLACES.items()]
    method = get_method("mend-cf")
    settings = dataclasses.replace(
        method.settings(),
        lr=3e-6,
        accumulate=2,
        max_steps=12,
        validate_every=12,
        n_validation=2,
        n_locality=1,
        locality_tokens=12,
    )
    trained = method.fit(
        gemma, facts[:-2], validation=facts[-2:], locality=TEXTS, settings=settings, progress=False
    )
    start, end = trained.info["curve"]
    assert end["edit"] < 0.1 * end["before"] < start["edit"]
    assert end["locality"] < 0.3
    edit = trained.compute(gemma, REQUEST)
    with applied(gemma, edit):
        assert top_tokens(gemma, REQUEST.text, 1)[0][0] == " Paris"
    before.check(gemma, "training and editing")


@newest
def test_knowledge_neurons_are_found_and_written(gemma):
    """With targets as the model sees them, tokens that start with a space."""
    method = get_method("kn", add_space=True, steps=6)
    neurons = method.neurons(gemma, REQUEST)
    assert 1 <= len(neurons) < 0.01 * gemma.cfg.n_layers * gemma.cfg.d_mlp
    edit = method.compute(gemma, REQUEST)
    changed = {(w.layer, int(i)) for w, d in edit.changes().items() for i in d.any(1).nonzero()}
    assert changed == {tuple(neuron) for neuron in neurons}
    assert edit.health.p_after != pytest.approx(edit.health.p_before)
