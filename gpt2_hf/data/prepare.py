"""Documents -> token shards: datatrove pipelines, one after another, run on this machine, by Slurm or by Ray.

    inputs -> tasks -> minhash stages, if near-duplicates must go
                    -> tokens, N tasks: ReadDocuments -> MarkNearDuplicates -> MarkContaminated -> WriteTokens: parts/
                    -> shards, one task: WriteShards: train/, val/, report.json, report.md, manifest.json

Tasks follow from the inputs alone (read.py), and parts are joined in the order of the tasks, so the shards do not
depend on the number of workers. A document goes to validation by a hash of its text: equal texts stay on one side, and
the same text goes the same way from a .txt, a .jsonl or a .parquet file. A run that was killed goes on with the tasks
that it had not finished.
"""

import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .clean import MarkContaminated, MarkNearDuplicates, Stage, describe_evaluations, minhash_stages
from .export import export_llmc
from .read import TASK_BYTES, Piece, ReadDocuments, Source, describe, find_files, plan
from .write import RECORD, Split, WriteShards, WriteTokens, write_json

SHAKESPEARE_VAL = ("a-midsummer-night-s-dream", "macbeth")
OUR_FOLDERS = ("train", "val", "logs")
REMEDY = "choose another --out, or pass --overwrite true"


@dataclass(frozen=True)
class PrepareConfig:
    """What to turn into token shards, and how.

    Args:
        inputs: .txt, .jsonl, .ndjson (also .gz, .zst) or .parquet files, folders or globs; "shakespeare" is built in.
        dataset: instead of inputs, a dataset on the Hub (streamed) or a folder that save_to_disk wrote.
        name: configuration of the Hub dataset, such as sample-10BT.
        revision: commit, tag or branch of the Hub dataset.
        split: split of the dataset to read.
        text_field: field or column that has the text; a .txt file is one document.
        separator: or a .txt is cut into documents at this text, such as "<|endoftext|>".
        out: folder to write to.
        workers: processes; 0 means one per core. The shards do not depend on it.
        tokens_per_shard: a new shard starts when the last one has this many tokens.
        val_fraction: share of the documents held out for validation, 0 for none (default 0.01).
        val_documents: or the number of documents held out (copies of one text stay together).
        val_ids: or the ids of the documents held out (field "id"; for a .txt file its name without suffix).
        on_error: what to do with a document or file that cannot be used: skip it and report it, or stop.
        dedup: none, exact (of equal texts the first stays), or minhash (also of nearly equal ones).
        exclude_wikipedia: leave out Wikipedia's pages, as WebText did (known by "url" or their first lines).
        decontaminate: "hellaswag", or .jsonl files of evaluation items: documents that share a passage with one...
        contaminated: ...are dropped, or only reported.
        decontaminate_ngram: words that such a passage has.
        overwrite: replace what the folder holds if something else was prepared there.
        export: also write the shards in another program's format: llmc, to OUT/llmc.
        executor: where the work is done: local, slurm or ray (datatrove's).
        slurm_partition: partition to submit to.
        slurm_time: time limit of a job.
        slurm_memory_gb: memory of a task, for Slurm and Ray.
    """

    inputs: tuple[str, ...] = ()
    dataset: str | None = None
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    text_field: str = "text"
    separator: str | None = None
    out: str = ""
    workers: int = 0
    tokens_per_shard: int = 100_000_000
    val_fraction: float | None = None
    val_documents: int | None = None
    val_ids: tuple[str, ...] = ()
    on_error: Literal["skip", "stop"] = "skip"
    dedup: Literal["none", "exact", "minhash"] = "none"
    exclude_wikipedia: bool = False
    decontaminate: tuple[str, ...] = ()
    contaminated: Literal["drop", "report"] = "drop"
    decontaminate_ngram: int = 13
    overwrite: bool = False
    export: Literal["none", "llmc"] = "none"
    executor: Literal["local", "slurm", "ray"] = "local"
    slurm_partition: str = ""
    slurm_time: str = "24:00:00"
    slurm_memory_gb: int = 4

    def __post_init__(self) -> None:
        if bool(self.inputs) == bool(self.dataset):
            raise ValueError(f"inputs is {list(self.inputs)} and dataset is {self.dataset}: name one of the two")
        if not self.out:
            raise ValueError("out is empty: name the folder to write to, such as --out data/mine")
        if self.workers < 0 or self.tokens_per_shard < 1:
            raise ValueError(
                f"workers={self.workers}, tokens_per_shard={self.tokens_per_shard}: workers must be >= 0 and "
                "tokens_per_shard >= 1"
            )
        if (self.val_fraction is not None) + (self.val_documents is not None) + bool(self.val_ids) > 1:
            raise ValueError("val_fraction, val_documents and val_ids are set together: keep one of them")
        if self.val_fraction is not None and not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}: choose 0 <= val_fraction < 1")
        if self.val_documents is not None and self.val_documents < 0:
            raise ValueError(f"val_documents is {self.val_documents}: choose 0 or more")
        if self.separator == "":
            raise ValueError("separator is empty: leave it out, or name a text")
        if self.decontaminate_ngram < 1:
            raise ValueError(f"decontaminate_ngram is {self.decontaminate_ngram}: choose 1 or more (13 is usual)")
        if self.executor == "slurm" and not self.slurm_partition:
            raise ValueError("slurm_partition is empty: name the partition to submit to, see sinfo")

    def resolved(self) -> "PrepareConfig":
        """The same with the validation split's default filled in."""
        if self.val_fraction is not None or self.val_documents is not None or self.val_ids:
            return self
        if self.inputs == ("shakespeare",):
            return replace(self, val_ids=SHAKESPEARE_VAL)
        return replace(self, val_fraction=0.01)

    def recorded(self) -> dict[str, Any]:
        """What the shards depend on, as JSON: no worker count, and names in place of local paths."""
        values = asdict(self)
        for name in ("out", "workers", "overwrite", "on_error", "export", "executor"):
            del values[name]
        values = {name: value for name, value in values.items() if not name.startswith("slurm_")}
        values["inputs"] = [Path(item).name for item in self.inputs]
        values["decontaminate"] = describe_evaluations(self.decontaminate, self.decontaminate_ngram)
        values["val_ids"] = list(self.val_ids)
        if self.dataset and Path(self.dataset).is_dir():
            values["dataset"] = Path(self.dataset).name
        return values

    def source(self) -> Source:
        return Source(**{item.name: getattr(self, item.name) for item in fields(Source)})


