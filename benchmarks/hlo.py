"""What the text of a compiled TPU program says about memory."""

import json
import math
import re


def vmem_of_kernels(text: str) -> list[int]:
    """Bytes of VMEM (memory space 1) that the compiler gave each Pallas kernel of a program."""
    used = re.compile(r'"used_scoped_memory_configs":\[(\{.*?\})?\]')
    found = []
    for line in text.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line and (match := used.search(line)):
            spaces = json.loads(f"[{match[1] or ''}]")
            found.append(sum(int(s["size"]) for s in spaces if s["memory_space"] == "1"))
    return found


def largest_of_xla(text: str) -> int:
    """Bytes of the largest array in HBM that a program makes itself, from the text of its entry.

    A kernel's results are not counted, nor arrays in VMEM (memory space 1).
    """
    made = re.compile(r"= (\w+)\[([\d,]*)\]\{([^}]*)\} ([\w-]+)\(")
    given = {"parameter", "constant", "bitcast", "get-tuple-element", "custom-call"}
    entry = text[text.index("\nENTRY ") :]
    sizes = [0]
    for dtype, shape, layout, op in made.findall(entry):
        if op not in given and "S(1)" not in layout:
            bits = int(re.sub(r"\D*(\d+).*", r"\1", dtype)) if dtype != "pred" else 8
            sizes.append(math.prod(map(int, filter(None, shape.split(",")))) * bits // 8)
    return max(sizes)
