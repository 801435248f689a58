"""Measure how fast text becomes tokens: python scripts/benchmark_data.py [my.jsonl.zst folder/] [--what worker]"""

from importlib.metadata import version

from gpt2_hf.program import program


@program
def main() -> None:
    from jsonargparse import ArgumentParser

    # Imported here because every worker process imports this file again, and needs none of it.
    from gpt2_hf.data.read import Source
    from gpt2_hf.data.speed import benchmark_encoding, benchmark_preparation, benchmark_worker, read_texts

    parser = ArgumentParser(description=__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("inputs", nargs="*", default=["shakespeare"], help="what prepare_data.py reads (the plays)")
    parser.add_argument("--documents", type=int, help="read no more of them (not for --what preparation)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--what", choices=["encoding", "worker", "preparation", "all"], default="all")
    args = parser.parse_args()
    source = Source(inputs=tuple(args.inputs))
    print(f"data: {', '.join(args.inputs)}; tiktoken {version('tiktoken')}, tokenizers {version('tokenizers')}")
    if args.what in ("encoding", "all"):
        benchmark_encoding(read_texts(source, args.documents), args.rounds)
    if args.what in ("worker", "all"):
        benchmark_worker(source, args.rounds, args.documents)
    if args.what in ("preparation", "all"):
        benchmark_preparation(source, args.rounds)


if __name__ == "__main__":
    main()
