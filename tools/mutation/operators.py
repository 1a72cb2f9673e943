"""Which small changes a module's syntax tree can have.

Comparisons moved by one in both directions and negated, constants off by one, arithmetic and boolean
operators swapped, operands of `and` and `or` dropped, functions swapped for their opposites (min and max,
ONNX's Add and Sub), clamps removed, bounds of slices and ranges shortened, keyword arguments left out,
statements dropped. Not changed: annotations, docstrings, messages (strings with a space, f-strings, whatever
is raised), assertions and `zip`'s `strict` (they check the code itself), decorators and `__all__`.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Mutant", "mutants"]

_SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_NEGATED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
}
# Strictness changed, and how the right side moves by one the other way.
_BOUNDARIES: dict[type[ast.cmpop], tuple[type[ast.cmpop], type[ast.operator]]] = {
    ast.Lt: (ast.LtE, ast.Sub),
    ast.LtE: (ast.Lt, ast.Add),
    ast.Gt: (ast.GtE, ast.Add),
    ast.GtE: (ast.Gt, ast.Sub),
}
_OPPOSITES = {
    **{"min": "max", "any": "all", "floor": "ceil", "bisect_right": "bisect_left", "argmax": "argmin"},
    **{"Add": "Sub", "Mul": "Div", "Cos": "Sin", "Less": "LessOrEqual", "Greater": "GreaterOrEqual"},
    **{"And": "Or", "ReduceMax": "ReduceMean", "zeros": "ones", "maximum": "minimum"},
}
_OPPOSITES |= {name: other for other, name in _OPPOSITES.items()}


@dataclass
class Mutant:
    """One change, not yet made."""

    function: str
    """Dotted name inside the module; "" at its top."""
    line: int
    lines: range
    """Of the changed statement; of its first line up to its body, if it has one."""
    was: str
    """The statement's first line of code."""
    becomes: str
    """The same after the change, with a count behind it where the function has an equal change already."""
    at_import: bool
    """The statement runs when the module is imported, before any test."""
    _holder: Any
    _slot: str
    _index: int | None
    _replacement: ast.AST

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from the module's others, wherever its lines are."""
        return self.function, self.was, self.becomes

    def apply(self) -> None:
        """Change the tree."""
        _put(self._holder, self._slot, self._index, self._replacement)


def mutants(tree: ast.Module) -> list[Mutant]:
    """All changes of a module, from top to bottom. The tree is left as it was."""
    copied = _copied_axes(tree)
    found: list[Mutant] = []
    counts: Counter[tuple[str, str, str]] = Counter()
    for place in _places(tree):
        for replacement in _changes(place):
            if place.node in copied and ast.unparse(replacement) == "-1":
                continue
            was = place.first_line()
            _put(place.holder, place.slot, place.index, replacement)
            becomes = place.first_line()
            _put(place.holder, place.slot, place.index, place.node)
            counts[place.function, was, becomes] += 1
            count = counts[place.function, was, becomes]
            found.append(
                Mutant(
                    place.function,
                    place.node.lineno,
                    place.lines(),
                    was,
                    becomes if count == 1 else f"{becomes}  # {count}",
                    place.at_import,
                    place.holder,
                    place.slot,
                    place.index,
                    replacement,
                )
            )
    return found


@dataclass
class _Place:
    """A node that may be replaced, and where it hangs."""

    node: Any
    holder: ast.AST
    slot: str
    index: int | None
    statement: ast.stmt
    holder_of_statement: ast.AST
    slot_of_statement: str
    index_of_statement: int
    function: str
    at_import: bool

    def first_line(self) -> str:
        statement = getattr(self.holder_of_statement, self.slot_of_statement)[self.index_of_statement]
        lines = ast.unparse(statement).splitlines()
        return next(line for line in lines if not line.startswith("@"))

    def lines(self) -> range:
        body = getattr(self.statement, "body", None)
        last = body[0].lineno - 1 if body else self.statement.end_lineno
        return range(self.statement.lineno, max(last or 0, self.statement.lineno) + 1)


