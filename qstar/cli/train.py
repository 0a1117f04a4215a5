"""Run `qstar train`: train a QuietStarForCausalLM and compare it with what it was, on held-out text."""

import resource
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg
from transformers.integrations import get_available_reporting_integrations

from qstar import checkpoint
from qstar.cli.options import parse_options, with_config_file
from qstar.config import QuietStarConfig
from qstar.data import DataArguments, collate, load_rows
from qstar.demo import TINY_LM
from qstar.evaluation.held_out import before_after, hardest, held_out, summary
from qstar.model import QuietStarForCausalLM
from qstar.option_checks import check_least
from qstar.peft_adapters import adapter_name
from qstar.reporting import tables
from qstar.reporting.profiling import TraceSteps
from qstar.reporting.training_curves import save_curves
from qstar.training import NonFiniteError, QuietStarTrainer, last_complete_checkpoint


@dataclass
class ModelArguments:
    """Choose the model, the parts of it that learn, and what is logged of them."""

    model: str = HfArg(default=str(TINY_LM), help="Folder or hub name of a base or Quiet-STaR model.")
    mixing_learning_rate: float | None = HfArg(
        default=None, help="Learning rate of the mixing head; default: --learning_rate."
    )
    boundary_learning_rate: float | None = HfArg(
        default=None, help="That of <start> and <end>, before boundary_scale; default: --learning_rate."
    )
    freeze_base: bool = HfArg(default=False, help="Train only the mixing head and the boundary embeddings.")
    lora_rank: int | None = HfArg(
        default=None, help="Train LoRA adapters (peft) of this rank on every linear layer, and not the base."
    )
    trainable_layers: int | None = HfArg(
        default=None, help="Freeze the base model except its last so many layers; default: train all."
    )
    gradient_norm_steps: int = HfArg(
        default=0, help="Log the gradient norms of NLL and policy every so many steps; 0: never."
    )
    trace: str | None = HfArg(default=None, help="File for a Chrome trace of the second to fourth step.")

    def __post_init__(self) -> None:
        check_least(self, lora_rank=1)


@dataclass
class TrainArguments(TrainingArguments):
    """Set Hugging Face's TrainingArguments, with the paper's recipe as defaults."""

    output_dir: str = HfArg(default="outputs", help="Folder for checkpoints, curves and figures.")
    learning_rate: float = HfArg(default=1e-6, help="Learning rate of the base model.")
    weight_decay: float = HfArg(default=1e-3, help="Weight decay.")
    warmup_steps: float = HfArg(default=20, help="Steps of linear warm-up.")
    tokens_per_step: int | None = HfArg(
        default=None, help="Tokens of an optimiser step over all processes; sets gradient_accumulation_steps."
    )
    max_steps: int = HfArg(default=100, help="Optimiser steps.")
    logging_steps: float = HfArg(default=1, help="Log every so many steps.")
    save_steps: float = HfArg(default=50, help="Save a checkpoint every so many steps.")
    # HfArgumentParser keeps the default of a list only from a factory
    report_to: list[str] = field(default_factory=lambda: ["none"], metadata={"help": "Loggers to report to."})


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, QuietStarConfig, TrainArguments]:
    """Read the options from `--config file.yaml`, if given, and the command line, which wins."""
    types = (ModelArguments, DataArguments, QuietStarConfig, TrainArguments)
    return parse_options(types, with_config_file(argv), prog="qstar train")


