"""Is one recipe better than another? Train each with several seeds, and compare: see the examples in docs/recipe.md.

python scripts/sweep.py recipes/demo.yaml --grid optim.lr=1e-3,2e-3,4e-3 optim.muon_lr=0.01,0.02 compares
knobs, python scripts/sweep.py --ab a.yaml b.yaml --seeds 4 two recipes. The first candidate is the baseline. Started
again, the same command goes on where it was.
"""

import sys
from pathlib import Path
from typing import Annotated

from gpt2_hf.cli import Arguments
from gpt2_hf.knobs import PathName, Range
from gpt2_hf.program import program


@program
def main() -> None:
    parser, path = Arguments(__doc__), Annotated[str, PathName()]
    parser.add_knob("recipes", nargs="*", metavar="RECIPE", kind=path, help="recipes to compare")
    help = "values of knobs, all combinations of which are candidates, such as optim.lr=1e-3,2e-3"
    parser.add_argument("--grid", nargs="+", action="extend", default=[], metavar="KNOB=A,B", help=help)
    help = "settings of all runs, such as train.steps=500"
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KNOB=A", help=help)
    help = "how many seeds (4 is 1,2,3,4), or which: a,b,c; a verdict needs three"
    seeds = list[Annotated[int, Range(1, 10**6)]]
    parser.add_knob("--seeds", metavar="N", kind=seeds, default="3", help=help)
    parser.add_knob("--out", kind=path, help="folder for runs, table.md and sweep.png (default: runs/sweeps/RECIPE)")
    help = "runs at a time, which share the cores"
    parser.add_knob("--jobs", kind=Annotated[int, Range(1, 1000)], default=1, help=help)
    parser.add_argument("--ab", action="store_true", help="end with a sentence: is the second of two better?")
    parser.add_argument("--again", action="store_true", help="make runs again that have diverged")
    help = "run nothing, and show what is there, of the sweep in --out or of the one described"
    parser.add_argument("--only_show", "--only-show", action="store_true", help=help)
    args = parser.parse_args()
    from gpt2_hf.sweeping.sweep import sweep

    sweep(
        args.recipes,
        Path(args.out) if args.out else None,
        [sys.executable, str(Path(__file__).resolve().with_name("pretrain.py"))],
        grid=args.grid,
        settings=args.set,
        seeds=args.seeds,
        jobs=args.jobs,
        ab=args.ab,
        again=args.again,
        only_show=args.only_show,
    )


if __name__ == "__main__":
    main()
