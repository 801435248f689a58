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
import functools
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..data.shards import FORMAT, TOKENIZER, VERSION
from ..data.tokenizer import Tokenizer, open_tokenizer
from ..files import lock_folder
from ..program import UserError
from .audit import ERRORS
from .contamination import MarkContaminated
from .export import export_llmc
from .inputs import BY_DATASETS, listing, unread_files
from .near_duplicates import MarkNearDuplicates, minhash_stages
from .read import TASK_BYTES, Piece, ReadDocuments, Source, describe, find_files, plan
from .running import Stage, run, submit
from .settings import PrepareConfig
from .write import Encoder, Split, WriteShards, WriteTokens, tokenizer_entry, write_json, written_so_far

WORK = ".preparing"  # below --out while it works: the plan, tokens by task, what the stages leave for each other
RESULTS = ("train", "val", TOKENIZER, "logs", "llmc", "report.json", "report.md")
SETTLED_LATE = ("tokens_per_shard", "val_fraction", "val_documents")  # by the last stage: finished tasks stay good
REMEDY = "choose another --out, or pass --overwrite true"


def prepare(config: PrepareConfig) -> Path:
    """Write the shards of `config.inputs` or `config.dataset` under `config.out`; return the manifest's path.

    A folder that already holds the result is left as it is, one that holds something else is refused unless
    `config.overwrite`. With Slurm it returns when the jobs are submitted. Raises ValueError or OSError with one line
    that says what to do.
    """
    config = config.resolved()
    tokenizer = open_tokenizer(config.tokenizer)
    out = Path(config.out)
    manifest_path = out / "manifest.json"
    if (done := _read_manifest(manifest_path)) is not None and not config.overwrite:
        _check_same(config, tokenizer, done)
        print(f"{manifest_path}: already prepared")
    else:
        _write(config, tokenizer, out)
        if config.executor == "slurm":
            return manifest_path
    shutil.rmtree(out / WORK, ignore_errors=True)
    if config.export == "llmc" and not (out / "llmc").exists():
        export_llmc(out, out / "llmc")
        print(f"{out / 'llmc'}: written for llm.c")
    return manifest_path


def _write(config: PrepareConfig, tokenizer: Tokenizer, out: Path) -> None:
    """Prepare the data, or go on with that; with Slurm, only submit the jobs."""
    if config.executor == "slurm" and not shutil.which("sbatch"):
        raise UserError("sbatch is not there: run this where Slurm jobs are submitted, or choose another --executor")
    if config.executor == "ray" and not importlib.util.find_spec("ray"):
        raise UserError("Ray is not there: pip install ray, or choose another --executor")
    facts, source, tasks = plan(config.source(), out)
    # The plan is this run's identity: a later start with the same plan goes on with it.
    recorded = {key: value for key, value in config.recorded().items() if key not in SETTLED_LATE}
    if not tokenizer.is_gpt2:
        recorded |= {"tokenizer": _called(tokenizer_entry(tokenizer))}
    changed = [os.stat(piece.path).st_mtime_ns for task in tasks for piece in task if piece.kind != "rows"]
    identity = {"config": recorded, "source": facts, "task_bytes": TASK_BYTES, "changed": changed}
    with _only_writer(out):
        _start_or_resume(out, identity, config)
        encoder = Encoder()
        if not tokenizer.is_gpt2:
            encoder = Encoder(tokenizer.name, str((out / TOKENIZER).absolute()), tokenizer.fingerprint)
            tokenizer.save(out / TOKENIZER)
            print(_described(tokenizer))
        unread = unread_files(config.inputs, out)
        stages = _stages(config, facts, source, tasks, unread, encoder)
        if config.executor == "slurm":
            submit(stages, config, out / WORK / "jobs")
            logs = out.absolute() / "logs"
            print(f"{out.absolute() / 'manifest.json'} will be written by the last job; logs are in {logs}")
            return
        for stage in stages:
            if stage.name != "shards":
                log = out.absolute() / "logs" / "datatrove.log"
                print(f"{config.out}: {stage.name}, {stage.tasks} task(s), log in {log}", flush=True)
            run(stage, config, functools.partial(written_so_far, out / WORK) if stage.name == "tokens" else None)
    print(f"{out / 'manifest.json'}: written")
    if unread:
        _say_unread(facts["files"], unread)


def _described(tokenizer: Tokenizer) -> str:
    how = "by tiktoken"
    if tokenizer.encoder != "tiktoken":
        how = "by tokenizers (2 to 3 MB/s a process, a quarter of what tiktoken does, whose ids may differ)"
    form = "; texts are put in form NFC, and bytes are of those" if tokenizer.normalizes else ""
    what = (
        f"{tokenizer.vocab_size:,} entries, {tokenizer.dtype.name}, end of text {tokenizer.eot_token} ({tokenizer.eot})"
    )
    return f"tokenizer {tokenizer.name}: {what}; encoded {how}{form}"


def _say_unread(read: int, unread: dict[str, int]) -> None:
    ours = sorted({*unread} & {*BY_DATASETS})
    remedy = f"; --dataset FOLDER reads a folder of {' or '.join(ours)}" if ours else ""
    print(f"read {read:,} files; not read, by their ending: {listing(unread)}{remedy}")


