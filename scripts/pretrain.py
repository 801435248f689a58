"""Pretrain GPT-2 by a recipe: accelerate launch scripts/pretrain.py --config recipes/gpt2_124m.yaml"""

import os
import sys

from gpt2_hf.cli import ConfigError, parse_cli
from gpt2_hf.config import RunConfig


def main() -> None:
    is_main_process = os.environ.get("LOCAL_RANK", "0") == "0"
    config = parse_cli(RunConfig)
    from gpt2_hf.data.shards import ShardError
    from gpt2_hf.train import train

    try:
        train(config)
    except (ConfigError, ShardError, FloatingPointError, ImportError, OSError) as error:
        if is_main_process:  # one line, not one from every process
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if is_main_process:
            print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
