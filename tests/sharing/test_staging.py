"""What may not leave this machine: each way in which a folder leads elsewhere or tells too much is refused by name."""

import json
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2_hf.model.hub import AUTO_MAP, code_files
from gpt2_hf.runs import write_folder
from gpt2_hf.sharing.privacy import PublishError
from gpt2_hf.sharing.publish import publish
from gpt2_hf.sharing.staging import refuse_links, stage
from gpt2_hf.sharing.verify import CheckFailed, weight_files

KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\n"
TOKEN = "hf_" + "aB3" * 11
SHARD = "model-00001-of-00001.safetensors"
CODE = {file.name for file in code_files()}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with every kind of file; whether it is a good GPT-2 does not matter here. Its home is beside it."""
    (tmp_path / "me").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "id_key").write_text(KEY)
    path = tmp_path / "model"
    path.mkdir()
    (path / "tokenizer_config.json").write_text("{}")
    # As in GPT-2's own files, where such pieces of texts are no paths.
    (path / "tokenizer.json").write_text('{"model": {"merges": ["../ ../"]}}')
    (path / "vocab.json").write_text('{"../../": 0}')
    (path / "merges.txt").write_text("../ ../\n")
    (path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_ctx": 8, "_name_or_path": "gpt2"}))
    (path / "generation_config.json").write_text("{}")
    (path / "README.md").write_text("# mine, like https://example.org/root/home/x\n")
    save_file({"x": torch.zeros(1)}, path / "model.safetensors", metadata={"format": "pt"})
    return path


def edit(folder: Path, file: str, **fields) -> None:
    path = folder / file
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | fields))


def refusal(folder: Path, with_code: bool | None = False) -> str:
    target = folder.parent / "staged"
    target.mkdir()
    with pytest.raises(PublishError) as error:
        stage(folder, target, with_code)
    shutil.rmtree(target)
    message = str(error.value)
    assert "\n" not in message and TOKEN not in message
    return message


def staged(folder: Path, with_code: bool | None = False) -> set[str]:
    target = folder.parent / "staged"
    target.mkdir()
    stage(folder, target, with_code)
    assert not [path for path in target.iterdir() if path.is_symlink() or not path.is_file()]
    return {path.name for path in target.iterdir()}


STOCK = {"README.md", "config.json", "generation_config.json", "merges.txt", "model.safetensors", "tokenizer.json"}
STOCK |= {"tokenizer_config.json", "vocab.json"}


def test_a_folder_s_own_stock_files_are_copied_unchanged(folder):
    (folder / "trainer_state").mkdir()
    for name in ("trainer_state/optimizer.pt", "manifest.json", "pytorch_model.bin", "theirs.py", "LICENSE", ".env"):
        (folder / name).write_text(TOKEN)
    (folder / "notes").symlink_to("/")  # what stays here may be anything
    assert staged(folder) == STOCK
    for name in STOCK:
        copy = folder.parent / "staged" / name
        assert copy.read_bytes() == (folder / name).read_bytes() and not copy.samefile(folder / name)


def test_a_disk_without_room_for_the_copy_is_named(folder, monkeypatch):
    size = sum(path.stat().st_size for path in folder.iterdir())
    for room, fits in ((size, True), (size - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, room=room: SimpleNamespace(free=room))
        if fits:
            assert staged(folder) == STOCK
            shutil.rmtree(folder.parent / "staged")
        else:
            assert "set TMPDIR to a folder on a larger disk" in refusal(folder)


# Files that are not what they seem


@pytest.mark.parametrize("target", ["../id_key", "../nothing", "config.json", "/dev/zero"])
def test_a_link_is_not_followed(folder, target):
    for name in sorted(STOCK | {"chat_template.jinja", "added_tokens.json"}):
        copy = shutil.copytree(folder, folder.parent / f"with {name}")
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to(target)
        message = refusal(copy)
        assert f"{copy / name} is a symbolic link; only plain files are published" in message and "cp -L" in message


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may not be long
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


@pytest.mark.parametrize(
    ("make", "kind"),
    [(os.mkfifo, "a pipe"), (Path.mkdir, "a folder"), (make_socket, "a socket")],
    ids=["pipe", "folder", "socket"],
)
def test_what_is_no_file_is_refused_and_does_not_hang(folder, make, kind):
    for name in ("README.md", "config.json", "model.safetensors"):
        (folder / name).rename(folder.parent / name)
        make(folder / name)
        assert f"{name} is {kind}" in refusal(folder)
        (folder / name).rename(folder.parent / f"odd {name}")
        (folder.parent / name).rename(folder / name)
    make(folder / "manifest.json")  # not published
    assert staged(folder) == STOCK


def test_a_file_that_becomes_a_link_while_it_is_looked_at_is_not_followed(folder, monkeypatch):
    opened = os.open

    def swap(path, *rest):
        if Path(path).name == "README.md" and not Path(path).is_symlink():
            Path(path).unlink()
            Path(path).symlink_to(folder.parent / "id_key")
        return opened(path, *rest)

    monkeypatch.setattr(os, "open", swap)
    (folder.parent / "staged").mkdir()
    with pytest.raises(OSError, match=r"README\.md"):
        stage(folder, folder.parent / "staged", False)
    assert not (folder.parent / "staged" / "README.md").exists()


@pytest.mark.parametrize("link", ["final", "checkpoints", "checkpoints/step-00000001"])
def test_links_on_the_way_to_a_model_are_refused(folder, link):
    """The folder that is named may be a link; what was found below it may not."""
    outside, run = folder.parent / "outside", folder.parent / "run"
    found = link if link != "checkpoints" else "checkpoints/step-00000001"
    write_folder(outside / "step-00000001", lambda path: shutil.copytree(folder, path, dirs_exist_ok=True))
    (run / link).parent.mkdir(parents=True)
    (run / link).symlink_to(outside if link == "checkpoints" else outside / "step-00000001")
    # A checkpoint that is a link is none, for a run either.
    refusal = "holds no model" if "step" in link else "is a symbolic link: name the folder that it leads to"
    with pytest.raises((PublishError, FileNotFoundError), match=refusal):
        publish(run, "me/x", dry_run=True)
    refuse_links(run / found, run / found)


@pytest.mark.parametrize(
    "name",
    [
        "Readme.md",
        "CONFIG.JSON",
        "tokenizer.json . ",
        "\uff43onfig.json",
        "config\u200b.json",
        "\x01merges.txt",
    ],
)
def test_a_name_that_other_systems_take_for_a_stock_file_is_refused(folder, name):
    (folder / name).write_text("x")
    message = refusal(folder)
    assert ascii(name) in message and "rename or delete it" in message


@pytest.mark.parametrize("name", ["sub\\config.json", "..\\README.md", "config.json\n", "a\x1b[2J", "\udcff"])
def test_other_odd_names_stay_here(folder, name):
    (folder / name).write_text("x")
    if name.strip() == "config.json":
        assert "rename or delete it" in refusal(folder)
    else:
        assert staged(folder) == STOCK


@pytest.mark.parametrize(
    "name",
    [
        "sub/model-00001-of-00001.safetensors",
        "..\\id_key",
        7,
        "..",
        "pytorch_model.bin",
        SHARD.upper(),
        SHARD + "\n",
        "model-\uff100001-of-00001.safetensors",
    ],
)
def test_an_index_leads_only_to_shards_beside_it(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / "sub").mkdir()
    if name not in (7, ".."):
        (folder / name).write_text("x")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    assert staged(folder) == STOCK - {"model.safetensors"} | {"model.safetensors.index.json"}
    with pytest.raises(CheckFailed, match=r"index\.json names '.*': shards lie beside it"):
        weight_files(folder)


@pytest.mark.parametrize("name", ["../id_key", "/etc/passwd"])
def test_an_index_that_leads_out_is_refused(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    assert f'weight_map.x "{name}", a path of this machine' in refusal(folder)


def test_shards_are_copied_and_not_through_links(folder):
    (folder / "model.safetensors").rename(folder / SHARD)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": SHARD}}))
    assert staged(folder) == STOCK - {"model.safetensors"} | {SHARD, "model.safetensors.index.json"}
    shutil.rmtree(folder.parent / "staged")
    (folder / SHARD).rename(folder.parent / SHARD)
    (folder / SHARD).symlink_to(folder.parent / SHARD)
    assert f"{SHARD} is a symbolic link" in refusal(folder)


def test_a_snapshot_of_the_hub_s_cache_is_refused_with_the_way_out(folder):
    """There every file is a link to one that is named by its hash."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{number:040x}")
        file.symlink_to(f"../blobs/{number:040x}")
    assert "is a symbolic link; only plain files" in refusal(folder)
    shutil.copytree(folder, folder.parent / "copy")  # as cp -rL
    assert staged(folder.parent / "copy") == STOCK


