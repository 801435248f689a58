"""The pretraining of GPT-2 on one page: read it from top to bottom, then run it.

    python docs/one_page.py data/shakespeare                                # a small model, on a laptop's CPU
    torchrun --nproc_per_node 2 docs/one_page.py data/shakespeare           # the same run, shared by two processes
    python docs/one_page.py data/shakespeare --resume runs/one_page/step-000100     # --help lists all settings

scripts/prepare_data.py makes the data folder: text as token ids, numbers from 0 to 50256 that each stand for a piece
of text. The model reads T tokens and predicts, at each of these T places, which token comes next. That is the whole
task, and the text is its own answer key. A training step takes a batch of text, measures how badly the next tokens
were predicted (the loss), finds out how each weight should change to do better (the gradient), and changes all weights
a little that way (the optimizer). After very many steps, on very much text, this is GPT-2.

Letters in the comments: B windows of text at once, T tokens each, C channels, H heads, V tokens in the vocabulary.
"""

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config
from transformers.pytorch_utils import Conv1D

# ---- 1. The model: token ids (B, T) in, a score for each possible next token (B, T, V) out --------------------------
# The attributes have OpenAI's names (wte, h.0.attn.c_attn, ...). PyTorch names the tensors of a checkpoint after them,
# so what we save is a GPT-2 file, and every program that reads GPT-2 reads it. Conv1D is a linear layer under an old
# name: x @ weight + bias. Its weight is (in, out), as in the file; that of torch.nn.Linear would be (out, in).


class Attention(nn.Module):
    """Lets each place collect information from the places before it."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)  # makes query, key and value, side by side
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        parts = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, H, C / H)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # (B, H, T, C / H) each: H small attentions, side by side
        # softmax(query @ key.T / sqrt(C / H)) @ value: each place compares its query with all keys, and takes most of
        # the values whose keys match best. Causal means that it sees no later place: there stand the answers.
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """A network of two layers that works on each place by itself."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.c_fc = Conv1D(4 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, 4 * config.n_embd)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # OpenAI's GPT-2 has this approximation of GELU


class Block(nn.Module):
    """Adds to x what attention brings, then what the MLP makes of it. x itself runs straight through all blocks: so the
    gradient has a straight way back. LayerNorm gives each part an input of a steady size."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # a vector for each token
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)  # and one for each place: else order would not count
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.initialise()

    def initialise(self) -> None:
        """Small random weights: at first all tokens are about equally likely, so the loss starts near ln(V). Each block
        adds to x twice; that x may not grow with the number of blocks, the layers that add to it start smaller."""
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.01)
        for name, module in self.h.named_modules():
            if isinstance(module, Conv1D):
                adds_to_x = name.endswith("c_proj")
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * len(self.h)) if adds_to_x else 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        # A token's score says how well x fits the token's vector: one matrix serves as the first layer and as the last.
        return F.linear(self.ln_f(x), self.wte.weight)


def next_token_loss(model: nn.Module, windows: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean of -log(probability that the model gave to the token that came next), over all B x T places."""
    inputs, targets = windows[:, :-1], windows[:, 1:]  # (B, T) each: target t is the token after input t
    # bfloat16 has few digits but is much faster where the hardware knows it. Autocast uses it for the large products;
    # weights, gradients and the loss, where many small numbers add up, stay in float32.
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(inputs)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ---- 2. The data: which text the model reads, and when --------------------------------------------------------------
# The files are called shards, of about 100 million tokens (gpt2_hf takes one of 150 million or more for several). The
# shard train/00000.ds has documents one after the other, two bytes a token, each document closed by <|endoftext|>;
# train/00000.ds.index says where each ends. An epoch is one pass over all text. Lay all documents end to end, in a new
# order each epoch, and cut this long stream into windows of T + 1 tokens: T to read, and T moved on by one to predict.
#
#     shards      in a new order                               [ 3 | 0 | 2 | 1 ]
#     documents   of each shard, in a new order                [ d7 d2 d9 ... | d1 d5 ... | ... ]
#     windows     window k is the tokens kT ... kT + T         |--0--|--1--|--2--| ...
#     groups      of about 8 shards: the windows that start
#                 in one group are shuffled together           7 2 9 0 4 ... | 31 12 25 ...
#
# Why shuffle so thoroughly? Shards differ, and so do documents; a model that reads like after like drifts towards it.
# Why in groups? A group fits into memory. Why not draw at random? Some text would come twice and some never. The order
# follows from the seed and the epoch alone, so a resumed run goes on with the very window that was next.

