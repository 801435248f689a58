"""What a step launches on a card, from the compiler's code for it, against counts made by hand."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys

import pytest

from gpt2_hf.budget import budget as budgets
from gpt2_hf.budget.budget import BudgetConfig, make_budget, seconds_of, text, to_json, trace_in_process
from gpt2_hf.budget.launches import HEAD, REST, UPDATE, Launch, Trace
from gpt2_hf.budget.rates import BUILDS, RATES, card_of, rates_of
from gpt2_hf.config import DataSection, ModelSection, TrainSection
from gpt2_hf.knobs import ConfigError
from gpt2_hf.training.memory import Parameters

L, C, H, T, B, V = 2, 128, 2, 64, 2, 50257
TOKENS, PADDED = B * T, 50304
FORWARD, BACKWARD = "GPTBlock.forward, forward", "GPTBlock.forward, backward"

needs_compilers = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: make test-budget"),
    pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler"),
]


def small(vocab_size: int = V, windows: int = B) -> BudgetConfig:
    return BudgetConfig(
        model=ModelSection(n_layer=L, n_embd=C, n_head=H, vocab_size=vocab_size),
        data=DataSection(seq_len=T),
        train=TrainSection(micro_batch_size=windows, global_batch_tokens=5 * windows * T),
    )


@pytest.fixture(scope="module")
def trace() -> Trace:
    return trace_in_process(small().without_ramps(), "H100")


def planted(changes: str, **shape: int) -> Trace:
    """The trace of the small step, with something in it that it should not have."""
    config = json.dumps(small(**shape).without_ramps().to_yaml())
    program = f"""
import sys, tempfile, warnings
warnings.filterwarnings("ignore")
from gpt2_hf.budget.worker import prepare
prepare("H100")
import torch
from gpt2_hf.cli import parse_cli
from gpt2_hf.config import RunConfig
from gpt2_hf.budget.trace import trace_step
from gpt2_hf.model import modeling_gpt
{changes}
with tempfile.NamedTemporaryFile("w", suffix=".yaml") as recipe:
    recipe.write({config})
    recipe.flush()
    config = parse_cli(RunConfig, ["--config", recipe.name])
print("\\n" + trace_step(config).to_json())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return Trace.from_json(result.stdout.splitlines()[-1])


def of_last(trace: Trace, *parts: str) -> list[Launch]:
    """Launches of the last micro-step, and of the update."""
    return [
        launch
        for launch in trace.launches
        if launch.micro_step == trace.last_micro_step and (not parts or launch.part in parts)
    ]


