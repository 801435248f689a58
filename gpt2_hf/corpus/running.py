"""Stages one after another, each of as many tasks as there are pieces of work: here, by Ray, or as jobs of Slurm.

The executors are datatrove's. A task that has ended leaves a mark in OUT/logs/STAGE/completions and is not run again.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .settings import PrepareConfig

PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class Stage:
    """Steps for one executor: run them with `tasks` tasks, after all tasks of the stage before."""

    name: str
    steps: list[Any] = field(repr=False)
    tasks: int


def run(stage: Stage, config: PrepareConfig, count: Callable[[], tuple[int, int]] | None = None) -> None:
    """Run the tasks of a stage that are not done, on this machine or by Ray.

    Args:
        stage: what to run.
        config: where, with how many workers.
        count: says how many documents and bytes of text are written so far, if the stage writes any.

    Raises what a task raised; OSError, in one line, when a worker was killed.
    """
    logs = Path(config.out).absolute() / "logs"
    completions = logs / stage.name / "completions"
    with _progress(completions, stage.tasks, count), stderr_to(logs / "datatrove.log"):
        if config.executor == "ray":
            _ray_executor(stage, config, logs / stage.name).run()
        else:
            _run_here(stage, config, logs / stage.name)
    if (done := _completed(completions)) < stage.tasks:  # Ray's executor only logs what failed
        raise OSError(f"{stage.name}: {stage.tasks - done} of {stage.tasks} tasks failed, see {logs / 'datatrove.log'}")


def submit(stages: list[Stage], config: PrepareConfig, jobs: Path) -> None:
    """Have Slurm run the stages, each after the one before; the numbers of the jobs are kept in the file `jobs`."""
    logs = Path(config.out).absolute() / "logs"
    numbers: list[str] = []
    before = None
    for stage in stages:
        with stderr_to(logs / "datatrove.log"):
            executor = _slurm_executor(stage, config, logs / stage.name, before)
            executor.run()
        state = "finished before"
        if executor.job_id != -1:
            numbers.append(str(executor.job_id))
            jobs.write_text("\n".join(numbers))
            state = f"job {executor.job_id}"
        print(f"{stage.name}: {stage.tasks} task(s), {state}", flush=True)
        before = executor


# --- executors ----------------------------------------------------------------------------------------------------


def _slurm_executor(stage: Stage, config: PrepareConfig, logs: Path, before: Any) -> Any:
    from datatrove.executor.slurm import SlurmPipelineExecutor

    return SlurmPipelineExecutor(
        stage.steps,
        tasks=stage.tasks,
        workers=config.workers or -1,
        time=config.slurm_time,
        partition=config.slurm_partition,
        mem_per_cpu_gb=config.slurm_memory_gb,
        job_name=f"gpt2_hf_{stage.name}",
        # Jobs find the packages of this environment, and this checkout.
        env_command=f'export PATH="{Path(sys.executable).parent}:$PATH" PYTHONPATH="{Path(__file__).parents[2]}"',
        logging_dir=str(logs),
        depends=before,
    )


def _ray_executor(stage: Stage, config: PrepareConfig, logs: Path) -> Any:
    from datatrove.executor.ray import RayPipelineExecutor

    return RayPipelineExecutor(
        stage.steps,
        tasks=stage.tasks,
        workers=config.workers or -1,
        mem_per_cpu_gb=config.slurm_memory_gb,
        logging_dir=str(logs),
    )


def _run_here(stage: Stage, config: PrepareConfig, logs: Path) -> None:
    """Datatrove's tasks in processes of our own: its pool waits for ever for a worker that the system has killed."""
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.utils.stats import PipelineStats

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(config.workers or cores, stage.tasks)
    executor = LocalPipelineExecutor(stage.steps, tasks=stage.tasks, workers=workers, logging_dir=str(logs))
    if not (ranks := executor.get_incomplete_ranks()):
        return
    executor.save_executor_as_json()
    if workers == 1:
        stats = list(map(executor._run_for_rank, ranks))
    else:
        try:
            stats = _map_in_processes(workers, executor._run_for_rank, ranks)
        except BrokenProcessPool as error:
            raise OSError(
                f"{stage.name}: a worker was killed, probably because memory ran out: use fewer --workers; the same "
                "command goes on with what is not done"
            ) from error
    with executor.logging_dir.open("stats.json", "wt") as file:
        sum(stats, start=PipelineStats()).save_to_disk(file)


def _map_in_processes(workers: int, task: Callable[[int], Any], ranks: list[int]) -> list[Any]:
    """What `task` returns for each rank. When one fails, or this is interrupted, those still at work are ended."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("forkserver")  # a process with threads, as PyTorch has, may not be forked
    # The task knows all pieces of a corpus, so it goes to each worker once, not with each rank.
    with ProcessPoolExecutor(workers, context, _start_worker, (task,)) as pool:
        try:
            return list(pool.map(_run_task, ranks))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise


_task: Callable[[int], Any]  # of this process, which is a worker


def _start_worker(task: Callable[[int], Any]) -> None:
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Control-C is for the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """However the parent ended: otherwise a worker would wait for its next task for ever."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _run_task(rank: int) -> Any:
    return _task(rank)


# --- what is seen of it -------------------------------------------------------------------------------------------


def _completed(completions: Path) -> int:
    return sum(1 for _ in completions.glob("*"))


@contextlib.contextmanager
def _progress(completions: Path, tasks: int, count: Callable[[], tuple[int, int]] | None) -> Iterator[None]:
    """Print a line of progress now and then, from what the workers have written so far, and one at the end."""
    began, stop = time.monotonic(), threading.Event()
    done_before = _completed(completions)
    documents_before, bytes_before = count() if count else (0, 0)

    def show() -> None:
        seconds = time.monotonic() - began
        done = _completed(completions)
        parts = [f"{done} of {tasks} tasks"]
        if count:
            documents, n_bytes = count()
            speed = (documents - documents_before) / seconds
            mb_speed = (n_bytes - bytes_before) / 1e6 / seconds
            parts.insert(0, f"{documents:,} documents, {n_bytes / 1e6:,.1f} MB of text")
            parts.insert(1, f"{speed:,.0f} documents/s, {mb_speed:.1f} MB/s")
        if done_before < done < tasks:
            left = seconds * (tasks - done) / (done - done_before)
            parts.append(f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left")
        print("; ".join(parts), flush=True)

    def repeat() -> None:
        while not stop.wait(PROGRESS_SECONDS):
            show()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if count:
        show()


@contextlib.contextmanager
def stderr_to(log: Path) -> Iterator[None]:
    """Send file descriptor 2 to `log`: datatrove insists on logging everything there, in the workers as well."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)
