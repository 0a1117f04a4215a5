"""The generator: before a token is spoken, a thought; several thoughts at once, and the text is the same."""

from qstar.generation.generator import QuietStarGenerateOutput, generate
from qstar.generation.loop import Thinking

__all__ = ["QuietStarGenerateOutput", "Thinking", "generate"]
