"""The generated pages of the docs site, as Markdown: from the schema, the parsers, and docstrings."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pi0rl import cli  # noqa: E402
from pi0rl.evaluation.completeness import EPISODE_COLUMNS  # noqa: E402
from pi0rl.evaluation.protocols import PROTOCOLS, Protocol  # noqa: E402
from pi0rl.params import Params  # noqa: E402
from pi0rl.report.tables import FAILURE_KINDS  # noqa: E402
from pi0rl.sweeps import Sweep  # noqa: E402
from pi0rl.tracking.metrics import METRICS  # noqa: E402


def params() -> str:
    """Every key of an experiment's params."""
    text = [
        "# Params",
        "",
        "All keys of `params/*.yaml`, with their defaults. Keys are RLinf's where it has them; an unknown key is an "
        "error that names the nearest one. A file may name a `base` file beside it, `${section.key}` refers to another "
        "value, and `--set section.key=value` comes last.",
        "",
    ]
    return "\n".join([*text, *_section(Params, "")])


def sweeps() -> str:
    """Every key of a sweep's file."""
    text = ["# Sweep files", "", "All keys of `params/sweeps/*.yaml`; see [sweeps](../sweeps.md).", ""]
    return "\n".join([*text, *_section(Sweep, "")])


def _section(schema: Any, name: str) -> Iterator[str]:
    if name:
        yield from (f"## {name}", "")
    yield from (*_docstring(inspect.getdoc(schema) or ""), "")
    rows, nested = [], []
    for key, kind, default in _keys(schema):
        inner = next((part for part in (kind, *get_args(kind)) if _is_section(part)), None)
        if inner is not None and not str(kind).startswith("dict"):
            nested.append((f"{name}.{key}".lstrip("."), inner))
        else:
            rows.append(f"| `{key}` | `{_type_name(kind)}` | {_shown(default)} |")
    if rows:
        yield from ("| key | type | default |", "|---|---|---|", *rows, "")
    for inner_name, inner in nested:
        yield from _section(inner, inner_name)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and (issubclass(kind, BaseModel) or is_dataclass(kind))


def _keys(schema: Any) -> Iterator[tuple[str, Any, Any]]:
    if is_dataclass(schema):
        hints = get_type_hints(schema)
        for field in fields(schema):
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            yield field.name, hints[field.name], default
    else:
        for key, field in schema.model_fields.items():
            yield (
                key,
                field.annotation,
                "required" if field.is_required() else field.get_default(call_default_factory=True),
            )


