"""Imports run one way, and heavy packages load only when they are used."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gpt2_hf"

# Room -> the rooms that it may import beside itself and the ground floor. An arrow more is a decision: think first.
ROOMS = {
    "model": set(),
    "data": {"model"},
    "corpus": {"model", "data"},
    "evaluation": {"model", "data"},
    "training": {"model", "data", "evaluation"},
    "reporting": {"model", "data"},
    "sharing": {"model", "data", "evaluation"},
    "sweeping": {"model", "data", "evaluation", "reporting"},
    "planning": {"model", "data", "evaluation", "training"},
    "budget": {"model", "training", "planning"},
    "benchmark": {"model", "data", "corpus", "evaluation", "training"},
}
GROUND = [
    "program",
    "files",
    "knobs",
    "runs",
    "hardware",
    "schedules",
    "config",
    "cli",
    "reference",
]  # each may import those before it
HEAVY = ("datatrove", "datasets", "lm_eval", "matplotlib", "bokeh", "tiktoken", "pyarrow")
FILES = [path for path in PACKAGE.rglob("*.py") if "assets" not in path.parts]


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
            # `from . import hardware` names modules; `from .config import RunConfig` names a module's content.
            names = [f"{module}.{a.name}" for a in node.names] if module == "gpt2_hf" else [module]
        else:
            continue
        found |= {name.removeprefix("gpt2_hf.") for name in names if name.startswith("gpt2_hf.")}
    return found


def test_imports_run_one_way():
    for path in FILES:
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name in ROOMS:
            allowed = {name} | ROOMS[name] | (set(GROUND) if name != "model" else set())
        else:
            allowed = {"model"} | set(GROUND[: GROUND.index(name)] if name in GROUND else ())
        imported = imports_of(path)
        assert {module.partition(".")[0] for module in imported} <= allowed, path
        assert name != "config" or "model" not in imported, "a recipe needs the model's configuration, not PyTorch"


def test_no_two_modules_import_each_other():
    graph = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): imports_of(path)
        for path in FILES
        if path != PACKAGE / "__init__.py"
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, with the circle


def test_each_room_says_what_it_is_for():
    for room in ROOMS:
        text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
        assert all(word in text for word in ("In come", "Out ", "ouch")), room


@pytest.mark.parametrize("path", [PACKAGE.parent / "scripts" / "benchmark.py", *(PACKAGE / "benchmark").glob("*.py")])
def test_the_benchmark_needs_nothing_but_what_training_needs(path):
    """A GPU machine brings its own packages, and may have no network for more."""
    for node in ast.parse(path.read_text()).body:  # what is imported first
        names = [alias.name for alias in getattr(node, "names", ())] + [getattr(node, "module", None) or ""]
        assert not {name.partition(".")[0] for name in names} & set(HEAVY)


def test_the_model_folder_can_travel():
    """Only relative imports of siblings: transformers copies these files beside the weights."""
    for path in (PACKAGE / "model").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and "." not in (node.module or "")
    # Older versions of transformers copy what a file imports, but not what those import in turn.
    for name in ("configuration_gpt", "modeling_gpt"):
        imported = imports_of(PACKAGE / "model" / f"{name}.py")
        for other in imported:
            assert imports_of(PACKAGE / f"{other.replace('.', '/')}.py") <= imported


def test_training_needs_no_optional_package():
    program = f"""
import sys
import accelerate
from transformers import AutoTokenizer, GenerationMixin, PreTrainedModel
before = set(sys.modules)  # some versions of transformers bring pyarrow along, by way of scikit-learn
import gpt2_hf.training.loop
print([name for name in {HEAVY!r} if name in sys.modules and name not in before])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
