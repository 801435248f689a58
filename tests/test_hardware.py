"""What is chosen for a machine, with the machine made up."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.utils as hf
from accelerate.state import AcceleratorState, PartialState
from torch._functorch import config as functorch

from gpt2_hf import hardware
from gpt2_hf.config import ModelSection, RunConfig, TrainSection
from gpt2_hf.model.loss import LossKernels
from gpt2_hf.program import program
from gpt2_hf.training.build import build_accelerator, build_model, set_precision

ROOT = Path(__file__).parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def install(monkeypatch):
    """A function that makes up the card, by its compute capability, and the FlashAttentions that are installed."""

    def make(capability: tuple[int, int], *versions: int, kernels: bool = False) -> None:
        for version in (2, 3, 4):
            name = f"is_flash_attn_{version}_available"
            monkeypatch.setattr(hf, name, lambda v=version: v in versions, raising=False)
        monkeypatch.setattr(hf, "is_kernels_available", lambda: kernels)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(hardware, "_sdpa_kernel", lambda *_: "cudnn" if capability[0] in (9, 10) else "flash")

    return make


@pytest.mark.parametrize(
    ("installed", "capability", "dropout", "expected"),
    [
        ((4, 3, 2), (9, 0), 0.0, "flash_attention_4"),
        ((3, 2), (9, 0), 0.0, "flash_attention_3"),
        ((3, 2), (9, 0), 0.1, "flash_attention_2"),  # 3 would leave dropout out without a word
        ((3, 2), (8, 0), 0.0, "flash_attention_2"),
        ((3, 2), (10, 0), 0.0, "flash_attention_2"),  # 3 has kernels for Hopper alone
        ((3,), (10, 0), 0.1, "sdpa"),
        ((2,), (7, 5), 0.1, "sdpa"),
        ((), (9, 0), 0.1, "sdpa"),
    ],
)
def test_auto_attention_with_documents_fits_the_card(install, installed, capability, dropout, expected):
    install(capability, *installed)
    name, why = hardware.choose_attention("auto", CUDA, "bf16", dropout, document_mask=True)
    assert name == expected and why
    assert hardware.choose_attention("auto", CUDA, "fp32", dropout, document_mask=True)[0] == "sdpa"


def test_auto_attention_without_documents_is_pytorch_own(install):
    for capability, kernel in (((9, 0), "cudnn"), ((8, 0), "flash")):
        install(capability, 2, 3, 4)
        name, why = hardware.choose_attention("auto", CUDA, "bf16", 0.0)
        assert name == "sdpa" and f"{kernel} kernel" in why
    assert hardware._sdpa_kernel(CPU, "bf16", 0.0, False) == "flash"  # as PyTorch tells it


def test_flash_attention_by_name_works_or_says_what_to_do(install):
    install((9, 0), 2)
    assert hardware.choose_attention("eager", CUDA, "bf16", 0.0) == ("eager", "asked for")
    assert hardware.choose_attention("flash_attention_2", CUDA, "bf16", 0.1) == ("flash_attention_2", "asked for")
    for name, device, precision, dropout, message in (
        ("flash_attention_4", CUDA, "bf16", 0.0, "not installed: pip install flash-attn-4"),
        ("flash_attention_3", CUDA, "bf16", 0.0, "not installed: pip install .*hopper"),
        ("flash_attention_3", CUDA, "bf16", 0.1, "has no dropout"),
        ("flash_attention_2", CUDA, "fp32", 0.0, "not in fp32"),
        ("flash_attention_2", CPU, "bf16", 0.0, "needs CUDA, this is cpu"),
    ):
        with pytest.raises(ValueError, match=f"{name} .*{message}.*leave it at auto"):
            hardware.choose_attention(name, device, precision, dropout)
    install((9, 0), kernels=True)  # transformers fetches it from the Hub
    assert hardware.choose_attention("flash_attention_3", CUDA, "bf16", 0.0)[0] == "flash_attention_3"


def test_auto_attention_on_a_cpu():
    def chosen(precision, dropout=0.0, document_mask=False, compiled=True):
        return hardware.choose_attention("auto", CPU, precision, dropout, document_mask, compiled)[0]

    assert chosen("bf16") == "blockwise"
    others = [chosen("fp32"), chosen("bf16", dropout=0.1), chosen("bf16", document_mask=True)]
    assert [*others, chosen("bf16", compiled=False)] == ["sdpa"] * 4


def test_compile_obstacle_names_what_is_missing(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def no_compiler():
        raise exc.InvalidCxxCompiler()

    with monkeypatch.context() as patch:
        patch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)
        assert "no C++ compiler" in hardware.compile_obstacle(CPU)
    with monkeypatch.context() as patch:
        patch.setattr(hardware.sysconfig, "get_path", lambda name: "/nowhere")
        assert "Python headers" in hardware.compile_obstacle(CPU)
    with monkeypatch.context() as patch:
        patch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
        assert "Triton" in hardware.compile_obstacle(CUDA)
    assert hardware.compile_obstacle(torch.device("mps")) is not None


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA B200", 2250),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GB300", 2500),
        ("NVIDIA GB10", 125),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 504),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 504),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 439),
        ("NVIDIA RTX 6000 Ada Generation", 1),
        ("Quadro RTX 6000", 1),
        ("AMD Instinct MI300X", 1307),
        ("AMD Instinct MI300X VF", 1307),
        ("AMD Instinct MI325X", 1307),
        ("AMD Instinct MI355X", 2517),
        ("AMD Instinct MI300A", 1),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA RTX A1000", 1),
    ],
)
def test_peak_of_known_cards(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(hardware, "measure_gemm", lambda device, dtype: 1e12)
    assert hardware.peak_flops(CUDA, torch.bfloat16)[0] == teraflops * 1e12


def test_peak_of_this_cpu_is_measured():
    peak, source = hardware.peak_flops(CPU, torch.float32)
    assert 1e9 < peak < 1e14 and "measured" in source


def test_what_other_programs_take_is_no_limit_of_this_cpu(monkeypatch):
    """Each product takes 2 s, of which both threads worked 0.25 s: the machine can do one in 0.25 s."""
    now = {"wall": 0.0, "work": 0.0}

    def product(*_, **__) -> None:
        now["wall"] += 2.0
        now["work"] += 2 * 0.25

    monkeypatch.setattr(
        hardware, "time", SimpleNamespace(perf_counter=lambda: now["wall"], process_time=lambda: now["work"])
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "mm", product)
    assert hardware.measure_gemm(CPU, torch.float32, seconds=5) == pytest.approx(2 * 2048**3 / 0.25)


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 4),
        ({"cpu.max": "max 100000\n"}, 4),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "800000 100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)
def test_cpus_are_those_that_this_process_may_use(monkeypatch, tmp_path, files, cpus):
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: {0, 1, 2, 5}, raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert hardware.usable_cpus(tmp_path) == cpus


def test_a_run_has_no_more_threads_than_cpus_to_use(monkeypatch):
    """Launchers start it with as many as the machine has cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(hardware, "usable_cpus", lambda: 2)
    try:
        set_precision(RunConfig(), CPU)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("set_by_user", "policy"), [(None, "passive"), ("active", "active")])
