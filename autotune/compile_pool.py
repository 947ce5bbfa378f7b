"""Kernels compiled in processes of their own, several at once.

A compiler may crash or take minutes, which must cost one set of tile sizes and not the search; and
a process that runs triton's interpreter cannot compile at all, while these can.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from attnopt.codegen.kernel import Kernel, Load
from attnopt.codegen.static_score import Static, statics
from attnopt.codegen.target import Target
from attnopt.compiler.errors import Problem

SECONDS = 60.0
_START = (
    "import sys; sys.path[:] = {path!r}; from attnopt.autotune import compile_pool as c; c.serve()"
)
_READY = b"ready\n"


@dataclass(frozen=True)
class Job:
    """A kernel with tile sizes, to be compiled for a target."""

    kernel: Kernel[Any]
    spec: Any
    load: Load
    target: Target


@dataclass(frozen=True)
class Failed:
    """Why a kernel was not compiled: in few words that are the same for all of their kind, and what
    the compiler said."""

    why: str
    said: str = ""


Compiled = list[Static] | Failed


class CompilePool:
    """`workers` processes (0: one for each core, four at most) that give each kernel `seconds` to
    compile. They start when first needed; leave the `with` block to end them."""

    def __init__(self, workers: int = 0, seconds: float = SECONDS) -> None:
        count = workers or min(4, os.cpu_count() or 1)
        self.seconds = seconds
        self._threads = ThreadPoolExecutor(count)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker() for _ in range(count)]
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> CompilePool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        self._threads.shutdown(cancel_futures=True)

    def __call__(self, jobs: Sequence[Job]) -> list[Compiled]:
        """Compile them, in the order given. A kernel class must be one that a fresh process can
        import. Raises `Problem` A835 where no process starts."""
        return list(self._threads.map(self._one, jobs))

    def _one(self, job: Job) -> Compiled:
        worker = self._idle.get()
        try:
            return worker.run(job, self.seconds)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process, started when needed. It reads jobs from its input and writes what came of them
    to its output."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, job: Job, seconds: float) -> Compiled:
        """What came of a job; the process is ended where it takes longer than `seconds`."""
        given = pickle.dumps(pickle.dumps(job))
        process = self._started()
        assert process.stdin and process.stdout
        late = threading.Event()

        def stop() -> None:
            late.set()
            _kill(process)

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            process.stdin.write(given)
            process.stdin.flush()
            made: Compiled = pickle.load(process.stdout)
            return made
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            if not isinstance(error, pickle.UnpicklingError):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(5.0)  # for the exit code of what closed its output
            self.end()
            if late.is_set():
                return Failed(f"takes more than {seconds:g} s to compile")
            return Failed("crashes the compiler", f"exit code {process.returncode}")
        finally:
            timer.cancel()
            if late.is_set():  # also where the answer came at the same moment
                self.end()

    def end(self) -> None:
        """End the process and what it started."""
        process, self.process = self.process, None
        if process is not None:
            _kill(process)
            process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is not None:
            return self.process
        clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START.format(path=sys.path)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=clean, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout
        if self.process.stdout.readline() != _READY:
            self.end()
            raise Problem(
                "A835", "no process for compiling kernels starts",
                help='see what `python -c "import attnopt.codegen.aot"` says',
            )  # fmt: skip
        return self.process


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own


def serve() -> None:
    """Compile what comes in until nothing more does: the main function of a worker."""
    import torch

    torch.set_num_threads(1)
    outlet = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print must not mix with the answers
    outlet.write(_READY)
    outlet.flush()
    while True:
        try:
            given: bytes = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(compile_here(given), outlet)
        outlet.flush()


def compile_here(given: bytes) -> Compiled:
    """What comes of compiling a pickled job in this process."""
    try:
        job: Job = pickle.loads(given)
        return statics(job.kernel, job.spec, job.load, job.target)
    # A compiler may fail in any way, a launcher may refuse tile sizes, and the kernel's module may
    # not be found from here; it is told.
    except Exception as error:  # noqa: BLE001
        said = str(getattr(error, "why", "") or error).strip().splitlines() or [""]
        return Failed("does not compile", f"{type(error).__name__}: {said[0]}")
