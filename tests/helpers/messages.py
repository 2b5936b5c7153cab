"""The texts of all errors of the package: `python tests/helpers/messages.py` writes them to tests/messages.txt.

Tests of errors match the type and the setting; the wording is checked only by this file.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SNAPSHOT = ROOT / "tests" / "messages.txt"
_ENDINGS = ("Error", "Fault", "Conflict", "Unsolvable", "PassStopped", "Interrupted")
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def describe_messages() -> str:
    """Return the error texts of the package: for each module the type and the template of every raise.

    Values inserted at run time are shown as `{expression}`. If the same function assigns texts to a name in it, these
    texts follow, one per line.
    """
    blocks = []
    for path in sorted((ROOT / "isoprune_hf").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        lines = [line for scope in _scopes(tree) for line in _describe_scope(scope)]
        if lines:
            blocks.append("\n".join([path.relative_to(ROOT).as_posix(), *lines]))
    return "\n\n".join(blocks) + "\n"


def _scopes(tree: ast.Module) -> Iterator[list[ast.AST]]:
    """Yield the nodes of the module and of each outermost function, with what is nested in it."""
    functions = [tree]
    while functions:
        inside, waiting = [], list(ast.iter_child_nodes(functions.pop(0)))
        while waiting:
            node = waiting.pop(0)
            if isinstance(node, _Function):
                yield sorted(ast.walk(node), key=lambda child: getattr(child, "lineno", 0))
            else:
                inside.append(node)
                waiting = [*ast.iter_child_nodes(node), *waiting]
        yield inside


def _describe_scope(nodes: list[ast.AST]) -> list[str]:
    assigned: dict[str, list[str]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                assigned.setdefault(target.id, []).extend(_templates(node.value))
    lines = []
    for node in nodes:
        call = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id.endswith(_ENDINGS):
            for template in _templates(call.args[0]) or [f"{{{ast.unparse(call.args[0])}}}"] if call.args else []:
                lines.append(f"  {call.func.id}: {template}")
            names = {part.id for argument in call.args for part in ast.walk(argument) if isinstance(part, ast.Name)}
            lines += [f"    {name}: {text}" for name in sorted(names) for text in assigned.get(name, []) if text]
    return lines


def _templates(node: ast.expr) -> list[str]:
    """Return the texts that an expression may be; none if it is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value.replace("\n", "\\n")]
    if isinstance(node, ast.JoinedStr):
        return ["".join(_part(part) for part in node.values).replace("\n", "\\n")]
    if isinstance(node, ast.IfExp):
        return [*_templates(node.body), *_templates(node.orelse)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _templates(node.left), _templates(node.right)
        if left or right:
            left, right = (
                side or [f"{{{ast.unparse(part)}}}"] for side, part in ((left, node.left), (right, node.right))
            )
            return [first + second for first in left for second in right]
    return []


def _part(part: ast.expr) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    conversion = f"!{chr(part.conversion)}" if part.conversion != -1 else ""
    pattern = "".join(_part(inner) for inner in part.format_spec.values) if part.format_spec else ""
    return f"{{{ast.unparse(part.value)}{conversion}{':' * bool(pattern)}{pattern}}}"


if __name__ == "__main__":
    SNAPSHOT.write_text(describe_messages(), encoding="utf-8")
