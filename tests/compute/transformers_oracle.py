"""What transformers says: a script, so that its imports and warnings stay out of the tests.

Reads one JSON request on standard input and answers with a JSON line on standard output:

``{"gguf": path, "ids": [[...], ...]}``: for every sequence the likeliest next token after each
position, and the gap to the second.
``{"config": {...}, "folder": path, "ids": [[...], ...], "dtype": "float32"}``: makes a model with
random weights, saves it as a folder, and saves its logits as ``logits.npz`` there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers


def teacher_forced(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Answer the first form, all sequences in one forward."""
    path = Path(request["gguf"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    width = max(len(ids) for ids in request["ids"])
    ids = torch.tensor([row + [0] * (width - len(row)) for row in request["ids"]])
    answers = []
    for start in range(0, len(ids), 4):
        with torch.inference_mode():  # padding lies behind: causal attention never sees it
            logits = model(ids[start : start + 4]).logits
        best = logits.topk(2, dim=-1)
        for row, own in enumerate(request["ids"][start : start + 4]):
            gap = best.values[row, : len(own), 0] - best.values[row, : len(own), 1]
            token_ids = best.indices[row, : len(own), 0]
            answers.append({"ids": token_ids.tolist(), "gaps": gap.tolist()})
    return answers


def random_model(request: dict[str, Any]) -> str:
    """Answer the second form."""
    folder = Path(request["folder"])
    config = transformers.AutoConfig.for_model(**request["config"])
    torch.manual_seed(request.get("seed", 0))
    make: Any = transformers.AutoModelForCausalLM.from_config
    model = make(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() == 1 else 2.0 / parameter.shape[-1] ** 0.5
            centre = 1.0 if "norm" in name and "gemma" not in request["config"]["model_type"] else 0
            parameter.copy_(centre + spread * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
    dtype = getattr(torch, request.get("dtype", "float32"))
    model.to(dtype).save_pretrained(folder)
    # Caps of attention scores: only its plain attention knows them, and its Gemma 3 forgets to ask.
    cap = request["config"].get("attn_logit_softcapping")
    extra = {} if cap is None else {"softcap": cap}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="eager" if cap else "sdpa"
    )
    with torch.inference_mode():
        logits = [model(torch.tensor([row]), **extra).logits[0].numpy() for row in request["ids"]]
    np.savez(folder / "logits.npz", *logits)
    return str(folder)


def main() -> None:
    """Serve every request of standard input."""
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(2)
    for line in sys.stdin:
        request = json.loads(line)
        answer = teacher_forced(request) if "gguf" in request else random_model(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
