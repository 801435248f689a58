"""Measure how fast text becomes tokens: python scripts/benchmark_data.py [my.jsonl.zst folder/] [--what worker]"""

import sys
from importlib.metadata import version

from jsonargparse import ArgumentError, ArgumentParser


def main() -> None:
    # Imported here because every worker process imports this file again, and needs none of it.
    from gpt2_hf.data.read import Source
    from gpt2_hf.data.speed import benchmark_encoding, benchmark_preparation, benchmark_worker, read_texts

    parser = ArgumentParser(description=__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("inputs", nargs="*", default=["shakespeare"], help="what prepare_data.py reads (the plays)")
    parser.add_argument("--documents", type=int, help="read no more of them (not for --what preparation)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--what", choices=["encoding", "worker", "preparation", "all"], default="all")
    try:
        args = parser.parse_args()
        source = Source(inputs=tuple(args.inputs))
        print(f"data: {', '.join(args.inputs)}; tiktoken {version('tiktoken')}, tokenizers {version('tokenizers')}")
        if args.what in ("encoding", "all"):
            benchmark_encoding(read_texts(source, args.documents), args.rounds)
        if args.what in ("worker", "all"):
            benchmark_worker(source, args.rounds, args.documents)
        if args.what in ("preparation", "all"):
            benchmark_preparation(source, args.rounds)
    except (ArgumentError, ImportError, OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
