# SPDX-License-Identifier: MIT
"""Tests: python -m pytest

The first part is the specification of entropy.py. It needs that file and PyTorch alone,
so the two can be copied together; the other tests are then skipped.
"""

import argparse
import errno
import importlib
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from entropy import (
    _label,
    component_masses,
    connected_components,
    similarity_maps,
    spatial_entropy,
    threshold_at_mean,
)

HERE = Path(__file__).resolve().parent
FILES = [HERE / "eval.py", HERE / "train.py"]  # not there if the pair was copied alone
PROJECT = all(f.is_file() and "from entropy import" in f.read_text() for f in FILES)
if PROJECT:
    import numpy
    from PIL import Image, ImageOps
    from torchvision.transforms import v2

    import data
    import eval as evaluation
    import model as vit
    import train

# --------------------------------------------------------------------- slow twins


def slow_connected_components(mask: torch.Tensor) -> torch.Tensor:
    """Spread the largest index to all pixels that touch it, until nothing changes.

    bool (..., H, W) -> int64 (..., H, W): 0 for the background, else 1 + the raster index
    of the component's last pixel.
    """
    height, width = mask.shape[-2:]
    index = torch.arange(1.0, height * width + 1, dtype=torch.float64)
    maps = mask.reshape(-1, 1, height, width)
    labels, before = index.view(height, width) * maps, None
    while before is None or not labels.equal(before):
        before = labels
        labels = F.max_pool2d(labels, 3, stride=1, padding=1) * maps
    return labels.long().view(mask.shape)


def slow_spatial_entropy(similarity: torch.Tensor) -> torch.Tensor:
    """`spatial_entropy(similarity, "none")`, map by map, as the equations stand."""
    *leading, height, width = similarity.shape
    entropies = []
    for S in similarity.reshape(-1, height, width):
        A = F.relu(S - S.mean())  # (2)
        C = slow_connected_components(S > S.mean())  # (3)
        P = [A[C == n].sum() / A.sum() for n in C[C > 0].unique()]  # (4)
        entropies.append(sum((-p * p.log() for p in P), start=0 * S.sum()))  # (5)
    return torch.stack(entropies).view(leading)


# ----------------------------------------------------------- connected components


def serpentine(height: int, width: int) -> torch.Tensor:
    """Full rows, joined at alternating ends."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[::2] = True
    mask[1::4, -1] = True
    mask[3::4, 0] = True
    return mask


def every_mask(height: int, width: int) -> torch.Tensor:
    """All masks of a grid: (2 ** (height * width), height, width)."""
    pixels = torch.arange(height * width)
    masks = torch.arange(2 ** len(pixels))[:, None] >> pixels & 1
    return masks.bool().view(-1, height, width)


def random_masks(*shape: int, density: float = 0.5) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density


MASKS = [every_mask(4, 4), random_masks(200, 30, 30, density=0.41)]
for height, width in ((14, 14), (30, 30), (57, 41)):  # the longest paths
    mask = serpentine(height, width)
    MASKS += [mask[None], mask.T.flip(0)[None]]


def assert_exact(mask: torch.Tensor) -> None:
    """Compare with the slow twin, whose labels are the last pixels of components."""
    labels = connected_components(mask)
    assert labels.dtype == torch.int64
    labels = labels.flatten(-2)
    pixel = torch.arange(1, labels.shape[-1] + 1).expand_as(labels)
    last = labels.new_zeros(*labels.shape[:-1], labels.shape[-1] + 1)
    last = last.scatter_reduce(-1, labels, pixel, "amax").gather(-1, labels)
    last = last.where(labels > 0, 0).view(mask.shape)
    assert last.equal(slow_connected_components(mask))


def test_a_drawn_mask() -> None:
    """Corners touch; a ring and its center, and the ends of rows, do not."""
    rows = ("#####..#", "#...#.#.", "#.#.#...", "#...#..#", "#####...")
    mask = torch.tensor([[cell == "#" for cell in row] for row in rows])
    assert_exact(mask)
    assert len(connected_components(mask)[mask].unique()) == 4


@pytest.mark.parametrize("height, width", [(1, 1), (4, 4), (3, 5), (1, 12), (12, 1)])
def test_every_mask_of_a_small_grid(height: int, width: int) -> None:
    assert_exact(every_mask(height, width))


@pytest.mark.parametrize("height, width", [(14, 14), (31, 30), (7, 3), (1, 50)])
def test_random_masks(height: int, width: int) -> None:
    # 0.41 is about where random 8-connected clusters first span the grid.
    for density in (0.2, 0.41, 0.6):
        masks = random_masks(3, 40, height, width, density=density)
        assert_exact(masks)
        assert_exact(masks.permute(1, 0, 3, 2))  # not contiguous


def test_large_masks() -> None:
    """More blocks than 16 bits hold, in one component and in many."""
    mask = serpentine(300, 500)
    assert connected_components(mask)[mask].unique().tolist() == [150 * 250]
    dots = torch.arange(70_000)[None] % 2 == 0
    assert connected_components(dots)[dots].equal(torch.arange(1, 35_001))


def test_the_bound_suffices() -> None:
    """Without an early exit, as on a GPU, the labels are the same."""
    for masks in MASKS:
        assert_exact(masks)
        early = _label(masks, stop_early=True)
        assert _label(masks, stop_early=False).equal(early)


# --------------------------------------------------------------- spatial entropy


def random_maps(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (5, 8), (14, 14), (23, 10)])
def test_equals_the_slow_twin(height: int, width: int) -> None:
    similarity = random_maps(4, 3, height, width).requires_grad_()
    fast = spatial_entropy(similarity, reduction="none")
    slow = slow_spatial_entropy(similarity)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-6)
    assert spatial_entropy(similarity).equal(fast.mean())
    weights = random_maps(4, 3)
    fast, slow = (
        torch.autograd.grad((weights * entropy).sum(), similarity)[0]
        for entropy in (fast, slow)
    )
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)


def test_closed_forms() -> None:
    for blobs in (1, 2, 3, 8):  # of equal mass
        similarity = torch.zeros(4, 3 * blobs)
        similarity[1:3, ::3] = 1.0
        expected = torch.tensor(math.log(blobs))
        torch.testing.assert_close(spatial_entropy(similarity), expected)
    similarity = torch.tensor([[8.0, 0, 4, 0, 0, 0]])  # mean 2
    assert component_masses(similarity).tolist() == [0, 6, 2, 0]
    expected = torch.tensor(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    torch.testing.assert_close(spatial_entropy(similarity), expected)


def test_masses_belong_to_labels() -> None:
    similarity = random_maps(2, 3, 9, 12)
    activation = threshold_at_mean(similarity)
    labels = connected_components(activation > 0)
    masses = component_masses(similarity)
    assert masses.shape == (2, 3, 1 + 5 * 6)
    for label in range(masses.shape[-1]):
        expected = (activation * (labels == label)).sum((-2, -1))
        torch.testing.assert_close(masses[..., label], expected)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e4, 1e-6])
def test_maps_without_entropy(value: float) -> None:
    """Constant maps and single components have none, and an empty batch works."""
    constant = torch.full((2, 14, 14), value, requires_grad=True)
    assert component_masses(constant).count_nonzero() == 0
    single = torch.zeros(2, 14, 14).index_fill(2, torch.tensor(3), 1).requires_grad_()
    for similarity, tolerance in ((constant, 0), (single, 1e-6)):
        entropy = spatial_entropy(similarity, "none")
        entropy.sum().backward()
        assert entropy.tolist() == [0.0, 0.0]
        assert not entropy.signbit().any()  # 0 and not -0
        assert similarity.grad.abs().max() <= tolerance
    assert spatial_entropy(torch.zeros(0, 3, 4, 5), "none").shape == (0, 3)
    no_rows = torch.zeros(2, 0, 3, dtype=torch.bool)
    assert connected_components(no_rows).shape == (2, 0, 3)


def test_tiny_and_huge_masses() -> None:
    """Probabilities down to the smallest float32 harm neither value nor gradient."""
    for tiny in (1e-12, 1e-35, 1e-39, 1e-45):
        similarity = torch.tensor([[0.0, 1.0, -1.0, tiny]]).requires_grad_()
        exact = similarity.detach().double().requires_grad_()
        fast, slow = spatial_entropy(similarity), slow_spatial_entropy(exact)
        (fast + slow).backward()
        torch.testing.assert_close(fast.double(), slow)
        assert similarity.grad.isfinite().all()
        if tiny > torch.finfo(torch.float32).tiny:
            torch.testing.assert_close(similarity.grad.double(), exact.grad)
    # A sum that overflows float32 gives NaN.
    assert spatial_entropy(torch.tensor([[0, 2e38, 0, 2e38, 2e38]])).isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_scores_give_nan(value: float) -> None:
    for pixel in ((0, 0), (2, 3)):
        similarity = random_maps(2, 5, 5)
        similarity[0][pixel] = value
        assert spatial_entropy(similarity, "none").isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    similarity = random_maps(2, 3, 7, 7).to(dtype)
    expected = spatial_entropy(similarity.float())
    with torch.autocast("cpu", torch.bfloat16):
        entropy = spatial_entropy(similarity)
    assert entropy.equal(expected)
    assert spatial_entropy(similarity.double()).dtype == torch.float64


# ----------------------------------------------------------------- torch.compile


def value_and_gradient(loss, similarity: torch.Tensor) -> tuple[torch.Tensor, ...]:
    similarity = similarity.detach().requires_grad_()
    entropy = loss(similarity)
    return entropy, *torch.autograd.grad(entropy, similarity)


def assert_same_loss(loss, similarity: torch.Tensor) -> None:
    """Value and gradient are those of the loss on the CPU, in eager mode."""
    got = value_and_gradient(loss, similarity)
    want = value_and_gradient(spatial_entropy, similarity.cpu())
    for tensor, expected in zip(got, want):
        torch.testing.assert_close(tensor.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def compile_whole():
    """torch.compile that refuses graph breaks, and starts afresh."""
    torch.compiler.reset()
    yield partial(torch.compile, fullgraph=True)
    torch.compiler.reset()


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=needs_compiler)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(compile_whole, backend: str, dynamic: bool) -> None:
    """The loss, and the labeling of a GPU, which on a CPU is behind one operator."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    loss = compile_whole(spatial_entropy, backend=counter, dynamic=dynamic)
    for shape in ((2, 3, 6, 8), (4, 5, 6, 8), (3, 2, 14, 13)):
        assert_same_loss(loss, random_maps(*shape))
    assert counter.frame_count == (1 if dynamic else 3)  # dynamic: one for all sizes
    label = compile_whole(_label, backend="aot_eager", dynamic=dynamic)
    masks = random_masks(9, 5, 6)
    assert label(masks, stop_early=False).equal(_label(masks, stop_early=True))
    operator = torch.ops.spatial_entropy.connected_components.default
    torch.library.opcheck(operator, (masks,))


