"""Documents -> token shards: datatrove pipelines, one after another, run on this machine, by Slurm or by Ray.

    inputs -> tasks -> minhash stages, if near-duplicates must go
                    -> tokens, N tasks: ReadDocuments -> MarkNearDuplicates -> MarkContaminated -> WriteTokens: parts/
                    -> shards, one task: WriteShards: train/, val/, report.json, report.md, manifest.json

Tasks follow from the inputs alone (read.py), and parts are joined in the order of the tasks, so the shards do not
depend on the number of workers. A document goes to validation by a hash of its text: equal texts stay on one side, and
the same text goes the same way from a .txt, a .jsonl or a .parquet file. A run that was killed goes on with the tasks
that it had not finished.
"""

import _thread
import codecs
import contextlib
import ctypes
import errno
import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from ..data.shards import FORMAT, VERSION
from ..knobs import ConfigError, Filled, PathName, Range
from ..program import UserError
from .audit import ERRORS
from .clean import MarkContaminated, MarkNearDuplicates, Stage, describe_evaluations, minhash_stages
from .export import export_llmc
from .inputs import BY_DATASETS, listing, unread_files
from .read import TASK_BYTES, Piece, ReadDocuments, Source, describe, find_files, plan
from .write import RECORD, Split, WriteShards, WriteTokens, write_json

SHAKESPEARE_VAL = ("a-midsummer-night-s-dream", "macbeth")
WORK = ".preparing"  # below --out while it works: the plan, tokens by task, what the stages leave for each other
RESULTS = ("train", "val", "logs", "llmc", "report.json", "report.md")
SETTLED_LATE = ("tokens_per_shard", "val_fraction", "val_documents")  # by the last stage: finished tasks stay good
REMEDY = "choose another --out, or pass --overwrite true"


