"""Count the floating-point operations that a training step needs, from the method, not from any code.

Legend: T tokens of a text, N = (T - 1) R thoughts (every position that predicts something), k sampled tokens,
m talk tokens, L = k + m + 1 slots of a thought. A matrix product of a row with n weights is 2 n operations; a
query-key pair is 4 D for each query head and layer; a backward pass is twice its forward.

    plain    = 3 [T body + attention(text) + (T - 1) head]
    thinking = plain                                            the base loss on the same text
             + N k (body + head) + attention(rollout)           sampling: a forward of k slots, head rows
             + 3 [N L body + attention(blocks)]                 all slots, with gradient
             + 3 [sum_j (T - 1 - j) R] (head + mixing)          the mixed predictions, j = 0 .. m - 1
             + 3 [share of thoughts that gain] N k head         the policy term: only those have a gradient

Half of the thoughts gain where their mean is subtracted (R > 1), all may where it is not (R = 1). What an
implementation computes besides (logits made again, masked cells, the optimiser) is its own affair: it shows
as a lower share of the machine's ceiling.
"""

from dataclasses import dataclass

from torch import nn

from qstar import QuietStarForCausalLM
from qstar.supported import text_body


@dataclass(frozen=True)
class StepFlops:
    """Operations of one step over a batch; thinking = prefix + rollout + blocks + loss, plain as above."""

    plain: float
    prefix: float
    rollout: float
    blocks: float
    loss: float

    @property
    def thinking(self) -> float:
        return self.prefix + self.rollout + self.blocks + self.loss


def _weights(model: QuietStarForCausalLM) -> int:
    """Count the weights that every token meets inside the layers; of experts, those that it is sent to."""
    config = model.base.config
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    share = getattr(config, "num_experts_per_tok", experts) / experts if experts else 1.0
    table = model.get_input_embeddings()
    total = 0.0
    for module in text_body(model.base).modules():
        if module is table or isinstance(module, nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 2:
                total += parameter.numel()
            elif parameter.ndim == 3:  # all experts of a layer in one tensor
                total += share * parameter.numel()
    return int(total)


def step_flops(model: QuietStarForCausalLM, B: int, T: int) -> StepFlops:
    """Count the operations for B texts of T tokens each, every position thinking; the model may be on `meta`.
    Sliding windows are not deducted."""
    config, shape = model.quiet_star, model.base.config
    k, m, R, L = config.thought_length, config.talk_length, config.num_thoughts, config.slots
    N = (T - 1) * R
    D = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    pair = 4 * D * shape.num_attention_heads * shape.num_hidden_layers
    body = 2 * _weights(model)
    head = 2 * model.linear_head().weight.numel()
    mixing = 2 * sum(p.numel() for p in model.mixing.parameters())
    prefix_pairs = R * T * (T - 1) / 2  # of one slot of every thought
    gaining = 0.5 if R > 1 else 1.0
    mixed_rows = R * sum(max(0, T - 1 - j) for j in range(m))
    plain = 3 * (T * body + pair * T * (T + 1) / 2 + (T - 1) * head)
    return StepFlops(
        plain=B * plain,
        prefix=B * 3 * (T * body + pair * T * (T + 1) / 2),
        rollout=B * (N * k * (body + head) + pair * (k * prefix_pairs + N * k * (k + 1) / 2)),
        blocks=B * 3 * (N * L * body + pair * (L * prefix_pairs + N * L * (L + 1) / 2)),
        loss=B * 3 * ((T - 1) * head + mixed_rows * (head + mixing) + gaining * N * k * head),
    )
