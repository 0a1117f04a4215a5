"""Generate text with a thought before its tokens: several thoughts at once, and the text is the same."""

from qstar.generation.generator import QuietStarGenerateOutput, generate

__all__ = ["QuietStarGenerateOutput", "generate"]