def _stages(
    config: PrepareConfig,
    facts: dict[str, Any],
    source: Source,
    tasks: list[list[Piece]],
    unread: dict[str, int],
    encoder: Encoder,
) -> list[Stage]:
    """The pipelines, in order."""
    out = Path(config.out).absolute()  # jobs of a cluster run elsewhere
    work = out / WORK
    read = ReadDocuments(source, tasks)
    stages: list[Stage] = []
    steps: list[Callable] = [read]
    if config.dedup == "minhash":
        stages += minhash_stages(read, str(work / "minhash"), len(tasks))
        steps.append(MarkNearDuplicates(str(work / "minhash")))
    if config.decontaminate:
        evaluations = tuple(str(Path(e).absolute()) if Path(e).exists() else e for e in config.decontaminate)
        steps.append(MarkContaminated(evaluations, config.decontaminate_ngram, config.contaminated))
    stop = config.on_error == "stop"
    steps.append(WriteTokens(str(work), config.val_ids, stop, encoder))
    split = Split(
        config.val_fraction, config.val_documents, config.val_ids, config.tokens_per_shard, config.dedup != "none"
    )
    shards = WriteShards(str(out), str(work), split, tasks, config.recorded(), facts, unread, stop, encoder)
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
        raise UserError(f"{path} was not written by this program, or is damaged: choose another --out")
    return done


def _called(entry: Any) -> Any:
    """A manifest's entry of a tokenizer, in a word."""
    return f"{entry['name']} ({entry['sha256'][:12]})" if isinstance(entry, dict) else entry


def _check_same(config: PrepareConfig, tokenizer: Tokenizer, done: dict[str, Any]) -> None:
    """Raise ValueError unless the manifest `done` is what `config` would give."""
    out = Path(config.out)
    if done.get("version") != VERSION:
        raise UserError(f"{out} was prepared by an earlier version: {REMEDY}")
    old = done.get("config", {}) | {"tokenizer": _called(done.get("tokenizer"))}
    new = config.recorded() | {"tokenizer": _called(tokenizer_entry(tokenizer))}
    if old != new:
        changes = ", ".join(
            f"{key} was {old.get(key)}, now {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)
        )
        raise UserError(f"{config.out} was prepared with other settings ({changes}): {REMEDY}")
    # Shards whose inputs were deleted since stay good. What the Hub has now is not asked.
    with contextlib.suppress(FileNotFoundError):
        saved = config.dataset and Path(config.dataset).is_dir()
        now = describe(find_files(config.inputs, out)) if config.inputs else plan(config.source())[0] if saved else None
        if now is not None and now != done.get("source"):
            raise UserError(f"{out} was prepared from inputs that have changed since: {REMEDY}")
    for split in done["splits"].values():
        for shard in split["shards"]:
            path = out / shard["file"]
            if not path.exists() or path.stat().st_size != np.dtype(done["dtype"]).itemsize * shard["tokens"]:
                raise UserError(f"{path} is missing or cut short: pass --overwrite true to prepare the data again")
    errors = {reason: count for reason, count in done["dropped"].items() if reason in ERRORS and count}
    if config.on_error == "stop" and errors:
        raise UserError(f"{out} was prepared without {errors}, see {out / 'report.md'}: {REMEDY}")


def _only_writer(out: Path) -> IO[str]:
    """Refuse a second preparation into the same folder while one is at work there; until the file is closed."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        return lock_folder(out)
    except BlockingIOError as holder:
        raise UserError(f"{out} is being prepared by {holder}: wait for it, or choose another --out") from None


def _start_or_resume(out: Path, plan: dict[str, Any], config: PrepareConfig) -> None:
    """Keep the finished tasks of the same plan; clear what another one left, if that is allowed."""
    work, manifest_path = out / WORK, out / "manifest.json"
    plan_path = work / "plan.json"
    if plan_path.exists() and not manifest_path.exists():
        _refuse_while_queued(work / "jobs")
        unfinished = json.loads(plan_path.read_text(encoding="utf-8"))
        if unfinished == plan:
            if config.executor == "local":  # what killed workers had not finished
                for part in work.glob("*.d*.*"):
                    part.unlink(missing_ok=True)
            shutil.rmtree(out / "logs" / "shards", ignore_errors=True)
            print(f"{out}: going on with an unfinished preparation")
            return
        if unfinished and not config.overwrite and not _is_corrected(work, unfinished, plan):
            raise UserError(f"{out} holds an unfinished preparation of something else: {REMEDY}")
        if unfinished:
            print(f"{out}: starting anew, in place of an unfinished preparation with other settings")
    elif not manifest_path.exists() and (foreign := [name for name in RESULTS if (out / name).exists()]):
        raise UserError(f"{out} holds {', '.join(foreign)} from elsewhere: choose another --out, or move them away")
    work.mkdir(parents=True, exist_ok=True)
    write_json(plan_path, {})  # if this is cut short, the next start knows that the rest may be cleared
    manifest_path.unlink(missing_ok=True)
    for path in (*(out / name for name in RESULTS), *work.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        elif path != plan_path:
            path.unlink(missing_ok=True)
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
            raise UserError(
                f"jobs of an earlier start are queued (squeue --jobs {numbers}): wait for them, or scancel them"
            )
