"""The pod job as a user runs it, and as the world treats it: killed at random, moved to more hosts."""

import json
import os
import random
import shutil
import signal
import sys
import time
import types

import jax
import pytest

from tests.conftest import GOLDEN, NANO, free_port
from tests.models import small_nano
from tests.scripts.test_scripts import run, start
from tests.v4jax.killed_job import SlowEngine
from v4jax import checkpoint
from v4jax.cli import batch

MESSAGE = "She was very {}."
WORDS = ("happy", "proud", "angry", "young", "kind")


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    """Twelve requests that need few programs, a broken line, and a prompt that is too long."""
    path = tmp_path_factory.mktemp("batch") / "requests.jsonl"
    lines = [{"id": w, "messages": [{"role": "user", "content": MESSAGE.format(w)}]} for w in WORDS]
    lines += [{**line, "id": f"high-{line['id']}", "mode": "think-high"} for line in lines[:2]]
    lines += [{"prompt": f"Emma {word}"} for word in WORDS]
    lines += [{"prompt": "Emma", "max_new_tokens": 200_000}]
    texts = [json.dumps(line) for line in lines]
    path.write_text("\n".join([texts[0], "{broken", *texts[1:]]), encoding="utf-8")
    return path


def arguments(requests, output) -> tuple:
    files = ("--checkpoint", small_nano(), "--input", requests, "--output", output)
    return (*files, "--batch-size", 2, "--max-new-tokens", 12)


def contents(output) -> list[bytes]:
    return [path.read_bytes() for path in (output, output.with_name(output.name + ".errors"))]


def count(output) -> int:
    return output.read_bytes().count(b"\n") if output.exists() else 0


def kill(process) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def run_two(*args) -> list[str]:
    """Two connected processes do a job; what each of them printed."""
    coordinator = f"127.0.0.1:{free_port()}"
    hosts = ("--coordinator", coordinator, "--num-processes", 2, "--process-id")
    both = [start("batch", *args, *hosts, i) for i in range(2)]
    errs = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errs
    return errs


@pytest.fixture(scope="module")
def whole(requests):
    """Files of a run that nobody disturbed, and what it printed."""
    output = requests.with_name("whole.jsonl")
    _, err = run("batch", *arguments(requests, output))
    return contents(output), err


def test_a_job_is_done_and_reported(requests, whole):
    (results, errors), err = whole
    results, errors = (
        [json.loads(line) for line in text.splitlines()] for text in (results, errors)
    )

    assert [r["line"] for r in results] == [1, *range(3, 14)]
    assert [r["id"] for r in results] == [
        *WORDS,
        "high-happy",
        "high-proud",
        *map(str, range(9, 14)),
    ]
    assert all(1 <= r["completion_tokens"] <= 12 and r["text"] for r in results)
    assert all((r["line"] < 9) == ("tool_calls" in r) for r in results)
    assert [bool(r["reasoning_content"]) for r in results[:7]] == 5 * [False] + 2 * [True]
    assert [r["line"] for r in errors] == [2, 14]
    assert "1 malformed lines: 2" in err
    assert "13/13" in err and "tokens/s" in err


def test_killed_at_random_moments_it_finishes_with_the_same_files(requests, whole):
    """Kills at any time from the start on, and at any time after a first new result."""
    output, rng, unfinished = requests.with_name("killed.jsonl"), random.Random(0), set()
    for kills in range(4):
        process = start("batch", *arguments(requests, output))
        before, deadline = count(output), time.monotonic() + 300
        if kills == 1:
            time.sleep(rng.uniform(0, 5))
        else:
            while (
                count(output) == before and process.poll() is None and time.monotonic() < deadline
            ):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.03))
        kill(process)
        unfinished.add(count(output))

    run("batch", *arguments(requests, output))

    assert len([n for n in unfinished if 0 < n < 12]) >= 2, unfinished
    assert contents(output) == whole[0]


