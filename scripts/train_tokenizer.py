"""Train a tokenizer like GPT-2's on your own texts: another language, code, or anything else that is text.

python scripts/train_tokenizer.py my.jsonl 'more/*.parquet' --vocab_size 32000 --out tokenizers/mine
python scripts/train_tokenizer.py shakespeare --vocab_size 257 --out tokenizers/bytes
python scripts/prepare_data.py my.jsonl 'more/*.parquet' --tokenizer tokenizers/mine --out data/mine
"""

from gpt2_hf.program import UserError, program


@program
def main() -> None:
    from gpt2_hf.cli import parse_cli
    from gpt2_hf.corpus.train_tokenizer import TokenizerConfig, train_tokenizer

    try:
        train_tokenizer(parse_cli(TokenizerConfig, positional="inputs"))
    except ImportError as error:
        raise UserError(f"{error}: install what reading needs with pip install -e '.[data]'") from error


if __name__ == "__main__":
    main()
