"""The text that ships for a demo model: what the model writes itself, from seed 0.

    python examples/scripts/sample_text.py gemma | smollm2 [FOLDER]

`default_second_moment` collects C from it in seconds; sampling it anew takes minutes. FOLDER is
where the file goes (default: the package's own).
"""

import json
import sys
from pathlib import Path

import transformer_lens_rome
from transformer_lens_rome import sampled_texts
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.files.cache import safe_name
from transformer_lens_rome.model.adapter import short_name
from transformer_lens_rome.statistics.sources import key_norms

N_TEXTS = {"gemma": 69, "smollm2": 52}  # with BOS, four tokens for each dimension of a key
LENGTH, SEED = 128, 0

name = sys.argv[1]
model = load_demo_model(name)
texts = sampled_texts(model, N_TEXTS[name], length=LENGTH, seed=SEED)
path = Path(transformer_lens_rome.__file__).parent / "statistics" / "sampled"
path = Path(sys.argv[2]) if len(sys.argv) > 2 else path
path.mkdir(exist_ok=True)
path = path / f"{safe_name(short_name(model))}.json"
written = {
    "model": model.cfg.model_name,
    "seed": SEED,
    "length": LENGTH,
    "key_norms": [round(norm, 4) for norm in key_norms(model).tolist()],
    "texts": texts,
}
path.write_text(json.dumps(written, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
