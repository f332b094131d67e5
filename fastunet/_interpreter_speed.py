"""What Triton's interpreter forms anew at each op of each program, formed once.

Most of the time of an interpreted op goes to describing its result: the type of a block, its shape
as a tuple of constants, the common type of two operands, and the replacement of some 300 functions
of ``triton.language`` at each launch. None of it depends on values, so it is kept. What is computed
stays as it is.
"""

from typing import Any

import numpy as np

from fastunet._interpreter_operators import KNOWN, Operators

SEAMS = {
    "tl.block_type.__init__": "self element_ty shape",
    "tl.tensor.__init__": "self handle type",
    "tl.dtype.__eq__": "self other",
    "tl.core._unwrap_if_constexpr": "o",
    "TritonSemantic.broadcast_impl_value": "self lhs rhs",
    "TritonSemantic.binary_op_type_checking_impl": (
        "self lhs rhs allow_lhs_ptr allow_rhs_ptr arithmetic_check div_or_mod"
    ),
    "TritonSemantic.expand_dims": "self input axis",
    "TensorHandle.__post_init__": "self",
    "InterpreterBuilder.create_splat": "self ret_ty arg",
    "InterpreterBuilder.create_expand_dims": "self arg axis",
    "_LangPatchScope.set_attr": "self obj name value",
    "_patch_attr": "obj name member builder scope",
}


def keep(interpreter: Any) -> None:
    """Keep what `interpreter`, which is triton.runtime.interpreter, would form again."""
    _block_types(interpreter.tl)
    _shapes(interpreter.tl)
    _dtypes(interpreter)
    _unwrapped(interpreter.tl.core)
    _handles(interpreter)
    _broadcasts(interpreter)
    _axes(interpreter)
    _operands(interpreter)
    _builtins(interpreter)
    _patches(interpreter)


def _block_types(tl: Any) -> None:
    several = tl.core.tuple
    made: dict[tuple, dict[str, Any]] = {}
    original = tl.block_type.__init__

    def __init__(self, element_ty, shape):
        sizes = shape.values if type(shape) is several else shape
        key = (element_ty.name, *sizes)
        attributes = made.get(key)
        if attributes is None:
            original(self, element_ty, shape)  # which refuses what is no shape
            made[key] = dict(self.__dict__)
        else:
            self.__dict__.update(attributes)
            self.element_ty = element_ty

    tl.block_type.__init__ = __init__


def _shapes(tl: Any) -> None:
    original, made = tl.tensor.__init__, {}
    block_type = tl.block_type

    def __init__(self, handle, type):
        shape = type.shape if isinstance(type, block_type) else None
        kept = made.get(id(shape))
        if kept is None:
            original(self, handle, type)
            made[id(shape)] = self.numel, self.shape, shape  # which lives on, and so does its id
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape, _ = kept

    tl.tensor.__init__ = __init__


def _dtypes(interpreter: Any) -> None:
    original, made = interpreter._get_np_dtype, {}
    same = interpreter.tl.dtype.__eq__

    def _get_np_dtype(tt_dtype):
        name = tt_dtype.name
        found = made.get(name)
        if found is None:
            found = made[name] = original(tt_dtype)
        return found

    def __eq__(self, other):
        return self is other or same(self, other)

    interpreter._get_np_dtype = _get_np_dtype
    interpreter.tl.dtype.__eq__ = __eq__


def _unwrapped(core: Any) -> None:
    original, plain = core._unwrap_if_constexpr, {core.tensor, int, float, bool, type(None)}

    def _unwrap_if_constexpr(o):
        return o if type(o) in plain else original(o)

    core._unwrap_if_constexpr = _unwrap_if_constexpr


def _handles(interpreter: Any) -> None:
    builder, pointer_type = interpreter.InterpreterBuilder, interpreter.tl.pointer_type
    handle, original = interpreter.TensorHandle, builder.binary_op

    def __init__(self, data, dtype, attr=None):
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        if too_wide(data, dtype):
            self.__post_init__()  # which says so

    def too_wide(data, dtype):
        bits = 8 * data.itemsize
        return bits > 8 and type(dtype) is not pointer_type and bits > dtype.primitive_bitwidth

    def binary_op(self, lhs, rhs, op):
        dtype = lhs.dtype.scalar
        if dtype.name == "bf16":
            return original(self, lhs, rhs, op)
        data = op(lhs.data, rhs.data)
        if too_wide(data, dtype):
            data = data.astype(interpreter._get_np_dtype(dtype))
        return handle(data, dtype)

    handle.__init__, builder.binary_op = __init__, binary_op


