"""Publishing: code that travels, what goes up, and what does not. The Hub is a fake."""

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
from small_gpt2 import BYTES, CODE, edit_config, edit_weights, save, small_model

from gpt2_hf.files import sha256
from gpt2_hf.model import GPTForCausalLM, GPTModel
from gpt2_hf.model.hub import AUTO_MAP, code_files
from gpt2_hf.program import UserError
from gpt2_hf.runs import write_folder
from gpt2_hf.sharing.privacy import PublishError
from gpt2_hf.sharing.publish import publish
from gpt2_hf.sharing.verify import Result

SCRIPT = Path(__file__).parents[2] / "scripts" / "publish.py"
OURS = {file.name: sha256(file) for file in code_files()}
PASSES = [Result("everything", "ok", "fine")]


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
def hub(tmp_path, monkeypatch) -> dict:
    """A Hub that takes everything and remembers it, of the last upload and of each repository; checks just pass."""
    seen: dict = {}
    repos: dict[str, SimpleNamespace] = {}

    def model_info(self, repo_id, timeout=None):
        if repo_id not in repos:
            answer(404, RepositoryNotFoundError)()
        siblings = [SimpleNamespace(rfilename=name) for name in repos[repo_id].files]
        return SimpleNamespace(siblings=siblings, private=repos[repo_id].private, sha="0" * 40)

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok or repo_id not in repos
        repos.setdefault(repo_id, SimpleNamespace(files={}, private=private))  # one that is there stays as it is
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, *, commit_message, parent_commit):
        repo = repos[repo_id]
        added = [op for op in operations if isinstance(op, huggingface_hub.CommitOperationAdd)]
        deleted = {op.path_in_repo for op in operations} - {op.path_in_repo for op in added}
        files = {op.path_in_repo: Path(op.path_or_fileobj).read_bytes() for op in added}
        repo.files = {name: content for name, content in repo.files.items() if name not in deleted} | files
        seen.update(files=files, repo_id=repo_id, repo=repo)

    def hf_hub_download(self, repo_id, filename, **_):
        path = tmp_path / "downloaded"
        path.write_bytes(repos[repo_id].files[filename])
        return str(path)

    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "hf_hub_download", hf_hub_download)
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
    "figures.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}

CARD = {"README.md", "figures.json"}


def test_only_stock_files_go_up(run, hub, capsys):
    assert publish(run, "my-gpt2", license="mit")
    assert hub["files"].keys() == STOCK and hub["repo_id"] == "me/my-gpt2" and hub["repo"].private is True
    for name in STOCK - CARD:
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
    assert "| measure |" not in hub["files"]["README.md"].decode()


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
    assert "| measure |" not in hub["files"]["README.md"].decode()


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


def test_private_unless_it_is_to_be_public(run, hub, capsys):
    publish(run, "me/hidden")
    publish(run, "me/hidden")
    assert hub["repo"].private
    publish(run, "me/hidden", public=True)
    assert hub["repo"].private and "me/hidden is private and stays so" in capsys.readouterr().out
    publish(run, "me/seen", public=True)
    before = dict(hub["repo"].files)
    assert not hub["repo"].private
    with pytest.raises(PublishError, match="me/seen is there and public: say --public"):
        publish(run, "me/seen")
    assert hub["repo"].files == before


def test_a_checkpoint_by_its_step(run, hub, capsys):
    for step in (10, 20):
        write_folder(run / "checkpoints" / f"step-{step:08d}", lambda path: save(path, layer_norm_epsilon=1e-3))
    publish(run, "me/early", checkpoint=10)
    assert "| 9.0000 |" in hub["files"]["README.md"].decode()
    with pytest.raises(UserError, match="has no checkpoint of step 15: it has 10, 20"):
        publish(run, "me/early", checkpoint=15)
    (run / "checkpoints" / "step-00000010" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is not published, as it is damaged: config"):
        publish(run, "me/early", checkpoint=10)


def test_the_generated_part_of_a_card_is_renewed_and_the_rest_stays(run, hub):
    publish(run, "me/my-gpt2", license="mit")
    card = hub["files"]["README.md"].decode()
    hub["repo"].files["README.md"] = card.replace("7.2500", "1.0000").encode() + b"\nMy words.\n"
    publish(run, "me/my-gpt2")
    assert hub["files"]["README.md"].decode() == card + "\nMy words.\n"
    hub["repo"].files["README.md"] = b"# mine\n"  # and figures that nobody renews must not stay
    publish(run, "me/my-gpt2")
    assert "figures.json" not in hub["repo"].files and "README.md" not in hub["files"]


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
        publish(run / "final", f"me/code-{with_code}", with_code=with_code)
        extra = {"chat_template.jinja"} | (CODE if with_code else set())
        assert seen[-1].keys() == STOCK - CARD | extra
        assert seen[-1] | {name: hub["files"][name] for name in CARD} == hub["files"]
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