def prepare(config: PrepareConfig) -> Path:
    """Write the shards of `config.inputs` or `config.dataset` under `config.out`; return the manifest's path.

    A folder that already holds the result is left as it is, one that holds something else is refused unless
    `config.overwrite`. With Slurm it returns when the jobs are submitted. Raises ValueError or OSError with one line
    that says what to do.
    """
    config = config.resolved()
    out = Path(config.out)
    manifest_path = out / "manifest.json"
    if manifest_path.exists() and not config.overwrite:
        _check_same(config, json.loads(manifest_path.read_text(encoding="utf-8")))
        print(f"{manifest_path}: already prepared")
    else:
        if config.executor == "slurm" and not shutil.which("sbatch"):
            raise ValueError(
                "sbatch is not there: run this where Slurm jobs are submitted, or choose another --executor"
            )
        if config.executor == "ray" and not importlib.util.find_spec("ray"):
            raise ValueError("Ray is not there: pip install ray, or choose another --executor")
        facts, source, tasks = plan(config.source())
        # The plan is this run's identity: a later start with the same plan goes on with it.
        identity = {"config": config.recorded(), "source": facts, "task_bytes": TASK_BYTES}
        with _only_writer(out):
            _start_or_resume(out, identity, config.overwrite)
            _run(_stages(config, facts, source, tasks), config)
        if config.executor == "slurm":
            return manifest_path
        print(f"{manifest_path}: written")
    shutil.rmtree(out / "parts", ignore_errors=True)
    if config.export == "llmc" and not (out / "llmc").exists():
        export_llmc(out, out / "llmc")
        print(f"{out / 'llmc'}: written for llm.c")
    return manifest_path


