"""Pretrain GPT-2 by a recipe: accelerate launch scripts/pretrain.py --config recipes/gpt2_124m.yaml"""

from gpt2_hf.program import end_with_launcher, program


@program
def main() -> None:
    end_with_launcher()
    from gpt2_hf.cli import parse_cli
    from gpt2_hf.config import RunConfig

    config = parse_cli(RunConfig)
    from gpt2_hf.train import train

    train(config)


if __name__ == "__main__":
    main()
