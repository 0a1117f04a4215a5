"""Write one self-contained page of a `Look`: style, script and data are inside, and its own policy allows
nothing else."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qstar.evaluation.held_out import hardest
from qstar.look.thoughts import NOTICED, Look

LEVELS = (NOTICED, 0.1, 0.5, 2.0)  # nats of gain or loss at which the colour changes
HARDEST = 10
UNFINISHED = "\ufffd"  # decoded from bytes that are no whole character
_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}  # of byte-level BPE


def page(found: Look, tokenizer: Any, about: dict[str, Any]) -> str:
    """Return the whole document; about: what else the page says, model and seed."""
    template, style, script = (
        Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    shown = content(found, tokenizer, about)
    data = json.dumps(shown, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # which would end the element, or begin a comment in it
    parts = {"policy": policy, "style": style, "script": script, "data": data}
    return re.sub("@(.*?)@", lambda name: parts[name[1]], template)


def _digest(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def content(found: Look, tokenizer: Any, about: dict[str, Any]) -> dict[str, Any]:
    """Return what the page shows; tokens are numbers in `table`, a prediction [number, probability, ...]."""
    ids = found.token.tolist()
    names = dict.fromkeys([*ids, *found.before[1].flatten().tolist(), *found.after[1].flatten().tolist()])
    place = {token: i for i, token in enumerate(names)}
    special = set(tokenizer.all_special_ids)
    hard = hardest(found.base_nll).nonzero()[:, 0]
    hard = hard[found.base_nll[hard].argsort(descending=True)][:HARDEST]
    config = found.config

    def predictions(likeliest: tuple[Tensor, Tensor]) -> list:
        def flat(values: list, tokens: list) -> list:
            if isinstance(values[0], list):
                return [flat(*x) for x in zip(values, tokens)]
            return [x for p, token in zip(values, tokens) for x in (place[token], round(p, 4))]

        return flat(*(x.tolist() for x in likeliest))

    return {
        "about": {
            **about,
            "thought_length": config.thought_length,
            "talk_length": config.talk_length,
            "num_thoughts": config.num_thoughts,
            "thought_temperature": config.thought_temperature,
        },
        "summary": found.summary(),
        "silent": found.silent,
        "levels": LEVELS,
        "table": [name(token, tokenizer) for token in names],
        "token": [place[token] for token in ids],
        "piece": pieces(ids, tokenizer),
        "special": [i for i, token in enumerate(ids) if token in special],
        "ends": [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id],
        "hardest": (hard + 1).tolist(),
        "thought": [[tokenizer.decode(x) for x in thoughts] for thoughts in found.thought.tolist()],
        **{
            figure: _rounded(getattr(found, figure).tolist())
            for figure in ("base_nll", "mixed_nll", "alone_nll", "mix_weight", "reward")
        },
        "before": predictions(found.before),
        "after": predictions(found.after),
    }


def _rounded(x: Any) -> Any:
    return [_rounded(y) for y in x] if isinstance(x, list) else round(x, 4)


def pieces(ids: list[int], tokenizer: Any) -> list[str]:
    """Return what each token adds to the decoded text: nothing for a token that only begins a character which
    a later one ends. All of them joined are the text."""
    found: list[str] = []
    first = done = 0  # the tokens between them are whole characters, the context of what comes next
    for i in range(len(ids)):
        text = tokenizer.decode(ids[first : i + 1])
        if text.endswith(UNFINISHED) and i + 1 < len(ids):
            found.append("")
            continue
        found.append(text[len(tokenizer.decode(ids[first:done])) :])
        first, done = done, i + 1
    return found


def name(token: int, tokenizer: Any) -> str:
    """Return a token alone as text; a part of a character is named by its bytes, as ⟨E2 80⟩."""
    text = tokenizer.decode([token])
    if UNFINISHED not in text:
        return text
    raw = tokenizer.convert_ids_to_tokens(token)
    known = all(c in _BYTES for c in raw)
    return f"⟨{' '.join(f'{_BYTES[c]:02X}' for c in raw) if known else raw.strip('<>')}⟩"
