"""Options of a command from a TOML file, and written back into one that can be given again.

A file has one option a line, named as its flag is, with "-" or "_":

    checkpoint = "nano"
    data = "chat.jsonl"
    lora-targets = ["attention.wq_b", "attention.wkv"]

Flags win over the file. The table `[made_by]` of a written file says what made it; it is not read.
"""

import argparse
import copy
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import v4jax

MADE_BY = "made_by"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """--config."""
    parser.add_argument(
        "--config",
        type=pathlib.Path,
        metavar="FILE",
        help="TOML with any of these options; flags win",
    )


def words_with_config(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The words of a command line, with those that its --config file stands for before them.

    What a flag says is left out of the file, also where it excludes the file's (--data beside tokens).

    Raises:
      ValueError: the file is no TOML, has an unknown key, or a value of the wrong kind.
      OSError: it cannot be read.
    """
    flags = [word.partition("=")[0] for word in words]
    if not any(len(flag) > 2 and "--config".startswith(flag) for flag in flags):
        return list(words)
    given = _given(parser, words)
    if "config" not in given:
        return list(words)
    path, actions = given["config"], _actions(parser)
    options = _read(path, actions)
    settled = set(given)
    for group in parser._mutually_exclusive_groups:
        names = {action.dest for action in group._group_actions}
        settled |= names if names & set(given) else set()
    found = []
    for name, value in options.items():
        if name not in settled:
            found += _words(path, actions[name], value)
    return [*found, *words]


def write_config(
    path: pathlib.Path, parser: argparse.ArgumentParser, args: argparse.Namespace
) -> None:
    """Writes all settings of a command, and what it was made by. The file appears whole or not at all."""
    lines = [
        f"{_flag(action).removeprefix('--')} = {_toml(value)}"
        for name, action in _actions(parser).items()
        if (value := getattr(args, name)) is not None and value != {}
    ]
    made_by = [f"{name} = {_toml(value)}" for name, value in _made_by().items()]
    text = "\n".join([*lines, "", f"[{MADE_BY}]", *made_by, ""])
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _given(parser: argparse.ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """What the words alone say, without defaults; nothing is required of them."""
    probe = copy.deepcopy(parser)
    for action in probe._actions:
        action.default, action.required = argparse.SUPPRESS, False
    for group in probe._mutually_exclusive_groups:
        group.required = False
    return vars(probe.parse_args(list(words)))


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Options that a file may have, by name."""
    return {
        action.dest: action
        for action in parser._actions
        if action.option_strings and action.dest not in ("help", "config")
    }


def _flag(action: argparse.Action) -> str:
    return next(text for text in action.option_strings if text.startswith("--"))


def _read(path: pathlib.Path, actions: Mapping[str, argparse.Action]) -> dict[str, Any]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f'{path} is not TOML: {error}. Expected lines as `seq-len = 512` or `data = "chat.jsonl"`.'
        ) from None
    found.pop(MADE_BY, None)
    options = {name.replace("-", "_"): value for name, value in found.items()}
    unknown = [name for name in found if name.replace("-", "_") not in actions]
    if unknown:
        accepted = ", ".join(_flag(action).removeprefix("--") for action in actions.values())
        raise ValueError(f"{path}: unknown {', '.join(unknown)}. Accepted: {accepted}.")
    if len(options) < len(found):
        raise ValueError(f"{path}: an option is there twice, once with - and once with _.")
    return options


def _words(path: pathlib.Path, action: argparse.Action, value: object) -> list[str]:
    """An option as a command line has it."""
    flag, is_switch = _flag(action), action.nargs == 0
    if is_switch != isinstance(value, bool):
        expected = "true or false" if is_switch else "no boolean"
        raise ValueError(f"{path}: {flag[2:]} is {value!r}: expected {expected}.")
    if is_switch:
        negative = next((text for text in action.option_strings if text.startswith("--no-")), None)
        off = [negative] if isinstance(action, argparse.BooleanOptionalAction) else []
        return [flag] if value else [text for text in off if text is not None]
    takes_many = action.nargs == "+" or isinstance(action, argparse._AppendAction)
    values = value if isinstance(value, list) else [value]
    if any(not isinstance(one, str | int | float) for one in values):
        raise ValueError(f"{path}: {flag[2:]} is {value!r}: expected a text or a number.")
    if isinstance(value, list) and not takes_many:
        raise ValueError(f"{path}: {flag[2:]} is a list: expected one value.")
    if action.nargs == "+":
        return [flag, *map(str, values)]
    return [f"{flag}={one}" for one in values]


def _toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case list() | tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case dict():  # a mesh
            return _toml(",".join(f"{axis}={size}" for axis, size in value.items()))
        case _:
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _made_by() -> dict[str, str]:
    found = {"v4jax": v4jax.__version__, "python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    commit = _commit()
    if commit is not None:
        found["commit"] = commit
    return {**found, "command": " ".join(sys.argv)}


def _commit() -> str | None:
    """Of the repository that v4jax runs from, "-dirty" behind it if files differ; None without one."""
    folder = pathlib.Path(v4jax.__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words],
                check=False,
                capture_output=True,
                text=True,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if (
        git("ls-files", "--error-unmatch", "__init__.py") is None
    ):  # installed somewhere in another's
        return None
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{commit}-dirty" if commit and changed else commit
