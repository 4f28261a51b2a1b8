"""`v4jax serve` over two processes that hold one model: the answers are those of one process."""

import contextlib
import json
import re
import signal
import time
import urllib.error
import urllib.request

from tests.conftest import free_port
from tests.models import small_nano
from tests.scripts.test_scripts import run, start

PROMPT, TOKENS = "Emma was", 6
ARGUMENTS = ("--checkpoint", small_nano(), "--mesh", "expert=2", "--dtype", "float32")


def wait_for(url: str) -> None:
    """Until it listens, which is soon after it has said where."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError):
            urllib.request.urlopen(f"{url}/health", timeout=60).close()
            return
        time.sleep(0.1)
    raise TimeoutError(url)


def complete(url: str) -> str:
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]["text"]


def test_two_processes_serve_one_model():
    coordinator = f"127.0.0.1:{free_port()}"
    hosts = ("--coordinator", coordinator, "--num-processes", 2, "--process-id")
    options = ("--port", 0, "--slots", 2, "--cache-tokens", 1024)
    first, second = (start("serve", *ARGUMENTS, *options, *hosts, i) for i in range(2))
    try:
        found = (re.search(r"(http://\S+),", line) for line in first.stderr)
        url = next(match[1] for match in found if match)
        wait_for(url)
        texts = [complete(url) for _ in range(2)]
        first.send_signal(signal.SIGTERM)
        ends = [process.communicate(timeout=60)[1] for process in (first, second)]
    finally:
        for process in (first, second):
            process.kill()

    assert [first.returncode, second.returncode] == [0, 0], ends
    raw = ("--mode", "raw", "--prompt", PROMPT, "--max-new-tokens", TOKENS, "--temperature", 0)
    alone, _ = run("generate", *ARGUMENTS, *raw, devices=2)
    assert texts[0] == texts[1] and texts[0].strip()
    assert alone.strip().endswith(texts[0].strip())
