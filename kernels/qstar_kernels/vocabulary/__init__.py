"""Row-by-row results of a language model's head, computed without ever holding all logits.

Every function works on chunks of rows, whose logits fit a bounded workspace, and returns fp32 (fp64 for fp64
hidden states): rewards are differences of about 1e-3 between NLLs, which bf16 rounds to zero.
Legend: M rows, D width, V vocabulary.
"""

from qstar_kernels.vocabulary.head import LinearHead, chunk_rows, logits, mixed_logits
from qstar_kernels.vocabulary.log_likelihood import (
    entropy,
    log_prob,
    mixed_nll,
    nll,
    nll_by_temperature,
    weighted_mixed_nll,
    weighted_nll,
)
from qstar_kernels.vocabulary.sampling import sample

__all__ = [
    "LinearHead",
    "chunk_rows",
    "entropy",
    "log_prob",
    "logits",
    "mixed_logits",
    "mixed_nll",
    "nll",
    "nll_by_temperature",
    "sample",
    "weighted_mixed_nll",
    "weighted_nll",
]
