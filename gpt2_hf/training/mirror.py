"""A copy of a run in object storage, made by a process of its own, from which a fresh machine goes on.

    python -m gpt2_hf.training.mirror RUN URL       copies what is not there yet, and ends

Training starts the same as a child that follows the run (`mirroring`). It never waits for it but at the end, for a
bounded time: a storage that is slow, hangs, fails or is full costs the copies, and nothing else.

    URL/checkpoints/step-00001000/...   as in the run's folder; manifest.json is written last and removed first, so that
                                        what has one is whole
        final/...
        metrics.jsonl, config.yaml, ... as they were when the newest checkpoint was copied
        before-1/                       what was there when a start began at an earlier step than it had
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import runs
from ..data.folder import ShardError
from ..data.storage import Retry, Storage
from ..files import mask, sha256, whole_file
from ..program import program

if TYPE_CHECKING:
    from ..config import CheckpointSection

logger = logging.getLogger(__name__)

# Small files that go along: what was measured, and how the run was started.
RECORDS = ("metrics.jsonl", "config.yaml", "environment.json", "starts.jsonl", "resumed_from.json")
LOG = "mirror.log"
LINKS = ".mirror.writing"  # a name that the next start clears away

POLL_S = 2.0
SAY_EVERY_S = 5.0
WAITS_S = (5.0, 300.0)  # after an error: at first, and at most
PATIENT = Retry(give_up=86_400.0)  # the copying process: nobody waits for it
AT_START = Retry(give_up=120.0)


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay there: as in `CheckpointSection`."""

    keep_last: int
    keep_every: int
    keep_best: bool


