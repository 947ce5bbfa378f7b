"""The scan names what a pickle imports and calls, in every opcode that can do so."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.scan import Global, scan_pickle

SYSTEM = Global(os.system.__module__, "system")


class Call:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


class Plain:
    pass


def names(data: bytes) -> set[str]:
    return {item.path for item in scan_pickle(data).globals}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("nested", [False, True])
def test_a_call_is_named_and_counted_in_every_protocol(protocol: int, nested: bool) -> None:
    value: Any = {"weights": [1, 2, ("deep", [Call()])]} if nested else Call()
    scan = scan_pickle(pickle.dumps(value, protocol=protocol))
    assert scan.called == {SYSTEM}


def test_stack_global_finds_its_operands_in_the_memo() -> None:
    # Two strings go to the memo, unrelated strings follow, and only then the name is put together.
    strings = b"\x8c\x05posix\x94\x8c\x06system\x94\x8c\x05torch\x8c\x06Tensor0000"
    data = b"\x80\x04" + strings + b"h\x00h\x01\x93\x8c\x04true\x85R."
    pickletools.dis(data, out=io.StringIO())  # raises unless it is a whole pickle
    scan = scan_pickle(data)
    assert scan.globals == scan.called == {Global("posix", "system")}


def test_a_computed_name_is_reported_as_computed() -> None:
    # The module's name comes out of a tuple, so that no scan can know it.
    data = b"\x80\x04N\x8c\x06system\x93."
    assert names(data) == {"<computed>.STACK_GLOBAL"}


def test_extension_codes_are_reported() -> None:
    assert names(b"\x80\x02\x82\x01.") == {"<computed>.EXT1 1"}


@pytest.mark.parametrize("data", [b"(S'true'\niposix\nsystem\n.", b"(cposix\nsystem\nS'true'\no."])
def test_old_call_opcodes_count_as_calls(data: bytes) -> None:
    assert scan_pickle(data).called == {Global("posix", "system")}


def test_python_2_names_are_translated_as_the_unpickler_does() -> None:
    assert names(b"\x80\x02c__builtin__\neval\n.") == {"builtins.eval"}


def test_instantiating_is_not_calling() -> None:
    scan = scan_pickle(pickle.dumps(Plain(), protocol=2))
    assert scan.globals == {Global(__name__, "Plain")} and not scan.called


def test_a_class_handed_to_a_callee_counts_as_called() -> None:
    data = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nctransformers\nAnything\nN\x86R."
    assert Global("transformers", "Anything") in scan_pickle(data).called


def test_damage_behind_a_call_names_the_call() -> None:
    data = pickle.dumps(Call(), protocol=2)[:-1] + b"\xff"
    with pytest.raises(Problem, match="system") as caught:
        scan_pickle(data)
    assert caught.value.code == "A103"


def test_plain_values_import_nothing() -> None:
    assert names(pickle.dumps({"a": [1, 2.5, None, (True, b"x")], "b": "text"})) == set()


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
        max_leaves=12,
    ),
    st.integers(0, pickle.HIGHEST_PROTOCOL),
)
def test_any_plain_value_scans_to_what_the_unpickler_looks_up(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol=protocol)
    looked_up: set[str] = set()

    class Spy(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            found = super().find_class(module, name)
            looked_up.add(f"{found.__module__}.{found.__qualname__}")
            return found

    Spy(io.BytesIO(data)).load()
    assert looked_up == names(data)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=64))
def test_noise_is_a_problem_or_a_scan_and_nothing_else(data: bytes) -> None:
    try:
        scan_pickle(data)
    except Problem as problem:
        assert problem.code == "A103"
