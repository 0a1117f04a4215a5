"""What an evaluation must find, the slow way: plain forwards of one position at a time, nothing shared."""

import copy
from collections.abc import Callable, Iterable

import torch
from tiny_models import plain_slots
from torch import Tensor
from transformers import AutoModelForCausalLM

from qstar import QuietStarForCausalLM
from qstar.supported import text_body


class SlowPredictions:
    """Predictions of a model by its eager twin."""

    def __init__(self, model: QuietStarForCausalLM):
        self.model = model
        config = copy.deepcopy(model.base.config)
        self.twin = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        self.twin.load_state_dict(model.base.state_dict())
        self.twin.eval()

    @torch.no_grad()
    def greedy_thought(self, prefix: list[int]) -> list[int]:
        thought: list[int] = []
        while len(thought) < self.model.quiet_star.thought_length:
            scores = self.twin.get_output_embeddings()(self._slots(prefix, thought)[len(thought)])
            scores[self.model.suppress] = -torch.inf
            thought.append(int(scores.argmax()))
        return thought

    def _slots(self, prefix: list[int], thought: list[int]) -> Tensor:
        nothing = torch.empty(0, dtype=torch.long)
        ids = torch.tensor(prefix), torch.tensor(thought, dtype=torch.long), nothing
        return plain_slots(self.model, self.twin, *ids)

    @torch.no_grad()
    def logits(self, prefix: list[int], thought: list[int] | None = None) -> Tensor:
        """[V] after the prefix; with a thought, mixed with those after it."""
        base = text_body(self.twin)(input_ids=torch.tensor([prefix])).last_hidden_state[0, -1]
        if thought is not None:
            after = self._slots(prefix, thought)[-1]
            w = self.model.mixing(base, after)
            base = (1 - w) * base + w * after
        return self.twin.get_output_embeddings()(base)

    def with_thought(self, prefix: list[int]) -> Tensor:
        return self.logits(prefix, self.greedy_thought(prefix))


def teacher_forced(
    ids: list[int], scored: Iterable[int], allowed: Iterable[int], predict: Callable[[list[int]], Tensor]
) -> tuple[float, bool]:
    """(product of the probabilities of ids[i] given what is before it, renormalised over `allowed`; whether
    each is the likeliest), i in scored."""
    product, best = 1.0, True
    allowed = list(allowed)
    for i in scored:
        p = predict(ids[:i]).double()[allowed].softmax(0)
        product *= float(p[allowed.index(ids[i])])
        best = best and int(p.argmax()) == allowed.index(ids[i])
    return product, best
