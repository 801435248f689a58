"""A folder of ours in the programs that people load a GPT-2 with: the same greedy text as from our own classes.

What such a program shows of its logits is compared too: greedy choices alone would forgive small mistakes. The
reference is GPTForCausalLM, itself compared here with GPT-2 written out on the bare tensors of the file.

`make test-consumers` installs those programs, each test skips what is not there; docs/consumers.md is for users.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2LMHeadModel,
    GPT2Model,
    pipeline,
)
from transformers.pytorch_utils import Conv1D

from gpt2_hf.data.tokenizer import load_tokenizer, save_tokenizer
from gpt2_hf.model import GPTConfig, GPTForCausalLM

pytestmark = pytest.mark.slow

REPO = Path(__file__).parent.parent
INSTALLED = REPO / ".venv-consumers"
MISSING = "not installed: make test-consumers does that"
OLDER = {
    "4.57": INSTALLED / "transformers-4.57",  # the last release before transformers 5
    "5.17": REPO / ".venv-lower",  # the oldest that setup.cfg admits
}
LLAMA_CPP = INSTALLED / "llama.cpp" / "vendor" / "llama.cpp"
NEW = 40  # tokens to generate
# Capitals, digits, punctuation, two spaces, an end of line, characters of two and three bytes: all that splits text.
PASSAGE = (
    "At dusk the Réaumur weighed anchor with 1,204 crates of tea; nobody on the quay waved.\n"
    "“She'll be back,” said the pilot —  but the harbour-master, who'd counted the boats, shook his head and wrote."
)
PROMPT = PASSAGE[: PASSAGE.index(" anchor")]


@dataclass
class Model:
    """A folder of ours and what our own classes make of it: `prompt` and `new` are tokens, `text` that of `new`."""

    folder: Path
    prompt: list[int]
    new: list[int]
    text: str
    logits: torch.Tensor  # (T, 50257) of prompt + new


def greedy(model, prompt: list[int], count: int = NEW) -> list[int]:
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 50256}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


def logits_of(model, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def assert_close(found, expected: torch.Tensor, share: float = 1e-4) -> None:
    """Logits that differ by no more than a share of the largest."""
    found = torch.as_tensor(np.asarray(found), dtype=torch.float32)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= share * expected.abs().max()


def fit(model, ids: torch.Tensor, steps: int, lr: float) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Model:
    """A model that knows one passage by heart, so that each next token is far ahead of the others."""
    folder = tmp_path_factory.mktemp("ours") / "final"
    tokenizer = load_tokenizer()
    ids = tokenizer(PASSAGE).input_ids
    torch.manual_seed(0)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 96, "initializer_range": 0.1}
    model = GPTForCausalLM(GPTConfig(**shape, **no_dropout))
    fit(model, torch.tensor([ids]), steps=40, lr=4e-3)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder, model.config.n_positions)

    prompt = tokenizer(PROMPT).input_ids
    new = greedy(model, prompt)
    assert new == ids[len(prompt) : len(prompt) + NEW]
    logits = logits_of(model, prompt + new)
    first, second = logits[len(prompt) - 1 : -1].topk(2).values.T
    assert (first - second).min() > 2, "near-ties would make the texts below a matter of rounding"
    return Model(folder, prompt, new, tokenizer.decode(new), logits)


def gpt2_by_hand(w: dict[str, torch.Tensor], tokens: list[int], n_head: int = 4) -> torch.Tensor:
    """Logits (T, V) of a GPT-2 from the tensors of its file and nothing else."""

    def norm(x, name):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def project(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    T = len(tokens)
    x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][:T]
    future = torch.ones(T, T).triu(1).bool()
    for i in range(sum(name.endswith("ln_1.weight") for name in w)):
        block = f"transformer.h.{i}"
        qkv = project(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").view(T, 3, n_head, -1)
        q, k, v = qkv.permute(1, 2, 0, 3)  # each (heads, T, head size)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1)
        x = x + project(mixed, f"{block}.attn.c_proj")
        h = project(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + project(h, f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


def test_the_bare_tensors_of_the_file(ours):
    weights = load_file(ours.folder / "model.safetensors")
    assert "lm_head.weight" not in weights  # tied
    assert_close(gpt2_by_hand(weights, ours.prompt + ours.new), ours.logits)
    tokens = list(ours.prompt)
    for _ in range(NEW):
        tokens.append(int(gpt2_by_hand(weights, tokens)[-1].argmax()))
    assert tokens == ours.prompt + ours.new


# transformers


def test_transformers_newest(ours):
    model, info = AutoModelForCausalLM.from_pretrained(ours.folder, output_loading_info=True)
    assert type(model) is GPT2LMHeadModel and not any(info.values())
    assert greedy(model, ours.prompt) == ours.new
    assert_close(logits_of(model, ours.prompt + ours.new), ours.logits)
    generate = pipeline("text-generation", model=str(ours.folder))
    (answer,) = generate(PROMPT, return_full_text=False, max_new_tokens=NEW, do_sample=False, pad_token_id=50256)
    assert answer["generated_text"] == ours.text


@pytest.mark.parametrize("version", OLDER)
def test_older_transformers(version, ours):
    """from_pretrained, tokenizer and pipeline, in a process that imports nothing of ours."""
    if not (OLDER[version] / "transformers").is_dir():
        pytest.skip(f"transformers {version} is {MISSING}")
    environment = {**os.environ, "PYTHONPATH": str(OLDER[version])}
    command = [
        sys.executable,
        "-W",
        "ignore",
        REPO / "tests" / "consumers" / "greedy.py",
        ours.folder,
        PROMPT,
        str(NEW),
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["version"].startswith(f"{version}.")
    assert (found["class"], found["amiss"], found["longest"]) == ("GPT2LMHeadModel", [], 96)
    assert (found["prompt"], found["new"]) == (ours.prompt, ours.new)
    assert found["text"] == found["pipeline"] == ours.text
    assert_close(found["logits"], ours.logits[len(ours.prompt) - 1])


def test_the_other_classes_of_transformers(ours):
    """The trunk by AutoModel, and a classifier on top of it, of which only the classes' weights are new."""
    trunk, info = AutoModel.from_pretrained(ours.folder, output_loading_info=True)
    assert type(trunk) is GPT2Model and not info["missing_keys"]
    with torch.no_grad():
        hidden = trunk(torch.tensor([ours.prompt])).last_hidden_state[0]
    assert_close(hidden @ trunk.wte.weight.detach().T, ours.logits[: len(ours.prompt)])

    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        ours.folder, num_labels=3, pad_token_id=50256, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}
    with torch.no_grad():
        scores = classifier(torch.tensor([ours.prompt + [50256] * 3])).logits[0]
    assert_close(scores, hidden[-1] @ classifier.score.weight.detach().T)


