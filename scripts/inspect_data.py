"""Look into token shards before training on them: figures, copies, documents, and a recipe's first batch.

python scripts/inspect_data.py data/mine
python scripts/inspect_data.py --config recipes/gpt2_124m.yaml --picture lengths.png
"""

import dataclasses
import json
from pathlib import Path

from gpt2_hf.program import program


@program
def main() -> None:
    from jsonargparse import ArgumentParser

    from gpt2_hf.cli import parse_cli
    from gpt2_hf.config import RunConfig
    from gpt2_hf.data.inspection import inspect_data
    from gpt2_hf.data.inspection_text import draw_lengths, render

    description = (__doc__ or "").splitlines()[0]
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("path", nargs="?", help="folder of shards (default: the recipe's)")
    parser.add_argument("--config", metavar="FILE", help="recipe whose first batch to show")
    parser.add_argument("--documents", type=int, default=3, help="documents of each split to show (default: 3)")
    parser.add_argument("--sample", type=int, default=100_000, help="documents of each split to read (default: 100000)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--picture", metavar="PNG", help="also draw the document lengths")
    parser.add_argument("--json", metavar="FILE", help="also write the figures")
    args = parser.parse_args()
    recipe = parse_cli(RunConfig, ["--config", args.config]) if args.config else None
    path = args.path or (recipe and recipe.data.path)
    if not path:
        raise ValueError("name a folder of shards, or a recipe with --config")
    for file in filter(None, (args.picture, args.json)):
        if not Path(file).parent.is_dir():
            raise ValueError(f"{file}: there is no folder {Path(file).parent}: make it first")
    found = inspect_data(path, recipe, documents=args.documents, sample=args.sample, seed=args.seed)
    print(render(found))
    if args.picture:
        print(f"\n{draw_lengths(found, args.picture)}: written")
    if args.json:
        Path(args.json).write_text(json.dumps(dataclasses.asdict(found), indent=1), encoding="utf-8")
        print(f"\n{args.json}: written")


if __name__ == "__main__":
    main()
