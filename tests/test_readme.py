"""README and docs/cli.md say what is there: commands, options, passes, names, links."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

import attnopt
from attnopt.cli.main import commands, optimizer
from attnopt.compiler.contract import passes
from tests.tree import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CLI = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
ELSEWHERE = {"--help", "--version"}
COMMANDS = ("optimize", "inspect", "apply", "check", "export")


def _subcommand(name: str) -> Any:
    return get_command(commands).commands[name]  # type: ignore[attr-defined]


def _options(command: Any) -> set[str]:
    found = {word for p in command.params for word in (*p.opts, *p.secondary_opts)}
    return {word for word in found if word.startswith("--")} - ELSEWHERE


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def _command_lines(text: str) -> Iterator[list[str]]:
    for block in _blocks(text, "sh"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] in ("optimize", "attnopt"):
                yield words


def test_command_lines_of_the_readme_are_ones_that_exist() -> None:
    seen = 0
    for words in _command_lines(README):
        command = get_command(optimizer) if words[0] == "optimize" else _subcommand(words[1])
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= _options(command), words
        seen += 1
    assert seen >= 2


def test_options_named_in_the_readme_exist() -> None:
    known = {o for name in COMMANDS for o in _options(_subcommand(name))}
    assert set(OPTION.findall(README)) <= known | ELSEWHERE


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_has_every_option_of_a_command_and_no_other(name: str) -> None:
    parts = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", CLI, re.MULTILINE | re.DOTALL))
    rows = re.findall(r"^\| (`--.*?) \|", parts["Options of several commands"] + parts[name], re.M)
    documented = set(OPTION.findall(" ".join(rows)))
    assert _options(_subcommand(name)) <= documented
    own = set(OPTION.findall(" ".join(re.findall(r"^\| (`--.*?) \|", parts[name], re.M))))
    assert own <= _options(_subcommand(name))


def test_the_console_scripts_are_one_command() -> None:
    assert _options(get_command(optimizer)) == _options(_subcommand("optimize"))


def test_python_of_the_readme_uses_names_that_exist() -> None:
    names = set(re.findall(r"attnopt\.(\w+)\(", README))
    assert {"optimize", "load", "inspect", "apply"} <= names <= set(attnopt.__all__)
    for block in _blocks(README, "python"):
        ast.parse(block)
    for name in attnopt.__all__:
        assert getattr(attnopt, name) is not None


def test_the_table_of_rewrites_is_complete_and_right() -> None:
    told = dict(
        re.findall(r"^\| `(\w+)` \| (exact|guarded|approximate|heals) \|", README, re.MULTILINE)
    )
    found = {n: "heals" if p.heals else p.exactness.value for n, p in passes().items()}
    assert told == found


@pytest.mark.parametrize("page", ["README.md", "docs/cli.md", "docs/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file, _, heading = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {title.lower().replace(" ", "-") for title in titles}, target


def test_the_place_of_the_results_is_marked() -> None:
    assert README.count("<!-- results: begin -->") == README.count("<!-- results: end -->") == 1
    assert README.index("<!-- results: begin -->") < README.index("<!-- results: end -->")
