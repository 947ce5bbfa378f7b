"""An optimized program as a plain checkpoint of transformers: same family, other sizes; or, with
latents for keys and values, DeepSeek-V3.

`changes` reads what became of each attention and sublayer, `settings` says it in the fields of the
family's config, `weights` moves the weights head by head into a model of that config, `write` saves
it, loads it again and compares. No model family is named: where heads lie in a weight is read from
the new model's graph in the same way as from the old one's. Latents alone need another family:
`latents` reads their maps, `deepseek` makes the model, with `unnormed` for its norms and `turns`
for its rotary frequencies.
"""

from __future__ import annotations

from attnopt.compiler.checkpoint.write import Written, write_checkpoint

__all__ = ["Written", "write_checkpoint"]
