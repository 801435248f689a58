"""Byte-level BPE tokenizers of every make, built here by the `tokenizers` library."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

END = "<|endoftext|>"
# As the tokenizer.json of these families have them.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = CL100K.replace("{1,3}", "")
O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = ["the", "they", "them", "there", "don't", "it's", "we'll", "THE", "12345", "2024", "naïve", "über", "中文"]
WORDS += ["русский", "हिन्दी", "😀", "👩\u200d👩\u200d👧", "e\u0301", "x_y", "()", "=>", "{}"]


def texts(n: int = 60, seed: int = 0) -> list[str]:
    """Documents of words in many scripts, with runs of spaces and line ends."""
    draw = random.Random(seed)
    gaps = [" "] * 8 + ["\n", "\n\n", "  ", "\t", "\r\n", "   \n "]
    return ["".join(draw.choice(WORDS) + draw.choice(gaps) for _ in range(draw.randint(5, 120))) for _ in range(n)]


def split_by(pattern: str | None) -> pre_tokenizers.PreTokenizer:
    if pattern is None:  # GPT-2's
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def trained(pattern: str | None = None, vocab_size: int = 300) -> Tokenizer:
    """With <|endoftext|> as number 0."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = split_by(pattern), decoders.ByteLevel()
    settings = {"vocab_size": vocab_size, "special_tokens": [END], "initial_alphabet": ALPHABET}
    made.train_from_iterator(texts(seed=1), trainers.BpeTrainer(**settings, show_progress=False))
    return made


def of_merges(merges: list[tuple[str, str]], ids: Callable[[int], int] = int, **model: bool) -> Tokenizer:
    """GPT-2's cutting, the bytes, and an entry for what each merge makes; <|endoftext|> comes last."""
    entries = list(dict.fromkeys([*ALPHABET, *(left + right for left, right in merges)]))
    vocab = {entry: ids(number) for number, entry in enumerate(entries)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, **model))
    made.pre_tokenizer, made.decoder = split_by(None), decoders.ByteLevel()
    made.add_special_tokens([END])
    return made


def of_bytes() -> Tokenizer:
    """Each byte a token, 0 to 255, and <|endoftext|>."""
    return of_merges([])


def of_pairs() -> Tokenizer:
    """65,793 entries: the bytes, all pairs of two, and <|endoftext|>."""
    return of_merges([(a, b) for a in ALPHABET for b in ALPHABET])


def merges_of(made: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(made.to_str())["model"]["merges"]]


def shuffled() -> Tokenizer:
    """Numbers that have nothing to do with the order of merging."""
    merges = merges_of(trained())
    order = list(range(256 + len(merges)))
    random.Random(0).shuffle(order)
    return of_merges(merges, order.__getitem__)


def like_llama3() -> Tokenizer:
    """Every way to cut an entry in two is a merge; an entry that no merge leads to; a token put before each text."""
    merges = merges_of(trained())
    entries = [*ALPHABET, *(left + right for left, right in merges), "Ġunheard"]
    known = set(entries)
    every = [(e[:i], e[i:]) for e in entries for i in range(1, len(e)) if e[:i] in known and e[i:] in known]
    made = Tokenizer(models.BPE(vocab={e: i for i, e in enumerate(entries)}, merges=every, ignore_merges=True))
    made.pre_tokenizer, made.decoder = split_by(CL100K), decoders.ByteLevel()
    made.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    begin = made.token_to_id("<|begin_of_text|>")
    made.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    return made


def normalizing() -> Tokenizer:
    made = trained(QWEN2)
    made.normalizer = normalizers.NFC()
    return made


def not_for_tiktoken() -> Tokenizer:
    """Of "abc" it makes "ab" and "c", though "abc" is an entry: only "a" and "bc" are merged into that."""
    return of_merges([("a", "b"), ("b", "c"), ("a", "bc")])


def with_single_digits() -> Tokenizer:
    made = trained()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), split_by(None)])
    return made


def with_added_words() -> Tokenizer:
    made = trained()
    made.add_tokens([AddedToken("they'll", normalized=False)])
    return made


MAKES: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": trained,
    "cl100k": lambda: trained(CL100K, 400),
    "qwen2": lambda: trained(QWEN2, 400),
    "o200k": lambda: trained(O200K, 400),
    "bytes": of_bytes,
    "pairs": of_pairs,
    "shuffled": shuffled,
    "llama3": like_llama3,
    "nfc": normalizing,
    "not for tiktoken": not_for_tiktoken,
    "single digits": with_single_digits,
    "added words": with_added_words,
}
SLOWER = ("not for tiktoken", "single digits", "added words")  # which tiktoken cannot encode


def write_tokenizer(made: Tokenizer, folder: Path, eos: object = None) -> Path:
    """A folder as the Hub has it."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    if eos is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder
