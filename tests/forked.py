"""Children of the test process, which may be killed at any moment; their parent has imported PyTorch."""

import contextlib
import gc
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

LONGEST = 120  # seconds; a child that takes longer hangs


class Ended(NamedTuple):
    """How a child ended: its exit status (minus the signal that killed it), and its output."""

    status: int
    output: str


class Child:
    """A forked process that runs `action` as the command line would, with its output in a file."""

    def __init__(self, action: Callable[[], object], log: Path) -> None:
        from fedlm.__main__ import _guarded

        self.log = Path(log)
        self.log.unlink(missing_ok=True)
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1), os.dup2(log, 2)
                sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
                sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
                try:
                    status = _guarded(action)
                except SystemExit as end:
                    status = end.code
                except BaseException:
                    import traceback

                    traceback.print_exc()
            finally:
                os._exit(status)

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        """Send a signal, if the child is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal_number)

    def end(self, kill_after: float | None = None) -> Ended:
        """Wait for the end; kill the child so many seconds after its start, if it is not over by then."""
        limit = LONGEST if kill_after is None else kill_after
        while True:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                break
            if time.monotonic() - self.started >= limit:
                self.kill()
                _, status = os.waitpid(self.pid, 0)
                assert kill_after is not None, f"the child hung: {self.output()}"
                break
            time.sleep(0.002)
        return Ended(os.waitstatus_to_exitcode(status), self.output())

    def output(self) -> str:
        """Return what the child wrote so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def get_ready() -> None:
    """Call this once what the children need is imported and before the first of them."""
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Transformers shows a bar when it loads a model. The lock of bars is a semaphore that all children share:
    # one that is killed while it holds it leaves all others waiting. Nor may the thread that redraws bars.
    if tqdm.monitor is not None:
        tqdm.monitor.exit()
    tqdm.monitor, tqdm.monitor_interval = None, 0
    tqdm.set_lock(threading.RLock())
    gc.collect()
    gc.freeze()  # children collect their own garbage only, and share the rest of the memory


def run(action: Callable[[], object], log: Path) -> Ended:
    """Run `action` in a child and wait for its end."""
    return Child(action, log).end()


def limited(kind: int, amount: int, action: Callable[[], object]) -> Callable[[], object]:
    """Return `action` under a limit of the system (resource.RLIMIT_...)."""

    def act():
        resource.setrlimit(kind, (amount, amount))
        action()

    return act
