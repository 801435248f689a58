"""Publishing: folders that pass, folders that must not, code that travels, and what goes up. The Hub is a fake."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_hf.data.tokenizer import ASSETS, VOCAB_SIZE
from gpt2_hf.model import GPTConfig, GPTForCausalLM, GPTModel
from gpt2_hf.model.hub import AUTO_MAP, code_files
from gpt2_hf.runs import write_folder
from gpt2_hf.sharing.publish import PublishError, publish
from gpt2_hf.sharing.verify import LOGITS_TOLERANCE, Result, check_folders, difference, plain_forward, sha256

SCRIPT = Path(__file__).parents[2] / "scripts" / "publish.py"
BYTES = 257  # GPT-2's first 256 tokens are the bytes
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32}
MISSING = "model-00002-of-00005.safetensors"
CODE = {"attention.py", "configuration_gpt.py", "hub.py", "loss.py", "modeling_gpt.py", "versions.py"}
OURS = {file.name: sha256(file) for file in code_files()}
PASSES = [Result("everything", "ok", "fine")]


def small_model(**fields) -> GPTForCausalLM:
    torch.manual_seed(0)
    model = GPTForCausalLM(GPTConfig(**{**SMALL, **fields}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)  # large, so that attention is not uniform
    return model.eval()


def save(folder: Path, with_code: bool = False, tokenizer: str = "bytes", shards: str = "1GB", **fields) -> Path:
    """A small model with GPT-2's tokenizer ("gpt2"), its first 256 tokens ("bytes", and fast), or none ("")."""
    size = {"gpt2": VOCAB_SIZE}.get(tokenizer, BYTES)
    fields = {"vocab_size": size, "bos_token_id": size - 1, "eos_token_id": size - 1, **fields}
    small_model(**fields).save_pretrained(folder, with_code=with_code, max_shard_size=shards)
    if tokenizer:
        settings = json.loads((ASSETS / "tokenizer" / "tokenizer_config.json").read_text())
        settings["model_max_length"] = {**SMALL, **fields}["n_positions"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        content = json.loads((ASSETS / "tokenizer" / "tokenizer.json").read_text())
        if tokenizer == "bytes":
            vocab = {token: number for token, number in content["model"]["vocab"].items() if number < 256}
            content["model"] |= {"vocab": vocab | {"<|endoftext|>": 256}, "merges": []}
            content["added_tokens"][0]["id"] = 256
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def edit_weights(folder: Path, edit) -> Path:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, file: str = "config.json", **fields) -> Path:
    config = json.loads((folder / file).read_text()) | fields
    (folder / file).write_text(json.dumps(config))
    return folder


