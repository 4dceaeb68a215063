"""JMESPath in routes: checked when the configuration is read, applied to what sensors send.

A condition with a name or function that does not exist would never hold, so it is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jmespath
from jmespath.exceptions import JMESPathError
from jmespath.functions import Functions
from jmespath.parser import ParsedResult
from jmespath.visitor import TreeInterpreter

from edge.protocol.strict_json import first_line, printable

_CHAINS = ("subexpression", "index_expression", "pipe", "projection", "value_projection", "filter_projection")
_ITSELF = ("current", "identity")

_Node = Mapping[str, Any]


class ExpressionError(ValueError):
    """An expression can't be applied: the text is not JMESPath, or the data does not suit it."""


def compile_expression(
    text: str, names: Collection[str] | None = None, scalars: Collection[str] = ()
) -> ParsedResult:
    """Compile JMESPath that uses only `names` (None: any), and no fields of `scalars`.

    Raises ExpressionError.
    """
    try:
        expression = jmespath.compile(text)
        for node in _nodes(expression.parsed):
            if node["type"] == "function_expression":
                _check_call(node["value"], len(node["children"]))
        if names is not None:
            _check_names(expression.parsed, names, scalars)
    except (JMESPathError, RecursionError) as error:
        hint = "write numbers in backticks and texts in single quotes"
        raise ExpressionError(f"is not JMESPath: {first_line(error)}; {hint}") from None
    return expression


def search(expression: ParsedResult, data: Any) -> Any:
    """Apply an expression to `data`. Raises ExpressionError, whatever the library raises."""
    try:
        return _Interpreter().visit(expression.parsed, data)
    except (
        JMESPathError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise ExpressionError(first_line(error)) from None


def holds(expression: ParsedResult | None, data: Any) -> bool:
    """Apply a condition with JMESPath's truth: false, null, "", [], {} and no condition do not hold."""
    result = None if expression is None else search(expression, data)
    return not (result is None or result is False or result in ("", [], {}))


class _Interpreter(TreeInterpreter):  # type: ignore[misc]  # jmespath.visitor has no types
    """As JMESPath specifies: the comparison of a text with a number gives null."""

    def visit_comparator(self, node: Any, value: Any) -> Any:
        try:
            return super().visit_comparator(node, value)
        except TypeError:
            return None


def _nodes(node: _Node) -> Iterator[_Node]:
    """Give all nodes of a syntax tree."""
    yield node
    for child in node["children"]:
        if isinstance(child, dict):  # a slice has numbers
            yield from _nodes(child)


def _at_root(node: _Node) -> Iterator[_Node]:
    """Give the nodes that are applied to the whole data, not to a part that another node has selected."""
    yield node
    for child in node["children"]:
        if isinstance(child, dict) and node["type"] != "expref":
            yield from _at_root(child)
            if node["type"] in _CHAINS and child["type"] not in _ITSELF:
                return


def _check_names(root: _Node, names: Collection[str], scalars: Collection[str]) -> None:
    for node in _at_root(root):
        if node["type"] == "field" and node["value"] not in names:
            raise ExpressionError(f"uses the unknown name {_unknown(node['value'], names)}")
        first = node["children"][0] if node["type"] in ("subexpression", "index_expression") else None
        if first is not None and first["type"] == "field" and first["value"] in scalars:
            raise ExpressionError(f"looks for a field in {first['value']}, which is a single value")


def _check_call(name: str, arguments: int) -> None:
    """Check that a function exists and takes that many arguments."""
    known: Mapping[str, Any] = Functions.FUNCTION_TABLE
    if name not in known:
        raise ExpressionError(f"calls the unknown function {_unknown(name, known)}")
    signature = known[name]["signature"]
    least, variadic = len(signature), any(each.get("variadic") for each in signature)
    if arguments < least or (arguments > least and not variadic):
        some = "at least " if variadic else ""
        raise ExpressionError(f"calls {name} with {arguments} arguments; it takes {some}{least}")


def _unknown(name: str, known: Collection[str]) -> str:
    import difflib  # only now: it would be a part of each start

    similar = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean {similar[0]}? " if similar else ""
    return f"{printable(name)}; {meant}known: {', '.join(known)}"
