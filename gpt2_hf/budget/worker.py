"""The process that a budget is made in: ``python -m gpt2_hf.budget.worker CARD [knobs of a run]``, a trace as JSON."""

from __future__ import annotations

import sys
import warnings
from contextlib import redirect_stdout

from ..program import program
from . import stand_in


def prepare(card: str) -> None:
    """Make this process believe in a card. To be called before PyTorch is imported, by whatever module."""
    library = stand_in.load()
    from .rates import BUILDS, properties_of

    stand_in.install(library, properties_of(card), BUILDS[card].attention)


@program
def main() -> None:
    warnings.filterwarnings("ignore")  # that tensors have no memory
    with redirect_stdout(sys.stderr):
        prepare(sys.argv[1])
        from ..cli import parse_cli
        from ..config import RunConfig
        from .trace import trace_step

        trace = trace_step(parse_cli(RunConfig, sys.argv[2:]))
    print(trace.to_json())


if __name__ == "__main__":
    main()
