"""Generating with the derived decoder against transformers' `generate()` with its dynamic and its
static cache, and with its static cache under torch.compile: greedy, float32, 512 tokens of prompt,
128 new ones, batch 1 and 8. Nothing is approximated: the tokens have to be the same.

The floor of a step is the time in which torch sums as many bytes as have to be read for it, weights
and cache, in memory of the same pages, measured in turns with the step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.autotune.timing import Contender, compare
from attnopt.compiler.contract import Notes, read_pass
from attnopt.compiler.decode import Decoder, derive
from attnopt.compiler.decode.generate import Generation, generate
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.native.layouts import shorter
from attnopt.compiler.native.pages import Pages
from attnopt.compiler.pipeline import apply_pass
from attnopt.compiler.program import Batch
from attnopt.compiler.raising import raise_program
from attnopt.compiler.trace import trace
from benchmarks.run import Row

PYLM = Path(__file__).parents[1] / "examples" / "models" / "pylm"
PROMPT, NEW = 512, 128
TURN = 16  # steps of a turn
EXACT = ("simplify_mask", "fold_repeated_kv", "fuse_attention")
BARS = {("pylm", 1): 2.5, ("pylm", 8): 2.5, ("8x512", 1): 1.1, ("8x512", 8): 1.3}
OVER_FLOOR = {"8x512": 1.35}  # at most so many times its floor may a step take


class _Logits(nn.Module):
    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf

    def forward(self, input_ids: Tensor) -> Tensor:
        made: Tensor = self.hf(input_ids=input_ids, use_cache=False).logits
        return made


def rows() -> list[Row]:
    """Two rows per model and batch size: the whole generation, and a step against its floor."""
    found = list[Row]()
    for name, model in (("pylm", pylm()), ("8x512", random_model(1024))):
        decoder = decoder_of(model)
        decoder.compile(prompts=True)
        for batch in (1, 8):
            for row in (_row(name, model, decoder, batch), _against_floor(name, decoder, batch)):
                found.append(row)
                print(f"{row.case}: {row.figure}", file=sys.stderr, flush=True)
    return found


def pylm() -> Any:
    """The language model of the project, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(PYLM, dtype=torch.float32).eval()


def random_model(positions: int) -> Any:
    """A random Llama of 8 layers, 512 wide, 8 heads, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        vocab_size=8192, max_position_embeddings=positions,
    )).eval()  # fmt: skip


def decoder_of(model: Any) -> Decoder:
    """The decoder of a causal model of transformers, after the exact rewrites."""
    inputs = {"input_ids": torch.randint(3, 1000, (2, 64))}
    loaded = Loaded(_Logits(model).eval(), None, (), inputs, "model", "hf", root_prefix="hf.")
    program = raise_program(trace(loaded))
    for name in EXACT:
        program, _ = apply_pass(program, read_pass(name), ("*",), Notes(program))
    return derive(program)


def _row(name: str, model: Any, decoder: Decoder, batch: int) -> Row:
    torch.manual_seed(0)
    ids = torch.randint(3, 1000, (batch, PROMPT))
    how = Generation(max_new_tokens=NEW)
    forms = {
        "dynamic": lambda input_ids: _theirs(model, input_ids),
        "static": lambda input_ids: _theirs(model, input_ids, "static"),
        "static, compiled": _compiled(model),
        "attnopt": lambda input_ids: generate(decoder, input_ids, how),
    }
    case = f"{name}, batch {batch}"
    made = {form: run(ids) for form, run in forms.items()}
    wrong = [form for form, tokens in made.items() if not torch.equal(tokens, made["dynamic"])]
    if wrong:
        return Row(case, f"other tokens than the dynamic cache: {', '.join(wrong)}", met=False)
    timing = compare(
        [Contender(*form) for form in forms.items()], [Batch((), {"input_ids": ids})],
        seconds=20.0, rounds=3,
    )  # fmt: skip
    best = timing.fastest([form for form in forms if form != "attnopt"])
    over = timing.ratio("attnopt", best)
    bar = BARS[name, batch]
    said = f"{over.value:.2f}x transformers' {best} cache ({over.interval.low:.2f} to "
    said += f"{over.interval.high:.2f}), {NEW * batch / timing.median('attnopt'):.0f} tokens/s"
    numbers = {"over_best": over.as_json(),
               "seconds": {form: timing.median(form) for form in forms}}  # fmt: skip
    return Row(case, said, f"at least {bar}x the best of them", over.value >= bar, numbers)


def _theirs(model: Any, input_ids: Tensor, cache: str | None = None) -> Tensor:
    more = {"cache_implementation": cache, "disable_compile": True} if cache else {}
    with torch.no_grad():
        made: Tensor = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=NEW,
            do_sample=False, pad_token_id=0, eos_token_id=None, **more,
        )  # fmt: skip
    return made


def _compiled(model: Any) -> Any:
    """Their static cache with the model's forward under torch.compile."""
    plain = model.forward
    form = torch.compile(plain)

    def run(input_ids: Tensor) -> Tensor:
        model.forward = form
        try:
            return _theirs(model, input_ids, "static")
        finally:
            model.forward = plain

    return run


def _against_floor(name: str, decoder: Decoder, batch: int) -> Row:
    """The median step after a prompt over the median time of reading what it reads."""
    state = decoder.state(batch, PROMPT + NEW)
    ids = torch.randint(3, 1000, (batch, PROMPT))
    token = decoder.prefill(state, ids, last=True)[:, -1].argmax(-1, keepdim=True)
    read = _weights(decoder) + batch * decoder.bytes_per_token() * (PROMPT + NEW // 2)
    as_much = Pages().zeros((read // 4,), torch.float32).normal_()
    steps, sums = list[float](), list[float]()
    for _ in range(NEW // TURN):  # in turns, but with its own data in the processor's caches
        steps += [_seconds(lambda: decoder.step(state, token, last=True)) for _ in range(TURN)][1:]
        sums += [_seconds(as_much.sum) for _ in range(TURN)][1:]
    step, floor = median(steps), median(sums)
    figure = (
        f"{step * 1e3:.2f} ms, {step / floor:.2f}x the {floor * 1e3:.2f} ms in which "
        f"{read / 1e6:.1f} MB are read ({read / floor / 1e9:.1f} GB/s)"
    )
    most = OVER_FLOOR.get(name)
    return Row(
        f"{name}, batch {batch}, one step", figure, f"at most {most}x" if most else "",
        step / floor <= most if most else None,
        {"step": step, "floor": floor, "bytes": read},
    )  # fmt: skip


def _seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _weights(decoder: Decoder) -> int:
    """Bytes of weights that a step has to read: not tables of embeddings, of which it reads a row,
    and 16 bits of a number where the rest is zeros."""
    module = decoder.program.module
    tables = {
        node.args[0].target
        for node in module.graph.find_nodes(
            op="call_function", target=torch.ops.aten.embedding.default
        )
    }
    linear = {
        node.args[1].target
        for node in module.graph.find_nodes(
            op="call_function", target=torch.ops.aten.linear.default
        )
    }
    read = [p for name, p in module.named_parameters() if name not in tables or name in linear]
    return sum(shorter(p).nbytes for p in read)
