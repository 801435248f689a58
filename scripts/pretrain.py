"""Pretrain GPT-2 by a recipe: accelerate launch scripts/pretrain.py --config recipes/gpt2_124m.yaml"""

import os

from gpt2_hf.program import end_with_launcher, program


@program
def main() -> None:
    end_with_launcher()
    from gpt2_hf.cli import parse_cli
    from gpt2_hf.config import RunConfig

    config = parse_cli(RunConfig)
    from pathlib import Path

    from gpt2_hf.sharing.follow import following
    from gpt2_hf.training.loop import train

    is_first = os.environ.get("RANK", "0") == "0"
    with following(Path(config.train.run_dir), config.publish, is_first):
        run = train(config).parent
        if is_first:
            from gpt2_hf.reporting.curves import show_run

            show_run(run)


if __name__ == "__main__":
    main()