class Copy:
    """A run's copy in a storage, as the process sees it that makes it.

    Args:
        keep: deletes checkpoints there that need not be kept; None deletes none.
        start_step: of the start that is followed: what is there of later steps is of another course of the run, and is
            moved aside. None leaves everything where it is.
    """

    def __init__(self, run: Path, storage: Storage, keep: Keep | None = None, start_step: int | None = None):
        self.run, self.storage, self.keep = run, storage, keep
        self.names = set(storage.find())
        self._manifests: dict[str, bytes | None] = {}  # of folders there, by name, as far as looked at
        self._written: set[tuple[str, str]] = set()  # files and their hashes: a second try begins where one failed
        self._damaged: set[tuple[str, bytes]] = set()
        self._all_there: list[Any] = []
        if start_step is not None:
            self._set_aside(start_step)

    def left(self) -> list[str]:
        """Folders of the run that are whole and not there, in the order in which they are copied."""
        saved = runs.saved_steps(self.run / "checkpoints")
        seen = [(folder, _mtime(folder / runs.MANIFEST)) for folder in (*saved.values(), self.run / "final")]
        if seen == self._all_there:
            return []  # without a look at what is there and what is best: this is asked every other second
        not_kept = set(self._surplus({*saved, *steps_there(self.names)}))
        checkpoints = [saved[step] for step in sorted(saved, reverse=True) if step not in not_kept]
        final = [self.run / "final"] if (self.run / "final").is_dir() else []
        folders = [*checkpoints[:1], *final, *checkpoints[1:]]
        found = [folder.relative_to(self.run).as_posix() for folder in folders if self._is_new(folder)]
        self._all_there = [] if found else seen
        return found

    def there(self) -> list[str]:
        """Folders that are known to be there."""
        return [name for name, manifest in self._manifests.items() if manifest is not None]

    def add(self, name: str) -> None:
        """Copy one folder, and delete what is surplus there. Raises OSError or ShardError."""
        links = self.run / LINKS
        try:
            manifest = runs.link_folder(self.run / name, links)
        except FileNotFoundError:
            return  # no longer kept
        logger.info("copying %s, %.3g MB", name, sum(entry["bytes"] for entry in manifest.values()) / 1e6)
        self._remove([f"{name}/{runs.MANIFEST}"])
        for file, entry in manifest.items():
            self._write(f"{name}/{file}", links / file, entry["sha256"])
        for record in RECORDS:
            if (self.run / record).is_file():
                self._write(record, self.run / record, None)
        self._write(f"{name}/{runs.MANIFEST}", links / runs.MANIFEST, None)
        self._manifests[name] = (links / runs.MANIFEST).read_bytes()
        shutil.rmtree(links, ignore_errors=True)
        logger.info("copied %s", name)
        self._prune()

    def _is_new(self, folder: Path) -> bool:
        name = folder.relative_to(self.run).as_posix()
        try:
            manifest = (folder / runs.MANIFEST).read_bytes()
        except OSError:
            return False
        if manifest == self._manifest(name) or (name, manifest) in self._damaged:
            return False
        if reason := runs.damage(folder) if name == "final" else runs.problem(folder):
            logger.warning("%s is damaged and not copied: %s", name, reason)
            self._damaged.add((name, manifest))
        return reason is None

    def _manifest(self, name: str) -> bytes | None:
        if name not in self._manifests:
            path = f"{name}/{runs.MANIFEST}"
            self._manifests[name] = self.storage.read_file(path) if path in self.names else None
        return self._manifests[name]

    def _write(self, name: str, file: Path, content_hash: str | None) -> None:
        if content_hash is None or (name, content_hash) not in self._written:
            self.storage.write(name, file)
            self.names.add(name)
        if content_hash is not None:
            self._written.add((name, content_hash))

    def _remove(self, names: list[str]) -> None:
        for name in names:
            if name in self.names:
                self.storage.remove(name)
                self.names.discard(name)
            self._written = {(other, mark) for other, mark in self._written if other != name}

    def _below(self, folder: str) -> list[str]:
        """Files in a folder there, its manifest first."""
        found = [name for name in self.names if name.startswith(f"{folder}/")]
        return sorted(found, key=lambda name: (name != f"{folder}/{runs.MANIFEST}", name))

    def _surplus(self, steps: Iterable[int]) -> list[int]:
        if self.keep is None:
            return []
        best = runs.best_step(self.run) if self.keep.keep_best else None
        return runs.surplus(steps, lambda _: True, self.keep.keep_last, self.keep.keep_every, best)

    def _prune(self) -> None:
        if self.keep is None:
            return
        whole = steps_there(self.names)
        folders = {name.rpartition("/")[0].split("/")[1] for name in self.names if name.startswith("checkpoints/step-")}
        broken_off = folders - {runs.step_name(step) for step in whole}  # by a kill: all are copied that are here
        for folder in [*map(runs.step_name, self._surplus(whole)), *sorted(broken_off)]:
            logger.info("deleting %s", folder)
            self._remove(self._below(f"checkpoints/{folder}"))
            self._manifests.pop(f"checkpoints/{folder}", None)

    def _set_aside(self, start_step: int) -> None:
        later = [f"checkpoints/{runs.step_name(step)}" for step in steps_there(self.names) if step > start_step]
        stale = [*later, "final"] if later or not start_step else []
        stale = [folder for folder in stale if self._below(folder)]
        if not stale:
            return
        number = 1
        while any(name.startswith(f"before-{number}/") for name in self.names):
            number += 1
        logger.warning("moving what is later than step %d to before-%d: %s", start_step, number, ", ".join(stale))
        for folder in stale:
            files = self._below(folder)
            for name in reversed(files):  # the manifest last
                self.storage.copy(name, f"before-{number}/{name}")
                self.names.add(f"before-{number}/{name}")
            self._remove(files)
        if "metrics.jsonl" in self.names:
            self.storage.copy("metrics.jsonl", f"before-{number}/metrics.jsonl")


