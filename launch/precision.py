"""How weights are held: the bytes that a rank's memory gives to each, and what NF4 makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Literal

# bitsandbytes' NF4 with double quantisation (Dettmers et al. 2023, QLoRA, arXiv:2305.14314): 4 bits an element, an 8-bit
# absolute maximum for each block of 64, a 32-bit one for each 256 of those: 4.127 bits. Each matrix has its tables besides: 16
# values of NF4 and 256 of the 8-bit type, 32-bit each, and the 32-bit mean of its maxima.
NF4_BLOCK = 64
NF4_NESTED_BLOCK = 256
NF4_TABLES = 4 * (16 + 256 + 1)
# Bytes of an element in safetensors' types. Packed 4-bit formats are told by the checkpoint's quantisation instead.
ELEMENT_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}
TORCH_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class Kind(Enum):
    """What a weight is, as far as it matters to who holds it."""

    LINEAR = "linear"
    EXPERT = "expert"
    OTHER = "other"  # norms, biases, routers, embedding, head: never quantised
    BUFFER = "buffer"  # held, but no parameter


@dataclass(frozen=True)
class Weight:
    """One tensor of a layer, or all of a layer's experts together.

    `stored` is bytes as the checkpoint has it, statistics of its quantisation included. `rows` and `columns` are of one
    matrix, `matrices` how many there are; `packed` says that the checkpoint holds it quantised.
    """

    name: str
    kind: Kind
    parameters: int
    stored: int
    rows: int = 0
    columns: int = 0
    matrices: int = 1
    packed: bool = False


@dataclass(frozen=True)
class Precision:
    """How a rank holds the model.

    `quantized` says what becomes of linear layers and experts: "nf4", or "stored" (as a quantised checkpoint has them), or
    None (unquantised; what came quantised is expanded). `element` is bytes of an unquantised number, `compute` of an activation.
    """

    quantized: Literal["nf4", "stored"] | None
    element: int
    compute: int
    experts: bool = True  # whether NF4 holds experts too

    def is_quantized(self, weight: Weight) -> bool:
        """Whether this weight is held in fewer bits."""
        if self.quantized == "stored":
            return weight.packed
        wanted = weight.kind is Kind.LINEAR or (weight.kind is Kind.EXPERT and self.experts)
        return self.quantized == "nf4" and wanted

    def size(self, weight: Weight) -> int:
        """Bytes that a rank's memory gives to a weight."""
        if not self.is_quantized(weight):
            return weight.parameters * self.element if weight.kind is not Kind.BUFFER else weight.stored
        return weight.stored if self.quantized == "stored" else nf4_size(weight.parameters, weight.matrices)


def nf4_size(elements: int, matrices: int = 1) -> int:
    """Bytes of `elements` elements in `matrices` matrices, in doubly quantised NF4."""
    blocks = math.ceil(elements / NF4_BLOCK)
    return math.ceil(elements / 2) + blocks + 4 * math.ceil(blocks / NF4_NESTED_BLOCK) + matrices * NF4_TABLES
