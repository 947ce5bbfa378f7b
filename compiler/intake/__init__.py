"""Reading model files, example inputs and texts safely: `load` turns what the user typed into a
`Loaded` model.
"""

from attnopt.compiler.intake.data import lm_batches, read_text, sentence_batches, split_text
from attnopt.compiler.intake.inputs import load_batches
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.intake.source import load

__all__ = [
    "Loaded",
    "lm_batches",
    "load",
    "load_batches",
    "read_text",
    "sentence_batches",
    "split_text",
]