def test_two_processes_take_over_from_one(requests, whole):
    """The first is killed after its first results; the two find them and give the same files."""
    output = requests.with_name("shared.jsonl")
    process, deadline = start("batch", *arguments(requests, output)), time.monotonic() + 300
    while not count(output) and time.monotonic() < deadline:
        time.sleep(0.01)
    kill(process)
    assert 0 < count(output) < 12

    errs = run_two(*arguments(requests, output))

    assert all("tokens/s" in err for err in errs)  # both had something to do
    assert contents(output) == whole[0]
    assert not list(output.parent.glob(output.name + "*part*"))


def test_one_model_over_two_processes_goes_on_where_one_process_stopped(tmp_path):
    """Process 0 alone knows what is done and writes; the files are those of one process."""
    requests, whole, output = (tmp_path / f"{name}.jsonl" for name in ("in", "whole", "shared"))
    lines = [json.dumps({"prompt": f"Emma {word}"}) for word in WORDS[:3]]
    requests.write_text("\n".join([*lines, "{broken"]), encoding="utf-8")
    mesh = ("--mesh", "expert=2", "--max-new-tokens", 4)
    run("batch", *arguments(requests, whole), *mesh, devices=2)
    (tmp_path / "shared.jsonl.job").write_bytes((tmp_path / "whole.jsonl.job").read_bytes())
    output.write_bytes(whole.read_bytes().splitlines(keepends=True)[0])

    first, second = run_two(*arguments(requests, output), *mesh)

    assert "3 requests, 1 of them done" in first and "requests" not in second
    assert contents(output) == contents(whole)
    assert not list(tmp_path.glob("*part*"))


def test_processes_without_a_coordinator_and_merging_by_hand(requests, whole):
    output = requests.with_name("apart.jsonl")
    hosts = ("--num-processes", 2, "--process-id")
    first = start("batch", *arguments(requests, output), *hosts, 0)
    _, err = first.communicate(timeout=600)
    assert first.returncode == 1 and "are still to do" in err

    merging = start("batch", "--output", output, "--merge")
    _, err = merging.communicate(timeout=600)
    assert merging.returncode == 1 and "are still to do" in err
    assert 0 < count(output) < 12
    run("batch", *arguments(requests, output), *hosts, 1)

    assert contents(output) == whole[0]
    assert "12 results" in run("batch", "--output", output, "--merge")[1]


def test_an_interrupt_leaves_what_was_written(requests, whole, tmp_path):
    """With so many requests that the first results are there long before the last."""
    longer, output = tmp_path / "longer.jsonl", tmp_path / "interrupted.jsonl"
    more = "\n".join(json.dumps({"prompt": f"Emma {word}"}) for word in 60 * WORDS)
    longer.write_text(f"{requests.read_text(encoding='utf-8')}\n{more}", encoding="utf-8")
    # A child of a process that ignores interrupts, as a shell's jobs with & do, would ignore them.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start("batch", *arguments(longer, output))
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 300
    while not count(output) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=300)

    assert process.returncode == 130 and "the same command goes on" in err
    results = output.read_bytes().splitlines()
    assert 0 < len(results) < 12 + 60 * len(WORDS)
    results = {result for result in results if json.loads(result)["line"] <= 14}
    assert results <= set(whole[0][0].splitlines())


def test_the_recipe_reaches_the_model(requests, tmp_path, monkeypatch):
    numerics = []

    def load(args, given, **_):
        numerics.append(given)
        raise checkpoint.CheckpointError("enough is known")

    options = (*arguments(requests, tmp_path / "results.jsonl"), "--recipe", "bf16")
    monkeypatch.setattr(sys, "argv", ["batch", *map(str, options)])
    monkeypatch.setattr(batch, "load_for_serving", load)
    with pytest.raises(SystemExit, match="enough is known"):
        batch.main()

    assert [n.recipe for n in numerics] == ["bf16"]


