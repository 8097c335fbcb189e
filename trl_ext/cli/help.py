"""
The help text of a recipe, from the source files of its dataclasses.

To build a parser from dataclasses they have to be imported, and with them TRL, transformers and torch, which takes
many seconds. Here their files are parsed instead: nothing of them is run but the expressions that fields are declared
with. `tests/unit/cli/test_recipe_help.py` compares what is read with what the imported classes say.
"""

import ast
import builtins
import functools
import importlib.util
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from enum import Enum
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

OUR_PACKAGE = __name__.partition(".")[0]
MOST_COLUMNS = 100  # of the help text, where the terminal has more
FEWEST_COLUMNS = 40


class UnreadableError(Exception):
    """The source of a class says something that cannot be known without importing it."""


class AsWritten(str):
    """A default that cannot be known without importing its module: the source text of the expression."""


@dataclass(frozen=True)
class Option:
    """
    A field of a dataclass, as an option of the command line.

    Attributes:
        name (`str`): of the field.
        type (`str`): its annotation, without `None`; `str` for an enumeration, see `choices`.
        default (`Any`): `MISSING` if it has to be given, [`AsWritten`] if it cannot be known, of an enumeration the
            value of its member.
        help (`str`): what the field's metadata or else the docstring of its class says; empty if neither does.
        choices (`tuple`, *optional*): what it can be set to.
    """

    name: str
    type: str
    default: Any
    help: str
    choices: tuple[Any, ...] | None


@dataclass(frozen=True)
class Group:
    """
    Options that are shown together.

    Attributes:
        name (`str`): of the dataclass.
        package (`str`): it comes from.
        options (`tuple[Option, ...]`): as this dataclass declares them, or as those that inherit it change them.
    """

    name: str
    package: str
    options: tuple[Option, ...]


# Reading


class SourceModule:
    """A module by its file: what its names stand for, as far as that can be known without running it."""

    def __init__(self, name: str, spec: ModuleSpec):
        self.name = name
        self.package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
        # text, which the import machinery asks for; a transformers that is imported has paths here
        self.search_locations = [str(folder) for folder in spec.submodule_search_locations or ()]
        self.file = Path(spec.origin)
        self._names = _definitions(ast.parse(self.file.read_text(encoding="utf-8")).body)

    def find(self, name: str) -> tuple["SourceModule", ast.AST]:
        """
        Where a name is defined, through all imports: the module, and the class or the expression of the last value.

        Raises:
            UnreadableError: it is not defined in a way that is understood.
        """
        node = self._names.get(name)
        if node is None:
            raise UnreadableError(f"{self.name} has no {name} that can be read from {self.file}")
        if isinstance(node, ast.ImportFrom):
            target = "." * node.level + (node.module or "")
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            return source_module(importlib.util.resolve_name(target, self.package)).find(original)
        return self, node

    def find_class(self, node: ast.expr) -> tuple["SourceModule", ast.ClassDef] | None:
        """Module and definition of the class that an expression names, or `None` if that is not known."""
        try:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):  # module.Class
                imported = self._names.get(node.value.id)
                if not isinstance(imported, ast.Import):
                    return None
                path = next(a.name for a in imported.names if (a.asname or a.name) == node.value.id)
                module, found = source_module(path).find(node.attr)
            elif isinstance(node, ast.Name):
                module, found = self.find(node.id)
            else:
                return None
        except UnreadableError:
            return None
        return (module, found) if isinstance(found, ast.ClassDef) else None

    def evaluate(self, node: ast.expr, class_names: dict[str, ast.AST] | None = None) -> Any:
        """
        The value of an expression of literals, names that are defined by such expressions, and builtins.

        Args:
            node (`ast.expr`): the expression.
            class_names (`dict`, *optional*): what the body of the class around it defines.

        Raises:
            UnreadableError: it has other parts.
        """
        if isinstance(node, ast.Constant):
            return node.value
        parts = list(ast.walk(node))
        bound = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
        bound |= {part.arg for part in parts if isinstance(part, ast.arg)}
        free = {part.id for part in parts if isinstance(part, ast.Name)} - bound
        try:
            values = {name: self.value(name, class_names) for name in free if not hasattr(builtins, name)}
            return eval(compile(ast.Expression(node), str(self.file), "eval"), values)
        except UnreadableError:
            raise
        except Exception as error:  # of any kind: it may ask a stand-in for what only the real object has
            raise UnreadableError(f"{ast.unparse(node)} in {self.file}: {error}") from error

    def value(self, name: str, class_names: dict[str, ast.AST] | None = None) -> Any:
        """The value of a name, see [`evaluate`]; an enumeration is rebuilt from its members."""
        if class_names and name in class_names:
            return self.evaluate(class_names[name], class_names)
        module, node = self.find(name)
        if isinstance(node, ast.ClassDef):
            members = module.members(node)
            if members is None:
                raise UnreadableError(f"{name} in {self.file} is a class")
            return Enum(name, members)
        if not isinstance(node, ast.expr):
            raise UnreadableError(f"{name} in {self.file} is not a value")
        return module.evaluate(node)

    def members(self, node: ast.ClassDef) -> dict[str, Any] | None:
        """Values of an enumeration by name; `None` for any other class."""
        if not any(ast.unparse(base).endswith("Enum") for base in node.bases):
            return None
        return {name: self.evaluate(value) for name, value in _definitions(node.body).items() if not _is_code(value)}