def _stages(config: PrepareConfig, facts: dict[str, Any], source: Source, tasks: list[list[Piece]]) -> list[Stage]:
    """The pipelines, in order."""
    out = Path(config.out).absolute()  # jobs of a cluster run elsewhere
    parts = out / "parts"
    read = ReadDocuments(source, tasks)
    stages: list[Stage] = []
    steps: list[Callable] = [read]
    if config.dedup == "minhash":
        stages += minhash_stages(read, str(parts / "minhash"), len(tasks))
        steps.append(MarkNearDuplicates(str(parts / "minhash")))
    if config.decontaminate:
        evaluations = tuple(str(Path(e).absolute()) if Path(e).exists() else e for e in config.decontaminate)
        steps.append(MarkContaminated(evaluations, config.decontaminate_ngram, config.contaminated))
    steps.append(WriteTokens(str(parts), config.val_ids, config.on_error == "stop"))
    split = Split(
        config.val_fraction, config.val_documents, config.val_ids, config.tokens_per_shard, config.dedup != "none"
    )
    shards = WriteShards(str(out), split, tasks, config.recorded(), facts)
    return [*stages, Stage("tokens", steps, len(tasks)), Stage("shards", [shards], 1)]


def _check_same(config: PrepareConfig, done: dict[str, Any]) -> None:
    """Raise ValueError unless the manifest `done` is what `config` would give."""
    if done.get("format") != "gpt2_hf/shards":
        raise ValueError(f"{config.out}/manifest.json was not written by this program: choose another --out")
    old, new = done.get("config", {}), config.recorded()
    if old != new:
        changes = ", ".join(f"{key} was {old.get(key)}, now {new[key]}" for key in new if old.get(key) != new[key])
        raise ValueError(f"{config.out} was prepared with other settings ({changes}): {REMEDY}")
    # Shards whose inputs were deleted since stay good.
    with contextlib.suppress(FileNotFoundError):
        if config.inputs and describe(find_files(config.inputs)) != done.get("source"):
            raise ValueError(f"{config.out} was prepared from inputs that have changed since: {REMEDY}")


@contextlib.contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Refuse a second preparation into the same folder while one is at work there."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            # Not flock, which the processes that datatrove forks would hold on to when this one is killed.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{out} is being prepared by another process: wait for it, or choose another --out"
            ) from None
        yield


def _start_or_resume(out: Path, plan: dict[str, Any], overwrite: bool) -> None:
    """Keep the finished tasks of the same plan; clear what another one left, if that is allowed."""
    manifest_path, plan_path = out / "manifest.json", out / "parts" / "plan.json"
    if manifest_path.exists() and json.loads(manifest_path.read_text()).get("format") != "gpt2_hf/shards":
        raise ValueError(f"{manifest_path} was not written by this program: choose another --out")
    if plan_path.exists() and not manifest_path.exists():
        unfinished = json.loads(plan_path.read_text(encoding="utf-8"))
        if unfinished == plan:
            for part in plan_path.parent.glob("*.d*.*"):  # what killed workers had not finished
                part.unlink()
            print(f"{out}: going on with an unfinished preparation")
            return
        if unfinished and not overwrite:
            raise ValueError(f"{out} holds an unfinished preparation of something else: {REMEDY}")
    elif not manifest_path.exists() and (foreign := [name for name in OUR_FOLDERS if (out / name).exists()]):
        raise ValueError(f"{out} holds {', '.join(foreign)} from elsewhere: choose another --out, or move them away")
    plan_path.parent.mkdir(parents=True, exist_ok=True)
    write_json(plan_path, {})  # if this is cut short, the next start knows that the rest may be cleared
    manifest_path.unlink(missing_ok=True)
    for name in (*OUR_FOLDERS, "llmc", "parts/minhash"):
        shutil.rmtree(out / name, ignore_errors=True)
    for part in plan_path.parent.glob("[0-9]*"):
        part.unlink()
    write_json(plan_path, plan)


# --- running ------------------------------------------------------------------------------------------------------


