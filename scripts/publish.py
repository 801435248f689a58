"""Check that a run's model, or a folder, is a GPT-2 that stock transformers loads; with --repo, push it to the Hub."""

from typing import Annotated

from gpt2_hf.cli import Arguments
from gpt2_hf.knobs import PathName
from gpt2_hf.program import program


@program
def main() -> None:
    from gpt2_hf.sharing.publish import publish

    parser = Arguments(__doc__)
    parser.add_knob("folder", kind=Annotated[str, PathName()], help="a run, or a folder with a GPT-2 in it")
    parser.add_argument("--repo", help="where to publish: me/my-gpt2; without it the folder is only checked")
    parser.add_argument("--check", action="store_true", help="check only")
    parser.add_argument("--with-code", "--with_code", action="store_true", help="publish our model code too")
    parser.add_argument("--private", action="store_true", help="make a new repository private; a public one is refused")
    parser.add_argument("--license", help="for the model card, where there is none yet: the Hub's name of a licence")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="list what would be uploaded")
    args = vars(parser.parse_args())
    passed = publish(**args)
    if not passed:
        raise SystemExit(1)
    if args["repo"] is None and not args["check"]:
        print("to publish it, add --repo YOUR_NAME/NAME")


if __name__ == "__main__":
    main()