@dataclass(frozen=True)
class PrepareConfig(Source):
    """What to turn into token shards, and how.

    Args:
        inputs: .txt, .json, .jsonl, .ndjson (also .gz, .zst, .bz2, .xz) or .parquet files, folders or globs;
            "shakespeare" is built in.
        dataset: instead of inputs, a dataset on the Hub (streamed) or a folder that save_to_disk wrote.
        name: configuration of the Hub dataset, such as sample-10BT.
        revision: commit, tag or branch of the Hub dataset.
        split: split of the dataset to read.
        text_field: field or column that has the text, data.text for one inside another; a .txt file is one document.
        encoding: of text files, such as latin-1 or utf-16.
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

    out: Annotated[str, PathName()] = ""
    workers: Annotated[int, Range(0, 10_000)] = 0
    tokens_per_shard: Annotated[int, Range(1)] = 100_000_000
    val_fraction: Annotated[float, Range(0, below=1)] | None = None
    val_documents: Annotated[int, Range(0)] | None = None
    val_ids: tuple[str, ...] = ()
    on_error: Literal["skip", "stop"] = "skip"
    dedup: Literal["none", "exact", "minhash"] = "none"
    decontaminate: tuple[Annotated[str, PathName()], ...] = ()
    contaminated: Literal["drop", "report"] = "drop"
    decontaminate_ngram: Annotated[int, Range(1, 100)] = 13
    overwrite: bool = False
    export: Literal["none", "llmc"] = "none"
    executor: Literal["local", "slurm", "ray"] = "local"
    slurm_partition: str = ""
    slurm_time: Annotated[str, Filled()] = "24:00:00"
    slurm_memory_gb: Annotated[int, Range(1, 10_000)] = 4

    def __post_init__(self) -> None:
        if not self.out:
            raise ConfigError("out is empty: name the folder to write to, such as --out data/mine")
        super().__post_init__()
        if bool(self.inputs) == bool(self.dataset):
            raise ConfigError(f"inputs is {list(self.inputs)} and dataset is {self.dataset}: name one of the two")
        if (self.val_fraction is not None) + (self.val_documents is not None) + bool(self.val_ids) > 1:
            raise ConfigError("val_fraction, val_documents and val_ids are set together: keep one of them")
        try:
            codecs.lookup(self.encoding)
        except (LookupError, ValueError):
            raise ConfigError(f"encoding is {self.encoding!r}: choose one that Python knows, such as latin-1") from None
        if self.separator == "":
            raise ConfigError("separator is empty: leave it out, or name a text")
        if self.executor == "slurm" and not self.slurm_partition:
            raise ConfigError("slurm_partition is empty: name the partition to submit to, see sinfo")

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
        if self.encoding == "utf-8":  # as in manifests from before there was a choice
            del values["encoding"]
        values["inputs"] = [Path(item).name for item in self.inputs]
        values["decontaminate"] = describe_evaluations(self.decontaminate, self.decontaminate_ngram)
        values["val_ids"] = list(self.val_ids)
        if self.dataset and Path(self.dataset).is_dir():
            values["dataset"] = Path(self.dataset).name
        return values

    def source(self) -> Source:
        values = {item.name: getattr(self, item.name) for item in fields(Source)}
        if self.separator:  # as it is typed in a shell
            values["separator"] = self.separator.replace("\\n", "\n").replace("\\t", "\t")
        return Source(**values)


def prepare(config: PrepareConfig) -> Path:
    """Write the shards of `config.inputs` or `config.dataset` under `config.out`; return the manifest's path.

    A folder that already holds the result is left as it is, one that holds something else is refused unless
    `config.overwrite`. With Slurm it returns when the jobs are submitted. Raises ValueError or OSError with one line
    that says what to do.
    """
    config = config.resolved()
    out = Path(config.out)
    manifest_path = out / "manifest.json"
    if (done := _read_manifest(manifest_path)) is not None and not config.overwrite:
        _check_same(config, done)
        print(f"{manifest_path}: already prepared")
    else:
        if config.executor == "slurm" and not shutil.which("sbatch"):
            raise ValueError(
                "sbatch is not there: run this where Slurm jobs are submitted, or choose another --executor"
            )
        if config.executor == "ray" and not importlib.util.find_spec("ray"):
            raise ValueError("Ray is not there: pip install ray, or choose another --executor")
        facts, source, tasks = plan(config.source(), out)
        # The plan is this run's identity: a later start with the same plan goes on with it.
        recorded = {key: value for key, value in config.recorded().items() if key not in SETTLED_LATE}
        changed = [os.stat(piece.path).st_mtime_ns for task in tasks for piece in task if piece.kind != "rows"]
        identity = {"config": recorded, "source": facts, "task_bytes": TASK_BYTES, "changed": changed}
        with _only_writer(out):
            _start_or_resume(out, identity, config)
            unread = unread_files(config.inputs, out)
            _run(_stages(config, facts, source, tasks, unread), config)
        if config.executor == "slurm":
            return manifest_path
        print(f"{manifest_path}: written")
        if unread:
            _say_unread(facts["files"], unread)
    shutil.rmtree(out / WORK, ignore_errors=True)
    if config.export == "llmc" and not (out / "llmc").exists():
        export_llmc(out, out / "llmc")
        print(f"{out / 'llmc'}: written for llm.c")
    return manifest_path


def _say_unread(read: int, unread: dict[str, int]) -> None:
    ours = sorted({*unread} & {*BY_DATASETS})
    remedy = f"; --dataset FOLDER reads a folder of {' or '.join(ours)}" if ours else ""
    print(f"read {read:,} files; not read, by their ending: {listing(unread)}{remedy}")


def _stages(
    config: PrepareConfig, facts: dict[str, Any], source: Source, tasks: list[list[Piece]], unread: dict[str, int]
) -> list[Stage]:
    """The pipelines, in order."""
    out = Path(config.out).absolute()  # jobs of a cluster run elsewhere
    work = out / WORK
    read = ReadDocuments(source, tasks, str(work / "running"))
    stages: list[Stage] = []
    steps: list[Callable] = [read]
    if config.dedup == "minhash":
        stages += minhash_stages(read, str(work / "minhash"), len(tasks))
        steps.append(MarkNearDuplicates(str(work / "minhash")))
    if config.decontaminate:
        evaluations = tuple(str(Path(e).absolute()) if Path(e).exists() else e for e in config.decontaminate)
        steps.append(MarkContaminated(evaluations, config.decontaminate_ngram, config.contaminated))
    stop = config.on_error == "stop"
    steps.append(WriteTokens(str(work), config.val_ids, stop))
    split = Split(
        config.val_fraction, config.val_documents, config.val_ids, config.tokens_per_shard, config.dedup != "none"
    )
    shards = WriteShards(str(out), str(work), split, tasks, config.recorded(), facts, unread, stop)
    return [*stages, Stage("tokens", steps, len(tasks)), Stage("shards", [shards], 1)]


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a finished preparation, if there is one."""
    if not path.exists():
        return None
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        done = None
    if not isinstance(done, dict) or done.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by this program, or is damaged: choose another --out")
    return done


