"""The vocabulary of the DeepSeek-V4 prompt format: special tokens, roles, modes, effort texts.

Source: the encoding module released with the checkpoints (`encoding/encoding_dsv4.py`); DeepSeek-V4
report (arXiv 2606.19348), tables 2 and 3 (modes) and 5 (quick-instruction tasks).
"""

import json

# Special tokens. The bar is U+FF5C and the low block U+2581, not their ASCII look-alikes.
BOS = "<｜begin▁of▁sentence｜>"  # once, at the very start
EOS = "<｜end▁of▁sentence｜>"  # ends every assistant turn
PAD = "<｜▁pad▁｜>"  # never written by this module
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"  # inside the tags of a tool call: "<" DSML "invoke ..."
LATEST_REMINDER = "<｜latest_reminder｜>"  # date and locale
TASK_TOKENS = {  # quick instructions: the `task` field of a message, and the token it appends
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}
EXTRACTED_URL = "<｜extracted_url｜>"  # written by the caller, in the text of a read_url task
# Every token of the format. A tokenizer trained with this list gets ids 0, 1, 2, ... in this order.
SPECIAL_TOKENS = (
    *(BOS, EOS, PAD, USER, ASSISTANT, THINK_START, THINK_END, DSML, LATEST_REMINDER),
    *TASK_TOKENS.values(),
    EXTRACTED_URL,
)

# Mode -> (thinking_mode, reasoning_effort) of `encode_messages`. The report has three of them;
# think-low came with the 0731 release, where think-high has a text too. `modes_of` says which a
# release has.
MODES: dict[str, tuple[str, str | None]] = {
    "non-think": ("chat", None),
    "think-low": ("thinking", "low"),
    "think-high": ("thinking", "high"),
    "think-max": ("thinking", "max"),
}

APRIL_MAX_EFFORT = """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve \
the root cause, rigorously stress-testing your logic against all potential paths, edge cases, and \
adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, \
considered alternative, and rejected hypothesis to ensure absolutely no assumption is left \
unchecked.

"""
JULY_MAX_EFFORT = """\
Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: \
exhaustively decompose the problem into its most fundamental components, trace every causal chain \
to its root, and resolve the underlying cause rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and \
are certain that no assumption remains unchecked and no error remains undiscovered.

"""
# What each release writes after BOS for a reasoning effort, in thinking mode.
EFFORT_PROMPTS: dict[str, dict[str | None, str]] = {
    "april": {None: "", "high": "", "max": APRIL_MAX_EFFORT},
    "0731": {None: "", "low": "", "high": APRIL_MAX_EFFORT, "max": JULY_MAX_EFFORT},
}

DEEPEST = 200  # lists and dicts in each other, in values from outside
THINKING_MODES = ("chat", "thinking")
ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")

# Tags around the tool calls of an assistant turn.
CALLS_START = f"\n\n<{DSML}tool_calls"
CALLS_END = f"</{DSML}tool_calls>"


class EncodingError(ValueError):
    """A message that cannot be rendered, or a completion that is not in the format."""


def modes_of(release: str) -> tuple[str, ...]:
    """Names of the modes that a release has.

    Raises:
        EncodingError: no such release.
    """
    efforts = effort_prompts(release)
    return tuple(name for name, (_, effort) in MODES.items() if effort in efforts)


def resolve_mode(mode: str, release: str) -> tuple[str, str | None]:
    """(thinking_mode, reasoning_effort) of a mode.

    Raises:
        EncodingError: the release has no such mode, or is itself unknown.
    """
    names = modes_of(release)
    if mode not in names:
        raise EncodingError(f"mode={shown(mode)}: release {release!r} has {', '.join(names)}.")
    return MODES[mode]


def effort_prompts(release: str) -> dict[str | None, str]:
    """The texts of `EFFORT_PROMPTS` for one release.

    Raises:
        EncodingError: no such release.
    """
    if release not in EFFORT_PROMPTS:
        raise EncodingError(f"release={release!r}: expected one of {tuple(EFFORT_PROMPTS)}.")
    return EFFORT_PROMPTS[release]


def check_thinking_mode(thinking_mode: str) -> None:
    """Raises EncodingError for anything but "chat" and "thinking"."""
    if thinking_mode not in THINKING_MODES:
        raise EncodingError(
            f"thinking_mode={shown(thinking_mode)}: expected one of {THINKING_MODES}. "
            "MODES has the modes of the report, such as 'think-high'."
        )


def to_json(value: object) -> str:
    """JSON as the format writes it: keys in their order, text unescaped.

    Raises:
        EncodingError: the value is nested too deep, or has no JSON.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except (RecursionError, TypeError, ValueError) as error:
        raise EncodingError(f"{shown(value)} cannot be written as JSON: {error}.") from error


def is_too_deep(value: object) -> bool:
    """Whether lists and dicts are nested more than `DEEPEST` times.

    Python reads and writes JSON up to a depth that depends on who calls: this does not.
    """
    level = [value]
    for _ in range(DEEPEST):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return False
    return any(isinstance(value, dict | list) for value in level)


def shown(value: object) -> str:
    """A value as error messages quote it: short, whatever it is."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep; an integer of thousands of digits
        text = f"a {type(value).__name__} that is too deep or too large to show"
    return text if len(text) <= 200 else text[:200] + "..."
