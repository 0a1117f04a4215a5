"""The stock Hugging Face Trainer with the callback, told three things more: the learning rates of the parts,
what to show, and when to stop."""

from collections import defaultdict
from typing import Any

import torch
from transformers import ProgressCallback, Trainer, TrainerCallback

from qstar.objective import gradient_norms
from qstar.training.callbacks import QuietStarCallback


class NonFiniteError(RuntimeError):
    """The loss or a gradient is NaN or infinite; no parameter was updated with it."""


class QuietStarTrainer(Trainer):
    """`Trainer` for a QuietStarForCausalLM.

    mixing_learning_rate, boundary_learning_rate: of those parts (default: `args.learning_rate`), the latter
    before the factor `boundary_scale`; gradient_norm_steps: log the gradient norms of the NLL and the policy
    part apart at every so many steps (two more backward passes there), 0 never; of several processes each
    its own.
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
                f"label_smoothing_factor = {self.args.label_smoothing_factor}: must be 0, the loss is the "
                "model's own"
            )
        if gradient_norm_steps and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"gradient_norm_steps = {gradient_norm_steps}: must be 0 with FSDP or DeepSpeed, where no "
                "process has whole gradients"
            )
        self._part_rates = {"mixing": mixing_learning_rate, "boundary": boundary_learning_rate}
        self._gradient_norm_steps = gradient_norm_steps
        self.thoughts = QuietStarCallback(self)
        self.add_callback(self.thoughts)
        self.remove_callback(ProgressCallback)
        self.add_callback(ThoughtProgress())
        self.add_callback(_StopBeforeNonFinite())

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            target = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(target))
            own = self.accelerator.unwrap_model(target)
            # by identity: a wrapper prefixes names, and a base model may have a part of the same name
            parts = {id(p): part for part in self._part_rates for p in getattr(own, part).parameters()}
            groups: dict[tuple, list] = defaultdict(list)
            for name, parameter in target.named_parameters():
                if parameter.requires_grad:
                    part = parts.get(id(parameter))
                    # boundaries are embeddings that no text trains: decay would only pull them to zero
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
        # with all counts, the parts add up to the whole also where they are not alike
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
            logs |= self.thoughts.collect()  # in the loss's own line; the callback finds none left then
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.thoughts.resume_from = resume_from_checkpoint
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        # else the stock method would load the base model's file alone; the callback loads all

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        # else the callback does, at the end of the run


class _StopBeforeNonFinite(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.fp16:  # the gradient scaler looks for them itself, and skips the step
            return
        squares = [p.grad.float().square().sum() for p in model.parameters() if p.grad is not None]
        if squares and not bool(torch.isfinite(torch.stack([s.cpu() for s in squares]).sum())):
            raise NonFiniteError(f"a gradient is not finite at step {state.global_step + 1}")


class ThoughtProgress(ProgressCallback):
    """One live line: loss, reward, mixing weight and thoughts per second."""

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
