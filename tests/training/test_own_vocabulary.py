"""A run on data of another tokenizer: it takes it from the data, and what it leaves is a stock gpt2 folder with it."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train import clean_state as clean_state
from test_train import run, tiny, with_steps
from tiny_tokenizers import ALPHABET, CL100K, END, of_bytes, of_merges, of_pairs, texts, trained, write_tokenizer
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GPT2LMHeadModel

from gpt2_hf.corpus.prepare import PrepareConfig, prepare
from gpt2_hf.data.shards import open_split
from gpt2_hf.data.stream import TokenStream
from gpt2_hf.data.tokenizer import load_tokenizer, read_tokenizer
from gpt2_hf.evaluation.evaluate import evaluate_folder, load_folder
from gpt2_hf.evaluation.generate import sample_text
from gpt2_hf.evaluation.hellaswag import HellaSwag, load_hellaswag
from gpt2_hf.knobs import ConfigError
from gpt2_hf.sharing.convert import convert
from gpt2_hf.sharing.figures import gather
from gpt2_hf.sharing.fresh_process import check_folders
from gpt2_hf.sharing.weights import ConversionError
from gpt2_hf.training import loop as training

GREEK = [(a, "Î") for a in ALPHABET]
TEXTS = [f"{number}: {text}" for number, text in enumerate(texts(60))]


def prepared(root: Path, made, name: str) -> Path:
    (root / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tokenizer = write_tokenizer(made, root / name)
    out = root / f"data-{name}"
    prepare(
        PrepareConfig((str(root / "docs.jsonl"),), out=str(out), workers=1, tokenizer=str(tokenizer), val_documents=9)
    )
    shutil.rmtree(tokenizer)  # the data has it
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("mine"), trained(CL100K), "mine")


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("wide"), of_pairs(), "wide")


def recipe(data: Path, run_dir: Path, **changes):
    settings = {
        "model__vocab_size": None,
        "train__steps": 4,
        "optim__warmup_steps": 1,
        "optim__lr": 1e-2,
        "eval__val_every": 2,
        "eval__sample_every": 4,
        "eval__sample_count": 2,
        "eval__sample_tokens": 4,
        "eval__hellaswag_every": 4,
        "eval__hellaswag_items": 8,
        "checkpoint__save_every": 2,
    }
    return tiny(data, run_dir, **(settings | changes))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> tuple[Path, list[dict], str]:
    from accelerate.state import AcceleratorState

    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    rows = run(recipe(data, run_dir))
    AcceleratorState._reset_state(reset_partial_state=True)
    return run_dir, rows, (run_dir / "config.yaml").read_text()


def test_the_loss_and_its_bits_per_byte_are_stock_s(finished, data):
    run_dir, rows, _ = finished
    model = GPT2LMHeadModel.from_pretrained(run_dir / "final").eval()
    shards = open_split(data, "val")
    windows = torch.from_numpy(TokenStream(shards, 32, 0, shuffle=False).batch(0, 10).astype("int64"))
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits.double()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").item()
    ids = [token for token in windows[:, 1:].flatten().tolist() if token != shards.eot]
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "final")
    byte_of = {char: 1 for char in tokenizer.get_vocab() if len(char) == 1}  # each character of an entry is a byte
    assert len(byte_of) == 256
    n_bytes = sum(len(token) for token in tokenizer.convert_ids_to_tokens(ids))
    assert rows[-1]["val_loss"] == pytest.approx(nats / 320, abs=1e-5)
    assert rows[-1]["val_bpb"] == pytest.approx(nats / math.log(2) / n_bytes, abs=1e-5)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    assert len(rows[-1]["samples"]) == 2
    assert not any("hellaswag" in key for row in rows for key in row)


def test_what_it_leaves_is_stock_with_its_own_tokenizer(finished):
    run_dir, _, recorded = finished
    final = run_dir / "final"
    made = trained(CL100K)
    config, generation = (json.loads((final / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    for settings in (config, generation):
        assert settings["bos_token_id"] == settings["eos_token_id"] == made.token_to_id(END) == 0
    assert config["vocab_size"] == made.get_vocab_size() == 300 and "vocab_size: 300" in recorded
    (results,) = check_folders([final]).values()
    assert {result.check for result in results if result.status != "ok"} == set()
    assert "300 tokens, texts come back unchanged, end of text 0" in [result.text for result in results]
    tokenizer = AutoTokenizer.from_pretrained(final)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == made.encode(text).ids
    record = gather(final, final)
    assert record["run"]["data"]["tokenizer"] == "mine"


def test_a_run_goes_on_bit_for_bit(finished, data, tmp_path):
    run_dir, rows, _ = finished
    run(with_steps(recipe(data, tmp_path / "run"), 2))
    again = run(recipe(data, tmp_path / "run"))
    keys = ("train_loss", "val_loss", "val_bpb")
    assert [{k: row.get(k) for k in keys} for row in again] == [{k: row.get(k) for k in keys} for row in rows]
    assert again[-1]["samples"] == rows[-1]["samples"]
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (run_dir, tmp_path / "run"))
    assert all(torch.equal(a[name], b[name]) for name in a | b)


def test_finished_models_are_evaluated_on_their_data_and_on_no_other(finished, data, wide, capsys):
    run_dir, rows, _ = finished
    figures = evaluate_folder(run_dir, device="cpu")
    assert figures["val_loss"] == pytest.approx(rows[-1]["val_loss"], abs=1e-6)
    assert figures["val_bpb"] == pytest.approx(rows[-1]["val_bpb"], abs=1e-6)
    assert "hellaswag_acc" not in figures and "HellaSwag is off: of 100%" in capsys.readouterr().out
    with pytest.raises(ValueError, match="vocabulary of 65793, the model one of 300"):
        evaluate_folder(run_dir, wide, hellaswag_items=0, device="cpu")
    model, tokenizer = load_folder(run_dir)
    (sample,) = sample_text(model, tokenizer, "", n_samples=1, max_new_tokens=3)  # begins as a document does
    assert isinstance(sample, str) and tokenizer.bos_token_id == 0


def test_it_survives_formats_that_hold_no_tokenizer(finished, data, tmp_path, capsys):
    run_dir, _, _ = finished
    mine = str(data / "tokenizer")
    with pytest.raises(ConversionError, match="llmc holds no tokenizer"):
        convert(run_dir, tmp_path / "model.bin", to="llmc", tokenizer=mine)
    convert(run_dir, tmp_path / "model.bin", to="llmc")
    write_tokenizer(of_merges(GREEK), tmp_path / "other")
    with pytest.raises(ConversionError, match=r"too few for the 513 of --tokenizer .*other"):
        convert(tmp_path / "model.bin", tmp_path / "back", tokenizer=str(tmp_path / "other"))
    convert(tmp_path / "model.bin", tmp_path / "back", tokenizer=mine)
    before, after = (GPT2LMHeadModel.from_pretrained(folder) for folder in (run_dir / "final", tmp_path / "back"))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert after.config.eos_token_id == after.generation_config.eos_token_id == 0
    texts_of = [
        AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"] for folder in (run_dir / "final", tmp_path / "back")
    ]
    assert texts_of[0] == texts_of[1]


def test_a_vocabulary_beyond_uint16_is_trained_on(wide, tmp_path):
    rows = run(recipe(wide, tmp_path / "run", train__steps=2, eval__sample_every=0, eval__hellaswag_every=0))
    assert rows[0]["val_loss"] == pytest.approx(math.log(65_793), abs=0.1)
    weights = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert weights["transformer.wte.weight"].shape == (65_793, 32)


def test_a_batch_holds_ids_beyond_uint16(wide, tmp_path, monkeypatch):
    seen = []

    def look(accelerator, model, optimizers, batch, *rest):
        seen.append(batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train_step", look)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(wide, tmp_path / "run", eval__val_every=0, train__check_kernels=False))
    stored = np.concatenate([shard.tokens() for shard in open_split(wide, "train").shards])
    assert seen[0].max() > 2**16 and np.isin(seen[0].numpy(), stored).all()


def test_settings_that_do_not_fit_the_data_are_one_line(data, wide, tmp_path):
    with pytest.raises(ConfigError, match="vocabulary of 300, the model has 299 rows"):
        run(recipe(data, tmp_path / "run", model__vocab_size=299))
    with pytest.raises(ConfigError, match=r"eval\.sample_prompt has \d+ tokens, and the model 64 positions"):
        run(recipe(data, tmp_path / "run", eval__sample_prompt="abcdefgh" * 20))  # 160 bytes, few of them merged
    write_tokenizer(of_bytes(), tmp_path / "bytes")
    with pytest.raises(ValueError, match="prepared with the tokenizer mine, not with bytes"):
        run(recipe(data, tmp_path / "run", data__tokenizer=str(tmp_path / "bytes")))
    assert not (tmp_path / "run").exists()


def test_more_rows_than_entries_are_fine_and_other_data_is_another_run(data, wide, tmp_path):
    quiet = {"eval__val_every": 0, "eval__sample_every": 0, "eval__hellaswag_every": 0, "train__steps": 2}
    run(recipe(data, tmp_path / "run", model__vocab_size=384, **quiet))
    weights = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert len(weights["transformer.wte.weight"]) == 384
    with pytest.raises(ConfigError, match=r"holds a run with another .*data\.tokenizer"):
        run(recipe(wide, tmp_path / "run", **(quiet | {"train__steps": 3})))


def test_it_begins_with_weights_of_its_own_tokenizer_only(finished, data, tmp_path):
    run_dir, rows, _ = finished
    quiet = {"eval__sample_every": 0, "eval__hellaswag_every": 0, "train__steps": 1}
    again = run(recipe(data, tmp_path / "run", model__init_from=str(run_dir), **quiet))
    assert again[0]["val_loss"] == pytest.approx(rows[-1]["val_loss"], abs=1e-6)
    other = prepared(tmp_path, trained(vocab_size=300), "other")  # as many entries, but others
    with pytest.raises(ConfigError, match="another tokenizer than other, of which the data is made"):
        run(recipe(other, tmp_path / "second", model__init_from=str(run_dir), **quiet))


def test_token_files_without_a_manifest_are_of_the_tokenizer_that_is_named(data, finished, tmp_path):
    _, rows, _ = finished
    shutil.copytree(data, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer").rename(tmp_path / "tokenizer")
    (tmp_path / "bare" / "manifest.json").unlink()
    for metadata in (tmp_path / "bare").glob("*/*.metadata"):
        metadata.unlink()
    config = recipe(tmp_path / "bare", tmp_path / "run", data__tokenizer=str(tmp_path / "tokenizer"))
    again = run(dataclasses.replace(config, eval=dataclasses.replace(config.eval, hellaswag_every=0)))
    keys = ("train_loss", "val_loss", "val_bpb")
    assert [{k: row.get(k) for k in keys} for row in again] == [{k: row.get(k) for k in keys} for row in rows]
    figures = evaluate_folder(tmp_path / "run", hellaswag_items=0, device="cpu")
    assert figures["val_loss"] == pytest.approx(rows[-1]["val_loss"], abs=1e-6)


def test_hellaswag_is_scored_where_it_fits_and_can_be_cut():
    def task(made, n_positions: int) -> HellaSwag:
        tokenizer = read_tokenizer("x", {"tokenizer.json": made.to_str().encode()}).hugging_face()
        return HellaSwag(items, tokenizer, n_positions=n_positions)

    items = load_hellaswag(40)
    assert task(trained(CL100K), 1024).obstacle is None and task(of_bytes(), 2048).obstacle is None
    assert "does not fit into 128 positions" in (task(of_bytes(), 128).obstacle or "")
    # GPT-2's is scored as ever, with what does not fit cut off on the left.
    assert HellaSwag(items, load_tokenizer(), n_positions=32).obstacle is None

    joined = of_merges([(letter, "Ġ") for letter in "abcdefghijklmnopqrstuvwxyz.,"])
    joined.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert "joins an ending to its context" in (task(joined, 2048).obstacle or "")
