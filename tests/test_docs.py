"""What README, docs and docstrings tell the reader to type.

Python blocks run, all in one fresh process outside the checkout. Commands in blocks and in `code` are
parsed by the program that they name, as it parses them when typed, and end there: most need weights,
TPUs or hours. In commands DIR, NEW, SOURCE, TARGET and upper-case file names stand for the reader's
own, N for a number, and [...] for what may be left out. `code` in a sentence, and a command that ends
in ..., may lack options that are required.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import pytest

from sharding import AXES
from tests.conftest import ROOT, environment
from v4jax.cli import COMMANDS, main
from v4jax.planning.topologies import chip_of

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = sorted((ROOT / "v4jax" / "cli").glob("*.py"))
STARTS = re.compile(
    r"(?:[A-Z_]+=\S+ +)*(v4jax [a-zC-]|python -m [a-z]|python scripts/|sh scripts/)"
)


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _expand(block: str) -> str:
    """A shell block with its variables replaced by their values."""
    for name, value in re.findall(r'^(\w+)="(.*?)"$', block, re.MULTILINE | re.DOTALL):
        block = block.replace(f"${name}", value)
    return block.replace("$i", "1")


@dataclasses.dataclass(frozen=True)
class Command:
    """What is typed, as words without assignments, and whether options may be missing."""

    words: tuple[str, ...]
    is_partial: bool


def _commands(path: pathlib.Path) -> list[Command]:
    """The commands of a page or of a module's docstring."""
    text = path.read_text(encoding="utf-8")
    inline = []
    if path.suffix == ".py":
        (text,) = re.findall(r'\A"""(.*?)"""', text, re.DOTALL)
        text = text.replace("\\\\\n", "\\\n")  # a backslash is written twice in a string
    else:
        inline = re.findall(
            r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        )
    typed = "\n".join(map(_expand, _blocks(text, "sh")))
    indented = re.sub(r"\\\n\s*", " ", text)
    typed += "\n" + "\n".join(re.findall(r"^    (\S.*)$", indented, re.MULTILINE))
    lines = [(line, False) for line in re.sub(r"\\\n\s*", " ", typed).split("\n")]
    lines += [(piece.replace("\n", " "), True) for piece in inline]
    found = []
    for line, is_partial in lines:
        if STARTS.match(line.strip()):
            line = re.sub(r"\[(-[^\]]*)\]", r"\1", line)
            words = shlex.split(line, comments=True)
            words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))
            if words[-1] == "...":
                words, is_partial = words[:-1], True
            words = ["8" if word == "N" else word for word in words]
            found.append(Command(tuple(words), is_partial))
    return found


class _ParsedError(Exception):
    """Carries the options of a command that has been parsed."""


def _parse(command: Command, monkeypatch, capsys) -> argparse.Namespace | None:
    """What the program understands; None if there is nothing for it to read.

    Raises:
      AssertionError: it refuses the options, or does not exist.
    """
    program, *options = command.words
    if program == "sh":
        assert (ROOT / options[0]).is_file(), options[0]
        return None
    if program == "v4jax":
        run = lambda: main(options)
    else:
        if options[0] == "-m":
            path, options = ROOT / f"{options[1].replace('.', '/')}.py", options[2:]
        else:
            path, options = ROOT / options[0], options[1:]
        if path.stem == "pytest":
            assert all((ROOT / word).exists() for word in options if not word.startswith("-"))
            return None
        assert path.is_file(), f"there is no {path}"
        if not options:  # some programs have none, and would run
            return None
        monkeypatch.setattr(sys, "argv", [path.name, *options])
        run = lambda: runpy.run_path(str(path), run_name="__main__")

    read = argparse.ArgumentParser.parse_args

    def parse(self, *args, **kwargs):
        if command.is_partial:
            for each in (*self._actions, *self._mutually_exclusive_groups):
                each.required = False
        raise _ParsedError(read(self, *args, **kwargs))

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse)
        try:
            run()
        except _ParsedError as parsed:
            return parsed.args[0]
        except SystemExit as end:
            raise AssertionError(f"{command.words}: {capsys.readouterr().err}") from end
    raise AssertionError(f"{command.words}: no options are read")


@pytest.fixture(autouse=True)
def _what_main_sets(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")


# Patterns of commands, not commands.
PATTERNS = ["v4jax COMMAND", "python -m v4jax COMMAND", "python scripts/X.py", "python -m"]


@pytest.mark.parametrize("path", [*PAGES, *PROGRAMS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_is_understood(path, monkeypatch, capsys):
    for command in _commands(path):
        line = " ".join(command.words)
        if any(line == pattern or line.startswith(f"{pattern} [") for pattern in PATTERNS):
            continue
        if command.words == ("v4jax", "COMMAND", "--help"):
            continue
        args = _parse(command, monkeypatch, capsys)
        if line.startswith("v4jax plan ") and not command.is_partial:
            chip_of(args.topology)
            assert not args.mesh or all(p.split("=")[0] in AXES for p in args.mesh.split(","))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(path):
    """Those of links, seen from the page, and those in `code` that begin with a folder of the project."""
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", text)
    named = re.findall(
        r"`((?:v4jax|pallas_kernels|sharding|scripts|tests|benchmarks)/[\w/-]+\.(?:py|md|sh|json))`",
        text,
    )

    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_commands_are_found():
    """The test above has something to test: each command is shown on some page."""
    found = [command.words for page in PAGES for command in _commands(page)]
    shown = {words[1] for words in found if words[0] == "v4jax"}

    assert set(COMMANDS) <= shown


def test_an_option_that_does_not_exist_is_found(monkeypatch, capsys):
    words = shlex.split("v4jax generate --checkpoint DIR --prompt x --steps 3")
    with pytest.raises(AssertionError, match="unrecognized arguments: --steps"):
        _parse(Command(tuple(words), False), monkeypatch, capsys)


def test_every_python_block_runs(tmp_path):
    """One fresh process, so that nothing which tests import helps; each block has its own names."""
    import v4jax

    pieces = [(str(p), block) for p in PAGES for block in _blocks(p.read_text("utf-8"), "python")]
    docstring = re.findall(r"^    (.*)$", v4jax.__doc__, re.MULTILINE)
    pieces.append(("v4jax/__init__.py", "\n".join(docstring)))
    program = (
        "import json, sys\n"
        "for name, block in json.load(sys.stdin):\n"
        "    print('##', name)\n"
        "    exec(compile(block, name, 'exec'), {'__name__': 'example'})\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(pieces),
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": os.fspath(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    outputs = dict(re.findall(r"## (\S+)\n([^#]*)", done.stdout))
    assert len(pieces) > 2
    assert len(outputs[str(ROOT / "README.md")].split()) > 8