def _is_code(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom)


def _definitions(body: Sequence[ast.stmt]) -> dict[str, ast.AST]:
    """What statements define by name. Conditions are taken to hold and nothing to fail; the last definition counts."""
    found: dict[str, ast.AST] = {}
    for statement in body:
        if isinstance(statement, ast.If | ast.Try | ast.With):
            found.update(_definitions(statement.body))
        elif isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found[statement.name] = statement
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            found.update({alias.asname or alias.name: statement for alias in statement.names})
        elif isinstance(statement, ast.Assign):
            found.update({target.id: statement.value for target in statement.targets if isinstance(target, ast.Name)})
        elif isinstance(statement, ast.AnnAssign) and statement.value and isinstance(statement.target, ast.Name):
            found[statement.target.id] = statement.value
    return found


@functools.cache
def source_module(name: str) -> SourceModule:
    """
    A module by its dotted name. Neither it nor a package it is in is imported.

    Raises:
        UnreadableError: there is no such module, or it is not written in Python.
    """
    package, _, _ = name.rpartition(".")
    if package:  # `importlib.util.find_spec` would import the package
        spec = PathFinder.find_spec(name, source_module(package).search_locations)
    else:
        spec = importlib.util.find_spec(name)
    if spec is None or not str(spec.origin).endswith(".py"):
        raise UnreadableError(f"there is no source file of the module {name}")
    return SourceModule(name, spec)


class _Reading:
    """
    Base of the classes that stand for classes that were read. They inherit as those do, so that Python itself finds
    the order in which they are searched.
    """

    source: SourceModule
    names: dict[str, ast.AST]  # what the body defines
    own: dict[str, Option]  # fields that the body declares, in order


@functools.cache
def _read_class(module: SourceModule, node: ast.ClassDef) -> type[_Reading]:
    bases = []
    for base in node.bases:
        found = module.find_class(base.value if isinstance(base, ast.Subscript) else base)
        if found is None:
            raise UnreadableError(f"{node.name} in {module.file} inherits {ast.unparse(base)}, which is not found")
        if found[0].name.partition(".")[0] not in sys.stdlib_module_names:
            bases.append(_read_class(*found))
    names = _definitions(node.body)
    is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    own = dict(_fields(module, node, names)) if is_dataclass else {}
    return type(node.name, tuple(bases) or (_Reading,), {"source": module, "names": names, "own": own})


def _fields(module: SourceModule, node: ast.ClassDef, names: dict[str, ast.AST]) -> Iterator[tuple[str, Option]]:
    docstring = ast.get_docstring(node) or ""
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        name, annotation = statement.target.id, statement.annotation
        if re.match(r"(\w+\.)?(ClassVar|InitVar)\b", ast.unparse(annotation)):
            continue
        how: dict[str, ast.expr] = {"default": statement.value} if statement.value is not None else {}
        if isinstance(statement.value, ast.Call) and re.fullmatch(
            r"(dataclasses\.)?field", ast.unparse(statement.value.func)
        ):
            how = {keyword.arg: keyword.value for keyword in statement.value.keywords}
        if "init" in how and not module.evaluate(how["init"], names):
            continue
        default: Any = MISSING
        try:
            if "default" in how:
                default = module.evaluate(how["default"], names)
            elif "default_factory" in how:
                default = module.evaluate(how["default_factory"], names)()
            default = default.value if isinstance(default, Enum) else default
        except UnreadableError:
            default = AsWritten(ast.unparse(how.get("default") or how["default_factory"]))
        metadata = how.get("metadata", ast.Dict(keys=[], values=[]))
        if not isinstance(metadata, ast.Dict):
            raise UnreadableError(f"the metadata of {name} in {module.file} is not written as a dict")
        said = {module.evaluate(key): value for key, value in zip(metadata.keys, metadata.values, strict=True)}
        text = module.evaluate(said["help"], names) if "help" in said else described(docstring, name)
        shown, choices = _type_and_choices(module, annotation)
        if choices is None and "choices" in said:
            try:
                choices = tuple(module.evaluate(said["choices"], names))
            except UnreadableError:  # computed, as those of the log levels, which the text names too
                choices = None
        yield name, Option(name, shown, default, text, choices)


