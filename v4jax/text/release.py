"""Which release of DeepSeek-V4 a checkpoint folder is of, as far as prompts depend on it.

The April models and those from 0731 on differ in the text that a reasoning effort puts after BOS
(`v4jax.text.format.EFFORT_PROMPTS`). No file says which it is in so many words, so this looks, in
this order, at

1. `dsv4_reasoning_effort_profile` in `config.json`: "preview" (April) or "official" (0731), which
   SGLang and other engines read as well;
2. the encoding module that ships with the weights, `encoding/encoding_dsv4.py`: it defines
   REASONING_EFFORT_PROMPTS since 0731 and REASONING_EFFORT_MAX before. It is read, never run;
3. the draft model of 0731 and 0813: `dspark_` keys in `config.json`. (The April weights with that
   drafter, V4-Flash-DSpark and V4-Pro-DSpark, have such keys too, but their module tells.)

Anything else is an April model.
"""

import json
import os
import re

from v4jax import stores
from v4jax.text.format import EncodingError, shown

PROFILE_KEY = "dsv4_reasoning_effort_profile"
PROFILES = {"preview": "april", "official": "0731"}
ENCODER = os.path.join("encoding", "encoding_dsv4.py")
_MAX_BYTES = 1 << 20  # of either file; the released ones have some 30 KB
_SINCE_0731 = re.compile(r"^REASONING_EFFORT_PROMPTS\b", re.MULTILINE)
_BEFORE = re.compile(r"^REASONING_EFFORT_MAX\b", re.MULTILINE)


def release_of(folder: str | os.PathLike) -> str:
    """The release of a checkpoint folder, or of the URL of one: a key of `EFFORT_PROMPTS`.

    Raises:
        EncodingError: its `config.json` names a profile that does not exist.
    """
    config = _config(stores.join(folder, "config.json"))
    profile = config.get(PROFILE_KEY)
    if profile is not None:
        if not isinstance(profile, str) or profile not in PROFILES:
            raise EncodingError(
                f"{PROFILE_KEY}={shown(profile)} in {folder}: expected one of {tuple(PROFILES)}."
            )
        return PROFILES[profile]
    encoder = _read(stores.join(folder, ENCODER))
    if _SINCE_0731.search(encoder):
        return "0731"
    if _BEFORE.search(encoder):
        return "april"
    return "0731" if any(key.startswith("dspark_") for key in config) else "april"


def _config(path: str) -> dict[str, object]:
    """The config; empty if there is none. What is wrong with it, loading the model says."""
    try:
        config = json.loads(_read(path))
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _read(path: str) -> str:
    if not stores.is_file(path):
        return ""
    return stores.read_start(path, _MAX_BYTES).decode("utf-8-sig", "replace")
