"""The picture of `qstar look` in the docs: a model of `qstar demo` at walks that it has never seen.

`make look` draws docs/look.png (`python -m look_picture MODEL PICTURE`, with tests/support on the path).
"""

import sys
import tempfile
from pathlib import Path

from browser import DESKTOP, Browser
from PIL import Image
from transformers import AutoTokenizer

from qstar.cli.main import main
from qstar.demo.town import walks

WALKS, SCALE = 8, 1.5
SCREEN = DESKTOP | {"height": 1100}  # room for both thoughts


def draw(model: str, picture: Path) -> None:
    """Thoughts as in training, with `qstar look`'s own seed."""
    end = AutoTokenizer.from_pretrained(model).eos_token
    text = end.join(walk.text() for walk in walks(WALKS, seed="test", held_out=True))
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "look.html"
        if main(["look", text, "--model", model, "--output", str(page)]) != 0:
            raise ValueError(f"model = {model!r}: qstar look failed, as said above")
        with Browser(Path(folder) / "browser", SCREEN) as browser:
            browser.open(page)
            browser.screenshot(picture, scale=SCALE)
    with Image.open(picture) as drawn:
        drawn.convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE).save(picture, optimize=True)


if __name__ == "__main__":
    draw(sys.argv[1], Path(sys.argv[2]))
