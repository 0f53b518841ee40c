"""Runs of a bench, several at a time, each in a process of its own: what `--workers` does.

The parent holds a pipe to each child and sends the run through it. The pipe closes with the parent, whatever ends it,
and the child ends with the pipe: a killed bench leaves nothing behind that would write beside the next one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from recipes.arguments import build, run
from recipes.student.distill import DistillArguments
from recipes.student.plan import PlannedRun


def run_all(
    planned: Sequence[PlannedRun], workers: int, split: str, ended: Callable[[PlannedRun, str | None], None]
) -> None:
    """Train and score the runs, `workers` at a time, in their order; whatever ends this ends the children.

    Args:
        planned: What to run.
        workers: How many at a time. They share the processor cores, and the GPUs where there are several.
        split: What to score.
        ended: Called with each run as it ends, and why it failed or None.
    """
    gpus = _gpus()
    waiting = list(planned)
    free = list(range(workers))
    running: dict[int, tuple[subprocess.Popen[bytes], PlannedRun]] = {}
    shown = ""
    with tqdm(total=len(waiting), unit="run", disable=not waiting) as bar:
        try:
            while waiting or running:
                while free and waiting:
                    slot, one = free.pop(0), waiting.pop(0)
                    gpu = gpus[slot % len(gpus)] if len(gpus) > 1 else None
                    running[slot] = (_start(one, split, workers, gpu), one)
                # The time that went by too, on a screen; into a log only when something has changed.
                names = ", ".join(one.name for _, one in running.values())
                bar.set_postfix_str(names, refresh=sys.stderr.isatty() or names != shown)
                shown = names
                time.sleep(0.5)
                for slot, (process, one) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        free.append(slot)
                        _close(process)
                        bar.update()
                        ended(one, why_failed(process.returncode, one.log()))
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                _close(process)
                process.wait()


def _start(one: PlannedRun, split: str, workers: int, gpu: str | None) -> subprocess.Popen[bytes]:
    environment = {
        # Users may have set any of these; the reasons for the last two are in the Makefile.
        "OMP_NUM_THREADS": str(max(1, _cores() // workers)),
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_MININTERVAL": "30",  # a log, not a screen
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "20000000000",
        **os.environ,
    }
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    one.log().parent.mkdir(parents=True, exist_ok=True)
    with one.log().open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "recipes.student.workers"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which ends its children in its own time
        )
    task = {"split": split, **dataclasses.asdict(one)}
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # ended already; its log says why
        process.stdin.write(json.dumps(task).encode() + b"\n")
        process.stdin.flush()
    return process


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()


def why_failed(status: int, log: Path) -> str | None:
    """Return one line about a child that ended with `status`, None if it did what it should."""
    if status == 0:
        return None
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    written = [line.strip() for line in lines if line.strip()]
    return written[-1].removeprefix("error: ") if written else f"ended with status {status}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES may name, each of them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


@contextmanager
def stopping_politely() -> Iterator[None]:
    """Turn SIGTERM into an exit that runs `finally` clauses, and Ctrl-C into a line instead of a traceback."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    except KeyboardInterrupt:
        print("\nStopped. Finished runs are kept; the same command goes on from the last checkpoints.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # returns when the pipe closes
    os._exit(1)  # training can be killed at any moment, so no clean-up is needed


def main() -> None:
    """Be a child: one run, read from standard input."""
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from recipes.student.bench import train_and_score

    split = task.pop("split")
    student = build(DistillArguments, task.pop("student"), "the bench")
    train_and_score(PlannedRun(**{**task, "student": student, "members": tuple(task["members"])}), split)


if __name__ == "__main__":
    run(main)
