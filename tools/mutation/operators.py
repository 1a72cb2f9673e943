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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_SWAPPED: dict[type[ast.AST], type[ast.AST]]
_SWAPPED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.Mult}
_SWAPPED |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult}
_SWAPPED |= {ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift}
_NEGATED: dict[type[ast.cmpop], type[ast.cmpop]]
_NEGATED = {ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn, ast.Lt: ast.GtE, ast.Gt: ast.LtE}
_NEGATED |= {negated: op for op, negated in _NEGATED.items()}
# Strictness changed, and how the right side moves by one the other way.
_BOUNDARIES: dict[type[ast.cmpop], tuple[type[ast.cmpop], type[ast.operator]]]
_BOUNDARIES = {ast.Lt: (ast.LtE, ast.Sub), ast.LtE: (ast.Lt, ast.Add)}
_BOUNDARIES |= {ast.Gt: (ast.GtE, ast.Add), ast.GtE: (ast.Gt, ast.Sub)}
_OPPOSITES = {
    **{"min": "max", "any": "all", "floor": "ceil", "bisect_right": "bisect_left", "argmax": "argmin"},
    **{"Add": "Sub", "Mul": "Div", "Cos": "Sin", "Less": "LessOrEqual", "Greater": "GreaterOrEqual"},
    **{"And": "Or", "ReduceMax": "ReduceMean", "zeros": "ones", "maximum": "minimum"},
}
_OPPOSITES |= {name: other for other, name in _OPPOSITES.items()}
_LEFT_OUT = (ast.Import, ast.ImportFrom, ast.Assert, ast.JoinedStr, ast.Global, ast.Nonlocal)
_LEFT_OUT_FIELDS = ("annotation", "returns", "decorator_list", "bases", "type_comment")

Node = Any
"""A syntax node whose fields are read and written by name."""


@dataclass(frozen=True)
class _Slot:
    """Where a node hangs in the tree."""

    holder: ast.AST
    field: str
    index: int | None

    @property
    def node(self) -> Node:
        value = getattr(self.holder, self.field)
        return value if self.index is None else value[self.index]

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.holder, self.field, node)
        else:
            getattr(self.holder, self.field)[self.index] = node


@dataclass(frozen=True)
class Mutant:
    """One change, not yet made."""

    function: str
    """Dotted name inside the module; "" at its top."""
    lines: range
    """Of the changed statement; of its first line up to its body, if it has one."""
    was: str
    """The statement's first line of code."""
    becomes: str
    """The same after the change, with a count behind it where the function has an equal change already."""
    slot: _Slot
    replacement: ast.AST

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from the module's others, wherever its lines are."""
        return self.function, self.was, self.becomes

    def apply(self) -> None:
        self.slot.put(self.replacement)


def mutants(tree: ast.Module) -> list[Mutant]:
    """All changes of a module, from top to bottom. The tree is left as it was."""
    found: list[Mutant] = []
    counts: Counter[tuple[str, str, str]] = Counter()
    copied = _copied_axes(tree)
    for function, statement, slot in _slots(tree, None, ""):
        node, whole = slot.node, statement.node
        was, body = _first_line(whole), getattr(whole, "body", None)
        last = body[0].lineno - 1 if body else whole.end_lineno
        lines = range(whole.lineno, max(last, whole.lineno) + 1)
        for replacement in _changes(slot):
            if node in copied and ast.unparse(replacement) == "-1":
                continue
            slot.put(replacement)
            becomes = _first_line(statement.node)
            slot.put(node)
            counts[function, was, becomes] += 1
            count = counts[function, was, becomes]
            becomes += f"  # {count}" if count > 1 else ""
            found.append(Mutant(function, lines, was, becomes, slot, replacement))
    return found


def _first_line(statement: Node) -> str:
    return next(line for line in ast.unparse(statement).splitlines() if not line.startswith("@"))


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


def _slots(node: ast.AST, statement: _Slot | None, function: str) -> Iterator[tuple[str, _Slot, _Slot]]:
    """The function, the statement and the place of every node that may be changed."""
    for field, value in ast.iter_fields(node):
        if field in _LEFT_OUT_FIELDS:
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _left_out(node, child):
                continue
            slot = _Slot(node, field, index)
            holder = slot if statement is None or isinstance(child, ast.stmt) else statement
            yield function, holder, slot
            inner = function
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inner = f"{function}.{child.name}".lstrip(".")
            yield from _slots(child, holder, inner)


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


# One function for each kind of node that can be changed; the table of them is at the end.


