"""Show a run, or several over each other, as a page (RUN/report.html) and a picture (RUN/curves.png)."""

from pathlib import Path
from typing import Annotated

from gpt2_hf.cli import Arguments
from gpt2_hf.knobs import PathName, Range
from gpt2_hf.program import program


@program
def main() -> None:
    parser, path = Arguments(__doc__), Annotated[str, PathName()]
    parser.add_knob("runs", nargs="*", kind=path, help="folders of runs (default: the newest under runs/)")
    parser.add_knob(
        "-o",
        "--out",
        kind=path,
        help="x.html, or x.png, x.pdf, x.svg for the picture (default: report.html and curves.png in the first run)",
    )
    for kind in ("png", "pdf"):
        parser.add_argument(f"--{kind}", action="store_true", help=f"only curves.{kind} in the first run's folder")
    parser.add_knob("--price", kind=Annotated[float, Range(above=0)], help="dollars per GPU-hour, to draw against cost")
    parser.add_argument("--watch", action="store_true", help="write the page again and again while the run goes on")
    every = Annotated[int, Range(1, 86_400)]
    parser.add_knob("--every", kind=every, default=30, help="seconds between two pages of --watch")
    parser.add_argument(
        "--diff", action="store_true", help="compare two runs that should be equal; exit status 1 when they are not"
    )
    args = parser.parse_args()
    runs = [Path(run) for run in args.runs] or [_newest()]
    if args.diff:
        if len(runs) != 2:
            raise ValueError(f"--diff compares two runs, and {len(runs)} {'is' if len(runs) == 1 else 'are'} given")
        raise SystemExit(_diff(*runs))
    outs = [Path(args.out)] if args.out else []
    outs += [runs[0] / f"curves.{kind}" for kind in ("png", "pdf") if vars(args)[kind]]
    outs = outs or [runs[0] / "report.html", runs[0] / "curves.png"]
    if args.watch:
        if outs[0].suffix != ".html":
            raise ValueError(f"--watch writes a page, and {outs[0]} is none: name a file that ends in .html")
        from gpt2_hf.reporting.watch import watch

        watch(runs, outs[0], args.price, args.every)
    missing = None
    for out in outs:
        try:
            print(_write(runs, out, args.price))
        except ImportError as error:  # the other one needs another package
            missing = error
    if missing:
        raise missing


def _newest() -> Path:
    metrics = max(Path("runs").glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime, default=None)
    if metrics is None:
        raise ValueError("no run under runs/: give the folder of a run")
    return metrics.parent


def _write(runs: list[Path], out: Path, price: float | None) -> Path:
    if out.suffix.lower() in (".html", ".htm"):
        from gpt2_hf.reporting.page import write_page

        return write_page(runs, out, price)
    from gpt2_hf.reporting.curves import plot_runs

    return plot_runs(runs, out)


def _diff(a: Path, b: Path) -> int:
    """Print how they compare; returns the exit status."""
    from gpt2_hf.reporting.diff import compare_runs

    are_equal, lines = compare_runs(a, b)
    print("\n".join([f"{a} and {b} are {'equal' if are_equal else 'different'}", *lines]))
    return 0 if are_equal else 1


if __name__ == "__main__":
    main()
