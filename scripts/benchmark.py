"""Race our training step against other GPT-2s on this machine, in turns: python scripts/benchmark.py --shape 4x256

--ladder climbs the lecture's steps instead, from fp32 to ours. --what says what else to measure: whether data and
logging keep up (loop), how long the demo's start takes (start), what other programs on the CPUs cost (busy), whether
the loss falls as in the plain loop (curve), HellaSwag against lm-evaluation-harness (hellaswag).
"""

from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from gpt2_hf.program import UserError, program


class Parser(ArgumentParser):
    """Python's own: a GPU machine need have nothing more to run this."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


@program
def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--shape", choices=["demo", "4x256", "124M"], default="4x256")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--what", choices=["step", "loop", "start", "busy", "curve", "hellaswag"], default="step")
    parser.add_argument("--ladder", action="store_true", help="the lecture's ladder instead of the peers")
    parser.add_argument("--peer", action="append", default=[], help="PATH:CLASS of a nanoGPT-style model; may repeat")
    parser.add_argument("--only", action="append", default=[], help="only rows with this in their name; may repeat")
    parser.add_argument("--micro_batch_size", type=int, help="windows of a forward pass (default: the shape's)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each turn")
    parser.add_argument("--hellaswag_items", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder for table, JSON and picture")
    args = parser.parse_args()
    from gpt2_hf import hardware
    from gpt2_hf.benchmark.run import compare_curves, race_busy, race_loop, race_scoring, race_start, race_steps
    from gpt2_hf.benchmark.variants import shape_of

    device = hardware.pick_device(args.device)
    shape = shape_of(args.shape, device.type)
    if args.micro_batch_size:
        shape = replace(shape, micro_batch_size=args.micro_batch_size)
    if args.what == "step":
        text = race_steps(shape, device, args.rounds, args.seconds, args.out, args.peer, args.only, args.ladder)
    elif args.what == "loop":
        text = race_loop(replace(shape, grad_accum_steps=8), device, args.rounds)
    elif args.what == "start":
        text = race_start(args.rounds)
    elif args.what == "busy":
        text = race_busy(shape, device, args.rounds, args.seconds, args.out)
    elif args.what == "curve":
        text = compare_curves(device, args.rounds)
    else:
        text = race_scoring(shape, device, args.hellaswag_items, args.rounds)
    print(text)


if __name__ == "__main__":
    main()
