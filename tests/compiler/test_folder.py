"""A folder of results is replaced whole or not at all, whatever kills its writer."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attnopt.compiler import folder
from attnopt.compiler.errors import Problem

NAMES = ("model.pt2", "plan.json", "report.json")
JOURNAL = b"measured once\n"

_WRITER = """
import os, signal, sys
from attnopt.compiler import folder
target, exchange, kill_at, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if exchange == "renames":
    folder._exchange = lambda one, other: False
steps = {"open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree",
         "os.listdir"}
seen = 0
def hook(event, args):
    global seen
    if event not in steps:
        return
    seen += 1
    if seen == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
start = int(open(os.path.join(target, "plan.json")).read().partition(":")[2].strip(" }")) + 1
print("ready", flush=True)
sys.addaudithook(hook)
for version in range(start, start + rounds):
    text = b'{"steps": %d}' % version
    folder.write(target, {"model.pt2": lambda path: path.write_bytes(text * 50),
                          "plan.json": text, "report.json": text})
"""


def _first(target: Path) -> None:
    folder.write(target, dict.fromkeys(NAMES, b'{"steps": 0}'))
    (folder.work_folder(target) / "study.journal").write_bytes(JOURNAL)
    (target / "notes.txt").write_text("mine")


def _writer(target: Path, way: str, kill_at: int, rounds: int) -> subprocess.Popen[bytes]:
    args = [sys.executable, "-P", "-c", _WRITER, str(target), way, str(kill_at), str(rounds)]
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _assert_whole(target: Path) -> bytes:
    """All outputs are there and of one version, and what was not ours is still there."""
    folder.recover(target)
    versions = {(target / name).read_bytes()[: len(b'{"steps": ')] for name in NAMES}
    assert versions == {b'{"steps": '}
    plan, report = (target / "plan.json").read_bytes(), (target / "report.json").read_bytes()
    assert plan == report
    assert (target / "model.pt2").read_bytes() in (plan, plan * 50)
    assert (target / folder.WORK / "study.journal").read_bytes() == JOURNAL
    assert (target / "notes.txt").read_text() == "mine"
    return plan


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_a_kill_before_any_step_leaves_old_or_new(tmp_path: Path, way: str) -> None:
    target = tmp_path / "out"
    _first(target)
    found = []
    for kill_at in range(1, 200):
        before = (target / "plan.json").read_bytes()
        process = _writer(target, way, kill_at, rounds=1)
        _, said = process.communicate(timeout=60)
        after = _assert_whole(target)
        found.append(after != before)
        if process.returncode == 0:
            break
        assert process.returncode < 0, said.decode()
    assert len(found) > 20, "the hook saw too few steps to say anything"
    assert False in found and True in found, "both sides of the exchange were met"
    folder.write(target, dict.fromkeys(NAMES, b'{"steps": 7}'))
    assert {path.name for path in tmp_path.iterdir()} == {"out"}, "leftovers are swept"


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_a_kill_at_a_random_moment_leaves_old_or_new(tmp_path: Path, way: str) -> None:
    target = tmp_path / "out"
    _first(target)
    chance, versions = random.Random(1), set()
    for _ in range(20):
        process = _writer(target, way, kill_at=0, rounds=100_000)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0.0, 0.25))
        process.kill()
        process.communicate(timeout=60)
        versions.add(_assert_whole(target))
    assert len(versions) > 3, "the writer was killed before it wrote anything"


def test_an_open_journal_survives_the_swap(tmp_path: Path) -> None:
    target = tmp_path / "out"
    journal = folder.work_folder(target) / "study.journal"
    with journal.open("ab", buffering=0) as stream:
        stream.write(b"one\n")
        folder.write(target, {"plan.json": b"{}"})
        stream.write(b"two\n")
    assert (target / folder.WORK / "study.journal").read_bytes() == b"one\ntwo\n"


def test_outputs_of_an_earlier_run_do_not_linger(tmp_path: Path) -> None:
    target = tmp_path / "out"
    folder.write(target, {"plan.json": b'{"steps": []}', "model.pt2": b"old"})
    folder.write(target, {"plan.json": b'{"steps": []}'})
    assert [path.name for path in target.iterdir()] == ["plan.json"]


def test_a_failing_content_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    folder.write(target, {"plan.json": b'{"steps": 1}'})

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise ValueError("a bug while writing")

    with pytest.raises(ValueError, match="a bug"):
        folder.write(target, {"plan.json": b'{"steps": 2}', "model.pt2": fail})
    assert (target / "plan.json").read_bytes() == b'{"steps": 1}'
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_link_to_the_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    folder.write(tmp_path / "link", {"plan.json": b"{}"})
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "plan.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    "ours", [{}, {"plan.json": '{"steps": []}'}, {"report.json": '{"schema": 1}'}]
)
def test_an_empty_folder_and_our_own_are_accepted(tmp_path: Path, ours: dict[str, str]) -> None:
    target = tmp_path / "out"
    target.mkdir()
    for name, text in ours.items():
        (target / name).write_text(text)
    folder.check_writable(target)
    assert {path.name for path in target.iterdir()} == set(ours)


@pytest.mark.parametrize(
    "foreign", [{"thesis.tex": "x"}, {"plan.json": '{"budget": 3}'}, {"report.json": "not json"}]
)
def test_a_folder_of_others_is_refused(tmp_path: Path, foreign: dict[str, str]) -> None:
    target = tmp_path / "out"
    target.mkdir()
    for name, text in foreign.items():
        (target / name).write_text(text)
    with pytest.raises(Problem, match="not results of attnopt") as told:
        folder.check_writable(target)
    assert told.value.code == "A508" and told.value.help
    assert {path.name for path in target.iterdir()} == set(foreign)


def test_paths_that_cannot_be_written_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/attnopt/out")):
        with pytest.raises(Problem) as told:
            folder.check_writable(path)
        assert told.value.code == "A502" and told.value.help
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Problem, match="folder you are in"):
        folder.check_writable(".")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(Problem) as told:
        folder.check_writable(tmp_path / "locked" / "out")
    assert told.value.code == "A502" and "ermission" in told.value.why