def two_adapters(folder) -> list[str]:
    """Options for two adapters that differ in their scale."""
    for name, alpha in (("emma", 4), ("box", 8)):
        shutil.copytree(GOLDEN / "hf_adapter", folder / name)
        config = json.loads((folder / name / "adapter_config.json").read_text())
        text = json.dumps({**config, "lora_alpha": alpha})
        (folder / name / "adapter_config.json").write_text(text)
    return [f"--adapter=emma={folder / 'emma'}", f"--adapter=box={folder / 'box'}"]


def test_lines_choose_among_adapters(tmp_path, monkeypatch, capsys):
    """An unknown name costs its line alone; other adapters, or no names, are another job."""
    requests, output, given = tmp_path / "in.jsonl", tmp_path / "out.jsonl", []
    models = ("emma", None, "jane", "nano", "box")
    lines = [{"prompt": "Emma", "model": model, "seed": 1} for model in models]
    requests.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    class Engine(SlowEngine):
        def __init__(self, model, tokenizer, *, adapters, **_):
            super().__init__(pause=0.0)
            given.append((model, adapters))

        def stats(self):
            return types.SimpleNamespace(useful_row_steps=1.0)

    def run_with(*options):
        given.clear()
        files = ("--checkpoint", NANO, "--input", requests, "--output", output)
        monkeypatch.setattr(sys, "argv", ["batch", *map(str, (*files, *options))])
        batch.main()

    monkeypatch.setattr(batch, "load_for_serving", lambda *_, adapter, **__: adapter)
    monkeypatch.setattr(batch, "Engine", Engine)
    named = two_adapters(tmp_path)
    run_with(*named, "--max-new-tokens", 3)

    assert given == [(None, {name: str(tmp_path / name) for name in ("emma", "box")})]
    results, errors = ([json.loads(x) for x in text.splitlines()] for text in contents(output))
    assert [r["line"] for r in results] == [1, 2, 4, 5]
    emma, none, own, box = (r["text"] for r in results)
    assert none == own and len({emma, none, box}) == 3
    assert [(r["line"], r["error"]) for r in errors] == [
        (3, "model='jane': expected one of nano, emma, box.")
    ]
    whole = contents(output)
    output.write_bytes(whole[0].partition(b"\n")[2])
    run_with(*named, "--max-new-tokens", 3)
    assert contents(output) == whole

    for options, message in (
        ((*named[::-1], "--max-new-tokens", 3), "adapters was .*, is .*"),
        (("--max-new-tokens", 3), "adapters was .*, is None"),
        (("--adapter", tmp_path / "box", *named), "box without a name beside another one"),
        (("--adapter", f"nano={tmp_path / 'box'}"), "the model, or another adapter, has that name"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_with(*options)
    output = tmp_path / "other.jsonl"
    folder = tmp_path / "lr=1"
    shutil.copytree(tmp_path / "box", folder)
    run_with("--adapter", folder)  # a path, not a name
    assert given == [(folder, {})]
    assert "malformed lines: 1, 3, 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (("--output", "x"), "--checkpoint and --input are required"),
        (("--process-id", 1), "go together"),
        (("--coordinator", "here:1"), "--coordinator needs"),
        (("--process-id", 2, "--num-processes", 2), "expected less than --num-processes"),
        (("--top-p", 2), "top_p=2.0: expected a number in"),
        (("--seed", 1), "belongs to another job"),
        (("--mesh", "expert=2"), "a mesh of 2 devices: expected at most the 1 of this host"),
        (("--recipe", "bf16"), "recipe was released, is bf16"),
        (("--recipe", "fp8", "--numerics", "plain"), "recipe='fp8' with plain numerics"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message, requests, whole, monkeypatch, capsys):
    output = requests.with_name("whole.jsonl")
    files = () if options[0] == "--output" else arguments(requests, output)
    monkeypatch.setattr(sys, "argv", ["batch", *map(str, (*files, *options))])
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)

    with pytest.raises(SystemExit) as ended:
        batch.main()

    assert message in f"{ended.value}{capsys.readouterr().err}"
    assert contents(output) == whole[0]
