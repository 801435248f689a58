"""A look into token shards before GPU hours are spent on them: figures, copies, documents, a recipe's first batch.

Reads are bounded. Document lengths come from all shards, or from some at random where that would read more than
SURVEY_BYTES, or fetch more than REMOTE_SHARDS; the rest comes from a sample of their documents, in runs of neighbours
so that a slow disk seeks rarely. Of object storage only the shards that such a run lies in are fetched.
`inspect_data` returns plain figures; `inspection_text.py` writes them for a terminal and draws the lengths.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from ..config import RunConfig
from ..data.folder import Folder, LocalFolder
from ..data.remote import open_folder
from ..data.shards import Shard, ShardError, ShardSet, open_split
from ..data.stream import StepLoader, TokenStream
from ..data.tokenizer import VOCAB_SIZE, load_tokenizer, token_byte_lengths
from ..knobs import Range, checked

SURVEY_BYTES = 512_000_000  # of indexes, or of tokens where a shard has no index and is searched for its documents
SAMPLE_TOKENS = 64_000_000
REMOTE_SHARDS = 8  # of a split, as a shard in object storage is fetched whole
RUN = 16  # neighbouring documents that are read together
# Near copies share at least NEAR of their 5-grams (Jaccard). MinHash finds the candidates: two documents of Jaccard
# 0.8 agree in both rows of at least one of 8 bands with probability 1 - (1 - 0.8^2)^8 = 0.9997.
GRAM, BANDS, NEAR = 5, 8, 0.8
NEAR_DOCUMENTS, NEAR_TOKENS = 20_000, 10_000_000
EDGES = 2.0 ** (np.arange(161) / 4)  # lengths are counted in four bins a doubling


@dataclass(frozen=True)
class Repeats:
    """Documents that repeat an earlier one, among those compared."""

    compared: int
    repeats: int
    most: int = 0  # times that the most repeated one is there, where there is one and it was counted
    example: str = ""  # its beginning
    pairs: int = 0  # of equal documents that were drawn independently, not in one run


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
    sha256: str  # 16 digits, of the tokens as little-endian uint16
    windows: list[list[int]]  # the first two


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
        surveyed = _survey(shards, len(shards.shards) if isinstance(folder, LocalFolder) else REMOTE_SHARDS, rng)
        drawn = _draw(surveyed, sample, rng)
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
    return Inspection(str(path), facts, figures, leaked, batch)


def first_batch(recipe: RunConfig, data: ShardSet) -> FirstBatch:
    """The first step's tokens as training takes them (train.load_steps), of all processes together."""
    seq_len, train = recipe.data.seq_len, recipe.train
    recipe.grad_accum_steps(1)  # raises ConfigError for a batch that does not divide
    # Without names there is nothing to fetch ahead: the next group of shards will not be read.
    data = replace(data, shards=tuple(replace(shard, sha256={}) for shard in data.shards))
    with StepLoader(
        TokenStream(data, seq_len, train.seed),
        start_step=0,
        stop_step=1,
        global_batch_size=train.global_batch_tokens // seq_len,
        micro_batch_size=train.micro_batch_size,
    ) as loader:
        batch = next(loader).numpy()
    inputs, labels = batch[..., :-1], batch[..., 1:]
    is_eot = batch == data.eot
    return FirstBatch(
        micro_steps=batch.shape[0],
        micro_batch_size=batch.shape[1],
        seq_len=inputs.shape[2],
        seed=train.seed,
        steps=train.steps,
        epochs=train.steps * train.global_batch_tokens / data.n_tokens,
        eot=data.eot,
        boundaries=int(is_eot.sum()),
        unbroken=float((~is_eot.any(-1)).mean()),
        labels_shifted=bool((inputs[..., 1:] == labels[..., :-1]).all()),
        sha256=hashlib.sha256(batch.astype("<u2").tobytes()).hexdigest()[:16],
        windows=batch.reshape(-1, seq_len + 1)[:2].tolist(),
    )


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    """Whole documents, one after the other in `tokens`."""

    tokens: np.ndarray  # (n_tokens,) uint16
    ends: np.ndarray  # (n,) int64
    shard: list[Shard]  # of each document
    document: np.ndarray  # (n,) its number in its shard
    run: np.ndarray  # (n,) equal for documents that were drawn together

    @property
    def starts(self) -> np.ndarray:
        return np.concatenate([[0], self.ends[:-1]])

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def tokens_of(self, i: int) -> np.ndarray:
        return self.tokens[self.ends[i - 1] if i else 0 : self.ends[i]]


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


