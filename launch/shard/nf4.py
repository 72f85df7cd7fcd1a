"""Weights in NF4, doubly quantised, fused experts too: bitsandbytes' format and kernels; its own modules leave experts 16-bit.

NF4 and double quantisation: Dettmers et al. 2023, QLoRA, arXiv:2305.14314.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import (
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    get_4bit_type,
    quantize_4bit,
    quantize_blockwise,
)
from torch import nn

from launch.precision import NF4_BLOCK, NF4_NESTED_BLOCK

# What a saved stack of experts has beside its packed elements, after the parameter's own name.
STATISTICS = ("absmax", "nested_absmax", "quant_state.nested_offset")
# Elements quantised at a time, a multiple of the blocks.
PIECE = 1 << 17
Adapt = Callable[[int, torch.Tensor], torch.Tensor]


def quantize(matrix: torch.Tensor) -> tuple[torch.Tensor, QuantState]:
    """What bitsandbytes makes of `matrix` on its device, doubly quantised: the same bytes, but in pieces.

    Its CPU kernel takes 24 bytes for each element while it works.
    """
    return quantize_pieces(split(matrix), matrix.shape, matrix.dtype, matrix.device)


def split(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The elements of `matrix` in order, in pieces as `quantize_pieces` takes them."""
    return torch.split(matrix.contiguous().view(-1), PIECE)