def _run(stages: list[Stage], config: PrepareConfig) -> None:
    """Run the stages one after another; with Slurm, submit them so that each waits for the one before."""
    out = Path(config.out).absolute()
    log = out / "logs" / "datatrove.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    before = None
    for stage in stages:
        with _stderr_to(log):
            executor = _executor(config, stage, str(out / "logs" / stage.name), before)
        if config.executor == "slurm":
            with _stderr_to(log):
                executor.run()
            state = "finished before" if executor.job_id == -1 else f"job {executor.job_id}"
            print(f"{stage.name}: {stage.tasks} task(s), {state}", flush=True)
            before = executor
            continue
        if stage.name != "shards":
            print(f"{config.out}: {stage.name}, {stage.tasks} task(s), log in {log}", flush=True)
        show = _count_documents(out / "parts") if stage.name == "tokens" else None
        completions = out / "logs" / stage.name / "completions"
        with _progress(completions, stage, show), _children_die_with_us(), _stderr_to(log):
            executor.run()
        if (done := sum(1 for _ in completions.iterdir())) < stage.tasks:  # Ray's executor only logs what failed
            raise OSError(f"{stage.name}: {stage.tasks - done} of {stage.tasks} tasks failed, see {log}")
    if config.executor == "slurm":
        print(f"{out / 'manifest.json'} will be written by the last job; logs are in {log.parent}")


def _executor(config: PrepareConfig, stage: Stage, logs: str, before: Any) -> Any:
    """Datatrove's executor for one stage."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(config.workers or cores, stage.tasks)
    if config.executor == "slurm":
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
            logging_dir=logs,
            depends=before,
        )
    if config.executor == "ray":
        from datatrove.executor.ray import RayPipelineExecutor

        return RayPipelineExecutor(
            stage.steps,
            tasks=stage.tasks,
            workers=config.workers or -1,
            mem_per_cpu_gb=config.slurm_memory_gb,
            logging_dir=logs,
        )
    from datatrove.executor.local import LocalPipelineExecutor

    return LocalPipelineExecutor(stage.steps, tasks=stage.tasks, workers=workers, logging_dir=logs)


def _count_documents(parts: Path) -> Callable[[], np.ndarray]:
    """A function that counts documents and megabytes of text in the parts that are written or being written."""

    def count() -> np.ndarray:
        total = np.zeros(2)
        for path in parts.glob("*.docs*"):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # it may be renamed meanwhile
                documents = path.stat().st_size // RECORD.itemsize
                file.seek(max(documents - 1, 0) * RECORD.itemsize)
                last = np.frombuffer(file.read(RECORD.itemsize)[: RECORD.itemsize * bool(documents)], RECORD)
                total += (documents, last["byte_end"].sum() / 1e6)
        return total

    return count


@contextlib.contextmanager
def _progress(
    completions: Path, stage: Stage, count: Callable[[], np.ndarray] | None, seconds: float = 5.0
) -> Iterator[None]:
    """Print a line of progress now and then, from what the workers have written so far."""
    began, stop = time.monotonic(), threading.Event()
    tasks_before = sum(1 for _ in completions.glob("*"))
    before = np.zeros(2) if count is None else count()

    def show() -> None:
        spent = time.monotonic() - began
        done = sum(1 for _ in completions.glob("*"))
        parts = [f"{done} of {stage.tasks} tasks"]
        if count is not None:
            now = count()
            rate = (now - before) / spent
            parts[:0] = [
                f"{now[0]:,.0f} documents, {now[1]:,.1f} MB of text; {rate[0]:,.0f} documents/s, {rate[1]:.1f} MB/s"
            ]
        if tasks_before < done < stage.tasks:
            left = spent * (stage.tasks - done) / (done - tasks_before)
            parts.append(f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left")
        print("; ".join(parts), flush=True)

    def repeat() -> None:
        while not stop.wait(seconds):
            show()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if count is not None:
        show()


_tied = False  # whether children that are forked now die with this process


@functools.cache
def _watch_forks() -> None:
    """From now on, forked children look at _tied. It cannot be undone, hence the switch."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        os.register_at_fork(after_in_child=lambda: _tied and libc.prctl(1, signal.SIGKILL))  # 1: PR_SET_PDEATHSIG


@contextlib.contextmanager
def _children_die_with_us() -> Iterator[None]:
    """Without this, datatrove's manager process outlives a killed parent for ever."""
    global _tied
    _watch_forks()
    _tied = True
    try:
        yield
    finally:
        _tied = False


@contextlib.contextmanager
def _stderr_to(log: Path) -> Iterator[None]:
    """Send file descriptor 2 to `log`: datatrove insists on logging everything there, in the workers as well."""
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
