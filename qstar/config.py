"""The knobs of Quiet-STaR, named as in the paper's recipe (arXiv 2403.09629)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

THINKING_POSITIONS = ("all", "random", "uncertain")
ADVANTAGES = ("paper", "normalized")
WRITERS = ("self", "base")


@dataclass(frozen=True)
class QuietStarConfig:
    """What is computed in a training step. Defaults are the paper's recipe (authors' n_ahead 12 =
    thought_length + 3).

    A thought is `<start> c_1 .. c_k <end>` with k = thought_length; m = talk_length true tokens are scored
    after it; R = num_thoughts are sampled for each thinking position.

    Raises ValueError, naming the field, its value and what is allowed.
    """

    thought_length: int = field(
        default=9, metadata={"help": "Sampled tokens in a thought; 0: only its boundaries."}
    )
    talk_length: int = field(
        default=4, metadata={"help": "True tokens scored after each thought, at least 1."}
    )
    num_thoughts: int = field(default=2, metadata={"help": "Thoughts sampled at each thinking position."})
    thinking_positions: str = field(
        default="all",
        metadata={
            "help": "Where to think: all, random, or uncertain (highest entropy of the base prediction)."
        },
    )
    thinking_fraction: float = field(
        default=1.0, metadata={"help": "Share of positions that think, for random and uncertain; in (0, 1]."}
    )
    thought_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of sampling a thought; 0 is argmax."}
    )
    reinforce_temperature: float = field(
        default=3.0, metadata={"help": "Temperature of the log-probability in the policy loss."}
    )
    policy_weight: float = field(
        default=1e6, metadata={"help": "Weight of the policy loss; 0 leaves it out."}
    )
    base_weight: float = field(
        default=0.5,
        metadata={"help": "Share of the plain next-token loss; the mixed loss has the rest; in [0, 1]."},
    )
    talk_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the NLL after a thought alone (w = 1), added to the loss; 0 leaves it out."
        },
    )
    advantage: str = field(
        default="paper",
        metadata={
            "help": "paper: the positive part of the centred rewards; normalized: that, divided by their "
            "standard deviation over the batch."
        },
    )
    writer: str = field(
        default="self",
        metadata={
            "help": "Who writes the thoughts: self, the model that learns; base, the base model as it began, "
            "frozen (policy_weight must be 0 then)."
        },
    )
    boundary_scale: float = field(
        default=100.0, metadata={"help": "Learning-rate multiplier of the <start> and <end> embeddings."}
    )
    start_token: str = field(
        default="—",
        metadata={"help": "Text of one token whose embedding <start> begins from; for a dash, some dash."},
    )
    end_token: str = field(default="—", metadata={"help": "The same of <end>."})
    suppressed_tokens: list[int] | None = field(
        default=None,
        metadata={
            "help": "Token ids that never occur inside a thought; default: the tokenizer's special tokens."
        },
    )
    entropy_threshold: float | None = field(
        default=None,
        metadata={"help": "Nats of entropy of the base prediction above which think = adaptive thinks."},
    )
    attention: str = field(default="auto", metadata={"help": "Implementation of thought attention."})
    block_chunk: int | None = field(
        default=None,
        metadata={
            "help": "Slots of thoughts of a row that are computed at once (whole positions, as many as fit), "
            "the others later, and all again in backward: the same gradients in bounded memory; default: all."
        },
    )

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, allowed: str) -> None:
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be {allowed}")

        for name, least in (("thought_length", 0), ("talk_length", 1), ("num_thoughts", 1)):
            value = getattr(self, name)
            require(name, isinstance(value, int) and not isinstance(value, bool), "an integer")
            require(name, value >= least, f"at least {least}")
        require(
            "thinking_positions",
            self.thinking_positions in THINKING_POSITIONS,
            f"one of {THINKING_POSITIONS}",
        )
        require("thinking_fraction", 0 < self.thinking_fraction <= 1, "in (0, 1]")
        if self.thinking_positions == "all":
            require("thinking_fraction", self.thinking_fraction == 1, "1 when thinking_positions is 'all'")
        require("thought_temperature", self.thought_temperature >= 0, "at least 0")
        require("reinforce_temperature", self.reinforce_temperature > 0, "positive")
        require("policy_weight", self.policy_weight >= 0, "at least 0")
        require("base_weight", 0 <= self.base_weight <= 1, "in [0, 1]")
        require("talk_weight", self.talk_weight >= 0, "at least 0")
        require("advantage", self.advantage in ADVANTAGES, f"one of {ADVANTAGES}")
        require("writer", self.writer in WRITERS, f"one of {WRITERS}")
        if self.writer == "base":
            require("policy_weight", self.policy_weight == 0, "0 when writer is 'base', which learns nothing")
        require(
            "entropy_threshold", self.entropy_threshold is None or self.entropy_threshold >= 0, "at least 0"
        )
        chunk = self.block_chunk
        if chunk is not None:
            require("block_chunk", isinstance(chunk, int) and not isinstance(chunk, bool), "an integer")
            least = self.num_thoughts * self.slots
            require("block_chunk", chunk >= least, f"at least {least}, the slots of one position's thoughts")
        require("boundary_scale", self.boundary_scale > 0, "positive")
        for name in ("start_token", "end_token"):
            require(name, bool(getattr(self, name)), "a non-empty text")

    @property
    def slots(self) -> int:
        """Slots of a block: `<start>`, k thought tokens, `<end>` and the talk tokens that are fed (m - 1)."""
        return self.thought_length + 2 + self.talk_length - 1

    @property
    def chunk_positions(self) -> int | None:
        """Thinking positions of a row that are computed at once; None: all."""
        return None if self.block_chunk is None else self.block_chunk // (self.num_thoughts * self.slots)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuietStarConfig:
        """Raises ValueError on an unknown key, instead of dropping it; two of earlier checkpoints, which have
        other names now, are known."""
        values = dict(values)
        if "boundary_token" in values:
            values["start_token"] = values["end_token"] = values.pop("boundary_token")
        if "normalize_advantages" in values:
            values["advantage"] = ADVANTAGES[bool(values.pop("normalize_advantages"))]
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"QuietStarConfig: unknown {unknown}; known are {sorted(known)}")
        return cls(**values)