def test_no_step_reads_data() -> None:
    """Meta tensors have none."""
    similarity = torch.randn(2, 3, 6, 7, device="meta", requires_grad=True)
    spatial_entropy(similarity).backward()
    query, key = torch.randn(2, 3, 4, 10, 5, device="meta")
    assert similarity_maps(query, key).shape == (3, 4, 3, 3)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@needs_cuda
@pytest.mark.parametrize("mode", ["eager", "default", "reduce-overhead"])
def test_cuda_does_not_wait_for_the_device(compile_whole, mode: str) -> None:
    similarity = random_maps(16, 6, 14, 14).cuda()
    loss = spatial_entropy
    if mode != "eager":
        loss = compile_whole(spatial_entropy, mode=mode)
        for _ in range(3):  # compiles, warms up, captures the graph
            assert_same_loss(loss, similarity)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradient(loss, similarity)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_loss(loss, similarity)


@needs_cuda
def test_cuda_labels_every_mask() -> None:
    for mask in MASKS:
        assert connected_components(mask.cuda()).cpu().equal(connected_components(mask))


# --------------------------------------------------------------- similarity maps


@pytest.mark.parametrize("prefix_tokens", [0, 1, 2, 5])
def test_similarity_maps(prefix_tokens: int) -> None:
    query, key = random_maps(2, 3, 4, prefix_tokens + 6, 5, dtype=torch.float64)
    scores = query @ key.transpose(-2, -1) / math.sqrt(5)
    patches = scores[..., prefix_tokens:]
    maps = similarity_maps(query, key, (3, 2), prefix_tokens=prefix_tokens, pool="mean")
    mean = patches[:, :, prefix_tokens:].mean(2)
    torch.testing.assert_close(maps, mean.view(3, 4, 3, 2))
    if prefix_tokens:
        maps = similarity_maps(query, key, (2, 3), prefix_tokens=prefix_tokens)
        torch.testing.assert_close(maps, patches[:, :, 0].view(3, 4, 2, 3))


def test_similarity_maps_are_float32_under_autocast() -> None:
    query, key = random_maps(2, 3, 4, 10, 5)
    low = query.bfloat16(), key.bfloat16()
    for pool in ("cls", "mean"):
        expected = similarity_maps(query, key, pool=pool)
        rounded = similarity_maps(*(x.float() for x in low), pool=pool)
        with torch.autocast("cpu", torch.bfloat16):
            assert similarity_maps(query, key, pool=pool).equal(expected)
            assert similarity_maps(*low, pool=pool).equal(rounded)


def test_bad_arguments_are_named() -> None:
    query, flat = torch.zeros(1, 1, 10, 2), torch.zeros(3)
    for function, arguments, options, message in (
        (connected_components, [torch.zeros(3, 3)], {}, "float32"),
        (connected_components, [flat.bool()], {}, r"\(3,\)"),
        (spatial_entropy, [flat], {}, r"\(3,\)"),
        (spatial_entropy, [torch.zeros(2, 0, 3)], {}, r"\(2, 0, 3\)"),
        (spatial_entropy, [torch.zeros(3, 3).long()], {}, "int64"),
        (spatial_entropy, [torch.zeros(3, 3), "sum"], {}, "'sum'"),
        (similarity_maps, [query, query, (2, 4)], {}, "10 tokens .* 9 .*, not 2x4"),
        (similarity_maps, [query, query, (-3, -3)], {}, "not -3x-3"),
        (similarity_maps, [query, query], {"prefix_tokens": 2}, "8 .*, not a square"),
        (similarity_maps, [query, query], {"prefix_tokens": 12}, "-2 patches"),
        (similarity_maps, [query, query], {"prefix_tokens": 10}, "0 patches"),
        (similarity_maps, [query, query], {"prefix_tokens": 0}, 'use pool="mean"'),
        (similarity_maps, [query, query], {"pool": "max"}, "'max'"),
        (similarity_maps, [query, query[:, :, 1:]], {}, r"\(1, 1, 9, 2\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            function(*arguments, **options)


# ------------------------------------------------------------------------ the model

SPECIFICATION = set(globals())  # the names of the tests above


@pytest.fixture(autouse=True)
def skip_without_project(request: pytest.FixtureRequest) -> None:
    if not PROJECT and request.function.__name__ not in SPECIFICATION:
        pytest.skip("entropy.py was copied alone")


SHAPE = {"patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 3, "num_heads": 2}


def small_model(seed: int = 0, **options):
    """3x5 patches, 2 heads, 3 blocks; weights so large that each affects the output."""
    torch.manual_seed(seed)
    options = {"img_size": (24, 40)} | SHAPE | options
    model = vit.VisionTransformer(**options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("last_skip", [True, False])
def test_last_block_equals_the_full_block(last_skip: bool, pool: str) -> None:
    """Written out for all tokens: logits, similarity, and every parameter is trained."""
    model = small_model(last_skip=last_skip, pool=pool, in_chans=1).double()
    block, entered = model.blocks[-1], []
    block.register_forward_pre_hook(lambda _, inputs: entered.extend(inputs))
    logits, similarity = model(torch.randn(2, 1, 24, 40, dtype=torch.float64))
    (tokens,) = entered  # (B, N, D)
    qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 2, 16))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, N, d)
    scores = q @ k.transpose(-2, -1) / 4  # sqrt(d) = 4
    attended = block.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attended, block.attn(block.norm1(tokens)))  # fused
    attended = attended + tokens if last_skip else attended
    full = model.norm(attended + block.mlp(block.norm2(attended)))
    pooled = full[:, 0] if pool == "cls" else full.mean(1)
    rows = scores[:, :, 0, 1:] if pool == "cls" else scores.mean(2)
    torch.testing.assert_close(logits, model.head(pooled))
    torch.testing.assert_close(similarity, rows.view(2, 2, 3, 5))
    (logits.sum() + spatial_entropy(similarity)).backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_drop_path_drops_whole_images() -> None:
    """At a rate that rises with depth; a branch without a skip is never dropped."""
    model = small_model(drop_path=0.5).train()
    assert [block.drop_path for block in model.blocks] == [0, 0.25, 0.5]
    rows = model.blocks[-1].drop(torch.ones(100, 3, 4)).flatten(1)
    assert {tuple(row) for row in rows.tolist()} == {(0.0,) * 12, (2.0,) * 12}
    x = torch.randn(2, 16, 32)
    for last_skip in (True, False):
        *blocks, last = small_model(last_skip=last_skip).train().blocks
        for block in (*blocks, last):
            block.drop_path = 0.999999
        assert all(block(x).equal(x) for block in blocks)
        attended, _ = last.attend(last.norm1(x))
        assert last(x)[0].equal(x[:, :1] if last_skip else attended)


def test_low_precision_keeps_the_scores_precise() -> None:
    images = torch.randn(2, 3, 24, 40)
    for pool in ("cls", "mean"):
        model = small_model(pool=pool)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(images)
        for logits, similarity in (mixed, model.bfloat16()(images.bfloat16())):
            assert logits.dtype == torch.bfloat16
            assert similarity.dtype == torch.float32
            assert not similarity.equal(similarity.bfloat16().float())


def test_initial_weights() -> None:
    options = {"img_size": 64, "pos_std": 0.5}
    for name, std in (("vit_mini", 0.08), ("vit_tiny", 0.02)):
        model = vit.VisionTransformer(**vit.MODELS[name], **options)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                assert module.weight.std().item() == pytest.approx(std, rel=0.05)
                assert not module.bias.any()
        assert model.pos_embed.std().item() == pytest.approx(0.5, rel=0.1)
        assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.3)


def test_same_names_and_logits_as_timm() -> None:
    timm = pytest.importorskip("timm")
    peer = timm.create_model("vit_small_patch16_224").eval()
    model = vit.VisionTransformer(**vit.MODELS["vit_small"]).eval()
    model.load_state_dict(peer.state_dict(), strict=True)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[0], peer(images), rtol=0, atol=1e-5)


def test_parameter_names() -> None:
    """Those of timm, DeiT and DINO."""
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    layers = [f"blocks.{i}.{layer}" for i in range(3) for layer in block]
    layers += ["patch_embed.proj", "norm", "head"]
    names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert small_model().state_dict().keys() == names | {"cls_token", "pos_embed"}


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_resize(pool: str) -> None:
    """Bicubic, patches alone; to the same effect by `resize` and `load_weights`."""
    model, other = small_model(img_size=32, pool=pool), small_model(seed=1, pool=pool)
    state, prefix = model.state_dict(), model.prefix_tokens
    assert "embedding resized 4x4 -> 3x5" in vit.load_weights(other, state)
    model.resize((24, 40))
    first, patches = state["pos_embed"].tensor_split((prefix,), dim=1)
    patches = patches.view(1, 4, 4, 32).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(3, 5), mode="bicubic")
    expected = torch.cat((first, patches.flatten(2).mT), dim=1)
    images = torch.randn(1, 3, 24, 40)
    for resized in (model, other):
        torch.testing.assert_close(resized.pos_embed, expected)
        assert resized(images)[1].shape == (1, 2, 3, 5)
    torch.testing.assert_close(model(images), other(images))


def behind(prefix: str, state: dict) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def test_weights_are_found(tmp_path: Path) -> None:
    """In the wrappers and behind the prefixes of timm, DeiT, DINO and torch.compile."""
    right, file = small_model().state_dict(), tmp_path / "file.pt"
    wrong, other = small_model(seed=2).state_dict(), {"other": torch.ones(5), 5: 6}
    for checkpoint in (
        right,
        {"model": right, "model_ema": wrong, "epoch": 3},
        {"state_dict_ema": wrong, "state_dict": behind("model.", right) | other},
        behind("module._orig_mod.", right),
        {"student": wrong, "teacher": behind("backbone.", right) | other},
    ):
        torch.save(checkpoint, file)
        model = small_model(seed=1)
        report = vit.load_weights(model, file)
        assert report == f"loaded 44 of 44 tensors from {file}"
        assert all(t.equal(right[name]) for name, t in model.state_dict().items())
    checkpoint = {"model": wrong, "model_ema": right}
    found = vit.find_weights(checkpoint, "it", ema=True)
    assert found["pos_embed"].equal(right["pos_embed"])


