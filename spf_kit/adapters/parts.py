"""The kinds of updates as files hold them: names of the parts, and what the parts' shapes tell. No torch.

    lora   down (r, i, h, w), up (o, r), mid (r, r, h, w) of a Tucker decomposition
    loha   hada_w1_a (o, r), hada_w1_b (r, i h w), w2 alike;
           with hada_t1 (r, r, h, w): hada_w1_a (r, o), hada_w1_b (r, i)
    lokr   lokr_w1 (a, b), or lokr_w1_a (a, r) and lokr_w1_b (r, b);
           lokr_w2 (c, d, h, w), or lokr_w2_a (c, r) and lokr_w2_b (r, d h w),
           with lokr_t2 (r, r, h, w): lokr_w2_a (r, c), lokr_w2_b (r, d); a c outputs, b d inputs
    oft    oft_blocks (k, n, n), k n outputs; rescale (o, 1)

o outputs, i inputs, h x w the kernel, r the rank. A layer may have `alpha` and DoRA's `dora_scale` beside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

COMMON = ("alpha", "dora_scale")
PARTS: Mapping[str, tuple[str, ...]] = {
    "lora": ("down", "up", "mid"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "oft": ("oft_blocks", "oft_diag", "rescale"),
}
NAMES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT"}
FILE_PARTS: Mapping[str, str] = {  # kohya's and LyCORIS' names of the parts
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    **{part: part for kind in ("loha", "lokr", "oft") for part in PARTS[kind]},
    **{part: part for part in COMMON},
}
_KINDS = {part: kind for kind, parts in PARTS.items() for part in parts}


@dataclass(frozen=True)
class Described:
    """What a layer's parts tell of it.

    `rank` 0: it is made of whole matrices, which have none. `shape` is the updated weight's as far as it is
    known: (o, i, h, w); (o, i h w) where a kernel is part of a matrix; (o,) where the inputs do not show.
    """

    kind: str
    rank: int
    shape: Shape


def describe(shapes: Shapes) -> Described:
    """The kind of a layer with parts of these shapes.

    Raises ValueError, a sentence's end, if parts are missing, of several kinds, or do not fit each other.
    """
    kinds = {_KINDS[part] for part in shapes if part in _KINDS}
    if len(kinds) > 1:
        raise ValueError(f"mixes the parts of {' and '.join(sorted(NAMES[kind] for kind in kinds))}")
    kind = kinds.pop() if kinds else "lora"
    own = {part: shape for part, shape in shapes.items() if part not in COMMON}
    if kind != "lora" and any(0 in shape for shape in own.values()):
        raise _misfit(own)
    rank, shape = _DESCRIBE[kind](own)
    return Described(kind, rank, shape)


def kind_of(layers: Collection[tuple[str, Shape, int | None]]) -> str:
    """What a file is as a whole, from each layer's kind, shape and DoRA axis: "lora", "locon" (a LoRA on
    convolutions wider than one pixel), "dora" (a LoRA with magnitudes), "loha", "lokr", "oft"; "loha+lora" if
    it has several."""
    kinds = {kind for kind, _, _ in layers}
    if kinds != {"lora"}:
        return "+".join(sorted(kinds))
    if any(axis is not None for _, _, axis in layers):
        return "dora"
    return "locon" if any(math.prod(shape[2:]) > 1 for _, shape, _ in layers) else "lora"


def fits(update: Shape, weight: Shape) -> bool:
    """Whether an update applies to a weight: the same values in the same order, where a 1x1 convolution is a
    matrix, a matrix may hold a kernel in its columns, and (o,) fits all weights of so many outputs."""
    if len(update) == 1:
        return update[0] == weight[0]
    if len(update) == 2:
        return update == (weight[0], math.prod(weight[1:]))
    return _matrix(update) == _matrix(weight)


def _matrix(shape: Shape) -> Shape:
    return shape[:2] if math.prod(shape[2:]) == 1 else shape


# --- the kinds --------------------------------------------------------------------------------------------


def _lora(shapes: Shapes) -> tuple[int, Shape]:
    missing = [f"lora_{part}" for part in ("down", "up") if part not in shapes]
    if missing:
        raise ValueError(f"has no {' and no '.join(missing)} tensor")
    down, up = shapes["down"], shapes["up"]
    if len(down) not in (2, 4) or len(up) not in (2, 4) or 0 in down or 0 in up:
        raise _misfit(shapes)
    rank, kernel = down[0], down[2:]
    if "mid" in shapes:
        mid = shapes["mid"]
        if len(mid) != 4 or mid[:2] != (rank, rank) or math.prod(kernel) != 1:
            raise _misfit(shapes)
        kernel = mid[2:]
    if up[1] != rank or math.prod(up[2:]) != 1:
        raise _misfit(shapes)
    return rank, (up[0], down[1], *kernel)


def _loha(shapes: Shapes) -> tuple[int, Shape]:
    _require(shapes, PARTS["loha"][:4])
    if ("hada_t1" in shapes) != ("hada_t2" in shapes):
        raise ValueError("has one of hada_t1 and hada_t2, which belong together")
    first, second = (_pair(shapes, f"hada_w{n}", f"hada_t{n}") for n in (1, 2))
    if first[1:] != second[1:]:
        raise _misfit(shapes)
    if first[0] != second[0]:
        raise ValueError(f"has two ranks, {first[0]} and {second[0]}: alpha / rank would mean two things")
    return first


def _lokr(shapes: Shapes) -> tuple[int, Shape]:
    """The rank of whichever factor is decomposed, the first before the second, as all loaders have it."""
    ranks, sizes = [], []
    for number in (1, 2):
        name, tucker = f"lokr_w{number}", f"lokr_t{number}"
        if name in shapes:
            if f"{name}_a" in shapes or f"{name}_b" in shapes or tucker in shapes:
                raise ValueError(f"has {name} whole and in parts")
            sizes.append(shapes[name])
        else:
            _require(shapes, (f"{name}_a", f"{name}_b"))
            rank, size = _pair(shapes, name, tucker)
            ranks.append(rank)
            sizes.append(size)
    (a, b), second = sizes[0][:2], sizes[1]
    if len(sizes[0]) != 2 or len(second) not in (2, 4):
        raise _misfit(shapes)
    return (ranks[0] if ranks else 0), (a * second[0], b * second[1], *second[2:])


def _oft(shapes: Shapes) -> tuple[int, Shape]:
    """The "rank" is the size of a block, LyCORIS' `lora_dim`."""
    names = [name for name in ("oft_blocks", "oft_diag") if name in shapes]
    if len(names) != 1:
        raise ValueError("needs one of oft_blocks and oft_diag")
    blocks = shapes[names[0]]
    if len(blocks) == 4:
        raise ValueError("is a BOFT (blocks of four dimensions), which spf-kit does not read")
    if len(blocks) != 3 or blocks[1] != blocks[2]:
        raise _misfit(shapes)
    outputs = blocks[0] * blocks[1]
    if "rescale" in shapes and math.prod(shapes["rescale"]) != outputs:
        raise _misfit(shapes)
    return blocks[1], (outputs,)


