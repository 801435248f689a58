"""Several processes: whole models or shares of one, on any number of them, and from one arrangement to another."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from test_train import ROOT, TORCHRUN, finish, losses, run, tiny, with_steps
from test_train import clean_state as clean_state
from test_train import data as data
from test_train import launch as plain_launch
from transformers import AutoModelForCausalLM

from gpt2_hf import runs
from gpt2_hf.runs import read_rows
from gpt2_hf.training import checkpoint

OLD = Path(__file__).with_name("old_checkpoint")
# What accelerate's launcher makes of its configuration.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
HSDP = FSDP | {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}


def launch(config, tmp_path, n_processes: int, environment: dict[str, str] | None = None, script=None) -> str:
    recipe = tmp_path / f"{Path(config.train.run_dir).name}.yaml"
    recipe.write_text(config.to_yaml())
    variables = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*TORCHRUN, "--nproc_per_node", str(n_processes), str(script or ROOT / "scripts" / "pretrain.py")]
    process = subprocess.Popen(
        [*command, "--config", str(recipe)],
        env=variables | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return finish(process)


def constant(data, run_dir, **changes):
    """A run whose learning rate doesn't depend on its length; both optimizers, float64, validation, checkpoints."""
    settings = {
        "optim__name": "muon",
        "optim__schedule": "trapezoid",
        "optim__decay_ratio": 1e-9,
        "optim__ema": 0.8,
        "train__precision": "fp64",
        "train__micro_batch_size": 2,
        "eval__val_every": 4,
        "eval__val_tokens": 32 * 7,  # windows that no number of processes here divides
        "checkpoint__save_every": 4,
        "checkpoint__keep_last": 9,
    }
    return tiny(data, run_dir, **settings | changes)


def test_each_arrangement_goes_on_from_any_other_on_one_curve(data, tmp_path):
    """One process; two with whole models; four with shares; two copies over two shares each; one again."""
    straight = run(constant(data, tmp_path / "straight", train__steps=20))
    config = constant(data, tmp_path / "run", train__steps=20)
    run(with_steps(config, 4))
    for steps, n_processes, environment in ((8, 2, {}), (12, 4, FSDP), (16, 4, HSDP)):
        launch(with_steps(config, steps), tmp_path, n_processes, environment)
        metadata = dcp.FileSystemReader(tmp_path / f"run/checkpoints/step-{steps:08d}/trainer_state").read_metadata()
        files = {place.relative_path for place in metadata.storage_data.values()}
        assert files == {f"__{rank}_0.distcp" for rank in range(n_processes)}, "each rank wrote a part"
    rows = run(config)
    assert [row["step"] for row in rows] == [row["step"] for row in straight]
    assert losses(rows) == pytest.approx(losses(straight), rel=1e-9, abs=0)
    for name in ("val_loss", "grad_norm"):
        found = [[row.get(f"{name}_raw", row[name]) for row in of if name in row] for of in (rows, straight)]
        assert found[0] == pytest.approx(found[1], rel=1e-9)
    for name, tensor in load_file(tmp_path / "straight/final/model.safetensors").items():
        torch.testing.assert_close(
            load_file(tmp_path / "run/final/model.safetensors")[name], tensor, rtol=1e-8, atol=1e-11
        )


def test_shares_do_all_that_a_whole_model_does(make_shards, tmp_path):
    """Compiled and checkpointed blocks, the head in chunks, clipping, validation, HellaSwag, samples."""
    pattern = [[(start + 3 * i) % 250 for i in range(120)] for start in range(60)]
    shards = make_shards({"train": [pattern], "val": [pattern[:4]]})

    def config(name: str, compile: str):
        return constant(
            shards,
            tmp_path / name,
            model__vocab_size=None,
            train__steps=3,
            train__compile=compile,
            train__gradient_checkpointing=True,
            eval__val_every=2,
            eval__hellaswag_every=2,
            eval__hellaswag_items=7,
            eval__sample_every=2,
            eval__sample_tokens=3,
            optim__lr=1e-2,
            optim__max_grad_norm=0.5,
            checkpoint__save_every=2,
        )

    launch(config("shares", "on"), tmp_path, 2, FSDP)
    one, shares = run(config("one", "off")), read_rows(tmp_path / "shares" / "metrics.jsonl")
    for a, b in zip(one, shares, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"tokens_per_sec", "mfu", "peak_memory"}:
            assert b[name] == (a[name] if isinstance(a[name], list) else pytest.approx(a[name], rel=1e-9)), name
    assert {"hellaswag_acc", "samples", "val_bpb"} <= shares[2].keys()
    assert one[2]["grad_norm"] > 0.5, "clipped"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "shares" / "final")
    assert type(stock).__name__ == "GPT2LMHeadModel"


