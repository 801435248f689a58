"""What the documentation says is run: the snippets of docs/learn.md, the notebook, and every command's flags.

A page that was right once goes wrong silently: a function is renamed, a flag removed, a default changed.
"""

import ast
import contextlib
import io
import json
import math
import re
import runpy
import shlex
import sys
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2_hf import GPTConfig, GPTForCausalLM
from gpt2_hf.cli import parse_cli
from gpt2_hf.corpus.prepare import PrepareConfig, prepare
from gpt2_hf.data.tokenizer import load_tokenizer
from gpt2_hf.model.loss import LossKernels

ROOT = Path(__file__).parents[1]
LEARN = ROOT / "docs" / "learn.md"
NOTEBOOK = ROOT / "docs" / "inside_a_checkpoint.ipynb"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# A python block, what follows the word python, and the output printed on the page after it, if any.
SNIPPET = re.compile(
    r"^```python(?P<mark>[^\n]*)\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.M | re.S
)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def sections(page: Path) -> dict[str, list[re.Match[str]]]:
    """The snippets of a page by the section that they stand in."""
    parts = re.split(r"^## (.*)$", page.read_text(), flags=re.M)
    return {
        title: found
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
        if (found := [*SNIPPET.finditer(body)])
    }


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def save_random_model(folder: Path, **shape: int) -> None:
    torch.manual_seed(0)
    GPTForCausalLM(GPTConfig(**shape)).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a reader has after `make demo`, except that the model is untrained."""
    root = tmp_path_factory.mktemp("workplace")
    with contextlib.redirect_stdout(io.StringIO()):
        recipe = ROOT / "recipes" / "data" / "shakespeare.yaml"
        prepare(parse_cli(PrepareConfig, ["--config", str(recipe), "--out", str(root / "data" / "shakespeare")]))
    save_random_model(root / "runs" / "demo" / "final", n_layer=4, n_head=4, n_embd=128, n_positions=256)
    return root


@pytest.fixture(autouse=True)
def leave_no_trace(monkeypatch: pytest.MonkeyPatch):
    """Snippets may set what is global in torch, as a reader would. They are small: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    with torch.random.fork_rng(), torch.enable_grad():
        yield
    torch.set_num_threads(threads)
    LossKernels.reset()


def run(code: str, names: dict[str, Any], where: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, where, "exec"), names)
    return printed.getvalue()


def assert_same_output(printed: str, on_page: str) -> None:
    """Equal words; equal numbers but for a few per cent, because processors and versions of torch round differently."""
    assert NUMBER.sub("N", printed).split() == NUMBER.sub("N", on_page).split()
    for a, b in zip(NUMBER.findall(printed), NUMBER.findall(on_page), strict=True):
        digits, _, exponent = b.replace(",", "").partition("e")
        last_digit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
        near = pytest.approx(float(b.replace(",", "")), rel=0.03, abs=2 * last_digit if "." in digits else 0)
        assert float(a.replace(",", "")) == near, (a, b)


@pytest.mark.parametrize("title", sections(LEARN))
def test_snippets_print_what_the_page_says(title, workplace, monkeypatch):
    """Blocks marked "trained" look at the demo's model: they must run, with any result."""
    monkeypatch.chdir(workplace)
    names: dict[str, Any] = {}
    for snippet in sections(LEARN)[title]:
        code, mark = snippet["code"], snippet["mark"].strip()
        assert mark in ("", "trained")
        printed = run(code, names, f"learn.md, {title}")
        if not mark:
            assert_same_output(printed, snippet["output"] or "")


def test_the_notebook_on_a_small_model(tmp_path, monkeypatch):
    shape = {"n_layer": 3, "n_head": 2, "n_embd": 32, "n_positions": 64}
    save_random_model(tmp_path / "model", **shape)
    monkeypatch.setenv("CHECKPOINT", str(tmp_path / "model"))
    monkeypatch.setenv("PICTURES", str(tmp_path))
    names: dict[str, Any] = {}
    for number, code in enumerate(code_cells()):
        run(code, names, f"cell {number}")

    head, per_block = 50257 * 32, 12 * 32**2 + 13 * 32  # matrices; biases of 9 C, LayerNorms of 4 C
    total = head + 64 * 32 + 3 * per_block + 2 * 32
    assert names["total"] == total
    assert names["share_saved"] == pytest.approx(head / (total + head))

    attention = names["attention"]
    assert attention.sum(-1).allclose(torch.ones(()), atol=1e-5)
    assert not attention.triu(1).any()
    # The last row of the lens is what the model says; if the final norm were applied twice, it would not be.
    assert names["lens"][-1].allclose(names["output"].logits[0, -1], atol=1e-5)
    assert len(names["lens"]) == 4
    # An untrained model: all weights as they were drawn, all tokens as likely.
    ratios = names["ratios"]
    flat = [ratios["wte"], ratios["wpe"], *(r for name in names["expected"] for r in ratios[name])]
    assert flat == pytest.approx([1] * len(flat), abs=0.1)
    assert names["position_losses"] == pytest.approx(math.log(50257), abs=0.5)
    assert len(list(tmp_path.glob("checkpoint_*.png"))) == 5
    sys.modules["matplotlib.pyplot"].close("all")


