"""Measure how fast text becomes tokens: python scripts/benchmark_data.py [my.jsonl.zst folder/] [--what worker]"""

from importlib.metadata import version
from typing import Annotated

from gpt2_hf.cli import Arguments
from gpt2_hf.knobs import PathName, Range
from gpt2_hf.program import program


@program
def main() -> None:
    # Imported here because every worker process imports this file again, and needs none of it.
    from gpt2_hf.benchmark.speed import benchmark_encoding, benchmark_preparation, benchmark_worker, read_texts
    from gpt2_hf.corpus.read import Source

    parser, count = Arguments(__doc__), Annotated[int, Range(1)]
    parser.add_knob(
        "inputs",
        nargs="*",
        kind=Annotated[str, PathName()],
        default=["shakespeare"],
        help="what prepare_data.py reads (the plays)",
    )
    parser.add_knob("--documents", kind=count, help="read no more of them (not for --what preparation)")
    parser.add_knob("--rounds", kind=count, default=5, help="turns of each")
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
