"""Register the model `qstar` with EleutherAI's lm-evaluation-harness: every task of it, with thoughts.

Tokens, batches of generation, chat templates and caches are the harness's own (HFLM); what a thought changes
is here. `qstar lm_eval` imports this module and runs the harness.
"""

import logging
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from qstar_kernels.vocabulary import chunk_rows, entropy
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from qstar.evaluation.predictions import Predictions, ThoughtSampling, evaluated, padded, predict
from qstar.generation.loop import THINK
from qstar.model import QuietStarForCausalLM
from qstar.supported import context_length

log = logging.getLogger(f"lm_eval.{__name__}")  # the harness shows its own loggers alone
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # (texts, context, continuation)
Group = tuple[tuple[int, ...], int]  # (tokens, how many of their last positions predict a continuation)
Answer = tuple[float, bool]  # (log-likelihood of a continuation, whether it is the greedy one)


@register_model("qstar")
class QuietStarLM(HFLM):
    """model_args: pretrained, the folder of a checkpoint; think: always, adaptive or never;
    thought_temperature: 0 is argmax; entropy_threshold: for adaptive, default as `qstar calibrate` found;
    dtype; tokenizer, max_length, add_bos_token and prefix_token_id as for the harness's `hf`.

    Log-likelihoods are those of the mixed prediction after a thought at every position that predicts a token
    of the continuation. Raises ValueError for an option out of range.
    """

    def __init__(
        self,
        pretrained: str | QuietStarForCausalLM,
        think: str = "always",
        thought_temperature: float = 0.0,
        entropy_threshold: float | None = None,
        dtype: str = "float32",
        device: str | None = None,
        tokenizer: Any = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
    ):
        if think not in THINK:
            raise ValueError(f"think = {think!r}: must be one of {', '.join(THINK)}")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size = {batch_size!r}: must be a positive number")
        if isinstance(pretrained, str):
            name = pretrained
            if not torch.cuda.is_available() and device != "cpu":  # the harness's default is cuda:0
                log.warning("device = %s: torch sees no GPU, the model runs on the CPU", device)
                device = "cpu"
            model = QuietStarForCausalLM.from_pretrained(pretrained, dtype=dtype).to(device or "cuda")
        else:
            model, name = pretrained, pretrained.name_or_path
        super().__init__(
            model,
            backend="causal",
            tokenizer=tokenizer or AutoTokenizer.from_pretrained(name),
            batch_size=int(batch_size),
            max_length=max_length,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
        )
        self.think = think
        self.thinking = ThoughtSampling(thought_temperature)
        self.entropy_threshold: Any = entropy_threshold
        if entropy_threshold is None:
            self.entropy_threshold = model.quiet_star.entropy_threshold
        if think == "adaptive" and self.entropy_threshold is None:
            raise ValueError("entropy_threshold = None: must be set for think = 'adaptive'")

    @property
    def max_length(self) -> int:
        """Tokens read at once: as many as the context holds beside a thought at the last of them."""
        context = context_length(self.model.config)
        if self._max_length or context is None:
            return super().max_length
        slots = 0 if self.think == "never" else evaluated(self.model.quiet_star).slots
        return context + 1 - slots if slots else context

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        # the choices of a question differ in their last token alone: what is read for one is read for all
        groups: dict[Group, list[int]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            groups[self._read(context, continuation), len(continuation)].append(number)
        order = sorted(groups, key=lambda group: -len(group[0]))
        found: list[Answer] = [(0.0, False)] * len(requests)
        size = override_bs or self.batch_size
        with tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood requests") as bar:
            for first in range(0, len(order), size):
                batch = order[first : first + size]
                numbers = [groups[group] for group in batch]
                continuations = [[requests[number][2] for number in of] for of in numbers]
                asked = [number for of in numbers for number in of]
                for number, answer in zip(asked, self._scored(batch, continuations)):
                    found[number] = answer
                    if requests[number][0] is not None:  # a window of a rolling text has no key
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                bar.update(len(asked))
        return found

    def _read(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """Return the tokens that predict the continuation; too many are cut on the left, with a warning."""
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens: {self.max_length} fit beside a thought"
            )
        whole = (context + continuation)[:-1]
        if len(whole) > self.max_length:
            log.warning("a request of %d tokens is cut to its last %d", len(whole), self.max_length)
        return tuple(whole[-self.max_length :])

    @torch.no_grad()
    def _scored(self, batch: list[Group], asked: list[list[list[int]]]) -> list[Answer]:
        """Return the answers to all continuations asked for after each group, one after the other."""
        rows = [(ids, range(len(ids) - count, len(ids))) for ids, count in batch]
        predictions = self._predictions(*padded(rows, self.device))
        where: list[int] = []
        targets: list[int] = []
        sizes: list[int] = []
        first = 0
        for (_, count), continuations in zip(batch, asked):
            for continuation in continuations:
                where += range(first, first + count)
                targets += continuation
                sizes.append(count)
            first += count
        log_p, best = self._at(predictions, torch.tensor(where), torch.tensor(targets))
        answers = zip(log_p.split(sizes), best.split(sizes))
        return [(float(p.double().sum()), bool(hit.all())) for p, hit in answers]

    def _predictions(self, batch: dict[str, Tensor], at: Tensor) -> Predictions:
        way = "without" if self.think == "never" else "thoughts"
        found = predict(self.model, batch, at, (way,), self.thinking)[way]
        if self.think == "adaptive" and found.weight is not None:
            unsure = entropy(found.base, self.model.linear_head()) > self.entropy_threshold
            found = replace(found, weight=found.weight * unsure)  # 0: as if it had not thought
        return found

    def _at(self, predictions: Predictions, where: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p of targets [N], and whether each is the likeliest, by the predictions `where` [N]: on
        the CPU, and without ever holding all logits."""
        head, found = self.model.linear_head(), []
        rows = chunk_rows(len(head.weight))
        for at, target in zip(where.to(self.device).split(rows), targets.to(self.device).split(rows)):
            log_p = predictions.logits(head, at).log_softmax(-1)
            found.append((log_p.gather(1, target[:, None])[:, 0].cpu(), (log_p.argmax(-1) == target).cpu()))
        log_ps, hits = zip(*found)
        return torch.cat(log_ps), torch.cat(hits)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        if not options.get("do_sample"):
            options = {name: x for name, x in options.items() if name not in ("temperature", "do_sample")}
            options["do_sample"] = False
        eos = self.tokenizer.eos_token_id
        end = None if eos is None else self.tokenizer.decode(eos)
        return self.model.generate(
            context,
            max_new_tokens=max_length - context.shape[1],
            stop_strings=[text for text in stop if text and text != end] or None,
            eos_token_id=eos,
            pad_token_id=self.tokenizer.pad_token_id,
            tokenizer=self.tokenizer,
            think=self.think,
            thought_temperature=self.thinking.temperature,
            entropy_threshold=self.entropy_threshold,
            **options,
        )
