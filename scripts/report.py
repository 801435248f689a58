"""Draw the curves of a run (RUN/curves.png), or of several over each other; by default of the newest run."""

from pathlib import Path
from typing import Annotated

from gpt2_hf.cli import Arguments
from gpt2_hf.knobs import PathName
from gpt2_hf.program import program


@program
def main() -> None:
    from gpt2_hf.reporting.curves import plot_runs

    parser, path = Arguments(__doc__), Annotated[str, PathName()]
    parser.add_knob("runs", nargs="*", kind=path, help="folders of runs (default: the newest under runs/)")
    parser.add_knob(
        "-o", "--out", kind=path, help="x.png, x.pdf or x.svg (default: curves.png in the first run's folder)"
    )
    args = parser.parse_args()
    runs = args.runs
    if not runs:
        metrics = max(Path("runs").glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime, default=None)
        if metrics is None:
            raise ValueError("no run under runs/: give the folder of a run")
        runs = [metrics.parent]
    print(plot_runs(runs, args.out or Path(runs[0]) / "curves.png"))


if __name__ == "__main__":
    main()
