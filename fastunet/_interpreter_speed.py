"""What Triton's interpreter forms anew at each op of each program, formed once.

Most of the time of an interpreted op goes to describing its result: the type of a block, its shape
as a tuple of constants, and the replacement of some 300 functions of ``triton.language`` at each
launch. None of it depends on values, so it is kept. What is computed stays as it is.
"""

from typing import Any

SEAMS = {
    "tl.block_type.__init__": "self element_ty shape",
    "tl.tensor.__init__": "self handle type",
    "tl.dtype.__eq__": "self other",
    "TritonSemantic.broadcast_impl_value": "self lhs rhs",
    "_LangPatchScope.set_attr": "self obj name value",
}


def keep(interpreter: Any) -> None:
    """Keep what `interpreter`, which is triton.runtime.interpreter, would form again."""
    _block_types(interpreter.tl)
    _shapes(interpreter.tl)
    _dtypes(interpreter)
    _broadcasts(interpreter)
    _patches(interpreter)


def _block_types(tl: Any) -> None:
    constexpr, several = tl.constexpr, tl.core.tuple
    made: dict[tuple, dict[str, Any]] = {}
    original = tl.block_type.__init__

    def __init__(self, element_ty, shape):
        sizes = shape.values if type(shape) is several else shape
        key = (element_ty.name, *[s.value if type(s) is constexpr else s for s in sizes])
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
        sizes = tuple(type.shape.values) if isinstance(type, block_type) else ()
        kept = made.get(sizes)
        if kept is None:
            original(self, handle, type)
            made[sizes] = self.numel, self.shape
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = kept

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


def _broadcasts(interpreter: Any) -> None:
    semantic, tl = interpreter.TritonSemantic, interpreter.tl
    original = semantic.broadcast_impl_value

    def splat(self, scalar, block):
        wide = block.with_element_ty(scalar.type.scalar)
        return self.tensor(self.builder.create_splat(wide, scalar.handle), wide)

    def expanded(self, block, sizes):
        if block.type.shape.values == sizes:
            return block
        wide = tl.block_type(block.type.scalar, sizes)
        return self.tensor(self.builder.create_broadcast(block.handle, sizes), wide)

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


def _patches(interpreter: Any) -> None:
    """Patch ``triton.language`` once a launch, not at each call of a helper, and by a list."""
    launches: list[set[frozenset[str]]] = []  # which modules the functions of each launch see
    lists: dict[tuple, list[tuple[Any, str, Any]]] = {}
    modules: dict[Any, frozenset[str]] = {}
    languages = (interpreter.tl, interpreter.tl.core)
    run, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def __call__(self, *args, **kwargs):
        launches.append(set())
        try:
            return run(self, *args, **kwargs)
        finally:
            launches.pop()

    def _patch_lang(fn):
        if not launches:
            return patch(fn)
        if (seen := modules.get(fn)) is None:
            used = list(fn.__globals__.values())
            seen = frozenset(m.__name__ for m in languages if any(value is m for value in used))
            modules[fn] = seen
        scope, before = interpreter._LangPatchScope(), launches[-1]
        if seen in before:
            return scope
        key = (frozenset(before), seen)
        if key not in lists:
            scope = patch(fn)
            lists[key] = [(owner, name, getattr(owner, name)) for owner, name, _ in scope._changes]
        else:
            for owner, name, value in lists[key]:
                scope.set_attr(owner, name, value)
        before.add(seen)
        return scope

    interpreter.GridExecutor.__call__ = __call__
    interpreter._patch_lang = _patch_lang
