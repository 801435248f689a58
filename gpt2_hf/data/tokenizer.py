"""Byte-level BPE tokenizers: GPT-2's, shipped with the package, or any other of the `tokenizers` library.

transformers' object is for people, `encode_document` for bulk encoding; both give the same ids. Whatever a tokenizer
adds of its own accord (a token to begin with, say) is left out here and in what is saved: documents end with the
end-of-text token, and so the next one begins after it.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..program import UserError
from .encoding import GPT2_PATTERN, PATTERNS, Encode, by_tiktoken, merge_ranks, pattern_of, piece_bytes, pre_tokenizers

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

ASSETS = Path(__file__).resolve().parent.parent / "assets"
EOT = 50256  # of GPT-2's: <|endoftext|>, which ends every document in our shards
VOCAB_SIZE = 50257  # of GPT-2's
GPT2 = "gpt2"
END_OF_TEXT = "<|endoftext|>"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")  # the first there must be

_SURROGATE = re.compile("[\ud800-\udfff]")
# Must come back as it is: spaces, line ends, numbers, scripts, what is written with several code points.
_TRIAL = " a  b\n\n \tc\r\n 12345 don't DON'T x_y (z) é e\u0301 ñ 中文 русский हिन्दी 👩‍👩‍👧 \u200b\x00\x1c\xa0<|x|>   "


class Tokenizer:
    """A byte-level BPE with its end-of-text token.

    Args:
        name: as it is shown; GPT2 alone is the shipped one.
        content: a tokenizer.json.
        eot_token: the text of the token that ends a document.

    Raises:
        UserError: one line, for one that is no byte-level BPE, or whose texts don't come back as they were.
    """

    def __init__(self, name: str, content: str, eot_token: str):
        self.name, self.eot_token = name, eot_token
        self._spec: dict[str, Any] = json.loads(content)
        self._content = content
        if not self.is_gpt2:
            self._refuse_what_is_not_byte_level()
            self._content = self._as_it_is_used()
            self._spec = json.loads(self._content)
        self._vocab: dict[str, int] = self._spec["model"]["vocab"] | {
            token["content"]: token["id"] for token in self._spec["added_tokens"]
        }
        self.vocab_size = max(self._vocab.values()) + 1  # rows that a model needs
        self.eot = self._vocab[eot_token]
        if not self.is_gpt2:
            self._refuse_what_changes_texts()

    @property
    def is_gpt2(self) -> bool:
        """Whether it is the one that is shipped."""
        return self.name == GPT2

    @property
    def dtype(self) -> np.dtype:
        """Of the ids in shards, little-endian: uint16 where they fit, else uint32."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    @property
    def normalizes(self) -> bool:
        """Whether texts come back in another form, such as é in one code point."""
        return self._spec["normalizer"] is not None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides the ids, 64 hex digits."""
        model = self._spec["model"]
        steps = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in pre_tokenizers(self._spec)]
        deciding = {
            "vocab": self._vocab,
            "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
            "ignore_merges": bool(model.get("ignore_merges")),
            "normalizer": self._spec["normalizer"],
            "pre_tokenizer": steps,
            "added": sorted(token["id"] for token in self._spec["added_tokens"] if not token["special"]),
            "eot": self.eot,
        }
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    def knows(self, vocab: Mapping[str, int]) -> bool:
        """Whether a vocabulary of transformers has all entries of this one, under the same ids."""
        return self._vocab.items() <= vocab.items()

    # --- encoding and decoding ---

    def encode_document(self, text: str) -> np.ndarray:
        """Tokens of one document, ended by `eot`: (n_tokens + 1,) of `dtype`.

        The text of a special token is encoded as ordinary text. Raises UnicodeError (a ValueError) for a lone
        surrogate, half of a character: replacing it would train on a text that nobody wrote.
        """
        try:
            ids = self._encode(text)
        except (UnicodeEncodeError, TypeError):
            if (found := _SURROGATE.search(text)) is None:
                raise
            raise UnicodeError(
                f"lone surrogate U+{ord(found[0]):04X} at character {found.start():,} of {len(text):,}: "
                "repair the text, or leave it out"
            ) from None
        document = np.empty(len(ids) + 1, self.dtype)
        document[:-1], document[-1] = ids, self.eot
        return document

    @property
    def encoder(self) -> str:
        """What encodes: "tiktoken", or where its ids would not be the same, "tokenizers", at a quarter of its speed."""
        return "tokenizers" if self._tiktoken_ids is None else "tiktoken"

    @cached_property
    def _encode(self) -> Encode:
        if self._tiktoken_ids is None:
            return self._by_tokenizers
        pattern = pattern_of(self._spec)
        assert pattern is not None
        fast = by_tiktoken(pattern, self._tiktoken_ids, lambda: self._by_tokenizers)
        return (lambda text: fast(self._backend.normalizer.normalize_str(text))) if self.normalizes else fast

    @cached_property
    def _tiktoken_ids(self) -> dict[bytes, int] | None:
        if self.is_gpt2:  # an id is also the rank of the merge that made the token, as the tests show
            return dict(zip(self.token_bytes[:EOT], range(EOT), strict=True))
        if pattern_of(self._spec) not in PATTERNS or not all(t["special"] for t in self._spec["added_tokens"]):
            return None
        return merge_ranks(self._spec)

    @cached_property
    def _backend(self) -> "tokenizers.Tokenizer":
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(self._content)
        backend.encode_special_tokens = True  # as ordinary text
        return backend

    def _by_tokenizers(self, text: str) -> np.ndarray:
        (found,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return np.array(found.ids, np.uint32)

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """What every id stands for, (vocab_size,); nothing for one that has no entry."""
        added = {token["id"] for token in self._spec["added_tokens"]}
        found = [b""] * self.vocab_size
        for token, i in self._vocab.items():
            raw = None if i in added else piece_bytes(token)
            found[i] = token.encode() if raw is None else raw
        return tuple(found)

    @cached_property
    def token_byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, (vocab_size,) int64: turns nats per token into bits per byte.

        0 for `eot`. Their sum over the tokens of a text is its length in bytes, normalised as the tokenizer does it.
        """
        lengths = np.array([len(raw) for raw in self.token_bytes], dtype=np.int64)
        lengths[self.eot] = 0
        lengths.flags.writeable = False  # one array for everyone
        return lengths

    def decode(self, tokens: Iterable[int]) -> str:
        """Their text; U+FFFD for bytes that are none, <|number|> for numbers that are no token."""
        known = (
            self.token_bytes[token] if token < self.vocab_size else f"<|{token}|>".encode()
            for token in map(int, tokens)
        )
        return b"".join(known).decode(errors="replace")

    # --- for transformers ---

    def hugging_face(self) -> "PreTrainedTokenizerBase":
        """A new tokenizer of transformers."""
        if self.is_gpt2:
            return load_tokenizer()
        from tokenizers import Tokenizer as Backend
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=Backend.from_str(self._content),
            bos_token=self.eot_token,
            eos_token=self.eot_token,
            clean_up_tokenization_spaces=False,
        )

    def save(self, folder: Path) -> None:
        """Write what `read_tokenizer` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILES[0]).write_text(self._content, encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eot_token}
        (folder / FILES[1]).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    # --- what cannot be used ---

    def _refuse(self, why: str) -> UserError:
        return UserError(f"the tokenizer {self.name} {why}")

    def _refuse_what_is_not_byte_level(self) -> None:
        spec, steps = self._spec, pre_tokenizers(self._spec)
        model = spec.get("model") or {}
        kind = model.get("type") or "unknown"
        if kind != "BPE":
            raise self._refuse(f"is of the kind {kind}: only a byte-level BPE can be used")
        if not any(step["type"] == "ByteLevel" for step in steps) or model.get("byte_fallback"):
            raise self._refuse(
                "is a BPE of characters, as SentencePiece's, not of bytes: only a byte-level BPE will do"
            )
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise self._refuse("marks the parts of a word, as CLIP's: only a plain byte-level BPE can be used")
        if model.get("dropout"):
            raise self._refuse("merges by chance (dropout): save it without that")
        if any(step.get("add_prefix_space") for step in steps):
            raise self._refuse("puts a space before each text (add_prefix_space): save it without that")
        normalizer = spec.get("normalizer") or {"type": "NFC"}
        kinds = {part["type"] for part in normalizer.get("normalizers", [normalizer])}
        if others := kinds - {"NFC"}:
            raise self._refuse(f"changes texts before it encodes them ({', '.join(sorted(others))}): only NFC may")
        entries = {piece_bytes(token) for token in model["vocab"] if len(token) == 1}
        if missing := 256 - len(entries - {None}):
            raise self._refuse(f"has no entry for {missing} of the 256 bytes: it would lose what is written with them")
        if odd := [t["content"] for t in spec["added_tokens"] if not t["special"] and (t["lstrip"] or t["rstrip"])]:
            raise self._refuse(f"has an added token that swallows spaces beside it, {odd[0]!r}: save it without that")

    def _as_it_is_used(self) -> str:
        """The tokenizer.json with an end-of-text token that is special, and nothing that adds or cuts tokens."""
        from tokenizers import AddedToken, decoders, processors
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self._content)
        if backend.token_to_id(self.eot_token) is None:
            raise self._refuse(
                f"has no end-of-text token: it names no eos_token that is in its vocabulary, nor has it {END_OF_TEXT}"
            )
        backend.add_special_tokens([AddedToken(self.eot_token, special=True, normalized=False)])
        backend.no_padding()
        backend.no_truncation()
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        backend.decoder = decoders.ByteLevel()
        return backend.to_str()

    def _refuse_what_changes_texts(self) -> None:
        """By trial."""
        if self.eot in self._by_tokenizers(f"a{self.eot_token} {self.eot_token}").tolist():
            raise self._refuse(f"makes its end-of-text token of ordinary text, {self.eot_token!r}: choose another one")
        for text in (_TRIAL, _TRIAL[::-1]):
            normalizer = self._backend.normalizer
            expected = normalizer.normalize_str(text) if normalizer else text
            if (found := self.decode(self._by_tokenizers(text))) != expected:
                raise self._refuse(f"does not give texts back: {expected!r} comes back as {found!r}")


@functools.cache
def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's own."""
    return Tokenizer(GPT2, (ASSETS / "tokenizer" / FILES[0]).read_text(encoding="utf-8"), END_OF_TEXT)