@pytest.mark.usefixtures("trace")
class TestSmallStep:
    pytestmark = needs_compilers

    def test_every_product_is_found_and_counted(self, trace):
        def products(part: str) -> list[Launch]:
            return [launch for launch in of_last(trace, part) if launch.kind == "product"]

        assert trace.calls[FORWARD] == trace.calls[BACKWARD] == L
        assert len(products(FORWARD)) == 4 * L and len(products(BACKWARD)) == 8 * L and len(products(HEAD)) == 3
        matrices = 2 * TOKENS * 12 * C * C * L  # multiplied and added
        assert sum(launch.flops for launch in products(FORWARD)) == matrices
        assert sum(launch.flops for launch in products(BACKWARD)) == 2 * matrices
        # Logits and their gradient run over the padded columns, or all three products do.
        head = sum(launch.flops for launch in products(HEAD)) / (2 * TOKENS * C)
        assert 3 * V <= head <= 3 * PADDED

    def test_attention_counts_the_causal_half(self, trace):
        forward, backward = (
            sum(launch.flops for launch in of_last(trace, part) if launch.kind == "attention")
            for part in (FORWARD, BACKWARD)
        )
        assert forward == L * 2 * (2 * B * T * T * C) / 2  # two products
        assert backward == L * 5 * (2 * B * T * T * C) / 2  # scores again, then gradients of both products

    def test_bytes_by_hand(self, trace):
        gelu = [launch for launch in of_last(trace, FORWARD) if "gelu" in launch.name]
        assert [launch.n_bytes for launch in gelu] == L * [TOKENS * 4 * C * (2 + 2)]
        tokens = next(launch for launch in of_last(trace) if launch.name.startswith(f"embedding {V}x"))
        assert tokens.n_bytes == TOKENS * (8 + 2 * 4 * C)  # rows that are chosen, not the table
        attention = next(launch for launch in of_last(trace, FORWARD) if launch.kind == "attention")
        assert attention.n_bytes == pytest.approx(4 * 2 * TOKENS * C + 4 * H * TOKENS, rel=0.01)

    def test_the_update_moves_each_parameter_as_often_as_it_must(self, trace):
        n = Parameters.of(small()).total
        adamw = [launch for launch in of_last(trace, UPDATE) if "adamw" in launch.name]
        assert sum(launch.n_bytes for launch in adamw) == pytest.approx(7 * 4 * n, rel=1e-3)
        clip = [
            launch for launch in of_last(trace, UPDATE) if launch.name.startswith(("_foreach_norm", "_foreach_mul"))
        ]
        assert sum(launch.n_bytes for launch in clip) == pytest.approx(3 * 4 * n, rel=1e-3)

    def test_gradients_add_up_from_the_second_micro_step_on(self, trace):
        n = Parameters.of(small()).total
        bytes_of = [
            sum(launch.n_bytes for launch in trace.launches if launch.micro_step == step and launch.part != UPDATE)
            for step in (0, 1)
        ]
        # Read twice and written; the first micro-step alone makes the zero that losses add up to.
        assert bytes_of[1] - bytes_of[0] == 3 * 4 * n - 4

    def test_nothing_waits_or_is_compiled_twice(self, trace):
        assert trace.host_waits == trace.graph_breaks == trace.recompilations == []

    def test_peak_memory_is_that_of_the_backward_pass_at_its_end(self, trace):
        held = 16 * Parameters.of(small()).total  # weights, gradients, two averages
        # The tied matrix has its gradients as a head and as an embedding, and their sum; the rest is small here.
        assert held < trace.peak_bytes <= held + 3 * 4 * V * C + 3e6

    def test_the_page(self, trace, monkeypatch):
        monkeypatch.setattr(budgets, "trace_in_process", lambda run, card: trace)
        config = small()
        budget = make_budget(config)
        rates = rates_of("H100")
        first, second, update = (
            sum(seconds_of(launch, rates) for launch in launches)
            for launches in (
                [launch for launch in trace.launches if launch.micro_step == 0],
                [launch for launch in of_last(trace) if launch.part != UPDATE],
                of_last(trace, UPDATE),
            )
        )
        assert budget.seconds == pytest.approx(first + 4 * second + update)
        assert budget.tokens_per_sec == pytest.approx(5 * TOKENS / budget.seconds)
        page = text(budget, config)
        assert "Host waits 0; graph breaks 0; recompilations 0" in page and f"{FORWARD}, {L} calls" in page
        assert sum(row["launches"] for row in json.loads(to_json(budget))["rows"]) == len(of_last(trace))
        ends = {f"{end}.forward, {way}" for end in ("EmbeddingSum", "FinalNorm") for way in ("forward", "backward")}
        assert {row.part for row in budget.rows} == {FORWARD, HEAD, BACKWARD, REST, UPDATE, *ends}

    def test_a_copy_and_a_host_wait_show(self, trace):
        found = planted("""
plain = torch.nn.Embedding.forward
def forward(self, ids):
    x = plain(self, ids).clone()
    x[0, 0, 0].item()
    return x
torch.nn.Embedding.forward = forward
""")
        more = sum(launch.n_bytes for launch in of_last(found)) - sum(launch.n_bytes for launch in of_last(trace))
        assert more == 2 * 4 * (TOKENS * C + T * C)  # of the tokens' embeddings and of the positions'
        assert len(found.host_waits) == 2 * 2
        assert found.graph_breaks == [] and found.launches != trace.launches

    def test_a_graph_break_shows_and_even_rows_are_wide(self, trace):
        found = planted(
            """
plain = modeling_gpt.GPTMLP.forward
def forward(self, x):
    torch._dynamo.graph_break()
    return plain(self, x)
modeling_gpt.GPTMLP.forward = forward
""",
            vocab_size=PADDED,
            windows=8,  # fewer rows would be cut in pieces, of an odd length again
        )
        assert len(found.graph_breaks) > 0
        assert any(launch.is_narrow for launch in of_last(trace, HEAD))
        assert not any(launch.is_narrow for launch in of_last(found, HEAD))


def test_a_kernel_takes_what_is_longer_of_its_flops_and_its_bytes():
    rates = dataclasses.replace(RATES["H100"], products=100.0, attention=50.0, wide=10.0, narrow=5.0, gap=1.0)
    product = Launch(HEAD, "mm", "product", n_bytes=10, flops=1000, is_narrow=False, micro_step=0)
    assert seconds_of(product, rates) == 10 + 1
    assert seconds_of(dataclasses.replace(product, n_bytes=200), rates) == 20 + 1
    assert seconds_of(dataclasses.replace(product, n_bytes=200, is_narrow=True), rates) == 40 + 1
    assert seconds_of(dataclasses.replace(product, kind="attention"), rates) == 20 + 1


@pytest.mark.parametrize("name", BUILDS)
def test_no_rate_is_beyond_the_data_sheet(name):
    card, rates = card_of(name), rates_of(name)
    assert rates.attention < rates.products < card.peak and rates.narrow < rates.wide < card.bandwidth


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train": TrainSection(precision="fp32")}, "train.precision fp32"),
        ({"data": DataSection(document_mask=True)}, "data.document_mask"),
        ({"model": ModelSection(attn_implementation="flex_attention")}, "model.attn_implementation flex_attention"),
        ({"card": "T1000"}, "card"),
        ({"train": TrainSection(micro_batch_size=3)}, "train.global_batch_tokens"),
    ],
)
def test_what_has_no_budget_is_refused_in_one_line(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_budget(BudgetConfig(**change))
    assert "\n" not in str(error.value)


def test_what_the_traced_process_says_is_said_once(tmp_path):
    """Here with a Python that has no Triton, whatever is laid over it."""
    command = [sys.executable, "-c", "import sys; sys.modules['triton'] = None; from gpt2_hf.budget import worker; "]
    command[-1] += "sys.argv = ['worker', 'H100']; worker.main()"
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("error: the budget of a GPU needs")
