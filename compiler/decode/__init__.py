"""A decoder with a cache, derived from the graph of a causal language model.

`derive` splits the graph into what depends on positions alone (evaluated once, as tables) and what
runs on new tokens, and gives the attentions a cache; `Decoder` runs it. What the graph computes
otherwise than token by token is found by running it, and refused with the operator's name.
"""

from attnopt.compiler.decode.decoder import Decoder
from attnopt.compiler.decode.derive import derive

__all__ = ["Decoder", "derive"]
