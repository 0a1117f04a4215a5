"""`qstar lm_eval`: lm-evaluation-harness as it is, which knows the model `qstar` here."""

import sys


def main(argv: list[str]) -> int:
    """Raises ValueError where the package is missing."""
    try:
        from lm_eval.__main__ import cli_evaluate

        from qstar.evaluation import harness  # noqa: F401, registers the model
    except ImportError as error:
        raise ValueError(
            f"lm_eval: needs the package lm-eval ({error}); pip install 'qstar[eval]'"
        ) from error
    before = sys.argv
    sys.argv = ["qstar lm_eval", *argv]  # the harness takes its options from nowhere else
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0
