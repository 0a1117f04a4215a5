"""Configure Quiet-STaR; fields are named as in the paper's recipe (arXiv 2403.09629)."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from qstar.option_checks import check_choice, check_least

THINKING_POSITIONS = ("all", "random", "uncertain")
ADVANTAGES = ("paper", "normalized")
WRITERS = ("self", "base")


def _knob(default: Any, help: str) -> Any:
    # HfArg does the same, but would make `import qstar` import transformers
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class QuietStarConfig:
    """Set what a training step computes; the defaults are the paper's (thought_length 9 is its n_ahead 12).

    R = num_thoughts thoughts `<start> c_1 .. c_k <end>` with k = thought_length are sampled at each thinking
    position, and m = talk_length true tokens are scored after each.

    Raises ValueError, naming the field, its value and what is allowed.
    """

    thought_length: int = _knob(9, "Sampled tokens in a thought; 0: only its boundaries.")
    talk_length: int = _knob(4, "True tokens scored after each thought, at least 1.")
    num_thoughts: int = _knob(2, "Thoughts sampled at each thinking position.")
    thinking_positions: str = _knob(
        "all", "Where to think: all, random, or uncertain (highest entropy of the base prediction)."
    )
    thinking_fraction: float = _knob(1.0, "Share of positions that think if random or uncertain; in (0, 1].")
    thought_temperature: float = _knob(1.0, "Temperature at which thoughts are sampled; 0 is argmax.")
    reinforce_temperature: float = _knob(3.0, "Temperature of the log-probability in the policy loss.")
    policy_weight: float = _knob(1e6, "Weight of the policy loss; 0 leaves it out.")
    base_weight: float = _knob(0.5, "Share of the plain next-token loss in [0, 1]; mixed loss: the rest.")
    talk_weight: float = _knob(0.0, "Weight of an extra loss, the NLL after the thought alone (w = 1).")
    advantage: str = _knob(
        "paper", "paper: positive part of the centred reward; normalized: divided by its standard deviation."
    )
    writer: str = _knob("self", "Model that writes the thoughts: self, or base (frozen; policy_weight is 0).")
    boundary_scale: float = _knob(100.0, "Learning-rate multiplier of the <start> and <end> embeddings.")
    start_token: str = _knob("—", "One token that <start> begins from; a dash may be replaced by another.")
    end_token: str = _knob("—", "One token that <end> begins from; a dash may be replaced by another.")
    suppressed_tokens: list[int] | None = field(
        default=None,
        metadata={"help": "Token ids never sampled in a thought; default: the tokenizer's special tokens."},
    )
    entropy_threshold: float | None = _knob(None, "With think = adaptive: think above this entropy, in nats.")
    attention: str = _knob("auto", "Implementation of thought attention.")
    block_chunk: int | None = _knob(
        None, "Thought slots of a row computed at once, to bound memory; same gradients; default: all."
    )

    def __post_init__(self) -> None:
        integers = ["thought_length", "talk_length", "num_thoughts"]
        integers += ["block_chunk"] if self.block_chunk is not None else []
        for name in integers:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} = {value!r}: must be an integer")
        check_least(self, thought_length=0, talk_length=1, num_thoughts=1, thought_temperature=0)
        check_least(self, policy_weight=0, talk_weight=0, entropy_threshold=0)
        check_choice(self, thinking_positions=THINKING_POSITIONS, advantage=ADVANTAGES, writer=WRITERS)
        least_chunk = self.num_thoughts * self.slots
        for name, holds, allowed in (
            (
                "block_chunk",
                self.block_chunk is None or self.block_chunk >= least_chunk,
                f"at least {least_chunk}, the slots of one position's thoughts",
            ),
            ("thinking_fraction", 0 < self.thinking_fraction <= 1, "in (0, 1]"),
            (
                "thinking_fraction",
                self.thinking_fraction == 1 or self.thinking_positions != "all",
                "1 when thinking_positions is 'all'",
            ),
            ("reinforce_temperature", self.reinforce_temperature > 0, "positive"),
            ("base_weight", 0 <= self.base_weight <= 1, "in [0, 1]"),
            ("policy_weight", self.policy_weight == 0 or self.writer != "base", "0 when writer is 'base'"),
            ("boundary_scale", self.boundary_scale > 0, "positive"),
            ("start_token", self.start_token, "a non-empty text"),
            ("end_token", self.end_token, "a non-empty text"),
        ):
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be {allowed}")

    @property
    def slots(self) -> int:
        """Count the slots of a block: `<start>`, k thought tokens, `<end>` and the m - 1 talk tokens fed."""
        return self.thought_length + 2 + self.talk_length - 1

    @property
    def chunk_positions(self) -> int | None:
        """Count the thinking positions of a row that are computed at once; None: all."""
        return None if self.block_chunk is None else self.block_chunk // (self.num_thoughts * self.slots)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Make a config from what `to_json` wrote. Raises ValueError for an unknown key."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"QuietStarConfig = {unknown}: unknown; must be among {', '.join(known)}")
        return cls(**values)