COUNT = """
import os
import torch
from gpt2_hf.cli import parse_cli
from gpt2_hf.config import RunConfig
from gpt2_hf.training import loop

step = loop.train_step

def profiled(*arguments):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = step(*arguments[:7])  # without safe points, at which ranks exchange a number
    events = [(e.name, e.time_range.start, e.time_range.end) for e in profile.events()]
    sent = [e for e in events if e[0] in ("c10d::allreduce_", "c10d::_reduce_scatter_base_", "c10d::reduce_scatter_")]
    backward = max(end for name, _, end in events if name.startswith("autograd::engine::evaluate_function"))
    if os.environ["RANK"] == "0":
        print("SENT", len(sent), sum(start < backward for _, start, _ in sent), flush=True)
    return result

loop.train_step = profiled
loop.train(parse_cli(RunConfig))
"""


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["whole", "shares"])
def test_gradients_cross_the_wire_once_a_step_while_backward_goes_on(data, tmp_path, environment):
    """Four micro-steps send what one does, and begin before the last of them is over."""
    script = tmp_path / "count.py"
    script.write_text(COUNT)
    found = []
    for micro_batch_size in (8, 2):
        config = tiny(
            data,
            tmp_path / f"run{micro_batch_size}",
            model__n_embd=192,  # DDP's first bucket is 1 MB, and there are more
            train__micro_batch_size=micro_batch_size,
            train__steps=3,
            checkpoint__save_every=0,
        )
        output = launch(config, tmp_path, 2, environment, script)
        counts = [tuple(map(int, line.split()[-2:])) for line in output.splitlines() if "SENT" in line]
        assert len(counts) == 3, output
        found.append(counts[-1])
    (at_once, _), (accumulated, overlapped) = found
    assert 1 < at_once == accumulated < 8
    assert overlapped >= 1


@pytest.mark.slow
def test_killed_in_the_middle_of_saving_loses_nothing(data, tmp_path):
    """Twice, as soon as a checkpoint is seen to be written, which happens beside training after each step."""
    settings = {"train__steps": 16, "checkpoint__save_every": 1, "model__dropout": 0.1}
    finish(plain_launch(tiny(data, tmp_path / "straight", **settings), tmp_path))  # with as many threads
    config, seen = tiny(data, tmp_path / "run", **settings), 0
    for _ in range(2):
        process = plain_launch(config, tmp_path)
        while not list((tmp_path / "run" / "checkpoints").glob(".step-*.writing")) or newest_step(tmp_path) <= seen:
            assert process.poll() is None
        process.kill()
        process.communicate()
        seen = newest_step(tmp_path)
        assert seen < 16
    finish(plain_launch(config, tmp_path))
    final = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("run", "straight")]
    assert final[0] == final[1]


def newest_step(tmp_path: Path) -> int:
    return max(runs.saved_steps(tmp_path / "run" / "checkpoints"), default=0)


def test_a_checkpoint_of_before_is_gone_on_from(data, tmp_path, capsys):
    """Written with one file for all of the optimizers' state; the curve is what it was then."""
    settings = {"model__n_embd": 8, "model__n_layer": 1, "model__n_positions": 32, "optim__name": "muon"}
    settings["optim__muon_lr"] = 6e-4 * 0.2 * 8**0.5  # what it was, in the unit of now
    config = tiny(data, tmp_path / "run", train__steps=12, checkpoint__save_every=6, **settings)
    shutil.copytree(OLD, tmp_path / "run" / "checkpoints" / "step-00000006")
    then = [5.524309158325195, 5.51981258392334, 5.519400119781494, 5.5177178382873535, 5.518283843994141]
    # The MLP's second matrix, which now moves half as fast as then, makes little difference.
    assert losses(run(config))[:5] == pytest.approx(then, rel=2e-5)
    assert "is 0.566 times as much now" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints" / "step-00000012" / "trainer_state" / "optimizer.pt").exists()


def test_large_models_are_written_in_several_files_that_stock_reads(data, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHT_FILE_BYTES", 50_000)
    config = tiny(data, tmp_path / "run", train__steps=4, checkpoint__save_every=2)
    straight = losses(run(config))
    final = tmp_path / "run" / "final"
    files = sorted(path.name for path in final.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((final / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    stock = AutoModelForCausalLM.from_pretrained(final)
    assert index["metadata"]["total_size"] == 4 * stock.num_parameters()
    assert runs.damage(final) is None and runs.final_problem(tmp_path / "run", None) is None
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert losses(run(config)) == straight


SHARES = """
import json
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from gpt2_hf.model import GPTConfig, GPTForCausalLM
from gpt2_hf.training import distributed
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
class Accelerator:
    prepare_model = staticmethod(lambda model, evaluation_mode: model)
with torch.device("meta"):
    model = GPTForCausalLM(GPTConfig.preset("gpt2-xl"))
n = model.num_parameters()
blocks = sum(p.numel() for p in model.transformer.h.parameters())
distributed.distribute(model, Accelerator, init_device_mesh("cpu", (8,)), torch.bfloat16)
mine = sum(distributed.local(p).numel() for p in model.parameters())
print(json.dumps({"all": n, "blocks": blocks, "mine": mine}))
"""


def test_shares_of_the_largest_model_are_an_eighth_on_each_of_eight_ranks(tmp_path):
    """On meta tensors, among ranks that are none; docs/operations.md has what it makes in GB."""
    script = tmp_path / "shares.py"
    script.write_text(SHARES)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=True
    ).stdout
    count = json.loads(output)
    assert count["all"] == 1_557_611_200 and count["blocks"] == 1_475_558_400
    assert count["all"] / 8 <= count["mine"] < 1.0001 * count["all"] / 8  # 50257 rows are no multiple of 8
