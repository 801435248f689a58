"""Evaluate runs, checkpoint folders or hub models, side by side: validation loss, HellaSwag, lm-evaluation-harness."""

from typing import Annotated

from gpt2_hf.cli import Arguments
from gpt2_hf.knobs import PathName
from gpt2_hf.program import program


@program
def main() -> None:
    from gpt2_hf.evaluation.side_by_side import evaluate_side_by_side

    parser = Arguments(__doc__)
    help = "runs, folders with a GPT-2 in them, or hub ids"
    parser.add_knob("models", nargs="+", kind=Annotated[str, PathName()], help=help)
    parser.add_knobs_of(evaluate_side_by_side, skip={"models"})
    evaluate_side_by_side(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