def _mtime(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def steps_there(names: set[str]) -> list[int]:
    """Steps of the checkpoints that are whole by the names of a storage's files, the newest first."""
    parts = [name.split("/") for name in names]
    folders = [p[1] for p in parts if len(p) == 3 and p[0] == "checkpoints" and p[2] == runs.MANIFEST]
    steps = [int(match[1]) for folder in folders if (match := runs.STEP_FOLDER.fullmatch(folder))]
    return sorted((step for step in steps if runs.step_name(step) in folders), reverse=True)


# A start on a fresh machine


def read_record(url: str, name: str) -> bytes | None:
    """A record in a run's mirror; None where it has none. Raises ShardError or ImportError, in one line."""
    storage = Storage.open(url, AT_START)
    return storage.read_file(name) if name in storage.find() else None


def fetch_newest(
    run: Path, url: str, accept: Callable[[dict[str, Any], str], None], only: int | None = None
) -> Path | None:
    """Bring the newest whole checkpoint from a run's mirror; where there is none, ``final``; None: there is neither.

    With it come the records that the run has not. Damaged ones are named and passed over.

    Args:
        accept: called with the ``state.json`` of a checkpoint and its URL before the rest of it is fetched; raises what
            speaks against it.
        only: this step, and no other.

    Raises:
        ShardError, ImportError: in one line, when the storage cannot be asked.
    """
    storage = Storage.open(url, AT_START)
    names = storage.find()
    steps = [step for step in steps_there(set(names)) if only in (None, step)]
    folders = [f"checkpoints/{runs.step_name(step)}" for step in steps]
    folders += ["final"] if not steps and only is None and f"final/{runs.MANIFEST}" in names else []
    for folder in folders:
        where = f"{storage.location}/{folder}"
        try:
            manifest = _parsed(runs.parse_manifest, storage.read_file(f"{folder}/{runs.MANIFEST}"))
            for name, entry in manifest.items():
                found = names.get(f"{folder}/{name}")
                if found is None:
                    raise _Damaged(f"{name} is missing")
                if found.size not in (None, entry["bytes"]):
                    raise _Damaged(f"{name} has {found.size} bytes instead of {entry['bytes']}")
            if runs.STATE in manifest:
                accept(_parsed(json.loads, storage.read_file(f"{folder}/{runs.STATE}")), where)
            _fetch(storage, folder, manifest, run / folder)
            for record in RECORDS:
                if record in names and not (run / record).exists():
                    content = storage.read_file(record)
                    with whole_file(run / record) as file:
                        file.write(content)
            return run / folder
        except _Damaged as error:
            print(f"{where} is damaged and not used: {error}", flush=True)
    return None


class _Damaged(Exception):
    pass


def _parsed(parse: Callable[[bytes], dict[str, Any]], text: bytes) -> dict[str, Any]:
    try:
        if isinstance(found := parse(text), dict):
            return found
    except (ValueError, RecursionError) as error:
        raise _Damaged(str(error)) from None
    raise _Damaged(f"{found!r:.60} stands for what it says of itself")


def _fetch(storage: Storage, folder: str, manifest: dict[str, dict[str, Any]], place: Path) -> None:
    total, done, next_line = sum(entry["bytes"] for entry in manifest.values()), 0, time.monotonic() + SAY_EVERY_S
    print(f"fetching {storage.location}/{folder}, {total / 1e6:.3g} MB", flush=True)

    def write(temporary: Path) -> None:
        nonlocal done, next_line
        for name, entry in manifest.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for piece in storage.read(f"{folder}/{name}", 0, entry["bytes"]):
                    file.write(piece)
                    done += len(piece)
                    if time.monotonic() > next_line:
                        print(f"fetched {done / max(total, 1):.0%} of {folder}", flush=True)
                        next_line = time.monotonic() + SAY_EVERY_S
            if sha256(path) != entry["sha256"]:
                raise _Damaged(f"{name} is not what its {runs.MANIFEST} says")

    runs.write_folder(place, write)


# While a run trains


@contextmanager
def mirroring(run: Path, keep: CheckpointSection, start_step: int | None, is_first: bool) -> Iterator[None]:
    """Have the run copied to ``keep.mirror``, if it has one, by a process that the first rank starts.

    What is there of steps later than ``start_step`` is moved aside (None: nothing is, as nothing is to be trained).
    Leaving in order, also by SystemExit, waits for it at most ``keep.mirror_wait_s`` seconds.
    """
    if not (keep.mirror and is_first):
        yield
        return
    mirror = Mirror(run, keep, start_step)
    try:
        yield
        mirror.finish(keep.mirror_wait_s)
    except SystemExit:
        mirror.finish(keep.mirror_wait_s)
        raise
    finally:
        mirror.stop()


class Mirror:
    """The copying process, for the one that trains: started again when it ends, and ended with it."""

    def __init__(self, run: Path, keep: CheckpointSection, start_step: int | None):
        self.run = run
        self._settings = {
            "url": keep.mirror,
            "keep": [keep.keep_last, keep.keep_every, keep.keep_best],
            "start_step": start_step,
        }
        self._location = mask(keep.mirror or "")
        self._process: subprocess.Popen[str] | None = None
        self._finishing, self._stopping = threading.Event(), threading.Event()
        self._there: set[str] = set()  # folders that are copied
        self._note = "it has not begun"
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._supervise, name="mirror", daemon=True)
        self._thread.start()

    def finish(self, wait_s: float) -> None:
        """Wait until all is copied, at most so many seconds; say what is left."""
        self._finishing.set()
        self._send("finish")
        deadline, next_line = time.monotonic() + wait_s, time.monotonic() + SAY_EVERY_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(0.1)
            if time.monotonic() > next_line:
                print(f"waiting for the mirror {self._location}: {self._note}", flush=True)
                next_line = time.monotonic() + SAY_EVERY_S
        if self._thread.is_alive():
            print(
                f"the mirror {self._location} lacks {', '.join(self._left()) or 'nothing of weight'} after "
                f"{wait_s:.0f} s ({self._note}); copy the rest with: python -m gpt2_hf.training.mirror {self.run} URL",
                flush=True,
            )

    def stop(self) -> None:
        self._stopping.set()
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                self._process.kill()
        self._thread.join(5)

    def _left(self) -> list[str]:
        checkpoints = [f"checkpoints/{path.name}" for path in runs.saved_steps(self.run / "checkpoints").values()]
        names = [*checkpoints, *(["final"] if (self.run / "final").is_dir() else [])]
        return [name.rpartition("/")[2] for name in names if name not in self._there]

    def _send(self, line: str) -> None:
        with self._lock, suppress(OSError, ValueError):
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()

    def _supervise(self) -> None:
        wait = 1.0
        while not self._stopping.is_set():
            try:
                status = self._run_once()
            except OSError as error:
                status, self._note = -1, str(error)
            if status == 0 and self._finishing.is_set():
                return
            if not self._stopping.wait(0):
                print(
                    f"the mirror's process ended ({self._note}; see {self.run / LOG}): it is started again", flush=True
                )
            self._stopping.wait(wait)
            wait = min(2 * wait, WAITS_S[1])

    def _run_once(self) -> int:
        try:
            log: Any = (self.run / LOG).open("a")
        except OSError:
            log = subprocess.DEVNULL
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        with self._lock:
            if self._stopping.is_set():
                return 0
            # In a session of its own, so that a Ctrl-C in the terminal is for training, which then ends this one.
            self._process = process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(self.run), "--follow"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": path},
            )
        self._send(json.dumps(self._settings))  # not as arguments, which everyone on this machine can read
        if self._finishing.is_set():
            self._send("finish")
        assert process.stdout is not None
        for line in process.stdout:
            with suppress(ValueError):
                told = json.loads(line)
                self._there, self._note = set(told["there"]), told["note"]
        return process.wait()