# Exports


class LogitsOnly(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


def logits_only(ours: Model) -> LogitsOnly:
    """The stock model as what exports best: tokens in, logits out, no cache."""
    return LogitsOnly(GPT2LMHeadModel.from_pretrained(ours.folder)).eval()


def greedy_without_cache(logits_of_batch, ours: Model) -> list[int]:
    tokens = list(ours.prompt)
    for _ in range(NEW):
        tokens.append(int(np.asarray(logits_of_batch(np.array([tokens])))[0, -1].argmax()))
    return tokens[len(ours.prompt) :]


def test_torch_export(ours, tmp_path):
    sizes = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    example = torch.tensor([ours.prompt] * 2)
    program = torch.export.export(logits_only(ours), (example,), dynamic_shapes=sizes)
    torch.export.save(program, tmp_path / "gpt2.pt2")
    run = torch.export.load(tmp_path / "gpt2.pt2").module()
    assert_close(run(torch.tensor([ours.prompt + ours.new]))[0].detach(), ours.logits)
    assert greedy_without_cache(lambda ids: run(torch.from_numpy(ids)).detach(), ours) == ours.new


def test_onnx_runtime(ours, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason=MISSING)
    pytest.importorskip("onnxscript", reason=MISSING)
    torch.onnx.export(
        logits_only(ours),
        (torch.tensor([ours.prompt] * 2),),
        tmp_path / "gpt2.onnx",
        input_names=["input_ids"],
        output_names=["logits"],
        dynamic_shapes={"input_ids": {0: "batch", 1: "sequence"}},
        dynamo=True,
    )
    session = onnxruntime.InferenceSession(tmp_path / "gpt2.onnx", providers=["CPUExecutionProvider"])

    def run(ids: np.ndarray) -> np.ndarray:
        return session.run(["logits"], {"input_ids": ids})[0]

    assert_close(run(np.array([ours.prompt + ours.new]))[0], ours.logits)
    assert greedy_without_cache(run, ours) == ours.new


def test_ctranslate2(ours, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2", reason=MISSING)
    ctranslate2.converters.TransformersConverter(str(ours.folder)).convert(str(tmp_path / "ct2"))
    generator = ctranslate2.Generator(str(tmp_path / "ct2"), device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(ours.folder)
    words = tokenizer.convert_ids_to_tokens(ours.prompt)
    (answer,) = generator.generate_batch([words], max_length=NEW, sampling_topk=1, include_prompt_in_result=False)
    assert answer.sequences_ids[0] == ours.new
    assert tokenizer.decode(answer.sequences_ids[0]) == ours.text
    logits = generator.forward_batch([tokenizer.convert_ids_to_tokens(ours.prompt + ours.new)])
    assert_close(np.array(logits)[0], ours.logits)


@pytest.mark.parametrize(("kind", "share"), [("f32", 2e-3), ("q8_0", 0.05)])
def test_llama_cpp(kind, share, ours, tmp_path):
    """Through its own converter; it computes softmax and GELU from tables of 16 bits."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="not installed: make test-consumers LLAMA_CPP=1 builds it")
    script = LLAMA_CPP / "convert_hf_to_gguf.py"
    if not script.is_file():
        pytest.skip("llama.cpp's source is not there: make test-consumers LLAMA_CPP=1 brings it")
    command = [sys.executable, script, ours.folder, "--outfile", tmp_path / "ours.gguf", "--outtype", kind]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    llama = llama_cpp.Llama(str(tmp_path / "ours.gguf"), n_ctx=96, logits_all=True, verbose=False, n_threads=1)
    assert llama.tokenize(PROMPT.encode(), add_bos=False) == ours.prompt
    assert llama.tokenize(PASSAGE.encode(), add_bos=False) == load_tokenizer()(PASSAGE).input_ids
    answer = llama.create_completion(ours.prompt, max_tokens=NEW, temperature=0.0)
    assert answer["choices"][0]["text"] == ours.text
    llama.reset()
    llama.eval(ours.prompt + ours.new)
    assert_close(llama.scores[: len(ours.logits)], ours.logits, share)
    llama.close()


# Fine-tuning, measuring, making smaller


def test_peft(ours, tmp_path):
    """An adapter on the stock class: trained, saved, put on our class, merged and loaded as a folder."""
    peft = pytest.importorskip("peft", reason="the extra dev has it")
    other = torch.tensor([load_tokenizer()(PROMPT + " sank at once, with all hands, off Ushant.").input_ids])
    targets = ["c_attn", "c_proj", "c_fc"]
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=targets, fan_in_fan_out=True)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(ours.folder), settings)
    losses = fit(adapted, other, steps=40, lr=2e-2)
    assert losses[-1] < 0.5 * losses[0]
    new = greedy(adapted, ours.prompt, 12)
    assert new != ours.new[:12]
    adapted.save_pretrained(tmp_path / "adapter")
    on_ours = peft.PeftModel.from_pretrained(GPTForCausalLM.from_pretrained(ours.folder), str(tmp_path / "adapter"))
    assert greedy(on_ours.eval(), ours.prompt, 12) == new
    expected = logits_of(adapted, ours.prompt + new)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = GPTForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert greedy(merged, ours.prompt, 12) == new
    assert_close(logits_of(merged, ours.prompt + new), expected)


def test_trl(ours, tmp_path):
    """SFTTrainer from the folder's name alone; its first loss is what we say of the same text, its result loads."""
    trl = pytest.importorskip("trl", reason="the extra dev has it")
    datasets = pytest.importorskip("datasets", reason="the extra data has it")
    text = PROMPT + " sank at once, with all hands, off Ushant."
    arguments = trl.SFTConfig(
        str(tmp_path / "sft"),
        max_steps=5,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        dataset_num_proc=None,
        model_init_kwargs={"dtype": "float32"},
    )
    data = datasets.Dataset.from_dict({"text": [text] * 5})
    trainer = trl.SFTTrainer(model=str(ours.folder), args=arguments, train_dataset=data)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    tokenizer = AutoTokenizer.from_pretrained(ours.folder)
    ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])  # TRL ends a text so
    with torch.no_grad():
        first = GPTForCausalLM.from_pretrained(ours.folder).eval()(input_ids=ids, labels=ids).loss.item()
    # Of stock GPT-2, Trainer counts a label at position 0 too, which nothing predicts, and divides by one more.
    count = ids.shape[1]
    assert losses[0] in (pytest.approx(first, rel=1e-3), pytest.approx(first * (count - 1) / count, rel=1e-3))
    assert losses[-1] < 0.9 * losses[0]
    trainer.save_model(tmp_path / "tuned")
    with torch.no_grad():
        tuned = GPTForCausalLM.from_pretrained(tmp_path / "tuned").eval()(input_ids=ids, labels=ids).loss.item()
    assert tuned < losses[0]


def test_lm_eval(ours):
    """The harness on the folder as its command line loads it: each ending's log-likelihood is the one by hand."""
    lm_eval = pytest.importorskip("lm_eval", reason="the extra eval has it")
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={ours.folder},dtype=float32,device=cpu",
        tasks=["hellaswag_offline_500"],
        limit=10,
        task_manager=TaskManager(include_path=str(REPO / "gpt2_hf" / "assets" / "lm_eval")),
        bootstrap_iters=0,
    )
    weights = load_file(ours.folder / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(ours.folder)
    right = []
    for sample in found["samples"]["hellaswag_offline_500"]:
        scores = []
        for choice in sample["doc"]["choices"]:
            context = tokenizer(sample["doc"]["query"]).input_ids
            ids = (context + tokenizer(f" {choice}").input_ids)[-97:]  # the longest that 96 positions can score
            length = min(len(ids) - 1, len(tokenizer(f" {choice}").input_ids))
            log_p = gpt2_by_hand(weights, ids[:-1]).log_softmax(-1)
            scores.append(float(log_p[range(len(ids) - 1), ids[1:]][-length:].sum()))
        np.testing.assert_allclose([float(answer[0]) for (answer,) in sample["resps"]], scores, rtol=1e-4)
        right.append(int(np.argmax(scores)) == sample["doc"]["gold"])
    assert len(right) == 10 and found["results"]["hellaswag_offline_500"]["acc,none"] == pytest.approx(np.mean(right))


def with_linear_layers(model):
    """The same model with nn.Linear where GPT-2 has Conv1D, which quantisers pass by."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                linear = torch.nn.Linear(*child.weight.shape)
                linear.weight, linear.bias = torch.nn.Parameter(child.weight.T.contiguous()), child.bias
                setattr(module, name, linear)
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchao_int8(ours):
    """Weights of 8 bits, activations as they were: the same text, logits within 3 % of the largest."""
    if find_spec("torchao") is None:
        pytest.skip(f"torchao is {MISSING}")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def in_blocks(module, name):
        return isinstance(module, torch.nn.Linear) and ".h." in name

    model = with_linear_layers(GPT2LMHeadModel.from_pretrained(ours.folder)).eval()
    assert_close(logits_of(model, ours.prompt + ours.new), ours.logits)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=in_blocks)
    bits8 = [name for name, p in model.named_parameters() if type(p) is not torch.nn.Parameter and ".h." in name]
    assert len(bits8) == 2 * 4
    logits = logits_of(model, ours.prompt + ours.new)
    assert (logits - ours.logits).abs().max() > 1e-4 * ours.logits.abs().max()  # it was quantised
    assert_close(logits, ours.logits, 0.03)
    assert greedy(model, ours.prompt) == ours.new
