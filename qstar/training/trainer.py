"""Train with the Hugging Face Trainer, with learning rates for the thought parts and a stop on NaN."""

from collections import defaultdict
from typing import Any

import torch
from transformers import ProgressCallback, Trainer, TrainerCallback

from qstar.objective import gradient_norms
from qstar.training.callbacks import QuietStarCallback


class NonFiniteError(RuntimeError):
    """Report a NaN or infinite loss or gradient, with which no parameter was updated."""


class QuietStarTrainer(Trainer):
    """Train a QuietStarForCausalLM, with `QuietStarCallback` added.

    mixing_learning_rate, boundary_learning_rate: of those parts (default: `args.learning_rate`), the latter
    before the factor `boundary_scale`; gradient_norm_steps: log the gradient norms of the NLL and the policy
    loss every so many steps, at two more backward passes, each process its own; 0: never.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        *arguments: Any,
        mixing_learning_rate: float | None = None,
        boundary_learning_rate: float | None = None,
        gradient_norm_steps: int = 0,
        **options: Any,
    ):
        super().__init__(*arguments, **options)
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor = {self.args.label_smoothing_factor}: must be 0, because the model "
                "computes its loss itself"
            )
        if gradient_norm_steps and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"gradient_norm_steps = {gradient_norm_steps}: must be 0 with FSDP or DeepSpeed, which shard "
                "the gradients"
            )
        self._part_rates = {"mixing": mixing_learning_rate, "boundary": boundary_learning_rate}
        self._gradient_norm_steps = gradient_norm_steps
        self.thoughts = QuietStarCallback(self)
        self.add_callback(self.thoughts)
        if self.pop_callback(ProgressCallback) is not None:  # absent with disable_tqdm
            self.add_callback(ThoughtProgress())
        self.add_callback(_StopBeforeNonFinite())

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            target = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(target))
            own = self.accelerator.unwrap_model(target)
            # by identity, because a wrapper prefixes names, and a base model may have a part of that name
            parts = {id(p): part for part in self._part_rates for p in getattr(own, part).parameters()}
            groups: dict[tuple, list] = defaultdict(list)
            for name, parameter in target.named_parameters():
                if parameter.requires_grad:
                    part = parts.get(id(parameter))
                    # decay would pull the boundary embeddings to zero
                    groups[part, name in decayed and part != "boundary"].append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            rates = {part: rate for part, rate in self._part_rates.items() if rate is not None}
            self.optimizer = kind(
                [
                    {
                        "params": parameters,
                        "weight_decay": self.args.weight_decay if decays else 0.0,
                        "lr": rates.get(part, self.args.learning_rate),
                    }
                    for (part, decays), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, targets = super().get_batch_samples(epoch_iterator, num_batches, device)
        if targets is None or self.args.n_gpu > 1:
            return batches, targets
        # with these counts, the losses of unequal micro-batches add up to that of the whole batch
        names = ("input_ids", "attention_mask", "labels", "position_ids", "think_mask")
        model = self.accelerator.unwrap_model(self.model)
        items = sum(model.count_items(**{n: b[n] for n in names if n in b}) for b in batches).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            items = self.accelerator.reduce(items)
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"loss = {float(loss)} at step {self.state.global_step + 1}")
        every = self._gradient_norm_steps
        if model.training and every and self.state.global_step % every == 0:
            parts = {"nll": outputs.nll_loss, "policy": outputs.policy_loss}
            parameters = [p for p in model.parameters() if p.requires_grad]
            norms = gradient_norms({n: x for n, x in parts.items() if x.requires_grad}, parameters)
            super().log({f"gradient_norm_{name}": norm for name, norm in norms.items()})
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.thoughts.collect()  # on the loss's line; the callback then finds none left
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.thoughts.resume_from = resume_from_checkpoint
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        # else the callback loads all; the stock method would load only the base model's file

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        # else the callback does so at the end of the run


class _StopBeforeNonFinite(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.fp16:  # the gradient scaler itself checks, and skips the step
            return
        squares = [p.grad.float().square().sum() for p in model.parameters() if p.grad is not None]
        if squares and not bool(torch.isfinite(torch.stack([s.cpu() for s in squares]).sum())):
            raise NonFiniteError(f"a gradient is not finite at step {state.global_step + 1}")


class ThoughtProgress(ProgressCallback):
    """Show loss, reward, mixing weight and thoughts per second on the progress bar."""

    SHOWN = (
        ("loss", "loss"),
        ("reward_mean", "reward"),
        ("mix_weight_mean", "w"),
        ("thoughts_per_second", "thoughts/s"),
    )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {label: f"{float(logs[name]):.3g}" for name, label in self.SHOWN if name in logs}
            self.training_bar.set_postfix(shown)