def main(argv: list[str]) -> int:
    """Run `qstar train`; return the exit status."""
    model_args, data_args, config, args = parse(argv)
    check_loggers(args.report_to)
    tracer = TraceSteps(model_args.trace) if model_args.trace is not None else None
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model)
    if args.tokens_per_step is not None:
        steps: Any = {"gradient_accumulation_steps": accumulation(args, data_args.span_length)}
        args = replace(args, **steps)
    workers = args.dataloader_num_workers
    train_rows, held_out_rows = load_rows(data_args, tokenizer, config.talk_length, args.seed, workers)
    if data_args.streaming:
        args.dataloader_num_workers = 0  # the stream uses them itself
    model = open_model(model_args.model, config, tokenizer)
    if model_args.freeze_base or model_args.trainable_layers is not None:
        model.freeze_base(model_args.trainable_layers or 0)
    if model_args.lora_rank is not None:
        adapt(model, model_args.lora_rank)
    model.check_length(data_args.span_length, "a row of span_length")
    resume = checkpoint_to_resume(args)
    trainer = QuietStarTrainer(
        model=model,
        args=args,
        train_dataset=train_rows,
        # rows of a stream are dispatched from one process, in batches of one size
        data_collator=partial(collate, length=data_args.span_length) if data_args.streaming else collate,
        processing_class=tokenizer,
        mixing_learning_rate=model_args.mixing_learning_rate,
        boundary_learning_rate=model_args.boundary_learning_rate,
        gradient_norm_steps=model_args.gradient_norm_steps,
        callbacks=[tracer] if tracer is not None else [],
    )
    first = trainer.is_world_process_zero()

    def measure(when: str):
        progress = f"held out, {when}" if first else None
        return held_out(model, held_out_rows, args.per_device_eval_batch_size, progress)

    start = measure("before")
    hard = hardest(start.base_nll)
    try:
        with tracer or nullcontext():
            result = trainer.train(resume_from_checkpoint=resume)
    except NonFiniteError as error:
        good = last_complete_checkpoint(args.output_dir)
        print(f"\nqstar train: stopped, {error}; last good checkpoint: {good or 'none'}", file=sys.stderr)
        return 1
    trainer.save_model(args.output_dir)
    before, after = summary(start, hard), summary(measure("after"), hard)
    if not first:
        return 0
    curves = Path(args.output_dir) / "curves.png"
    if save_curves(trainer.state.log_history, curves):
        print(f"curves: {curves}")
    steps = result.global_step
    seconds = result.metrics["train_runtime"] / max(steps, 1)
    # ru_maxrss is in KiB on Linux
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(before_after(before, after))
    print(f"{steps} steps, {seconds:.2f} s a step, peak resident memory {peak_gib:.2f} GiB")
    tables.last_line(
        {
            "before": before,
            "after": after,
            "steps": steps,
            "seconds_per_step": seconds,
            "peak_resident_gib": peak_gib,
            "output_dir": args.output_dir,
        }
    )
    return 0


def checkpoint_to_resume(args: TrainArguments) -> str | None:
    """Return the checkpoint to resume: for "true" the newest complete one of the output folder."""
    resume = args.resume_from_checkpoint
    if resume is None or resume.lower() != "true":
        return resume
    newest = last_complete_checkpoint(args.output_dir)
    if newest is None:
        raise ValueError(f"resume_from_checkpoint = {resume}: no complete checkpoint in {args.output_dir!r}")
    return newest


def adapt(model: QuietStarForCausalLM, rank: int) -> None:
    """Train only LoRA adapters on every linear layer of the base model except its head.

    Raises ValueError without peft, and for a base that is frozen or has adapters already.
    """
    if adapter_name(model.base) or not all(p.requires_grad for p in model.base.parameters()):
        raise ValueError(f"lora_rank = {rank}: the base model is frozen or has adapters already")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError(f"lora_rank = {rank}: needs the package peft; pip install 'qstar[peft]'") from error
    get_peft_model(model.base, LoraConfig(r=rank, target_modules="all-linear"))


def accumulation(args: TrainArguments, span_length: int) -> int:
    """Return the micro-batches of a step in which the rows of all processes have `tokens_per_step` tokens.

    Padding counts, so all steps have the same shapes; the loss is the mean over the targets that there are.
    Raises ValueError unless the tokens make a whole number of micro-batches.
    """
    budget, rows = args.tokens_per_step, args.train_batch_size * args.world_size
    if args.gradient_accumulation_steps != 1:
        raise ValueError(
            f"tokens_per_step = {budget}: give it or gradient_accumulation_steps = "
            f"{args.gradient_accumulation_steps}, not both"
        )
    steps, rest = divmod(budget, rows * span_length)
    if steps < 1 or rest:
        raise ValueError(
            f"tokens_per_step = {budget}: must be a multiple of {rows * span_length}, the tokens of {rows} "
            f"rows of span_length = {span_length} at once on all processes"
        )
    return steps


def check_loggers(names: list[str]) -> None:
    """Raise ValueError for a missing logger now; the Trainer would only after the data are read."""
    installed = get_available_reporting_integrations()
    missing = [name for name in names if name not in installed]
    if missing:
        extra = "; pip install 'qstar[tensorboard]'" if "tensorboard" in missing else ""
        raise ValueError(
            f"report_to = {missing}: must be none, all or among the installed loggers, {installed}{extra}"
        )


def open_model(path: str, config: QuietStarConfig, tokenizer) -> QuietStarForCausalLM:
    """Open a Quiet-STaR checkpoint, with the options of this run, or make one from a base model."""
    if Path(path).is_dir():
        checkpoint.finish_update(path)  # a crash may have left one half done
    if not (Path(path) / checkpoint.DESCRIPTION).is_file():
        return QuietStarForCausalLM.from_base(path, config, tokenizer=tokenizer, dtype="float32")
    model = QuietStarForCausalLM.from_pretrained(path, dtype="float32")
    return model.with_config(config)
