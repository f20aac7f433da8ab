"""Settings' fields as command-line options, and back."""

import inspect
from collections.abc import Callable
from dataclasses import Field, fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer

from fullframe.errors import InvalidInput

Number = TypeVar("Number", int, float)


def check_is_other(output: Path, source: str | Path) -> None:
    """Raise typer.BadParameter for an output file that is the source, by whatever path."""
    if output.exists() and Path(source).exists() and output.samefile(source):
        raise typer.BadParameter(f"{str(output)!r} is the source; name another file", param_hint="--output")


def spread_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command, taking one option per field of each parameter whose default is an instance of a settings class.

    A field is one where its metadata has an "about", which is the option's help. Tuples are typed with commas.
    """
    signature = inspect.signature(command)
    groups: dict[str, Any] = {p.name: p.default for p in signature.parameters.values() if is_dataclass(p.default)}
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        settings = groups.get(parameter.name)
        options = [parameter] if settings is None else [_option(settings, each) for each in _settable(settings)]
        parameters += (option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options)

    @wraps(command)
    def run(**values: Any) -> None:
        for name, settings in groups.items():
            parsed: dict[str, Any] = {}
            for each in _settable(settings):
                parsed |= _parsed(each, values.pop(each.name))
            values[name] = replace(settings, **parsed)
        command(**values)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def spelled(settings: Any) -> dict[str, str]:
    """Each field as its option takes it: "1,3,3", or for sizes with weights "24:15,32:50"."""
    texts = {}
    for each in _settable(settings):
        value = getattr(settings, each.name)
        if each.name == "sizes" and settings.size_weights:
            pairs = zip(value, settings.size_weights, strict=True)
            texts[each.name] = ",".join(f"{size}:{weight:g}" for size, weight in pairs)
        else:
            texts[each.name] = ",".join(f"{x:g}" for x in value) if isinstance(value, tuple) else str(value)
    return texts


def numbers(text: str, kind: type[Number], name: str) -> tuple[Number, ...]:
    """The numbers of "1,3,3"; raises InvalidInput."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidInput(f"{name} is {text!r}; it must be numbers with commas between", name) from error


def _settable(settings: Any) -> list[Field[Any]]:
    return [each for each in fields(settings) if "about" in each.metadata]


def _option(settings: Any, each: Field[Any]) -> inspect.Parameter:
    value = getattr(settings, each.name)
    kind, default = (str, spelled(settings)[each.name]) if isinstance(value, tuple) else (type(value), value)
    annotation: Any = Annotated[kind, typer.Option(help=each.metadata["about"])]
    return inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parsed(each: Field[Any], value: Any) -> dict[str, Any]:
    """A field's value from its option's; the weights that sizes may have are another field's."""
    kinds = get_args(each.type)
    if not kinds:
        return {each.name: value}
    if each.name != "sizes":
        return {each.name: numbers(value, kinds[0], each.name)}
    pairs = [part.partition(":") for part in value.split(",")]
    sides = numbers(",".join(side for side, _, _ in pairs), int, each.name)
    weighted = any(colon for _, colon, _ in pairs)
    weights = numbers(",".join(weight or "1" for _, _, weight in pairs), float, each.name) if weighted else ()
    return {each.name: sides, "size_weights": weights}
