"""Turn documents into the token shards that training reads.

python scripts/prepare_data.py --config recipes/data/shakespeare.yaml
python scripts/prepare_data.py my.jsonl 'more/*.parquet' --out data/mine --val_documents 100
python scripts/prepare_data.py --dataset HuggingFaceFW/fineweb-edu --name sample-10BT --out data/fineweb_edu_10bt
"""

from gpt2_hf.program import UserError, program


@program
def main() -> None:
    # Imported here because every worker process imports this file again, and needs none of it.
    from gpt2_hf.cli import parse_cli
    from gpt2_hf.corpus.prepare import PrepareConfig, prepare

    try:
        prepare(parse_cli(PrepareConfig, positional="inputs"))
    except ImportError as error:
        raise UserError(f"{error}: install what preparation needs with pip install -e '.[data]'") from error


if __name__ == "__main__":
    main()
