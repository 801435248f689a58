"""What is chosen for a machine, with the machine made up."""

import sys

import pytest
import torch
import transformers.utils as hf

from gpt2_hf import hardware

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("installed", "capability", "dropout", "expected"),
    [
        ((4, 3, 2), (9, 0), 0.0, "flash_attention_4"),
        ((3, 2), (9, 0), 0.0, "flash_attention_3"),
        ((3, 2), (9, 0), 0.1, "flash_attention_2"),  # 3 would leave dropout out without a word
        ((3, 2), (8, 0), 0.0, "flash_attention_2"),
        ((2,), (7, 5), 0.0, "sdpa"),
        ((), (9, 0), 0.0, "sdpa"),
    ],
)
def test_auto_attention_fits_the_card(monkeypatch, installed, capability, dropout, expected):
    for version in (2, 3, 4):
        monkeypatch.setattr(hf, f"is_flash_attn_{version}_available", lambda v=version: v in installed, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    name, why = hardware.choose_attention("auto", CUDA, "bf16", dropout)
    assert name == expected and why
    assert hardware.choose_attention("auto", CUDA, "fp32", dropout)[0] == "sdpa"
    assert hardware.choose_attention("eager", CUDA, "bf16", dropout) == ("eager", "asked for")


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
    assert hardware.compile_obstacle(torch.device("mps")) is not None


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40", 181), ("NVIDIA L4", 121)],
)
def test_peak_of_known_cards(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert hardware.peak_flops(CUDA, torch.bfloat16)[0] == teraflops * 1e12


def test_peak_of_this_cpu_is_measured():
    peak, source = hardware.peak_flops(CPU, torch.float32)
    assert 1e9 < peak < 1e14 and "measured" in source


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_precision_follows_the_cpu(monkeypatch):
    for has_bf16 in (True, False):
        monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda has_bf16=has_bf16: has_bf16)
        assert hardware.default_precision(CPU) == ("bf16" if has_bf16 else "fp32")
