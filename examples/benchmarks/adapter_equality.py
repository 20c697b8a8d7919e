"""An edit as a LoRA adapter under PEFT, against the exported checkpoint: differences and answers.

    python examples/benchmarks/adapter_equality.py [--model smollm2]

Edits one fact of a demo model. Prints the size of the files, the largest difference of logits for
the edited prompt and for 128 tokens of any text, whether the base model comes back, whether merging
gives the exported weights, and what 8-bit and 4-bit copies say with the adapter. Needs the extras
`share` and `demo`, and bitsandbytes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from transformer_lens_rome import applied, compute_rome_edit, export_hf, export_lora
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.demo.gemma import REQUEST
from transformer_lens_rome.demo.load import load_demo_hf

COPIES = {
    "8-bit": {"load_in_8bit": True},
    "4-bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits of one text, `[pos, d_vocab]`."""
    return model(ids).logits[0].float()


def says(model: Any, ids: torch.Tensor, tokenizer: Any) -> str:
    """The most probable next token, and its probability."""
    p, token = logits(model, ids)[-1].softmax(-1).max(0)
    return f"{tokenizer.decode(token)!r} {p:.3f}"


def main() -> None:
    """Edit, export twice, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("gemma", "smollm2"), default="gemma")
    name = parser.parse_args().model
    model = load_demo_model(name)
    edit = compute_rome_edit(model, REQUEST, progress=False)
    base, tokenizer = load_demo_hf(name)
    with tempfile.TemporaryDirectory() as work:
        adapter = export_lora(model, edit, Path(work) / "adapter", hf_model=base)
        edit.save(Path(work) / "edit")
        for file in (*sorted(adapter.iterdir()), Path(work) / "edit"):
            print(f"{file.name}: {file.stat().st_size:,} bytes")
        with applied(model, edit):
            folder = export_hf(model, Path(work) / "whole", hf_model=base)
        del model
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        prompt = AutoTokenizer.from_pretrained(folder)(REQUEST.text, return_tensors="pt").input_ids
        texts = {"edited prompt": prompt, "128 tokens": 97 * torch.arange(2, 130)[None]}
        before = {text: logits(base, ids) for text, ids in texts.items()}
        says_before = says(base, prompt, tokenizer)
        base.save_pretrained(Path(work) / "base")
        adapted = PeftModel.from_pretrained(base, adapter).eval()
        for text, ids in texts.items():
            exported, found = logits(whole, ids), logits(adapted, ids)
            with adapted.disable_adapter():
                same = torch.equal(logits(adapted, ids), before[text])
            worst, largest = (x.abs().max().item() for x in (found - exported, exported))
            print(f"{text}: differs by {worst:.1e} of {largest:.1f}; off, base's bits: {same}")
        print(f"without the edit {says_before}, exported {says(whole, prompt, tokenizer)}")
        merged = adapted.merge_and_unload().state_dict()
        gap = max((merged[n] - x).abs().max().item() for n, x in whole.state_dict().items())
        print(f"merged: largest difference of a weight {gap:.1e}")
        for copy, options in COPIES.items():
            config = BitsAndBytesConfig(**options)
            small = AutoModelForCausalLM.from_pretrained(
                Path(work) / "base", quantization_config=config, device_map="cpu"
            )
            plain = says(small, prompt, tokenizer)
            edited = says(PeftModel.from_pretrained(small, adapter), prompt, tokenizer)
            print(f"{copy} copy: {plain}, with the adapter {edited}")


if __name__ == "__main__":
    main()
