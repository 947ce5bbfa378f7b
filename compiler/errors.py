"""What the user is told: `Problem` for mistakes the user can mend, `Notice` for findings that do
not stop the run.

Bugs stay plain exceptions and are never caught broadly. "Not here, because" is neither: it is the
value `contract.Miss`. Codes: A1xx intake, A2xx trace and raise, A3xx passes, A4xx search and
measuring, A5xx artifacts, A6xx command line, A7xx decoding.
"""

from __future__ import annotations

from dataclasses import dataclass


def _render(severity: str, code: str, what: str, where: str, why: str, help: str) -> str:
    lines = [f"{severity}[{code}]: {what}"]
    if where:
        lines.append(f"  --> {where}")
    if why:
        lines.append(f"   = reason: {why}")
    if help:
        lines.append(f"   = help: {help}")
    return "\n".join(lines)


class Problem(Exception):
    """A mistake the user can mend: what is wrong, where, why, and how to mend it."""

    exit_code = 1

    def __init__(
        self, code: str, what: str, *, where: str = "", why: str = "", help: str = ""
    ) -> None:
        super().__init__(what)
        self.code, self.what, self.where, self.why, self.help = code, what, where, why, help

    def __str__(self) -> str:
        return _render("error", self.code, self.what, self.where, self.why, self.help)

    def as_json(self) -> dict[str, str]:
        """The same facts as a JSON object, for `--json`."""
        fields = {"what": self.what, "where": self.where, "why": self.why, "help": self.help}
        return {"code": self.code, **{key: value for key, value in fields.items() if value}}


class NothingFound(Problem):
    """No attention site was found; the command line exits with 3."""

    exit_code = 3


@dataclass(frozen=True)
class Notice:
    """A finding that does not stop the run, in the same shape as a `Problem`."""

    code: str
    what: str
    where: str = ""
    why: str = ""
    help: str = ""

    def __str__(self) -> str:
        return _render("warning", self.code, self.what, self.where, self.why, self.help)