def _put(holder: Any, slot: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(holder, slot, node)
    else:
        getattr(holder, slot)[index] = node


def _copied_axes(tree: ast.Module) -> set[ast.AST]:
    """The zeros in the shapes of ONNX's Reshape. They copy an axis, and -1 works the same axis out."""
    return {
        axis
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "Reshape"
        for shape in call.args[1:]
        if isinstance(shape, ast.List)
        for axis in shape.elts
        if isinstance(axis, ast.Constant) and axis.value == 0
    }


_LEFT_OUT = (ast.Import, ast.ImportFrom, ast.Assert, ast.JoinedStr, ast.Global, ast.Nonlocal)


def _places(tree: ast.Module) -> Iterator[_Place]:
    yield from _of_children(tree, None, "", True)


def _of_children(node: ast.AST, outer: _Place | None, function: str, at_import: bool) -> Iterator[_Place]:
    for slot, value in ast.iter_fields(node):
        if slot in ("annotation", "returns", "decorator_list", "bases", "type_comment"):
            continue
        children = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, child in children:
            if not isinstance(child, ast.AST) or _left_out(node, child):
                continue
            place = outer
            if isinstance(child, ast.stmt):
                assert index is not None
                place = _Place(child, node, slot, index, child, node, slot, index, function, at_import)
            elif outer is not None:
                place = _Place(
                    child,
                    node,
                    slot,
                    index,
                    outer.statement,
                    outer.holder_of_statement,
                    outer.slot_of_statement,
                    outer.index_of_statement,
                    function,
                    at_import or isinstance(node, ast.arguments),
                )
            if place is not None:
                yield place
            inner, early = function, at_import
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inner = f"{function}.{child.name}" if function else child.name
                early = at_import and isinstance(child, ast.ClassDef)
            yield from _of_children(child, place, inner, early)


def _left_out(parent: ast.AST, child: ast.AST) -> bool:
    if isinstance(child, _LEFT_OUT) or (isinstance(child, ast.keyword) and child.arg == "strict"):
        return True
    if isinstance(child, ast.Raise):
        return False  # it may be dropped; its message is left alone below
    if isinstance(parent, ast.Raise):
        return True
    if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
        return True  # a docstring
    if isinstance(child, ast.Assign) and isinstance(child.targets[0], ast.Name):
        return child.targets[0].id == "__all__"
    if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
        return True
    return isinstance(child, ast.Subscript) and ast.unparse(child.value) == "Literal"


def _changes(place: _Place) -> Iterator[ast.AST]:
    node, holder = place.node, place.holder
    if isinstance(node, ast.stmt):
        yield from _of_statement(node)
    elif isinstance(node, ast.Constant):
        yield from _of_constant(node)
    elif isinstance(node, ast.Compare):
        yield from _of_comparison(node)
    elif isinstance(node, ast.BinOp) and type(node.op) in _SWAPPED:
        yield _copy(node, op=_SWAPPED[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield _copy(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        for index in range(len(node.values)):
            kept = [value for other, value in enumerate(node.values) if other != index]
            yield kept[0] if len(kept) == 1 else _copy(node, values=kept)
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield node.operand
    elif isinstance(node, ast.Call):
        yield from _of_call(node)
    elif isinstance(node, ast.Slice):
        yield from _of_slice(node)
    if place.slot == "test" and isinstance(node, (ast.Name, ast.Attribute, ast.Call)):
        yield ast.UnaryOp(ast.Not(), node)
    if place.slot == "ifs" and isinstance(holder, ast.comprehension):
        yield ast.Constant(True)


def _of_statement(node: ast.stmt) -> Iterator[ast.AST]:
    if isinstance(node, ast.Break):
        yield ast.Continue()
    elif isinstance(node, ast.Continue):
        yield ast.Break()
    elif isinstance(node, ast.AugAssign):
        yield ast.Pass()
        if type(node.op) in _SWAPPED:
            yield _copy(node, op=_SWAPPED[type(node.op)]())
    elif isinstance(node, (ast.Delete, ast.Raise)) or _dropped(node):
        yield ast.Pass()


def _dropped(node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, (ast.Yield, ast.YieldFrom))
    # A name that is never set is only an error.
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Subscript))


def _of_constant(node: ast.Constant) -> Iterator[ast.AST]:
    value = node.value
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int):
        yield ast.Constant(value + 1)
        yield ast.Constant(value - 1)
    elif isinstance(value, float):
        yield ast.Constant(2 * value or 1.0)
    elif isinstance(value, str) and value and not any(character.isspace() for character in value):
        yield ast.Constant(value + "_")


def _of_comparison(node: ast.Compare) -> Iterator[ast.AST]:
    for index, op in enumerate(node.ops):
        before, after = node.ops[:index], node.ops[index + 1 :]
        yield _copy(node, ops=[*before, _NEGATED[type(op)](), *after])
        if type(op) in _BOUNDARIES:
            strictness, shift = _BOUNDARIES[type(op)]
            yield _copy(node, ops=[*before, strictness(), *after])
            right = node.comparators[index]
            if not isinstance(right, ast.Constant):  # which is changed by itself
                moved = ast.BinOp(right, shift(), ast.Constant(1))
                yield _copy(
                    node, comparators=[*node.comparators[:index], moved, *node.comparators[index + 1 :]]
                )


def _of_call(node: ast.Call) -> Iterator[ast.AST]:
    called = node.func
    name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
    if name in _OPPOSITES:
        other = _OPPOSITES[name]
        yield _copy(
            node,
            func=ast.Name(other, ast.Load()) if isinstance(called, ast.Name) else _copy(called, attr=other),
        )
    if name in ("min", "max") and isinstance(called, ast.Name) and len(node.args) == 2 and not node.keywords:
        yield from (argument for argument in node.args if not isinstance(argument, ast.Constant))
    if name == "range" and node.args and not isinstance(node.args[min(1, len(node.args) - 1)], ast.Constant):
        stop = min(1, len(node.args) - 1)
        shorter = ast.BinOp(node.args[stop], ast.Sub(), ast.Constant(1))
        yield _copy(node, args=[*node.args[:stop], shorter, *node.args[stop + 1 :]])
    for index, keyword in enumerate(node.keywords):
        if keyword.arg == "strict":
            continue
        yield _copy(node, keywords=[*node.keywords[:index], *node.keywords[index + 1 :]])


def _of_slice(node: ast.Slice) -> Iterator[ast.AST]:
    if node.lower is not None:
        yield _copy(node, lower=None)
        if not isinstance(node.lower, ast.Constant):
            yield _copy(node, lower=ast.BinOp(node.lower, ast.Add(), ast.Constant(1)))
    if node.upper is not None:
        yield _copy(node, upper=None)
        if not isinstance(node.upper, ast.Constant):
            yield _copy(node, upper=ast.BinOp(node.upper, ast.Sub(), ast.Constant(1)))


def _copy(node: Any, **changed: Any) -> Any:
    """A node like this one with other fields; the rest is shared."""
    fields = {**dict(ast.iter_fields(node)), **changed}
    return ast.copy_location(type(node)(**fields), node)
