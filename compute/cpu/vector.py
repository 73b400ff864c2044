"""A vector of 16 float32 lanes for numba, so that kernels say what the processor does.

LLVM lowers it to whatever registers there are (AVX-512, AVX2, NEON). Addresses are plain
integers. Every sum a kernel makes is written out as fused multiply-adds in a fixed order: no
compiler option decides how a result rounds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

LANES = 16
VECTOR_BYTES = 4 * LANES


class _VectorType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


_INT = ir.IntType(32)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(_INT, LANES)
_vector = _VectorType()


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)  # type: ignore[no-untyped-call]


def operation(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a numba function of ``(result)(arguments)`` from one that emits LLVM instructions."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            made = emit(builder, *values)
            return context.get_dummy_value() if made is None else made

        def typer(context: Any, *given: Any) -> Any:
            return result(*arguments), generate

        names = ["context", *(f"a{i}" for i in range(len(arguments)))]
        by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
        typer.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, by_position) for name in names]
        )
        return intrinsic(typer)

    return decorate


def _all(value: float | int, kind: Any = _INTS) -> Any:
    return ir.Constant(kind, [value] * LANES)


def _at(builder: Any, address: Any, kind: Any, align: int) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def external(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """A function that the linker or LLVM itself provides."""
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def _call(builder: Any, name: str, *values: Any) -> Any:
    return builder.call(external(builder, name, _FLOATS, *(v.type for v in values)), values)


_i64, _f32, _void = types.int64, types.float32, types.void


@operation(_vector, _i64)
def load(builder: Any, address: Any) -> Any:
    """16 floats at an address."""
    return _at(builder, address, _FLOATS, 4)


@operation(_void, _i64, _vector)
def store(builder: Any, address: Any, value: Any) -> Any:
    """Write 16 floats to an address."""
    builder.store(value, builder.inttoptr(address, _FLOATS.as_pointer()), align=4)


@operation(_f32, _i64)
def load_one(builder: Any, address: Any) -> Any:
    """The float at an address."""
    return _at(builder, address, ir.FloatType(), 4)


@operation(_void, _i64, _f32)
def store_one(builder: Any, address: Any, value: Any) -> Any:
    """Write one float to an address."""
    builder.store(value, builder.inttoptr(address, ir.FloatType().as_pointer()), align=4)


@operation(_f32, _i64)
def load_half_one(builder: Any, address: Any) -> Any:
    """The IEEE half at an address, widened."""
    return builder.fpext(_at(builder, address, ir.HalfType(), 2), ir.FloatType())


@operation(_f32, _i64)
def load_bfloat_one(builder: Any, address: Any) -> Any:
    """The bfloat16 at an address, widened."""
    bits = builder.zext(_at(builder, address, ir.IntType(16), 2), _INT)
    return builder.bitcast(builder.shl(bits, _INT(16)), ir.FloatType())


@operation(_i64, _i64)
def load_long(builder: Any, address: Any) -> Any:
    """The 64-bit integer at an address."""
    return _at(builder, address, ir.IntType(64), 8)


@operation(_void, _i64, _i64)
def store_long(builder: Any, address: Any, value: Any) -> Any:
    """Write a 64-bit integer to an address."""
    builder.store(value, builder.inttoptr(address, ir.IntType(64).as_pointer()), align=8)


@operation(_i64, _i64)
def load_byte_one(builder: Any, address: Any) -> Any:
    """The byte at an address, 0 to 255."""
    return builder.zext(_at(builder, address, ir.IntType(8), 1), ir.IntType(64))


@operation(types.voidptr, _i64)
def pointer(builder: Any, address: Any) -> Any:
    """An address as what numba makes arrays of."""
    return builder.inttoptr(address, ir.IntType(8).as_pointer())


@operation(_vector, _f32)
def splat(builder: Any, value: Any) -> Any:
    """One float in all lanes."""
    nothing = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(nothing, value, _INT(0))
    return builder.shuffle_vector(first, nothing, _all(0))


@operation(_vector)
def lane_numbers(builder: Any) -> Any:
    """0.0, 1.0 to 15.0."""
    return ir.Constant(_FLOATS, [float(i) for i in range(LANES)])


@operation(_vector, _vector, _vector, _vector)
def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` rounded once."""
    return _call(builder, "llvm.fma.v16f32", a, b, c)


@operation(_vector, _vector, _vector)
def add(builder: Any, a: Any, b: Any) -> Any:
    """``a + b``."""
    return builder.fadd(a, b)


