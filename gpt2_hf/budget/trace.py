"""One training step, launched on nothing: which kernels it would launch on a card, in order, with the bytes of each.

The step is training's own: its model, optimizers, compiler and ``train_step``, on tensors without memory. The compiler
writes its kernels for the card and the code that allocates for them and launches them; that code runs, each kernel only
notes that it was launched. Everything else is an operator, which notes so as well.

For a process that ``stand_in`` has prepared, and no other.
"""

from __future__ import annotations

import ast
import functools
import linecache
import re
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters, get_compilation_metrics
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from torch._ops import OpOverload
from torch._prims.rng_prims import run_and_save_rng_state
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..config import RunConfig
from ..model import GPTForCausalLM
from ..program import UserError
from ..training.build import DTYPES, build_accelerator, build_model, set_precision
from ..training.distributed import distribute
from ..training.loop import train_step
from ..training.optim import WeightAverage, build_optimizers
from .launches import HEAD, REST, UPDATE, Launch, Trace
from .stand_in import put

PACKAGE = Path(__file__).parent.parent

# Part of a step by the file that launches; what is compiled elsewhere is named after the function.
PARTS = {"model/loss.py": HEAD, "training/optim.py": UPDATE, "training/distributed.py": UPDATE}

ALLOCATION = 512  # bytes that PyTorch's allocator rounds up to

ATTENTION = re.compile(r"attention|flex")
# Operators that write their first argument without reading it.
OVERWRITES = {"copy_", "fill_", "zero_"}
# Of their first argument, operators that read (or add to) only the rows that the others choose.
CHOOSE = {"embedding": 1, "index_select": 1, "index": 1, "gather": 1, "index_add_": 3, "index_put_": 2, "scatter_": 3}


