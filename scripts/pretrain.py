"""Pretrain GPT-2 by a recipe: accelerate launch scripts/pretrain.py --config recipes/gpt2_124m.yaml"""

import os

from gpt2_hf.program import end_with_launcher, program


@program
def main() -> None:
    end_with_launcher()
    from gpt2_hf.cli import parse_cli
    from gpt2_hf.config import RunConfig

    config = parse_cli(RunConfig)
    from gpt2_hf.training.loop import train

    run = train(config).parent
    if os.environ.get("RANK", "0") == "0":
        from gpt2_hf.reporting.curves import show_run

        show_run(run)


if __name__ == "__main__":
    main()
