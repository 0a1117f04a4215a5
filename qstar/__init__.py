"""Quiet-STaR: language models that think before they speak."""

from qstar.config import QuietStarConfig

__all__ = ["QuietStarConfig", "QuietStarForCausalLM", "QuietStarOutput"]


def __getattr__(name: str):
    # the model needs torch and transformers; `import qstar` alone should cost nothing
    if name in ("QuietStarForCausalLM", "QuietStarOutput"):
        from qstar import model

        return getattr(model, name)
    raise AttributeError(f"module 'qstar' has no attribute {name!r}")
