"""Declaring configuration keys, and checking a configuration against the declarations.

A schema is a nested dict whose leaves are `Key`s; `Named` stands where a recipe chooses the names of the children. The
keys themselves are declared in `mllm_jax.config`, and a connector's options by the connector.
"""

import contextlib
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mllm_jax import storage

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # of stages, sources and benchmarks: they name directories
PLURALS = {str: "strings", int: "integers"}


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key and how to fix it."""


@contextlib.contextmanager
def config_key_error(key: str) -> Iterator[None]:
    """Turns a ValueError raised inside into a ConfigError that names the key it comes from."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"config key {key!r}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Key:
    """One configuration key.

    Attributes:
      default: its value unless a recipe or the command line says otherwise; None makes None a valid value.
      help: what it means, in one line.
      of: the type of its values, where the default is None or does not tell. A `dict` is not looked into.
      choices: the valid values.
      least, above, below: bounds of a number (`least` itself is valid, `above` and `below` are not).
      special: numbers outside the bounds that are valid too.
      items: type of the items of a tuple.
      fault: says what is wrong with a value that passed all of the above, or None.
      path: whether it is a path on this machine, whose `~` is expanded.
      bucket: whether that may be in a bucket, too.
      resumable: whether a stopped run may be continued with another value.
      synonyms: what people type who do not know the key.
    """

    default: Any
    help: str = ""
    _: dataclasses.KW_ONLY
    of: type | None = None
    choices: tuple[Any, ...] = ()
    least: int | float | None = None
    above: int | float | None = None
    below: int | float | None = None
    special: tuple[Any, ...] = ()
    items: type | None = None
    fault: Callable[[Any], str | None] | None = None
    path: bool = False
    bucket: bool = False
    resumable: bool = False
    synonyms: tuple[str, ...] = ()

    @property
    def kind(self) -> type:
        """The type of its values."""
        return self.of or type(self.default)

    @property
    def valid(self) -> str:
        """The values that its type does not tell: choices or bounds; "" if there are none."""
        if self.choices:
            return ", ".join(map(repr, self.choices))
        bounds = (("at least", self.least), ("above", self.above), ("below", self.below))
        text = " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)
        return " or ".join([text, *map(repr, self.special)]) if text else ""

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, in words that follow the key's name ("must be ..."); None if nothing is."""
        if value is None and self.default is None:
            return None
        if self.choices:
            if value in self.choices and type(value) is self.kind:
                return None
            return f"is {value!r}; {did_you_mean(value, self.choices)}valid: {self.valid}"
        if not self._has_type(value):
            name = self.kind.__name__ + (f" of {PLURALS[self.items]}" if self.items else "")
            return f"must be of type {name}, not {value!r}"
        if _is_number(value) and value not in self.special and not self._within(value):
            return f"must be {self.valid or 'finite'}, not {value!r}"
        if self.path and (fault := storage.fault(value, self.bucket)):
            return f"is {value!r}: it {fault}"
        return self.fault(value) if self.fault else None

    def _has_type(self, value: Any) -> bool:
        if self.kind is float:
            return _is_number(value)
        if self.kind is dict:
            return isinstance(value, Mapping | ConfigDict)
        if self.kind is tuple:
            items = self.items or object
            return isinstance(value, tuple | list) and all(
                isinstance(item, items) and not (items is int and isinstance(item, bool)) for item in value
            )
        return isinstance(value, self.kind) and not (self.kind is int and isinstance(value, bool))

    def _within(self, value: int | float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


@dataclasses.dataclass(frozen=True)
class Named:
    """Children that a recipe names freely, all alike.

    Attributes:
      entry: the schema of each child.
      help: what they are, in one line.
      created_by: keys of a child; an override of one of them on the command line adds the child.
      resumable: whether a stopped run may be continued with children added or left out.
    """

    entry: "Schema"
    help: str
    created_by: tuple[str, ...] = ()
    resumable: bool = False


Schema = Mapping[str, Any]  # name -> Key, Named or Schema


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def nearest(word: Any, valid: Iterable[Any]) -> str:
    """The valid word that is spelled most like `word`; "" if none is much like it."""
    return next(iter(difflib.get_close_matches(str(word), [str(choice) for choice in valid], n=1)), "")


def did_you_mean(word: Any, valid: Iterable[Any]) -> str:
    """`did you mean 'x'? ` for the valid word that is nearest, or ""."""
    near = nearest(word, valid)
    return f"did you mean {near!r}? " if near else ""


def regular_expression(pattern: str) -> str | None:
    """What keeps a string from being a regular expression, for `Key.fault`."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"holds {pattern!r}, which is not a regular expression: {error}"
    return None


def join(path: str, key: str) -> str:
    """A key below another; `path` is empty at the top."""
    return f"{path}.{key}" if path else key


def defaults(schema: Schema) -> ConfigDict:
    """A configuration that holds the default of every key; `Named` children are left to the recipe."""
    return ConfigDict({name: _default(node) for name, node in schema.items()})


def _default(node: Any) -> Any:
    if isinstance(node, Key):
        return placeholder(node.kind) if node.default is None else node.default
    return {} if isinstance(node, Named) else defaults(node)


def find(schema: Schema, path: str) -> Any:
    """The Key, Named or Schema of a concrete key such as "stages.finetune.lora.rank".

    Raises:
      ConfigError: there is no such key.
    """
    node = schema
    for name in path.split("."):
        if isinstance(node, Named):
            node = node.entry
        elif isinstance(node, Mapping) and name in node:
            node = node[name]
        else:
            raise ConfigError(f"there is no config key {path!r}")
    return node


def walk(schema: Schema, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every (path, node) in the order of the declarations, `*` standing for names that a recipe chooses."""
    for name, node in schema.items():
        here = join(path, name)
        yield here, node
        if not isinstance(node, Key):
            yield from walk(*((node.entry, f"{here}.*") if isinstance(node, Named) else (node, here)))


def unknown_key(schema: Schema, path: str, name: str, valid: Sequence[str], hint: str = "") -> ConfigError:
    """The error for a key that is not there.

    Args:
      schema: of the whole configuration.
      path: of its parent.
      valid: names that the parent has.
      hint: what else to say.
    """
    near = [other for other in valid if name.lower() in _synonyms(_child(schema, path, other))]
    if near := next(iter(near), nearest(name, valid)):
        advice = f"did you mean {join(path, near)!r}? "
    else:
        places = [p for p, node in walk(schema) if name.lower() in (p.split(".")[-1], *_synonyms(node))]
        advice = f"there is {' and '.join(map(repr, places))}; " if places else ""
    listed = ", ".join(sorted(valid)) or "nothing"
    return ConfigError(f"unknown config key {join(path, name)!r}; {advice}valid here: {listed}{hint}")


def _child(schema: Schema, path: str, name: str) -> Any:
    try:
        return find(schema, join(path, name))
    except ConfigError:
        return None


def _synonyms(node: Any) -> tuple[str, ...]:
    return node.synonyms if isinstance(node, Key) else ()


def check_tree(config: ConfigDict, whole: Schema, schema: Schema | None = None, path: str = "") -> None:
    """Checks that `config` has exactly the keys of its schema, and a valid value for each.

    Args:
      whole: the schema of the whole configuration.
      schema: that of the part below `path`; None is the whole.

    Raises:
      ConfigError: naming the key, what is wrong, and the nearest valid key or value.
    """
    schema = whole if schema is None else schema
    for name in config:
        if name not in schema:
            raise unknown_key(whole, path, name, list(schema))
    for name, node in schema.items():
        here = join(path, name)
        if name not in config:
            raise ConfigError(f"config key {here!r} is missing; start from mllm_jax.config.default_config()")
        value = config[name]
        if isinstance(node, Key):
            if problem := node.problem(value):
                raise ConfigError(f"config key {here!r} {problem}")
        elif not isinstance(value, ConfigDict):
            what = "of named entries" if isinstance(node, Named) else f"with {', '.join(sorted(node))}"
            raise ConfigError(f"config key {here!r} must be a dict {what}, not {value!r}")
        elif isinstance(node, Named):
            _check_children(value, whole, node, here)
        else:
            check_tree(value, whole, node, here)


def _check_children(children: ConfigDict, whole: Schema, named: Named, path: str) -> None:
    for name, child in children.items():
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} in config key {path!r} cannot be a name: use letters, digits, '_' and '-'"
            )
        here = f"{path}.{name}"
        if not isinstance(child, ConfigDict):
            raise ConfigError(
                f"config key {here!r} must be a dict with {', '.join(sorted(named.entry))}, not {child!r}"
            )
        check_tree(child, whole, named.entry, here)