def _survey(shards: ShardSet, most: int, rng: np.random.Generator) -> list[tuple[Shard, np.ndarray]]:
    """Shards with their document ends: `most`, or as many as SURVEY_BYTES allows, in the split's order."""
    found: dict[int, tuple[Shard, np.ndarray]] = {}
    left = SURVEY_BYTES
    for number in rng.permutation(len(shards.shards)).tolist():
        shard = shards.shards[number]
        left -= 2 * shard.n_tokens if shard.n_documents is None else 8 * shard.n_documents
        if not shard.n_tokens or (found and left < 0) or len(found) == most:
            continue
        ends = shard.document_ends()
        if not len(ends) or ends[-1] != shard.n_tokens or (np.diff(ends, prepend=0) <= 0).any():
            raise ShardError(f"{shard.path}: its documents do not add up to its tokens: prepare the data again")
        found[number] = (shard, ends)
    return [found[number] for number in sorted(found)]


def _draw(surveyed: list[tuple[Shard, np.ndarray]], n: int, rng: np.random.Generator) -> _Sample:
    """About n documents, or all of them; fewer where they would hold more than SAMPLE_TOKENS."""
    n_documents = sum(len(ends) for _, ends in surveyed)
    n = min(n, n_documents, max(1, SAMPLE_TOKENS * n_documents // sum(shard.n_tokens for shard, _ in surveyed)))
    runs = [(number, first) for number, (_, ends) in enumerate(surveyed) for first in range(0, len(ends), RUN)]
    chosen = np.arange(len(runs)) if n == n_documents else rng.choice(len(runs), -(-n // RUN), replace=False)
    tokens, lengths, shard_of, document, run = [], [], [], [], []
    for number, some in groupby(np.sort(chosen).tolist(), lambda i: runs[i][0]):
        shard, all_ends = surveyed[number]
        mapped = shard.tokens()
        for i in some:
            first = runs[i][1]
            start, ends = int(all_ends[first - 1]) if first else 0, all_ends[first : first + RUN]
            tokens.append(mapped[start : ends[-1]].copy())  # a mapped file takes disk space even when off the cache
            lengths.append(np.diff(ends, prepend=start))
            shard_of += [shard] * len(ends)
            document.append(np.arange(first, first + len(ends)))
            run.append(np.full(len(ends), i))
    all_lengths, documents, run_of = (np.concatenate(part) for part in (lengths, document, run))
    return _Sample(np.concatenate(tokens), all_lengths.cumsum(), shard_of, documents, run_of)


# --- figures ---------------------------------------------------------------------------------------------------------


def _measure(
    shards: ShardSet,
    surveyed: list[tuple[Shard, np.ndarray]],
    sample: _Sample,
    hashes: list[bytes],
    context: int,
    n_excerpts: int,
    rng: np.random.Generator,
) -> SplitFigures:
    lengths = np.concatenate([np.diff(ends, prepend=0) for _, ends in surveyed])
    bins = np.searchsorted(EDGES, lengths, side="right") - 1
    n_documents, n_bytes = shards.n_documents, shards.n_bytes
    if n_documents is None and lengths.sum() == shards.n_tokens:
        n_documents = len(lengths)

    counts = np.zeros(2**16, dtype=np.int64)
    for start in range(0, len(sample.tokens), 2**22):  # in pieces, as bincount makes int64 of what it is given
        block = np.minimum(sample.tokens[start : start + 2**22], 2**16 - 1)  # other projects' files may hold more
        counts += np.bincount(block, minlength=2**16)
    most_frequent = [token for token in np.argsort(-counts, kind="stable")[:8].tolist() if counts[token]]
    is_eot = sample.tokens == shards.eot
    begins, ends = is_eot[sample.starts], is_eot[sample.ends - 1]
    is_eot[sample.starts] = is_eot[sample.ends - 1] = False

    excerpts = np.sort(rng.permutation(len(sample.ends))[:n_excerpts]).tolist()
    return SplitFigures(
        split=shards.split,
        shards=len(shards.shards),
        tokens=shards.n_tokens,
        documents=round(shards.n_tokens / lengths.mean()) if n_documents is None else n_documents,
        documents_counted=n_documents is not None,
        surveyed_shards=len(surveyed),
        tokens_per_document={
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "p90": float(np.quantile(lengths, 0.9)),
            "max": int(lengths.max()),
        },
        context=context,
        longer_than_context=float((lengths > context).mean()),
        documents_by_length=np.bincount(bins).tolist(),
        tokens_by_length=np.bincount(bins, weights=lengths).astype(int).tolist(),
        sampled_documents=len(sample.ends),
        sampled_tokens=len(sample.tokens),
        bytes_per_token=float(counts[:VOCAB_SIZE] @ token_byte_lengths() / len(sample.tokens)),
        bytes_per_token_by_manifest=None if n_bytes is None else n_bytes / shards.n_tokens,
        frequent=[(decode([token]), float(counts[token] / len(sample.tokens))) for token in most_frequent],
        vocab_size=shards.vocab_size,
        never_seen=int((counts[: shards.vocab_size] == 0).sum()),
        outside_vocabulary=int(counts[shards.vocab_size :].sum()),
        eot_begins=float(begins.mean()),
        eot_ends=float(ends.mean()),
        eot_inside=int(is_eot.sum()),
        empty=int((ends & (sample.lengths == 1)).sum()),
        exact=_exact_copies(sample, hashes),
        near=_near_copies(sample, rng),
        excerpts=[
            Excerpt(sample.shard[i].name, int(sample.document[i]), len(tokens), beginning(tokens, 600))
            for i, tokens in ((i, sample.tokens_of(i)) for i in excerpts)
        ],
    )


def _exact_copies(sample: _Sample, hashes: list[bytes]) -> Repeats:
    times = Counter(hashes)
    times_in_run = Counter(zip(hashes, sample.run.tolist(), strict=True))
    in_all, in_runs = (sum(n * (n - 1) // 2 for n in some.values()) for some in (times, times_in_run))
    ((repeated, most),) = times.most_common(1)
    if most == 1:
        return Repeats(len(hashes), 0)
    example = beginning(sample.tokens_of(hashes.index(repeated)), 200)
    return Repeats(len(hashes), len(hashes) - len(times), most, example, in_all - in_runs)


def _near_copies(sample: _Sample, rng: np.random.Generator) -> Repeats:
    """Among some of the sampled documents that have a 5-gram."""
    lengths = sample.lengths
    chosen = rng.permutation(np.flatnonzero(lengths >= GRAM))[:NEAR_DOCUMENTS]
    chosen = np.sort(chosen[np.cumsum(lengths[chosen]) <= NEAR_TOKENS]).tolist()
    if not chosen:
        return Repeats(0, 0)
    grams = [_gram_hashes(sample.tokens_of(i)) for i in chosen]
    all_grams = np.concatenate(grams)
    starts = np.cumsum([0, *(len(some) for some in grams[:-1])])
    pairs: set[tuple[int, int]] = set()
    for _ in range(BANDS):
        salts = rng.integers(2**64, size=2, dtype=np.uint64)
        one, two = (np.minimum.reduceat(_mix(all_grams ^ salt), starts) for salt in salts)
        order = np.lexsort((two, one))  # stable: of equal documents the earlier comes first
        same = (np.diff(one[order]) == 0) & (np.diff(two[order]) == 0)
        pairs |= set(zip(order[:-1][same].tolist(), order[1:][same].tolist(), strict=True))
    found = set()
    for earlier, later in pairs:
        a, b = np.unique(grams[earlier]), np.unique(grams[later])
        common = len(np.intersect1d(a, b, assume_unique=True))
        if common >= NEAR * (len(a) + len(b) - common):
            found.add(later)
    return Repeats(len(chosen), len(found))


def _gram_hashes(tokens: np.ndarray) -> np.ndarray:
    """A 64-bit hash of the GRAM tokens from each position on, (n_tokens - GRAM + 1,) uint64."""
    hashes = np.zeros(len(tokens) - GRAM + 1, dtype=np.uint64)
    for i in range(GRAM):
        hashes = _mix(hashes + tokens[i : i + len(hashes)])
    return hashes


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)  # odd, and the golden ratio's bits have no pattern
    return x ^ (x >> np.uint64(29))


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


@cache
def _tokenizer() -> Any:
    return load_tokenizer()


def decode(tokens: Sequence[int] | np.ndarray) -> str:
    """Text of GPT-2 tokens; numbers that are none appear as <|number|>."""
    text = ""
    for known, group in groupby(map(int, tokens), lambda token: token < VOCAB_SIZE):
        ids = list(group)
        text += _tokenizer().decode(ids) if known else "".join(f"<|{token}|>" for token in ids)
    return text


def beginning(tokens: Sequence[int] | np.ndarray, n_characters: int) -> str:
    text = decode(tokens[:n_characters])  # most tokens are longer than a character
    cut = len(text) > n_characters or len(tokens) > n_characters
    return text[:n_characters] + (" [...]" if cut else "")
