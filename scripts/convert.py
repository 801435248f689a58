"""Convert a checkpoint of nanoGPT, build-nanogpt or llm.c to a stock gpt2 folder, or a gpt2 folder to one of those.

python scripts/convert.py ckpt.pt out_folder
python scripts/convert.py model_00019560.bin out_folder
python scripts/convert.py runs/demo model.bin --to llmc
"""

import sys

from jsonargparse import ArgumentError, ArgumentParser
from transformers.utils import logging

from gpt2_hf.convert import convert


def main() -> None:
    description = (__doc__ or "").partition("\n")[0]
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("source", help=".pt of nanoGPT or build-nanogpt, .bin of llm.c, a run, gpt2 folder or hub id")
    parser.add_argument("output", help="folder to write for gpt2, file for the others")
    parser.add_function_arguments(convert, skip={"source", "output", "overwrite"})
    parser.add_argument("--overwrite", action="store_true", help="replace an output of the same kind")
    logging.disable_progress_bar()
    try:
        convert(**parser.parse_args().as_dict())
    except (ArgumentError, OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