# Files that lead loaders elsewhere


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "modeling_gpt.x--evil.M"}}),
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "me/evil--modeling_gpt.GPTForCausalLM"}}),
        ("config.json", {"auto_map": AUTO_MAP | {"AutoTokenizer": ["theirs.T", None]}}),
        ("config.json", {"auto_map": AUTO_MAP | {"AutoModel": "modeling_gpt.GPTForCausalLM"}}),
        ("config.json", {"auto_map": {}}),
        ("config.json", {"auto_map": None}),
        ("config.json", {"task_specific_params": {"text-generation": {"auto_map": AUTO_MAP}}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["theirs.T", None]}}),
        ("tokenizer_config.json", {"auto_map": AUTO_MAP}),
        ("generation_config.json", {"auto_map": AUTO_MAP}),
        ("config.json", {"custom_pipelines": {"text-generation": {"impl": "theirs.P"}}}),
        ("config.json", {"quantization_config": {"quant_method": "theirs"}}),
        ("config.json", {"compression_config": {"quant_method": "theirs"}}),
        ("config.json", {"transformers_weights": "other.safetensors"}),
        ("config.json", {"attn_implementation": "me/kernel"}),
        ("config.json", {"_attn_implementation": {"": "me/kernel:f"}}),
        ("config.json", {"experts_implementation": "me/kernel@v1"}),
        ("config.json", {"use_kernels": True}),
        ("config.json", {"kernel_config": {"RMSNorm": "me/kernel:RMSNorm"}}),
        ("config.json", {"trust_remote_code": True}),
        ("tokenizer_config.json", {"trust_remote_code": True}),
        ("generation_config.json", {"custom_generate": "me/evil"}),
        ("generation_config.json", {"trust_remote_code": True}),
        ("config.json", {"task_specific_params": {"text-generation": {"custom_generate": "me/evil"}}}),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value)[:40],
)
def test_a_key_that_leads_to_code_or_other_weights_is_refused(folder, file, fields):
    edit(folder, file, **fields)
    for with_code in (None, False, True):
        message = refusal(folder, with_code)
        assert message.startswith(f"{file} has ") and "delete it there" in message


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "sdpa", "_attn_implementation_internal": None, "_attn_implementation_autoset": True},
        {"quantization_config": None, "use_kernels": False, "custom_pipelines": {}},
        {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "n_special": 0},
    ],
)
def test_what_stock_configurations_hold_is_published(folder, fields):
    edit(folder, "config.json", **fields)
    assert staged(folder) == STOCK


