"""Imports run one way, and heavy packages load only when they are used."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "gpt2_hf"

# Module -> the modules of ours that it may import. A new arrow is a decision: think before adding it.
ALLOWED = {
    "__init__": {"model"},
    "model.__init__": {"model.configuration_gpt", "model.modeling_gpt"},
    "model.hub": set(),
    "model.configuration_gpt": {"model.hub"},
    "model.attention": set(),
    "model.versions": set(),
    "model.loss": set(),
    "model.modeling_gpt": {"model.attention", "model.configuration_gpt", "model.hub", "model.loss", "model.versions"},
    "data.__init__": set(),
    "data.folder": set(),
    "data.formats": {"data.folder"},
    "data.shards": {"data.folder", "data.formats"},
    "data.export": {"data.formats", "data.shards"},
    "data.remote": {"data.folder"},
    "data.stream": {"data.shards"},
    "data.tokenizer": set(),
    "data.inspection_text": {"data.inspection", "data.tokenizer"},
    "data.inspection": {"config", "data.folder", "data.remote", "data.shards", "data.stream", "data.tokenizer"},
    "data.clean": {"data.tokenizer"},
    "data.audit": set(),
    "data.opening": set(),
    "data.json_text": {"data.opening"},
    "data.inputs": {"data.tokenizer"},
    "data.read": {"data.inputs", "data.json_text", "data.opening"},
    "data.write": {"data.audit", "data.read", "data.shards", "data.tokenizer"},
    "data.prepare": {
        "data.audit",
        "data.clean",
        "data.export",
        "data.inputs",
        "data.read",
        "data.shards",
        "data.write",
    },
    "data.speed": {"data.prepare", "data.read", "data.tokenizer", "data.write"},
    # The benchmark stands above everything else: it measures train.py's own step.
    "benchmark.__init__": set(),
    "benchmark.variants": {"config", "data.tokenizer", "hardware", "model", "optim", "train"},
    "benchmark.limits": {"benchmark.variants", "hardware", "train"},
    "benchmark.breakdown": set(),
    "benchmark.worker": {"benchmark.breakdown", "benchmark.variants", "metrics"},
    "benchmark.race": {"benchmark.limits", "benchmark.variants"},
    "benchmark.results": {"benchmark.limits", "benchmark.race", "benchmark.variants", "hardware", "metrics"},
    "benchmark.hellaswag": {"data.tokenizer", "evaluate", "model"},
    "benchmark.run": {
        "benchmark.hellaswag",
        "benchmark.race",
        "benchmark.results",
        "benchmark.variants",
        "config",
        "hardware",
        "metrics",
        "train",
    },
    "documents": set(),
    "program": set(),
    "knobs": set(),
    "cli": set(),
    "config": {"cli", "model.configuration_gpt"},
    "hardware": set(),
    "optim": {"config", "hardware"},
    "checkpoint": set(),
    "metrics": {"model.configuration_gpt"},
    "report": {"metrics"},
    "generate": {"model"},
    "convert": {"checkpoint", "data.tokenizer", "model"},
    "verify": set(),
    "staging": {"checkpoint", "model.hub", "verify"},
    "publish": {"checkpoint", "metrics", "model.hub", "staging", "verify"},
    "evaluate": {
        "checkpoint",
        "data.remote",
        "data.shards",
        "data.stream",
        "data.tokenizer",
        "documents",
        "hardware",
        "model",
    },
    "preflight": {"config", "data.tokenizer"},
    "run_folder": {"checkpoint", "cli"},
    "watch": {"cli", "config", "documents", "model", "run_folder"},
    "train": {
        "checkpoint",
        "cli",
        "config",
        "data.remote",
        "data.shards",
        "data.stream",
        "data.tokenizer",
        "documents",
        "evaluate",
        "generate",
        "hardware",
        "metrics",
        "model",
        "model.loss",
        "model.versions",
        "optim",
        "preflight",
        "report",
        "run_folder",
        "watch",
    },
}
HEAVY = ("datatrove", "datasets", "lm_eval", "matplotlib", "tiktoken", "pyarrow", "jsonargparse")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    """Dotted names below gpt2_hf that a file imports, wherever in the file."""
    package = ["gpt2_hf", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import checkpoint` names modules; `from .config import RunConfig` names a module's content.
            names = [f"{module}.{a.name}" for a in node.names] if module == "gpt2_hf" else [module]
        else:
            continue
        found |= {name.removeprefix("gpt2_hf.") for name in names if name.startswith("gpt2_hf.")}
    return found


def test_imports_run_one_way():
    files = {module_name(path): path for path in PACKAGE.rglob("*.py") if "assets" not in path.parts}
    assert files.keys() == ALLOWED.keys()
    for name, path in files.items():
        assert imports_of(path) - ALLOWED[name] - {"program", "knobs"} == set(), name


def test_the_benchmark_needs_nothing_but_what_training_needs():
    """A GPU machine brings its own packages, and may have no network for more."""
    modules = {module for module in ALLOWED if module.startswith("benchmark.")} - {"benchmark.__init__"}
    files = [PACKAGE.parent / "scripts" / "benchmark.py", *(PACKAGE / f"{m.replace('.', '/')}.py" for m in modules)]
    for path in files:
        for node in ast.parse(path.read_text()).body:  # what is imported first
            names = [alias.name for alias in getattr(node, "names", ())] + [getattr(node, "module", None) or ""]
            assert not {name.partition(".")[0] for name in names} & set(HEAVY), path.name


def test_the_model_folder_can_travel():
    """Only relative imports of siblings: transformers copies these files beside the weights."""
    for path in (PACKAGE / "model").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and "." not in (node.module or "")
    # Older versions of transformers copy what a file imports, but not what those import in turn.
    for name in ("model.configuration_gpt", "model.modeling_gpt"):
        imported = imports_of(PACKAGE / f"{name.replace('.', '/')}.py")
        assert imported >= set().union(*(ALLOWED[other] for other in imported))


def test_training_needs_no_optional_package():
    program = f"""
import sys
import accelerate
from transformers import AutoTokenizer, GenerationMixin, PreTrainedModel
before = set(sys.modules)  # some versions of transformers bring pyarrow along, by way of scikit-learn
import gpt2_hf.train
print([name for name in {HEAVY!r} if name in sys.modules and name not in before])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
