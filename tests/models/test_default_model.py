"""The default model's real file: every weight, the spec and the prompt."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader

from models.chat import render
from models.checkpoint import open_checkpoint
from models.gguf_names import canonical
from tests.models.default_model import default_model_path


@pytest.mark.slow
def test_every_weight_is_that_of_another_reader() -> None:
    """gguf's own reader; query and key rows as transformers reorders them."""
    checkpoint = open_checkpoint(default_model_path())
    spec = checkpoint.spec
    names = {canonical(tensor.name, spec): tensor for tensor in GGUFReader(checkpoint.path).tensors}
    assert names.keys() == set(checkpoint.names())
    heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}
    for name, tensor in names.items():
        assert name is not None
        ours = checkpoint.tensor(name).packed()
        expected: npt.NDArray[np.uint8] = tensor.data.view(np.uint8).reshape(ours.shape)
        if (num_heads := heads.get(name.split(".")[-2])) is not None:
            # Source: transformers modeling_gguf_pytorch_utils, _reverse_permute_weights
            split = expected.reshape(num_heads, len(expected) // num_heads // 2, 2, -1)
            expected = split.swapaxes(2, 1).reshape(expected.shape)
        np.testing.assert_array_equal(ours, expected, err_msg=name)


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