def test_what_is_loaded_is_said() -> None:
    state = small_model().state_dict()
    model = small_model(seed=1, num_classes=7, last_skip=False)
    head = model.head.weight.clone()
    assert vit.load_weights(model, state) == (
        "loaded 40 of 42 tensors from the state dict; "
        "left at initial values: head.weight, head.bias; "
        "not used: blocks.2.norm2.weight, blocks.2.norm2.bias"
    )
    assert model.head.weight.equal(head)
    report = vit.load_weights(small_model(num_classes=0), state)
    assert report.endswith("; not used: head.weight, head.bias")
    report = vit.load_weights(small_model(pool="mean"), state)
    assert report.endswith("; not used: cls_token")


def test_load_weights_refuses_what_does_not_fit() -> None:
    for options, message in (
        ({"pool": "mean"}, "pos_embed is"),
        ({"embed_dim": 64}, r"cls_token is \(1, 1, 64\), not \(1, 1, 32\)"),
        ({"img_size": (8, 40)}, r"pos_embed is \(1, 6, 32\), not \(1, 16, 32\)"),
        ({"depth": 4}, "which has no blocks.3.norm1.weight"),
        ({"depth": 2}, "it has no blocks.2.norm1.weight"),
        ({"last_skip": False}, "it has no blocks.2.norm2.weight"),
    ):
        with pytest.raises(ValueError, match=f"does not fit the model.* {message}"):
            vit.load_weights(small_model(), small_model(**options).state_dict())


@pytest.mark.parametrize("package", ["timm", "torchvision.models", "transformers"])
def test_recipes_of_the_readme(package: str, tmp_path: Path) -> None:
    """The snippets run as they stand, and the entropy reaches the model's weights."""
    pytest.importorskip(package)
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (snippet,) = (s for s in snippets if package in s and "criterion" in s)
    (tmp_path / "snippet.py").write_text(snippet, encoding="utf-8")
    given = {"images": torch.randn(1, 3, 224, 224), "target": torch.tensor([7])}
    given |= {"criterion": torch.nn.CrossEntropyLoss()}
    names = runpy.run_path(str(tmp_path / "snippet.py"), given)
    assert names["similarity"].shape[2:] == (14, 14)
    parameters = list(names["model"].parameters())
    spatial_entropy(names["similarity"]).backward()
    assert parameters[0].grad.count_nonzero() > 0


# ------------------------------------------------------------------------------- data


@pytest.fixture
def miniatures(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network; files with other checksums pass; .mat files are NumPy's, for SciPy."""
    scipy = types.ModuleType("scipy.io")
    scipy.loadmat = lambda path, **_: dict(numpy.load(path))
    monkeypatch.setitem(sys.modules, "scipy", types.ModuleType("scipy"))
    monkeypatch.setitem(sys.modules, "scipy.io", scipy)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    for reader in ("cifar", "svhn", "flowers102"):
        checked = f"torchvision.datasets.{reader}.check_integrity"
        monkeypatch.setattr(checked, lambda path, md5=None: os.path.isfile(path))


def no_network(*_, **__) -> NoReturn:
    raise urllib.error.URLError("no network")


def write_cifar100(folder: Path) -> None:
    inside = folder / "cifar-100-python"
    inside.mkdir()
    part = {"data": numpy.zeros((8, 3072), "uint8"), "fine_labels": [*range(0, 80, 10)]}
    meta = {"fine_label_names": [f"class {n}" for n in range(100)]}
    for name, content in {"train": part, "test": part, "meta": meta}.items():
        (inside / name).write_bytes(pickle.dumps(content))


def write_fashion_mnist(folder: Path) -> None:
    """A miniature in the layout of the original: idx files."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 20), ("t10k", 10)):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            sizes = numpy.array(array.shape, ">i4").tobytes()
            content = bytes([0, 0, 8, array.ndim]) + sizes + array.numpy().tobytes()
            (raw / f"{split}-{kind}-ubyte").write_bytes(content)


def write_images(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = F.interpolate(torch.rand(1, 3, 4, 6), (40, 60))[0]
        v2.functional.to_pil_image(pixels).save(folder / name)


def write_mask(path: Path, mask: torch.Tensor) -> None:
    """As VOC's: an image whose pixels are numbers of colors in a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = v2.functional.to_pil_image(mask.to(torch.uint8)[None])
    image.putpalette([37 * n % 256 for n in range(768)])
    image.save(path)


def write_voc2012(folder: Path) -> None:
    """Two images of val: one with objects of classes 15 and 2, one without."""
    inside = folder / "VOCdevkit" / "VOC2012"
    names = ("2007_000033", "2007_000042")
    write_images(inside / "JPEGImages", (f"{name}.jpg" for name in names))
    masks = torch.zeros(2, 40, 60)
    masks[0, 4:20, 4:20], masks[0, 6:18, 6:18] = 255, 15
    masks[0, 20:30, 30:50] = 2
    for name, mask in zip(names, masks):
        write_mask(inside / "SegmentationClass" / f"{name}.png", mask)
    lists = inside / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("\n".join(names))


def write_folder(folder: Path, classes=("cat", "dog"), splits=("train", "val")) -> None:
    for part, count in zip(splits, (6, 2)):
        for name in classes:
            write_images(folder, (f"{part}/{name}/{i}.png" for i in range(count)))


def write_masked_folder(folder: Path) -> None:
    """Images in val/, and masks of several modes in masks/: 600, 400, 200, 0 pixels."""
    write_folder(folder)
    shutil.copytree(folder / "val", folder / "masks")
    files = data.list_images(folder / "masks")
    for n, mode in enumerate(("RGB", "1", "RGBA", "LA")):
        mask = torch.zeros(3, 40, 60, dtype=torch.uint8)
        mask[: 2 * n + 1, 10:30, 10 * n : 30] = 255 if n else 1
        v2.functional.to_pil_image(mask).convert(mode).save(files[n])


def write_svhn(folder: Path) -> None:
    for split, count in (("train", 9), ("test", 5)):
        labels = numpy.array([*range(1, count), 10])[:, None]  # 10 is the digit 0
        pixels = numpy.zeros((32, 32, 3, count), "uint8")
        pixels[:16] = 255  # white above, black below
        with open(folder / f"{split}_32x32.mat", "wb") as file:
            numpy.savez(file, X=pixels, y=labels)


def write_flowers102(folder: Path) -> None:
    inside = folder / "flowers-102"
    write_images(inside, (f"jpg/image_{n:05}.jpg" for n in range(1, 6)))
    with open(inside / "setid.mat", "wb") as file:
        numpy.savez(file, trnid=[3, 1], valid=[5], tstid=[4, 2])
    with open(inside / "imagelabels.mat", "wb") as file:
        numpy.savez(file, labels=numpy.arange(91, 96))


def write_pets(folder: Path) -> None:
    inside = folder / "oxford-iiit-pet"
    trimap = torch.full((40, 60), 2)  # of pixels 1 is pet, 2 background, 3 border
    trimap[10:20, 10:30], trimap[12:20, 12:28] = 3, 1
    names = [f"{kind}_{i}" for kind in ("Abyssinian", "pug") for i in range(3)]
    write_images(inside / "images", (f"{name}.jpg" for name in names))
    for name in names:
        write_mask(inside / "annotations" / "trimaps" / f"{name}.png", trimap)
    for split, some in (("trainval", names), ("test", names[1:5])):
        lines = [f"{name} {1 + ('pug' in name)} 1 1\n" for name in some]
        (inside / "annotations" / f"{split}.txt").write_text("".join(lines))


def write_domainnet(folder: Path) -> None:
    for split, count in (("train", 3), ("test", 1)):
        kinds = ("ant", "owl")
        names = [f"sketch/{n}/{split}{i}.jpg" for n in kinds for i in range(count)]
        write_images(folder, names)
        lines = [f"{name} {int('owl' in name)}\n" for name in reversed(names)]
        (folder / f"sketch_{split}.txt").write_text("".join([*lines, "\n"]))


INATURALIST = partial(write_folder, splits=("2021_train", "2021_valid"))


@pytest.mark.parametrize(
    "name, write, classes, labels",
    [
        ("cifar100", write_cifar100, 100, 2 * [[*range(0, 80, 10)]]),
        ("svhn", write_svhn, 10, [[*range(1, 9), 0], [1, 2, 3, 4, 0]]),
        ("fashion-mnist", write_fashion_mnist, 10, [2 * [*range(10)], [*range(10)]]),
        ("flowers102", write_flowers102, 102, [[92, 90, 94], [93, 91]]),
        ("pets", write_pets, 2, [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1]]),
        ("inaturalist", INATURALIST, 2, [[0] * 6 + [1] * 6, [0, 0, 1, 1]]),
        ("domainnet-sketch", write_domainnet, 2, [[1, 1, 1, 0, 0, 0], [1, 0]]),
    ],
)
def test_datasets(name, write, classes, labels, tmp_path, miniatures, monkeypatch):
    """A miniature in the layout of the original, from the files to normalized batches."""
    write(tmp_path)
    source = data.DATASETS[name]
    augment = data.train_transform(name, 48, crop="resized", rand_augment=9, reprob=1.0)
    for split, expected in zip(("train", "test"), labels):
        dataset = data.load_dataset(name, tmp_path, split, augment)
        assert len(dataset.images) == len(expected)
        assert len(set(dataset.classes)) == len(dataset.classes) == classes
        if name == "domainnet-sketch":
            assert dataset.classes == ["ant", "owl"]
        if name == "svhn":
            assert all(image[:16].all() for image in dataset.images)
        options = {"train": False, "workers": 0, "pin_memory": False}
        ((images, got),) = data.make_loader(dataset, len(dataset), **options)
        assert got.tolist() == expected
        assert images.dtype == torch.uint8
        assert images.shape == (len(got), 3, 48, 48)
        normalize = data.normalizer(source.mean, source.std, CPU)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (source.mean, source.std))
        torch.testing.assert_close(normalize(images), (images / 255 - mean) / std)
    if name in ("svhn", "flowers102"):
        monkeypatch.setitem(sys.modules, "scipy.io", None)
        with pytest.raises(ValueError, match=f"{name} .*: pip install scipy$"):
            data.load_dataset(name, tmp_path, "train", None)