def _changes(slot: _Slot) -> Iterator[ast.AST]:
    node = slot.node
    if type(node) in _OPERATORS:
        yield from _OPERATORS[type(node)](node)
    if slot.field == "test" and isinstance(node, (ast.Name, ast.Attribute, ast.Call)):
        yield ast.UnaryOp(ast.Not(), node)
    if slot.field == "ifs":
        yield ast.Constant(True)


def _dropped(node: Node) -> Iterator[ast.AST]:
    # A local name that is never set would only be an error.
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    yields = isinstance(node, ast.Expr) and isinstance(node.value, (ast.Yield, ast.YieldFrom))
    if not yields and (target is None or isinstance(target, (ast.Attribute, ast.Subscript))):
        yield ast.Pass()


def _swapped(node: Node) -> Iterator[ast.AST]:
    if isinstance(node, ast.AugAssign):
        yield ast.Pass()
    if type(node.op) in _SWAPPED:
        yield _copy(node, op=_SWAPPED[type(node.op)]())


def _constant(node: Node) -> Iterator[ast.AST]:
    value = node.value
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int):
        yield from (ast.Constant(value + 1), ast.Constant(value - 1))
    elif isinstance(value, float):
        yield ast.Constant(2 * value or 1.0)
    elif isinstance(value, str) and value and not any(character.isspace() for character in value):
        yield ast.Constant(value + "_")


def _boolean(node: Node) -> Iterator[ast.AST]:
    yield _copy(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    for index in range(len(node.values)):
        kept = _replaced(node.values, index)
        yield kept[0] if len(kept) == 1 else _copy(node, values=kept)


def _unary(node: Node) -> Iterator[ast.AST]:
    if not isinstance(node.operand, ast.Constant):
        yield node.operand


def _comparison(node: Node) -> Iterator[ast.AST]:
    for index, op in enumerate(node.ops):
        yield _copy(node, ops=_replaced(node.ops, index, _NEGATED[type(op)]()))
        if type(op) in _BOUNDARIES:
            strictness, shift = _BOUNDARIES[type(op)]
            yield _copy(node, ops=_replaced(node.ops, index, strictness()))
            right = node.comparators[index]
            if not isinstance(right, ast.Constant):  # which is changed by itself
                moved = ast.BinOp(right, shift(), ast.Constant(1))
                yield _copy(node, comparators=_replaced(node.comparators, index, moved))


def _call(node: Node) -> Iterator[ast.AST]:
    called, plain = node.func, isinstance(node.func, ast.Name)
    name = called.id if plain else getattr(called, "attr", "")
    if name in _OPPOSITES:
        other = _OPPOSITES[name]
        yield _copy(node, func=ast.Name(other, ast.Load()) if plain else _copy(called, attr=other))
    if name in ("min", "max") and plain and len(node.args) == 2 and not node.keywords:
        yield from (argument for argument in node.args if not isinstance(argument, ast.Constant))
    stop = min(1, len(node.args) - 1)
    if name == "range" and node.args and not isinstance(node.args[stop], ast.Constant):
        shorter = ast.BinOp(node.args[stop], ast.Sub(), ast.Constant(1))
        yield _copy(node, args=_replaced(node.args, stop, shorter))
    for index, keyword in enumerate(node.keywords):
        if keyword.arg != "strict":
            yield _copy(node, keywords=_replaced(node.keywords, index))


def _slice(node: Node) -> Iterator[ast.AST]:
    for bound, inwards in (("lower", ast.Add()), ("upper", ast.Sub())):
        value = getattr(node, bound)
        if value is not None:
            yield _copy(node, **{bound: None})
            if not isinstance(value, ast.Constant):
                yield _copy(node, **{bound: ast.BinOp(value, inwards, ast.Constant(1))})


def _replaced(items: list[Node], index: int, *by: Node) -> list[Node]:
    return [*items[:index], *by, *items[index + 1 :]]


def _copy(node: Node, **changed: Any) -> Any:
    """A node like this one with other fields; the rest is shared."""
    return ast.copy_location(type(node)(**{**dict(ast.iter_fields(node)), **changed}), node)


_OPERATORS: dict[type[ast.AST], Callable[[Node], Iterator[ast.AST]]] = {
    ast.Break: lambda node: iter([ast.Continue()]),
    ast.Continue: lambda node: iter([ast.Break()]),
    **dict.fromkeys((ast.Expr, ast.Assign, ast.Delete, ast.Raise), _dropped),
    **dict.fromkeys((ast.AugAssign, ast.BinOp), _swapped),
    **{ast.Constant: _constant, ast.BoolOp: _boolean, ast.UnaryOp: _unary},
    **{ast.Compare: _comparison, ast.Call: _call, ast.Slice: _slice},
}