def _type_name(kind: Any) -> str:
    """A type as it would be written, its bounds left out: ``int | None``, ``'a' | 'b'``, ``tuple[int, int]``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, arguments))
    if origin is not None:
        inner = ", ".join("..." if argument is Ellipsis else _type_name(argument) for argument in arguments)
        return f"{origin.__name__}[{inner}]"
    return {type(None): "None", Any: "any"}.get(kind, getattr(kind, "__name__", str(kind)))


def _shown(default: Any) -> str:
    if default is MISSING or (isinstance(default, str) and default == "required"):
        return "required"
    plain = yaml.safe_dump(_plain(default), default_flow_style=True, width=1000, sort_keys=False)
    return f"`{plain.removesuffix(chr(10)).removesuffix('...').strip()}`"


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def protocols() -> str:
    """The presets, side by side."""
    text = [
        "# Evaluation protocols",
        "",
        "The same name of a benchmark stands for different exams. `pi0rl evaluate --checkpoint ... --protocol NAME` "
        "takes one of these; `--set key=value` changes one. Results may be compared if their hashes are equal; tables "
        "never mix them. An experiment's own evaluation is `default` with its params' cameras, chunks and steps.",
        "",
        "| | " + " | ".join(f"`{protocol.name}`" for protocol in PROTOCOLS) + " |",
        "|---|" + "---|" * len(PROTOCOLS),
        "| hash | " + " | ".join(f"`{protocol.hash}`" for protocol in PROTOCOLS) + " |",
    ]
    for rules in zip(*(protocol.rules for protocol in PROTOCOLS), strict=True):
        cells = " | ".join(f"{rule.max_steps} / {rule.replan_steps}" for rule in rules)
        text.append(f"| {rules[0].suite}: steps allowed / executed per look | {cells} |")
    for field in fields(Protocol):
        if field.name not in ("name", "rules"):
            cells = " | ".join(str(getattr(protocol, field.name)) for protocol in PROTOCOLS)
            text.append(f"| `{field.name}` | {cells} |")
    return "\n".join([*text, "", *_docstring(inspect.getdoc(Protocol) or ""), ""])


def episodes() -> str:
    """The columns of the episode table and the kinds of failure."""
    rows = [f"| `{name}` | {meaning} |" for name, meaning in EPISODE_COLUMNS.items()]
    kinds = [f"| {kind} | {meaning} |" for kind, meaning in FAILURE_KINDS.items()]
    return "\n".join(
        [
            "# Episode table",
            "",
            "`evaluate/episodes.parquet`: one row per planned episode and policy, the only source of every number.",
            "",
            *("| column | |", "|---|---|", *rows, ""),
            *("## Kinds of failure", "", "| kind | |", "|---|---|", *kinds, ""),
        ]
    )


def metrics() -> str:
    """The one list of metric names."""
    rows = [f"| `{name}` | {meaning} |" for name, meaning in METRICS.items()]
    head = (
        "The same names in `train/metrics.csv`, MLflow, TensorBoard, W&B and SwanLab (`runner.logger.logger_backends`)."
    )
    return "\n".join(["# Metrics", "", head, "", "| metric | |", "|---|---|", *rows, ""])


def command_line() -> str:
    """The help of every command."""
    parser = cli._parser()
    text = ["# Command line", "", *_fenced(_help(parser)), ""]
    for name, command in _commands(parser):
        text += [f"## pi0rl {name}", "", *_fenced(_help(command)), ""]
    return "\n".join(text)


def _commands(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield f"{prefix}{name}", command
                yield from _commands(command, f"{prefix}{name} ")


def _help(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = _wide(parser.formatter_class)
    return parser.format_help().rstrip()


def _wide(formatter: Any) -> Any:
    return lambda prog: formatter(prog, width=100)


def benchmarks() -> str:
    """What every benchmark measures, how to run it, and what it wrote to benchmarks/results."""
    text = ["# Benchmarks", "", "Each of these commands writes its results; what is below is what it wrote last.", ""]
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "if __name__ ==" not in source or "benchmarks/results" not in source:
            continue
        summary = ast.get_docstring(ast.parse(source)) or ""
        results = ROOT / "benchmarks" / "results" / f"{path.stem}.md"
        text += [f"## {path.stem} {{ #{path.stem} }}", "", *_docstring(summary), ""]
        if results.is_file():
            text += [
                re.sub(r"^#+ ", lambda mark: f"##{mark[0]}", results.read_text(encoding="utf-8"), flags=re.MULTILINE),
                "",
            ]
        elif (table := results.with_suffix(".json")).is_file():
            text += [
                '??? note "Results"',
                "",
                *(f"    {line}" for line in _fenced(table.read_text(encoding="utf-8"))),
                "",
            ]
        else:
            text += [f"*No results are recorded yet: `python -m benchmarks.{path.stem}` writes them.*", ""]
    return "\n".join(text)


def python() -> str:
    """Every public module, class and function with its docstring."""
    text = ["# Python", "", "Public names of the package, from their docstrings. Imports point downwards only.", ""]
    for path in sorted((ROOT / "pi0rl").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if (summary := ast.get_docstring(tree)) is None:
            continue
        text += [f"## {name}", "", *_docstring(summary), ""]
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                text += _definition(node)
    return "\n".join(text)


def _definition(node: ast.ClassDef | ast.FunctionDef) -> list[str]:
    lines = [
        f"### {node.name}",
        "",
        *_fenced(_signature(node), "python"),
        "",
        *_docstring(ast.get_docstring(node) or ""),
        "",
    ]
    for member in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(member, ast.FunctionDef) and not member.name.startswith("_") and ast.get_docstring(member):
            lines += [*_fenced(_signature(member), "python"), "", *_docstring(ast.get_docstring(member) or ""), ""]
    return lines


def _signature(node: ast.ClassDef | ast.FunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        attributes = [f"    {ast.unparse(item)}" for item in node.body if isinstance(item, ast.AnnAssign)]
        public = [line for line in attributes if not line.strip().startswith("_")]
        return "\n".join([f"class {node.name}({bases}):" if bases else f"class {node.name}:", *public])
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    arguments = ast.unparse(node.args)
    if len(arguments) > 80:
        arguments = "\n    " + ",\n    ".join(_split_arguments(arguments)) + ",\n"
    return f"def {node.name}({arguments}){returns}"


def _split_arguments(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


_HEADINGS = ("Args", "Returns", "Raises", "Attributes", "Yields")


def _docstring(text: str) -> list[str]:
    """A Google-style docstring as Markdown: its sections as lists, its indented examples as code."""
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        heading, _, body = block.partition(":\n")
        if heading in _HEADINGS:
            items = re.split(r"\n(?=    \S)", body)
            entries = [" ".join(item.split()) for item in items]
            lines += ["", f"**{heading}**", "", *(f"- {_entry(entry)}" for entry in entries)]
        elif all(line.startswith("    ") for line in block.splitlines() if line.strip()):
            lines += ["", *_fenced(inspect.cleandoc(block))]
        else:
            lines += ["", _prose(block)]
    return lines


def _entry(text: str) -> str:
    name, colon, rest = text.partition(": ")
    known = colon and re.fullmatch(r"[\w, *.]+", name)
    return f"`{name}`: {_prose(rest)}" if known else _prose(text)


def _prose(text: str) -> str:
    """Docstring text as Markdown: double backquotes are code, references are their names, nothing is HTML."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if number % 2 else re.sub(r"([<*\[_])", r"\\\1", part) for number, part in enumerate(parts))


def _fenced(text: str, language: str = "text") -> list[str]:
    return [f"```{language}", *text.splitlines(), "```"]
