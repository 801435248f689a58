"""Evaluate a checkpoint folder or hub model: validation loss and HellaSwag, beside the marks of OpenAI's GPT-2 124M."""

from typing import Annotated

from gpt2_hf.cli import Arguments
from gpt2_hf.knobs import PathName
from gpt2_hf.program import program

# Metric, its name in the table, GPT-2 124M. Its validation loss is another on every text.
ROWS = (
    ("val_loss", "validation loss (nats per token)", "*"),
    ("val_bpb", "validation bits per byte", "*"),
    ("hellaswag_acc", "HellaSwag acc (lm-eval)", "0.2892"),
    ("hellaswag_acc_norm", "HellaSwag acc_norm (lm-eval)", "0.3114"),
    ("hellaswag_lecture_acc", "HellaSwag (mean loss per token)", "0.2955"),
)


@program
def main() -> None:
    from gpt2_hf.evaluation.evaluate import evaluate_folder

    parser = Arguments(__doc__)
    parser.add_knob("folder", kind=Annotated[str, PathName()], help="a run, a folder with a GPT-2 in it, or a hub id")
    parser.add_knobs_of(evaluate_folder, skip={"folder_or_hub_id"})
    args = vars(parser.parse_args())
    folder = args.pop("folder")
    results = evaluate_folder(folder, **args)
    print(f"{folder}\n{'':<34} {'this model':>10}   GPT-2 124M")
    for key, name, mark in ROWS:
        if key in results:
            print(f"{name:<34} {results[key]:>10.4f}   {mark}")
    if "val_loss" in results:
        print("* depends on the text: for a comparison evaluate openai-community/gpt2 with the same --data")
    if "hellaswag_items" in results:
        n_items, stderr = results["hellaswag_items"], results["hellaswag_stderr"]
        print(f"HellaSwag on {n_items:,} of 10,042 items: standard error {stderr:.4f}; the marks are for all items")


if __name__ == "__main__":
    main()