@operation(_vector, _vector, _vector)
def sub(builder: Any, a: Any, b: Any) -> Any:
    """``a - b``."""
    return builder.fsub(a, b)


@operation(_vector, _vector, _vector)
def mul(builder: Any, a: Any, b: Any) -> Any:
    """``a * b``."""
    return builder.fmul(a, b)


@operation(_vector, _vector, _vector)
def div(builder: Any, a: Any, b: Any) -> Any:
    """``a / b``."""
    return builder.fdiv(a, b)


@operation(_vector, _vector, _vector)
def larger(builder: Any, a: Any, b: Any) -> Any:
    """The larger of each lane; NaN in ``a`` is kept."""
    return builder.select(builder.fcmp_ordered("<", a, b), b, a)


@operation(_vector, _vector, _vector, _vector, _vector)
def where_less(builder: Any, a: Any, b: Any, then: Any, other: Any) -> Any:
    """``then`` in lanes where ``a < b``, else ``other``."""
    return builder.select(builder.fcmp_ordered("<", a, b), then, other)


@operation(_vector, _vector)
def nearest(builder: Any, a: Any) -> Any:
    """Each lane rounded to the nearest integer, ties to even."""
    return _call(builder, "llvm.rint.v16f32", a)


@operation(_vector, _vector)
def power_of_two(builder: Any, a: Any) -> Any:
    """``2 ** a`` for whole numbers from -126 to 127."""
    whole = builder.add(builder.fptosi(a, _INTS), _all(127))
    return builder.bitcast(builder.shl(whole, _all(23)), _FLOATS)


def _fold(builder: Any, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Halve the vector until one lane is left: a fixed tree, the same on every processor."""
    nothing = ir.Constant(_FLOATS, ir.Undefined)
    width = LANES // 2
    while width:
        mask = ir.Constant(_INTS, [(i + width) % LANES for i in range(LANES)])
        value = combine(value, builder.shuffle_vector(value, nothing, mask))
        width //= 2
    return builder.extract_element(value, _INT(0))


@operation(_f32, _vector)
def total(builder: Any, a: Any) -> Any:
    """Sum of the lanes."""
    return _fold(builder, a, builder.fadd)


@operation(_f32, _vector)
def peak(builder: Any, a: Any) -> Any:
    """Largest lane."""
    return _fold(builder, a, lambda x, y: builder.select(builder.fcmp_ordered("<", x, y), y, x))


def _bytes(builder: Any, address: Any) -> Any:
    return _at(builder, address, ir.VectorType(ir.IntType(8), LANES), 1)


@operation(_vector, _i64)
def load_low_nibbles(builder: Any, address: Any) -> Any:
    """The low four bits of 16 bytes, as numbers 0 to 15."""
    wide = builder.zext(_bytes(builder, address), _INTS)
    return builder.sitofp(builder.and_(wide, _all(15)), _FLOATS)


@operation(_vector, _i64)
def load_high_nibbles(builder: Any, address: Any) -> Any:
    """The high four bits of 16 bytes, as numbers 0 to 15."""
    wide = builder.zext(_bytes(builder, address), _INTS)
    return builder.sitofp(builder.lshr(wide, _all(4)), _FLOATS)


@operation(_vector, _i64)
def load_int8(builder: Any, address: Any) -> Any:
    """16 signed bytes."""
    return builder.sitofp(builder.sext(_bytes(builder, address), _INTS), _FLOATS)


@operation(_vector, _i64)
def load_half(builder: Any, address: Any) -> Any:
    """16 IEEE halves, widened."""
    return builder.fpext(_at(builder, address, ir.VectorType(ir.HalfType(), LANES), 2), _FLOATS)


@operation(_vector, _i64)
def load_bfloat(builder: Any, address: Any) -> Any:
    """16 bfloat16, widened."""
    halves = _at(builder, address, ir.VectorType(ir.IntType(16), LANES), 2)
    wide = builder.shl(builder.zext(halves, _INTS), _all(16))
    return builder.bitcast(wide, _FLOATS)


@operation(_void, _i64)
def prefetch(builder: Any, address: Any) -> Any:
    """Ask for the cache line at an address; harmless where nothing is mapped."""
    byte = ir.IntType(8).as_pointer()
    function = external(builder, "llvm.prefetch.p0", ir.VoidType(), byte, _INT, _INT, _INT)
    builder.call(function, [builder.inttoptr(address, byte), _INT(0), _INT(3), _INT(1)])
