"""`v4jax COMMAND`: help, version, and how commands end when their input is at fault."""

import os
import re
import subprocess
import sys

import jax
import pytest

import v4jax
from tests.conftest import NANO, ROOT, environment
from v4jax.checkpoint.loading import folder_of
from v4jax.cli import COMMANDS, LIBTPU_FLAGS, main
from v4jax.cli.errors import one_message
from v4jax.planning.topologies import COMPILER_OPTIONS


@pytest.fixture(autouse=True)
def _what_main_sets(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")


def test_help_lists_the_commands(capsys):
    main([])
    out = capsys.readouterr().out

    assert all(f"  {name}" in out for name in COMMANDS)
    main(["--help"])
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    out = capsys.readouterr().out

    assert end.value.code == 0
    assert out.startswith(f"usage: v4jax {command} ")
    assert f"examples:\n    v4jax {command} " in out
    options = out[out.index("show this help") : out.index("examples:")]
    # An option's text follows it in the line, or stands in the next one.
    for line, following in zip(options.split("\n"), options.split("\n")[1:]):
        if line.startswith("  --"):
            has_text = re.search(r"\S {2,}\S", line.strip()) or following.startswith(" " * 20)
            assert has_text, f"{line} says nothing"


def test_defaults_are_shown(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    out = " ".join(capsys.readouterr().out.split())

    assert "--seed SEED of the random numbers (default: 0)" in out
    assert "likeliest token (default: 1.0)" in out
    assert "(default: None)" not in out


def test_version(capsys):
    main(["--version"])

    assert capsys.readouterr().out == f"v4jax {v4jax.__version__}\n"


@pytest.mark.parametrize(("typed", "meant"), [("genrate", "generate"), ("fine-tune", "finetune")])
def test_an_unknown_command_suggests_the_nearest(typed, meant, capsys):
    with pytest.raises(SystemExit) as end:
        main([typed])

    assert end.value.code == 2
    assert f"no command '{typed}'. Did you mean '{meant}'?" in capsys.readouterr().err


def test_a_command_that_is_like_none_suggests_nothing(capsys):
    with pytest.raises(SystemExit):
        main(["zzz"])

    assert "Did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("temperature=-1: expected"), 2, "error: temperature=-1: expected\n"),
        (FileNotFoundError(2, "No such file or directory", "x.npy"), 2, "error: x.npy: No such"),
        (MemoryError(), 2, "error: this machine has too little memory\n"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB\nmore"), 2, "memory is full (RES"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_bad_input_ends_in_one_message(error, status, message, capsys):
    with pytest.raises(SystemExit) as end, one_message():
        raise error

    err = capsys.readouterr().err
    assert end.value.code == status
    assert message in err
    assert err.count("\n") == bool(message)


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    with pytest.raises(TypeError), one_message():
        raise TypeError
    with pytest.raises(jax.errors.JaxRuntimeError), one_message():
        raise jax.errors.JaxRuntimeError("INTERNAL: x")
    monkeypatch.setenv("V4JAX_TRACEBACK", "1")
    with pytest.raises(ValueError), one_message():
        raise ValueError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["serve", "--adapter", "folder"], "--adapter: 'folder': expected NAME=FOLDER."),
        (["serve", "--adapter", "nano=folder"], "nano=folder: the model, or another adapter, has"),
        (["serve", "--adapter", "a=gone"], "gone has no adapter_config.json"),
        (["generate", "--prompt", "x", "--adapter", "gone"], "gone has no adapter_config.json"),
        (["convert", "NEW", "--adapter", "gone"], "gone has no adapter_config.json"),
    ],
    ids=str,
)
def test_an_adapter_that_cannot_be_used_ends_before_anything_is_loaded(
    options, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    command, *rest = options
    source = ["nano"] if command == "convert" else ["--checkpoint", "nano"]
    with pytest.raises(SystemExit) as end, one_message():
        main([command, *source, *rest])

    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_libtpu_gets_the_flags_that_plans_are_compiled_with(monkeypatch):
    compiled_with = {f"--{name}={str(v).lower()}" for name, v in COMPILER_OPTIONS.items()}
    assert set(LIBTPU_FLAGS) == compiled_with
    flag, *others = LIBTPU_FLAGS
    rest = " ".join(others)

    for given, expected in (
        ("", f"{flag} {rest}"),
        ("--other=1", f"--other=1 {flag} {rest}"),
        (flag.replace("true", "false"), f"{flag.replace('true', 'false')} {rest}"),  # the user's
    ):
        monkeypatch.setenv("LIBTPU_INIT_ARGS", given)
        with pytest.raises(SystemExit):
            main(["score", "--help"])
        assert os.environ["LIBTPU_INIT_ARGS"] == expected


def test_nano_is_a_name_unless_there_is_such_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder_of("nano") == NANO
    (tmp_path / "nano").mkdir()
    assert str(folder_of("nano")) == "nano"


def test_a_reader_that_has_gone_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "v4jax", "convert", "--help"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=120)

    assert "Traceback" not in err
    assert "Exception ignored" not in err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_a_script_too(command):
    """`python scripts/X.py`, as typed in a checkout, calls the command."""
    text = (ROOT / "scripts" / f"{command}.py").read_text(encoding="utf-8")

    assert f'main(["{command}", *sys.argv[1:]])' in text


def test_a_script_runs_as_typed_without_an_installation(tmp_path):
    """From any folder, without the checkout on Python's path."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "score.py", "--checkpoint", "no", "--text", "x"],
        cwd=tmp_path,
        env={name: value for name, value in environment().items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert done.stderr.startswith("error: no ")