FOR_SHARDS, FOR_DOCUMENTS, FOR_WINDOWS = 0, 1, 2  # each purpose has random numbers of its own


def shuffled(n: int, seed: int, epoch: int, purpose: int, which: int) -> np.ndarray:
    """The numbers 0 ... n - 1 in an order that the other arguments fix for ever: Philox makes random numbers of a key
    and a counter, as a cipher would. To sort them, noting the place that each came from, is to shuffle the places."""
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, 0, purpose, which], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key, counter=counter).random_raw(n), kind="stable")


def as_tensor(windows: Iterable[np.ndarray]) -> Tensor:  # (T + 1,) each -> (n, T + 1)
    return torch.from_numpy(np.stack(list(windows)).astype(np.int64))


def read_shard(folder: Path, shard: dict) -> tuple[np.ndarray, np.ndarray]:
    """All tokens of a shard, and where each of its documents ends."""
    tokens = np.fromfile(folder / shard["file"], dtype="<u2")
    return tokens, np.fromfile(folder / f"{shard['file']}.index", dtype="<i8")


def windows_of_epoch(folder: Path, shards: list[dict], seq_len: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """The windows (T + 1,) of one epoch, in the order of training."""
    shard_order = shuffled(len(shards), seed, epoch, FOR_SHARDS, 0).tolist()
    shard_starts = np.cumsum([0, *(shards[shard]["tokens"] for shard in shard_order)])  # and the end of the stream
    n_windows = (shard_starts[-1] - 1) // seq_len
    n_groups = max(1, (len(shards) + 4) // 8)  # of 8 shards, as nearly as their number allows
    for group in range(n_groups):
        first_shard, stop_shard = len(shards) * group // n_groups, len(shards) * (group + 1) // n_groups
        start, stop = shard_starts[first_shard], shard_starts[stop_shard]

        # The group's stretch of the stream, and T tokens more, because its last window reads on into the next shards.
        documents: list[np.ndarray] = []
        for shard in shard_order[first_shard:]:
            if sum(len(document) for document in documents) >= stop - start + seq_len:
                break
            tokens, ends = read_shard(folder, shards[shard])
            in_file_order = np.split(tokens, ends[:-1])
            order = shuffled(len(in_file_order), seed, epoch, FOR_DOCUMENTS, shard)
            documents += [in_file_order[number] for number in order]
        stream = np.concatenate(documents)

        # The group's windows are those that start in it: from the first kT that is not before `start` (rounded up).
        first_window, stop_window = (min(math.ceil(place / seq_len), n_windows) for place in (start, stop))
        for number in shuffled(stop_window - first_window, seed, epoch, FOR_WINDOWS, group):
            place = (first_window + number) * seq_len - start
            yield stream[place : place + seq_len + 1]


def training_windows(folder: Path, shards: list[dict], seq_len: int, seed: int, skip: int) -> Iterator[np.ndarray]:
    """Epoch after epoch without end, beginning after the first `skip` windows: those that were read before."""
    windows_an_epoch = (sum(shard["tokens"] for shard in shards) - 1) // seq_len
    first_epoch, skip = divmod(skip, windows_an_epoch)
    for epoch in itertools.count(first_epoch):
        yield from itertools.islice(windows_of_epoch(folder, shards, seq_len, seed, epoch), skip, None)
        skip = 0


def validation_windows(folder: Path, shards: list[dict], seq_len: int, most: int) -> Tensor:
    """The first windows of the text that is kept apart from training, as it is stored; (n, T + 1)."""
    tokens = np.concatenate([read_shard(folder, shard)[0] for shard in shards])
    starts = range(0, len(tokens) - seq_len, seq_len)[:most]
    return as_tensor(tokens[start : start + seq_len + 1] for start in starts)


# ---- 3. The optimizer: how the weights change -----------------------------------------------------------------------


def build_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW moves each weight by its average gradient of late, divided by the usual size of that gradient, times the
    learning rate: so all move at a like pace, however large or small their gradients are. Weight decay also pulls a
    weight towards 0 a little each time, so that none grows without need. It is for matrices, not for vectors (biases,
    and LayerNorm's gains, which belong near 1)."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)  # average of about 10 steps, usual size of about 20


def learning_rate(step: int, settings: argparse.Namespace) -> float:
    """Up in a straight line while AdamW's averages are still poor; then down half a cosine to a tenth of the peak: long
    strides first to get far, short ones in the end to settle."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    return settings.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


# ---- 4. Checkpoints: the model as stock transformers loads it, GPT2LMHeadModel.from_pretrained(folder) --------------


def save_checkpoint(folder: Path, step: int, model: GPT2, config: GPT2Config, optimizer: torch.optim.Optimizer) -> None:
    """Beside the model, only the optimizer's averages and the step are kept: the order of the data follows from it."""
    config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    torch.save({"step": step, "optimizer": optimizer.state_dict()}, folder / "training.pt")
    print(f"saved {folder}", flush=True)


def load_checkpoint(folder: Path, model: GPT2, optimizer: torch.optim.Optimizer) -> int:
    """Put model and optimizer back as they were; returns how many steps are done."""
    model.load_state_dict(load_file(folder / "model.safetensors"))
    saved = torch.load(folder / "training.pt", map_location="cpu")
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


# ---- 5. Training ----------------------------------------------------------------------------------------------------
# torchrun starts several processes that all run train(), each on a GPU of its own where there are GPUs. They draw the
# same weights, each takes its share of the micro-batches, and the gradients of all are added up: so all take the same
# step, and their weights stay the same. PyTorch's DistributedDataParallel does this while backward() runs: faster.


@torch.no_grad()
def validation_loss(model: GPT2, windows: Tensor, settings: argparse.Namespace) -> float:
    """The loss on text that is never trained on: it tells a model that learns from one that learns by heart."""
    micro_batches = windows.to(model.wte.weight.device).split(settings.micro_batch_size)
    return sum(next_token_loss(model, part, settings.dtype).item() * len(part) for part in micro_batches) / len(windows)


def train(settings: argparse.Namespace) -> list[float]:  # the loss of each step
    rank, n_processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
    device = torch.device("cuda:" + os.environ.get("LOCAL_RANK", "0") if torch.cuda.is_available() else "cpu")
    if n_processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    n_micro_batches, rest = divmod(settings.batch_size, settings.micro_batch_size)
    if rest or n_micro_batches % n_processes:
        raise SystemExit("--batch_size must be a multiple of --micro_batch_size x the number of processes")

    manifest = json.loads((settings.data / "manifest.json").read_text())
    train_shards, val_shards = (manifest["splits"][split]["shards"] for split in ("train", "val"))
    unseen = validation_windows(settings.data, val_shards, settings.seq_len, settings.val_windows)
    config = GPT2Config(n_layer=settings.n_layer, n_head=settings.n_head, n_embd=settings.n_embd)
    config.n_positions, config.vocab_size = settings.seq_len, manifest["vocab_size"]
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0  # dropout is for text that is read many times
    config.architectures = ["GPT2LMHeadModel"]  # the class that transformers shall load it as
    torch.manual_seed(settings.seed)  # for the weights, which are drawn next
    model = GPT2(config).to(device, torch.float64 if settings.dtype == torch.float64 else torch.float32)
    optimizer = build_optimizer(model)
    done = load_checkpoint(settings.resume, model, optimizer) if settings.resume else 0
    windows = training_windows(settings.data, train_shards, settings.seq_len, settings.seed, done * settings.batch_size)

    losses = []
    for step in range(done, settings.steps):
        started = time.perf_counter()
        # A batch of half a million tokens is too large for a GPU: it comes in micro-batches. backward() adds each
        # one's gradient to those before. Divided by their number, their mean losses add up to that of the whole batch.
        batch = as_tensor(itertools.islice(windows, settings.batch_size))
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for micro_batch in batch.split(settings.micro_batch_size)[rank::n_processes]:
            part = next_token_loss(model, micro_batch.to(device), settings.dtype) / n_micro_batches
            part.backward()
            loss += part.detach()
        if n_processes > 1:  # what the other processes found is added in the same way, once a step
            for summand in (loss, *(parameter.grad for parameter in model.parameters())):
                dist.all_reduce(summand)

        # The gradient, as one long vector, is shortened to length 1 if it is longer: an odd batch then does less harm.
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = learning_rate(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        losses.append(loss.item())
        if rank == 0:  # one process reports, and saves; the others will wait for it in the next step
            speed = settings.batch_size * settings.seq_len / (time.perf_counter() - started)
            line = f"step {step + 1:>5}  loss {loss:.4f}  lr {lr:.2e}  gradient {norm:.2f}  {speed:,.0f} tokens/s"
            print(line, flush=True)
            if (step + 1) % settings.val_every == 0 or step + 1 == settings.steps:
                print(f"validation loss {validation_loss(model, unseen, settings):.4f}", flush=True)
            if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                save_checkpoint(settings.out / f"step-{step + 1:06d}", step + 1, model, config, optimizer)
    if n_processes > 1:
        dist.destroy_process_group()
    return losses


# ---- 6. The settings, for a laptop. GPT-2 (124M) is --n_layer 12 --n_head 12 --n_embd 768 --seq_len 1024 --lr 6e-4
# --batch_size 512 --steps 19073 --warmup_steps 715 on 10 billion tokens, and wants several GPUs. ---------------------


def read_settings(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("data", type=Path, help="folder that scripts/prepare_data.py made")
    add("--out", type=Path, default=Path("runs/one_page"), help="folder for the checkpoints")
    add("--resume", type=Path, help="checkpoint to go on from, with all other settings as they were")
    add("--n_layer", type=int, default=4, help="blocks")
    add("--n_head", type=int, default=4, help="attention heads in each block")
    add("--n_embd", type=int, default=128, help="channels")
    add("--seq_len", type=int, default=256, help="tokens in a window, and so the model's longest memory")
    add("--steps", type=int, default=200, help="updates of the weights in the whole run")
    add("--batch_size", type=int, default=8, help="windows in a step, of all processes together")
    add("--micro_batch_size", type=int, default=4, help="windows that go through the model at once")
    add("--lr", type=float, default=2e-3, help="highest learning rate")
    add("--warmup_steps", type=int, default=20, help="steps until it is reached")
    add("--val_every", type=int, default=50, help="steps between validations")
    add("--val_windows", type=int, default=40, help="windows in a validation")
    add("--save_every", type=int, default=100, help="steps between checkpoints")
    add("--seed", type=int, default=1337, help="of the first weights and of the order of the data")
    has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    add("--dtype", default="bfloat16" if has_bfloat16 else "float32", help="or float64, to compare runs")
    settings = parser.parse_args(arguments)
    settings.dtype = getattr(torch, settings.dtype)
    return settings


if __name__ == "__main__":
    train(read_settings())