def _broadcasts(interpreter: Any) -> None:
    semantic, tl = interpreter.TritonSemantic, interpreter.tl
    original, handle = semantic.broadcast_impl_value, interpreter.TensorHandle

    def splat(self, scalar, block):
        wide = block.with_element_ty(scalar.type.scalar)
        return self.tensor(self.builder.create_splat(wide, scalar.handle), wide)

    def expanded(self, block, sizes):
        if block.type.shape.values == sizes:
            return block
        wide = tl.block_type(block.type.scalar, sizes)
        data = np.empty(sizes, block.handle.data.dtype)
        data[...] = block.handle.data
        return self.tensor(handle(data, block.dtype), wide)

    def broadcast_impl_value(self, lhs, rhs):
        left, right = lhs.type, rhs.type
        if not left.is_block():
            return (splat(self, lhs, right), rhs) if right.is_block() else (lhs, rhs)
        if not right.is_block():
            return lhs, splat(self, rhs, left)
        sizes = left.shape.values, right.shape.values
        if sizes[0] == sizes[1]:
            return lhs, rhs
        if len(sizes[0]) != len(sizes[1]):
            return original(self, lhs, rhs)
        pairs = list(zip(*sizes, strict=True))
        if any(a != b and a != 1 and b != 1 for a, b in pairs):
            return original(self, lhs, rhs)  # which says what does not fit
        most = [b if a == 1 else a for a, b in pairs]
        return expanded(self, lhs, most), expanded(self, rhs, most)

    semantic.broadcast_impl_value = broadcast_impl_value


def _axes(interpreter: Any) -> None:
    semantic, builder, tl = (
        interpreter.TritonSemantic,
        interpreter.InterpreterBuilder,
        interpreter.tl,
    )
    handle, original = interpreter.TensorHandle, semantic.expand_dims
    splat, expand = builder.create_splat, builder.create_expand_dims

    def expand_dims(self, input, axis):
        if not input.type.is_block():
            return original(self, input, axis)
        sizes = list(input.type.shape.values)
        sizes.insert(axis, 1)
        wide = tl.block_type(input.type.scalar, sizes)
        return self.tensor(self.builder.create_expand_dims(input.handle, axis), wide)

    def create_expand_dims(self, arg, axis):
        if axis < 0:
            return expand(self, arg, axis)
        sizes = arg.data.shape
        data = arg.data.reshape(*sizes[:axis], 1, *sizes[axis:])
        return handle(data, arg.dtype.scalar)

    def create_splat(self, ret_ty, arg):
        dtype = arg.dtype
        if isinstance(dtype, tl.block_type) or not ret_ty.is_block():
            return splat(self, ret_ty, arg)
        data = np.empty(ret_ty.shape.values, interpreter._get_np_dtype(dtype))
        data[...] = arg.data
        return handle(data, dtype.scalar)

    semantic.expand_dims = expand_dims
    builder.create_expand_dims, builder.create_splat = create_expand_dims, create_splat


def _operands(interpreter: Any) -> None:
    """Two operands of one dtype need no other."""
    semantic, tensor = interpreter.TritonSemantic, interpreter.tl.tensor
    original = semantic.binary_op_type_checking_impl
    same, divided = KNOWN | {"bf16"}, KNOWN - {"fp16"}  # fp16 / fp16 is fp32

    def binary_op_type_checking_impl(
        self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True,
        div_or_mod=False,
    ):  # fmt: skip
        if type(lhs) is tensor and type(rhs) is tensor:
            dtype = lhs.dtype
            if dtype is rhs.dtype and dtype.name in (divided if div_or_mod else same):
                return self.broadcast_impl_value(lhs, rhs)
        return original(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    semantic.binary_op_type_checking_impl = binary_op_type_checking_impl


def _builtins(interpreter: Any) -> None:
    """A function of the language is called with the interpreter's semantic, and nothing between."""
    checking = interpreter.tl.core.builtin(lambda: None).__code__
    semantic, tensor = interpreter.interpreter_semantic, interpreter.tl.tensor
    operators = Operators(interpreter)
    operators.keep_casts(interpreter.TritonSemantic)

    def _patch_attr(obj, name, member, builder, scope):
        call = member.__wrapped__ if getattr(member, "__code__", None) is checking else member

        def new_member(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return call(*args, **kwargs)

        quick = operators.quick(name, new_member) if obj is tensor else new_member
        scope.set_attr(obj, name, quick)

    interpreter._patch_attr = _patch_attr


def _patches(interpreter: Any) -> None:
    """Patch ``triton.language`` once a launch, not at each call of a helper, and by a list."""
    launches: list[set[frozenset[str]]] = []  # which modules the functions of each launch see
    lists: dict[tuple, list[tuple[Any, str, Any]]] = {}
    modules: dict[Any, frozenset[str]] = {}
    languages = (interpreter.tl, interpreter.tl.core)
    run, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    nothing = interpreter._LangPatchScope()

    def __call__(self, *args, **kwargs):
        launches.append(set())
        try:
            return run(self, *args, **kwargs)
        finally:
            launches.pop()

    def _patch_lang(fn):
        if len(launches) != 1:
            return patch(fn)
        if (seen := modules.get(fn)) is None:
            used = list(fn.__globals__.values())
            seen = frozenset(m.__name__ for m in languages if any(value is m for value in used))
            modules[fn] = seen
        before = launches[-1]
        if seen in before:
            return nothing
        key = (frozenset(before), seen)
        before.add(seen)
        if key not in lists:
            scope = patch(fn)
            changed = {(owner, name): None for owner, name, _ in scope._changes}
            lists[key] = [(owner, name, getattr(owner, name)) for owner, name in changed]
            return scope
        scope = interpreter._LangPatchScope()
        for owner, name, value in lists[key]:
            scope._changes.append((owner, name, getattr(owner, name, interpreter._MISSING)))
            setattr(owner, name, value)
        return scope

    interpreter.GridExecutor.__call__ = __call__
    interpreter._patch_lang = _patch_lang