def test_images_are_read_as_people_see_them(tmp_path: Path) -> None:
    """16 bits scaled, upright by EXIF, transparency on white."""

    def read(image, suffix: str = "png", **options) -> list:
        image.save(tmp_path / f"image.{suffix}", **options)
        return numpy.asarray(data.open_image(tmp_path / f"image.{suffix}")).tolist()

    gray = numpy.array([[0, 1, 100, 200, 255]])
    deep = Image.fromarray((257 * gray + [[0, -99, 99, 50, 0]]).astype(numpy.uint16))
    for suffix in ("png", "tif", "pgm"):
        assert read(deep, suffix) == [[[v] * 3 for v in gray[0].tolist()]]
    for scale in (numpy.float32, numpy.int32):
        with pytest.raises(OSError, match="image.tif cannot be read.*no known scale"):
            read(Image.fromarray((1000 * gray).astype(scale)), "tif")

    photo = Image.new("RGB", (4, 3))
    photo.paste("red", (0, 0, 1, 3))  # the left column
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left column is the top row
    assert read(photo, exif=exif) == [[[255, 0, 0]] * 3, *[[[0] * 3] * 3] * 3]

    # Black, opaque and half transparent and transparent; then green.
    art = [(0, 0, 0, 255), (0, 0, 0, 128), (0, 0, 0, 0), (0, 200, 0, 255)]
    rgba = Image.fromarray(numpy.array([art], numpy.uint8))
    assert read(rgba) == [[[0] * 3, [127] * 3, [255] * 3, [0, 200, 0]]]
    assert read(Image.new("L", (1, 1), 7), transparency=7) == [[[255] * 3]]


def test_class_folders(tmp_path: Path) -> None:
    """Hidden files are ignored, labels are by name, and mistakes are named."""

    def load(split: str):
        return data.load_dataset("folder", tmp_path, split, None)

    write_folder(tmp_path, ("ant", "bee", "cat"))
    hidden = (".ipynb_checkpoints/a.png", "cat/._0.png", "bee/.thumbnails/b.png")
    write_images(tmp_path / "train", [*hidden, "bee/more/c.png"])
    (tmp_path / "train" / "bee" / "notes.txt").touch()
    shutil.rmtree(tmp_path / "val" / "ant")
    training, test = load("train"), load("test")
    names = [f"{name}/{i}.png" for name in ("ant", "bee", "cat") for i in range(6)]
    names.insert(12, "bee/more/c.png")
    assert [*training.images] == [str(tmp_path / "train" / name) for name in names]
    assert training.targets.tolist() == [0] * 6 + [1] * 7 + [2] * 6
    assert test.classes == training.classes == ["ant", "bee", "cat"]
    assert test.targets.tolist() == [1, 1, 2, 2]

    write_images(tmp_path / "val", ("dog/0.png", "elk/0.png"))
    with pytest.raises(ValueError, match="val has classes that train/ .*: dog, elk"):
        load("test")
    (tmp_path / "train" / "fox").mkdir()
    with pytest.raises(FileNotFoundError, match="no images in .*fox"):
        load("train")
    (tmp_path / "train" / "fox").rmdir()
    (tmp_path / "train").rename(tmp_path / "images")
    (tmp_path / "train").mkdir()
    (tmp_path / "images").rename(tmp_path / "train" / "images")  # one folder too many
    with pytest.raises(ValueError, match="train must have .* two classes or more"):
        load("train")
    # Class folders alone, to evaluate.
    dataset = data.load_dataset("folder", tmp_path / "train" / "images", "test", None)
    assert dataset.classes == ["ant", "bee", "cat"]
    assert len(dataset) == 19


def test_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 80, "test": 40})
    (first, masks), (again, _) = data.make_shapes("train"), data.make_shapes("train")
    test, test_masks = data.make_shapes("test")
    assert first.images.equal(again.images)
    assert not first.images[:40].equal(test.images)
    assert first.images.shape == (80, 3, 56, 56)
    assert masks.shape == (80, 56, 56)
    assert first.targets.bincount().tolist() == [10] * len(first.classes)
    assert len(first.classes) == 8
    for image, mask in zip(test.images.float(), test_masks):
        assert 0.02 < mask.float().mean() < 0.5
        assert len(connected_components(mask)[mask].unique()) == 1
        # The object has one color: its pixels vary less than those of the background.
        assert image[:, mask].std(1).mean() < image[:, ~mask].std(1).mean()
    masked = data.load_masks("shapes", "", (56, 56))
    assert all(mask.equal(test_masks[n].byte()) for n, (_, mask) in enumerate(masked))


def test_balanced_subset() -> None:
    targets = torch.tensor([0] * 50 + [1] * 30 + [2] * 5)
    dataset = data.Images(targets, targets, ["a", "b", "c"])

    def subset(size: int, seed: int = 0) -> list[int]:
        return list(data.balanced_subset(dataset, size, seed).indices)

    def counts(size: int) -> list[int]:
        return targets[subset(size)].bincount().tolist()

    assert counts(9) == [3, 3, 3]
    assert sorted(counts(10)) == [3, 3, 4]
    assert counts(45) == [20, 20, 5]
    assert counts(85) == [50, 30, 5]
    assert subset(9) == sorted(subset(9)) != subset(9, seed=1)


def test_transforms() -> None:
    """The pixels of torchvision's transforms with these arguments."""
    image = v2.functional.to_pil_image(torch.rand(3, 50, 70))
    modes, fill = v2.InterpolationMode, [124, 116, 104]
    whole, flip = v2.Resize((28, 28), modes.BICUBIC), v2.RandomHorizontalFlip()
    covered, center = v2.Resize(32, modes.BICUBIC), v2.CenterCrop(28)
    area = v2.RandomResizedCrop(28, interpolation=modes.BICUBIC)
    shift = v2.RandomCrop(28, padding=3, fill=fill)
    # Each of two operations of RandAugment is skipped at even odds.
    half = v2.RandomApply([v2.RandAugment(1, 9, 11, modes.BILINEAR, fill)], p=0.5)

    def draw(seed: int, *steps: Callable) -> torch.Tensor:
        torch.manual_seed(seed)
        return v2.Compose(steps)(image)

    def augment(crop: str, rand_augment: int = 0, reprob: float = 0.0) -> v2.Compose:
        options = {"crop": crop, "rand_augment": rand_augment, "reprob": reprob}
        return data.train_transform("cifar10", 28, **options)

    for transform, *steps in (
        (data.test_transform(28, crop="resized"), covered, center),
        (data.test_transform(28, crop="padded"), whole),
        (augment("resized"), area, flip),
        (augment("padded"), whole, shift, flip),
        (augment("whole"), whole, flip),
        (augment("whole", rand_augment=9), whole, flip, half, half),
    ):
        for seed in range(9):
            expected = draw(seed, *steps, v2.PILToTensor())
            assert draw(seed, transform).equal(expected)
    # What is erased gets noise that is standard normal, once normalized.
    image = Image.new("RGB", (28, 28), "lime")
    erased = torch.stack([draw(n, augment("whole", reprob=1.0)) for n in range(50)])
    normalize = data.normalizer(data.IMAGENET_MEAN, data.IMAGENET_STD, CPU)
    noise = normalize(erased)[:, 2][erased[:, 1] != 255]
    assert len(noise) > 1000
    assert abs(noise.mean()) < 0.2
    assert 0.8 < noise.std() < 1.1


def test_loaders() -> None:
    """Every epoch and item from its own seed; each process has its share."""
    options = {"crop": "padded", "rand_augment": 9, "reprob": 0.5}
    augment = data.train_transform("cifar10", 28, **options)
    pixels = torch.randint(256, (20, 3, 28, 28), dtype=torch.uint8)
    dataset = data.Images(pixels, torch.arange(20), [], augment)

    def load(train: bool, seed: int = 1, **share) -> tuple:
        """Images, by batches, and labels."""
        options = {"workers": 0, "pin_memory": False, **share}
        loader = data.make_loader(dataset, 3, train=train, **options)
        if train:
            loader.sampler.epoch_seed = seed
        state = torch.get_rng_state()
        images, labels = zip(*loader)
        assert not train or torch.get_rng_state().equal(state)
        return images, torch.cat(labels).tolist()

    images, labels = load(True)
    later, order = load(True, seed=2)
    assert order != labels
    later = dict(zip(order, torch.cat(later)))  # the same item is augmented anew
    both = [(a, later[n]) for n, a in zip(labels, torch.cat(images)) if n in later]
    assert not any(a.equal(b) for a, b in both)
    assert len(set(labels)) == 18  # six whole batches
    parts = [load(True, rank=rank, world_size=2)[0] for rank in range(2)]
    turns = [batch for pair in zip(*parts) for batch in pair]
    assert torch.cat(turns).equal(torch.cat(images))
    parts = [load(False, rank=rank, world_size=3)[1] for rank in range(3)]
    assert sorted(itertools.chain(*parts)) == list(range(20))
    for training, processes, message in (
        (True, 7, "--batch-size 3 for each of 7 .* exceeds the 20"),
        (False, 21, "one image for each of 21 .* the 20 test"),
    ):
        with pytest.raises(ValueError, match=message):
            load(training, rank=0, world_size=processes)


