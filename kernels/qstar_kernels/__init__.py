"""The operators of qstar: torch and triton only, nothing of transformers, nothing of Quiet-STaR's loss."""

from qstar_kernels.thought_attention import resolve_impl, thought_attention
from qstar_kernels.vocabulary import LinearHead, entropy, log_prob, logits, mixed_nll, nll, sample

__all__ = [
    "LinearHead",
    "entropy",
    "log_prob",
    "logits",
    "mixed_nll",
    "nll",
    "resolve_impl",
    "sample",
    "thought_attention",
]
