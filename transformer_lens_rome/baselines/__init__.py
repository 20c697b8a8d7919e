"""The methods that ROME is compared with; each registers itself by name."""

from transformer_lens_rome.baselines.fine_tuning import FineTuning
from transformer_lens_rome.baselines.knowledge_editor import KnowledgeEditor
from transformer_lens_rome.baselines.knowledge_neurons import KnowledgeNeurons
from transformer_lens_rome.baselines.mend import Mend
from transformer_lens_rome.baselines.published_editors import convert_editor
from transformer_lens_rome.baselines.training import Training

__all__ = [
    "FineTuning",
    "KnowledgeEditor",
    "KnowledgeNeurons",
    "Mend",
    "Training",
    "convert_editor",
]