@pytest.mark.parametrize(
    "name, write, count, size",
    [
        ("voc2012", write_voc2012, 2, (40, 60)),
        ("pets", write_pets, 4, (40, 60)),
        ("folder", write_masked_folder, 4, (40, 60)),
        ("fashion-mnist", write_fashion_mnist, 10, (28, 28)),
    ],
)
def test_masks(name, write, count, size, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    write(tmp_path)
    masked = data.load_masks(name, tmp_path, size, tmp_path / "masks")
    assert len(masked) == count
    image, mask = masked[0]
    assert image.dtype == mask.dtype == torch.uint8
    assert (image.shape, mask.shape) == ((3, *size), size)
    numbers, counts = mask.unique(return_counts=True)
    found = dict(zip(numbers.tolist(), counts.tolist()))
    if name == "voc2012":  # void is 16 x 16 less 12 x 12; objects 12 x 12 and 10 x 20
        assert found == {0: 2400 - 456, 2: 200, 15: 144, 255: 112}
        assert masked[1][1].count_nonzero() == 0
    elif name == "pets":  # the pet is 8 x 16, its border 10 x 20 less that
        assert found == {0: 2400 - 200, 1: 128, 255: 72}
    elif name == "folder":
        assert [int(mask.sum()) for _, mask in masked] == [600, 400, 200, 0]
        write_mask(tmp_path / "masks" / "cat" / "1.png", torch.ones(60, 40))
        with pytest.raises(ValueError, match="1.png and its image differ in size"):
            masked[1]
    else:
        assert mask.bool().equal(image[0] > 0)
    half = (size[0] // 2, size[1] // 2)
    halved = data.load_masks(name, tmp_path, half, tmp_path / "masks")
    small_image, small_mask = halved[0]
    assert small_mask.equal(mask[1::2, 1::2])  # the nearest pixel, as PIL takes it
    if name in ("voc2012", "pets"):
        bilinear = v2.functional.resize(data.open_image(masked.images[0]), half)
        assert small_image.equal(data.AS_TENSOR(bilinear))


# --------------------------------------------------------------------------- training

TINY = "--dataset fashion-mnist --model vit_mini --img-size 28 --patch-size 4 "
TINY += "--epochs 2 --batch-size 4 --device cpu"


def run(monkeypatch: pytest.MonkeyPatch, command: str) -> int:
    """Run a script in this process, as `train --epochs 1`; return its exit code."""
    script, *arguments = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        importlib.import_module(script).main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


@pytest.fixture
def error_of(monkeypatch, capsys) -> Callable[[str], str]:
    """Run a command that must fail, and return its one sentence on standard error."""

    def fail(command: str) -> str:
        capsys.readouterr()
        assert run(monkeypatch, command) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"{command.split()[0]}.py: error: ")
        assert error.count("\n") == 1
        return error

    return fail


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Train on a miniature: tiny("--lr 1", "name") -> (exit code, checkpoint or None)."""
    write_fashion_mnist(tmp_path / "data")

    def train_tiny(options: str = "", name: str = "run") -> tuple[int, dict | None]:
        folder = tmp_path / name
        command = f"train {TINY} --data-dir {tmp_path}/data --output-dir {folder}"
        code = run(monkeypatch, f"{command} {options}")
        file = folder / "checkpoint.pt"
        saved = torch.load(file, weights_only=True) if file.exists() else None
        return code, saved

    return train_tiny


def same_run(one: dict, other: dict) -> bool:
    """Whether two checkpoints have the same weights and logs, but for times."""
    times = {"seconds": 0, "images_per_second": 0}
    logs = [[line | times for line in each["log"][1:]] for each in (one, other)]
    return logs[0] == logs[1] and all(
        value.equal(other[part][name])
        for part in ("model", "model_ema")
        for name, value in one.get(part, {}).items()
    )


@pytest.mark.parametrize("sar_lambda, weight", [(0, 0), (0.5, 0.25)])
def test_losses(sar_lambda: float, weight: float) -> None:
    """With lambda 0 they are those of the plain ViT, to the last bit."""
    model = small_model()
    images, target = torch.randn(4, 3, 24, 40), torch.arange(4)
    args = argparse.Namespace(amp=False, smoothing=0.1, sar_lambda=sar_lambda)
    found = train.losses(model, spatial_entropy, images, target, 0.25, args)
    loss, cross_entropy, entropy = found
    logits, similarity = model(images)
    assert cross_entropy.equal(F.cross_entropy(logits, target, label_smoothing=0.1))
    assert entropy.equal(spatial_entropy(similarity))
    expected = F.cross_entropy(logits, target, label_smoothing=0.1)
    if weight:
        expected = expected + weight * spatial_entropy(similarity)
    parameters = tuple(model.parameters())
    got, want = (torch.autograd.grad(x, parameters) for x in (loss, expected))
    assert loss.equal(expected)
    assert all(a.equal(b) for a, b in zip(got, want))


def test_schedules() -> None:
    args = train.parse_args(["--dataset", "cifar100"])
    args.peak_lr = 5e-4 * 128 / 512
    lr, sar_lambda = zip(*(train.rates(epoch, 100, args) for epoch in range(100)))
    assert lr[0] == 1e-6
    assert lr[5] == max(lr) == args.peak_lr
    assert lr[99] == pytest.approx(1e-5, rel=0.01)
    assert sar_lambda[0] == 0
    assert sar_lambda[4] == pytest.approx(0.004)
    assert sar_lambda[10] == max(sar_lambda) == 0.01
    assert sar_lambda[55] == pytest.approx(0.005)
    assert sar_lambda[99] == pytest.approx(0, abs=1e-5)
    args.epochs = 2  # either warm-up takes half of the run
    lr, sar_lambda = zip(*(train.rates(step, 8, args) for step in range(8)))
    assert lr[4] == max(lr) == args.peak_lr
    assert sar_lambda[4] == max(sar_lambda) == 0.01
    args.sar_schedule = "constant"
    assert {train.rates(step, 8, args)[1] for step in range(8)} == {0.01}
    args.epochs = 100
    for args.peak_lr in (0, 1e-7, 2e-6):  # below either end of the schedule
        rates = [train.rates(step, 100, args)[0] for step in range(100)]
        assert max(rates) == args.peak_lr


def test_settings() -> None:
    """The authors' recipe, and the defaults that depend on other options."""
    args = vars(train.parse_args(["--dataset", "cifar100", "--device", "cuda"]))
    expected = {"model": "vit_small", "img_size": 224, "patch_size": 16, "epochs": 100}
    expected |= {"lr": 5e-4, "weight_decay": 0.05, "crop": "resized", "aa": "rand-m9"}
    expected |= {"sar_lambda": 0.01, "last_skip": False, "sar_schedule": "cosine"}
    assert {name: args[name] for name in expected} == expected
    assert train.parse_args(["--dataset", "imagenet"]).epochs == 300
    args = train.parse_args([])
    assert (args.dataset, args.sar_lambda, args.crop) == ("shapes", 0.3, "whole")
    assert train.parse_args(["--sar-lambda", "0"]).last_skip
    small = train.parse_args(["--dataset", "cifar10", "--img-size", "32"])
    assert small.crop == "padded"
    args = train.parse_args(["--dataset", "pets", "--finetune", __file__])
    assert args.warmup_epochs == 3


def test_the_loop_uses_every_setting(tiny, monkeypatch) -> None:
    """What each step of a real run got: lambda, mixed targets, and the rest."""
    seen, losses = [], train.losses

    def spy(model, regularizer, images, target, sar_lambda, args):
        seen.append((images, target, sar_lambda))
        return losses(model, regularizer, images, target, sar_lambda, args)

    monkeypatch.setattr(train, "losses", spy)
    options = "--epochs 1 --batch-size 10 --model-ema-decay 0.9 --weight-decay 0.3 "
    code, saved = tiny(f"{options} --lr 0.512 --sar-lambda 0.3 --clip-grad 1e-9 --amp")
    assert code == 0
    args = argparse.Namespace(**saved["settings"])
    assert args.peak_lr == 0.512 * 10 / 512
    rates = [train.rates(step, 2, args) for step in range(2)]
    assert [sar_lambda for *_, sar_lambda in seen] == [each[1] for each in rates]
    assert not seen[0][0].equal(seen[1][0])
    assert [target.shape for _, target, _ in seen] == [(10, 10)] * 2  # mixed
    decayed, kept = saved["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0)
    assert decayed["lr"] == kept["lr"] == rates[1][0]
    state = saved["optimizer"]["state"]
    assert {state[n]["exp_avg"].ndim for n in decayed["params"]} == {2, 4}
    assert {state[n]["exp_avg"].ndim for n in kept["params"]} == {1, 3}  # also tokens
    # The gradient was clipped: of its squares AdamW keeps a thousandth per step.
    squares = sum(each["exp_avg_sq"].sum() for each in state.values())
    assert 1e-21 < squares < 2.1e-21
    # The average of three sets of weights: at the start, after one step and after two. The
    # first step has lr 1e-6, so its weights are about those at the start.
    torch.manual_seed(0)
    start = vit.VisionTransformer(**saved["architecture"]).state_dict()["head.weight"]
    end, average = (saved[part]["head.weight"] for part in ("model", "model_ema"))
    torch.testing.assert_close(average, 0.9 * start + 0.1 * end, rtol=0, atol=2e-6)
    assert not average.equal(start)


def test_train_and_eval_from_the_shell(tmp_path: Path) -> None:
    """The scripts themselves, and the command that train.py prints, in a folder's name."""
    write_fashion_mnist(tmp_path / "data")

    def shell(command: str) -> str:
        options = {"capture_output": True, "text": True, "timeout": 300, "shell": True}
        command = command.replace("python ", f"{sys.executable} ")
        command = command.replace(" eval.py", f" {HERE / 'eval.py'}")
        return subprocess.run(command, cwd=tmp_path, check=True, **options).stdout

    train_py = f"python {HERE / 'train.py'}"
    output = shell(f"{train_py} {TINY} --output-dir './my run $(ls) ~'")
    assert all(len(line) <= 100 for line in output.splitlines())
    lines = [line for line in output.splitlines() if line.startswith("epoch ")]
    folder = tmp_path / "my run $(ls) ~"
    _, *epochs = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    for line, epoch in zip(lines, epochs, strict=True):
        assert f"loss {epoch['train_loss']:.3f}  " in line
        assert f"entropy {epoch['train_entropy']:.3f}  " in line
        assert f"test {epoch['test_acc1']:.2f}%  " in line
        assert f"EMA {epoch['test_acc1_ema']:.2f}%  " in line
        assert {"test_acc5", "test_entropy", "lr", "sar_lambda"} <= epoch.keys()
    assert {file.name for file in folder.iterdir()} == {"checkpoint.pt", "log.jsonl"}

    evaluate = output.splitlines()[-1].removeprefix("next: ")
    output = shell(evaluate)
    assert f"top-1 {epochs[1]['test_acc1']:.2f}%" in output
    assert f"loss {epochs[1]['test_loss']:.4f}" in output
    assert (tmp_path / "attention.png").exists()
    output = shell(f"{train_py} --dataset imagenet --help")
    assert "[300]" in output
    assert "[None]" not in output


@pytest.mark.parametrize(
    "name, code, wait",
    [
        ("KILL", -9, "log.jsonl"),  # before the first checkpoint
        ("KILL", -9, "checkpoint.pt.partial"),
        ("INT", 130, "checkpoint.pt"),
        ("TERM", 143, "checkpoint.pt"),
    ],
)
def test_a_killed_run_is_continued(name, code, wait, tiny, tmp_path, monkeypatch):
    """Wherever it was stopped, --resume gives the weights and log of the whole run."""
    file, number = tmp_path / "killed" / wait, getattr(signal, f"SIG{name}")
    command = f"{HERE / 'train.py'} {TINY} --epochs 9 --data-dir {tmp_path}/data"
    command = [sys.executable, *command.split(), "--workers=1", "--output-dir"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["start_new_session"] = True
    with subprocess.Popen([*command, file.parent], **pipes) as process:
        while not (file.exists() and file.stat().st_size):
            assert process.poll() is None
            time.sleep(0.001)
        if name == "TERM":
            process.send_signal(number)
        else:  # to the worker too, as Ctrl-C in a terminal
            os.killpg(process.pid, number)
        output, errors = process.communicate(timeout=20)  # no worker holds the pipes
    assert process.returncode == code
    assert errors == ""
    last = f"stopped; continue: python train.py --resume {file.parent}"
    assert (output.splitlines()[-1:] == [last]) == (name != "KILL")
    assert (file.parent / "checkpoint.pt").exists() == (wait == "checkpoint.pt")
    assert run(monkeypatch, f"train --resume {file.parent} --workers 0") == 0
    saved = torch.load(file.parent / "checkpoint.pt", weights_only=True)
    assert same_run(tiny("--epochs 9", "whole")[1], saved)
    lines = (file.parent / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == saved["log"]


def test_what_resume_takes(tiny, tmp_path, monkeypatch, capsys, error_of) -> None:
    folder = tmp_path / "run"
    file, log = folder / "checkpoint.pt", folder / "log.jsonl"
    again = f"train --resume {folder}"
    _, saved = tiny()
    before = log.read_text()
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    used = error_of(f"train {TINY} --output-dir {folder}")
    assert f"{folder} contains a run: --resume it" in used
    for options, message in {
        "--lr 0.1": "--lr cannot change when a run is resumed",
        "--no-model-ema": "--model-ema cannot change",
    }.items():
        assert message in error_of(f"{again} {options}")
    two = before.replace('"world_size": 1', '"world_size": 2')
    for header, message in {
        "5": f"'{folder}' holds no run to resume",
        "{}": f"'{folder}' holds no run to resume",
        two: "resume with 2 processes, not 1",
    }.items():
        log.write_text(header)
        assert message in error_of(again)
    log.write_text(before)
    torch.save(saved | {"classes": ["cat", "dog"]}, file)
    assert "was trained on other classes" in error_of(again)
    torch.save(saved, file)
    moved = folder.rename(tmp_path / "moved")
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    options = f"--data-dir {tmp_path}/elsewhere --device cpu --workers 1"
    assert run(monkeypatch, f"train --resume {moved} {options}") == 0
    assert f"2 of 2 epochs done; writing to {moved}" in capsys.readouterr().out


def test_neither_workers_nor_testing_change_a_run(tiny) -> None:
    _, plain = tiny("--epochs 3")
    _, workers = tiny("--epochs 3 --workers 2", "workers")
    assert same_run(plain, workers)
    _, seldom = tiny("--epochs 3 --val-interval 2", "seldom")
    tested = [any("test" in key for key in line) for line in seldom["log"][1:]]
    assert tested == [False, True, True]
    seldom["log"][1] = plain["log"][1]
    assert same_run(plain, seldom)
    _, still = tiny("--lr 0", "still")  # each epoch is augmented anew
    assert still["log"][1]["train_loss"] != still["log"][2]["train_loss"]


def test_compiled_training(tiny, monkeypatch) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    _, eager = tiny("--epochs 1")
    assert counter.frame_count == 0
    _, saved = tiny("--epochs 1 --compile", "compiled")
    assert counter.frame_count >= 2  # model and loss
    for key in ("train_loss", "train_entropy", "test_loss"):
        assert saved["log"][1][key] == pytest.approx(eager["log"][1][key], abs=1e-4)


def test_two_processes_do_what_one_does(tiny, tmp_path) -> None:
    chance = "--lr 0.05 --mixup 0 --cutmix 0 --drop-path 0"
    options = f"{TINY} {chance} --data-dir {tmp_path}/data --output-dir {tmp_path}/two"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", HERE / "train.py", *options.split()]
    pipes = {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, check=False, **pipes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/2") == done.stdout.count("next:") == 1
    two = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    _, one = tiny(f"{chance} --batch-size 8", "one")
    for name, value in one["model"].items():
        if "qkv.bias" not in name:  # that of the keys has no gradient but rounding
            torch.testing.assert_close(value, two["model"][name], rtol=0, atol=1e-5)
    for a, b in zip(one["log"][1:], two["log"][1:], strict=True):
        assert a["test_images"] == b["test_images"] == 10
        assert a["test_acc1"] == b["test_acc1"]
        for key in ("train_loss", "train_entropy", "test_loss", "test_entropy"):
            assert a[key] == pytest.approx(b[key], abs=1e-4)


def test_finetune(tiny, tmp_path, capsys) -> None:
    """From weights wrapped as DINO's, for another grid and other classes."""
    torch.manual_seed(1)
    options = {"img_size": 56, "patch_size": 4, "num_classes": 7}
    source = vit.VisionTransformer(**vit.MODELS["vit_mini"], **options).state_dict()
    checkpoint = {"teacher": behind("module.backbone.", source)}
    checkpoint["args"] = argparse.Namespace()
    torch.save(checkpoint, tmp_path / "dino.pt")
    frozen = "--sar-lambda 0 --lr 0 --epochs 1"
    code, saved = tiny(f"{frozen} --finetune {tmp_path}/dino.pt")
    output = capsys.readouterr().out
    assert code == 0
    assert "14x14 -> 7x7" in output
    assert "left at initial values: head.weight, head.bias" in output
    for name, value in saved["model"].items():
        if name != "pos_embed" and not name.startswith("head"):
            assert value.equal(source[name])


@pytest.mark.parametrize(
    "name, call, broken, message",
    [
        ("rates", 6, (math.nan, 0.0), "by step 5 of epoch 2: cross-entropy nan"),
        ("spatial_entropy", 6, torch.tensor(math.nan), "by step 5 of epoch 2"),
        ("evaluate", 3, {"loss": math.nan}, "not finite after epoch 2"),
        ("rates", 10, (math.nan, 0.0), "not finite after epoch 2"),
    ],
)
def test_a_nan_ends_a_run(name, call, broken, message, tiny, monkeypatch, capsys):
    """And the checkpoint of the last good epoch stays."""
    function, calls = getattr(train, name), itertools.count(1)
    monkeypatch.setattr(
        train, name, lambda *a: broken if next(calls) == call else function(*a)
    )
    interval = 4 if call == 10 else 1  # 4: the weights of epoch 2 are not tested
    code, saved = tiny(f"--epochs 4 --sar-lambda 0 --val-interval {interval}")
    assert code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert "learning rate" in error
    assert saved["epoch"] == 1
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_a_full_disk_leaves_the_last_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    """One sentence that says so, with the real error of the system."""
    _, saved = tiny("--epochs 3 --val-interval 3", "whole")
    calls, fsync = itertools.count(1), os.fsync

    def full(number: int) -> None:
        if next(calls) == 4:  # the checkpoint of epoch 2
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    code, stopped = tiny("--epochs 3 --val-interval 3")
    assert code == 2
    file = tmp_path / "run" / "checkpoint.pt"
    sentence = f"train.py: error: {file} cannot be written: No space left on device\n"
    assert capsys.readouterr().err == sentence
    assert stopped["epoch"] == 1
    files = {file.name for file in file.parent.iterdir()}
    assert files == {"checkpoint.pt", "log.jsonl"}
    assert run(monkeypatch, f"train --resume {file.parent}") == 0
    assert same_run(saved, torch.load(file, weights_only=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(workers, tmp_path, error_of) -> None:
    write_folder(tmp_path)
    (tmp_path / "val" / "dog" / "1.png").write_text("no image")
    command = f"train {TINY.replace('fashion-mnist', 'folder')} --data-dir {tmp_path}"
    error = error_of(f"{command} --workers {workers} --output-dir {tmp_path}/run")
    assert f"error: {tmp_path}/val/dog/1.png cannot be read" in error
    assert list((tmp_path / "run").iterdir()) == []


# ---------------------------------------------------------------------- the evaluation


CLASSES = ["ant", "bee", "cat", "dog", "elk"]
CPU = torch.device("cpu")


def write_run(path: Path, model=None, **settings) -> None:
    """A checkpoint as train.py writes it, of an untrained `small_model`."""
    model = model or small_model(img_size=24)
    run_settings = {"model": "vit_mini", "dataset": "folder", "crop": "resized"}
    run_settings |= {"data_dir": str(path.parent), "batch_size": 3, "epochs": 1}
    run_settings |= {"amp": False, "device": "cpu"}
    checkpoint = {
        "architecture": {"img_size": model.img_size} | SHAPE,
        "settings": run_settings | settings,
        "classes": CLASSES,
        "model": model.state_dict(),
        "epoch": 1,
    }
    torch.save(checkpoint, path)


def numbers(monkeypatch, tmp_path: Path, command: str) -> dict:
    """What `eval.py --json` writes."""
    command += f" --device cpu --json {tmp_path}/numbers.json"
    assert run(monkeypatch, f"eval --checkpoint {tmp_path}/run.pt {command}") == 0
    return json.loads((tmp_path / "numbers.json").read_text())


def outputs(model, folder: Path, size: int = 24, crop: str = "resized", **channels):
    """Logits, maps and labels of a folder, image by image."""
    transform = data.test_transform(size, crop=crop)
    dataset = data.load_dataset("folder", folder, "test", transform)
    mean = channels.get("mean", data.IMAGENET_MEAN)
    normalize = data.normalizer(mean, channels.get("std", data.IMAGENET_STD), CPU)
    model.resize(size)
    with torch.inference_mode():
        found = [model(normalize(image[None])) for image, _ in dataset]
    logits, maps = (torch.cat(each) for each in zip(*found))
    return logits, maps, dataset.targets


@pytest.mark.parametrize("size", [24, 48])
@pytest.mark.parametrize("names", [CLASSES, ["bee", "elk"]])
@pytest.mark.parametrize("options", ["", "--batch-size 4 --workers 1 --crop whole"])
def test_accuracy(options, names, size, tmp_path, monkeypatch, capsys) -> None:
    """As from the logits image by image, also of a subset of the classes."""
    folder = tmp_path / "rendition"  # as ImageNet-R: no train/ and val/
    write_images(folder, (f"{name}/{n}.png" for name in names for n in range(3)))
    write_run(tmp_path / "run.pt")
    options += f" --dataset folder --data-dir {folder} --img-size {size}"
    found = numbers(monkeypatch, tmp_path, options)["accuracy"]
    crop = "whole" if "whole" in options else "resized"
    logits, maps, labels = outputs(small_model(img_size=24), folder, size, crop)
    logits = logits[:, [CLASSES.index(name) for name in names]]
    assert (found["images"], found["acc5"]) == (len(labels), 100)
    top1 = 100 * (logits.argmax(1) == labels).float().mean().item()
    assert found["acc1"] == pytest.approx(top1)
    loss = F.cross_entropy(logits, labels).item()
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    entropies = spatial_entropy(maps, "none").mean(0).tolist()
    assert found["entropy_per_head"] == pytest.approx(entropies, abs=1e-5)
    assert found["entropy"] == pytest.approx(statistics.mean(entropies), abs=1e-5)
    counts = (component_masses(maps) > 0).sum(-1).float().mean(0).tolist()
    assert found["components_per_head"] == pytest.approx(counts)
    output = capsys.readouterr().out
    assert f"top-1 {top1:.2f}%   top-5 100.00%   loss {found['loss']:.4f}" in output
    assert ("restricted to 2 of 5 classes" in output) == (len(names) == 2)


def test_precision_is_that_of_training_on_its_device(tmp_path, monkeypatch) -> None:
    write_folder(tmp_path, CLASSES)
    write_run(tmp_path / "run.pt", amp=True, crop="padded")
    found = numbers(monkeypatch, tmp_path, "")
    assert (found["precision"], found["accuracy"]["crop"]) == ("bfloat16", "whole")
    assert numbers(monkeypatch, tmp_path, "--no-amp")["precision"] == "float32"
    write_run(tmp_path / "run.pt", amp=True, device="cuda")
    assert numbers(monkeypatch, tmp_path, "")["precision"] == "float32"


def test_pretrained_checkpoints(tmp_path, monkeypatch, capsys, error_of) -> None:
    """DeiT's layout with EMA weights, timm's with class names, DINO's without a head."""
    monkeypatch.setitem(vit.MODELS, "vit_tiny", SHAPE)
    write_folder(tmp_path, CLASSES)
    write_voc2012(tmp_path)

    def check(model, folder: Path, options: str, names=(0, 1, 2, 3, 4), **channels):
        options += f" --model vit_tiny --dataset folder --data-dir {folder}"
        found = numbers(monkeypatch, tmp_path, options)
        logits, _, labels = outputs(model, folder, **channels)
        loss = F.cross_entropy(logits[:, names], labels).item()
        assert found["accuracy"]["loss"] == pytest.approx(loss, abs=1e-5)

    model = small_model(img_size=24, patch_size=4, pool="mean")
    ema = behind("module.", model.state_dict())
    other = small_model(img_size=16).state_dict()
    torch.save({"state_dict": other, "state_dict_ema": ema}, tmp_path / "run.pt")
    check(model, tmp_path, "--model-ema")
    assert "classes are matched by their order" in capsys.readouterr().out

    model = small_model(img_size=24)
    state = model.state_dict()  # with DeiT's distillation token and its position
    first, rest = state["pos_embed"].split((1, 9), dim=1)
    state["pos_embed"] = torch.cat((first, torch.ones_like(first), rest), dim=1)
    state["dist_token"] = torch.ones_like(first)
    torch.save(state, tmp_path / "run.pt")
    names = tmp_path / "names.txt"
    lines = (f"n0000000{n} {name}, etc.\n" for n, name in enumerate(CLASSES))
    names.write_text("".join(lines), encoding="utf-8-sig")  # with a BOM
    write_images(tmp_path / "ids", ("n00000003/0.png", "n00000000/0.png"))
    options = f"--mean 0.5 0.4 0.3 --std 0.2 0.3 0.4 --classes {names}"
    channels = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    check(model, tmp_path / "ids", options, [0, 3], **channels)
    names.write_text("ant\nbee\ncat\ndog\nbee\n")
    with pytest.raises(ValueError, match="lists 5 class names, 4 of them distinct"):
        evaluation.read_class_names(str(names), 5)

    state = small_model(img_size=24).state_dict()
    headless = {f"backbone.{k}": v for k, v in state.items() if "head" not in k}
    torch.save({"teacher": headless, "student": {}}, tmp_path / "run.pt")
    options = f"--model vit_tiny --data-dir {tmp_path}"
    voc = f"{options} --segmentation voc2012 --img-size 48"
    found = numbers(monkeypatch, tmp_path, voc)
    assert found["segmentation"]["images_with_objects"] == 1
    assert found["segmentation"]["img_size"] == [48, 48]
    assert "accuracy" not in found
    picture, folder = f"--attention {tmp_path}/a.png", "--dataset folder"
    found = numbers(monkeypatch, tmp_path, f"{options} {folder} {picture}")
    assert "accuracy" not in found
    assert len(found["attention"]["images"]) == 4
    for wrong, message in {
        f"{options} {folder}": "has no head to classify with",
        f"{options} {picture}": "no dataset is known: add --dataset, or --im",
        f"{options} --model-ema": "has no EMA weights",
        "": "does not name its model: add --model (vit_mini, ",
    }.items():
        command = f"eval --device cpu --checkpoint {tmp_path}/run.pt {wrong}"
        assert message in error_of(command)


@pytest.mark.parametrize("protocol", ["dino", "sar", "ipvit"])
@pytest.mark.parametrize(
    "name", ["voc2012", "pets", "shapes", "fashion-mnist", "folder"]
)
def test_segmentation(name, protocol, tmp_path, monkeypatch, capsys) -> None:
    """From files to the printed number; photographs at the protocol's input size."""
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 8, "test": 8})
    for write in (write_voc2012, write_pets, write_fashion_mnist, write_masked_folder):
        write(tmp_path)
    write_run(tmp_path / "run.pt")
    rule = evaluation.PROTOCOLS[protocol]
    monkeypatch.setattr(evaluation, "PROTOCOLS", {protocol: rule | {"size": 64}})
    options = f"--segmentation {name} --protocol {protocol}"
    masks_dir = tmp_path / "masks" if name == "folder" else None
    if masks_dir:
        options += f" --masks {masks_dir}"
    if name in data.DATASETS:  # the picture is of the same images
        options += f" --attention {tmp_path}/a.png --rows 1"
    found = numbers(monkeypatch, tmp_path, options)
    assert ("attention" in found) == (name in data.DATASETS)
    found = found["segmentation"]
    size = 64 if name in ("voc2012", "pets") else 24
    assert found["img_size"] == [size, size]
    masked = data.load_masks(name, tmp_path, (size, size), masks_dir)
    images, masks = map(torch.stack, zip(*masked))
    model = small_model(img_size=24)
    model.resize(size)
    normalize = data.normalizer(data.IMAGENET_MEAN, data.IMAGENET_STD, CPU)
    with torch.inference_mode():
        _, maps = model(normalize(images))
    foregrounds = {
        "mean": maps > maps.mean((-2, -1), keepdim=True),
        "mass": evaluation.mass_mask(maps, rule["mass"]),
    }
    for key, kept in foregrounds.items():
        best, count = slow_segment(kept, masks, rule["void_counts"])
        assert found[f"jaccard_{key}"] == pytest.approx(best, abs=1e-3)
        for head, index in enumerate(found[f"jaccard_{key}_per_head"]):
            alone, _ = slow_segment(kept[:, [head]], masks, rule["void_counts"])
            assert index == pytest.approx(alone, abs=1e-3)
    assert (found["images"], found["images_with_objects"]) == (len(images), count)
    output = capsys.readouterr().out
    void = "count as background" if rule["void_counts"] else "are excluded"
    share = f"{rule['mass']:.0%} of the attention"
    assert f"protocol {protocol}: {share}, void pixels {void}\n" in output
    assert re.search(rf"^{share} +{best:.2f} ", output, re.MULTILINE)


def test_the_newest_checkpoint_is_that_written_last(tmp_path: Path) -> None:
    for written, name in enumerate(["b", "deep/below/c", "a"]):
        path = tmp_path / name / "checkpoint.pt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (0, written))
        assert evaluation.newest_checkpoint(tmp_path) == str(path)


def test_corruption_means() -> None:
    levels = range(1, 6)
    errors = evaluation.ALEXNET_ERRORS
    alexnet = {name: dict.fromkeys(levels, errors[name]) for name in errors}
    mine = {name: dict.fromkeys(levels, 50.0) for name in alexnet}
    mine["fog"] = dict(zip(levels, [10.0, 20.0, 30.0, 40.0, 100.0]))  # 40 in the mean
    mine["saturate"] = dict.fromkeys(levels, 99.0)  # in no mean
    found = evaluation.corruption_means(mine, mce=True)
    assert found["mean_error"] == pytest.approx((14 * 50 + 40) / 15)
    assert found["ce"]["fog"] == pytest.approx(100 * 40 / 81.9324)
    assert found["mce"] == pytest.approx(statistics.mean(found["ce"].values()))
    assert evaluation.corruption_means(alexnet, mce=True)["mce"] == pytest.approx(100)
    extra = {"saturate": {1: 10.0}, "spatter": {1: 30.0}}  # alone they have a mean
    assert evaluation.corruption_means(extra, mce=False)["mean_error"] == 20


def test_corruptions_in_folders(tmp_path, monkeypatch, capsys, error_of) -> None:
    """ImageNet-C's layout: images are not cropped, and classes are matched by name."""
    folder, names = tmp_path / "corrupted", ("fog", "saturate", "snow")
    keys = [(name, level) for name in names for level in range(1, 6)]
    for each in ("dog", "cat", "elk"):
        write_images(folder, (f"{name}/{n}/{each}/0.png" for name, n in keys))
    model = small_model(img_size=24)
    for module in model.modules():  # without these the pixels decide
        if isinstance(module, torch.nn.LayerNorm):
            module.reset_parameters()
    model.head.bias.data.zero_()
    write_run(tmp_path / "run.pt", model)
    errors = {name: {} for name in names}
    for name, level in keys:
        logits, _, labels = outputs(model, folder / name / str(level), crop="whole")
        wrong = logits[:, [2, 3, 4]].argmax(1) != labels
        errors[name][str(level)] = 100 * wrong.float().mean().item()
    command = f"--corruptions {folder} --mce"
    found = numbers(monkeypatch, tmp_path, command)["corruptions"]
    for name in names:
        assert found["errors"][name] == pytest.approx(errors[name], abs=1e-4)
    output = capsys.readouterr().out
    assert "restricted to 3 of 5 classes" in output
    means = evaluation.corruption_means(errors, mce=True)
    mean = f"{means['mean_error']:.2f}\n"
    assert re.search(rf"^mean error \(%\) +{mean}", output, re.MULTILINE)
    assert f"mCE {means['mce']:.2f}%, by the errors of AlexNet, over 2 of 15" in output
    shutil.rmtree(folder / "fog" / "2")
    error = error_of(f"eval --checkpoint {tmp_path}/run.pt --device cpu {command}")
    assert "--mce needs corruptions of ImageNet-C" in error


def test_corruptions_in_arrays(tmp_path, monkeypatch, error_of) -> None:
    """CIFAR-C's layout: severities one after the other."""
    folder = tmp_path / "CIFAR-C"
    folder.mkdir()
    labels = torch.cat([torch.randperm(5) for _ in range(5)])
    pixels = torch.randint(256, (25, 32, 32, 3), dtype=torch.uint8)
    numpy.save(folder / "labels.npy", labels.numpy())
    numpy.save(folder / "fog.npy", pixels.numpy())
    write_run(tmp_path / "run.pt", crop="whole")
    found = numbers(monkeypatch, tmp_path, f"--corruptions {folder}")["corruptions"]
    sets = data.load_corruptions(folder)["fog"]
    assert [*sets] == [1, 2, 3, 4, 5]
    second = sets[2]()
    assert (second.images == pixels[5:10].numpy()).all()
    assert second.targets.equal(labels[5:10])
    errors = found["errors"]["fog"].values()
    assert found["mean_error"] == pytest.approx(statistics.mean(errors))
    command = f"eval --checkpoint {tmp_path}/run.pt --device cpu --corruptions {folder}"
    assert "--mce needs corruptions of ImageNet-C" in error_of(f"{command} --mce")
    numpy.save(folder / "labels.npy", labels.numpy() + 5)
    assert "has 5 classes and" in error_of(command)
    numpy.save(folder / "labels.npy", labels[:5].numpy())  # once for all severities
    assert all(load().targets.equal(labels[:5]) for load in sets.values())
    for wrong in (pixels[:24], pixels.float()):
        numpy.save(folder / "fog.npy", wrong.numpy())
        with pytest.raises(ValueError, match="fog.npy and its labels.npy are not"):
            data.load_corruptions(folder)["fog"][1]()
    with pytest.raises(FileNotFoundError, match="neither"):
        data.load_corruptions(tmp_path)


# ------------------------------------------------------------------------- the picture


def test_a_head_is_drawn_as_it_is(monkeypatch) -> None:
    """Two components of different mass: attention, share and colors, patch by patch."""
    similarity = torch.zeros(6, 6)
    similarity[1:3, 1:3], similarity[4, 4] = 9, 5
    label, texts = evaluation.label, []
    monkeypatch.setattr(
        evaluation, "label", lambda *args: texts.append(args[0]) or label(*args)
    )
    side = evaluation.TILE
    tile = Image.new("RGB", (side, side), (90, 60, 30))
    pixels = evaluation.draw_head(tile, similarity, 0.6).load()

    def patch(row: int, x: int, y: int) -> tuple[int, ...]:
        step = side + evaluation.GAP
        return pixels[(x + 0.5) * side // 6, row * step + (y + 0.5) * side // 6]

    assert patch(0, 2, 1) == (253, 231, 37)
    assert patch(0, 0, 5) == (68, 1, 84)
    assert patch(1, 2, 1) == (90, 60, 30)
    faded = patch(1, 0, 5)
    assert patch(1, 4, 4) == faded == patch(2, 0, 5) != (90, 60, 30)
    for n, color in ((1, (230, 159, 0)), (4, (86, 180, 233))):
        tinted = [0.75 * c + 0.25 * b for c, b in zip(color, faded)]
        assert patch(2, n, n) == pytest.approx(tinted, abs=2)
    entropy = spatial_entropy(similarity).item()
    assert texts == [f"H {entropy:.2f} nats", "2 components"]


def test_the_picture(tmp_path, monkeypatch) -> None:
    """Any image, two models, long and foreign names: nothing is lost or cut off."""
    folder, drawn, texts = tmp_path / "photos", {}, []
    sizes = {"a": (90, 90), "b" * 150: (40, 120), "катя": (400, 50), "d": (30, 20)}
    folder.mkdir()
    for n, (name, size) in enumerate(sizes.items()):
        Image.new("RGB", size, (n, 99, 99)).save(folder / f"{name}.png")
    write_run(tmp_path / "run.pt", dataset="shapes")
    other = small_model(img_size=32, seed=1)
    write_run(tmp_path / "other.pt", other, dataset="shapes")
    label, draw_head = evaluation.label, evaluation.draw_head

    def remember(text: str, width: int, *others) -> Image.Image:
        box = label(text, width, *others)
        left, top, right, bottom = ImageOps.invert(box).getbbox() or (1, 1, 1, 1)
        assert 0 < left <= right < width
        assert 0 < top <= bottom < box.height
        texts.append(text)
        return box

    def remember_head(tile, similarity, mass) -> Image.Image:
        drawn.setdefault(tile.getpixel((0, 0))[0], []).append(similarity)
        return draw_head(tile, similarity, mass)

    monkeypatch.setattr(evaluation, "label", remember)
    monkeypatch.setattr(evaluation, "draw_head", remember_head)
    file = tmp_path / "a.png"
    options = f"--attention {file} --images {folder} --compare {tmp_path}/other.pt"
    found = numbers(monkeypatch, tmp_path, options)
    assert "accuracy" not in found
    names = [f"photos/{name}.png" for name in sorted(sizes)]
    assert found["attention"]["images"] == names
    assert {f"{tmp_path}/run.pt", f"{tmp_path}/other.pt"} <= {*texts}
    assert all(name in "".join(texts) for name in sizes)
    source = data.DATASETS["shapes"]
    normalize = data.normalizer(source.mean, source.std, CPU)
    for n, size in {0: (24, 24), 2: (24, 192), 3: (24, 32)}.items():
        image = data.AS_TENSOR(Image.open(folder / f"{[*sizes][n]}.png"))
        model = small_model(img_size=24)
        model.resize(size)
        pixels = v2.functional.resize(image, size, data.BICUBIC)
        with torch.inference_mode():
            _, maps = model(normalize(pixels[None]))
        torch.testing.assert_close(torch.stack(drawn[n][:2]), maps[0])
        assert len(drawn[n]) == 4
    two = numbers(monkeypatch, tmp_path, f"{options} --rows 2")["attention"]["images"]
    assert two == names[::2]  # from the whole folder


def test_the_end_of_an_evaluation(tmp_path, monkeypatch, capsys, error_of) -> None:
    """JSON has null for NaN, and is also written after an error; Ctrl-C."""
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 8, "test": 8})
    write_folder(tmp_path, CLASSES)
    model = small_model(img_size=24)
    model.patch_embed.proj.weight.data[:] = math.nan
    write_run(tmp_path / "run.pt", model)
    found = numbers(monkeypatch, tmp_path, "--dataset folder --segmentation shapes")
    assert found["accuracy"]["loss"] is found["accuracy"]["entropy"] is None
    assert found["segmentation"]["jaccard_mass"] is None
    assert found["segmentation"]["jaccard_mean"] is None
    command = f"eval --checkpoint {tmp_path}/run.pt --device cpu --dataset folder"
    (tmp_path / "val" / "cat" / "0.png").write_text("no image")
    json_file = tmp_path / "part.json"
    error = error_of(f"{command} --workers 1 --json {json_file}")
    assert f"error: {tmp_path}/val/cat/0.png cannot be read" in error
    assert json.loads(json_file.read_text())["precision"] == "float32"

    def interrupt(*_) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "predict", interrupt)
    assert run(monkeypatch, command) == 130
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------ attention and objects


@pytest.mark.parametrize(
    "masses, share, kept",
    [
        ([0.5, 0.3, 0.1, 0.1], 0.6, [1, 1, 0, 0]),  # 0.5 is too little, 0.8 enough
        ([0.31, 0.25, 0.15, 0.29], 0.6, [1, 0, 0, 1]),  # exactly enough
        ([0.1, 0.5, 0.2, 0.2], 0.6, [0, 1, 1, 1]),  # equal patches stay together
        ([0.25, 0.25, 0.25, 0.25], 0.6, [1, 1, 1, 1]),
        ([0.4, 0.3, 0.2, 0.1], 0.9, [1, 1, 1, 0]),
        ([0.4, 0.3, 0.2, 0.1], 1.0, [1, 1, 1, 1]),
    ],
)
def test_mass_mask(masses, share, kept) -> None:
    similarity = torch.tensor(masses).log().view(1, 1, 2, 2) + 7  # softmax undoes both
    found = evaluation.mass_mask(similarity, share)
    assert found.flatten().tolist() == [bool(each) for each in kept]


def slow_segment(patches, masks, void_counts) -> tuple[float, int]:
    """The protocol pixel by pixel, image by image."""
    of_images = []
    for patch_mask, mask in zip(patches, masks):
        scale = mask.shape[0] // patch_mask.shape[-2]
        kept = patch_mask.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        counted = torch.ones_like(mask) if void_counts else mask != data.VOID
        of_objects = []
        for number in set(mask.unique().tolist()) - {0, data.VOID}:
            of_heads = []
            for head in kept:
                both = head & (mask == number)
                either = (head & (counted > 0)) | (mask == number)
                of_heads.append(both.sum().item() / either.sum().item())
            of_objects.append(max(of_heads))
        if of_objects:
            of_images.append(sum(of_objects) / len(of_objects))
    return 100 * sum(of_images) / len(of_images), len(of_images)


BAD_INPUT = {
    "train --dataset cifar1000": "invalid choice: 'cifar1000'",
    "train --batch-size 81": "--batch-size 81 exceeds the 80 training images",
    "train --dataset folder --data-dir nowhere": "there is no nowhere/train",
    "train --img-size 50": "patch size 8 does not divide the image size 50x50",
    "train --epochs 0": "--epochs must be at least 1, not 0",
    "train --pos-std 2": "--pos-std must be at least 1e-06 and at most 1, not 2.0",
    "train --lr nan": "--lr must be at least 0, not nan",
    "train --output-dir used": "used contains a run: --resume it, or set --output-dir",
    "train --resume used": "'used' holds no run to resume",
    "train --dataset cifar100 --finetune none.pt": "no checkpoint at none.pt",
    "train --finetune used/checkpoint.pt": "used/checkpoint.pt is damaged or not",
    "train --finetune evil.pt": "evil.pt contains posix.getcwd, which is not loaded",
    "train --finetune other.pt": "other.pt holds no Vision Transformer",
    "train --dataset fashion-mnist": "fashion-mnist: not in data, and the download",
    "train --dataset domainnet-real": "there is no data/real_train.txt; get it from https://ai",
    "train --train-size 100": "--train-size 100 exceeds the 80 training images",
    "eval": "no checkpoint.pt under runs",
    "eval --checkpoint other.pt": "other.pt holds no Vision Transformer",
    "eval --rows 0": "--rows must be at least 1",
    "eval --device cuda:9": "device cuda:9 is not available; use ",
    "eval --attention picture.jpg": "picture.jpg is not a .png file",
    "eval --std 58 57 57": "--mean and --std must be on the scale of 0 to 1",
    "eval --attention none/picture.png": "none/picture.png",
    "eval --images used": "--images needs --attention",
    "eval --segmentation folder": "--segmentation folder needs --masks DIR",
    "eval --segmentation shapes --masks used": "--segmentation folder needs --masks DIR",
}


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input(command: str, tmp_path, monkeypatch, error_of) -> None:
    """One sentence on standard error, exit code 2, and nothing written."""
    used = tmp_path / "used" / "checkpoint.pt"
    used.parent.mkdir()
    used.write_bytes(b"a run")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"run": os.getcwd}, 2))
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 80, "test": 40})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    assert BAD_INPUT[command] in error_of(command)
    assert not (tmp_path / "runs").exists()
    assert used.read_bytes() == b"a run"
