"""A process beside training that publishes the run's checkpoints, and its final model, as they come.

Training never waits for it but at the run's end, for a bounded time: a Hub that is slow, down, or refuses the token
costs the uploads and nothing else. What was tried is in RUN/publish.log, what was published in RUN/published.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import runs
from ..program import serve_parent

if TYPE_CHECKING:
    from ..config import PublishSection

LOG, PUBLISHED = "publish.log", "published.jsonl"
POLL_S = 2.0
WAITS_S = (10.0, 600.0)  # after an error: at first, and at most


@contextmanager
def following(run: Path, settings: PublishSection, is_first: bool) -> Iterator[None]:
    """Have what the run writes published, if ``settings`` name a repository, by a process that the first rank starts.

    Leaving in order waits for the final model at most ``settings.wait_s`` seconds; leaving by an error or a signal does
    not wait, as the next start goes on with it.
    """
    if not (settings.repo and is_first):
        yield
        return
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(run)],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a Ctrl-C in the terminal is for training, which then ends this one
        # Its threads must not take training's cores.
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    try:
        told = {"repo": settings.repo, "every_steps": settings.every_steps, "public": settings.public}
        _tell(process, json.dumps(told | {"license": settings.license}))
        yield
        _tell(process, "finish")
        try:
            process.wait(settings.wait_s)
        except subprocess.TimeoutExpired:
            print(
                f"{run / 'final'} is not published after {settings.wait_s:.0f} s (see {run / LOG}); publish it with: "
                f"python scripts/publish.py {run} --repo {settings.repo}",
                flush=True,
            )
    finally:
        process.kill()
        process.wait()


def _tell(process: subprocess.Popen[str], line: str) -> None:
    with suppress(OSError, ValueError):
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()


# The publishing process


def follow(run: Path) -> None:
    """Publish what is due until training says on stdin that it has ended, and its final model is published."""
    settings = json.loads(sys.stdin.readline())
    finishing, wake = serve_parent()
    pause, has_failed = WAITS_S[0], False
    while True:
        try:
            path = due(run, settings["every_steps"], finishing.is_set())
            if path is not None:
                push_one(run, path, settings)
                if has_failed:
                    print(f"publishing to {settings['repo']} works again", flush=True)
                pause, has_failed = WAITS_S[0], False
                continue
            if finishing.is_set():
                return
            wake.clear()
            wake.wait(POLL_S)
        except Exception as error:  # whatever it is, it may be over the next time
            line = " ".join(str(error).split()) or type(error).__name__
            _log(run, f"{line}; next try in {pause:.0f} s")
            if not has_failed:
                print(f"publishing to {settings['repo']} fails, and is tried again: {line}", flush=True)
            has_failed = True
            wake.clear()
            wake.wait(min(pause, 5.0) if finishing.is_set() else pause)
            pause = min(2 * pause, WAITS_S[1])


def due(run: Path, every_steps: int, is_over: bool) -> Path | None:
    """The model to publish next: the newest whole one that is due and was not published yet; None: there is none."""
    saved = runs.saved_steps(run / "checkpoints") if (run / "checkpoints").is_dir() else {}
    newest = next((saved[step] for step in reversed(saved) if runs.is_whole(saved[step])), None)
    if is_over and runs.final_problem(run, newest) is None:
        found: Path | None = run / "final"
    else:
        steps = [step for step in reversed(saved) if every_steps and step % every_steps == 0]
        found = next((saved[step] for step in steps if runs.is_whole(saved[step])), None)
    if found is None or _mark(run, found) in [row.get("mark") for row in runs.read_rows(run / PUBLISHED)]:
        return None
    return found


def push_one(run: Path, path: Path, settings: dict[str, Any]) -> None:
    """Publish one model of the run, and note it."""
    from .privacy import PublishError
    from .publish import publish

    mark = _mark(run, path)
    # A licence is for a new card; the next publishing finds one.
    license = None if (run / PUBLISHED).exists() else settings["license"]
    with (run / LOG).open("a") as log, redirect_stdout(log), redirect_stderr(log):
        if not publish(path, settings["repo"], public=settings["public"], license=license):
            raise PublishError(f"{path} is not published: a check FAILED, see {run / LOG}")
    row = {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "mark": mark, "repo": settings["repo"]}
    with (run / PUBLISHED).open("a") as file:
        file.write(json.dumps(row) + "\n")


def _mark(run: Path, path: Path) -> str:
    """A model's name and content: what was published under it is not published again."""
    return f"{path.relative_to(run)} {hashlib.sha256((path / runs.MANIFEST).read_bytes()).hexdigest()[:16]}"


def _log(run: Path, line: str) -> None:
    with suppress(OSError), (run / LOG).open("a") as log:
        log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {line}\n")


if __name__ == "__main__":
    follow(Path(sys.argv[1]))