def as_old_hub_file(weights):
    for name in list(weights):
        weights[name.removeprefix("transformer.")] = weights.pop(name)
    for layer in range(SMALL["n_layer"]):
        weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Good folders, and folders with one thing wrong."""
    root = tmp_path_factory.mktemp("folders")
    new: dict[str, Path] = {}

    def add(name: str, **options) -> Path:
        new[name] = save(root / name, **options)
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
    modeling = add("code that differs", with_code=True) / "modeling_gpt.py"
    modeling.write_text(modeling.read_text().replace("self.scaling = ", "self.scaling = 2 * "))
    shutil.copy(modeling, add("code that needs us", with_code=True))
    (new["code that needs us"] / "needing.py").write_text("import gpt2_hf\n")
    edit_config(new["code that needs us"], auto_map={"AutoModelForCausalLM": "needing.GPTForCausalLM"})
    (add("broken config") / "config.json").write_text("{")
    return new


@pytest.fixture(scope="module")
def results(folders) -> dict[str, dict[str, Result]]:
    """Folder's name -> check -> result. One process does them all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # models this small gain nothing from threads, and lose on a busy machine
        patch.chdir(folders["plain"].parent / "started here")
        patch.setenv("PYTHONPATH", f".{os.pathsep}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        found = check_folders(list(folders.values()), known_code=OURS, auto_map=AUTO_MAP)
        for name in ("code that differs", "code that needs us"):  # here as if it were ours
            path = folders[name]
            auto_map = json.loads((path / "config.json").read_text())["auto_map"]
            found |= check_folders([path], lambda *_: None, {f.name: sha256(f) for f in path.glob("*.py")}, auto_map)
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
        ("code that needs us", "code", "gpt2_hf"),
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


# Code that travels


def test_code_travels_only_when_asked(tmp_path):
    model = small_model(vocab_size=97)
    model.save_pretrained(tmp_path / "code", with_code=True)
    assert {path.name for path in (tmp_path / "code").glob("*.py")} == CODE
    assert json.loads((tmp_path / "code" / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]

    loaded = GPTForCausalLM.from_pretrained(tmp_path / "code")
    model.save_pretrained(tmp_path / "again")
    loaded.save_pretrained(tmp_path / "loaded")
    loaded.config.save_pretrained(tmp_path / "config")
    GPTModel.from_pretrained(tmp_path / "code").save_pretrained(tmp_path / "base")
    for name in ("again", "loaded", "config", "base"):
        assert "auto_map" not in json.loads((tmp_path / name / "config.json").read_text())
        assert not list((tmp_path / name).glob("*.py"))


@pytest.mark.parametrize("with_code", [False, True])
def test_push_to_hub_takes_with_code(monkeypatch, with_code):
    pushed = {}

    def upload(self, folder, repo_id, *args, **kwargs):
        pushed.update({path.name: path.read_bytes() for path in Path(folder).iterdir()})

    repository = SimpleNamespace(repo_id="me/x")
    hub = transformers.utils.hub
    monkeypatch.setattr(hub, "hf_api", lambda: SimpleNamespace(create_repo=lambda *a, **k: repository), raising=False)
    monkeypatch.setattr(hub, "create_repo", lambda *a, **k: repository, raising=False)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *a, **k: huggingface_hub.ModelCard("---\n---\n"))
    monkeypatch.setattr(GPTForCausalLM, "_upload_modified_files", upload)
    small_model(vocab_size=97).push_to_hub("me/x", with_code=with_code)
    stock = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert pushed.keys() == stock | (CODE if with_code else set())
    assert ("auto_map" in json.loads(pushed["config.json"])) == with_code


def test_travelled_code_trains_generates_and_travels_on(tmp_path):
    """In a process without our package: silently stock by default, ours when trusted, and plain when saved again."""
    model = small_model(vocab_size=97, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model.save_pretrained(tmp_path / "code", with_code=True)
    tokens = torch.arange(20)[None]
    model(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss.backward()
    torch.save({"logits": model(tokens).logits, "grad": model.transformer.wte.weight.grad}, tmp_path / "expected.pt")
    program = f"""
import json, sys
from pathlib import Path
class Hide:
    def find_spec(self, name, *rest):
        if name.split('.')[0] == 'gpt2_hf': raise ImportError(name)
sys.meta_path.insert(0, Hide())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
root = Path({str(tmp_path)!r})
expected = torch.load(root / "expected.pt")
tokens = torch.arange(20)[None]
for choice in ({{}}, {{"trust_remote_code": False}}, {{"trust_remote_code": True}}):
    model, info = AutoModelForCausalLM.from_pretrained(root / "code", output_loading_info=True, **choice)
    assert not any(info.values()), info
    assert torch.allclose(model(tokens).logits, expected["logits"], atol=1e-5)
    print(type(model).__name__)
stock = AutoModelForCausalLM.from_pretrained(root / "code")
texts = [m.generate(tokens[:, :5], do_sample=False, max_new_tokens=9, pad_token_id=0) for m in (model, stock)]
assert torch.equal(*texts) and texts[0].shape[1] > 5, texts
model.train()
out = model(tokens[:, :-1], shift_labels=tokens[:, 1:])
assert out.logits is None
out.loss.backward()
assert torch.allclose(model.transformer.wte.weight.grad, expected["grad"], atol=1e-6)
model.save_pretrained(root / "plain")
model.config.save_pretrained(root / "config")
AutoConfig.from_pretrained(root / "code", trust_remote_code=True).save_pretrained(root / "config2")
for name in ("plain", "config", "config2"):
    assert "auto_map" not in json.loads((root / name / "config.json").read_text())
    assert not list((root / name).glob("*.py"))
model.save_pretrained(root / "on", with_code=True)
model = AutoModelForCausalLM.from_pretrained(root / "on", trust_remote_code=True)
assert torch.allclose(model.eval()(tokens).logits, expected["logits"], atol=1e-5)
print(type(model).__name__, type(AutoModel.from_pretrained(root / "on", trust_remote_code=True)).__name__)
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [*["GPT2LMHeadModel"] * 2, *["GPTForCausalLM"] * 2, "GPTModel"]
    for name in CODE:
        assert (tmp_path / "on" / name).read_bytes() == (tmp_path / "code" / name).read_bytes()


# Publishing


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run: a final model among what must not go up, and its figures."""
    final = tmp_path / "run" / "final"
    write_folder(final, save)
    (final / "trainer_state").mkdir()
    (final / "trainer_state" / "optimizer.pt").write_bytes(b"x")
    (final / "events.log").write_text("x")
    rows = [
        {"step": 10, "tokens_seen": 5_000, "val_loss": 9.0},
        {"step": 20, "tokens_seen": 10_000, "val_loss": 7.25, "val_bpb": 2.5},
        {"step": 20, "tokens_seen": 10_000, "hellaswag_acc": 0.26, "hellaswag_items": 500, "hellaswag_stderr": 0.02},
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "run"


@pytest.fixture
def hub(monkeypatch) -> dict:
    """A Hub that takes everything and remembers it, of the last upload and of each repository; checks just pass."""
    seen: dict = {}
    repos: dict[str, SimpleNamespace] = {}

    def model_info(self, repo_id):
        if repo_id not in repos:
            answer(404, RepositoryNotFoundError)()
        siblings = [SimpleNamespace(rfilename=name) for name in repos[repo_id].files]
        return SimpleNamespace(siblings=siblings, private=repos[repo_id].private)

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        assert exist_ok or repo_id not in repos
        repos.setdefault(repo_id, SimpleNamespace(files={}, private=bool(private)))  # one that is there stays as it is
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, delete_patterns, commit_message):
        root, repo = Path(folder_path), repos[repo_id]
        files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        deleted = set(filter_repo_objects(repo.files, allow_patterns=delete_patterns))
        assert not deleted & files.keys()
        repo.files = {name: content for name, content in repo.files.items() if name not in deleted} | files
        seen.update(files=files, repo_id=repo_id, repo=repo)

    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    checks_give(monkeypatch, PASSES)
    return seen


def checks_give(monkeypatch, results):
    monkeypatch.setattr("gpt2_hf.sharing.publish.check_folders", lambda paths, *_: {paths[0]: results})


def answer(status: int, kind=HfHubHTTPError):
    def raise_it(*args, **kwargs):
        response = SimpleNamespace(status_code=status, headers={}, request=None)
        raise kind(f"{status} Client Error", response=response)

    return raise_it


STOCK = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_only_stock_files_go_up(run, hub, capsys):
    assert publish(run, "my-gpt2", private=True, license="mit")
    assert hub["files"].keys() == STOCK and hub["repo_id"] == "me/my-gpt2" and hub["repo"].private is True
    for name in STOCK - {"README.md"}:
        assert hub["files"][name] == (run / "final" / name).read_bytes()
    assert not (run / "final" / "README.md").exists()
    output = capsys.readouterr().out
    assert "left out: events.log, manifest.json, trainer_state/\n" in output
    assert f"taking {run / 'final'}" in output and "https://huggingface.co/me/my-gpt2" in output
    assert 'AutoModelForCausalLM.from_pretrained("me/my-gpt2")' in output


def test_the_card_says_what_is_known(run, hub):
    publish(run, "me/my-gpt2", license="mit")
    card = huggingface_hub.ModelCard(hub["files"]["README.md"].decode())
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2"],
        "license": "mit",
    }
    n_parameters = f"{small_model(vocab_size=BYTES).num_parameters():,}"
    for words in (
        n_parameters,
        "10,000 tokens",
        "| 7.2500 |",
        "| 2.5000 |",
        "| 0.2600 |",
        "500 of 10,042",
        "me/my-gpt2",
    ):
        assert words in card.text
    assert "9.0" not in card.text

    write_folder(run / "checkpoints" / "step-00000010", lambda path: save(path, layer_norm_epsilon=1e-3))
    publish(run / "checkpoints" / "step-00000010", "me/early")
    card = huggingface_hub.ModelCard(hub["files"]["README.md"].decode())
    assert "| 9.0000 |" in card.text and "7.25" not in card.text and card.data.license is None

    shutil.copytree(run / "final", run / "elsewhere")  # nothing says that it is this run's model
    publish(run / "elsewhere", "me/other")
    assert "measure" not in hub["files"]["README.md"].decode()


def test_figures_are_those_of_the_weights(run, hub, monkeypatch, capsys):
    """A run that ended at step 20, was trained on and then killed: its ``final`` is not what it has come to."""
    rows = (run / "metrics.jsonl").read_text()
    row = {"step": 70, "tokens_seen": 35_000, "val_loss": 3.5}
    (run / "metrics.jsonl").write_text(rows + json.dumps(row) + "\n")
    write_folder(run / "checkpoints" / "step-00000020", save)

    def newer(path):
        edit_weights(save(path), lambda w: w["transformer.wte.weight"].add_(1))

    write_folder(run / "checkpoints" / "step-00000070", newer)
    publish(run, "me/newest")
    assert "step-00000070, as final has other weights" in capsys.readouterr().out
    newest = run / "checkpoints" / "step-00000070"
    assert hub["files"]["model.safetensors"] == (newest / "model.safetensors").read_bytes()
    assert "| 3.5000 |" in hub["files"]["README.md"].decode()

    publish(run / "final", "me/final")  # asked for by name: with its own figures
    card = hub["files"]["README.md"].decode()
    assert "| 7.2500 |" in card and "3.5" not in card and "10,000 tokens" in card
    monkeypatch.chdir(run / "final")
    publish(".", "me/dot")
    assert hub["files"]["README.md"].decode() == card.replace("me/final", "me/dot").replace("# final", "# dot")

    shutil.rmtree(run / "checkpoints" / "step-00000020")  # now nobody knows which step it was
    publish(run / "final", "me/unknown")
    assert "measure" not in hub["files"]["README.md"].decode()


def test_a_card_on_the_hub_stays(run, hub, capsys):
    publish(run, "me/my-gpt2")
    assert "stays as it is" not in capsys.readouterr().out
    hub["repo"].files["README.md"] = b"edited on the website"
    publish(run, "me/my-gpt2")
    assert hub["repo"].files["README.md"] == b"edited on the website" and "README.md" not in hub["files"]
    assert "the README.md of me/my-gpt2 stays as it is" in capsys.readouterr().out
    with pytest.raises(PublishError, match=r"the README\.md of me/my-gpt2 is there: write `license: mit`"):
        publish(run, "my-gpt2", license="mit")
    (run / "final" / "README.md").write_text("# mine\n")
    publish(run, "me/my-gpt2")
    assert hub["repo"].files["README.md"] == b"# mine\n"


def test_what_an_earlier_upload_left_goes_and_nothing_else(run, hub):
    publish(run, "me/my-gpt2", with_code=True)
    stale = ["special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"]
    stale += ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    others = ["model_v1/weights.safetensors", "old/loss.py", "old/model.safetensors", "logs/vocab.json"]
    others += ["model.fp16.safetensors", "pytorch_model.bin", "train.py", ".gitattributes"]
    hub["repo"].files.update(dict.fromkeys([*stale, *others], b"earlier"))
    (run / "final" / "generation_config.json").unlink()
    publish(run / "final", "me/my-gpt2")
    assert hub["repo"].files.keys() == STOCK - {"generation_config.json"} | set(others)


@pytest.mark.parametrize("name", ["adapter_config.json", "custom_generate/generate.py"])
def test_what_a_repository_holds_does_not_lead_elsewhere(run, hub, name):
    publish(run, "me/my-gpt2")
    hub["repo"].files[name] = b"earlier"
    before = dict(hub["repo"].files)
    with pytest.raises(PublishError, match=f"me/my-gpt2 holds {name}, .*: delete it there first"):
        publish(run, "my-gpt2")
    assert hub["repo"].files == before


def test_what_is_left_out_of_the_check_is_named(run, capsys, hub):
    (run / "final" / "custom_generate").mkdir()
    (run / "final" / "a\x1b[2J").write_text("")
    assert publish(run)
    assert "left out when published: 'a\\x1b[2J', custom_generate/, events.log" in capsys.readouterr().out


def test_private_is_not_pretended(run, hub):
    publish(run, "me/public")
    before = dict(hub["repo"].files)
    with pytest.raises(PublishError, match="me/public is there and public"):
        publish(run, "public", private=True)
    assert hub["repo"].files == before
    for _ in range(2):
        publish(run, "me/hidden", private=True)
        assert hub["repo"].private
    publish(run, "me/hidden")
    assert hub["repo"].private


def test_the_check_sees_what_goes_up(run, hub, monkeypatch):
    (run / "final" / "chat_template.jinja").write_text("{{ messages }}")
    (run / "final" / "theirs.py").write_text("")
    torch.save({}, run / "final" / "pytorch_model.bin")
    seen = []

    def check(paths, report, known_code, auto_map):
        seen.append({path.name: path.read_bytes() for path in paths[0].rglob("*")})
        assert (known_code, auto_map) == (OURS, AUTO_MAP)
        (run / "final" / "model.safetensors").write_bytes(b"changed after the check")
        return {paths[0]: PASSES}

    monkeypatch.setattr("gpt2_hf.sharing.publish.check_folders", check)
    weights = (run / "final" / "model.safetensors").read_bytes()
    for with_code in (False, True):
        (run / "final" / "model.safetensors").write_bytes(weights)
        publish(run / "final", "me/my-gpt2", with_code=with_code)
        extra = {"chat_template.jinja"} | (CODE if with_code else set())
        assert seen[-1].keys() - {"README.md"} == STOCK - {"README.md"} | extra
        assert seen[-1] == hub["files"]
    assert hub["files"]["chat_template.jinja"] == b"{{ messages }}"


def test_a_card_that_is_there_stays(run, hub):
    (run / "final" / "README.md").write_text("# mine\n")
    publish(run, "me/my-gpt2")
    assert hub["files"]["README.md"] == b"# mine\n"
    with pytest.raises(PublishError, match="license"):
        publish(run, "me/my-gpt2", license="mit")


def test_code_goes_up_when_asked_and_is_left_out_when_not(run, hub, capsys):
    publish(run, "me/my-gpt2", with_code=True)
    assert hub["files"].keys() == STOCK | CODE
    assert json.loads(hub["files"]["config.json"])["auto_map"]["AutoConfig"] == "configuration_gpt.GPTConfig"
    assert "auto_map" not in json.loads((run / "final" / "config.json").read_text())
    assert "trust_remote_code=True" in capsys.readouterr().out

    save(run / "final", with_code=True)
    publish(run / "final", "me/my-gpt2")
    assert hub["repo"].files.keys() == STOCK
    assert "auto_map" not in json.loads(hub["files"]["config.json"])


def test_shards_go_up_with_their_index(run, hub):
    (run / "final" / "model.safetensors").unlink()
    save(run / "final", shards="10KB")
    publish(run / "final", "me/my-gpt2")
    shards = {name for name in hub["files"] if name.startswith("model-")}
    assert len(shards) > 1 and "model.safetensors.index.json" in hub["files"]


def test_dry_run_lists_and_asks_nobody(run, hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    assert publish(run, "me/my-gpt2", dry_run=True)
    output = capsys.readouterr().out
    assert not hub and "would upload to me/my-gpt2" in output
    size = (run / "final" / "model.safetensors").stat().st_size
    assert f"{size:,} bytes  model.safetensors" in output


def test_a_failed_check_stops_the_upload(run, hub, monkeypatch, capsys):
    bad = [*PASSES, Result("head", "FAILED", "two of them")]
    checks_give(monkeypatch, bad)
    assert publish(run, "me/my-gpt2") is False
    assert not hub and "1 of 2 checks FAILED; nothing is published" in capsys.readouterr().out


def test_a_broken_folder_is_checked_and_not_uploaded(run, hub):
    edit_config(run / "final", n_layer="two")
    with pytest.raises(PublishError, match="cannot be prepared"):  # here the check was made to pass
        publish(run / "final", "me/my-gpt2")
    assert not hub


def test_what_the_hub_refuses_is_one_line(run, hub, monkeypatch):
    for repo in ("a/b/c", "me/has space", "-x", "me/x.git"):
        with pytest.raises(PublishError, match="not the name of a repository"):
            publish(run, repo)
    monkeypatch.setattr(HfApi, "create_repo", answer(403))
    with pytest.raises(PublishError, match="may not write to you/x"):
        publish(run, "you/x")
    monkeypatch.setattr(HfApi, "whoami", answer(401))
    with pytest.raises(PublishError, match="token is not valid"):
        publish(run, "me/x")
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE"):
        publish(run, "me/x")
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(PublishError, match="hf auth login"):
        publish(run, "me/x")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--check", "RUN"], 0, "1 checks passed"),
        (["RUN"], 0, "add --repo"),
        (["RUN", "--repo", "me/my-gpt2", "--with-code"], 0, "trust_remote_code"),
        (["RUN", "--repo", "me/my-gpt2", "--check"], 0, "1 checks passed"),
        (["/no/such/folder"], 2, "error: no folder"),
        (["RUN", "--repo", "a/b/c"], 2, "error: --repo"),
        ([], 2, "error: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command(run, hub, monkeypatch, capsys, arguments, code, words):
    monkeypatch.setattr(sys, "argv", ["publish.py", *(str(run) if a == "RUN" else a for a in arguments)])
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
        found = 0
    except SystemExit as end:
        found = end.code
    output = capsys.readouterr()
    assert found == code and words in output.out + output.err
    assert bool(hub) == ("--repo" in arguments and "--check" not in arguments and code == 0)


def test_a_failed_check_is_exit_code_1(run, hub, monkeypatch):
    bad = [Result("everything", "FAILED", "")]
    checks_give(monkeypatch, bad)
    monkeypatch.setattr(sys, "argv", ["publish.py", "--check", str(run)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 1