def open_tokenizer(where: str | Path | None) -> Tokenizer:
    """The tokenizer of a folder, or of the Hub; None is GPT-2's. Raises UserError where it cannot be used.

    Another name for GPT-2's, such as openai-community/gpt2, gives the shipped one.
    """
    if where is None or (str(where) == GPT2 and not Path(where).exists()):
        return gpt2_tokenizer()
    folder = Path(where)
    if folder.name == FILES[0] and folder.is_file():
        folder = folder.parent
    elif not folder.is_dir():
        folder = _fetch(str(where))
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    name = Path(where).resolve().name if Path(where).exists() else str(where)
    return read_tokenizer(name, files)


def read_tokenizer(name: str, files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer of these FILES. Raises UserError, in one line, where it cannot be used."""
    if FILES[0] not in files:
        raise UserError(
            f"the tokenizer {name} has no {FILES[0]}, so it is none of the fast ones: AutoTokenizer.from_pretrained of "
            "transformers, and save_pretrained, may make one of it"
        )
    try:
        content = files[FILES[0]].decode()
        settings = [json.loads(files.get(other, b"{}")) for other in FILES[1:]]
        named = [token for setting in settings if (token := setting.get("eos_token"))]
        spec = json.loads(content)
        vocab = spec["model"]["vocab"]  # of Unigram, which is refused, a list
        known = {*(vocab if isinstance(vocab, dict) else ()), *(token["content"] for token in spec["added_tokens"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the tokenizer {name} has a broken {FILES[0]} or {FILES[1]} ({error}): save it again"
        ) from None
    tokens = [token["content"] if isinstance(token, dict) else token for token in named]
    eot_token = next((token for token in tokens if token in known), END_OF_TEXT)
    try:
        found = Tokenizer("another" if name == GPT2 else name, content, eot_token)
    except UserError:
        raise
    except Exception as error:  # the library's errors have no class of their own
        raise UserError(f"the tokenizer {name} cannot be read: {' '.join(str(error).split())}") from None
    return gpt2_tokenizer() if found.fingerprint == gpt2_tokenizer().fingerprint else found


def _fetch(hub_id: str) -> Path:
    # A hub id has at most one slash and never starts with a dot or a slash.
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", hub_id):
        raise UserError(f"no folder {hub_id}: give one with a {FILES[0]}, or a model id of the Hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"no tokenizer {hub_id}: there is no such folder, and the Hub did not give one ({why})"
        ) from None


def load_tokenizer() -> "PreTrainedTokenizerBase":
    """GPT-2's as transformers' `GPT2Tokenizer`, equal to the hub's `openai-community/gpt2`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tokenizer", local_files_only=True)
    for how in ("is_local", "local_files_only"):  # it was loaded: no word of that in what it saves
        tokenizer.init_kwargs.pop(how, None)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path, n_positions: int) -> None:
    """Write a byte-level BPE tokenizer so that tools of any age read it, cutting texts at the model's `n_positions`.

    transformers alone writes merges as pairs, which tokenizers before 0.20 cannot read, and neither of the files from
    2019, which older versions of transformers want. In a gpt2 folder it takes any tokenizer for GPT-2's, which cuts
    texts in GPT-2's way, unless the tokenizer's class says otherwise.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    # Unambiguous, as no token has a space in it: another character stands for that byte.
    saved["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in saved["model"]["merges"]]
    path.write_text(json.dumps(saved, indent=2, ensure_ascii=False), encoding="utf-8")

    is_like_gpt2 = pattern_of(saved) == GPT2_PATTERN
    if is_like_gpt2:
        tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"model_max_length": n_positions}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the same class, by the name that all versions know
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