def test_a_key_twice_is_refused(folder):
    """Of two readers each may see another."""
    (folder / "config.json").write_text('{"model_type": "gpt2", "n_head": 1, "n_head": 2}')
    assert "config.json cannot be read as JSON (the key 'n_head' stands there twice)" in refusal(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"x": "\ud800"}', "\ufeff{}"])
def test_a_broken_configuration_is_one_line(folder, content):
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    assert "config.json" in refusal(folder)


def test_an_adapter_is_refused(folder):
    """transformers and PEFT put it on the weights, so that those are not what is loaded."""
    (folder / "adapter_config.json").write_text("{}")
    assert "holds adapter_config.json, so loaders put an adapter on these weights" in refusal(folder)


def test_code_is_ours_from_this_package_or_stays_here(folder):
    edit(folder, "config.json", auto_map=AUTO_MAP)
    (folder / "modeling_gpt.py").write_text("changed")
    (folder / "theirs.py").write_text("x")
    assert staged(folder, with_code=False) == STOCK
    target = folder.parent / "staged"
    assert "auto_map" not in json.loads((target / "config.json").read_text())
    shutil.rmtree(target)
    assert staged(folder, with_code=True) == STOCK | CODE
    for file in code_files():
        assert (target / file.name).read_bytes() == file.read_bytes()
    shutil.rmtree(target)
    assert staged(folder, with_code=None) == STOCK | {"modeling_gpt.py"}  # to be checked, as it lies there
    shutil.rmtree(target)
    (folder / "loss.py").symlink_to("../id_key")
    assert "loss.py is a symbolic link" in refusal(folder, with_code=None)