# The copying process


def follow(run: Path) -> None:
    """Copy what the run writes until training says on stdin that it has ended, and all is copied."""
    parent = os.getppid()
    settings = json.loads(sys.stdin.readline())
    finishing, wake = threading.Event(), threading.Event()

    def listen() -> None:
        for _ in sys.stdin:
            finishing.set()
            wake.set()
        os._exit(0)  # training is gone

    def watch_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(0)

    for target in (listen, watch_parent):
        threading.Thread(target=target, daemon=True).start()
    with suppress(OSError, AttributeError):
        os.nice(10)

    def tell(note: str) -> None:
        print(json.dumps({"there": copy.there() if copy else [], "note": note}), flush=True)

    copy: Copy | None = None
    pause = WAITS_S[0]
    while True:
        try:
            if copy is None:
                tell("asking what is there")
                copy = Copy(
                    run, Storage.open(settings["url"], PATIENT), Keep(*settings["keep"]), settings["start_step"]
                )
            if left := copy.left():
                tell(f"copying {left[0]}" + (f", then {len(left) - 1} more" if len(left) > 1 else ""))
                copy.add(left[0])
                tell(f"copied {left[0]}")
                pause = WAITS_S[0]
                continue
            if finishing.is_set():
                return
            wake.clear()
            wake.wait(POLL_S)
        except Exception as error:  # whatever it is, it may be over the next time
            reason = mask(" ".join(str(error).split())) or type(error).__name__
            logger.error("%s; next try in %.0f s", reason, pause)
            tell(reason)
            wake.clear()
            wake.wait(1.0 if finishing.is_set() else pause)
            pause = min(2 * pause, WAITS_S[1])


@program
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gpt2_hf.training.mirror", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("url", metavar="URL", nargs="?", help="the mirror, as in checkpoint.mirror")
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z")
    for name in ("botocore", "aiobotocore", "urllib3", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if arguments.follow:
        follow(arguments.run)
        return
    if arguments.url is None or not arguments.run.is_dir():
        raise ShardError(f"give a run's folder that exists, and the URL of its mirror (run: {arguments.run})")
    copy = Copy(arguments.run, Storage.open(arguments.url, Retry()))
    for name in copy.left():
        copy.add(name)


if __name__ == "__main__":
    main()
