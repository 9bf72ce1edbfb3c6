"""Allocations counted on shapes, against counts by hand."""

from __future__ import annotations

import torch
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from ftlib.memory.estimate import stored_bytes
from ftlib.memory.tracing import AllocationTracker, GpuKernelEmulation

META = torch.device("meta")


def test_two_layers_by_hand() -> None:
    """8 rows: 8 × 10 → 8 × 20 → relu → 8 × 5, all float32."""
    with META:
        model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.ReLU(), torch.nn.Linear(20, 5))
    weights = 4 * (10 * 20 + 20 + 20 * 5 + 5)
    with AllocationTracker(model, vocabulary=5) as counted:
        rows = torch.empty(8, 10, device=META)
        output = model(rows)
        assert counted.now["weights"] == weights
        assert counted.now["activations"] == 4 * (8 * 10 + 8 * 20)  # relu keeps its output alone: linear's is freed
        assert counted.now["logits"] == 4 * 8 * 5
        output.sum().backward()
        assert counted.now["gradients"] == weights
    assert counted.peak.total() > counted.now.total()


def test_what_is_freed_no_longer_counts_and_the_peak_stays() -> None:
    with AllocationTracker(torch.nn.Identity(), vocabulary=7) as counted:
        first = torch.empty(100, device=META)
        view = first[:10]
        del first
        assert counted.now["activations"] == 400
        del view
        assert counted.now.total() == 0 and counted.peak.total() == 400


def test_attention_never_writes_scores_down() -> None:
    """2 rows of 3 heads, 50 places, 16 wide: query, key, value, output; a number a place; a padded mask."""
    query, key, value = (torch.empty(2, 3, 50, 16, device=META, requires_grad=True) for _ in range(3))
    mask = torch.empty(2, 1, 50, 50, device=META, dtype=torch.bool)
    with AllocationTracker(torch.nn.Identity(), vocabulary=7) as counted, GpuKernelEmulation(None):
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    tensor = 4 * 2 * 3 * 50 * 16
    assert output.shape == query.shape
    assert counted.now.total() == tensor + 4 * 2 * 3 * 50 + 4 * 2 * 50 * 64


def test_mixed_precision_casts_as_autocast_does() -> None:
    """A trainable weight's 16-bit copy is made once and kept; a frozen one's is made for every call."""
    rows = torch.empty(8, 10, device=META, requires_grad=True)
    trainable = torch.empty(20, 10, device=META, requires_grad=True)
    frozen = torch.empty(20, 10, device=META)
    for weight, copies in ((trainable, 1), (frozen, 2)):
        with AllocationTracker(torch.nn.Identity(), vocabulary=7) as counted, GpuKernelEmulation(torch.bfloat16):
            outputs = [linear(rows, weight) for _ in range(2)]
            assert {output.dtype for output in outputs} == {torch.bfloat16}
            assert counted.now.total() == 2 * (8 * 10 + 2 * 8 * 20 + copies * 20 * 10)
            assert layer_norm(outputs[0], (20,)).dtype == torch.float32


def test_bytes_of_quantized_weights() -> None:
    """4,096 × 4,096: QLoRA's .127 bits of scales a weight (Dettmers et al. 2023, section 3: 8/64 + 32/(64·256))."""
    count = 4096 * 4096
    assert stored_bytes(4096, 4096, "nf4") == count // 2 + count // 64 + 4 * count // (64 * 256)
    assert round(8 * stored_bytes(4096, 4096, "nf4") / count - 4, 3) == 0.127
    assert stored_bytes(4096, 4096, "int8") == count + 4 * 4096
