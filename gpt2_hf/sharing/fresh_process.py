"""The checks of ``verify`` in a fresh process: without gpt2_hf, the network, tokens, or files of this one's folders."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from . import verify
from .verify import Result

# Nothing else of the environment comes along, least of all tokens; of PYTHONPATH what is no relative entry.
KEPT = {
    *("PATH", "LANG", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "VIRTUAL_ENV"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS"),
}


def check_folders(
    paths: Sequence[Path],
    report: Callable[[Path, Result], None] = lambda path, result: None,
    known_code: Mapping[str, str] | None = None,
    auto_map: Mapping[str, str] | None = None,
) -> dict[Path, list[Result]]:
    """Check folders one after another in one fresh process, which works in an empty folder that is its home too.

    Args:
        report: called with each result as it comes.
        known_code: name and sha256 of the Python files that may be run; a folder with any other runs none.
        auto_map: that of a config.json by which they are reached; with any other nothing is run.
    """
    results: dict[Path, list[Result]] = {path: [] for path in paths}
    unfinished = {str(path.resolve()): path for path in paths}

    def add(path: Path, result: Result) -> None:
        results[path].append(result)
        report(path, result)

    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            # -P: the folder of verify.py must not be searched for modules.
            [
                sys.executable,
                "-P",
                os.path.abspath(verify.__file__),
                json.dumps([known_code or {}, auto_map or {}]),
                *unfinished,
            ],
            stdin=subprocess.DEVNULL,  # nobody is asked anything
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=empty,
            env=bare_environment(empty),
        )
        assert process.stdout is not None
        for line in process.stdout:
            row = json.loads(line)
            folder = row.pop("folder")
            if row:
                add(unfinished[folder], Result(**row))
            else:
                del unfinished[folder]
        code = process.wait()
        errors.seek(0)
        last_words = (errors.read().strip().splitlines() or ["no message"])[-1]
    for path in unfinished.values():
        add(path, Result("process", "FAILED", f"ended with code {code} before the end: {last_words}"))
    return results


def bare_environment(home: str) -> dict[str, str]:
    """What a process needs to run Python offline as nobody in particular."""
    kept = {name: value for name, value in os.environ.items() if name in KEPT or name.startswith("LC_")}
    # A module is never looked for in the folder where this was started, nor in the one that is checked.
    roots = [root for root in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(root)]
    return kept | {
        "HOME": home,
        "HF_HOME": home,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "USER": "nobody",  # PyTorch asks for a name, which the user of a container may lack
        "PYTHONPATH": os.pathsep.join(roots),
        "PYTHONUSERBASE": site.getuserbase(),
    }
