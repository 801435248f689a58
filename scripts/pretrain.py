"""Pretrain GPT-2 by a recipe: accelerate launch scripts/pretrain.py --config recipes/gpt2_124m.yaml"""

import sys

from gpt2_hf.config import ConfigError, RunConfig, parse_cli


def main() -> None:
    config = parse_cli(RunConfig)
    from gpt2_hf.data.shards import ShardError
    from gpt2_hf.train import train

    try:
        train(config)
    except (ConfigError, ShardError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