@torch.no_grad()
def quantize_pieces(
    pieces: Iterable[torch.Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, QuantState]:
    """As `quantize`, of a matrix that is never there as a whole: its elements come in order, whole blocks of 64 in each piece."""
    packed = torch.empty(-(-shape.numel() // 2), 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-shape.numel() // NF4_BLOCK), dtype=torch.float32, device=device)
    start = 0
    for piece in pieces:
        made, state = quantize_4bit(piece, blocksize=NF4_BLOCK, quant_type="nf4")
        packed[start // 2 : start // 2 + made.numel()] = made.view(-1, 1)
        absmax[start // NF4_BLOCK : start // NF4_BLOCK + state.absmax.numel()] = state.absmax
        start += piece.numel()
    offset = absmax.mean()
    nested, outer = quantize_blockwise(absmax - offset, blocksize=NF4_NESTED_BLOCK)
    whole = QuantState(
        absmax=nested,
        shape=shape,
        dtype=dtype,
        blocksize=NF4_BLOCK,
        code=get_4bit_type("nf4", device=device),
        quant_type="nf4",
        offset=offset,
        state2=outer,
    )
    return packed, whole


class ExpertStack(nn.Module):
    """The matrices of all experts of a layer, [experts, rows, columns], held in NF4, each quantised by itself.

    Indexed like the parameter whose place it takes, it gives one expert's matrix, dequantised for as long as that is used. In a
    torch function it stands for the whole stack. `adapt`, where set, is called with an expert's number and its matrix, and
    what it returns is used instead: a LoRA adapter's hook.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor
    nested_offset: torch.Tensor
    code: torch.Tensor
    nested_code: torch.Tensor

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.adapt: Adapt | None = None
        for name in ("packed", "absmax", "nested_absmax", "nested_offset", "code", "nested_code"):
            self.register_buffer(name, None, persistent=False)
        self._is_hf_initialized = True  # transformers would draw random weights for it

    def allocate(self, device: torch.device) -> None:
        """Take the memory, to be filled expert by expert."""
        sizes = stored_shapes(self.shape)
        self.packed = torch.empty(sizes[""][0], dtype=torch.uint8, device=device)
        self.absmax = torch.empty(sizes["absmax"][0], dtype=torch.uint8, device=device)
        self.nested_absmax = torch.empty(sizes["nested_absmax"][0], dtype=torch.float32, device=device)
        self.nested_offset = torch.empty(self.shape[0], dtype=torch.float32, device=device)
        self.code = get_4bit_type("nf4", device=device)
        self.nested_code = create_dynamic_map().to(device)

    def put(self, index: int, matrix: torch.Tensor) -> None:
        """Quantise `matrix`, [rows, columns] on this stack's device, as expert `index`."""
        self.put_pieces(index, split(matrix))

    @torch.no_grad()
    def put_pieces(self, index: int, pieces: Iterable[torch.Tensor]) -> None:
        """As `put`, of a matrix whose elements come in pieces."""
        packed, state = quantize_pieces(pieces, torch.Size(self.shape[1:]), self.dtype, self.packed.device)
        self.packed[index] = packed.view(-1)
        self.absmax[index] = state.absmax
        self.nested_absmax[index] = state.state2.absmax
        self.nested_offset[index] = state.offset

    def stored(self) -> dict[str, torch.Tensor]:
        """Its tensors by what their names in a checkpoint end with, "" for the elements."""
        own = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        return dict(zip(("", *STATISTICS), own, strict=True))

    @torch.no_grad()
    def dequantized(self, index: int) -> torch.Tensor:
        """Expert `index`, [rows, columns], without any adapter."""
        nested = QuantState(
            absmax=self.nested_absmax[index], blocksize=NF4_NESTED_BLOCK, code=self.nested_code, dtype=torch.float32
        )
        state = QuantState(
            absmax=self.absmax[index],
            shape=self.shape[1:],
            dtype=self.dtype,
            blocksize=NF4_BLOCK,
            code=self.code,
            quant_type="nf4",
            offset=self.nested_offset[index],
            state2=nested,
        )
        matrix: torch.Tensor = dequantize_4bit(self.packed[index].view(-1, 1), state)
        return matrix

    def __getitem__(self, index: int | torch.Tensor) -> torch.Tensor:
        number = int(index)
        matrix = self.dequantized(number)
        if self.adapt is not None:
            matrix = self.adapt(number, matrix)
        _remember(matrix, self, number)
        return matrix

    def size(self, dimension: int | None = None) -> Any:
        """As a tensor's."""
        return self.shape if dimension is None else self.shape[dimension]

    def whole(self) -> torch.Tensor:
        """All experts, dequantised: for architectures whose forward pass takes them at once."""
        return torch.stack([self[index] for index in range(self.shape[0])])

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        full = [argument.whole() if isinstance(argument, ExpertStack) else argument for argument in args]
        return function(*full, **(kwargs or {}))


def stored_shapes(shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each tensor that a stack of `shape` is stored as, by what its name ends with."""
    experts, elements = shape[0], shape[1] * shape[2]
    blocks = -(-elements // NF4_BLOCK)
    return {
        "": ((experts, -(-elements // 2)), torch.uint8),
        "absmax": ((experts, blocks), torch.uint8),
        "nested_absmax": ((experts, -(-blocks // NF4_NESTED_BLOCK)), torch.float32),
        "quant_state.nested_offset": ((experts,), torch.float32),
    }


# Dequantised experts in use by the module whose forward pass runs, by address: so that autograd keeps their numbers instead.
_in_use: list[dict[int, tuple[weakref.ref[torch.Tensor], ExpertStack, int]]] = []


def _remember(matrix: torch.Tensor, stack: ExpertStack, index: int) -> None:
    if _in_use:
        _in_use[-1][matrix.data_ptr()] = (weakref.ref(matrix), stack, index)


class _Again:
    """Stands in the autograd graph for a dequantised expert, or a view of one, and makes it anew in the backward pass."""

    def __init__(self, stack: ExpertStack, index: int, like: torch.Tensor) -> None:
        self.stack, self.index = stack, index
        self.shape, self.stride, self.offset = like.shape, like.stride(), like.storage_offset()

    @torch.no_grad()
    def tensor(self) -> torch.Tensor:
        matrix = self.stack.dequantized(self.index)
        if self.stack.adapt is not None:
            matrix = self.stack.adapt(self.index, matrix)
        return matrix.as_strided(self.shape, self.stride, self.offset)


@contextmanager
def _lean() -> Iterator[None]:
    """Within it autograd saves which expert it needs instead of its dequantised matrix: a layer's would fill the memory."""
    known: dict[int, tuple[weakref.ref[torch.Tensor], ExpertStack, int]] = {}
    _in_use.append(known)

    def pack(tensor: torch.Tensor) -> Any:
        found = known.get(tensor.untyped_storage().data_ptr())
        alive = found is not None and found[0]() is not None  # else the address has become another tensor's
        return _Again(found[1], found[2], tensor) if found and alive and tensor.dtype == found[1].dtype else tensor

    def unpack(saved: Any) -> torch.Tensor:
        return saved.tensor() if isinstance(saved, _Again) else saved

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _in_use.pop()


def is_fused(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter of this name is a stack of experts."""
    return parameter.ndim == 3 and ".experts." in f".{name}" and not name.endswith("bias")


def replace_experts(model: nn.Module, names: set[str], dtype: torch.dtype) -> None:
    """Put empty stacks, in place, where `model` has the fused experts `names`."""
    for path in sorted(names):
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        shape = tuple(getattr(module, name).shape)
        delattr(module, name)
        module.add_module(name, ExpertStack(shape, dtype))
        if not getattr(module, "_is_hf_initialized", False):  # its first stack
            _mark(module)
            _wrap(module)


def _mark(module: Any) -> None:
    module._is_hf_initialized = True


def _wrap(module: nn.Module) -> None:
    forward = module.forward

    def lean(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with _lean():
            return forward(*args, **kwargs)

    module.forward = lean


def replace_linears(model: nn.Module, names: set[str], dtype: torch.dtype) -> None:
    """Put empty 4-bit modules, in place, where `model` has the linear modules `names`."""
    for path in sorted(names):
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        old = getattr(module, name)
        made = bnb.nn.Linear4bit(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            compute_dtype=dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        made.weight = None  # what is not there yet is not allocated either
        made._is_hf_initialized = True
        if old.bias is not None:
            made.bias = nn.Parameter(old.bias, requires_grad=False)
        setattr(module, name, made)


def put_linear(module: Any, pieces: Iterable[torch.Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """Quantise the elements of a matrix, [out, in], that come in pieces, as the weight of a 4-bit module."""
    shape = torch.Size((module.out_features, module.in_features))
    packed, state = quantize_pieces(pieces, shape, dtype, device)
    put_packed(module, packed, state.as_dict(packed=True), device)


def put_packed(module: Any, packed: torch.Tensor, statistics: dict[str, torch.Tensor], device: torch.device) -> None:
    """Take `packed` and what belongs to it, named as bitsandbytes names it, as the weight of a 4-bit module."""
    module.weight = bnb.nn.Params4bit.from_prequantized(
        data=packed, quantized_stats=dict(statistics), requires_grad=False, device=device, module=module
    )