def _check_same(config: PrepareConfig, done: dict[str, Any]) -> None:
    """Raise ValueError unless the manifest `done` is what `config` would give."""
    out = Path(config.out)
    if done.get("version") != VERSION:
        raise ValueError(f"{out} was prepared by an earlier version: {REMEDY}")
    old, new = done.get("config", {}), config.recorded()
    if old != new:
        changes = ", ".join(
            f"{key} was {old.get(key)}, now {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)
        )
        raise ValueError(f"{config.out} was prepared with other settings ({changes}): {REMEDY}")
    # Shards whose inputs were deleted since stay good. What the Hub has now is not asked.
    with contextlib.suppress(FileNotFoundError):
        saved = config.dataset and Path(config.dataset).is_dir()
        now = describe(find_files(config.inputs, out)) if config.inputs else plan(config.source())[0] if saved else None
        if now is not None and now != done.get("source"):
            raise ValueError(f"{out} was prepared from inputs that have changed since: {REMEDY}")
    for split in done["splits"].values():
        for shard in split["shards"]:
            path = out / shard["file"]
            if not path.exists() or path.stat().st_size != 2 * shard["tokens"]:
                raise ValueError(f"{path} is missing or cut short: pass --overwrite true to prepare the data again")
    errors = {reason: count for reason, count in done["dropped"].items() if reason in ERRORS and count}
    if config.on_error == "stop" and errors:
        raise ValueError(f"{out} was prepared without {errors}, see {out / 'report.md'}: {REMEDY}")


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
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"{out} is being prepared by another process: wait for it, or choose another --out"
                ) from None
            print(f"{out} cannot be locked ({error.strerror}): see to it that no other process prepares data there")
        yield


