"""Race our training step against other GPT-2s on this machine, in turns: python scripts/benchmark.py --shape 4x256

--ladder climbs the lecture's steps instead, from fp32 to ours. --what says what else to measure: whether data and
logging keep up (loop), what optimizers cost (update), how long the demo's start takes (start), what other programs on
the CPUs cost (busy), whether the loss falls as in the plain loop (curve), HellaSwag against lm-evaluation-harness
(hellaswag).

A step is one micro-batch, and is waited for; on a GPU the steps of about a second are waited for together. Training
pays for its optimizer more seldom: with --grad_accum_steps 8, as often as the 124M recipe does on one GPU.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from gpt2_hf.cli import Arguments
from gpt2_hf.knobs import PathName, Range
from gpt2_hf.program import program


@program
def main() -> None:
    count = Annotated[int, Range(1, 10**6)]
    parser = Arguments(__doc__)
    parser.add_argument("--shape", choices=["demo", "4x256", "124M", "355M", "774M", "1558M"], default="4x256")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    kinds = ["step", "loop", "update", "start", "busy", "curve", "hellaswag"]
    parser.add_argument("--what", choices=kinds, default="step")
    parser.add_argument("--ladder", action="store_true", help="the lecture's ladder instead of the peers")
    parser.add_argument("--peer", action="append", default=[], help="PATH:CLASS of a nanoGPT-style model; may repeat")
    parser.add_argument("--only", action="append", default=[], help="only rows with this in their name; may repeat")
    help = "windows of a forward pass (default: the shape's)"
    parser.add_knob("--micro_batch_size", kind=count, help=help)
    help = "forward and backward passes of an optimizer step (default: 1; of --what loop 8)"
    parser.add_knob("--grad_accum_steps", kind=count, help=help)
    parser.add_knob("--rounds", kind=count, default=5, help="turns of each")
    parser.add_knob("--seconds", kind=Annotated[float, Range(above=0, at_most=3600)], default=4.0, help="of each turn")
    parser.add_knob("--hellaswag_items", kind=Annotated[int, Range(1, 10_042)], default=100, help="items of it")
    help = "folder for table, JSON and picture"
    parser.add_knob("--out", kind=Annotated[str, PathName()], default="runs/benchmark", help=help)
    args = parser.parse_args()
    from gpt2_hf import hardware
    from gpt2_hf.benchmark.run import compare_curves, race_busy, race_loop, race_scoring, race_start, race_steps
    from gpt2_hf.benchmark.update import race_updates
    from gpt2_hf.benchmark.variants import shape_of

    device = hardware.pick_device(args.device)
    shape = shape_of(args.shape, device.type)
    shape = replace(
        shape,
        micro_batch_size=args.micro_batch_size or shape.micro_batch_size,
        grad_accum_steps=args.grad_accum_steps or (8 if args.what == "loop" else 1),
    )
    if args.what == "step":
        text = race_steps(shape, device, args.rounds, args.seconds, Path(args.out), args.peer, args.only, args.ladder)
    elif args.what == "loop":
        text = race_loop(shape, device, args.rounds)
    elif args.what == "update":
        text = race_updates(shape, device, args.rounds)
    elif args.what == "start":
        text = race_start(args.rounds)
    elif args.what == "busy":
        text = race_busy(shape, device, args.rounds, args.seconds, Path(args.out))
    elif args.what == "curve":
        text = compare_curves(device, args.rounds)
    else:
        text = race_scoring(shape, device, args.hellaswag_items, args.rounds)
    print(text)


if __name__ == "__main__":
    main()
