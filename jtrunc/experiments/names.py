"""Names with options, as they are written on the command line: ``name:option=value,option=value``."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Choice(NamedTuple):
    """A named constructor and the options that were given for it.

    Attributes:
      name: the name in its table.
      options: every option of the constructor, given or default, in the order of its signature.
      make: the constructor; ``make(*arguments, **options)`` builds the part.
      given: the names of the options that were given.
    """

    name: str
    options: dict[str, Any]
    make: Callable[..., Any]
    given: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """As it was given, in one notation: ``online-artbp:mean-length=50``."""
        return notation(self.name, {key: self.options[key] for key in self.options if key in self.given})

    @property
    def full_label(self) -> str:
        """With every option: equal for equal parts."""
        return notation(self.name, self.options)


def notation(name: str, options: Mapping[str, Any]) -> str:
    """``name:option=value,option=value``."""
    pairs = (f"{k.replace('_', '-')}={v:g}" if isinstance(v, float) else f"{k.replace('_', '-')}={v}"
             for k, v in options.items())  # fmt: skip
    return ":".join(filter(None, [name, ",".join(pairs)]))


def did_you_mean(word: str, known: list[str]) -> str:
    """``did you mean 'x'? `` when a known word is near, then the list of all of them."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return (f"did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(known)}."


def choose(text: str, table: Mapping[str, Callable[..., Any]], kind: str) -> Choice:
    """Reads ``name:option=value,...`` against a table of constructors.

    The options of a constructor are its keyword-only parameters; their annotations (int, float, bool,
    str) say how a value is read. Dashes and underscores are the same.

    Args:
      text: the notation, e.g. ``"truncated-bptt:length=50"``.
      table: the known names and their constructors.
      kind: what the names stand for, used in messages, e.g. ``"estimator"``.

    Raises:
      ValueError: unknown name, unknown option, a value that cannot be read, an option without default
        that is not given. The message says what is known and what is near.

      >>> def truncated(system, *, length: int = 50): ...
      >>> choose("truncated:length=7", {"truncated": truncated}, "estimator").options
      {'length': 7}
      >>> choose("trucated", {"truncated": truncated}, "estimator")
      Traceback (most recent call last):
      ValueError: unknown estimator 'trucated': did you mean 'truncated'? Known: truncated.
    """
    name, _, rest = text.partition(":")
    name = name.strip().replace("_", "-")
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}: {did_you_mean(name, list(table))}")
    known = options_of(table[name])
    given = dict(_read_option(item, known, name) for item in rest.split(",") if item.strip())
    missing = [key for key, (_, default) in known.items() if default is inspect.Parameter.empty]
    if absent := [key for key in missing if key not in given]:
        raise ValueError(f"{kind} {name!r} needs {absent[0]}: write {name}:{absent[0].replace('_', '-')}=...")
    options = {key: given.get(key, default) for key, (_, default) in known.items()}
    return Choice(name, options, table[name], tuple(given))


def options_of(constructor: Callable[..., Any]) -> dict[str, tuple[type, Any]]:
    """The keyword-only parameters of a constructor: ``{name: (type, default)}``."""
    parameters = inspect.signature(constructor, eval_str=True).parameters.values()
    return {p.name: (p.annotation, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}


def describe(table: Mapping[str, Callable[..., Any]]) -> str:
    """One line a name for help texts: the notation with its defaults, and the first line of the docstring."""
    lines = []
    for name, constructor in table.items():
        defaults = {key: default for key, (_, default) in options_of(constructor).items()}
        summary = (inspect.getdoc(constructor) or "").partition("\n")[0]
        lines.append(f"  {notation(name, defaults)}\n      {summary}")
    return "\n".join(lines)


def _read_option(item: str, known: dict[str, tuple[type, Any]], name: str) -> tuple[str, Any]:
    key, equals, value = item.partition("=")
    key = key.strip().replace("-", "_")
    if key not in known:
        hint = did_you_mean(key, list(known)) if known else "It takes none."
        raise ValueError(f"unknown option {key!r} of {name!r}: {hint}")
    if not equals:
        raise ValueError(f"option {key!r} of {name!r} has no value: write {name}:{key.replace('_', '-')}=...")
    return key, _read_value(value.strip(), known[key][0], f"option {key!r} of {name!r}")


def _read_value(value: str, kind: type, what: str) -> Any:
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{what} must be true or false, got {value!r}")
        return value.lower() == "true"
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{what} must be of type {kind.__name__}, got {value!r}") from None