def test_a_programs_threads_sleep_when_they_wait(monkeypatch, set_by_user, policy):
    monkeypatch.setenv("OMP_WAIT_POLICY", set_by_user or "")  # put back after the test
    if set_by_user is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    seen = []
    program(lambda: seen.append(os.environ["OMP_WAIT_POLICY"]))()
    assert seen == [policy]


def test_emulated_bf16_is_no_peak(monkeypatch):
    monkeypatch.setattr(
        hardware, "measure_gemm", lambda device, dtype: {torch.float32: 2e12, torch.bfloat16: 1e9}[dtype]
    )
    monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda: False)
    assert hardware.peak_flops(CPU, torch.bfloat16) == (2e12, "measured float32 matrix product")


def test_precision_obeys_the_limit_set_for_the_library(monkeypatch):
    monkeypatch.setattr(hardware.Path, "read_text", lambda self: "flags : avx2 avx512_bf16")
    for limit, precision in (("", "bf16"), ("AVX512_CORE_BF16", "bf16"), ("avx2", "fp32"), ("AVX512_CORE", "fp32")):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        hardware._cpu_has_bf16.cache_clear()
        assert hardware.default_precision(CPU) == precision
    hardware._cpu_has_bf16.cache_clear()


@pytest.mark.parametrize(
    ("device", "precision", "files"),
    [
        ("cuda", "bf16", ("single_gpu", "demo")),
        ("cuda", "fp16", ("single_gpu", "demo")),
        ("mps", "fp32", ("single_gpu", "demo")),
        ("cpu", "bf16", ("cpu", "demo")),
        ("cpu", "fp32", ("cpu", "demo_fp32")),
    ],
)
def test_the_demo_is_of_the_machines_size(monkeypatch, device, precision, files):
    monkeypatch.setattr(hardware, "pick_device", lambda _: torch.device(device))
    monkeypatch.setattr(hardware, "default_precision", lambda _: precision)
    assert hardware.demo_files() == files
    for folder, file in zip(("accelerate_configs", "recipes"), files, strict=True):
        assert (ROOT / folder / f"{file}.yaml").is_file()


@pytest.mark.parametrize(("dropout", "checkpointing"), [(0.1, True), (0.0, True), (0.1, False)])
def test_checkpointed_dropout_has_no_generators_of_its_own(monkeypatch, dropout, checkpointing):
    """What the seed of a micro-batch would not reach; what it means on a GPU is tested there."""
    monkeypatch.setattr(LossKernels, "compile", lambda **_: None)
    model = ModelSection(n_layer=1, n_head=2, n_embd=16, vocab_size=64, dropout=dropout)
    config = RunConfig(model=model, train=TrainSection(gradient_checkpointing=checkpointing, compile="on"))
    PartialState(cpu=True)
    with functorch.patch(graphsafe_rng_functionalization=True):
        build_model(config, None, build_accelerator(config, "fp32"), "fp32")
        assert functorch.graphsafe_rng_functionalization != (dropout > 0 and checkpointing)
    AcceleratorState._reset_state(reset_partial_state=True)


KERNEL = """
import torch
from gpt2_hf import hardware
from gpt2_hf.model.loss import LossKernels, exponentiate

hardware.keep_kernels_apart()
LossKernels.compile(dynamic=False)
logits = torch.randn(8, 1088, generator=torch.Generator().manual_seed(1))[:, :1057]
labels = torch.arange(8)
expected = exponentiate(logits.clone(), labels)
for _ in range(20):
    found = LossKernels.exponentiate(torch.empty(8, 1088)[:, :1057].copy_(logits), labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.slow
def test_a_cache_of_kernels_that_another_cpu_has_used_does_no_harm(tmp_path):
    """Code that was made for AVX2 is not compiled for AVX-512."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for capability in ("avx2", None):
        given = {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        done = subprocess.run([sys.executable, "-c", KERNEL], env=environment | given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    sources = "".join(path.read_text() for path in tmp_path.glob("*/*.py"))
    widths = set(re.findall(r"x1\+=static_cast<int64_t>\((\d+)L\)", sources))
    assert len(widths) == len({torch.backends.cpu.get_cpu_capability().lower(), "avx2"})
