"""Run a training step the published way, over any causal LM: a baseline of `qstar bench step`.

What the authors' code does (ezelikman/quiet-star, 892446b, its training forward), written anew: the text is
repeated for each of the R thoughts; one pass over all T positions for the text, each thought slot and each
talk token, its inputs waiting for the pass before; a dense mask [T, T * passes] that grows by T columns a
pass; all logits of every pass, twice (of the thought, and of the mixture, whose NLLs are made for all passes
though the loss takes the last m); the next input as a one-hot product with the whole embedding table; the
graph of all passes kept for one backward. It gives the loss that ours gives for the same thoughts, which the
bench checks.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gumbel_softmax, log_softmax, one_hot
from transformers import DynamicCache

from qstar import QuietStarForCausalLM, objective
from qstar.supported import text_body


def published_step(model: QuietStarForCausalLM, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (loss, thoughts [B, T - 1, R, k]) of input_ids [B, T], every position thinking, no padding."""
    config, base = model.quiet_star, model.base
    k, m, R = config.thought_length, config.talk_length, config.num_thoughts
    B, T = input_ids.shape
    text = input_ids.repeat_interleave(R, dim=0)  # [B * R, T]
    table = base.get_input_embeddings().weight
    cache = DynamicCache()
    embedding = base.get_input_embeddings()(text)
    hidden = _pass(model, embedding, 0, cache)
    base_hidden, base_logits = hidden, base.get_output_embeddings()(hidden)
    nlls, base_nlls, log_probabilities, thoughts = [], [], [], []
    choice = torch.empty(0)  # the next input, one-hot
    for i in range(1, k + 2 + m):
        # pass 1 reads <start>, 2 .. k + 1 the thought, k + 2 <end>, the rest talk tokens x_{t+1}, x_{t+2} ..
        if i == 1:
            embedding = model.boundary.start.to(table.dtype).expand_as(embedding)
        elif i == k + 2:
            embedding = model.boundary.end.to(table.dtype).expand_as(embedding)
        else:
            embedding = choice.to(table.dtype) @ table
        hidden = _pass(model, embedding, i, cache)
        j = max(0, i - (k + 2))
        at = base_hidden.roll(-j, dims=1)
        w = model.mixing(at, hidden)[..., None]
        mixed = _high(base.get_output_embeddings()((1 - w) * at + w * hidden))
        scores = _high(base.get_output_embeddings()(hidden))
        scores[..., model.suppress] = -1e10
        target = text.roll(-1 - j, dims=1)
        nlls.append(cross_entropy(mixed.transpose(1, 2), target, reduction="none"))
        if i <= k:
            choice = gumbel_softmax(scores, hard=True).detach()
            log_p = log_softmax(scores / config.reinforce_temperature, dim=-1)
            thoughts.append(choice.argmax(-1))
            log_probabilities.append(log_p.gather(2, thoughts[-1][..., None])[..., 0])
        elif i >= k + 2:
            plain = _high(base_logits).roll(-j, dims=1).transpose(1, 2)
            base_nlls.append(cross_entropy(plain, target, reduction="none"))
            choice = one_hot(target, len(table))
    return _loss(model, (B, T, R), nlls[-m:], base_nlls, log_probabilities), _by_text(thoughts, B, R)[:, :-1]


def _high(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _pass(model: QuietStarForCausalLM, embedding: Tensor, i: int, cache: DynamicCache) -> Tensor:
    """Run pass i over [B * R, T]: position t sees the text up to t, and slots 1 .. i of its own thought."""
    rows, T = embedding.shape[:2]
    device = embedding.device
    sees = torch.eye(T, dtype=torch.bool, device=device).repeat(1, i + 1)
    sees[:, :T] = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    mask = torch.zeros(T, T * (i + 1), dtype=embedding.dtype, device=device)
    mask = mask.masked_fill(~sees, torch.finfo(embedding.dtype).min).expand(rows, 1, -1, -1).contiguous()
    positions = torch.arange(T, device=device)[None] + i
    return text_body(model.base)(
        inputs_embeds=embedding,
        attention_mask=mask,
        position_ids=positions.expand(rows, T),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state


def _by_text(steps: list[Tensor], B: int, R: int) -> Tensor:
    """Stack steps of [B * R, T] as [B, T, R, steps]."""
    if not steps:
        raise ValueError("thought_length = 0: the published way needs at least 1")
    x = torch.stack(steps, dim=-1)
    return x.view(B, R, *x.shape[1:]).transpose(1, 2)


def _loss(model, sizes: tuple[int, int, int], nlls, base_nlls, log_probabilities) -> Tensor:
    """Compute the published loss; targets past the end of the text are left out."""
    config, (B, T, R) = model.quiet_star, sizes
    m, device = config.talk_length, nlls[0].device
    reach = torch.arange(T, device=device)[:, None] + torch.arange(m, device=device) + 1
    valid = (reach < T)[None, :, None].expand(B, T, 1, m)
    nll, base_nll = _by_text(nlls, B, R), _by_text(base_nlls, B, R)
    mixed_loss, _ = objective.mixed_loss(nll, valid)
    rewarded = (torch.arange(T, device=device) <= T - 2 - m)[None].expand(B, T)
    reward = objective.reward(base_nll[:, :, :1], nll.detach(), valid)
    advantage = objective.advantage(reward, rewarded, config.advantage)
    log_p = _by_text(log_probabilities, B, R).sum(-1)
    weights = objective.policy_weights(advantage, config.thought_length, rewarded.sum() * R)
    base_loss = base_nll[:, :-1, 0, 0].mean()
    nll_loss = config.base_weight * base_loss + (1 - config.base_weight) * mixed_loss
    return nll_loss - config.policy_weight * (weights * log_p).sum()
