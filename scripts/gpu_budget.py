"""What a training step launches on a GPU, without one: python scripts/gpu_budget.py recipes/gpt2_124m.yaml --card H100

It needs Triton, which writes a GPU's kernels, and a C++ compiler: make gpu-budget brings the first.
"""

import sys

from gpt2_hf.program import program


@program
def main() -> None:
    from gpt2_hf.budget.budget import BudgetConfig, make_budget, text, to_json
    from gpt2_hf.cli import parse_cli
    from gpt2_hf.planning.plan import plain

    config = parse_cli(BudgetConfig, plain(sys.argv[1:]))
    budget = make_budget(config)
    print(to_json(budget) if config.json else text(budget, config))


if __name__ == "__main__":
    main()
