"""A look into token shards before GPU hours are spent on them: figures, copies, documents, a recipe's first batch.

Reads are bounded. Document lengths come from all shards, or from some at random where that would read more than
SURVEY_BYTES, or fetch more than REMOTE_SHARDS; the rest comes from a sample of their documents, in runs of neighbours
so that a slow disk seeks rarely. Of object storage only the shards that such a run lies in are fetched.
`inspect_data` returns plain figures; `inspection_text.py` writes them for a terminal and draws the lengths.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from ..config import RunConfig
from ..data.folder import Folder, LocalFolder
from ..data.remote import open_folder
from ..data.shards import ShardError, ShardSet, open_split
from ..data.stream import StepLoader, training_stream
from ..knobs import Range, checked
from .copies import Repeats, exact_copies, near_copies
from .sample import Rng, Sample, Surveyed, draw, survey
from .token_text import beginning

REMOTE_SHARDS = 8  # of a split, as a shard in object storage is fetched whole
SHOWN_TOKENS, SHOWN_PIECES = 9, 5  # of a window of the first batch
EDGES = 2.0 ** (np.arange(161) / 4)  # lengths are counted in four bins a doubling


@dataclass(frozen=True)
class Excerpt:
    """The beginning of one document; `document` counts from 0 in its shard."""

    shard: str
    document: int
    n_tokens: int
    text: str


@dataclass(frozen=True)
class SplitFigures:
    """What one split holds. Shares go from 0 to 1; <|endoftext|> counts as a token of its document."""

    split: str
    shards: int
    tokens: int
    documents: int
    documents_counted: bool  # else estimated, as the format does not store it
    # From the surveyed shards:
    surveyed_shards: int
    tokens_per_document: dict[str, float]  # mean, median, p90, max
    context: int
    longer_than_context: float  # share of documents
    documents_by_length: list[int]  # bin i: from 2^(i/4) tokens to below 2^((i+1)/4)
    tokens_by_length: list[int]  # the same documents' tokens
    # From the sampled documents:
    sampled_documents: int
    sampled_tokens: int
    bytes_per_token: float
    bytes_per_token_by_manifest: float | None  # of the whole split
    frequent: list[tuple[str, float]]  # the most frequent tokens and their shares
    vocab_size: int
    never_seen: int  # entries of the vocabulary
    outside_vocabulary: int  # tokens
    eot_begins: float  # share of documents
    eot_ends: float
    eot_inside: int  # tokens
    empty: int  # documents of <|endoftext|> alone
    exact: Repeats
    near: Repeats  # exact ones included
    excerpts: list[Excerpt]


@dataclass(frozen=True)
class ShownWindow:
    """A window's first tokens, and where its first pieces of documents begin and end, each with its beginning."""

    tokens: list[str]
    pieces: list[tuple[int, int, str]]
    n_pieces: int


@dataclass(frozen=True)
class FirstBatch:
    """Step 0 of a recipe over all processes: (micro_steps, micro_batch_size, seq_len + 1) tokens."""

    micro_steps: int
    micro_batch_size: int
    seq_len: int
    seed: int
    steps: int
    epochs: float
    eot: int
    boundaries: int  # <|endoftext|> in the batch
    unbroken: float  # share of windows without one
    labels_shifted: bool
    sha256: str  # 16 digits, of the tokens as little-endian uint16, or uint32 where the shards are of that
    windows: list[list[int]]  # the first two
    shown: list[ShownWindow]  # the same


@dataclass(frozen=True)
class Inspection:
    path: str
    facts: dict[str, str]  # what manifest.json says
    splits: list[SplitFigures]
    val_in_train: Repeats | None  # sampled documents of val that are among the sampled ones of train
    first_batch: FirstBatch | None


