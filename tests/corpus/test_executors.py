"""Preparation on a cluster gives the bytes that it gives on one machine."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from test_prepare import TEXTS, tree, write_jsonl

from gpt2_hf.corpus import read as reading
from gpt2_hf.corpus.prepare import PrepareConfig, prepare

pytest.importorskip("datatrove", reason="the extra 'data' is not installed, as on a machine that only trains")

ROOT = Path(__file__).resolve().parents[2]

# Stands for sbatch: keeps the script and its arguments, and answers as Slurm does.
SBATCH = """#!{python}
import os, sys, pathlib
folder = pathlib.Path(os.environ["JOBS"])
number = 100 + len(list(folder.glob("*.sh")))
(folder / f"{{number}}.sh").write_text(pathlib.Path(sys.argv[-1]).read_text())
(folder / f"{{number}}.args").write_text("\\n".join(sys.argv[1:-1]))
print("Submitted batch job", number)
"""
# Stands for srun: runs the command that follows its own options "-l -n 1".
SRUN = '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do case "$1" in -n) shift;; esac; shift; done\nexec "$@"\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(reading, "TASK_BYTES", 40_000)
    return write_jsonl(tmp_path / "docs.jsonl", [*TEXTS, *TEXTS[:50]])


@pytest.fixture
def wanted(tmp_path: Path, source: Path) -> dict[str, bytes]:
    config = PrepareConfig((str(source),), out=str(tmp_path / "local"), workers=1, dedup="exact", val_documents=9)
    prepare(config)
    return tree(tmp_path / "local")


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch) -> Path:
    """Where the jobs that are submitted go, as scripts and their arguments."""
    jobs, tools = tmp_path / "jobs", tmp_path / "tools"
    for folder in (jobs, tools):
        folder.mkdir()
    scripts = {"sbatch": SBATCH.format(python=sys.executable), "srun": SRUN, "scontrol": "#!/bin/sh\necho localhost\n"}
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("JOBS", str(jobs))
    return jobs


def on_slurm(source: Path, out: Path, **more) -> PrepareConfig:
    slurm = {"slurm_partition": "cpu", "slurm_time": "2:00:00", "slurm_memory_gb": 5}
    return PrepareConfig((str(source),), out=str(out), workers=3, val_documents=9, executor="slurm", **slurm, **more)


def test_each_job_waits_for_the_one_before(tmp_path: Path, capsys, source: Path, jobs: Path):
    prepare(on_slurm(source, tmp_path / "out", dedup="minhash"))
    assert "will be written by the last job" in capsys.readouterr().out
    stages, previous = {}, None
    for script in sorted(jobs.glob("*.sh")):
        text = script.read_text()
        if "merge_stats" in text:
            continue
        options = ("--partition=cpu", "--time=2:00:00", "--mem-per-cpu=5G")
        assert all(f"#SBATCH {option}\n" in text for option in options)
        arguments = script.with_suffix(".args").read_text()
        assert (f"--dependency=afterok:{previous}" in arguments) if previous else "dependency" not in arguments
        stages[re.search(r"--job-name=(\S+)", text)[1]] = int(re.search(r"--array=0-(\d+)%3", text)[1]) + 1
        previous = int(script.stem)
    tasks = stages["gpt2_hf_tokens"]
    assert tasks > 1 and list(stages.items()) == [
        ("gpt2_hf_signatures", tasks),
        ("gpt2_hf_pairs", 14),
        ("gpt2_hf_duplicates", 1),
        ("gpt2_hf_tokens", tasks),
        ("gpt2_hf_shards", 1),
    ]


@pytest.mark.slow
def test_the_jobs_given_to_slurm_give_the_same_bytes(tmp_path: Path, capsys, source: Path, wanted, jobs: Path):
    out = tmp_path / "out"
    config = on_slurm(source, out, dedup="exact")
    assert prepare(config) == out / "manifest.json"
    assert not (out / "manifest.json").exists()
    for script in sorted(jobs.glob("*.sh")):
        text = script.read_text()
        if "merge_stats" in text:
            continue
        for task in range(int(re.search(r"--array=0-(\d+)%3", text)[1]) + 1):
            env = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "localhost", "RUN_OFFSET": "0"}
            done = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
    assert tree(out) == wanted
    capsys.readouterr()
    assert prepare(config) == out / "manifest.json"  # later, to see whether it is done
    assert "already prepared" in capsys.readouterr().out


def test_a_missing_cluster_is_said_at_once(tmp_path: Path, monkeypatch, source: Path):
    monkeypatch.setattr("shutil.which", lambda name: None)
    config = PrepareConfig((str(source),), out=str(tmp_path / "out"), executor="slurm", slurm_partition="cpu")
    with pytest.raises(ValueError, match="sbatch is not there"):
        prepare(config)
    assert not (tmp_path / "out").exists()


def test_slurm_needs_a_partition():
    with pytest.raises(ValueError, match="sinfo"):
        PrepareConfig(("a.txt",), out="o", executor="slurm")


@pytest.mark.slow
def test_ray_gives_the_same_bytes(tmp_path: Path, source: Path, wanted):
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}
    )
    try:
        config = PrepareConfig(
            (str(source),),
            out=str(tmp_path / "out"),
            workers=2,
            dedup="exact",
            val_documents=9,
            executor="ray",
            slurm_memory_gb=1,
        )
        prepare(config)
        assert tree(tmp_path / "out") == wanted
    finally:
        ray.shutdown()
