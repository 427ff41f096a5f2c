"""Imports what the user names, and says in one line why that cannot be done."""

import difflib
import importlib
import os
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from catga_bus.errors import ConfigurationError
from catga_bus.messages import Command, Event, MessageMeta, Request, options_of

_MODULE_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*\Z")


def load_module(name: str) -> ModuleType:
    """Import a module; the working directory comes first, as with `python -m`.

    Raises:
        ConfigurationError: There is none of that name, or it fails while it is imported; the text
        then names the line
            and the error.
    """
    if not _MODULE_NAME.match(name):
        hint = name.removesuffix(".py").strip("./").replace("/", ".")
        meant = f"; did you mean {hint!r}?" if _MODULE_NAME.match(hint) else ""
        raise ConfigurationError(f"{name!r} is not the name of a module, as in `import shop.orders`{meant}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ConfigurationError(_import_failure(name, error)) from error
        raise ConfigurationError(
            f"there is no module {error.name!r}, neither in {here} nor installed{_similar(name)}"
        ) from error
    except (Exception, SystemExit) as error:
        raise ConfigurationError(_import_failure(name, error)) from error


def load_attribute(target: str, default: str) -> Any:
    """Return what `module:name` stands for; `module` alone means `module:<default>`.

    Raises:
        ConfigurationError: The module cannot be imported, or has no such attribute.
    """
    module_name, colon, path = target.partition(":")
    module = load_module(module_name)
    found: Any = module
    path = path if colon else default
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            others = [other for other in vars(module) if not other.startswith("_")]
            raise ConfigurationError(f"module {module_name!r} has no {path!r}{_did_you_mean(path, others)}") from None
    return found


def find_message_class(module_name: str, type_name: str) -> type:
    """Return the message class of a module that has a name: on the wire, or in Python.

    Raises:
        ConfigurationError: The module cannot be imported, or holds no such message.
    """
    module = load_module(module_name)
    roots = (Request, Command, Event)
    messages = {
        name: value for name, value in vars(module).items() if isinstance(value, MessageMeta) and value not in roots
    }
    for value in messages.values():
        if options_of(value).type_name == type_name:
            return value
    if type_name in messages:
        return messages[type_name]
    raise ConfigurationError(
        f"module {module_name!r} has no message {type_name!r}; it has {', '.join(sorted(messages)) or 'none at all'}"
    )


def _import_failure(name: str, error: BaseException) -> str:
    """Say where in the user's code the import failed: the file, the line and its text."""
    kind = type(error).__name__
    if isinstance(error, SystemExit):
        what = f"it ended the program (exit code {error.code!r})"
    else:
        lines = traceback.format_exception_only(error)
        what = lines[-1].strip() if lines else kind
    if isinstance(error, SyntaxError) and error.filename:
        line = (error.text or "").strip()
        return f"{name!r} cannot be imported: {_place(error.filename, error.lineno, line)}: {what}"
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and frame.filename != __file__
    ]
    # The last line outside this package is the user's: what it called raised the error, but it is
    # what to change.
    package = str(Path(__file__).parent.parent) + os.sep
    frames = [frame for frame in own if not frame.filename.startswith(package)] or own
    if not frames:
        return f"{name!r} cannot be imported: {what}"
    frame = frames[-1]
    place = _place(frame.filename, frame.lineno, frame.line)
    return f"{name!r} cannot be imported: {place}: {what}"


def _place(file: str, line: int | None, text: str | None) -> str:
    shown = os.path.relpath(file)
    shown = file if shown.startswith("..") else shown
    return f"{shown}:{line}: `{text}`" if text else f"{shown}:{line}"


def _similar(name: str) -> str:
    neighbours = [path.stem for path in Path.cwd().glob("*.py")]
    neighbours += [path.parent.name for path in Path.cwd().glob("*/__init__.py")]
    return _did_you_mean(name.partition(".")[0], neighbours)


def _did_you_mean(name: str, others: list[str]) -> str:
    close = difflib.get_close_matches(name, others, n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
