"""Convert a checkpoint of nanoGPT, build-nanogpt or llm.c to a stock gpt2 folder, or a gpt2 folder to one of those.

python scripts/convert.py ckpt.pt out_folder
python scripts/convert.py model_00019560.bin out_folder
python scripts/convert.py runs/demo model.bin --to llmc
"""

from typing import Annotated

from gpt2_hf.cli import Arguments
from gpt2_hf.knobs import PathName
from gpt2_hf.program import program


@program
def main() -> None:
    from transformers.utils import logging

    from gpt2_hf.sharing.convert import convert

    description = (__doc__ or "").partition("\n")[0]
    parser, path = Arguments(description), Annotated[str, PathName()]
    source = ".pt of nanoGPT or build-nanogpt, .bin of llm.c, a run, gpt2 folder or hub id"
    parser.add_knob("source", kind=path, help=source)
    parser.add_knob("output", kind=path, help="folder to write for gpt2, file for the others")
    parser.add_knobs_of(convert, skip={"source", "output", "overwrite"})
    parser.add_argument("--overwrite", action="store_true", help="replace an output of the same kind")
    logging.disable_progress_bar()
    convert(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
