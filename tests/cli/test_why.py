"""`inspect --why`: the diagnostic points at the user's own line, and says how far matching got."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Command

_MODEL = '''"""A model of its own, with one attention that is understood and one that is not."""

import math

import torch
from torch import nn


def scores(q, k):
    return torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1])


def attend(q, k, v):
    z = scores(q, k)
    z = torch.sin(z)  # nobody does this
    return z.softmax(-1) @ v


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def heads(self, x):
        return [p.unflatten(2, (2, 8)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1)]

    def forward(self, x):
        q, k, v = self.heads(x)
        y = scores(q, k).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Odd(Plain):
    def forward(self, x):
        q, k, v = self.heads(x)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


class Joined(Plain):
    """Keys that come from two projections, and a mask that is no class."""

    def __init__(self):
        super().__init__()
        self.more = nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.heads(x)
        k = k + self.more(x).unflatten(2, (2, 8)).transpose(1, 2)
        at = torch.arange(x.shape[1])
        far = (at[:, None] * at[None, :]) % 3 == 2
        y = scores(q, k).masked_fill(far, -1e9).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Both(nn.Module):
    def __init__(self, *kinds):
        super().__init__()
        self.layers = nn.ModuleList(kind() for kind in kinds)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def build():
    return Both(Plain, Odd).eval(), torch.randn(2, 6, 16)


class Einsum(Plain):
    def forward(self, x):
        q, k, v = self.heads(x)
        y = torch.einsum("bhst,bgtd->bgsd", scores(q, k).softmax(-1), v)
        return self.out(y.transpose(1, 2).flatten(2))


def einsum():
    return Both(Einsum).eval(), torch.randn(2, 6, 16)


def join():
    return Both(Joined).eval(), torch.randn(2, 6, 16)
'''


def line_of(text: str) -> int:
    """The number of the model's line that holds a text."""
    return next(i for i, line in enumerate(_MODEL.splitlines(), 1) if text in line)


@pytest.fixture
def model(tmp_path: Path) -> str:
    """The name of the model above, of a module that no other test has imported."""
    (tmp_path / "why_model.py").write_text(_MODEL)
    return "why_model:build"


def test_an_attention_left_alone_is_shown_at_the_function_that_made_it(
    command: Command, model: str
) -> None:
    ended = command("attnopt", "inspect", model, "--why", "u0")
    assert ended.code == 0 and not ended.err
    told = ended.out.splitlines()
    assert told[0].startswith("error[A210]: attention u0 (layers.1) is left alone: `aten.sin")
    number = line_of("torch.sin(z)")
    assert told[1].strip() == f"--> why_model.py:{number}, in attend"
    at = next(i for i, line in enumerate(told) if line.startswith(f"{number} |"))
    start = told[at].index("torch.sin(z)")
    assert told[at + 1].index("^") == start
    assert told[at + 1].count("^") == len("torch.sin(z)")
    said = ended.out
    assert "understood: the softmax over the keys" in said
    assert "understood: the product with the values" in said
    assert "it stops at `sin` (aten.sin.default) reads [2, 2, 6, 6]" in said
    assert "not reached: what looks like the product of q and k: `matmul" in said
    assert f"why_model.py:{line_of('return torch.matmul')}" in said
    assert f"called from {Path.cwd() / 'why_model.py'}:" in said
    assert "= help: between softmax and scores" in said
    assert "\x1b" not in said


def test_the_same_as_data(command: Command, model: str) -> None:
    told = command("attnopt", "inspect", model, "--why", "layers.1", "--json").json
    assert told["site"]["id"] == "u0" and told["passes"] == []
    (diagnostic,) = told["diagnostics"]
    assert (diagnostic["severity"], diagnostic["code"]) == ("error", "A210")
    assert diagnostic["node"] == "sin" and diagnostic["help"]
    source = diagnostic["source"]
    assert (source["function"], source["line"]) == ("attend", line_of("torch.sin(z)"))
    text = next(line["text"] for line in source["lines"] if line["number"] == source["line"])
    assert text[source["start"] : source["end"]] == "torch.sin(z)"


def test_an_attention_that_is_understood_is_told_with_what_each_rewrite_says(
    command: Command, model: str
) -> None:
    told = command("attnopt", "inspect", model, "--why", "s0", "--json").json
    (diagnostic,) = told["diagnostics"]
    assert diagnostic["severity"] == "note" and "is understood" in diagnostic["what"]
    answers = {answer["pass"].partition("{")[0]: answer for answer in told["passes"]}
    assert answers["fuse_attention"]["applies"] is True
    assert answers["simplify_mask"]["applies"] is False
    assert answers["simplify_mask"]["why"] == "no mask tensor is read"
    assert "calibration data" in answers["merge_kv_heads"]["why"]
    drawn = command("attnopt", "inspect", model, "--why", "layers.0").out
    assert "2 of queries, 2 of keys and values" in drawn and "does not apply" in drawn


def test_facts_that_are_missing_are_warnings(command: Command, model: str) -> None:
    ended = command("attnopt", "inspect", "why_model:join", "--why", "layers.0", "--json")
    told = {d["what"].partition(" ")[0]: d for d in ended.json["diagnostics"]}
    assert set(told) >= {"k", "mask"}
    assert all(d["code"] == "A211" and d["help"] for d in told.values())
    assert told["k"]["source"]["line"] == line_of("k = k + self.more(x)")
    assert "joins 2 projections" in told["k"]["what"]
    assert any("q from `layers.0.qkv.weight`" in note for note in told["k"]["notes"])
    assert told["mask"]["source"]["line"] in {line_of("far = "), line_of(".masked_fill")}


@pytest.mark.parametrize(
    ("wanted", "said"),
    [("nothing", "there is no attention `nothing`"), ("layers", "2 attentions match `layers`")],
)
def test_a_site_that_is_not_there_lists_those_that_are(
    command: Command, model: str, wanted: str, said: str
) -> None:
    ended = command("attnopt", "inspect", model, "--why", wanted, "--json")
    assert ended.code == 1 and ended.error["code"] == "A215"
    assert said in ended.error["what"]
    assert "s0 (layers.0), u0 (layers.1)" in ended.error["help"]


def test_a_coverage_is_still_required_where_it_is_asked_for(command: Command, model: str) -> None:
    argv = ("attnopt", "inspect", model, "--why", "u0", "--require-coverage", "100%")
    assert command(*argv).code == 3
    ended = command(*argv, "--json")
    assert ended.code == 3 and ended.error["code"] == "A206" and ended.json["diagnostics"]


def test_what_is_in_the_way_is_not_called_understood(command: Command, model: str) -> None:
    told = command("attnopt", "inspect", "why_model:einsum", "--why", "u0", "--json").json
    (diagnostic,) = told["diagnostics"]
    assert diagnostic["source"]["line"] == line_of("torch.einsum(")
    understood = [note for note in diagnostic["notes"] if note.startswith("understood")]
    assert len(understood) == 1 and "the softmax over the keys" in understood[0]
    assert any("not reached" in n and "`matmul`" in n for n in diagnostic["notes"])