def _type_and_choices(module: SourceModule, annotation: ast.expr) -> tuple[str, tuple[Any, ...] | None]:
    """An annotation without `None`, and what it alone says can be set, by the rules of `HfArgumentParser`."""
    members = [part for part in _union(annotation) if ast.unparse(part) != "None"]
    texts, choices = [], None
    for part in members:
        found = module.find_class(part)
        values = found and found[0].members(found[1])
        if values:
            choices = tuple(values.values())
        texts.append("str" if values else ast.unparse(part))
    if len(members) == 1 and isinstance(members[0], ast.Subscript) and ast.unparse(members[0].value) == "Literal":
        values = members[0].slice
        choices = tuple(map(module.evaluate, values.elts if isinstance(values, ast.Tuple) else [values]))
    return " | ".join(dict.fromkeys(texts)), choices


def _union(annotation: ast.expr) -> list[ast.expr]:
    if isinstance(annotation, ast.BinOp):
        return _union(annotation.left) + _union(annotation.right)
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) in ("Optional", "Union"):
        inner = annotation.slice
        return [one for part in (inner.elts if isinstance(inner, ast.Tuple) else [inner]) for one in _union(part)]
    return [annotation]


def described(docstring: str, name: str) -> str:
    """The first paragraph that a docstring's list of parameters has for one of them, in one line."""
    entry = re.search(rf"(?m)^( *){name} ?\([^\n]*?\):(.*(?:\n\1 +\S.*)*)", docstring)
    return " ".join(entry[2].split()) if entry else ""


def read_dataclass(path: str) -> type[_Reading]:
    """
    Read a dataclass by its dotted name, such as `"trl.ModelConfig"`.

    Raises:
        ValueError: its source does not say what it has to.
    """
    module, _, name = path.rpartition(".")
    try:
        found_in, node = source_module(module).find(name)
        if not isinstance(node, ast.ClassDef):
            raise UnreadableError(f"{name} in {found_in.file} is not a class")
        return _read_class(found_in, node)
    except UnreadableError as error:
        raise ValueError(
            f"{path} cannot be read from its source file: {error}. Declare it as the other configs are, at the top "
            "level of a module."
        ) from error


def options_of(reading: type[_Reading]) -> dict[str, Option]:
    """Options of a dataclass by name, in the order of `dataclasses.fields`."""
    return {name: option for one in declaring_classes(reading)[::-1] for name, option in one.own.items()}


def unused_fields(reading: type[_Reading]) -> dict[str, str]:
    """The class's `unused_fields`: names of inherited fields that it refuses, and what to set instead."""
    for one in declaring_classes(reading):
        if "unused_fields" in one.names:
            return one.source.evaluate(one.names["unused_fields"], one.names)
    return {}


def declaring_classes(reading: type[_Reading]) -> list[type[_Reading]]:
    """The class and all it inherits, in the order in which Python searches them."""
    return [one for one in reading.__mro__ if issubclass(one, _Reading) and one is not _Reading]


def recipe_dataclasses(file: Path) -> tuple[str, ...]:
    """
    The dotted names that a recipe's file has as `DATACLASSES`.

    Raises:
        ValueError: it has none, or not as texts.
    """
    recipe = SourceModule(file.stem, importlib.util.spec_from_file_location(file.stem, file))
    try:
        return tuple(recipe.value("DATACLASSES"))
    except UnreadableError as error:
        raise ValueError(
            f"{file} does not say which options it has: {error}. Set DATACLASSES to the dotted names of its "
            "dataclasses."
        ) from error


# Showing


def groups(paths: Sequence[str]) -> list[Group]:
    """
    The options of a recipe's dataclasses, without those that are refused, and each once: under the last class of this
    package that declares it, or else under the first class that does. Groups of this package come first, then what
    comes from TRL (of that what is only inherited comes last), then the rest.
    """
    members: dict[type[_Reading], list[Option]] = {}
    named = [read_dataclass(path) for path in paths]
    for reading in named:
        options, refused, found = options_of(reading), unused_fields(reading), declaring_classes(reading)
        ours = [one for one in found if package_of(one) == OUR_PACKAGE]
        # a class's own declarations say in which order its options stand
        for one in [*ours, *[one for one in found[::-1] if one not in ours]]:
            shown = {option.name for group in members.values() for option in group}
            mine = [options[name] for name in one.own if name not in shown and name not in refused]
            members[one] = [*members.get(one, []), *mine]
    order = sorted(members, key=lambda one: (place_of(one), package_of(one) != OUR_PACKAGE and one not in named))
    return [Group(one.__name__, package_of(one), tuple(members[one])) for one in order if members[one]]


