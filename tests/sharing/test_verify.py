"""Folders that pass the check, and folders that must not, judged in a process without our package."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from small_gpt2 import BYTES, SMALL, edit_config, edit_weights, save, small_model
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_hf.files import sha256
from gpt2_hf.model.hub import AUTO_MAP, code_files
from gpt2_hf.sharing.fresh_process import check_folders
from gpt2_hf.sharing.verify import LOGITS_TOLERANCE, Result, difference, plain_forward

MISSING = "model-00002-of-00005.safetensors"
OURS = {file.name: sha256(file) for file in code_files()}


def as_old_hub_file(weights):
    for name in list(weights):
        weights[name.removeprefix("transformer.")] = weights.pop(name)
    for layer in range(SMALL["n_layer"]):
        weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Good folders, and folders with one thing wrong."""
    root, sound = tmp_path_factory.mktemp("folders"), tmp_path_factory.mktemp("sound")
    new: dict[str, Path] = {}

    def add(name: str, **options) -> Path:
        original = sound / json.dumps(options)
        if not original.exists():
            save(original, **options)
        new[name] = shutil.copytree(original, root / name)
        return new[name]

    add("plain")
    add("gpt2 tokenizer", tokenizer="gpt2")
    add("with code", with_code=True)
    add("sharded", shards="10KB")
    features = {"activation_function": "gelu", "n_inner": 24, "layer_norm_epsilon": 1e-3}
    add("relative", tie_word_embeddings=False, scale_attn_by_inverse_layer_idx=True, **features)

    edit_config(edit_weights(add("old hub file"), as_old_hub_file), n_ctx=32)
    edit_weights(add("two equal copies"), lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"].clone()}))
    add("padded vocabulary", vocab_size=320)
    (add("no generation config") / "generation_config.json").unlink()
    edit_config(add("no longest text"), "tokenizer_config.json", model_max_length=None)
    edit_config(add("too long texts"), "tokenizer_config.json", model_max_length=33)
    outside = add("shard outside", shards="10KB") / "model.safetensors.index.json"
    shutil.copy(outside.parent / MISSING, root / "outside.safetensors")
    outside.write_text(outside.read_text().replace(MISSING, "../outside.safetensors"))

    edit_weights(add("missing key"), lambda w: w.pop("transformer.ln_f.bias"))
    edit_weights(add("extra key"), lambda w: w.update({"transformer.h.0.attn.gate": torch.ones(1)}))
    edit_weights(add("wrong shape"), lambda w: w.update({"transformer.wpe.weight": torch.zeros(31, 16)}))
    edit_weights(add("extra head"), lambda w: w.update({"lm_head.weight": torch.randn(BYTES, 16)}))
    edit_weights(add("nan"), lambda w: w["transformer.h.1.mlp.c_fc.weight"][3].fill_(torch.nan))
    weights = add("truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (add("missing shard", shards="10KB") / MISSING).unlink()
    add("small vocabulary", vocab_size=211, bos_token_id=0, eos_token_id=0)
    add("large vocabulary", vocab_size=2000)
    add("no tokenizer", tokenizer="")
    torch.save({}, add("pickle too") / "pytorch_model.bin")
    (add("pickle only") / "model.safetensors").unlink()
    torch.save({}, new["pickle only"] / "pytorch_model.bin")
    edit_config(add("code named, not there"), auto_map=AUTO_MAP)
    edit_config(add("another model"), model_type="gpt_neo", architectures=["GPTNeoForCausalLM"])
    (marker := root / "markers").mkdir()

    def harm(name: str) -> str:
        return f"open({str(marker / name)!r}, 'w')\n"

    (new["with code"] / "custom_generate").mkdir()
    (new["with code"] / "custom_generate" / "generate.py").write_text(harm("custom_generate"))
    modeling = add("changed code", with_code=True) / "modeling_gpt.py"
    modeling.write_text(harm("changed") + modeling.read_text())
    their_map = {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}
    (edit_config(add("their code"), auto_map=their_map) / "theirs.py").write_text(harm("theirs"))
    (edit_config(add("their code, another model"), auto_map=their_map, model_type="x") / "theirs.py").write_text(
        harm("theirs of another model")
    )
    their_map = {"AutoConfig": f"{new['their code']}--modeling_gpt.GPTConfig", "AutoModelForCausalLM": "modeling_gpt.M"}
    edit_config(add("code elsewhere", with_code=True), auto_map=their_map)
    # Only what stands before the first dot names one of our files.
    their_map = {"AutoModelForCausalLM": "modeling_gpt.x--evil.M"}
    edit_config(add("code under our name", with_code=True), auto_map=their_map)
    evil = root / "started here" / "modeling_gpt.x"
    evil.mkdir(parents=True)
    for name in ("evil.py", "__init__.py"):
        (evil / name).write_text(harm("under our name"))
    shutil.copy(new["plain"] / "config.json", evil)
    for module in ("transformers", "json", "torch"):
        (evil.parent / f"{module}.py").write_text(harm("started here"))
    config = json.loads((add("tokenizer's code") / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["theirs.T", "theirs.T"]}
    (new["tokenizer's code"] / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "T"}))
    (new["tokenizer's code"] / "theirs.py").write_text(harm("tokenizer"))
    for name, module in (("code that differs", "sys"), ("code that needs us", "gpt2_hf")):
        needing = "__import__(config.task_specific_params['needs']); self.scaling = 2 * "
        modeling = edit_config(add(name, with_code=True), task_specific_params={"needs": module}) / "modeling_gpt.py"
        modeling.write_text(modeling.read_text().replace("self.scaling = ", needing))
    (add("broken config") / "config.json").write_text("{")
    for name in ("config.json", "manifest.json"):
        (pipe := add(f"a pipe, {name}") / name).unlink(missing_ok=True)
        os.mkfifo(pipe)
    return new


@pytest.fixture(scope="module")
def results(folders) -> dict[str, dict[str, Result]]:
    """Folder's name -> check -> result. One process does all that our own code is enough for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # models this small gain nothing from threads, and lose on a busy machine
        patch.chdir(folders["plain"].parent / "started here")
        patch.setenv("PYTHONPATH", f".{os.pathsep}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        found = check_folders(list(folders.values()), known_code=OURS, auto_map=AUTO_MAP)
        as_if_ours = [folders["code that differs"], folders["code that needs us"]]
        code = {file.name: sha256(file) for file in as_if_ours[0].glob("*.py")}
        found |= check_folders(as_if_ours, known_code=code, auto_map=AUTO_MAP)
    return {path.name: {result.check: result for result in list_} for path, list_ in found.items()}


@pytest.mark.parametrize(
    ("folder", "warnings"),
    [
        ("plain", set()),
        ("gpt2 tokenizer", set()),
        ("with code", set()),
        ("sharded", set()),
        ("relative", set()),
        ("old hub file", {"names, shapes"}),
        ("two equal copies", {"head"}),
        ("padded vocabulary", {"tokenizer"}),
        ("no generation config", {"generation"}),
        ("no longest text", {"tokenizer"}),
        ("pickle too", set()),
    ],
)
def test_good_folders_pass(results, folder, warnings):
    found = results[folder]
    assert {result.check for result in found.values() if result.status != "ok"} == warnings, found
    assert not [result for result in found.values() if result.status == "FAILED"], found
    assert len(found) == (10 if folder == "with code" else 9)


@pytest.mark.parametrize(
    ("folder", "check", "words"),
    [
        ("missing key", "names, shapes", "transformer.ln_f.bias is missing"),
        ("missing key", "loading", "missing keys: transformer.ln_f.bias"),
        ("missing key", "logits", "transformer.ln_f.bias is missing"),
        ("extra key", "names, shapes", "transformer.h.0.attn.gate is not a weight of GPT-2"),
        ("wrong shape", "names, shapes", "transformer.wpe.weight is (31, 16), by config.json (32, 16)"),
        ("extra head", "head", "differs from the embedding"),
        ("nan", "values", "transformer.h.1.mlp.c_fc.weight has 64 of 1,024 values"),
        ("nan", "logits", "nan"),
        ("truncated", "loading", ""),
        ("truncated", "values", ""),
        ("missing shard", "files", f"{MISSING}, which is not there"),
        ("shard outside", "files", "names '../outside.safetensors'"),
        ("too long texts", "tokenizer", "model_max_length is 33, and the model has 32 positions"),
        ("small vocabulary", "tokenizer", "the tokenizer has 257 tokens, the model 211"),
        ("large vocabulary", "tokenizer", "another model's"),
        ("no tokenizer", "tokenizer", "no tokenizer"),
        ("pickle only", "files", "no model.safetensors"),
        ("code named, not there", "configuration", "attention.py, which is not in the folder"),
        ("their code", "configuration", "theirs.C"),
        ("code elsewhere", "configuration", "--modeling_gpt.GPTConfig"),
        ("code under our name", "configuration", "modeling_gpt.x--evil.M"),
        ("another model", "configuration", "gpt_neo"),
        ("code that needs us", "code", "gpt2_hf is hidden"),
        ("code that differs", "code", "differ from stock"),
        ("broken config", "configuration", ""),
    ],
)
def test_bad_folders_fail_where_they_are_bad(results, folder, check, words):
    assert results[folder][check].status == "FAILED"
    assert words in results[folder][check].text
    assert len(results[folder]) >= 9  # the other checks ran


def test_code_of_others_is_not_run(results, folders):
    assert not list((folders["plain"].parent / "markers").iterdir())
    found = results["changed code"]["code"]
    assert found.status == "warning" and "not run (modeling_gpt.py)" in found.text
    for name in ("their code", "their code, another model", "code elsewhere", "code under our name"):
        found = results[name]["code"]
        assert found.status == "FAILED" and "not run" in found.text, found
    assert results["their code"]["loading"].status == "ok"  # as stock
    assert "code" not in results["tokenizer's code"]


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_a_pipe_is_named_and_nothing_waits_for_it(results, name):
    assert list(results[f"a pipe, {name}"]) == ["files"]
    found = results[f"a pipe, {name}"]["files"]
    assert found.status == "FAILED" and f"{name} is neither a file nor a folder" in found.text


@pytest.mark.parametrize("folder", ["small vocabulary", "extra head", "no tokenizer", "nan"])
def test_what_is_sound_in_a_bad_folder_is_not_blamed(results, folder):
    failed = {result.check for result in results[folder].values() if result.status == "FAILED"}
    assert failed <= {"files", "head", "tokenizer", "values", "loading", "logits"} and len(failed) <= 3
    assert results[folder]["names, shapes"].status == "ok"


def test_the_independent_calculation_sees_every_feature():
    """It equals stock as configured, and does not when a single feature is another."""
    fields = {"activation_function": "gelu_new", "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True}
    ours = small_model(vocab_size=97, **fields)
    stock = GPT2LMHeadModel(GPT2Config(**SMALL, vocab_size=97, **fields)).eval()
    stock.load_state_dict(ours.state_dict())
    weights = {name: tensor.double() for name, tensor in stock.state_dict().items()}
    tokens = torch.randint(97, (32,))
    with torch.no_grad():
        logits = stock(tokens[None]).logits[0].double()

    def error(**changed) -> float:
        config = GPT2Config(**{**SMALL, **fields, **changed}, vocab_size=97)
        return difference(logits, plain_forward(config, weights.__getitem__, tokens))

    assert error() < LOGITS_TOLERANCE / 10
    for changed in (
        {"activation_function": "gelu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"layer_norm_epsilon": 1e-2},
        {"n_head": 4},
    ):
        assert error(**changed) > LOGITS_TOLERANCE, changed
    assert not difference(logits * float("nan"), logits) <= LOGITS_TOLERANCE


def test_a_check_that_dies_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    (result,) = check_folders([tmp_path])[tmp_path]
    assert result.status == "FAILED" and "ended with code 1" in result.text


def test_the_check_gets_no_secrets_and_looks_nowhere_else(tmp_path, monkeypatch):
    """Its environment, folder and home, as a program in Python's place sees them."""
    seen, stub = tmp_path / "seen", tmp_path / "python"
    stub.write_text(f'#!/bin/sh\n{{ env; echo "cwd=$(pwd)"; echo "files=$(ls -A)"; }} > "{seen}"\n')
    stub.chmod(0o755)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "ANY_OTHER"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", "src", str(tmp_path / "kept")]))
    monkeypatch.setattr(sys, "executable", str(stub))
    check_folders([tmp_path])
    found = dict(line.split("=", 1) for line in seen.read_text().splitlines())
    assert "secret" not in found.values()
    assert found["PYTHONPATH"] == str(tmp_path / "kept") and found["HF_HUB_OFFLINE"] == "1"
    assert found["cwd"] == found["HOME"] == found["HF_HOME"] and found["files"] == ""
    assert found["HOME"] not in (os.environ["HOME"], str(Path.cwd()))


def test_a_sound_folder_cuts_long_texts_to_what_the_model_takes(folders):
    """What the check of model_max_length promises: such a pipeline does not run past the positions."""
    options = {"truncation": True, "max_new_tokens": 1}
    generate = transformers.pipeline("text-generation", str(folders["plain"]), device="cpu")
    assert generate("x" * 100, **options)
    generate = transformers.pipeline("text-generation", str(folders["too long texts"]), device="cpu")
    with pytest.raises(IndexError):
        generate("x" * 100, **options)
