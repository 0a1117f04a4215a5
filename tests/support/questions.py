"""Questions of our own in the formats of GSM8K and CommonsenseQA, and tiny checkpoints to ask."""

import json
import random
from pathlib import Path

import torch
from tiny_tokenizer import saved_base_model
from transformers import AutoTokenizer

from qstar import QuietStarConfig, QuietStarForCausalLM

LETTERS = "ABCDE"
WORDS = ["state", "union", "people", "work", "schools", "roads", "farms", "strong", "well", "day"]


def sums_told(count: int, seed: int = 0) -> list[dict]:
    """Records of GSM8K's format."""
    draw, found = random.Random(seed), []
    for i in range(count):
        a, b, what = (
            draw.randrange(2000 if i % 2 else 5),
            draw.randrange(50 if i % 2 else 5),
            draw.choice(WORDS),
        )
        found.append({"question": f"{a} {what} and {b}?", "answer": f"{a} + {b} = <<>>\n#### {a + b:,}"})
    return found


def choices_told(count: int, seed: int = 0) -> list[dict]:
    """Records of CommonsenseQA's format, as on the hub."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        choices = {"label": list(LETTERS), "text": draw.sample(WORDS, 5)}
        found.append(
            {"question": f"the {draw.choice(WORDS)}?", "choices": choices, "answerKey": draw.choice(LETTERS)}
        )
    return found


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(x) + "\n" for x in records))
    return path


def checkpoint(folder: Path, by_hand: bool = False, **knobs) -> Path:
    """A folder of a model that mixes its thoughts in; by_hand: one whose prediction follows from the last
    token alone, since attention and MLP give nothing, and who says a newline after a number or letter."""
    base = saved_base_model(folder / "base", max_position_embeddings=128)
    tokenizer = AutoTokenizer.from_pretrained(base)
    knobs = {"thought_length": 3} | knobs
    model = QuietStarForCausalLM.from_base(str(base), QuietStarConfig(**knobs), dtype="float32")
    torch.manual_seed(0)
    with torch.no_grad():
        model.mixing.layers[-1].weight.normal_(0, 0.5)
        for boundary in (model.boundary.start_raw, model.boundary.end_raw):
            boundary.normal_(0, 0.6 / model.boundary.scale)
        if by_hand:
            for layer in model.base.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            digits_and_letters = tokenizer.convert_tokens_to_ids([*"0123456789", *LETTERS])
            last = model.base.model.embed_tokens.weight[digits_and_letters].sum(0)
            model.base.lm_head.weight[tokenizer.convert_tokens_to_ids("Ċ")] += 0.15 * last
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"
