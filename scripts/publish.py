"""Check that a run's model, or a folder, is a GPT-2 that stock transformers loads; with --repo, push it to the Hub."""

from typing import Annotated

from gpt2_hf.cli import Arguments
from gpt2_hf.knobs import PathName, Range
from gpt2_hf.program import program


@program
def main() -> None:
    parser, path = Arguments(__doc__), Annotated[str, PathName()]
    parser.add_knob("folder", kind=path, help="a run, or a folder with a GPT-2 in it; with --verify also a repository")
    parser.add_argument("--repo", help="where to publish: me/my-gpt2; without it the folder is only checked")
    parser.add_knob("--checkpoint", kind=Annotated[int, Range(0)], help="the run's checkpoint after this step")
    parser.add_argument("--public", action="store_true", help="let everybody see it; a new repository is private")
    parser.add_argument("--private", action="store_true", help="what is done without --public")
    parser.add_argument("--with-code", "--with_code", action="store_true", help="publish our model code too")
    parser.add_argument("--license", help="for the model card, where there is none yet: the Hub's name of a licence")
    parser.add_argument("--language", help="for the model card, where there is none yet: en, de, ...")
    parser.add_knob("--price", kind=Annotated[float, Range(0)], help="dollars per GPU-hour, for the card")
    parser.add_knob("--data", kind=path, help="the prepared data, where it is not at the recipe's data.path")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="list what would be uploaded")
    parser.add_argument("--check", action="store_true", help="check only")
    parser.add_argument("--verify", action="store_true", help="compute a card's figures again, and say which differ")
    args = vars(parser.parse_args())
    if args.pop("private") and args["public"]:
        parser.error("--private and --public are both given: keep one of the two")
    if args.pop("verify"):
        from gpt2_hf.sharing.proof import prove

        if not prove(args["folder"], args["data"]):
            raise SystemExit(1)
        return
    from gpt2_hf.sharing.publish import publish

    if not publish(**args):
        raise SystemExit(1)
    if args["repo"] is None and not args["check"]:
        print("to publish it, add --repo YOUR_NAME/NAME")


if __name__ == "__main__":
    main()
