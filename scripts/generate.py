"""Sample text from a checkpoint folder, or from the newest run."""

from gpt2_hf.program import program


@program
def main() -> None:
    import torch
    from jsonargparse import ArgumentParser

    from gpt2_hf.data.tokenizer import load_tokenizer
    from gpt2_hf.evaluate import load_folder
    from gpt2_hf.generate import PROMPT, newest_run, sample_text
    from gpt2_hf.model import GPTConfig, GPTForCausalLM

    parser = ArgumentParser(description=__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("folder", nargs="?", help="folder or hub id of a GPT-2 (default: the newest run under runs/)")
    parser.add_argument("-p", "--prompt", default=PROMPT, help="text to continue")
    parser.add_argument("-m", "--max_tokens", type=int, default=30, help="most new tokens of a sample")
    parser.add_argument("-n", "--samples", type=int, default=5, help="number of samples")
    parser.add_argument("--top_k", type=int, default=50, help="draw from the k likeliest tokens; 0 for all")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 is safer, above 1 wilder; 0 is greedy")
    parser.add_argument("--seed", type=int, default=42)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    args = parser.parse_args()
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
