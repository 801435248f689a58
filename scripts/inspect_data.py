"""Look into token shards before training on them: figures, copies, documents, and a recipe's first batch.

python scripts/inspect_data.py data/mine
python scripts/inspect_data.py --config recipes/gpt2_124m.yaml --picture lengths.png
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

from gpt2_hf.cli import Arguments, parse_cli
from gpt2_hf.knobs import PathName
from gpt2_hf.program import program


@program
def main() -> None:
    from gpt2_hf.config import RunConfig
    from gpt2_hf.corpus.inspection import inspect_data
    from gpt2_hf.corpus.inspection_text import draw_lengths, render

    description = (__doc__ or "").splitlines()[0]
    parser, file = Arguments(description), Annotated[str, PathName()]
    folder = Annotated[str, PathName(remote=True)]
    parser.add_knob("path", nargs="?", kind=folder, help="folder of shards (default: the recipe's)")
    parser.add_knob("--config", metavar="FILE", kind=file, help="recipe whose first batch to show")
    parser.add_knobs_of(inspect_data, skip={"path", "recipe"})
    parser.add_knob("--picture", metavar="PNG", kind=file, help="also draw the document lengths")
    parser.add_knob("--json", metavar="FILE", kind=file, help="also write the figures")
    args = parser.parse_args()
    recipe = parse_cli(RunConfig, ["--config", args.config]) if args.config else None
    path = args.path or (recipe and recipe.data.path)
    if not path:
        raise ValueError("name a folder of shards, or a recipe with --config")
    for made in filter(None, (args.picture, args.json)):
        if not Path(made).parent.is_dir():
            raise ValueError(f"{made}: there is no folder {Path(made).parent}: make it first")
    found = inspect_data(path, recipe, documents=args.documents, sample=args.sample, seed=args.seed)
    print(render(found))
    if args.picture:
        print(f"\n{draw_lengths(found, args.picture)}: written")
    if args.json:
        Path(args.json).write_text(json.dumps(dataclasses.asdict(found), indent=1), encoding="utf-8")
        print(f"\n{args.json}: written")


if __name__ == "__main__":
    main()