@checked
def inspect_data(
    path: str | Path,
    recipe: RunConfig | None = None,
    *,
    documents: Annotated[int, Range(0)] = 3,
    sample: Annotated[int, Range(1)] = 100_000,
    seed: Annotated[int, Range(0)] = 0,
) -> Inspection:
    """Look into a folder of shards, prepared here or by another project.

    Args:
        path: the folder, or a URL as data.path takes it.
        recipe: also take its first batch, its seq_len as the context, and its cache for files from object storage.
        documents: number of documents of each split to decode.
        sample: documents to read of each split, at most (and at most about SAMPLE_TOKENS tokens).
        seed: of the sampling; the batch has the recipe's own.

    Raises ShardError, ConfigError or ValueError, in one line, when the data cannot be read, or not with this recipe.
    """
    folder = open_folder(path, recipe.data.cache_dir, recipe.data.cache_gb) if recipe else open_folder(path)
    manifest = _read_json(folder, "manifest.json")
    splits, problems = _open_splits(folder, list(manifest.get("splits") or ()))
    opened = {shards.split: shards for shards in splits if shards.n_tokens}
    if not opened or (recipe and "train" not in opened):
        raise ShardError(f"{path} has no tokens{' to train on' if opened else ''}: prepare the data again")
    batch = first_batch(recipe, opened["train"]) if recipe else None
    figures, hashes = [], {}
    for number, (split, shards) in enumerate(opened.items()):
        rng = np.random.default_rng([seed, number])
        surveyed = survey(shards, len(shards.shards) if isinstance(folder, LocalFolder) else REMOTE_SHARDS, rng)
        drawn = draw(surveyed, sample, rng)
        hashes[split] = [
            hashlib.blake2b(drawn.tokens_of(i).data, digest_size=16).digest() for i in range(len(drawn.ends))
        ]
        context = recipe.data.seq_len if recipe else 1024
        figures.append(_measure(shards, surveyed, drawn, hashes[split], context, documents, rng))
    leaked = None
    if {"train", "val"} <= hashes.keys():
        known = set(hashes["train"])
        leaked = Repeats(len(hashes["val"]), sum(digest in known for digest in hashes["val"]))
    facts = _facts(manifest) | problems
    tokenizer = splits[0].tokenizer
    if not tokenizer.is_gpt2:
        facts = {"tokenizer": f"{tokenizer.name}, {tokenizer.vocab_size:,} entries"} | facts
    return Inspection(str(path), facts, figures, leaked, batch)


def first_batch(recipe: RunConfig, data: ShardSet) -> FirstBatch:
    """The first step's tokens as training takes them (train.load_steps), of all processes together."""
    seq_len, train = recipe.data.seq_len, recipe.train
    recipe.grad_accum_steps(1)  # raises ConfigError for a batch that does not divide
    # Without names there is nothing to fetch ahead: the next group of shards will not be read.
    data = replace(data, shards=tuple(replace(shard, sha256={}) for shard in data.shards))
    stream, n_windows = training_stream(recipe, data), train.tokens_of_step(0) // seq_len
    with StepLoader(
        stream,
        start_step=0,
        stop_step=1,
        global_batch_size=n_windows,
        micro_batch_size=n_windows if train.finds_micro_batch else train.micro_batch_size,
    ) as loader:
        batch = next(loader).numpy()
    inputs, labels = batch[..., :-1], batch[..., 1:]
    windows = batch.reshape(-1, seq_len + 1)[:2].tolist()
    is_eot = batch == data.eot
    return FirstBatch(
        micro_steps=batch.shape[0],
        micro_batch_size=batch.shape[1],
        seq_len=inputs.shape[2],
        seed=train.seed,
        steps=train.steps,
        epochs=train.tokens_before(train.steps) / stream.tokens_an_epoch,
        eot=data.eot,
        boundaries=int(is_eot.sum()),
        unbroken=float((~is_eot.any(-1)).mean()),
        labels_shifted=bool((inputs[..., 1:] == labels[..., :-1]).all()),
        sha256=hashlib.sha256(batch.astype(data.tokenizer.dtype).tobytes()).hexdigest()[:16],
        windows=windows,
        shown=[_show(window, data) for window in windows],
    )


def _show(window: list[int], data: ShardSet) -> ShownWindow:
    tokenizer = data.tokenizer
    cuts = [0, *(i for i in range(1, len(window)) if window[i - 1] == data.eot), len(window)]
    pieces = list(pairwise(cuts))
    return ShownWindow(
        [tokenizer.decode([token]) for token in window[:SHOWN_TOKENS]],
        [(start, stop, beginning(tokenizer, window[start:stop], 300)) for start, stop in pieces[:SHOWN_PIECES]],
        len(pieces),
    )


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_json(folder: Folder, name: str) -> dict[str, Any]:
    """{} where there is none: whether a manifest is sound is for `open_split` to say."""
    if name not in folder.sizes():
        return {}
    try:
        found = json.loads(folder.read(name).decode())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _open_splits(folder: Folder, names: list[str]) -> tuple[list[ShardSet], dict[str, str]]:
    """The splits, and what is in the way of those that may be missing, as no manifest lists them."""
    opened, problems = [], {}
    for name in names or ("train", "val"):
        try:
            opened.append(open_split(folder, name))
        except ShardError as error:
            if names:
                raise
            problems[f"no {name}"] = str(error)
    if not opened:
        raise ShardError(problems["no train"])
    return opened, problems