def test_the_notebook_finds_a_model_by_itself(tmp_path, monkeypatch):
    """The newest run, also when Jupyter was started in docs/; and in an empty folder without network a random model."""
    docs, run_folder = tmp_path / "project" / "docs", tmp_path / "project" / "runs" / "mine" / "final"
    docs.mkdir(parents=True)
    save_random_model(run_folder, n_layer=1, n_head=2, n_embd=8, n_positions=16)
    monkeypatch.delenv("CHECKPOINT", raising=False)
    monkeypatch.chdir(docs)
    names: dict[str, Any] = {}
    run(code_cells()[0], names, "cell 0")
    assert Path(names["source"]).resolve() == run_folder

    monkeypatch.setattr("gpt2_hf.evaluation.evaluate.load_folder", refuse)
    monkeypatch.chdir(tmp_path)
    assert "random weights" in run(code_cells()[0], names, "cell 0")


def refuse(source: Any) -> None:
    raise ValueError(f"cannot load {source}: no network")


def test_the_notebook_is_committed_as_it_was_written():
    """No outputs, which make every difference unreadable, and words before each piece of code."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)
    kinds = [cell["cell_type"] for cell in cells]
    assert kinds == ["markdown", "code"] * (len(cells) // 2)
    assert not any(re.search(r"^\s*[%!]", code, re.M) for code in code_cells())


def defined_names(path: Path) -> set[str]:
    """Functions, classes and methods of a file, methods as Class.method."""
    found = set()

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + child.name)
                walk(child, f"{prefix}{child.name}.")

    walk(ast.parse(path.read_text()), "")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_functions_that_a_page_names_exist(page):
    text = page.read_text()
    references = re.findall(r"`([\w/]+\.py)::([\w.]+)`", text) + re.findall(r"`((?:\w+/)+\w+\.py)()`", text)
    assert references or page != LEARN
    for file, name in references:
        path = ROOT / "gpt2_hf" / file if (ROOT / "gpt2_hf" / file).exists() else ROOT / file
        assert path.is_file(), f"{page.name} names {file}"
        assert not name or name in defined_names(path), f"{page.name} names {file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    text = page.read_text()
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, f"{page.name} links to {target}"
        elif not re.match(r"\w+:", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


def measured(text: str, units: str) -> set[str]:
    """Figures with a unit that took some measuring, so with a decimal or a thousand: "1.58 times", "4,840 tokens/s"."""
    return set(re.findall(rf"\d+[.,]\d+ ?(?:{units})(?![\w/])", text))


def test_a_measured_figure_stands_on_one_page():
    """Two copies of a figure part ways when it is measured again; other pages link to it."""
    texts = {page.name: page.read_text() for page in PAGES}
    speeds = {name: measured(text, "tokens/s|MB/s|s|ms|min") for name, text in texts.items() if name != "README.md"}
    for (one, mine), (other, theirs) in combinations(speeds.items(), 2):
        assert not mine & theirs, f"{one} and {other}"


def test_the_readmes_speeds_are_those_of_the_results():
    speed = (ROOT / "README.md").read_text().partition("\n## Speed\n")[2].partition("\n## ")[0]
    numbers = set(NUMBER.findall((ROOT / "docs" / "results.md").read_text()))
    quoted = set(NUMBER.findall(" ".join(measured(speed, "times|%|tokens/s"))))
    assert quoted and quoted <= numbers


def commands(page: Path) -> list[list[str]]:
    """Every command on a page that runs one of our scripts, as words from the script's path on."""
    text = page.read_text().replace("\\\n", " ")
    found = re.findall(r"(?:python|accelerate launch|torchrun)\b[^`\n|;&]*?scripts/\w+\.py[^`\n|;&#]*", text)
    return [shlex.split(command) for command in found]


@cache
def known_flags(script: str) -> frozenset[str]:
    """The flags in a script's --help. In this process: importing torch anew for each script takes most of the time."""
    printed, argv = io.StringIO(), sys.argv
    sys.argv = [script, "--help"]
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = argv
    assert stop.value.code in (0, None)
    return frozenset(re.findall(r"(?<![\w-])--?[a-z][\w.-]*", printed.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_would_run(page, monkeypatch):
    """Scripts, recipes and flags exist: a page's command fails at most for lack of data or of a GPU."""
    monkeypatch.chdir(ROOT)
    found = commands(page)
    assert found or page.name not in ("README.md", "learn.md")
    for words in found:
        place = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
        script, arguments = words[place], words[place + 1 :]
        assert Path(script).is_file(), shlex.join(words)
        for flag, value in pairwise(words):
            if flag in ("--config", "--config_file"):
                assert Path(value).is_file(), shlex.join(words)
        unknown = {word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)} - known_flags(script)
        assert not unknown, f"{page.name}: {script} does not know {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_named_in_the_text_exist(page):
    """Such as `--train.overfit_batch true`: dotted, so they belong to a recipe."""
    flags = set(re.findall(r"`(--[a-z]\w*\.\w+)", page.read_text()))
    assert flags <= known_flags("scripts/pretrain.py")