def refused_options(paths: Sequence[str]) -> dict[str, str]:
    """Options that a recipe's dataclasses have and refuse, each with what to set instead."""
    readings = [read_dataclass(path) for path in paths]
    return {
        name: why
        for reading in readings
        for name, why in unused_fields(reading).items()
        if name in options_of(reading)
    }


def package_of(reading: type[_Reading]) -> str:
    return reading.source.name.partition(".")[0]


def place_of(reading: type[_Reading]) -> int:
    """0 for a class of this package, 1 for one of TRL, 2 for others."""
    return {OUR_PACKAGE: 0, "trl": 1}.get(package_of(reading), 2)


def shown_value(value: Any) -> str:
    """A default as it is shown; text as it is typed, unless that would not be seen."""
    if isinstance(value, str) and re.fullmatch(r"\S+", value):
        return str(value)
    return repr(value)


def shown_text(option: Option) -> str:
    """What is said about an option, and its choices, as far as the text does not name them all."""
    text = option.help.replace("%%", "%").strip()  # argparse's way to write it
    text = re.sub(r"\[(`[^`]+`)\]", r"\1", text)
    if text and not text.endswith((".", "?", "!")):
        text += "."
    if option.choices is not None and not all(str(choice) in text for choice in option.choices):
        text += f" One of: {', '.join(map(str, option.choices))}."
    return text.strip()


def recipe_help(prog: str, docstring: str, paths: Sequence[str], *, width: int | None = None) -> str:
    """
    The text that a recipe prints for `--help`.

    Args:
        prog (`str`): its file.
        docstring (`str`): of the recipe.
        paths (`Sequence[str]`): dotted names of its dataclasses.
        width (`int`, *optional*): columns; by default those of the terminal, at most 100.
    """
    width = max(width or min(shutil.get_terminal_size().columns, MOST_COLUMNS), FEWEST_COLUMNS)

    def filled(text: str, indent: str = "", hanging: str | None = None) -> str:
        hanging = indent if hanging is None else hanging
        return _wrapped(text, width, indent, hanging)

    parts = [f"usage: {prog} [--config FILE] [--NAME VALUE ...]", *_filled_docstring(docstring, width)]
    parts.append(
        filled(
            "Options are written --name value, or --name alone to set a bool that has a default; the values of a list "
            "have spaces between them, and a dict is JSON. A bool that is True by default is also unset by --no_name. "
            "In names - is as good as _. Each is followed by its type and, if it has one, its default."
        )
    )
    entries = [("-h, --help", "Show this text and end.")]
    entries.append(("--config FILE", "YAML file with one `name: value` per line. The command line wins over it."))
    parts.append("\n".join(f"  {head}\n{filled(text, ' ' * 6)}" for head, text in entries))
    for group in groups(paths):
        lines = [f"{group.name} ({group.package}):"]
        for option in group.options:
            head = f"  --{option.name} {option.type}"
            if option.default is MISSING:
                head += ", required"
            elif option.default is not None:
                head = _with_default(head, shown_value(option.default), width)
            lines.append(head)
            lines += [filled(shown_text(option), " " * 6)] if shown_text(option) else []
        parts.append("\n".join(lines))
    refused = refused_options(paths)
    if refused:
        lines = [filled(f"--{name}: {why}", "  ", " " * 6) for name, why in refused.items()]
        parts.append("\n".join(["Inherited, and refused if set:", *lines]))
    return "\n\n".join(parts) + "\n"


def _with_default(head: str, default: str, width: int) -> str:
    whole = f"{head} = {default}"
    return whole if len(whole) <= width else f"{head} =\n          {default}"


def _filled_docstring(docstring: str, width: int) -> list[str]:
    """Paragraphs in the width; indented lines are commands, which are broken with a backslash."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", textwrap.dedent(docstring).strip("\n")):
        if not paragraph.startswith(" "):
            paragraphs.append(_wrapped(paragraph, width))
            continue
        commands = [_wrapped(line, width - 2, " " * 4, " " * 8) for line in paragraph.splitlines()]
        paragraphs.append("\n".join(command.replace("\n", " \\\n") for command in commands))
    return paragraphs


def _wrapped(text: str, width: int, indent: str = "", hanging: str = "") -> str:
    """Text in lines of a width, but for words that are longer."""
    return textwrap.fill(
        " ".join(text.split()), width, initial_indent=indent, subsequent_indent=hanging,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