def _start_or_resume(out: Path, plan: dict[str, Any], config: PrepareConfig) -> None:
    """Keep the finished tasks of the same plan; clear what another one left, if that is allowed."""
    work, manifest_path = out / WORK, out / "manifest.json"
    plan_path = work / "plan.json"
    if plan_path.exists() and not manifest_path.exists():
        _refuse_while_queued(work / "jobs")
        unfinished = json.loads(plan_path.read_text(encoding="utf-8"))
        if unfinished == plan:
            if config.executor == "local":  # what killed workers had not finished
                for part in [*work.glob("*.d*.*"), *work.glob("running/*")]:
                    part.unlink(missing_ok=True)
            shutil.rmtree(out / "logs" / "shards", ignore_errors=True)
            print(f"{out}: going on with an unfinished preparation")
            return
        if unfinished and not config.overwrite and not _is_corrected(work, unfinished, plan):
            raise UserError(f"{out} holds an unfinished preparation of something else: {REMEDY}")
        if unfinished:
            print(f"{out}: starting anew, in place of an unfinished preparation with other settings")
    elif not manifest_path.exists() and (foreign := [name for name in RESULTS if (out / name).exists()]):
        raise ValueError(f"{out} holds {', '.join(foreign)} from elsewhere: choose another --out, or move them away")
    work.mkdir(parents=True, exist_ok=True)
    write_json(plan_path, {})  # if this is cut short, the next start knows that the rest may be cleared
    manifest_path.unlink(missing_ok=True)
    for path in (*(out / name for name in RESULTS), *work.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        elif path != plan_path:
            path.unlink(missing_ok=True)
    (work / "running").mkdir()
    write_json(plan_path, plan)


def _is_corrected(work: Path, unfinished: dict[str, Any], plan: dict[str, Any]) -> bool:
    """Whether nothing is lost by starting anew: no tokens were kept, or val_ids alone differ, which no earlier run
    that has come so far can have found right."""
    if not any(part.stat().st_size for part in work.glob("*.ds")):
        return True
    old, new = unfinished["config"] | {"val_ids": None}, plan["config"] | {"val_ids": None}
    return unfinished | {"config": old} == plan | {"config": new}


def _refuse_while_queued(jobs: Path) -> None:
    """Jobs of Slurm that were submitted earlier would write the same files."""
    if jobs.exists() and shutil.which("squeue"):
        numbers = ",".join(jobs.read_text().split())
        queued = subprocess.run(["squeue", "--noheader", "--jobs", numbers], capture_output=True, text=True)
        if queued.stdout.strip():
            raise ValueError(
                f"jobs of an earlier start are queued (squeue --jobs {numbers}): wait for them, or scancel them"
            )


# --- running ------------------------------------------------------------------------------------------------------


def _run(stages: list[Stage], config: PrepareConfig) -> None:
    """Run the stages one after another; with Slurm, submit them so that each waits for the one before."""
    out = Path(config.out).absolute()
    log = out / "logs" / "datatrove.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    jobs: list[str] = []
    before = None
    for stage in stages:
        with _stderr_to(log):
            executor = _executor(config, stage, str(out / "logs" / stage.name), before)
        if config.executor == "slurm":
            with _stderr_to(log):
                executor.run()
            if executor.job_id != -1:
                jobs.append(str(executor.job_id))
                (out / WORK / "jobs").write_text("\n".join(jobs))
            state = "finished before" if executor.job_id == -1 else f"job {executor.job_id}"
            print(f"{stage.name}: {stage.tasks} task(s), {state}", flush=True)
            before = executor
            continue
        if stage.name != "shards":
            print(f"{config.out}: {stage.name}, {stage.tasks} task(s), log in {log}", flush=True)
        show = _count_documents(out / WORK) if stage.name == "tokens" else None
        completions = out / "logs" / stage.name / "completions"
        lost = _lost_workers(out / WORK / "running") if config.executor == "local" else None
        noticed = threading.Event()
        try:
            with _progress(completions, stage, show, lost, noticed), _children_die_with_us(), _stderr_to(log):
                executor.run()
        except (KeyboardInterrupt, ConnectionError, EOFError) as error:  # the last two from a manager that was killed
            if lost is None or (isinstance(error, KeyboardInterrupt) and not noticed.is_set()):
                raise
            raise OSError(
                f"{stage.name}: a worker was killed, probably because memory ran out: use fewer --workers; the same "
                "command goes on with what is not done"
            ) from None
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


def _lost_workers(running: Path) -> Callable[[], bool]:
    """A function that says whether a process vanished in the middle of a task: datatrove would wait for it for ever."""

    helpers: set[int] = set()

    def lost() -> bool:
        children = _children()
        if helpers - children:  # datatrove's manager, or the server that forks its workers
            for marker in running.glob("*"):  # nobody else would end them
                if (pid := int(marker.suffix[1:])) != os.getpid():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            return True
        helpers.update(children)
        for marker in running.glob("*"):
            try:
                os.kill(int(marker.suffix[1:]), 0)
            except ProcessLookupError:
                if marker.exists():  # else it has just ended as it should
                    return True
        return False

    return lost


def _children() -> set[int]:
    """The processes that this one started and that live; none where Linux's /proc is not there."""
    found = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found |= set(map(int, path.read_text().split()))
    for pid in list(found):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                found.discard(pid)
    return found


def _interrupt_main_thread() -> None:
    """As Control-C does. `interrupt_main` alone would not wake a thread that waits for a lock."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


@contextlib.contextmanager
def _progress(
    completions: Path,
    stage: Stage,
    count: Callable[[], np.ndarray] | None,
    lost: Callable[[], bool] | None,
    noticed: threading.Event,
    seconds: float = 5.0,
) -> Iterator[None]:
    """Print a line of progress now and then, from what the workers have written so far; when one is lost, set
    `noticed` and stop."""
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
            done = sum(1 for _ in completions.glob("*")) >= stage.tasks  # then those who helped may go
            if (
                not done and lost and lost()
            ):  # said again while it lasts: what cleans up may wait for the lost worker, too
                noticed.set()
                _interrupt_main_thread()

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
