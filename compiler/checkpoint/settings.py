"""The changes of a plan in the fields of the family's config: which sizes, windows and layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from attnopt.compiler import text
from attnopt.compiler.checkpoint.changes import Changes, Pair, refusal
from attnopt.compiler.checkpoint.names import Names, layer_of, read_names
from attnopt.compiler.checkpoint.sizes import sizes


@dataclass(frozen=True)
class Settings:
    """`config` of the new model; `layers` names the list whose entries `dropped` are left out.

    `told` maps each field that differs to its value before and after.
    """

    config: Any
    layers: str = ""
    dropped: tuple[int, ...] = ()
    told: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    def drops(self, name: str) -> bool:
        """Whether a weight of the original goes with its layer."""
        found = layer_of(name)
        return found is not None and found[0] == self.layers and found[1] in self.dropped

    def place(self, name: str) -> str:
        """The name that a weight of the new model has in the original."""
        found = layer_of(name)
        if found is None or found[0] != self.layers or not self.dropped:
            return name
        kept = [i for i in range(found[1] + len(self.dropped) + 1) if i not in self.dropped]
        return f"{self.layers}.{kept[found[1]]}{name[len(f'{self.layers}.{found[1]}') :]}"


def settings(hf: Any, made: Changes, names: Names) -> Settings:
    """The new model's config; `hf` is the original model.

    Raises `Problem` A521 for an attention that no field of the config describes.
    """
    config = copy.deepcopy(hf.config)
    own = config.get_text_config()
    layers, dropped = _dropped(hf, made, names)
    told = {**sizes(own, made), **_windows(own, made)}
    _set(own, told)
    if dropped:
        fewer = _fewer(own, dropped)
        _set(own, fewer)
        told |= {name: (told.get(name, pair)[0], pair[1]) for name, pair in fewer.items()}
    if hasattr(config, "auto_map"):
        del config.auto_map  # the checkpoint brings no code
    return Settings(config, layers, dropped, told)


def _dropped(hf: Any, made: Changes, names: Names) -> tuple[str, tuple[int, ...]]:
    """The list of layers, and those of its entries of which the program reads nothing any more.

    Empty for a model with several lists, whose config counts them in fields of their own.
    """
    gone = [layer_of(min(names(name) for name in item.own)) for item in made.removed]
    lists = {found[0] for found in gone if found is not None}
    count = getattr(hf.config.get_text_config(), "num_hidden_layers", None)
    if len(lists) != 1:
        return "", ()
    (name,) = lists
    found = dict(hf.named_modules()).get(name)
    if not isinstance(found, nn.ModuleList) or len(found) != count:
        return "", ()
    before, after = (
        {place for read in read_names(program) if (place := layer_of(names(read))) is not None}
        for program in (made.original, made.program)
    )
    return name, tuple(sorted(at for of, at in before - after if of == name))


def _set(config: Any, told: Mapping[str, tuple[Any, Any]]) -> None:
    for name, (_, value) in told.items():
        setattr(config, name, value)


def _fewer(config: Any, dropped: tuple[int, ...]) -> dict[str, tuple[Any, Any]]:
    """The number of layers, and the lists that say something of each layer."""
    before = int(config.num_hidden_layers)
    told: dict[str, tuple[Any, Any]] = {"num_hidden_layers": (before, before - len(dropped))}
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == before:
            told[name] = (value, [item for i, item in enumerate(value) if i not in dropped])
    return told


def _windows(config: Any, made: Changes) -> dict[str, tuple[Any, Any]]:
    chosen = [pair for pair in made.pairs if pair.window is not None]
    if not chosen:
        return {}
    left = _left(config, chosen)
    kinds = getattr(config, "layer_types", None)
    others = [pair for pair in made.pairs if pair.window is None]
    for pair in others:
        if kinds is None or window_of(pair.before.mask) not in (0, left):
            raise refusal(
                f"{pair.before.id} has another window than {chosen[0].before.id}",
                where=pair.before.module,
                why=f"{pair.before.mask} there, {left} keys here; the config of "
                f"{config.model_type} has one window for all layers",
                help="give every layer the same window",
            )
    told: dict[str, tuple[Any, Any]] = {"sliding_window": (config.sliding_window, left)}
    if getattr(config, "use_sliding_window", True) is False:
        told["use_sliding_window"] = (False, True)
    if kinds is not None:
        fresh = list(kinds)
        for pair in chosen:
            found = layer_of(pair.before.module)
            if found is not None and found[1] < len(fresh):
                fresh[found[1]] = "sliding_attention"
        told["layer_types"] = (list(kinds), fresh)
    return {name: (was, now) for name, (was, now) in told.items() if was != now}


def _left(config: Any, chosen: list[Pair]) -> int:
    first = chosen[0]
    for pair in chosen:
        assert pair.window is not None and first.window is not None
        why = ""
        if not hasattr(config, "sliding_window"):
            why = f"the config of {config.model_type} has no field for a window"
        elif pair.window.sink:
            why = f"the config of {config.model_type} has no field for the first keys (sink)"
        elif not pair.window.causal:
            why = "its window is two-sided"
        elif pair.window.left != first.window.left:
            why = f"{first.before.id} has one of {first.window.left} keys; a config has one for all"
        if why:
            raise refusal(
                f"{pair.before.id} reads {text.dump_value(pair.window)}",
                where=pair.before.module, why=why,
            )  # fmt: skip
    assert first.window is not None
    return first.window.left


def window_of(mask: str) -> int:
    """The keys of a window by the name of a mask class, `window(left=64)`; 0 for other masks."""
    first = mask.split("+")[0]
    return int(text.parse(first).values.get("left", 0)) if first.startswith("window") else 0
