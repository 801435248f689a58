"""Measure how fast text becomes tokens, on one thread: python scripts/benchmark_data.py [my.jsonl.zst folder/]"""

import itertools
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from statistics import median

from jsonargparse import ArgumentError, ArgumentParser

from gpt2_hf.data.prepare import PrepareConfig, ReadDocuments, _plan
from gpt2_hf.data.tokenizer import ASSETS, EOT, encode_document, load_tokenizer

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}  # read when tokenizers is imported
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def encoders() -> dict[str, Callable[[list[str]], object]]:
    """Functions of a list of texts that give the same ids, as the tests show; ours also ends each text."""
    from tiktoken import Encoding
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    def each(function: Callable[[str], object]) -> Callable[[list[str]], object]:
        return lambda texts: [function(text) for text in texts]

    ranks = data_gym_to_mergeable_bpe_ranks(f"{ASSETS}/tokenizer/merges.txt", f"{ASSETS}/tokenizer/vocab.json")
    found = {"encode_document": each(encode_document)}
    for name, pattern in (("GPT-2's pattern", GPT2_PATTERN), ("its own pattern", r50k_pat_str)):
        # Without a special token encode_to_numpy takes half as long again, which would flatter us.
        raw = Encoding("raw", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": EOT})
        found[f"tiktoken encode_ordinary, {name}"] = each(raw.encode_ordinary)
        found[f"tiktoken encode_to_numpy, {name}"] = each(partial(raw.encode_to_numpy, disallowed_special=()))
    return found | {"tokenizers encode_batch": load_tokenizer().backend_tokenizer.encode_batch}


def benchmark_encoding(title: str, texts: list[str], rounds: int) -> None:
    """Print MB/s of every encoder on `texts`, and its ratio to the fastest tiktoken in the same round."""
    size, encode = sum(len(text.encode()) for text in texts) / 1e6, encoders()
    seconds: dict[str, list[float]] = {name: [] for name in encode}
    # In turns, so that a busy machine slows all alike; the first round warms up.
    for turn, (name, run) in itertools.product(range(rounds + 1), encode.items()):
        began = time.process_time()
        run(texts)
        seconds[name] += [time.process_time() - began] * (turn > 0)
    best = min((name for name in encode if "tiktoken" in name), key=lambda name: median(seconds[name]))
    print(f"\n{title}: {len(texts):,} texts, {size:.1f} MB\n{'MB per second of CPU':<41} median    min    max   ratio")
    for name, spent in seconds.items():
        speeds = sorted(size / each for each in spent)
        ratios = sorted(other / each for other, each in zip(seconds[best], spent, strict=True))
        of_best = f"{median(ratios):.1%} ({ratios[0]:.1%} to {ratios[-1]:.1%})"
        print(f"{name:<41} {median(speeds):6.2f} {speeds[0]:6.2f} {speeds[-1]:6.2f}   {of_best}")


def main() -> None:
    parser = ArgumentParser(description=__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("inputs", nargs="*", default=["shakespeare"], help="what prepare_data.py reads (the plays)")
    parser.add_argument("--documents", type=int, help="read no more of them")
    parser.add_argument("--rounds", type=int, default=9)
    try:
        args = parser.parse_args()
        config = PrepareConfig(tuple(args.inputs), out="unused")
        _, tasks = _plan(config)
        found = itertools.chain.from_iterable(ReadDocuments(config, tasks, None)(None, i, 0) for i in range(len(tasks)))
        texts = [document.text for document in itertools.islice(found, args.documents)]
        print(f"data: {', '.join(args.inputs)}; tiktoken {version('tiktoken')}, tokenizers {version('tokenizers')}")
        benchmark_encoding("whole documents", texts, args.rounds)
        short = [text[i : i + 200] for text in texts for i in range(0, len(text), 200)]
        benchmark_encoding("cut into 200 characters", short, args.rounds)
    except (ArgumentError, ImportError, OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
