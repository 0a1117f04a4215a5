"""Teach a frozen model to think with LoRA: adapters in the base model, all weights in the thought parts.

pip install 'qstar[peft]'
python examples/lora.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.demo import TINY_LM  # any folder or hub name of a causal LM

try:
    from peft import LoraConfig, get_peft_model
except ImportError as error:
    raise SystemExit("this example needs peft: pip install 'qstar[peft]'") from error


def main(folder: Path, steps: int = 20) -> dict[str, float]:
    """Train, save, load and merge an adapter; return the mixed NLL (nats per token) after each of these."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM)
    batch = tokenizer(["the king of the north rode out at dawn and did not come back"], return_tensors="pt")
    config = QuietStarConfig(thought_length=4, talk_length=2, policy_weight=1.0)
    model = QuietStarForCausalLM.from_base(str(TINY_LM), config, dtype="float32")
    get_peft_model(model.base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))  # in place

    def nll(of: QuietStarForCausalLM) -> float:
        with torch.no_grad():
            return float(of(**batch, generator=torch.Generator().manual_seed(0)).metrics["mixed_nll"])

    learns = [p for p in model.parameters() if p.requires_grad]
    every = sum(p.numel() for p in model.parameters())
    print(f"{sum(p.numel() for p in learns):,} of {every:,} parameters learn")
    optimizer = torch.optim.AdamW(learns, lr=2e-3)
    found = {"before": nll(model)}
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found["trained"] = nll(model)

    model.save_pretrained(folder / "adapter")  # without the base model's weights
    model = QuietStarForCausalLM.from_pretrained(folder / "adapter", dtype="float32")
    found["loaded"] = nll(model)
    model.merge_adapter().save_pretrained(folder / "merged")  # all weights, in the stock format
    found["merged"] = nll(model)
    AutoModelForCausalLM.from_pretrained(folder / "merged")
    return found


if __name__ == "__main__":
    print(main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/lora")))
