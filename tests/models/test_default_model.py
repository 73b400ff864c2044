"""The default model's real file: every weight as transformers reads it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from models.chat import render
from models.checkpoint import open_checkpoint
from tests.models.default_model import default_model_path


@pytest.mark.slow
def test_every_weight_is_that_of_transformers() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = default_model_path()
    checkpoint = open_checkpoint(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
    state = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    assert state.keys() - {"lm_head.weight"} == set(checkpoint.names())
    for name in checkpoint.names():
        ours = checkpoint.tensor(name).dequantize()
        np.testing.assert_array_equal(ours, state[name].numpy(), err_msg=name)


def test_its_spec_and_prompt() -> None:
    checkpoint = open_checkpoint(default_model_path())
    spec = checkpoint.spec
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (30, 9, 3, 64)
    kinds = {checkpoint.tensor(name).kind for name in checkpoint.names()}
    assert kinds == {"F32", "Q4_1", "Q8_0"}
    assert checkpoint.chat_template is not None
    text = render(checkpoint.chat_template, [{"role": "user", "content": "Hi"}])
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert checkpoint.tokenizer().encode(text).count(1) == 3
