"""Train with the Hugging Face Trainer."""

from qstar.training.callbacks import QuietStarCallback, last_complete_checkpoint
from qstar.training.trainer import NonFiniteError, QuietStarTrainer

__all__ = ["NonFiniteError", "QuietStarCallback", "QuietStarTrainer", "last_complete_checkpoint"]