def trace_step(config: RunConfig) -> Trace:
    """The second step of a run of ``config`` on one card, with at most two micro-steps."""
    recorder = Recorder()
    _generate_code_only(recorder)
    n_micro_steps = min(2, config.grad_accum_steps(1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        precision = set_precision(config, torch.device("cuda"))
        accelerator = build_accelerator(config, precision)
        put(GPTForCausalLM, to=_move)
        bare_model = build_model(config, None, accelerator, precision)
        model = distribute(bare_model, accelerator, None, DTYPES[precision])
        optimizers = build_optimizers(bare_model, config.optim, accelerator.device)
        accelerator.prepare(*optimizers)
        if config.optim.ema:
            optimizers.append(WeightAverage(bare_model.parameters(), config.optim.ema))
        batch = torch.zeros(n_micro_steps, config.train.micro_batch_size, config.data.seq_len + 1, dtype=torch.int64)
        with recorder:
            train_step(accelerator, model, optimizers, batch, 0, config)
            n_compiled = len(get_compilation_metrics())
            recorder.hold([*bare_model.parameters(), *(optimizer.state for optimizer in optimizers)])
            recorder.is_on = True
            train_step(accelerator, model, optimizers, batch, 1, config, safe_point=recorder.next_micro_step)
    trace = recorder.trace
    trace.graph_breaks = [f"{reason} ({count})" for reason, count in counters["graph_break"].items()]
    trace.recompilations = [
        str(metrics.recompile_reason or metrics.co_name) for metrics in get_compilation_metrics()[n_compiled:]
    ]
    return trace


def _move(model: nn.Module, device: torch.device) -> nn.Module:
    """``model.to(device)``, which cannot exchange what is behind a parameter without memory: by new parameters."""
    moved: dict[nn.Parameter, nn.Parameter] = {}  # a tied one stays one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in moved:
                    moved[parameter] = nn.Parameter(torch.empty_like(parameter, device=device))
                module._parameters[name] = moved[parameter]
    return model


class Recorder(TorchDispatchMode):
    """Notes every operator on the device, and the life of every tensor there."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self.micro_step, self.part = 0, ""
        self.is_on = False
        self._held: set[int] = set()
        self._n_held = 0

    # Checkpointed graphs run an operator by another that keeps the generator's state.
    supports_higher_order_operators = True

    # The compiler looks away from such a mode, and does not mind it.
    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def next_micro_step(self) -> None:
        self.micro_step += 1

    def note(self, name: str, kind: str, n_bytes: int, flops: int = 0, is_narrow: bool = False) -> None:
        part = self.part or _part_here()
        self.trace.launches.append(Launch(part, name, kind, n_bytes, flops, is_narrow, self.micro_step))

    def hold(self, values: Any) -> None:
        """Count the memory of these tensors, from now until they are freed."""
        for tensor in tree_leaves(values):
            if not _is_on_device(tensor) or tensor.untyped_storage()._cdata in self._held:
                continue
            storage = tensor.untyped_storage()
            size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
            self._held.add(storage._cdata)
            self._n_held += size
            self.trace.peak_bytes = max(self.trace.peak_bytes, self._n_held)
            weakref.finalize(storage, self._free, storage._cdata, size)

    def _free(self, key: int, size: int) -> None:
        self._held.discard(key)
        self._n_held -= size

    @contextmanager
    def compiled(self, part: str) -> Iterator[None]:
        """Inside, what is launched is a compiled function's."""
        if self.is_on and self.micro_step == 0:
            self.trace.calls[part] = self.trace.calls.get(part, 0) + 1
        self.part, before = part, self.part
        try:
            yield
        finally:
            self.part = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            position = next(i for i, value in enumerate(args) if isinstance(value, OpOverload))
            inner = {name: value for name, value in kwargs.items() if name != "rng_state"}
            out = self.__torch_dispatch__(args[position], types, args[position + 1 :], inner)
            return (torch.cuda.get_rng_state(), out) if func is run_and_save_rng_state else out
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and _is_on_device(inputs[0]):
            if self.is_on:
                self.trace.host_waits.append(f"a number is read in {_place()}")
            return 0
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise UserError(f"{func} in {_place()} makes the host wait for its result: there is none here") from None
        if not self.is_on:
            return out
        self.hold(out)
        outputs = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        if any(map(_is_on_device, inputs + outputs)) and _launches(func, inputs, outputs):
            self._note_operator(func, args, kwargs, out)
            if _waits(inputs, outputs, kwargs):
                self.trace.host_waits.append(f"a copy between host and device in {_place()}")
        return out

    def _note_operator(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._schema.name.partition("::")[2]
        count = flop_registry.get(func._overloadpacket)
        factors = [value for value in args if not isinstance(value, torch.dtype)]  # of addmm: the result's
        flops = count(*factors, **kwargs, out_val=out) if count else 0
        kind = "elementwise" if count is None else "attention" if ATTENTION.search(name) else "product"
        if kind == "attention" and _argument(func, args, kwargs, "is_causal"):
            flops //= 2
        given = [value for value in tree_leaves(args) if isinstance(value, Tensor)][:3]
        shapes = " ".join("x".join(map(str, value.shape)) or "1" for value in given)
        name = name.removeprefix("_scaled_dot_product_")
        self.note(f"{name} {shapes}", kind, operator_bytes(func, args, kwargs, out), flops)


def _is_on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def _launches(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether an operator is a kernel: neither a view nor an allocation."""
    if func is torch.ops.aten.copy_.default and _is_same_view(*inputs[:2]):  # x[a:b] += y ends with such a one
        return False
    if func._schema.is_mutable:
        return True
    known = {value.untyped_storage()._cdata for value in inputs}
    is_view = all(value.untyped_storage()._cdata in known for value in outputs)
    return not is_view and "empty" not in func._schema.name


def _is_same_view(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory."""
    is_alias = a.untyped_storage()._cdata == b.untyped_storage()._cdata and a.storage_offset() == b.storage_offset()
    return is_alias and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _waits(inputs: list[Tensor], outputs: list[Tensor], kwargs: dict[str, Any]) -> bool:
    """Whether an operator copies between host and device while the host stands still."""
    where = {value.device.type for value in (*inputs, *outputs) if value.ndim}
    return len(where) > 1 and not kwargs.get("non_blocking", False)


def _argument(func: Any, args: Any, kwargs: Any, name: str) -> Any:
    return dict(zip((a.name for a in func._schema.arguments), args, strict=False)).get(name, kwargs.get(name))


def operator_bytes(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """What an operator reads and writes on the device: each operand once, each result once."""
    name = func._schema.name.partition("::")[2]
    seen = set()
    sizes = []
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        tensors = [tensor for tensor in tree_leaves(value) if _is_on_device(tensor)]
        seen |= {tensor.untyped_storage()._cdata for tensor in tensors}
        size = sum(map(_n_bytes, tensors))
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        is_read = not argument.is_out and not (position == 0 and name in OVERWRITES)
        # Fused AdamW may write its gradients, where it has to unscale them.
        is_written = is_written and not (
            argument.name == "grads" and _argument(func, args, kwargs, "grad_scale") is None
        )
        sizes.append(size * (is_written + is_read))
    results = [t for t in tree_leaves(out) if _is_on_device(t) and t.untyped_storage()._cdata not in seen]
    if (chosen_by := CHOOSE.get(name)) is not None:
        rows = sum(map(_n_bytes, results)) if results else 2 * sizes[chosen_by]
        sizes[0] = min(sizes[0], rows)
    return sum(sizes) + sum(map(_n_bytes, results))


def _n_bytes(tensor: Tensor) -> int:
    """Of the numbers that are in memory: one that is expanded is there once."""
    lengths = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return prod(lengths) * tensor.element_size()


# Where something is launched


def _frames() -> Iterator[tuple[str, str, int]]:
    """File within the package, function and line of the Python frames here, from the innermost."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(f"{PACKAGE}/") and not path.startswith(f"{PACKAGE}/budget/"):
            yield path[len(str(PACKAGE)) + 1 :], frame.f_code.co_name, frame.f_lineno
        frame = frame.f_back


def _part_here() -> str:
    return next((PARTS[path] for path, _, _ in _frames() if path in PARTS), REST)


def _place() -> str:
    path, function, line = next(_frames(), ("the backward pass", "", 0))
    return f"{path}:{line} ({function})" if line else path


@functools.cache
def _function_at(path: str, line: int) -> str:
    """The qualified name of the function that a line stands in."""
    found = ""

    def visit(node: ast.AST, prefix: str) -> None:
        nonlocal found
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef) and child.lineno <= line <= (child.end_lineno or 0):
                found = f"{prefix}{child.name}"
                visit(child, f"{found}.")

    visit(ast.parse("".join(linecache.getlines(path))), "")
    return found


# The compiler's side


def _generate_code_only(recorder: Recorder) -> None:
    """Have the compiler write code for the card, and run of it all but the kernels."""
    from torch._functorch import config as autograd_config
    from torch._inductor import config
    from torch._inductor.fx_passes import fuse_attention, joint_graph, pad_mm

    put(config, force_disable_caches=True, compile_threads=1)
    put(config, profile_bandwidth=True)  # each kernel's source then has its bytes
    put(autograd_config, enable_autograd_cache=False)
    # These compute on the device while they compile. None has anything to do in GPT-2.
    put(joint_graph, constant_fold_uniform_value=_do_nothing)
    put(fuse_attention, _sfdp_init=_do_nothing)
    put(pad_mm, _pad_mm_init=_do_nothing)
    # Or each parameter would have kernels of its own in the update.
    _foreach_utils._foreach_supported_types.append(FakeTensor)
    put(torch._C._dynamo.guards, _empty_strided_cuda=_empty_strided, _reinterpret_tensor=_reinterpret)
    put(AsyncCompile, triton=lambda self, name, source, **device: Kernel(recorder, name, source))
    load = GraphLowering._compile_to_module_lines

    def load_named(graph: Any, code: Any) -> Any:
        module: Any = load(graph, code)
        call, part = module.call, _part_of(graph)
        recorder.trace.code[f"{len(recorder.trace.code)} {part}"] = code.value

        def call_named(args: Any) -> Any:
            with recorder.compiled(part):
                return call(args)

        module.call = call_named
        return module

    put(GraphLowering, _compile_to_module_lines=load_named)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _empty_strided(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


def _reinterpret(tensor: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
    return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)


def _part_of(graph: Any) -> str:
    """The function that a graph was compiled from: the outermost of the package's in its stack traces."""
    for node in graph.module.graph.nodes:
        for path, line in re.findall(r'File "(.*?)", line (\d+)', node.meta.get("stack_trace") or ""):
            if path.startswith(f"{PACKAGE}/"):
                known = PARTS.get(path[len(str(PACKAGE)) + 1 :])
                return known or f"{_function_at(path, int(line))}, {'backward' if graph.is_backward else 'forward'}"
    return REST


class Kernel:
    """What the compiler's code launches instead of a Triton kernel."""

    def __init__(self, recorder: Recorder, name: str, source: str):
        self.recorder, self.name = recorder, name.removeprefix("triton_")
        gigabytes = re.search(r"'kernel_num_gb': ([0-9.e+-]+)", source)
        self.n_bytes = round(float(gigabytes[1]) * 1e9) if gigabytes else None
        self.is_narrow = is_narrow(source)

    def run(self, *args: Any, **kwargs: Any) -> None:
        if self.recorder.is_on:
            n_bytes = sum(map(_n_bytes, filter(_is_on_device, args))) if self.n_bytes is None else self.n_bytes
            self.recorder.note(self.name, "elementwise", n_bytes, is_narrow=self.is_narrow)


def is_narrow(source: str) -> bool:
    """Whether a kernel must read and write 2-byte numbers one by one: where rows of them begin at any address.

    Triton proves that 16 bytes begin at a multiple of 16 from the length of rows, by which it masks and divides.
    """
    if not re.search(r"'\*(bf|fp)16'", source):
        return False
    lengths = re.findall(r"(?:xindex|r0_index) % (\d+)", source)
    inner = "r0_numel" if "ReductionHint.INNER" in source else "xnumel"
    lengths += re.findall(rf"^ +{inner} = (\d+)$", source, re.MULTILINE)
    return any(int(length) % 8 for length in lengths if int(length) > 1)
