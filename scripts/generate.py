"""Sample text from a checkpoint folder, or from the newest run."""

from typing import Annotated

from gpt2_hf.cli import Arguments
from gpt2_hf.knobs import LARGEST, PathName, Range
from gpt2_hf.program import program


@program
def main() -> None:
    count = Annotated[int, Range(1, 10_000)]
    parser = Arguments(__doc__)
    help = "a run, a folder with a GPT-2 in it, or a hub id (default: the newest run under runs/)"
    parser.add_knob("folder", nargs="?", kind=Annotated[str, PathName()], help=help)
    parser.add_knob("-p", "--prompt", kind=str, default="Hello, I'm a language model,", help="text to continue")
    parser.add_knob("-m", "--max_tokens", kind=count, default=30, help="most new tokens of a sample")
    parser.add_knob("-n", "--samples", kind=count, default=5, help="number of samples")
    top_k, temperature = Annotated[int, Range(0)], Annotated[float, Range(0, 1000)]
    parser.add_knob("--top_k", kind=top_k, default=50, help="draw from the k likeliest tokens; 0 for all")
    help = "below 1 is safer, above 1 wilder; 0 is greedy"
    parser.add_knob("--temperature", kind=temperature, default=1.0, help=help)
    parser.add_knob("--seed", kind=Annotated[int, Range(0, LARGEST)], default=42, help="of the samples")
    args = parser.parse_args()
    import torch

    from gpt2_hf.data.tokenizer import load_tokenizer
    from gpt2_hf.evaluation.evaluate import load_folder
    from gpt2_hf.evaluation.generate import sample_text
    from gpt2_hf.model import GPTConfig, GPTForCausalLM
    from gpt2_hf.runs import newest_run

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    folder = args.folder or newest_run()
    if folder:
        model, tokenizer = load_folder(folder, device)
        print(f"{folder}:")
    else:
        torch.manual_seed(args.seed)
        with device:
            model, tokenizer = GPTForCausalLM(GPTConfig()), load_tokenizer()
        print("no run under runs/ yet: this is an untrained GPT-2 124M")
    samples = sample_text(
        model,
        tokenizer,
        args.prompt,
        max_new_tokens=args.max_tokens,
        n_samples=args.samples,
        top_k=args.top_k,
        temperature=args.temperature,
        seed=args.seed,
        device=device,
    )
    for sample in samples:
        print(f"> {sample}")


if __name__ == "__main__":
    main()