_DESCRIBE: Mapping[str, Callable[[Shapes], tuple[int, Shape]]] = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "oft": _oft,
}


def _pair(shapes: Shapes, name: str, tucker: str) -> tuple[int, Shape]:
    """Rank, and shape of a (o, r) times b (r, i ...), or of a core (r, r, h, w), a (r, o) and b (r, i)."""
    a, b = shapes[f"{name}_a"], shapes[f"{name}_b"]
    if len(a) != 2 or len(b) not in (2, 4):
        raise _misfit(shapes)
    if tucker not in shapes:
        if a[1] != b[0]:
            raise _misfit(shapes)
        return b[0], (a[0], *b[1:])
    core = shapes[tucker]
    if len(core) != 4 or core[:2] != (a[0], b[0]) or a[0] != b[0] or len(b) != 2:
        raise _misfit(shapes)
    return b[0], (a[1], b[1], *core[2:])


def _require(shapes: Shapes, names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in shapes]
    if missing:
        raise ValueError(f"has no {' and no '.join(missing)} tensor")


def _misfit(shapes: Shapes) -> ValueError:
    told = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items())
    return ValueError(f"has shapes that do not fit each other: {told}")


# --- what a new update is made of -------------------------------------------------------------------------


def factorize(size: int, factor: int = -1) -> tuple[int, int]:
    """Two factors of a size, the smaller first: nearest to `factor`, or to each other (-1), as in LyCORIS.

    128 and -1: (8, 16); 128 and 4: (4, 32); 250 and 16: (10, 25).
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    most = min(size if factor < 0 else factor, math.isqrt(size))
    small = next(part for part in range(most, 0, -1) if size % part == 0)
    return small, size // small


def new_parts(
    kind: str, weight: Shape, rank: int, *, factor: int = -1, decompose_both: bool = False, dora: bool = False
) -> dict[str, Shape]:
    """The trained parameters of a new update of a weight, by part."""
    (outputs, inputs, *kernel), columns = weight, math.prod(weight[1:])
    if kind == "lora":
        tail = [1] * len(kernel)
        found = {"down": (rank, inputs, *kernel), "up": (outputs, rank, *tail)}
        return {**found, "magnitude": (outputs,)} if dora else found
    if kind == "loha":
        return {
            f"hada_w{n}_{p}": ((outputs, rank) if p == "a" else (rank, columns)) for n in (1, 2) for p in "ab"
        }
    if kind == "lokr":
        (a, c), (b, d) = factorize(outputs, factor), factorize(inputs, factor)
        whole_first = not decompose_both or rank >= max(a, b) / 2
        first = {"lokr_w1": (a, b)} if whole_first else {"lokr_w1_a": (a, rank), "lokr_w1_b": (rank, b)}
        if rank >= max(c, d) / 2:  # a decomposition would be no smaller
            return {**first, "lokr_w2": (c, d, *kernel)}
        return {**first, "lokr_w2_a": (c, rank), "lokr_w2_b": (rank, d * math.prod(kernel))}
    size = block_size(outputs, rank)
    return {"oft_R": (outputs // size, size * (size - 1) // 2)}


def block_size(outputs: int, most: int) -> int:
    """The largest divisor of the outputs that is not above `most`."""
    return next(size for size in range(min(most, outputs), 0, -1) if outputs % size == 0)
