"""What a recipe takes: python scripts/plan.py recipes/gpt2_124m.yaml --gpus 8xH100 --price 2.5 [any knob of a run]"""

import sys

from gpt2_hf.program import program


@program
def main() -> None:
    from gpt2_hf.cli import parse_cli
    from gpt2_hf.planning.plan import PlanConfig, make_plan, plain, text, to_json

    config = parse_cli(PlanConfig, plain(sys.argv[1:]))
    if config.check:
        from gpt2_hf.planning.check import check

        print(check())
        return
    plan = make_plan(config, config.gpus, config.price)
    print(to_json(plan) if config.json else text(plan, config))


if __name__ == "__main__":
    main()
