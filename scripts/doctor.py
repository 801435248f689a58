"""See whether training can work on this machine: a line each, ok or what to do; status 1 if something must be done."""

from typing import Annotated

from gpt2_hf.cli import Arguments
from gpt2_hf.knobs import PathName, Range
from gpt2_hf.program import program


@program
def main() -> None:
    parser = Arguments(__doc__)
    parser.add_knob("--run_dir", kind=Annotated[str, PathName()], default="runs", help="where runs are to be kept")
    parser.add_knob(
        "--seconds", kind=Annotated[float, Range(0, 3600)], default=20.0, help="of the trial; 0 leaves it out"
    )
    args = parser.parse_args()
    from pathlib import Path

    from gpt2_hf.planning.doctor import examine, report

    if not report(examine(Path(args.run_dir), args.seconds)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
