"""Fine-tune the last layers of a real model, with thoughts or without."""

from dataclasses import dataclass

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from qstar.config import QuietStarConfig
from qstar.demo.walk_training import fit_rows
from qstar.model import QuietStarForCausalLM


@dataclass(frozen=True)
class FineTuning:
    """How every condition trains: steps of AdamW at rates that fall linearly to 0.

    The learning rates are those of the last layers, the mixing head and the boundary embeddings.
    """

    steps: int
    batch: int = 24
    trainable_layers: int = 10
    learning_rate: float = 5e-5
    mixing_learning_rate: float = 1e-3
    boundary_learning_rate: float = 1e-2


def fine_tune(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list[int]]],
    config: QuietStarConfig | None,
    recipe: FineTuning,
    seed: int,
) -> PreTrainedModel:
    """Train the model in the folder `path` on rows, as `collate` takes them.

    config None is the control: a plain language model that sees the same rows in the same order.
    """
    set_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    # the control is wrapped too: the wrapper tells the last layers apart
    model = QuietStarForCausalLM.from_base(base, config or QuietStarConfig(), tokenizer=tokenizer)
    model.freeze_base(recipe.trainable_layers)
    return fit_rows(
        base if config is None else model,
        rows,
        seed,
        mixing_learning_rate=recipe.mixing_learning_rate,
        boundary_learning_rate=recipe.boundary_learning_rate,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        adam_beta2=0.95,
    )
