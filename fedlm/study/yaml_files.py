"""Files of settings are YAML, read strictly: no code, no repeated keys, no aliases."""

import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from fedlm.base.errors import UserError
from fedlm.base.settings import Settings

LARGEST_FILE = 1 << 18  # bytes; what fits is read in seconds

Content = TypeVar("Content", bound=Settings)


def printable(text: str, longest: int) -> str:
    """Return a text that fits into one line: short, and without control characters."""
    text = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return text if text.isprintable() else repr(text)[1:-1]


def shown(value: Any) -> str:
    try:
        return printable(repr(value), 80)
    except RecursionError:
        return "a value nested too deeply"
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "a number with too many digits"


class _Loader(yaml.SafeLoader):
    """Safe YAML in which repeated keys are errors and aliases are refused (they can expand without bound)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(
                f"line {event.start_mark.line + 1}: alias *{event.anchor}; allowed: no anchors and aliases"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            try:
                if key in seen:
                    raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice")
                seen.add(key)
            except TypeError as error:
                raise yaml.YAMLError(
                    f"line {key_node.start_mark.line + 1}: a key must be a word or number"
                ) from error
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int | float:
        """Refuse numbers in base 60 (1:30 is 90 in YAML 1.1) and long ones, which take minutes to read."""
        text = str(self.construct_scalar(node))
        if ":" in text or len(text) > 100:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(
                f"line {line}: {shown(text)}; allowed: a number in decimal digits, or a text"
            )
        kind = node.tag.rpartition(":")[2]
        return super().construct_yaml_int(node) if kind == "int" else super().construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_decimal)
# YAML 1.1 reads 2e-5 as text; every study has such a learning rate.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def read_yaml(path: Path) -> dict:
    """Read a YAML table. Raises UserError naming file and line."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a file; allowed: a YAML study file")
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{path}: larger than 256 KiB; allowed: a study file")
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); allowed: a YAML study file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); allowed: a YAML study file") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # PyYAML raises any error where a value does not match its tag (!!int "").
        reason = printable(" ".join(str(error).split()), 300)
        raise UserError(f"{path}: not valid YAML: {reason or type(error).__name__}") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply; allowed: a YAML study file") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: {shown(values)}; allowed: a table of settings")
    return values


def read_settings(path: Path, content: type[Content]) -> Content:
    """Read a YAML table as settings. Raises UserError naming the file and the first wrong key and value."""
    try:
        return content.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {place}: {shown(first['input'])}; {reason}") from None
