"""Every place in a source file where one small fault can be put, and the fault.

Python, device code included, is read with `ast`; only the text of the expression that changes is touched, so that a
fault is one short edit. C++ is read line by line with regular expressions, and may not compile.
Nothing is put into annotations, docstrings, decorators, asserts, messages of errors or imports.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
OPERATORS: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}
SYMMETRIC = {"min", "max", "minimum", "maximum", "isinstance", "equal", "zip", "broadcast_shapes", "larger", "smaller"}
CLAMPS = {"min", "max", "minimum", "maximum", "clamp", "clamp_", "clamp_min", "clamp_max"}
MASKS = {"masked_fill", "masked_fill_"}


@dataclass(frozen=True)
class Fault:
    """One edit: the bytes begin .. end of a file become `after`.

    Attributes:
        scope: the name of the innermost function around it; "" in C++ and outside of functions.
        text: the line as it is.
        around: the function's source, or what stands for it: a result holds while it does.
        number: of the same edit in the same text of the same scope, from 0.
    """

    path: str
    line: int
    scope: str
    kind: str
    begin: int
    end: int
    before: str
    after: str
    text: str
    around: str = dataclasses.field(repr=False)
    number: int = 0

    @property
    def identity(self) -> tuple[str, ...]:
        """The same while the line is, wherever in the file it stands."""
        return self.path, self.scope, self.text, self.before, self.after, str(self.number)

    @property
    def name(self) -> str:
        return f"{self.path}:{self.line}: {self.before!r} -> {self.after!r}"

    def put_into(self, source: bytes) -> bytes:
        assert source[self.begin : self.end] == self.before.encode()
        return source[: self.begin] + self.after.encode() + source[self.end :]


def faults_in(path: str, source: bytes) -> list[Fault]:
    """All faults of a file, in the order of their places."""
    found = _Python(path, source).faults() if path.endswith(".py") else list(_cpp(path, source))
    by_place = {(fault.begin, fault.end, fault.after): fault for fault in found}
    numbers: Counter[tuple[str, ...]] = Counter()
    faults = []
    for place in sorted(by_place):
        fault = by_place[place]
        faults.append(dataclasses.replace(fault, number=numbers[fault.identity]))
        numbers[fault.identity] += 1
    return faults


def changes(fault: Fault, source: bytes) -> bool:
    """True if the file still parses and says something else. C++ is left to the compiler."""
    if not fault.path.endswith(".py"):
        return fault.before != fault.after
    try:
        return ast.dump(ast.parse(fault.put_into(source))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


class _Python(ast.NodeVisitor):
    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source = path, source
        self.lines = source.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))
        self.found: list[Fault] = []
        self.scope = self.around = ""

    def faults(self) -> list[Fault]:
        self.visit(ast.parse(self.source))
        return self.found

    def at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def span(self, node: ast.AST) -> tuple[int, int]:
        begin = self.at(node.lineno, node.col_offset)  # type: ignore[attr-defined]
        return begin, self.at(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def text(self, node: ast.AST) -> str:
        begin, end = self.span(node)
        return self.source[begin:end].decode()

    def add(self, kind: str, begin: int, end: int, after: str) -> None:
        line = self.source.count(b"\n", 0, begin) + 1
        before = self.source[begin:end].decode()
        text = self.lines[line - 1].decode().strip()
        around = self.around or text
        self.found.append(Fault(self.path, line, self.scope, kind, begin, end, before, after, text, around))

    def replace(self, kind: str, node: ast.AST, after: str) -> None:
        self.add(kind, *self.span(node), after)

    def between(self, kind: str, left: ast.AST, right: ast.AST, before: str, after: str) -> None:
        """Replace an operator, which has no place of its own in the tree."""
        begin, end = self.span(left)[1], self.span(right)[0]
        pattern = rb"\s+".join(re.escape(word) for word in before.encode().split())
        if match := re.search(pattern, self.source[begin:end]):
            self.add(kind, begin + match.start(), begin + match.end(), after)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in ("__repr__", "__str__"):
            return
        outer = self.scope, self.around
        self.scope, self.around = node.name, self.text(node)
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(default)
        for statement in node.body:
            self.visit(statement)
        self.scope, self.around = outer

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.body)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        if not any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def skip(self, node: ast.AST) -> None:
        """Nothing that a result depends on."""

    visit_Raise = visit_Assert = visit_JoinedStr = visit_Import = visit_ImportFrom = skip

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for operator, left, right in zip(node.ops, operands, operands[1:]):  # noqa: B905
            self.between("comparison", left, right, *COMPARISONS[type(operator)])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in OPERATORS:
            self.between("operator", node.left, node.right, *OPERATORS[type(node.op)])
        if isinstance(node.op, ast.BitAnd):
            self.replace("mask dropped", node, self.text(node.left))
            self.replace("mask dropped", node, self.text(node.right))
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in OPERATORS:
            before, after = (sign + "=" for sign in OPERATORS[type(node.op)])
            self.between("operator", node.target, node.value, before, after)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        before, after = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:]):  # noqa: B905
            self.between("operator", left, right, before, after)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        kind = "sign" if isinstance(node.op, ast.USub) else "not removed"
        self.replace(kind, node, f"({self.text(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.replace("constant", node, str(not node.value))
        elif isinstance(node.value, int):
            self.replace("constant", node, str(node.value + 1))
        elif isinstance(node.value, float):
            self.replace("constant", node, repr(2 * node.value or 1.0))

    def visit_If(self, node: ast.If) -> None:
        self.negate(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.negate(node.test)
        self.generic_visit(node)

    def negate(self, test: ast.expr) -> None:
        if not isinstance(test, (ast.Compare, ast.UnaryOp)):  # those have faults of their own with the same effect
            self.replace("condition", test, f"(not ({self.text(test)}))")

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            if bound is not None and not isinstance(bound, ast.Constant):
                self.replace("off by one", bound, f"({self.text(bound)}) + 1")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        plain = [x for x in node.args if not isinstance(x, ast.Starred)]
        if plain == node.args and len(plain) >= 2:
            first, second = plain[:2]
            if name in CLAMPS:
                self.replace("clamp removed", node, self.text(first))
                self.replace("clamp removed", node, self.text(second))
            elif name == "where" and len(plain) == 3:
                self.replace("mask dropped", node, self.text(second))
            if name not in SYMMETRIC:
                begin, end = self.span(first)[0], self.span(second)[1]
                gap = self.source[self.span(first)[1] : self.span(second)[0]].decode()
                self.add("arguments swapped", begin, end, self.text(second) + gap + self.text(first))
        if name in CLAMPS | MASKS and isinstance(called, ast.Attribute) and len(plain) < 2 + (name in MASKS):
            self.replace("clamp removed" if name in CLAMPS else "mask dropped", node, self.text(called.value))
        if name in ("load", "store") and any(k.arg == "mask" for k in node.keywords):
            arguments = ", ".join(map(self.text, node.args))
            self.replace("mask dropped", node, f"{self.text(called)}({arguments})")
        if name == "range" and plain:
            bound = plain[0] if len(plain) == 1 else plain[1]
            self.replace("off by one", bound, f"({self.text(bound)}) + 1")
        for part in [called, *node.args, *(k.value for k in node.keywords)]:
            self.visit(part)


# kind, what is replaced, by what; \1 and so on are groups.
CPP = tuple(
    (kind, re.compile(pattern), after)
    for kind, pattern, after in (
        ("comparison", r"(?<= )<(?= )", "<="),
        ("comparison", r"(?<= )<=(?= )", "<"),
        ("comparison", r"(?<= )>(?= )", ">="),
        ("comparison", r"(?<= )>=(?= )", ">"),
        ("comparison", r"==", "!="),
        ("comparison", r"!=", "=="),
        ("operator", r"(?<= )\+(?= )", "-"),
        ("operator", r"(?<= )-(?= )", "+"),
        ("operator", r"(?<= )\*(?= )", "+"),
        ("operator", r"(?<= )/(?= )", "*"),
        ("operator", r"(?<= )%(?= )", "/"),
        ("operator", r"&&", "||"),
        ("operator", r"\|\|", "&&"),
        ("operator", r"(?<= )&(?= )", "|"),
        ("operator", r"(?<= )\|(?= )", "&"),
        ("operator", r"<<", ">>"),
        ("operator", r"\+=", "-="),
        ("operator", r"\+=", "="),
        ("operator", r"-=", "+="),
        ("operator", r"\*=", "+="),
        ("operator", r"\|=", "="),
        ("sign", r"(?<=[ (])-(?=[A-Za-z_])", ""),
        ("not removed", r"!(?=[A-Za-z_(])", ""),
        ("clamp removed", r"\b(?:larger|smaller)\(([^(),]+), ([^(),]+)\)", r"(\1)"),
        ("clamp removed", r"\b(?:larger|smaller)\(([^(),]+), ([^(),]+)\)", r"(\2)"),
        ("bounds", r"\blarger\(", "smaller("),
        ("bounds", r"\bsmaller\(", "larger("),
        ("arguments swapped", r"\b(?!larger|smaller|if|for|while)(\w+)\(([^(),]+), ([^(),]+)(?=[,)])", r"\1(\3, \2"),
        ("arguments swapped", r"\? ([^?:;]+) : ([^?:;,)]+)", r"? \2 : \1"),
    )
)
DECLARED = re.compile(r"^\s*(const )?\w+[&*]? \w+$")  # an argument of a definition
NUMBER = re.compile(r"(?<![\w.])(?:0x[0-9a-fA-F]+(?!p)|\d+)(?![\w.])")
FRACTION = re.compile(r"(?<![\w.])(\d+\.\d+(?:e-?\d+)?)(f?)")
NO_CODE = re.compile(r"^\s*(#|//|using |typedef |extern |namespace |template|class |struct )")


def _cpp(path: str, source: bytes) -> Iterator[Fault]:
    begin = 0
    for number, raw in enumerate(source.splitlines(keepends=True), 1):
        whole = raw.decode()
        line = whole.split("//")[0]
        if not NO_CODE.match(whole):
            for kind, first, last, after in _cpp_edits(line):
                start, end = begin + len(line[:first].encode()), begin + len(line[:last].encode())
                text = whole.strip()
                yield Fault(path, number, "", kind, start, end, line[first:last], after, text, source.decode())
        begin += len(raw)


def _cpp_edits(line: str) -> Iterator[tuple[str, int, int, str]]:
    for kind, pattern, after in CPP:
        for match in pattern.finditer(line):
            if (changed := match.expand(after)) != match[0] and not any(map(DECLARED.match, match.groups())):
                yield kind, match.start(), match.end(), changed
    for match in NUMBER.finditer(line):
        yield "constant", match.start(), match.end(), str(int(match[0], 0) + 1)
    for match in FRACTION.finditer(line):
        yield "constant", match.start(), match.end(), repr(2 * float(match[1]) or 1.0) + match[2]