# --- figures ---------------------------------------------------------------------------------------------------------


def _measure(
    shards: ShardSet, surveyed: Surveyed, sample: Sample, hashes: list[bytes], context: int, excerpts: int, rng: Rng
) -> SplitFigures:
    chosen = np.sort(rng.permutation(len(sample.ends))[:excerpts]).tolist()
    n_bytes = shards.n_bytes
    return SplitFigures(
        split=shards.split,
        shards=len(shards.shards),
        tokens=shards.n_tokens,
        **_length_figures(shards, surveyed, context),
        sampled_documents=len(sample.ends),
        sampled_tokens=len(sample.tokens),
        bytes_per_token_by_manifest=None if n_bytes is None else n_bytes / shards.n_tokens,
        **_token_figures(shards, sample),
        **_eot_figures(shards, sample),
        exact=exact_copies(sample, hashes, shards.tokenizer),
        near=near_copies(sample, rng),
        excerpts=[
            Excerpt(
                sample.shard[i].name, int(sample.document[i]), len(tokens), beginning(shards.tokenizer, tokens, 600)
            )
            for i, tokens in ((i, sample.tokens_of(i)) for i in chosen)
        ],
    )


def _length_figures(shards: ShardSet, surveyed: Surveyed, context: int) -> dict[str, Any]:
    """How many documents there are, and how long those of the surveyed shards are."""
    lengths = np.concatenate([np.diff(ends, prepend=0) for _, ends in surveyed])
    bins = np.searchsorted(EDGES, lengths, side="right") - 1
    n_documents = shards.n_documents
    if n_documents is None and lengths.sum() == shards.n_tokens:
        n_documents = len(lengths)
    return {
        "documents": round(shards.n_tokens / lengths.mean()) if n_documents is None else n_documents,
        "documents_counted": n_documents is not None,
        "surveyed_shards": len(surveyed),
        "tokens_per_document": {
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "p90": float(np.quantile(lengths, 0.9)),
            "max": int(lengths.max()),
        },
        "context": context,
        "longer_than_context": float((lengths > context).mean()),
        "documents_by_length": np.bincount(bins).tolist(),
        "tokens_by_length": np.bincount(bins, weights=lengths).astype(int).tolist(),
    }


def _token_figures(shards: ShardSet, sample: Sample) -> dict[str, Any]:
    """Which tokens the sampled documents have."""
    tokenizer, n_counted = shards.tokenizer, max(2**16, shards.vocab_size + 1)
    counts = np.zeros(n_counted, dtype=np.int64)
    for start in range(0, len(sample.tokens), 2**22):  # in pieces, as bincount makes int64 of what it is given
        block = sample.tokens[start : start + 2**22].astype(np.int64)
        counts += np.bincount(block.clip(max=n_counted - 1), minlength=n_counted)  # other projects' may hold more
    most_frequent = [token for token in np.argsort(-counts, kind="stable")[:8].tolist() if counts[token]]
    return {
        "bytes_per_token": float(counts[: tokenizer.vocab_size] @ tokenizer.token_byte_lengths / len(sample.tokens)),
        "frequent": [(tokenizer.decode([token]), float(counts[token] / len(sample.tokens))) for token in most_frequent],
        "vocab_size": shards.vocab_size,
        "never_seen": int((counts[: shards.vocab_size] == 0).sum()),
        "outside_vocabulary": int(counts[shards.vocab_size :].sum()),
    }


def _eot_figures(shards: ShardSet, sample: Sample) -> dict[str, Any]:
    """Where <|endoftext|> stands in the sampled documents."""
    is_eot = sample.tokens == shards.eot
    begins, ends = is_eot[sample.starts], is_eot[sample.ends - 1]
    is_eot[sample.starts] = is_eot[sample.ends - 1] = False
    return {
        "eot_begins": float(begins.mean()),
        "eot_ends": float(ends.mean()),
        "eot_inside": int(is_eot.sum()),
        "empty": int((ends & (sample.lengths == 1)).sum()),
    }


def _facts(manifest: dict[str, Any]) -> dict[str, str]:
    config = manifest.get("config") or {}
    names = ("dataset", "name", "revision", "split") if config.get("dataset") else ("inputs",)
    facts: dict[str, Any] = {"prepared from": {name: config[name] for name in names if config.get(name)}}
    dropped = {reason: count for reason, count in (manifest.get("dropped") or {}).items() if count}
    facts |= {"source": manifest.get("source"), "dropped": dropped}
    return {name: _flat(value) for name, value in facts.items() if value}


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(_flat, value[:3])) + (f" and {len(value) - 3:,} more" if len(value) > 3 else "")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
