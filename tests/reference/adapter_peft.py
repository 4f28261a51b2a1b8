"""A LoRA of PEFT on the golden model of transformers, in an environment of its own.

    pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2
    python tests/reference/adapter_peft.py make tests/golden/hf_adapter
    python tests/reference/adapter_peft.py check runs/adapter runs/adapter.npz

`make` writes PEFT's own files, with a random B, and logits. `check` reads the adapter that
`python -m tests.reference.adapter_ours runs/adapter runs/adapter.npz` has trained and written, and compares
the logits.
"""

import pathlib
import sys

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

BASE = pathlib.Path(__file__).parent.parent / "golden" / "hf_small"
POSITIONS = np.r_[0:8, 124:132, 292:300]
# As people write them: the ends also name matrices of compressors and indexers.
TARGETS = ("q_a_proj", "q_b_proj", "kv_proj", "o_b_proj", "gate_proj", "up_proj", "down_proj")


def base():
    return AutoModelForCausalLM.from_pretrained(
        BASE, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def logits_of(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor(tokens).long(), use_cache=False).logits
    return logits[:, POSITIONS].numpy()


def make(folder: str) -> None:
    config = LoraConfig(
        r=2, lora_alpha=6, use_rslora=True, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    model = get_peft_model(base(), config).eval()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tokens = np.load(BASE / "reference.npz")["tokens"]
    logits = logits_of(model, tokens)
    model.peft_config["default"].base_model_name_or_path = "hf_small"
    model.save_pretrained(folder)
    np.savez_compressed(pathlib.Path(folder) / "reference.npz", positions=POSITIONS, logits=logits)
    plain = logits_of(base(), tokens)
    print(f"the adapter moves logits by up to {np.abs(logits - plain).max():.3g}")


def check(folder: str, ours: str) -> None:
    saved = np.load(ours)
    plain = base()
    before = logits_of(plain, saved["tokens"])
    model = PeftModel.from_pretrained(plain, folder).eval()
    logits = logits_of(model, saved["tokens"])
    factors = [name for name, _ in model.named_parameters() if ".lora_A." in name]
    print(
        f"{len(factors)} matrices; largest difference {np.abs(logits - saved['logits']).max():.2g}, "
        f"standard deviation {logits.std():.2g}, moved by the adapter up to "
        f"{np.abs(logits - before).max():.2g}, argmax equal everywhere: "
        f"{(logits.argmax(-1) == saved['logits'].argmax(-1)).all()}"
    )


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](*sys.argv[2:])