# Files that tell too much


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"_name_or_path": "/scratch/me/runs/final"}),
        ("config.json", {"_name_or_path": "../runs/final"}),
        ("config.json", {"_name_or_path": "~/runs/final"}),
        ("config.json", {"_name_or_path": "C:\\runs\\final"}),
        ("config.json", {"task_specific_params": {"x": ["file:///srv/x"]}}),
        ("config.json", {"command": "train --config=/home/me/x.yaml"}),
        ("tokenizer_config.json", {"special_tokens_map_file": "/mnt/cache/special_tokens_map.json"}),
        ("tokenizer_config.json", {"tokenizer_file": "\\\\server\\share\\tokenizer.json"}),
        ("generation_config.json", {"source": "/data/x/y"}),
        ("special_tokens_map.json", {"source": "/data/x/y"}),
    ],
)
def test_a_path_of_this_machine_is_refused(folder, file, fields):
    edit(folder, file, **fields)
    message = refusal(folder)
    assert message.startswith(f"{file} has ") and message.endswith("a path of this machine: delete it there")


@pytest.mark.parametrize("file", ["README.md", "chat_template.jinja", "config.json"])
@pytest.mark.parametrize("place", ["me", "model"])
def test_the_folder_and_the_home_of_this_machine_are_not_told(folder, file, place):
    path = folder.parent / place
    (folder / file).write_text(json.dumps({"note": f"see '{path}'."}))
    assert f"{file} names {path}, a folder of this machine" in refusal(folder)


@pytest.mark.parametrize(
    "secret",
    [
        TOKEN,
        "ghp_" + "a1" * 18,
        "github_pat_" + "A1b2" * 8,
        "sk-proj-" + "a1B2" * 8,
        "AKIA" + "A1" * 8,
        KEY,
        "https://me:pass@example.org/data",
        "s3://key:secret@bucket/x",
    ],
)
def test_what_looks_like_a_secret_is_refused_and_not_shown(folder, secret):
    for file in ("README.md", "merges.txt", "config.json", "tokenizer.json", "vocab.json"):
        before = (folder / file).read_text()
        if file.endswith(".json"):
            edit(folder, file, note=secret)
        else:
            (folder / file).write_text(f"{before}\n{secret}\n")
        message = refusal(folder)
        assert message == f"{file} holds what looks like a password, token or private key: take it out"
        (folder / file).write_text(before)


def test_an_escaped_secret_is_read_as_readers_read_it(folder):
    (folder / "config.json").write_text(f'{{"auto_map": "\\u0068{TOKEN[1:]}"}}')
    assert refusal(folder).startswith("config.json holds what looks like a password")


def test_the_environment_s_own_secrets_are_refused(folder, monkeypatch):
    monkeypatch.setenv("TRACKER_API_KEY", "0123456789abcdef")
    (folder / "README.md").write_text("made with 0123456789abcdef")
    assert refusal(folder).startswith("README.md holds what looks like a password")
    monkeypatch.delenv("TRACKER_API_KEY")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "0123456789abcdef")
    assert refusal(folder).startswith("README.md holds what looks like a password")


@pytest.mark.parametrize(
    ("value", "words"),
    [(TOKEN, "a password, token or private key"), ("/home/me/run", "a path of this machine")],
)
def test_the_header_of_the_weights_is_read_too(folder, value, words):
    file = folder / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "source": value})
    assert refusal(folder).startswith("model.safetensors ") and words in refusal(folder)


def test_a_card_that_is_no_text_is_refused(folder):
    (folder / "README.md").write_bytes(b"\xff\xfe#\x00")
    assert refusal(folder) == "README.md is not UTF-8 text: write it so"


@pytest.mark.parametrize("license", ["mit\nfoo: bar", "mit #", "MIT", "[mit]", " mit", "mit\n", "..", "xé"])
def test_a_licence_writes_one_value_into_the_card(folder, license):
    with pytest.raises(PublishError, match="is not the Hub's name of a licence, such as mit") as error:
        publish(folder, "me/x", license=license, dry_run=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("repo", ["me/x\n", "me/x\nlicense: mit", 'me/"x', "me/\uff58", "é/x", "me/x`"])
def test_a_repository_s_name_writes_nothing_into_the_card(folder, repo):
    with pytest.raises(PublishError, match="is not the name of a repository"):
        publish(folder, repo, dry_run=True)
