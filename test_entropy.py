# SPDX-License-Identifier: MIT
"""Tests: python -m pytest

The first part is the specification of entropy.py. It needs that file and PyTorch alone,
so the two can be copied together; the other tests are then skipped.
"""

import argparse
import gzip
import hashlib
import importlib
import json
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterable, Sequence
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
FILES = [HERE / "eval.py", HERE / "train.py"]  # where the pair was not copied alone
PROJECT = all(f.is_file() and "from entropy import" in f.read_text() for f in FILES)
if PROJECT:
    import numpy
    import torchvision
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


def mask_of(text: str) -> torch.Tensor:
    return torch.tensor([[cell == "#" for cell in row] for row in text.split()])


def serpentine(height: int, width: int) -> torch.Tensor:
    """Full rows, joined at alternating ends."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[::2] = True
    mask[1::4, -1] = True
    mask[3::4, 0] = True
    return mask


def zigzag(height: int, width: int) -> torch.Tensor:
    """A diagonal that bounces between the sides, held together by corners alone."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    bounce = [*range(width), *range(width - 2, 0, -1)]
    for y in range(height):
        mask[y, bounce[y % len(bounce)]] = True
    return mask


MASKS = {  # name -> mask and number of components
    "empty": (torch.zeros(5, 7, dtype=torch.bool), 0),
    "full": (torch.ones(5, 7, dtype=torch.bool), 1),
    "one pixel": (torch.ones(1, 1, dtype=torch.bool), 1),
    "row": (mask_of("##.#.###"), 3),
    "column": (mask_of("##.#.###").T, 3),
    "checkerboard": (mask_of("#.#. .#.# #.#."), 1),
    "diagonal touch": (mask_of("##.. ##.. ..## ..##"), 1),
    "knight's move": (mask_of("#... ..#. #... ..#."), 4),
    "ring and center": (mask_of("##### #...# #.#.# #...# #####"), 2),
    "ends of rows": (mask_of("...# .... #... ...# .... #..."), 4),
    "not square": (mask_of("#..#..#..# #..####..# ##.......#"), 3),
}
for height, width in ((14, 14), (30, 30), (57, 41)):
    for shape in (serpentine, zigzag):
        mask, name = shape(height, width), f"{shape.__name__} {height}x{width}"
        MASKS |= {name: (mask, 1), f"{name}, turned": (mask.T.flip(0), 1)}


def every_mask(height: int, width: int) -> torch.Tensor:
    """All masks of a grid: (2 ** (height * width), height, width)."""
    pixels = torch.arange(height * width)
    masks = torch.arange(2 ** len(pixels))[:, None] >> pixels & 1
    return masks.bool().view(-1, height, width)


def random_masks(*shape: int, density: float = 0.5) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density


def assert_exact(mask: torch.Tensor) -> None:
    """Check that the labels partition the mask as the slow twin does, by last pixels."""
    labels = connected_components(mask)
    assert labels.dtype == torch.int64
    labels = labels.flatten(-2)
    pixel = torch.arange(1, labels.shape[-1] + 1).expand_as(labels)
    last = labels.new_zeros(*labels.shape[:-1], labels.shape[-1] + 1)
    last = last.scatter_reduce(-1, labels, pixel, "amax").gather(-1, labels)
    last = last.where(labels > 0, 0).view(mask.shape)
    assert last.equal(slow_connected_components(mask))


@pytest.mark.parametrize("name", MASKS)
def test_named_masks(name: str) -> None:
    mask, count = MASKS[name]
    assert_exact(mask)
    labels = connected_components(mask)
    assert len(labels[mask].unique()) == count
    # A label is 1 + the raster index of the last 2x2 block of its component.
    blocks = F.max_pool2d(labels[None].double(), 2, ceil_mode=True)[0].long()
    own = torch.arange(1, blocks.numel() + 1).view(blocks.shape)
    assert labels[mask].unique().equal(blocks[blocks == own])
    assert (blocks >= own)[blocks > 0].all()


@pytest.mark.parametrize("height, width", [(4, 4), (3, 5), (1, 12)])
def test_every_mask_of_a_small_grid(height: int, width: int) -> None:
    assert_exact(every_mask(height, width))


@pytest.mark.parametrize("height, width", [(14, 14), (31, 30), (7, 3), (1, 50)])
def test_random_masks(height: int, width: int) -> None:
    # 0.41 is about where random 8-connected clusters first span the grid.
    for density in (0.2, 0.41, 0.6):
        masks = random_masks(3, 40, height, width, density=density)
        assert_exact(masks)
        turned = masks.permute(1, 0, 3, 2)  # not contiguous
        assert_exact(turned)


def test_large_masks() -> None:
    """More blocks than 16 bits hold, in one component and in many."""
    mask = serpentine(300, 500)
    assert connected_components(mask)[mask].unique().tolist() == [150 * 250]
    dots = torch.arange(70_000)[None] % 2 == 0
    assert connected_components(dots)[dots].equal(torch.arange(1, 35_001))


def test_the_bound_suffices() -> None:
    """Without an early exit, as on a GPU, the labels are the same."""
    batches = [mask[None] for mask, _ in MASKS.values()]
    for masks in (*batches, every_mask(4, 4), random_masks(200, 30, 30, density=0.41)):
        early = _label(masks, stop_early=True)
        assert _label(masks, stop_early=False).equal(early)


def test_the_number_of_rounds() -> None:
    """As the argument in `_label` has it, and fewer where it may stop early."""
    full = torch.ones(1, 14, 14, dtype=torch.bool)
    for masks, stop_early, rounds, squarings in (
        (full.to("meta"), False, 5, 6 + 5 + 4 + 3 + 2),
        (full[:, :1, :2].to("meta"), False, 0, 0),
        (full, True, 1, 3),  # the last of these changes nothing
    ):
        with torch.profiler.profile() as profile:
            _label(masks, stop_early=stop_early)
        names = [event.name for event in profile.events()]
        assert names.count("aten::scatter_reduce_") == rounds
        assert names.count("aten::gather") == rounds + squarings


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 3), (2, 3, 0)])
def test_no_pixels(shape: tuple[int, ...]) -> None:
    assert connected_components(torch.zeros(shape, dtype=torch.bool)).shape == shape


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
        torch.testing.assert_close(
            spatial_entropy(similarity), torch.tensor(math.log(blobs))
        )
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
    for mask, count in MASKS.values():  # a full mask would be a constant map
        if not mask.all():
            masses = component_masses(mask.float().expand(2, 3, -1, -1))
            assert (masses > 0).sum(-1).tolist() == [[count] * 3] * 2


def test_the_threshold_is_the_mean_and_strict() -> None:
    similarity = torch.tensor([[3.0, 1.0, 1.0, 1.0, -1.0]])  # mean 1
    assert threshold_at_mean(similarity).tolist() == [[2.0, 0.0, 0.0, 0.0, 0.0]]


def test_gradient() -> None:
    similarity = random_maps(2, 2, 4, 5, dtype=torch.float64)
    distance = similarity - similarity.mean((-2, -1), keepdim=True)
    assert distance.abs().min() > 1e-3  # gradcheck's steps do not cross the threshold
    similarity.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: spatial_entropy(s, "none"), similarity)
    assert torch.autograd.gradcheck(component_masses, similarity)


def test_invariances() -> None:
    similarity = random_maps(3, 4, 6, 9, dtype=torch.float64)
    entropy = spatial_entropy(similarity, "none")
    turned = similarity.flip(-1), similarity.flip(-2), similarity.transpose(-2, -1)
    for same in (similarity + 7, similarity * 3, *turned):
        torch.testing.assert_close(spatial_entropy(same, "none"), entropy)
    order = [2, 0, 1]
    assert spatial_entropy(similarity[order], "none").equal(entropy[order])


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
    # Sums that overflow float32 give NaN: of S, and of A.
    assert spatial_entropy(torch.tensor([[0, 2e38, 0, 2e38, 2e38]])).isnan()
    assert spatial_entropy(torch.tensor([[0, 2e38, -2e38, 2e38, -2e38]])).isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_scores_give_nan(value: float) -> None:
    for pixel in ((0, 0), (2, 3)):
        similarity = random_maps(2, 5, 5)
        similarity[0][pixel] = value
        entropy = spatial_entropy(similarity, "none")
        assert entropy.isnan().tolist() == [True, False]
        assert spatial_entropy(similarity).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    similarity = random_maps(2, 3, 7, 7).to(dtype)
    expected = spatial_entropy(similarity.float())
    with torch.autocast("cpu", torch.bfloat16):
        entropy = spatial_entropy(similarity)
    assert entropy.dtype == torch.float32
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
    """The loss; and the rounds of a GPU, which the CPU has behind one operator."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    loss = compile_whole(spatial_entropy, backend=counter, dynamic=dynamic)
    for shape in ((2, 3, 6, 8), (4, 5, 6, 8), (3, 2, 14, 13)):
        assert_same_loss(loss, random_maps(*shape))
    assert counter.frame_count == (1 if dynamic else 3)  # not one for each size
    label = compile_whole(_label, backend="aot_eager", dynamic=dynamic)
    masks = random_masks(9, 5, 6)
    assert label(masks, stop_early=False).equal(_label(masks, stop_early=True))
    operator = torch.ops.spatial_entropy.connected_components.default
    torch.library.opcheck(operator, (masks,))


def test_nothing_asks_for_data_elsewhere() -> None:
    """No step reads data: meta tensors have none."""
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
        got = value_and_gradient(loss, similarity)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = value_and_gradient(spatial_entropy, similarity.cpu())
    for tensor, expected in zip(got, want):
        torch.testing.assert_close(tensor.cpu(), expected, rtol=1e-5, atol=1e-6)


@needs_cuda
def test_cuda_labels_every_named_mask() -> None:
    batch = random_masks(3, 40, 31, 30, density=0.41)
    for mask in (batch, *(mask for mask, _ in MASKS.values())):
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

needs_project = pytest.mark.skipif(not PROJECT, reason="entropy.py was copied alone")


def small_model(seed: int = 0, **options):
    """3x5 patches, 2 heads, 3 blocks; weights so large that each affects the output."""
    sizes = {"img_size": (24, 40), "patch_size": 8, "num_classes": 5}
    sizes |= {"embed_dim": 32, "depth": 3, "num_heads": 2}
    torch.manual_seed(seed)
    model = vit.VisionTransformer(**(sizes | options)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def last_block(model, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tokens that enter the last block, (B, N, D), and q, k, v, each (B, h, N, d)."""
    seen, block = [], model.blocks[-1]
    hook = block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    hook.remove()
    qkv = block.attn.qkv(block.norm1(seen[0])).unflatten(-1, (3, 2, 16))
    return seen[0], *qkv.permute(2, 0, 3, 1, 4)


@needs_project
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("last_skip", [True, False])
def test_last_block_equals_the_full_block(last_skip: bool, pool: str) -> None:
    """Written out for all tokens: logits, similarity, and every parameter is trained."""
    model = small_model(last_skip=last_skip, pool=pool, in_chans=1).double()
    images = torch.randn(2, 1, 24, 40, dtype=torch.float64)
    tokens, q, k, v = last_block(model, images)
    block = model.blocks[-1]
    scores = q @ k.transpose(-2, -1) / 4  # sqrt(d) = 4
    attended = block.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attended, block.attn(block.norm1(tokens)))  # fused
    attended = attended + tokens if last_skip else attended
    full = model.norm(attended + block.mlp(block.norm2(attended)))
    pooled = full[:, 0] if pool == "cls" else full.mean(1)
    rows = scores[:, :, 0, 1:] if pool == "cls" else scores.mean(2)
    logits, similarity = model(images)
    torch.testing.assert_close(logits, model.head(pooled))
    torch.testing.assert_close(similarity, rows.view(2, 2, 3, 5))
    (logits.sum() + spatial_entropy(similarity)).backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


@needs_project
def test_drop_path_drops_whole_images() -> None:
    """At a rate that rises with depth; a branch without a skip is never dropped."""
    model = small_model(drop_path=0.5).train()
    assert [block.drop_path for block in model.blocks] == [0, 0.25, 0.5]
    dropped = model.blocks[-1].drop(torch.ones(100, 3, 4))
    rows = dropped[:, 0, 0]
    assert dropped.equal(rows[:, None, None].expand(-1, 3, 4))
    assert set(rows.tolist()) == {0.0, 2.0}
    x = torch.randn(2, 16, 32)
    for last_skip in (True, False):
        *blocks, last = small_model(last_skip=last_skip).train().blocks
        for block in (*blocks, last):
            block.drop_path = 0.999999
        assert all(block(x).equal(x) for block in blocks)
        attended, _ = last.attend(last.norm1(x))
        assert last(x)[0].equal(x[:, :1] if last_skip else attended)


@needs_project
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


@needs_project
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


@needs_project
def test_same_names_and_logits_as_timm() -> None:
    timm = pytest.importorskip("timm")
    peer = timm.create_model("vit_small_patch16_224").eval()
    model = vit.VisionTransformer(**vit.MODELS["vit_small"]).eval()
    model.load_state_dict(peer.state_dict(), strict=True)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[0], peer(images), rtol=0, atol=1e-5)


@needs_project
def test_parameter_names() -> None:
    """Those of timm, DeiT and DINO; without the last skip no second LayerNorm."""
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    layers = [f"blocks.{i}.{layer}" for i in range(12) for layer in block]
    layers += ["patch_embed.proj", "norm", "head"]
    names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    with torch.device("meta"):
        model = vit.VisionTransformer(**vit.MODELS["vit_small"])
        sar = vit.VisionTransformer(**vit.MODELS["vit_small"], last_skip=False)
    assert model.state_dict().keys() == names | {"cls_token", "pos_embed"}
    lost = {"blocks.11.norm2.weight", "blocks.11.norm2.bias"}
    assert model.state_dict().keys() - sar.state_dict().keys() == lost


@needs_project
def test_model_refuses_bad_sizes() -> None:
    for options, message in (
        ({"img_size": (24, 41)}, "patch size 8 does not divide the image size 24x41"),
        ({"img_size": 0}, "patch size 8 does not divide the image size 0x0"),
        ({"num_heads": 3}, "num_heads 3 does not divide embed_dim 32"),
        ({"pool": "max"}, "'max'"),
    ):
        with pytest.raises(ValueError, match=message):
            small_model(**options)


@needs_project
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


@needs_project
def test_weights_are_found(tmp_path: Path) -> None:
    """At any depth and prefix; others are preferred to a student's and EMA weights."""
    right, file = small_model().state_dict(), tmp_path / "file.pt"
    wrong, other = small_model(seed=2).state_dict(), {"other": torch.ones(5), 5: 6}
    for checkpoint in (
        right,
        {"model": right, "model_ema": wrong, "epoch": 3},
        {"state_dict_ema": wrong, "state_dict": behind("model.", right) | other},
        {"model_state_dict": right, "optimizer": {"state": {0: {"step": 1}}}},
        {"net": {"module": right}, "args": argparse.Namespace(lr=1)},
        {"ema": {"module": wrong}, "schema": right | {"epoch": 3}},
        behind("module._orig_mod.", right),
        behind("student.", wrong) | behind("teacher.", right),
        {
            "student": behind("module.backbone.", wrong) | other,
            "teacher": behind("backbone.", right) | other,
        },
    ):
        torch.save(checkpoint, file)
        model = small_model(seed=1)
        report = vit.load_weights(model, file)
        assert report == f"loaded 44 of 44 tensors from {file}"
        assert all(t.equal(right[name]) for name, t in model.state_dict().items())
    checkpoint = {"model": wrong, "model_ema": right}
    found = vit.find_weights(checkpoint, "it", ema=True)
    assert found["pos_embed"].equal(right["pos_embed"])
    with pytest.raises(ValueError, match="it has no EMA weights"):
        vit.find_weights({"model": right}, "it", ema=True)


@needs_project
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
    wide = small_model(img_size=(16, 64))  # 2x8 patches are as many as 4x4
    assert "resized" not in vit.load_weights(
        small_model(img_size=(16, 64)), wide.state_dict()
    )
    # DeiT's distillation token has a position of its own, after that of the CLS token.
    first, patches = state["pos_embed"].split((1, 15), dim=1)
    distilled = torch.cat((first, torch.ones(1, 1, 32), patches), dim=1)
    state |= {"pos_embed": distilled, "dist_token": torch.ones(1, 1, 32)}
    model = small_model(seed=1)
    assert "not used: dist_token" in vit.load_weights(model, state)
    assert model.pos_embed.equal(torch.cat((first, patches), dim=1))


@needs_project
def test_load_weights_refuses_what_does_not_fit() -> None:
    for state, message in (
        ({"conv1.weight": torch.zeros(3)}, "holds no Vision Transformer"),
        ({"patch_embed.proj.weight": torch.zeros(3)}, "holds no Vision Transformer"),
        (small_model(pool="mean").state_dict(), "it has no cls_token"),
        (
            small_model(embed_dim=64).state_dict(),
            r"cls_token is \(1, 1, 64\), not \(1, 1, 32\)",
        ),
        (
            small_model(img_size=(8, 40)).state_dict(),
            r"pos_embed is \(1, 6, 32\), not \(1, 16, 32\)",
        ),
        (small_model(depth=4).state_dict(), "has no blocks.3.norm1.weight"),
        (small_model(depth=2).state_dict(), "it has no blocks.2.norm1.weight"),
        (small_model(last_skip=False).state_dict(), "it has no blocks.2.norm2.weight"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            vit.load_weights(small_model(), state)
        assert "\n" not in str(refused.value)


@needs_project
def test_read_checkpoint(tmp_path: Path) -> None:
    """Read NumPy scalars and Namespace; name anything else in one sentence."""
    file = tmp_path / "file.pt"
    weights = {"model": torch.zeros(1000)}
    plain = {"acc": numpy.float64(1.5), "args": argparse.Namespace(lr=1)}
    plain |= {"epoch": numpy.int64(3), "best": numpy.bool_(True)}
    torch.save(weights | plain, file)
    assert vit.read_checkpoint(file)["acc"] == 1.5
    whole = file.read_bytes()
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*none.pt"):
        vit.read_checkpoint(tmp_path / "none.pt")
    for content, message in (
        (b"", "is damaged or not a checkpoint"),
        (b"text", "is damaged or not a checkpoint"),
        (whole[: len(whole) // 2], "is damaged or not a checkpoint"),
        (b"\n<!DOCTYPE html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (pickle.dumps({"run": os.getcwd}, 2), r"contains posix.getcwd"),
        (weights | {"path": tmp_path}, "contains pathlib.*PosixPath"),
        (weights | {"best": numpy.ones(1)}, "contains numpy.*_reconstruct"),
        ([1, 2], "holds a list, not a checkpoint"),
    ):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        with pytest.raises(ValueError, match=message) as refused:
            vit.read_checkpoint(file)
        assert "\n" not in str(refused.value)


@needs_project
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


# ------------------------------------------------------------------------ the study


@needs_project
def test_study(capsys, monkeypatch, tmp_path: Path) -> None:
    """Its commands are understood; the README has one of them, and their results."""
    study = runpy.run_path(str(HERE / ".study" / "study.py"))
    study["commands"]()
    commands = capsys.readouterr().out
    for line in commands.splitlines():
        parts = re.split(r"\{ python | \$\(.*\) && python |; \}", line)
        settings = train.parse_arguments(parts[1].split()[1:])[1]
        asked = evaluation.make_parser().parse_args(parts[2].split()[1:])
        assert str(asked.checkpoint) == f"{settings.output_dir}/checkpoint.pt"
        assert asked.json.startswith(settings.output_dir)
        assert settings.device == asked.device == ("cuda" if settings.amp else "cpu")
        assert settings.output_dir.endswith(f"-{settings.seed}")
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    unwrapped = readme.replace(" \\\n   ", "")
    shown = re.findall("^python train.py .*runs/study.*", unwrapped, re.MULTILINE)
    assert len(shown) == 1
    assert shown[0] in commands
    written = " ".join(readme.split())
    for setting, (dataset, options) in study["SETTINGS"].items():
        assert f"{setting} --dataset {dataset} {options} " in written

    same = {"setting": "fashion-1000", "minutes": 1, "entropy": 0.1, "components": 1}
    same |= {"mass": 30, "foreground": 50}
    given = {  # means 80.125 and 81.205; differences 1, 1.09, 1.15, 1.08, 1.08
        "plain": (80.0, 80.125, 80.25, 80.125, 80.125),
        "sar-0.01": (81.0, 81.215, 81.4, 81.205, 81.205),
        "surgery": (81.0, 81.0, 81.0, 81.0),
        "sar-0.3": (80.0, 80.125, 80.25, 80.125, 80.125),
    }
    runs = [
        json.dumps(same | {"arm": arm, "seed": seed, "acc1": value})
        for arm, values in given.items()
        for seed, value in enumerate(values)
    ]
    (tmp_path / "runs.jsonl").write_text("\n".join(runs))
    study["table"](tmp_path / "runs.jsonl", "plain")
    printed = capsys.readouterr()
    rows = [line.split(" | ") for line in printed.out.splitlines()]
    assert [row[2] for row in rows[2:]] == [
        "80.12 ± 0.09",
        "81.20 ± 0.15<br>+1.08 ± 0.07",
        "80.12 ± 0.09<br>+0.00 ± 0.00",
    ]
    assert printed.err == (
        "left out, with fewer than 5 seeds: fashion-1000/surgery 4\n"
    )
    odd = json.dumps(same | {"arm": "sar-0.1", "seed": 7, "acc1": 1.0})
    (tmp_path / "odd.jsonl").write_text("\n".join([*runs, odd]))
    study["table"](tmp_path / "odd.jsonl", "plain")
    assert "fashion-1000/sar-0.1 0\n" in capsys.readouterr().err
    study["differences"](tmp_path / "runs.jsonl")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert rows[0][1:] == ["`plain`", "`sar-0.3` - `plain` |"]
    assert rows[2] == ["| `fashion-1000`", "80.12 ± 0.09", "+0.00 ± 0.00 |"]
    study["table"](tmp_path / "runs.jsonl", "surgery")
    assert "<br>" not in capsys.readouterr().out

    study["table"](HERE / ".study" / "results.jsonl", "plain")
    assert f"\n\n{capsys.readouterr().out}\n" in readme
    for file in ("results.jsonl", "others.jsonl"):
        study["differences"](HERE / ".study" / file)
        assert f"\n\n{capsys.readouterr().out}" in readme

    with pytest.raises(ValueError, match="not a file that collect made"):
        study["table"](HERE / "README.md", "plain")
    with pytest.raises(FileNotFoundError, match="no file .*none.jsonl"):
        study["table"](tmp_path / "none.jsonl", "plain")
    with pytest.raises(FileNotFoundError, match="no SETTING/ARM-SEED/eval.json"):
        study["collect"](tmp_path)
    record = {"setting": "fashion-1000", "arm": "plain", "seed": 1}
    (tmp_path / "unmeasured.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="no acc1"):
        study["differences"](tmp_path / "unmeasured.jsonl")
    (tmp_path / "mixed.jsonl").write_text(f"{runs[0]}\n{json.dumps(record)}")
    with pytest.raises(ValueError, match="its lines have different names"):
        study["table"](tmp_path / "mixed.jsonl", "plain")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="is empty"):
        study["table"](tmp_path / "empty.jsonl", "plain")
    with pytest.raises(ValueError, match="made: no 'setting'"):
        study["table"](HERE / ".study" / "tuning.jsonl", "plain")
    with pytest.raises(FileNotFoundError, match="no .*checkpoint.pt"):
        study["others"]([tmp_path / "checkpoint.pt"])
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(ValueError, match="not named SETTING/ARM-SEED"):
        study["others"]([tmp_path / "checkpoint.pt"])
    (tmp_path / "plain-1").mkdir()
    (tmp_path / "plain-1" / "checkpoint.pt").touch()
    with pytest.raises(FileNotFoundError, match="no .*plain-1/eval.json"):
        study["others"]([tmp_path / "plain-1" / "checkpoint.pt"])

    capsys.readouterr()
    asked = ["study.py", "table", str(tmp_path / "empty.jsonl")]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit, match="^2$"):
        study["main"]()
    assert capsys.readouterr() == ("", f"study.py: error: {asked[2]} is empty\n")


@needs_project
def test_figures_of_the_study() -> None:
    """Every figure with an interval or deviation in the README is measured."""
    study = runpy.run_path(str(HERE / ".study" / "study.py"))
    decimals_of = {measure: of[1] for measure, of in study["MEASURES"].items()}
    decimals_of |= {"mass_head": 1, "foreground_head": 1}  # of a run's best head
    found = {}  # (setting, arm) -> measure -> the values of the five seeds
    for file in ("results.jsonl", "others.jsonl", "first.jsonl"):
        for line in (HERE / ".study" / file).read_text().splitlines():
            run = json.loads(line)
            arm = run["arm"]
            if file == "first.jsonl":
                arm = "after one epoch"
                for rule in ("mass", "foreground"):
                    run[rule] = run[f"{rule}_own"] + run[f"{rule}_other"]
            for rule in ("mass", "foreground"):
                if heads := run.get(f"{rule}_per_head"):
                    run[f"{rule}_head"] = max(heads)
            of_arm = found.setdefault((run["setting"], arm), {})
            for measure in decimals_of.keys() & run.keys():
                of_arm.setdefault(measure, {})[run["seed"]] = run[measure]
    for arm, of_arm in found.items():
        found[arm] = {
            measure: values
            for measure, values in of_arm.items()
            if values.keys() == set(study["SEEDS"])
        }

    def less(first: dict, second: dict) -> dict:
        return {seed: first[seed] - second[seed] for seed in study["SEEDS"]}

    def images(setting: str) -> list[str]:
        """Data set and number; seeds choose the same ones in other such settings."""
        return setting.split("-")[:2]

    figures, settings = set(), {setting for setting, _ in found}
    for (setting, arm), of_arm in found.items():
        for measure, values in of_arm.items():
            decimals = decimals_of[measure]
            figures.add(study["spread"]([*values.values()], decimals))
            for elsewhere in settings:
                there = found.get((elsewhere, arm), {}).get(measure)
                if there and images(elsewhere) == images(setting):
                    change = less(there, values).values()
                    figures.add(study["interval"]([*change], decimals))
            for (where, other), of_other in found.items():
                if where != setting or measure not in of_other:
                    continue
                gain = less(values, of_other[measure])
                figures.add(study["interval"]([*gain.values()], decimals))
                for elsewhere in settings:
                    two = [found.get((elsewhere, each), {}) for each in (arm, other)]
                    known = all(measure in each for each in two)
                    if known and images(elsewhere) == images(setting):
                        gain_there = less(*(each[measure] for each in two))
                        change = less(gain_there, gain).values()
                        figures.add(study["interval"]([*change], decimals))
    figures = {figure.lstrip("+-") for figure in figures}
    lines = (HERE / "README.md").read_text(encoding="utf-8").splitlines()
    for in_table in (True, False):
        text = " ".join(line for line in lines if line.startswith("|") == in_table)
        said = re.findall(r"\d+\.\d+ ± \d+\.\d+", " ".join(text.split()))
        assert len(said) > 30
        assert set(said) <= figures


@needs_project
def test_study_collects_its_own_runs(capsys, tmp_path: Path) -> None:
    """Only complete ones, made with the settings that the study says."""
    study = runpy.run_path(str(HERE / ".study" / "study.py"))
    options = study["train_options"]("shapes-1000", "sar-0.3", 4).split()
    args = train.parse_arguments(options)[1]
    train.resolve(args)
    versions = dict.fromkeys(("torch", "torchvision", "python", "hardware"), "any")
    header = train.settings(args) | versions
    epoch = {"seconds": 6, "train_loss": 1, "test_loss": 1}
    epoch |= dict.fromkeys(("test_acc1", "test_entropy", "test_components"), 90)
    epoch |= {f"test_{key}_per_head": [90] for key in ("entropy", "components")}
    epochs = [epoch | {"epoch": n, "train_entropy": n} for n in range(1, 101)]
    of_two_rules = ("jaccard_mass", "jaccard_mean")
    measured = {key + end: 30 for key in of_two_rules for end in ("", "_per_head")}

    def collect(header: dict, epochs: list, measured: dict) -> dict:
        folder = tmp_path / "shapes-1000" / "sar-0.3-4"
        folder.mkdir(parents=True, exist_ok=True)
        lines = "\n".join(map(json.dumps, [header, *epochs]))
        (folder / "log.jsonl").write_text(lines)
        (folder / "eval.json").write_text(json.dumps(measured))
        study["collect"](tmp_path)
        return json.loads(capsys.readouterr().out)

    found = collect(header | {"data_dir": "other"}, epochs, {"segmentation": measured})
    assert (found["setting"], found["arm"], found["seed"]) == (
        "shapes-1000",
        "sar-0.3",
        4,
    )
    assert (found["epochs"], found["acc1"], found["mass"]) == (100, 90, 30)
    assert found["minutes"] == pytest.approx(10)
    assert found["train_entropy_by_tenths"] == [10 * n + 5.5 for n in range(10)]

    older = {name: value for name, value in header.items() if name != "pos_std"}
    assert collect(older, epochs, {"segmentation": measured}) == found
    with pytest.raises(ValueError, match="not the study's settings: lr 0.1 -> 0.0"):
        collect(header | {"lr": 0.1}, epochs, {"segmentation": measured})
    with pytest.raises(ValueError, match="ended after 99 epochs"):
        collect(header, epochs[:-1], {"segmentation": measured})
    with pytest.raises(ValueError, match="has no 'segmentation'"):
        collect(header, epochs, {})
    for folder in ("shapes-1000/mine-4", "shapes-1000/mine", "mine/plain-4"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "eval.json").touch()
    collect(header, epochs, {"segmentation": measured})
    study["collect"](tmp_path)
    assert capsys.readouterr().err.count(", not of the study\n") == 3


# ------------------------------------------------------------------------------- data


@needs_project
def test_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 80, "test": 40})
    first, again, test = data.Shapes("train"), data.Shapes("train"), data.Shapes("test")
    assert first.images.equal(again.images)
    assert first.masks.equal(again.masks)
    assert not first.images[:40].equal(test.images)
    assert first.images.shape == (80, 3, 56, 56)
    assert first.targets.bincount().tolist() == [10] * len(first.classes)
    assert len(first.classes) >= 8
    for image, mask in zip(test.images.float(), test.masks):
        assert 0.02 < mask.float().mean() < 0.5
        assert len(connected_components(mask)[mask].unique()) == 1
        # The object has one colour: its pixels vary less than those of the background.
        assert image[:, mask].std(1).mean() < image[:, ~mask].std(1).mean()


@needs_project
def test_balanced_subset() -> None:
    class Labels(torch.utils.data.Dataset):
        targets = torch.tensor([0] * 50 + [1] * 30 + [2] * 5)

        def __len__(self) -> int:
            return len(self.targets)

        def __getitem__(self, index: int) -> int:
            return int(self.targets[index])

    def counts(size: int, seed: int = 0) -> list[int]:
        return (
            torch.tensor(list(data.balanced_subset(Labels(), size, seed)))
            .bincount()
            .tolist()
        )

    assert counts(9) == [3, 3, 3]
    assert sorted(counts(10)) == [3, 3, 4]
    assert counts(45) == [20, 20, 5]
    assert counts(85) == [50, 30, 5]
    first, second = (data.balanced_subset(Labels(), 9, seed).indices for seed in (0, 1))
    assert first == data.balanced_subset(Labels(), 9, 0).indices != second
    with pytest.raises(
        ValueError, match="86 images was asked for, of a data set of 85"
    ):
        data.balanced_subset(Labels(), 86, 0)


def write_cifar(folder: Path, name: str = "cifar-100-python", archive=False) -> None:
    """A miniature in the layout of the original: a few images in each file."""
    inside = folder / name
    inside.mkdir(parents=True)
    hundred = name == "cifar-100-python"
    pixels = torch.randint(256, (8, 3 * 32 * 32), dtype=torch.uint8).numpy()
    labels = "fine_labels" if hundred else "labels"
    part = {"data": pixels, labels: [10 * n if hundred else n for n in range(8)]}
    names = [f"class {n}" for n in range(100 if hundred else 10)]
    if hundred:
        files = {"train": part, "test": part, "meta": {"fine_label_names": names}}
    else:
        files = {f"data_batch_{n}": part for n in range(1, 6)} | {"test_batch": part}
        files["batches.meta"] = {"label_names": names}
    for file, content in files.items():
        (inside / file).write_bytes(pickle.dumps(content))
    if archive:
        with tarfile.open(folder / f"{name}.tar.gz", "w:gz") as tar:
            tar.add(inside, inside.name)
        shutil.rmtree(inside)


def write_fashion_mnist(folder: Path) -> None:
    """A miniature in the layout of the original: gzipped idx files."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)

    def write(name: str, magic: int, array: torch.Tensor) -> None:
        header = b"".join(n.to_bytes(4, "big") for n in (magic, *array.shape))
        with gzip.open(raw / f"{name}-ubyte.gz", "wb") as file:
            file.write(header + array.to(torch.uint8).numpy().tobytes())

    for split, count in (("train", 20), ("t10k", 10)):
        write(f"{split}-images-idx3", 2051, torch.randint(256, (count, 28, 28)))
        write(f"{split}-labels-idx1", 2049, torch.arange(count) % 10)


def write_images(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = v2.functional.to_pil_image(torch.rand(3, 40, 60))
        image.save(folder / name)


def write_mask(path: Path, mask: torch.Tensor) -> None:
    """As VOC's: an image whose pixels are numbers of colours in a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = v2.functional.to_pil_image(mask.to(torch.uint8)[None])
    image.putpalette([37 * n % 256 for n in range(768)])
    assert image.mode == "P"
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
    (lists / "train.txt").write_text("2007_000032\n")
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in names))


def write_folder(
    folder: Path,
    classes: Sequence[str] = ("cat", "dog"),
    splits: tuple[str, str] = ("train", "val"),
) -> None:
    counts = zip(splits, (6, 2))
    files = [
        (part, name, i) for part, n in counts for name in classes for i in range(n)
    ]
    write_images(folder, (f"{part}/{name}/{i}.png" for part, name, i in files))


def mat_file(arrays: dict[str, torch.Tensor]) -> bytes:
    """A MATLAB 5.0 file; its arrays are compressed in turns."""

    def element(kind: int, content: bytes) -> bytes:
        if len(content) <= 4:
            return struct.pack("<HH4s", kind, len(content), content)
        return (
            struct.pack("<II", kind, len(content))
            + content
            + b"\0" * (-len(content) % 8)
        )

    file = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
    for number, (name, array) in enumerate(arrays.items()):
        columns = array.permute(*range(array.ndim)[::-1]).contiguous().numpy().tobytes()
        matrix = element(6, struct.pack("<II", 9, 0))  # flags: class 9 is uint8
        matrix += element(5, struct.pack(f"<{array.ndim}i", *array.shape))
        matrix += element(1, name.encode()) + element(2, columns)
        matrix = element(14, matrix)
        if number % 2 == 0:
            matrix = zlib.compress(matrix)
            matrix = struct.pack("<II", 15, len(matrix)) + matrix
        file += matrix
    return file


def write_svhn(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for split, count in (("train", 9), ("test", 5)):
        labels = torch.arange(1, count + 1, dtype=torch.uint8)[:, None]
        labels[-1] = 10  # the digit 0
        # Row, column and channel of every pixel, and the image's number.
        places = torch.cartesian_prod(*(torch.arange(n) for n in (32, 32, 3, count)))
        pixels = (places * torch.tensor([1, 2, 3, 5])).sum(1).to(torch.uint8)
        pixels = pixels.view(32, 32, 3, count)
        content = mat_file({"X": pixels, "y": labels})
        (folder / f"{split}_32x32.mat").write_bytes(content)


def write_stl10(folder: Path) -> None:
    inside = folder / "stl10_binary"
    inside.mkdir(parents=True)
    names = "".join(f"class {n}\n" for n in range(10))
    (inside / "class_names.txt").write_text(names)
    for split, count in (("train", 10), ("test", 4), ("unlabeled", 1)):
        pixels = torch.randint(256, (count, 3, 96, 96), dtype=torch.uint8)
        (inside / f"{split}_X.bin").write_bytes(pixels.numpy().tobytes())
        (inside / f"{split}_y.bin").write_bytes(bytes(range(1, count + 1)))


def write_flowers102(folder: Path) -> None:
    inside = folder / "flowers-102"
    write_images(inside, (f"jpg/image_{n:05}.jpg" for n in range(1, 13)))
    ids = torch.randperm(12, dtype=torch.uint8)[None] + 1
    parts = {"trnid": ids[:, :3], "valid": ids[:, 3:7], "tstid": ids[:, 7:]}
    (inside / "setid.mat").write_bytes(mat_file(parts))
    labels = torch.arange(91, 103, dtype=torch.uint8)[None]
    (inside / "imagelabels.mat").write_bytes(mat_file({"labels": labels}))


def write_pets(folder: Path) -> None:
    inside = folder / "oxford-iiit-pet"
    (inside / "annotations").mkdir(parents=True)
    for split, count in (("trainval", 3), ("test", 2)):
        names = [
            f"{n}_{i}"
            for n in ("Abyssinian", "yorkshire_terrier")
            for i in range(count)
        ]
        write_images(inside / "images", (f"{name}.jpg" for name in names))
        for name in names:  # of pixels 1 is pet, 2 background, 3 border
            trimap = torch.full((40, 60), 2)
            trimap[10:20, 10:30], trimap[12:20, 12:28] = 3, 1
            write_mask(inside / "annotations" / "trimaps" / f"{name}.png", trimap)
        lines = [f"{name} {1 + (i >= count)} 1 1" for i, name in enumerate(names)]
        (inside / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")


def write_food101(folder: Path) -> None:
    inside = folder / "food-101"
    (inside / "meta").mkdir(parents=True)
    for split, count in (("train", 3), ("test", 1)):
        files = {n: [f"{n}/{split}{i}" for i in range(count)] for n in ("pho", "ramen")}
        (inside / "meta" / f"{split}.json").write_text(json.dumps(files))
        write_images(
            inside / "images", (f"{f}.jpg" for each in files.values() for f in each)
        )


def write_domainnet(folder: Path) -> None:
    for split, count in (("train", 3), ("test", 1)):
        names = [
            f"sketch/{n}/{split}{i}.jpg" for n in ("ant", "owl") for i in range(count)
        ]
        write_images(folder, names)
        lines = [f"{name} {int('owl' in name)}\n" for name in reversed(names)]
        (folder / f"sketch_{split}.txt").write_text("".join(lines))


WNIDS = ("n01440764", "n01443537")
SPECIES = (
    "00000_Animalia_Annelida_Clitellata",
    "00001_Plantae_Bryophyta_Polytrichales",
)


@needs_project
@pytest.mark.parametrize("crop", ["resized", "padded"])
@pytest.mark.parametrize(
    "name, write, classes, sizes",
    [
        ("cifar10", partial(write_cifar, name="cifar-10-batches-py"), 10, (40, 8)),
        ("cifar100", write_cifar, 100, (8, 8)),
        ("cifar100", partial(write_cifar, archive=True), 100, (8, 8)),
        ("svhn", write_svhn, 10, (9, 5)),
        ("stl10", write_stl10, 10, (10, 4)),
        ("fashion-mnist", write_fashion_mnist, 10, (20, 10)),
        ("flowers102", write_flowers102, 102, (7, 5)),
        ("pets", write_pets, 2, (6, 4)),
        ("food101", write_food101, 2, (6, 2)),
        ("imagenet", partial(write_folder, classes=WNIDS), 2, (12, 4)),
        (
            "inaturalist",
            partial(write_folder, classes=SPECIES, splits=("2021_train", "2021_valid")),
            2,
            (12, 4),
        ),
        ("domainnet-sketch", write_domainnet, 2, (6, 2)),
        ("folder", write_folder, 2, (12, 4)),
    ],
)
def test_data_sets_on_disk(
    name, write, classes, sizes, crop, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    write(tmp_path)
    augment = data.train_transform(name, 32, crop=crop, rand_augment=9, reprob=1.0)
    plain = data.test_transform(32, crop=crop)
    source = data.DATASETS[name]
    normalize = data.normalizer(source.mean, source.std, torch.device("cpu"))
    for split, transform, size in zip(("train", "test"), (augment, plain), sizes):
        dataset = data.load_dataset(name, tmp_path, split, transform)
        assert len(dataset) == size
        assert len(dataset.classes) == len(set(dataset.classes)) == classes
        train = split == "train"
        batch = min(3, size)
        loader = data.make_loader(
            dataset, batch, train=train, workers=0, pin_memory=False
        )
        seen = []
        for images, labels in loader:
            assert images.dtype == torch.uint8
            assert images.shape == (len(labels), 3, 32, 32)
            assert normalize(images).isfinite().all()
            seen += labels.tolist()
        assert len(seen) == (size // batch * batch if train else size)
        assert train or seen == dataset.targets.tolist()
        assert 0 <= min(seen) <= max(seen) < classes


@needs_project
@pytest.mark.parametrize("name", sorted(data.DATASETS) if PROJECT else [])
def test_a_data_set_that_is_not_there(name, tmp_path, monkeypatch) -> None:
    """The message says where it was looked for; and nothing is left behind."""
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    if name == "shapes":
        return
    path = data.DATASETS[name].path.split(" and ")[0].rstrip("/")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nowhere/{path}"):
        data.load_dataset(name, tmp_path / "nowhere", "train", None)
    assert list(tmp_path.iterdir()) == []


@needs_project
def test_labels_are_those_of_the_files(tmp_path: Path) -> None:
    write_svhn(tmp_path)
    digits = data.load_dataset("svhn", tmp_path, "test", None)
    assert digits.targets.tolist() == [1, 2, 3, 4, 0]
    assert digits.images[4][7, 9].tolist() == [
        7 + 2 * 9 + 3 * c + 5 * 4 for c in range(3)
    ]

    write_flowers102(tmp_path)
    for split, parts in (("train", ("trnid", "valid")), ("test", ("tstid",))):
        flowers = data.load_dataset("flowers102", tmp_path, split, None)
        ids = data.read_mat(tmp_path / "flowers-102" / "setid.mat")
        numbers = [int(n) for part in parts for n in ids[part].ravel()]
        assert [Path(file).stem for file in flowers.images] == [
            f"image_{n:05}" for n in numbers
        ]
        assert flowers.targets.tolist() == [n + 89 for n in numbers]

    write_domainnet(tmp_path)
    sketches = data.load_dataset("domainnet-sketch", tmp_path, "train", None)
    assert sketches.classes == ["ant", "owl"]
    folders = [Path(file).parent.name for file in sketches.images]
    assert folders == [sketches.classes[n] for n in sketches.targets]
    with (tmp_path / "sketch_train.txt").open("a") as file:
        file.write("sketch/ant/more.jpg 1\n")
    with pytest.raises(ValueError, match="label 1 is of owl and ant"):
        data.load_dataset("domainnet-sketch", tmp_path, "train", None)


@needs_project
def test_mat_files_are_read_like_scipy_does(tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    generator = data.np.random.default_rng(0)
    arrays = {
        "pixels": generator.integers(0, 256, (4, 5, 3, 7), dtype="uint8"),
        "doubles": generator.normal(size=(3, 4)),
        "floats": generator.normal(size=(2, 3)).astype("float32"),
        "long": data.np.arange(5)[None],
        "one": data.np.uint8([[3]]),
        "empty": data.np.zeros((0, 3)),
    }
    others = {"text": "text", "struct": {"a": 1}, "complex": data.np.array([[1 + 2j]])}
    for compressed in (False, True):
        contents = arrays | others
        scipy_io.savemat(tmp_path / "file.mat", contents, do_compression=compressed)
        got = data.read_mat(tmp_path / "file.mat")
        assert got.keys() == arrays.keys()
        for name, array in arrays.items():
            assert got[name].shape == array.shape
            assert (got[name] == array).all()


@needs_project
def test_original_files_are_known_by_their_checksums(
    tmp_path, monkeypatch, capsys
) -> None:
    """A miniature's own checksums in place of the original's: nothing is said."""

    def md5(*parts: str) -> str:
        return hashlib.md5(tmp_path.joinpath(*parts).read_bytes()).hexdigest()

    def read(name: str) -> str:
        data.load_dataset(name, tmp_path, "train", None)
        return capsys.readouterr().out

    for write in (write_cifar, write_svhn, write_stl10, write_flowers102):
        write(tmp_path)
    names = ("cifar100", "svhn", "stl10", "flowers102")
    for name in names:
        assert "lacks the original's checksums" in read(name)
    for reader in (torchvision.datasets.CIFAR100, torchvision.datasets.STL10):
        for table in ("train_list", "test_list"):
            rows = [(f, md5(reader.base_folder, f)) for f, _ in getattr(reader, table)]
            monkeypatch.setattr(reader, table, rows)
    meta = data.datasets.CIFAR100.meta | {"md5": md5("cifar-100-python", "meta")}
    monkeypatch.setattr(data.datasets.CIFAR100, "meta", meta)
    row = ("url", "train_32x32.mat", md5("train_32x32.mat"))
    monkeypatch.setitem(data.SVHN.split_list, "train", row)
    for key, file in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
        row = (file, md5("flowers-102", file))
        monkeypatch.setitem(data.Flowers102._file_dict, key, row)
    assert [read(name) for name in names] == [""] * 4


@needs_project
@pytest.mark.parametrize("limit, files", [(1e9, False), (12 * 40 * 60 * 3 - 1, True)])
def test_images_are_decoded_once(limit, files, tmp_path: Path) -> None:
    write_folder(tmp_path)
    dataset = data.load_dataset("folder", tmp_path, "train", v2.ToImage())
    before = [dataset[index][0] for index in range(12)]
    assert data.decode_once(dataset, limit) != files
    assert not data.decode_once(dataset, limit)  # not a second time
    if not files:
        shutil.rmtree(tmp_path / "train")
    for index in range(12):
        assert dataset[index][0].equal(before[index])

    write_folder(tmp_path / "other")
    dataset = data.load_dataset("folder", tmp_path / "other", "train", v2.ToImage())
    subset = data.balanced_subset(dataset, 3, 0)
    before = [subset[index][0] for index in range(3)]
    assert data.decode_once(subset, limit)
    assert len(dataset.images.places) == 3  # no more than these
    assert all(subset[index][0].equal(before[index]) for index in range(3))


@needs_project
def test_a_kept_loader_gives_the_same_batches_again(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    plain = data.test_transform(28, crop="whole")
    dataset = data.load_dataset("fashion-mnist", tmp_path, "test", plain)
    options = {"train": False, "workers": 1, "pin_memory": False}
    kept = data.Kept(data.make_loader(dataset, 4, **options))
    next(iter(kept))  # a pass that is not complete
    first = [tuple(batch) for batch in kept]
    dataset.images = None
    again = [tuple(batch) for batch in kept]
    assert [len(labels) for _, labels in again] == [4, 4, 2]
    for one, other in zip(first, again, strict=True):
        assert all(a.equal(b) for a, b in zip(one, other))
        assert not any(part.is_shared() for part in other)


@needs_project
def test_processes_share_the_data(tmp_path: Path) -> None:
    """In training batch by batch, as one process has them; in testing image by image."""
    write_fashion_mnist(tmp_path)
    dataset = data.load_dataset("fashion-mnist", tmp_path, "train", v2.ToImage())
    dataset.targets = torch.arange(20)

    def batches(train: bool, **share: int) -> list[list[int]]:
        loader = data.make_loader(
            dataset, 3, train=train, workers=0, pin_memory=False, **share
        )
        assert len(loader) == len(list(loader))
        return [labels.tolist() for _, labels in loader]

    alone = batches(True)
    parts = [batches(True, rank=rank, world_size=2) for rank in range(2)]
    assert [batch for pair in zip(*parts) for batch in pair] == alone
    assert len(alone) == 6
    with pytest.raises(ValueError, match="20 test images are fewer than 21"):
        batches(False, rank=0, world_size=21)
    parts = [batches(False, rank=rank, world_size=3) for rank in range(3)]
    assert sorted(n for part in parts for batch in part for n in batch) == list(
        range(20)
    )


@needs_project
def test_pickles_that_execute_code_are_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    hostile = pickle.dumps({"data": os.getcwd})
    (tmp_path / "cifar-100-python" / "train").write_bytes(hostile)
    with pytest.raises(ValueError, match="it wants to execute posix.getcwd"):
        data.load_dataset("cifar100", tmp_path, "test", None)


@needs_project
def test_damaged_archives_leave_nothing_behind(tmp_path: Path) -> None:
    write_cifar(tmp_path, archive=True)
    write_fashion_mnist(tmp_path)
    raw = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz"
    for archive in (tmp_path / "cifar-100-python.tar.gz", raw):
        whole = archive.read_bytes()
        name = "cifar100" if archive.suffixes[0] == ".tar" else "fashion-mnist"
        for content in (whole[: len(whole) // 2], b"no archive"):
            archive.write_bytes(content)
            with pytest.raises(ValueError, match="cannot be used") as refused:
                data.load_dataset(name, tmp_path, "train", None)
            if name == "cifar100":
                assert f"{archive} is damaged or incomplete" in str(refused.value)
        archive.write_bytes(whole)
        assert len(data.load_dataset(name, tmp_path, "train", None)) in (8, 20)


@needs_project
def test_normalizer() -> None:
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    source = data.DATASETS["cifar100"]
    assert (source.mean, source.std) == (mean, std)
    got = data.normalizer(mean, std, torch.device("cpu"))(images)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (mean, std))
    torch.testing.assert_close(got, (images / 255 - mean) / std)


@needs_project
def test_test_images_are_not_augmented(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    plain = data.test_transform(32, crop="padded")
    test = data.load_dataset("cifar100", tmp_path, "test", plain)
    assert test[3][0].equal(torch.from_numpy(test.images[3]).permute(2, 0, 1))


# --------------------------------------------------------------------------- training


@needs_project
def test_lambda_zero_is_the_plain_vit() -> None:
    model = small_model()
    images, target = torch.randn(4, 3, 24, 40), torch.arange(4)
    loss, cross_entropy, entropy = train.losses(model, images, target, sar_lambda=None)
    expected = torch.nn.functional.cross_entropy(model(images)[0], target)
    assert loss.equal(expected)
    got = torch.autograd.grad(loss, tuple(model.parameters()))
    want = torch.autograd.grad(expected, tuple(model.parameters()))
    assert all(a.equal(b) for a, b in zip(got, want))
    assert not entropy.requires_grad
    assert entropy.equal(spatial_entropy(model(images)[1]))

    loss, cross_entropy, entropy = train.losses(model, images, target, sar_lambda=0.5)
    torch.testing.assert_close(loss, cross_entropy + 0.5 * entropy)
    assert loss.requires_grad


@needs_project
def test_schedules() -> None:
    settings = {"sar_lambda": 0.01, "sar_schedule": "cosine", "world_size": 1}
    args = argparse.Namespace(**train.RECIPE, **settings)
    lr, sar_lambda = zip(*(train.rates(epoch, 100, args) for epoch in range(100)))
    assert lr[0] == 1e-6
    assert lr[5] == max(lr) == pytest.approx(5e-4 * 128 / 512)
    assert lr[99] == pytest.approx(1e-5, rel=0.01)
    assert sar_lambda[0] == 0
    assert sar_lambda[4] == pytest.approx(0.004)
    assert sar_lambda[10] == max(sar_lambda) == 0.01
    assert sar_lambda[55] == pytest.approx(0.005)
    assert sar_lambda[99] == pytest.approx(0, abs=1e-5)
    args.epochs = 4  # shorter than either warm-up
    lr, sar_lambda = zip(*(train.rates(step, 8, args) for step in range(8)))
    assert sorted(lr) == list(lr)
    assert max(sar_lambda) == sar_lambda[4] == 0.01
    args.sar_schedule = "constant"
    assert {train.rates(step, 8, args)[1] for step in range(8)} == {0.01}
    args.epochs = 100
    for args.lr in (0, 1e-6, 1e-5):  # the peak is below either end of the schedule
        assert max(train.rates(step, 100, args)[0] for step in range(100)) == (
            train.peak_lr(args)
        )


@needs_project
def test_the_loop_uses_every_setting(tmp_path, monkeypatch) -> None:
    """What each step of a real run got: learning rate, lambda, mixed targets, the rest."""
    write_fashion_mnist(tmp_path / "data")
    seen, optimizers = [], []

    def losses(model, images, target, **options):
        seen.append((optimizers[0].param_groups[0]["lr"], target, options))
        return real_losses(model, images, target, **options)

    def make_optimizer(*arguments):
        optimizers.append(real_make_optimizer(*arguments))
        return optimizers[0]

    real_losses, real_make_optimizer = train.losses, train.make_optimizer
    monkeypatch.setattr(train, "losses", losses)
    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    command = f"train {TINY} --data-dir {tmp_path}/data --output-dir {tmp_path}/run"
    command += " --epochs 1 --batch-size 10 --model-ema-decay 0.9 --warmup-epochs 0.5"
    assert run(monkeypatch, f"{command} --smoothing 0.2 --sar-lambda 0.3 --amp") == 0
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    args = argparse.Namespace(**saved["settings"])
    for step, (lr, target, options) in enumerate(seen):
        expected = train.rates(step, 2, args)
        assert (lr, options["sar_lambda"]) == expected
        assert (options["smoothing"], options["amp"]) == (0.2, True)
        assert target.shape == (10, 10)  # mixup and cutmix make probabilities
    assert len(seen) == 2
    # The average of three sets of weights: at the start, after one step and after two. The
    # first step has lr 1e-6, so its weights are about those at the start.
    start = start_of(saved)
    end, average = (saved[part]["head.weight"] for part in ("model", "model_ema"))
    torch.testing.assert_close(average, 0.9 * start + 0.1 * end, rtol=0, atol=2e-6)
    assert not average.equal(start)


@needs_project
def test_mixing() -> None:
    images, labels = torch.randn(8, 3, 6, 6), torch.arange(8)
    assert data.make_mix(0, 0, 8)(images, labels)[1] is labels
    for mixup, cutmix in ((0.8, 0), (0, 1.0)):
        mixed, target = data.make_mix(mixup, cutmix, 8)(images, labels)
        torch.testing.assert_close(target.sum(1), torch.ones(8))
        rolled = images.roll(1, 0)
        pasted = (mixed == images) | (mixed == rolled)
        assert pasted.all() == bool(cutmix)
    names = {type(mix).__name__ for mix in data.make_mix(0.8, 1.0, 8).transforms}
    assert names == {"MixUp", "CutMix"}


@needs_project
def test_a_run_that_is_not_finite_keeps_its_last_good_epoch(
    tmp_path, monkeypatch, capsys
) -> None:
    write_fashion_mnist(tmp_path / "data")
    command = f"train {TINY} --data-dir {tmp_path}/data --output-dir {tmp_path}/run"
    save = train.save

    def poison(folder: Path, checkpoint: dict) -> None:
        save(folder, checkpoint)
        model.head.weight.data.fill_(math.nan)

    def make_optimizer(made, weight_decay):
        nonlocal model
        model = made
        return real(made, weight_decay)

    model, real = None, train.make_optimizer
    monkeypatch.setattr(train, "save", poison)
    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    assert run(monkeypatch, command) == 2
    error = capsys.readouterr().err
    assert "no finite loss by step" in error
    assert "holds the last good epoch" in error
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["epoch"] == 1
    assert all(value.isfinite().all() for value in saved["model"].values())

    # The last step of an epoch shows in the test loss alone.
    evaluate = train.evaluate
    broken = {"loss": math.nan}
    monkeypatch.setattr(train, "evaluate", lambda *given: evaluate(*given) | broken)
    assert run(monkeypatch, command.replace("/run", "/other")) == 2
    assert (
        "no epoch was finished, so there is none to resume" in capsys.readouterr().err
    )
    assert not (tmp_path / "other" / "checkpoint.pt").exists()


@needs_project
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(workers, tmp_path, monkeypatch, capsys) -> None:
    write_folder(tmp_path)
    (tmp_path / "val" / "dog" / "1.png").write_text("no image")
    command = f"train {TINY.replace('fashion-mnist', 'folder')} --data-dir {tmp_path}"
    command += f" --workers {workers} --output-dir {tmp_path}/run"
    assert run(monkeypatch, command) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/val/dog/1.png cannot be read" in error
    assert error.count("\n") == 1


@needs_project
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, capsys) -> None:
    def full(*_) -> NoReturn:
        raise RuntimeError("unexpected pos 64 vs 0")

    write_fashion_mnist(tmp_path / "data")
    monkeypatch.setattr(torch, "save", full)
    command = f"train {TINY} --data-dir {tmp_path}/data --output-dir {tmp_path}/run"
    assert run(monkeypatch, command) == 2
    assert "checkpoint.pt.partial cannot be written" in capsys.readouterr().err


@needs_project
def test_what_a_failed_run_leaves_is_said(tmp_path, monkeypatch, capsys) -> None:
    """Out of memory: one sentence. An error of the code: its traceback besides."""
    write_fashion_mnist(tmp_path / "data")
    command = f"train {TINY} --data-dir {tmp_path}/data --output-dir {tmp_path}/run"
    assert run(monkeypatch, f"{command} --epochs 2") == 0
    left = "holds the last good epoch; the same command with --resume continues it"

    def fail(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr(train, "train", fail)
    for error in (torch.OutOfMemoryError("2 GiB were tried"), OSError()):
        assert run(monkeypatch, f"{command} --resume") == 2
        assert left in capsys.readouterr().err
    error = RuntimeError("a worker was killed")
    with pytest.raises(RuntimeError, match="a worker was killed"):
        run(monkeypatch, f"{command} --resume")
    assert left in capsys.readouterr().out


@needs_project
@pytest.mark.parametrize("capability, amp", [((7, 5), False), ((8, 0), True)])
def test_bfloat16_is_for_gpus_that_have_it(capability, amp, monkeypatch) -> None:
    monkeypatch.setattr(train, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    _, args = train.parse_arguments([])
    train.resolve(args)
    assert args.amp == amp


@needs_project
def test_weight_decay_is_of_weight_matrices_alone() -> None:
    model = small_model()
    decayed, kept = train.make_optimizer(model, 0.05).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    ids = {id(parameter) for parameter in decayed["params"]}
    for name, parameter in model.named_parameters():
        matrix = name.endswith("weight") and "norm" not in name
        assert (id(parameter) in ids) == matrix


def run(monkeypatch: pytest.MonkeyPatch, command: str) -> int:
    """Run a script in this process, as `train --epochs 1`; returns its exit code."""
    script, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    try:
        importlib.import_module(script).main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


TINY = "--dataset fashion-mnist --model vit_mini --img-size 28 --patch-size 4 "
TINY += "--epochs 2 --batch-size 4 --device cpu"


@needs_project
def test_train_and_eval_from_the_shell(tmp_path: Path) -> None:
    """The scripts themselves, in a folder of their own."""
    write_fashion_mnist(tmp_path / "data")

    def shell(script: str, *arguments: str) -> str:
        command = [sys.executable, HERE / script, *arguments]
        options = {"capture_output": True, "text": True, "timeout": 300}
        return subprocess.run(command, cwd=tmp_path, check=True, **options).stdout

    output = shell("train.py", *TINY.split())
    assert "\r" not in output
    folder = tmp_path / "runs" / "fashion-mnist-vit_mini-lambda0.01-seed0"
    lines = (folder / "log.jsonl").read_text().splitlines()
    header, *epochs = [json.loads(line) for line in lines]
    assert header["sar_lambda"] == 0.01
    assert header["last_skip"] is False
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    for key in ("train_loss", "train_entropy", "test_loss", "test_acc1", "test_acc5"):
        assert math.isfinite(epochs[1][key])
    assert {"test_entropy", "lr", "sar_lambda", "images_per_second"} <= epochs[1].keys()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["epoch"] == 2

    output = shell("eval.py", "--attention", "attention.png")
    assert f"top-1 {epochs[1]['test_acc1']:.2f} %" in output
    assert f"loss {epochs[1]['test_loss']:.4f}" in output
    picture = torchvision.datasets.folder.default_loader(tmp_path / "attention.png")
    assert len(picture.getcolors(2**24)) > 100


@needs_project
def test_other_images_are_normalized_like_those_of_training(
    tmp_path, monkeypatch
) -> None:
    means = []

    def normalizer(mean, std, device: torch.device):
        means.append(mean)
        return data.normalizer(mean, std, device)

    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 80, "test": 16})
    monkeypatch.setattr(evaluation, "normalizer", normalizer)
    command = f"train --device cpu --epochs 1 --output-dir {tmp_path}/run"
    assert run(monkeypatch, command) == 0
    # A folder lists its classes in order of the alphabet.
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"classes": sorted(data.SHAPES)}, tmp_path / "sorted.pt")
    write_folder(tmp_path / "images", list(data.SHAPES))
    command = f"eval --device cpu --checkpoint {tmp_path}/sorted.pt"
    command += f" --dataset folder --data-dir {tmp_path}/images"
    assert run(monkeypatch, command) == 0
    assert means == [data.DATASETS["shapes"].mean]


@needs_project
def test_a_resumed_run_is_the_same_run(tmp_path, monkeypatch, capsys) -> None:
    write_fashion_mnist(tmp_path / "data")
    command = f"train {TINY} --data-dir {tmp_path}/data --mixup 0.8 --model-ema"
    seen, losses = [], train.losses

    def record(model, images, target, **options):
        seen.append(images.sum().item())
        return losses(model, images, target, **options)

    monkeypatch.setattr(train, "losses", record)
    assert run(monkeypatch, f"{command} --output-dir {tmp_path}/whole") == 0
    assert len(set(seen)) == 10  # two epochs of five steps, no batch twice

    def save_and_stop(*saved) -> None:
        save(*saved)
        raise KeyboardInterrupt

    save = train.save
    command += f" --output-dir {tmp_path}/stopped"
    monkeypatch.setattr(train, "save", save_and_stop)
    assert run(monkeypatch, command) == 130
    monkeypatch.setattr(train, "save", save)
    capsys.readouterr()
    for again, sentence in {
        command: "already holds a run: --resume continues it; another ",
        f"{command} --seed 9": "already holds a run with other settings, seed 0 -> 9; ",
    }.items():
        assert run(monkeypatch, again) == 2
        assert sentence in capsys.readouterr().err
    assert run(monkeypatch, f"{command} --resume --lr 1") == 2  # that is another run
    assert run(monkeypatch, f"{command} --resume") == 0

    files = [tmp_path / name / "checkpoint.pt" for name in ("whole", "stopped")]
    whole, stopped = (torch.load(file, weights_only=True) for file in files)
    assert whole["architecture"]["pos_std"] == 0.02
    del stopped["settings"]["pos_std"]  # as in runs that are older than the option
    torch.save(stopped, files[1])
    assert run(monkeypatch, f"{command} --resume --pos-std 0.5") == 2
    assert run(monkeypatch, f"{command} --resume") == 0
    for part in ("model", "model_ema"):
        for name, value in whole[part].items():
            assert value.equal(stopped[part][name])
    for a, b in zip(whole["log"][1:], stopped["log"][1:], strict=True):
        times = {"images_per_second": 0, "seconds": 0}
        assert a | times == b | times


@needs_project
@pytest.mark.parametrize("clip", ["", "--clip-grad 0.1"])
def test_accumulated_batches_are_one_larger_batch(clip, tmp_path, monkeypatch) -> None:
    def sgd(model: torch.nn.Module, _: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), 0.1)

    monkeypatch.setattr(train, "make_optimizer", sgd)  # AdamW forgives a wrong scale
    write_fashion_mnist(tmp_path / "data")
    command = f"train {TINY} --data-dir {tmp_path}/data --drop-path 0 --mixup 0 {clip}"
    command += " --cutmix 0 --warmup-epochs 0 --lr 2 --batch-size"
    weights = []
    for size in ("10", "5 --accumulate 2", "5"):
        folder = tmp_path / str(len(weights))
        assert run(monkeypatch, f"{command} {size} --output-dir {folder}") == 0
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        weights.append(saved["model"]["head.weight"])
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)
    assert (weights[0] - weights[2]).abs().max() > 1e-5
    assert ((weights[0] - start_of(saved)).norm() < 0.02) == bool(clip)


@needs_project
@pytest.mark.parametrize(
    "chance, alone",
    [
        ("--mixup 0.8 --drop-path 0.5", "--batch-size 4 --accumulate 2"),
        ("--mixup 0 --cutmix 0 --drop-path 0", "--batch-size 8"),
    ],
)
def test_two_processes_do_what_one_does(chance, alone, tmp_path, monkeypatch) -> None:
    """All chance follows from the batch, so mixup and drop-path are the same too."""
    write_fashion_mnist(tmp_path / "data")
    options = f"{TINY} --lr 0.05 --data-dir {tmp_path}/data {chance} --output-dir"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", HERE / "train.py", *options.split()]
    command += [tmp_path / "two"]
    pipes = {"capture_output": True, "text": True, "timeout": 300}
    first, again = (subprocess.run(command, check=False, **pipes) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("epoch 1/2") == first.stdout.count("next:") == 1
    # Whatever fails is said once, by the first process.
    assert again.returncode != 0
    assert again.stderr.count("already holds a run") == 1
    files = {file.name for file in (tmp_path / "two").iterdir()}
    assert files == {".lock", "checkpoint.pt", "log.jsonl"}
    assert run(monkeypatch, f"train {options} {tmp_path}/one {alone}") == 0
    one, two = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("one", "two")
    )
    for name, value in one["model"].items():
        if "qkv.bias" not in name:  # that of the keys has no gradient but rounding
            torch.testing.assert_close(value, two["model"][name], rtol=0, atol=1e-5)
    for a, b in zip(one["log"][1:], two["log"][1:], strict=True):
        assert a["test_images"] == b["test_images"] == 10
        assert a["test_acc1"] == b["test_acc1"]
        for key in ("train_loss", "train_entropy", "test_loss", "test_entropy"):
            assert a[key] == pytest.approx(b[key], abs=1e-4)


@needs_project
def test_variables_of_a_scheduler_are_not_torchruns(tmp_path, monkeypatch) -> None:
    write_fashion_mnist(tmp_path / "data")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "3")
    command = f"train {TINY} --data-dir {tmp_path}/data --output-dir {tmp_path}/run"
    assert run(monkeypatch, f"{command} --epochs 1") == 0
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@needs_project
def test_finetune(tmp_path, monkeypatch, capsys) -> None:
    """From weights wrapped as DINO's, for another grid and other classes."""
    write_fashion_mnist(tmp_path / "data")
    torch.manual_seed(1)
    options = {"img_size": 56, "patch_size": 4, "num_classes": 7}
    source = vit.VisionTransformer(**vit.MODELS["vit_mini"], **options).state_dict()
    wrapped = {f"module.backbone.{name}": value for name, value in source.items()}
    torch.save({"teacher": wrapped, "args": argparse.Namespace()}, tmp_path / "dino.pt")
    command = f"train {TINY} --data-dir {tmp_path}/data --sar-lambda 0 --epochs 1"
    command += f" --lr 0 --min-lr 0 --warmup-lr 0 --finetune {tmp_path}"
    assert run(monkeypatch, f"{command}/dino.pt --output-dir {tmp_path}/run") == 0
    output = capsys.readouterr().out
    assert "14x14 -> 7x7" in output
    assert "left at initial values: head.weight, head.bias" in output
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["settings"]["warmup_epochs"] == 3  # and not the 5 from scratch
    for name, value in saved["model"].items():
        if name != "pos_embed" and not name.startswith("head"):
            assert value.equal(source[name])

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"run": os.getcwd}, 2))
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pt")
    for file, message in (("evil", "contains posix"), ("other", "holds no")):
        folder = tmp_path / file
        assert run(monkeypatch, f"{command}/{file}.pt --output-dir {folder}") == 2
        assert message in capsys.readouterr().err
        assert not folder.exists()


@needs_project
def test_resuming_completes_the_log(tmp_path, monkeypatch) -> None:
    """As when a run was killed between writing its checkpoint and its log."""
    write_fashion_mnist(tmp_path / "data")
    command = f"train {TINY} --data-dir {tmp_path}/data --output-dir {tmp_path}/run"
    assert run(monkeypatch, command) == 0
    log = tmp_path / "run" / "log.jsonl"
    whole = log.read_text()
    log.write_text("".join(whole.splitlines(keepends=True)[:2]))
    assert run(monkeypatch, f"{command} --resume") == 0
    assert log.read_text() == whole


@needs_project
def test_testing_less_often_changes_nothing_else(tmp_path, monkeypatch) -> None:
    write_fashion_mnist(tmp_path / "data")
    command = f"train {TINY.replace('--epochs 2', '--epochs 3')} --model-ema"
    runs = {}
    for interval in (1, 2):
        options = f"--val-interval {interval} --output-dir {tmp_path}/{interval}"
        assert run(monkeypatch, f"{command} --data-dir {tmp_path}/data {options}") == 0
        path = tmp_path / str(interval) / "checkpoint.pt"
        runs[interval] = torch.load(path, weights_only=True)
    tested = [
        [any("test" in key for key in epoch) for epoch in runs[n]["log"][1:]]
        for n in runs
    ]
    assert tested == [[True, True, True], [False, True, True]]
    for key in ("test_acc1", "test_loss", "test_loss_ema", "train_loss"):
        assert runs[1]["log"][3][key] == runs[2]["log"][3][key]
    for weights in ("model", "model_ema"):
        for name, tensor in runs[1][weights].items():
            assert tensor.equal(runs[2][weights][name])


@needs_project
def test_weights_that_are_not_finite_are_not_saved_untested(
    tmp_path, monkeypatch, capsys
) -> None:
    write_fashion_mnist(tmp_path / "data")
    rates = train.rates

    def diverging(step: int, *given) -> tuple[float, float]:
        lr, sar_lambda = rates(step, *given)
        return (math.nan if step == 9 else lr), sar_lambda  # the last of epoch 2

    monkeypatch.setattr(train, "rates", diverging)
    command = f"train {TINY.replace('--epochs 2', '--epochs 4')} --val-interval 4"
    command += f" --data-dir {tmp_path}/data --output-dir {tmp_path}/run"
    assert run(monkeypatch, command) == 2
    assert "the weights of epoch 2 are not finite" in capsys.readouterr().err
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


@needs_project
def test_benchmark(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(train, "BENCHMARK_ROUNDS", 1)
    command = "train --benchmark --model vit_tiny --img-size 32 --device cpu"
    assert run(monkeypatch, command) == 0
    output = capsys.readouterr().out
    rows = {line[:24].strip(): line[24:].split() for line in output.splitlines()}
    for name in ("plain ViT", "plain ViT, compiled", "SAR", "SAR, compiled"):
        # The rate as a percentage of the matrices' is 0 on a busy machine.
        *speed, _, memory = (float(figure.rstrip("%")) for figure in rows[name])
        assert min(speed) > 0
        # Weights, gradients and two averages of each, 5.4 M in all.
        assert 4 * 4 * 5.3 < memory < 2 * 4 * 4 * 5.3
    assert "ms an image, on one core" in output
    assert output.count("overhead of SAR") == 2


def start_of(saved: dict) -> torch.Tensor:
    torch.manual_seed(0)
    return vit.VisionTransformer(**saved["architecture"]).state_dict()["head.weight"]


@needs_project
@pytest.mark.parametrize("name, code", [("TERM", 143), ("INT", 130), ("KILL", -9)])
def test_a_killed_run_is_continued(name, code, tmp_path, monkeypatch) -> None:
    """A signal to it and its worker, and the same weights in the end as without."""
    write_fashion_mnist(tmp_path / "data")
    options = f"{TINY} --epochs 30 --data-dir {tmp_path}/data --workers 1 --output-dir"
    folder = tmp_path / "killed"
    command = [sys.executable, HERE / "train.py", *options.split(), folder]
    pipes = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **pipes) as process:
        while not (folder / "checkpoint.pt").exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, getattr(signal, f"SIG{name}"))
        output, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert ("holds the last good epoch" in output) == (name != "KILL")
    assert 0 < torch.load(folder / "checkpoint.pt", weights_only=True)["epoch"] < 30
    if name != "KILL":
        return
    assert run(monkeypatch, f"train {options} {folder} --resume") == 0
    assert run(monkeypatch, f"train {options} {tmp_path}/whole") == 0
    killed, whole = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("killed", "whole")
    )
    for key, value in whole["model"].items():
        assert value.equal(killed["model"][key])
    assert [line["epoch"] for line in killed["log"][1:]] == list(range(1, 31))


HOLD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import train
with train.alone_in(Path(sys.argv[2])):
    print("held", flush=True)
    input()
"""


@needs_project
@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch, capsys) -> None:
    """A new run and a resumed one are refused until the other process has ended."""
    write_fashion_mnist(tmp_path / "data")
    folder = tmp_path / "run"
    command = f"train {TINY} --data-dir {tmp_path}/data --output-dir {folder}"
    other = [sys.executable, "-c", HOLD, HERE, folder]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    for options in ("", "--resume"):
        with subprocess.Popen(other, **pipes) as process:
            assert process.stdout.readline() == b"held\n"
            before = sorted(folder.iterdir())
            assert run(monkeypatch, f"{command} {options}") == 2
            refusal = f"train.py: error: another process trains in {folder} now\n"
            assert capsys.readouterr().err == refusal
            assert sorted(folder.iterdir()) == before
            process.kill()
        assert run(monkeypatch, f"{command} {options}") == 0


@needs_project
def test_workers_do_not_change_a_run(tmp_path, monkeypatch) -> None:
    write_fashion_mnist(tmp_path / "data")
    command = f"train {TINY} --data-dir {tmp_path}/data --workers"
    weights = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        assert run(monkeypatch, f"{command} {workers} --output-dir {folder}") == 0
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        weights.append(saved["model"]["head.weight"])
    assert weights[0].equal(weights[1])


@needs_project
def test_each_epoch_draws_anew(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    options = {"crop": "padded", "rand_augment": 9, "reprob": 0.5}
    augment = data.train_transform("fashion-mnist", 28, **options)
    dataset = data.load_dataset("fashion-mnist", tmp_path, "train", augment)
    loader = data.make_loader(dataset, 20, train=True, workers=0, pin_memory=False)

    def epoch(seed: int) -> torch.Tensor:
        loader.sampler.epoch_seed = seed
        state = torch.get_rng_state()
        ((images, labels),) = loader
        assert torch.get_rng_state().equal(state)  # the model's chance is untouched
        return images[labels.argsort(stable=True)]

    assert epoch(1).equal(epoch(1))
    assert not epoch(1).equal(epoch(2))


@needs_project
def test_the_papers_protocol(tmp_path, monkeypatch) -> None:
    """`train.py --dataset cifar100 --sar-lambda 0.01` on a miniature, one step."""
    write_cifar(tmp_path / "data", archive=True)
    command = "train --dataset cifar100 --sar-lambda 0.01 --device cpu --epochs 1"
    command += f" --batch-size 8 --data-dir {tmp_path}/data --output-dir {tmp_path}/run"
    assert run(monkeypatch, command) == 0
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    settings = argparse.Namespace(**checkpoint["settings"])
    assert (settings.model, settings.img_size, settings.patch_size) == (
        "vit_small",
        224,
        16,
    )
    assert (settings.lr, settings.min_lr, settings.warmup_lr) == (5e-4, 1e-5, 1e-6)
    assert (settings.warmup_epochs, settings.weight_decay, settings.drop_path) == (
        5,
        0.05,
        0.1,
    )
    assert (settings.smoothing, settings.aa, settings.reprob) == (0.1, 9, 0.25)
    assert (settings.mixup, settings.cutmix, settings.crop) == (0.8, 1.0, "resized")
    assert settings.model_ema
    assert not settings.last_skip
    assert train.RECIPES["cifar100"]["epochs"] == 100
    assert len(checkpoint["classes"]) == 100
    assert math.isfinite(checkpoint["log"][1]["train_loss"])


# ---------------------------------------------------------------------- the evaluation


@needs_project
@pytest.mark.parametrize(
    "name, write, count, size",
    [
        ("voc2012", write_voc2012, 2, (40, 60)),
        ("pets", write_pets, 4, (40, 60)),
        ("fashion-mnist", write_fashion_mnist, 10, (28, 28)),
        ("shapes", lambda folder: None, 2000, (56, 56)),
    ],
)
def test_masks_of_data_sets(name, write, count, size, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    write(tmp_path)
    masked = data.load_masks(name, tmp_path, size)
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
    elif name == "shapes":
        assert mask.bool().equal(data.Shapes("test").masks[0])
    else:
        assert mask.bool().equal(image[0] > 0)
    half = (size[0] // 2, size[1] // 2)
    small_image, small_mask = data.load_masks(name, tmp_path, half)[0]
    assert small_mask.equal(mask[1::2, 1::2])  # the nearest pixel, as PIL takes it
    if name in ("voc2012", "pets"):
        bilinear = v2.functional.resize(masked.pair(0)[0], half)
        assert small_image.equal(data.AS_TENSOR(bilinear))


@needs_project
def test_masks_that_are_not_there(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(FileNotFoundError, match="VOCdevkit/VOC2012"):
        data.load_masks("voc2012", tmp_path, (8, 8))
    assert list(tmp_path.iterdir()) == []
    write_voc2012(tmp_path)
    mask = tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "2007_000033.png"
    write_mask(mask, torch.full((40, 60), 21))
    with pytest.raises(ValueError, match=r"2007_000033\.png has 21"):
        data.load_masks("voc2012", tmp_path, (8, 8))[0]
    mask.write_text("no image")
    masked = data.load_masks("voc2012", tmp_path, (8, 8))
    with pytest.raises(OSError, match=r"2007_000033\.jpg .*2007_000033\.png"):
        masked[0]
    assert list(data.unreadable(masked)) == [0]


CLASSES = ["ant", "bee", "cat", "dog", "elk"]


def write_run(path: Path, model=None, **settings) -> None:
    """A checkpoint as train.py writes it, of an untrained `small_model`."""
    model = model or small_model()
    architecture = {"img_size": model.img_size, "patch_size": 8, "num_classes": 5}
    architecture |= {"embed_dim": 32, "depth": 3, "num_heads": 2}
    run_settings = {"model": "vit_mini", "dataset": "folder", "crop": "resized"}
    run_settings |= {"data_dir": str(path.parent), "batch_size": 3, "epochs": 1}
    run_settings |= {"amp": False, "device": "cpu"}
    checkpoint = {
        "architecture": architecture,
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


@needs_project
def test_accuracy_is_that_of_the_logits(tmp_path, monkeypatch) -> None:
    """For any batch size and number of workers, as image by image."""
    write_folder(tmp_path, CLASSES)
    write_run(tmp_path / "run.pt")
    model = small_model()
    transform = data.test_transform((24, 40), crop="resized")
    dataset = data.load_dataset("folder", tmp_path, "test", transform)
    mean, std = data.IMAGENET_MEAN, data.IMAGENET_STD
    normalize = data.normalizer(mean, std, torch.device("cpu"))
    with torch.inference_mode():
        given = [model(normalize(image[None])) for image, _ in dataset]
    logits, maps = (torch.cat(each) for each in zip(*given))
    top1 = 100 * (logits.argmax(1) == dataset.targets).float().mean().item()
    for options in ("", "--batch-size 1", "--batch-size 7 --workers 2"):
        found = numbers(monkeypatch, tmp_path, options)["accuracy"]
        assert found["images"] == 10
        assert found["acc1"] == pytest.approx(top1)
        assert found["acc5"] == 100
        loss = F.cross_entropy(logits, dataset.targets).item()
        assert found["loss"] == pytest.approx(loss, abs=1e-5)
        entropies = spatial_entropy(maps, "none").mean(0)
        assert found["entropy_per_head"] == pytest.approx(entropies.tolist(), abs=1e-5)
        counts = (component_masses(maps) > 0).sum(-1).float().mean(0)
        assert found["components_per_head"] == pytest.approx(counts.tolist())
    assert (found["dataset"], found["split"]) == ("folder", "test")


@needs_project
def test_precision_is_that_of_the_run_on_its_device(tmp_path, monkeypatch) -> None:
    write_folder(tmp_path, CLASSES)
    write_run(tmp_path / "run.pt", amp=True)
    assert numbers(monkeypatch, tmp_path, "")["precision"] == "bfloat16"
    assert numbers(monkeypatch, tmp_path, "--no-amp")["precision"] == "float32"
    write_run(tmp_path / "run.pt", amp=True, device="cuda")
    assert numbers(monkeypatch, tmp_path, "")["precision"] == "float32"


@needs_project
@pytest.mark.parametrize("size", ["48", "16 64"])
def test_accuracy_at_another_size(size, tmp_path, monkeypatch, capsys) -> None:
    write_folder(tmp_path, CLASSES)
    write_run(tmp_path / "run.pt")
    found = numbers(monkeypatch, tmp_path, f"--img-size {size}")["accuracy"]
    height, width = [int(each) for each in size.split()] * (2 if " " not in size else 1)
    assert found["img_size"] == [height, width]
    output = capsys.readouterr().out
    assert f"position embedding resized 3x5 -> {height // 8}x{width // 8}" in output
    model = small_model()
    model.resize((height, width))
    transform = data.test_transform((height, width), crop="resized")
    dataset = data.load_dataset("folder", tmp_path, "test", transform)
    images = torch.stack([image for image, _ in dataset])
    normalize = data.normalizer(
        data.IMAGENET_MEAN, data.IMAGENET_STD, torch.device("cpu")
    )
    with torch.inference_mode():
        logits, _ = model(normalize(images))
    loss = F.cross_entropy(logits, dataset.targets).item()
    assert found["loss"] == pytest.approx(loss, abs=1e-5)


@needs_project
def test_a_crop_covers_the_input(tmp_path: Path) -> None:
    """Without changing the aspect, and as torchvision's own for squares."""
    image = torch.randint(256, (3, 50, 80), dtype=torch.uint8)
    square = data.test_transform(28, crop="resized")(image)
    resized = v2.Resize(32, v2.InterpolationMode.BICUBIC)(image)
    assert square.equal(v2.CenterCrop(28)(resized))
    for size in ((28, 56), (56, 28), (28, 28)):
        cropped = data.test_transform(size, crop="resized")(image)
        assert cropped.shape[1:] == size
        height, width = (side * 256 // 224 for side in size)
        covered = data._cover(height, width, image)
        assert covered.shape[1] == height or covered.shape[2] == width
        assert covered.shape[1] >= height
        assert covered.shape[2] >= width
        aspect = covered.shape[2] / covered.shape[1]
        assert aspect == pytest.approx(80 / 50, rel=0.03)
    center = data.test_transform((20, 40), crop="center")(image)
    assert center.equal(image[:, 15:35, 20:60])
    with pytest.raises(ValueError, match="--crop whole"):
        data.test_transform(64, crop="center")(image)


@needs_project
def test_classes_are_matched_by_name(tmp_path, monkeypatch, capsys) -> None:
    """A subset of the classes: the other logits are left out, and the output says so."""
    folder = tmp_path / "rendition"  # as ImageNet-R's: without train/ and val/
    write_images(folder, (f"{name}/{i}.png" for name in ("bee", "elk") for i in (0, 1)))
    write_run(tmp_path / "run.pt")
    options = f"--dataset folder --data-dir {folder}"
    found = numbers(monkeypatch, tmp_path, options)["accuracy"]
    assert "restricted to its 2 of 5 classes" in capsys.readouterr().out
    transform = data.test_transform((24, 40), crop="resized")
    dataset = data.load_dataset("folder", folder, "test", transform)
    normalize = data.normalizer(
        data.IMAGENET_MEAN, data.IMAGENET_STD, torch.device("cpu")
    )
    with torch.inference_mode():
        images = torch.stack([image for image, _ in dataset])
        logits = small_model()(normalize(images))[0][:, [1, 4]]
    loss = F.cross_entropy(logits, torch.tensor([0, 0, 1, 1])).item()
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    (folder / "yak").mkdir()
    (folder / "bee" / "0.png").rename(folder / "yak" / "0.png")
    command = f"eval --checkpoint {tmp_path}/run.pt --device cpu {options}"
    assert run(monkeypatch, command) == 2
    error = capsys.readouterr().err
    assert "1 of the 3 classes of folder are unknown" in error
    assert error.endswith(": yak\n")


@needs_project
@pytest.mark.parametrize(
    "options",
    [
        {"img_size": 24},
        {"img_size": 24, "last_skip": False},
        {"img_size": 24, "pool": "mean"},
        {"img_size": 24, "num_heads": 4},
        {"img_size": 24, "patch_size": 4},
    ],
)
def test_weights_of_others(options, tmp_path, monkeypatch, capsys) -> None:
    """Those of timm, DeiT and DINO: what --model does not say is read from them."""
    presets = {"embed_dim": 32, "depth": 3, "num_heads": 2}
    monkeypatch.setitem(vit.MODELS, "vit_tiny", presets)
    write_folder(tmp_path, CLASSES)
    model = small_model(**options)
    crop = data.test_transform(model.img_size, crop="resized")
    dataset = data.load_dataset("folder", tmp_path, "test", crop)
    images = torch.stack([image for image, _ in dataset])

    def loss(mean: Sequence[float], std: Sequence[float]) -> float:
        normalize = data.normalizer(mean, std, torch.device("cpu"))
        with torch.inference_mode():
            return F.cross_entropy(model(normalize(images))[0], dataset.targets).item()

    command = f"--model vit_tiny --dataset folder --data-dir {tmp_path}"
    if "num_heads" in options:
        command += f" --num-heads {options['num_heads']}"
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    plain = small_model(img_size=16).state_dict()
    torch.save({"state_dict": plain, "state_dict_ema": wrapped}, tmp_path / "run.pt")
    found = numbers(monkeypatch, tmp_path, f"{command} --model-ema")["accuracy"]
    expected = loss(data.IMAGENET_MEAN, data.IMAGENET_STD)
    assert found["loss"] == pytest.approx(expected, abs=1e-5)
    output = capsys.readouterr().out
    assert "matched by their order" in output
    assert f"taken for vit_tiny, {options.get('num_heads', 2)} heads" in output
    assert "images normalised with mean (0.485, " in output
    torch.save({"model": wrapped}, tmp_path / "run.pt")
    half = " --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25"
    found = numbers(monkeypatch, tmp_path, command + half)
    expected = loss((0.5,) * 3, (0.25,) * 3)
    assert found["accuracy"]["loss"] == pytest.approx(expected, abs=1e-5)
    assert found["mean"] == [0.5, 0.5, 0.5]


@needs_project
def test_weights_of_others_that_are_refused(tmp_path, monkeypatch, capsys) -> None:
    presets = {"embed_dim": 32, "depth": 3, "num_heads": 2}
    monkeypatch.setitem(vit.MODELS, "vit_tiny", presets)
    write_folder(tmp_path, CLASSES)
    write_voc2012(tmp_path)
    weights = small_model(img_size=24).state_dict()
    common = f"--model vit_tiny --dataset folder --data-dir {tmp_path}"

    def refused(options: str, **checkpoint: object) -> str:
        if checkpoint:
            torch.save(checkpoint, tmp_path / "run.pt")
        capsys.readouterr()
        command = f"eval --checkpoint {tmp_path}/run.pt --device cpu {options}"
        assert run(monkeypatch, command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "do so with --model" in refused("", model=weights)
    assert "knows no data set" in refused("--model vit_tiny")
    assert "no vit_small: " in refused(common.replace("vit_tiny", "vit_small"))
    assert "has no EMA weights" in refused(f"{common} --model-ema")
    names = tmp_path / "names.txt"
    names.write_text("one\n")
    command = f"{common} --classes {names}"
    assert "names 1 classes, and the head has 5" in refused(command)
    names.write_text("ant\nbee\ncat\ndog\nbee\n")
    assert "names bee twice" in refused(command)
    assert "its pos_embed is" in refused(common, dist_token=torch.ones(1), **weights)
    assert "has no reg_token" in refused(common, reg_token=torch.ones(1), **weights)
    patches = weights | {"pos_embed": weights["pos_embed"][:, :-1]}
    assert "8 patch positions form no square grid" in refused(common, **patches)
    assert "holds no Vision Transformer" in refused(common, fc=torch.ones(2, 2))
    headless = {f"backbone.{n}": t for n, t in weights.items() if "head" not in n}
    # DINO's: no head, so no accuracy; but attention, and images to draw it on.
    assert "has no head to classify with" in refused(common, teacher=headless)
    options = "--model vit_tiny --segmentation voc2012 --protocol sar --img-size 32 48"
    found = numbers(monkeypatch, tmp_path, f"{options} --data-dir {tmp_path}")
    assert found["segmentation"]["images_with_objects"] == 1
    found = numbers(monkeypatch, tmp_path, f"{common} --attention {tmp_path}/a.png")
    assert "accuracy" not in found
    assert len(found["attention"]["images"]) == 4


@needs_project
def test_named_classes_of_weights_of_others(tmp_path, monkeypatch, capsys) -> None:
    presets = {"embed_dim": 32, "depth": 3, "num_heads": 2}
    monkeypatch.setitem(vit.MODELS, "vit_tiny", presets)
    torch.save(small_model(img_size=24).state_dict(), tmp_path / "run.pt")
    names = tmp_path / "names.txt"
    lines = (f"n0000000{number} {name}, etc.\n" for number, name in enumerate("abcde"))
    names.write_text("".join(lines))
    ids = tmp_path / "ids"
    write_images(ids, ("n00000003/0.png", "n00000001/0.png"))
    command = f"--model vit_tiny --dataset folder --data-dir {ids}"
    found = numbers(monkeypatch, tmp_path, f"{command} --classes {names}")["accuracy"]
    assert found["images"] == 2
    assert "restricted to its 2 of 5 classes" in capsys.readouterr().out
    assert found["matched"] == "logits restricted to its 2 of 5 classes"
    command = f"eval --checkpoint {tmp_path}/run.pt --device cpu {command}"
    assert run(monkeypatch, command) == 2
    assert "--classes names those of the weights" in capsys.readouterr().err


@needs_project
@pytest.mark.parametrize("protocol", ["dino", "sar", "ipvit"])
def test_segmentation_of_voc(protocol, tmp_path, monkeypatch, capsys) -> None:
    """From files to the printed number, at the protocol's input size."""
    torch.manual_seed(0)
    write_voc2012(tmp_path)
    write_run(tmp_path / "run.pt")
    rule = evaluation.PROTOCOLS[protocol]
    table = {protocol: evaluation.Protocol(64, rule.mass, rule.void_counts)}
    monkeypatch.setattr(evaluation, "PROTOCOLS", table)
    options = f"--segmentation voc2012 --protocol {protocol}"
    found = numbers(monkeypatch, tmp_path, options)["segmentation"]
    assert (found["split"], found["protocol"]) == ("val", protocol)
    assert found["img_size"] == [64, 64]
    masked = data.load_masks("voc2012", tmp_path, (64, 64))
    model = small_model()
    model.resize(64)
    normalize = data.normalizer(
        data.IMAGENET_MEAN, data.IMAGENET_STD, torch.device("cpu")
    )
    images, masks = (torch.stack(each) for each in zip(*masked))
    with torch.inference_mode():
        _, maps = model(normalize(images))
    keep = partial(evaluation.mass_mask, mass=rule.mass)
    best, count = slow_segment(maps, masks, keep, rule.void_counts)
    assert found["jaccard_mass"] == pytest.approx(best, abs=1e-3)
    assert (found["images"], found["images_with_objects"], count) == (2, 1, 1)
    output = capsys.readouterr().out
    void = "counted as background" if rule.void_counts else "left out"
    mass = f"{round(100 * rule.mass)} % of the attention"
    size = "64x64 pixels (position embedding resized 3x5 -> 8x8)"
    assert f"protocol {protocol}: input {size}, {mass}, void pixels {void}" in output
    assert f"{best:.2f}" in output


@needs_project
@pytest.mark.parametrize("name", ["pets", "shapes", "fashion-mnist"])
def test_segmentation_of_other_sets(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 8, "test": 8})
    write_pets(tmp_path)
    write_fashion_mnist(tmp_path)
    write_run(tmp_path / "run.pt", dataset="shapes")
    small = {"dino": evaluation.Protocol(64, 0.6, void_counts=False)}
    monkeypatch.setattr(evaluation, "PROTOCOLS", small)
    command = f"--segmentation {name} --attention {tmp_path}/a.png --rows 2"
    found = numbers(monkeypatch, tmp_path, command)["segmentation"]
    assert found["img_size"] == ([64, 64] if name == "pets" else [24, 40])
    assert found["images"] == {"pets": 4, "shapes": 8, "fashion-mnist": 10}[name]
    assert 0 < found["jaccard_mean"] < 100
    assert (tmp_path / "a.png").is_file()


@needs_project
def test_hardware_is_named() -> None:
    """By the log of a run: digits on a CPU depend on which it is."""
    named = evaluation.hardware(torch.device("cpu"))
    processor, threads = re.fullmatch(r"cpu \((.+), (\d+) threads?\)", named).groups()
    assert int(threads) == torch.get_num_threads()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and "model name" in (text := cpuinfo.read_text()):
        assert processor in text


@needs_project
def test_the_newest_checkpoint_is_that_written_last(tmp_path: Path) -> None:
    """However deep it lies: those of the study are in a folder for each setting."""
    for written, name in enumerate(["b", "study/plain-0", "a"]):
        path = tmp_path / name / "checkpoint.pt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (0, written))
    assert evaluation.newest_checkpoint(tmp_path) == tmp_path / "a" / "checkpoint.pt"
    os.utime(tmp_path / "study" / "plain-0" / "checkpoint.pt", (0, 9))
    assert "study" in str(evaluation.newest_checkpoint(tmp_path))


@needs_project
def test_study_of_the_objects_of_others(tmp_path, monkeypatch, capsys) -> None:
    """The Jaccard index less that with the object of the next image."""
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 8, "test": 8})
    run_folder = tmp_path / "shapes-1000" / "plain-3"
    run_folder.mkdir(parents=True)
    write_run(run_folder / "run.pt", dataset="shapes")
    found = numbers(monkeypatch, run_folder, "--segmentation shapes")
    (run_folder / "eval.json").write_text(json.dumps(found))
    capsys.readouterr()
    study = runpy.run_path(str(HERE / ".study" / "study.py"))
    study["others"]([run_folder / "run.pt"])
    record = json.loads(capsys.readouterr().out)
    assert (record["setting"], record["arm"], record["seed"]) == (
        "shapes-1000",
        "plain",
        3,
    )
    masked = data.load_masks("shapes", tmp_path, (24, 40))
    images, masks = (torch.stack(each) for each in zip(*masked))
    source = data.DATASETS["shapes"]
    normalize = data.normalizer(source.mean, source.std, torch.device("cpu"))
    with torch.inference_mode():
        _, maps = small_model()(normalize(images))
    keep = partial(evaluation.mass_mask, mass=0.6)
    other, _ = slow_segment(maps, masks.roll(1, 0), keep, void_counts=False)
    own = found["segmentation"]["jaccard_mass"]
    assert record["mass_other"] == pytest.approx(other, abs=1e-3)
    assert record["mass_own"] == pytest.approx(own - other, abs=1e-3)
    other, _ = slow_segment(
        maps,
        masks.roll(1, 0),
        lambda similarity: threshold_at_mean(similarity) > 0,
        void_counts=False,
    )
    own = found["segmentation"]["jaccard_mean"]
    assert record["foreground_other"] == pytest.approx(other, abs=1e-3)
    assert record["foreground_own"] == pytest.approx(own - other, abs=1e-3)

    asked = []
    monkeypatch.setattr(evaluation, "choose_device", asked.append)
    monkeypatch.setattr(vit, "load_run", lambda _: 1 / 0)
    for changed in ({}, {"device": "NVIDIA H200"}):
        (run_folder / "eval.json").write_text(json.dumps(found | changed))
        with pytest.raises(ZeroDivisionError):
            study["others"]([run_folder / "run.pt"])
    assert asked == ["cpu", "cuda"]
    for key in ("segmentation", "precision", "device"):
        rest = {name: value for name, value in found.items() if name != key}
        (run_folder / "eval.json").write_text(json.dumps(rest))
        with pytest.raises(ValueError, match=f"has no '{key}'"):
            study["others"]([run_folder / "run.pt"])


@needs_project
def test_study_of_masks_that_no_model_made(tmp_path, monkeypatch, capsys) -> None:
    """Each against its slow twin; pixels are all of an object, and one mask fits any."""
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 8, "test": 8})
    write_fashion_mnist(tmp_path)
    study = runpy.run_path(str(HERE / ".study" / "study.py"))
    study["references"](str(tmp_path))
    titles, _, coarse, fine, shapes = capsys.readouterr().out.splitlines()
    columns = titles.split(" | ")[2:]
    firsts = " ".join(column.split()[0] for column in columns)
    assert firsts == "every one the the its"
    assert coarse.startswith("| fashion-mnist | 7x7 | ")
    assert fine.startswith("| fashion-mnist | 14x14 | ")
    cells = [cell.split(", ") for cell in shapes.strip("| ").split(" | ")[2:]]
    every, one, three, patches, pixels = [tuple(map(float, cell)) for cell in cells]
    masks = torch.stack([mask for _, mask in data.load_masks("shapes", "", (56, 56))])
    covered = torch.nn.functional.avg_pool2d(masks[:, None].float(), 8)

    def index(kept: torch.Tensor, masks: torch.Tensor) -> float:
        return slow_segment(kept.float(), masks, lambda scores: scores > 0, False)[0]

    def best(covered: torch.Tensor) -> tuple[float, float]:
        """With the own object, and that less the one with the object before."""
        tried = [(covered > share / 20).float() for share in range(1, 20)]
        own, kept = max(
            ((index(each, masks), each) for each in tried), key=lambda two: two[0]
        )
        return own, own - index(kept, masks.roll(1, 0))

    whole = covered.mean(0, keepdim=True).expand_as(covered)
    assert every == pytest.approx(best(torch.ones_like(covered)), abs=0.1)
    assert one == pytest.approx(best(whole), abs=0.1)
    assert patches == pytest.approx(best(covered), abs=0.1)
    apart = index(masks[:, None].float(), masks.roll(1, 0))
    assert pixels == pytest.approx((100, 100 - apart), abs=0.1)
    assert 100 > patches[0] > three[0] > one[0] > every[0] > 0
    assert every[1] == one[1] == three[1] == 0  # of no object in particular


@needs_project
def test_study_by_the_pixels(tmp_path, capsys) -> None:
    """Images of training are known again; others, which are noise, are not."""
    write_fashion_mnist(tmp_path)
    study = runpy.run_path(str(HERE / ".study" / "study.py"))
    study["linear"](str(tmp_path), (20,))
    assert "20 images, penalty 0.0" in (printed := capsys.readouterr().out)
    assert "100.00" not in printed
    raw = tmp_path / "FashionMNIST" / "raw"
    for part in ("images-idx3", "labels-idx1"):
        shutil.copy(raw / f"train-{part}-ubyte.gz", raw / f"t10k-{part}-ubyte.gz")
        for split in ("train", "t10k"):
            (raw / f"{split}-{part}-ubyte").unlink(missing_ok=True)
    study["linear"](str(tmp_path), (20,))
    assert capsys.readouterr().out.endswith(": 100.00 ± 0.00 %\n")


@needs_project
def test_corruption_means() -> None:
    def errors(by_name: dict[str, Sequence[float]]) -> dict[tuple[str, int], float]:
        return {
            (name, severity): error
            for name, each in by_name.items()
            for severity, error in enumerate(each, start=1)
        }

    alexnet = {name: [error] * 5 for name, error in evaluation.ALEXNET_ERRORS.items()}
    mine = dict.fromkeys(alexnet, [50.0] * 5)
    mine["fog"] = [10.0, 20.0, 30.0, 40.0, 100.0]  # 40 in the mean
    mine["saturate"] = [99.0] * 5  # in no mean
    found = evaluation.corruption_means(errors(mine), True, 1000)
    assert found["mean_error"] == pytest.approx((14 * 50 + 40) / 15)
    assert set(found["mean_over"]) == set(alexnet)
    assert found["ce"]["fog"] == pytest.approx(100 * 40 / 81.9324)
    assert found["mce"] == pytest.approx(statistics.mean(found["ce"].values()))
    extra = errors(
        {"saturate": [10.0], "spatter": [30.0]}
    )  # but by themselves they are
    assert evaluation.corruption_means(extra, False, 10)["mean_error"] == 20
    # AlexNet itself has mCE 100.
    found = evaluation.corruption_means(errors(alexnet), True, 1000)
    assert found["mce"] == pytest.approx(100)
    assert "mce" not in evaluation.corruption_means(errors(alexnet), True, 200)
    del alexnet["snow"]
    found = evaluation.corruption_means(errors(alexnet), True, 1000)
    assert "mce" not in found
    assert found["partial_mce"] == pytest.approx(100)
    with pytest.raises(ValueError, match="severities 1 to 5 of fog; there are 1, 2"):
        evaluation.corruption_means(errors({"fog": [1.0, 1.0]}), True, 1000)
    with pytest.raises(ValueError, match="AlexNet's errors are of"):
        evaluation.corruption_means(errors({"rain": [1.0] * 5}), True, 1000)


@needs_project
def test_corruptions_in_folders(tmp_path, monkeypatch, capsys) -> None:
    """ImageNet-C's layout: images are cropped alone, and classes matched by name."""
    torch.manual_seed(0)
    folder, names = tmp_path / "corrupted", ("fog", "snow", "saturate")
    for name in names:
        for path in (folder / name / str(severity) for severity in range(1, 6)):
            for each in ("dog", "cat", "elk"):
                (path / each).mkdir(parents=True)
                image = F.interpolate(torch.rand(1, 3, 4, 6), (40, 60))[0]
                v2.functional.to_pil_image(image).save(path / each / "0.png")
    model = small_model()
    for module in model.modules():  # without these the pixels decide
        if isinstance(module, torch.nn.LayerNorm):
            module.reset_parameters()
    model.head.bias.data.zero_()
    write_run(tmp_path / "run.pt", model)
    command = f"--corruptions {folder} --mce"
    found = numbers(monkeypatch, tmp_path, command)["corruptions"]
    output = capsys.readouterr().out
    assert "the mean CE of 2 of 15 corruptions and 3 of 1000 classes" in output
    assert "restricted to its 3 of 5 classes" in output
    normalize = data.normalizer(
        data.IMAGENET_MEAN, data.IMAGENET_STD, torch.device("cpu")
    )
    errors = {}
    for crop in ("center", "resized"):
        transform = data.test_transform((24, 40), crop=crop)
        for name in names:
            for severity in range(1, 6):
                path = folder / name / str(severity)
                files = [path / each / "0.png" for each in ("cat", "dog", "elk")]
                images = [transform(data.open_image(file)) for file in files]
                with torch.inference_mode():
                    logits, _ = model(normalize(torch.stack(images)))
                wrong = logits[:, [2, 3, 4]].argmax(1) != torch.arange(3)
                errors[crop, name, severity] = 100 * wrong.float().mean().item()
    cropped = {name: {} for name in names}
    for (crop, name, severity), error in errors.items():
        if crop == "center":
            cropped[name][str(severity)] = pytest.approx(error, abs=1e-4)
    assert found["errors"] == cropped
    assert [*errors.values()][:15] != [*errors.values()][15:]  # else it proves nothing
    assert found["images"]["fog"]["3"] == 3
    assert "partial_mce" in found

    # An image that cannot be read is found late here: what was measured is kept.
    (folder / "snow" / "2" / "dog" / "0.png").write_text("no image")
    command = f"eval --device cpu --checkpoint {tmp_path}/run.pt --corruptions {folder}"
    assert run(monkeypatch, f"{command} --json {tmp_path}/part.json") == 2
    assert "1 of 3 images failed" in capsys.readouterr().err
    assert not (tmp_path / "part.json").exists()  # a complete one would still stand
    part = json.loads((tmp_path / "part.json.incomplete").read_text())
    assert not part["complete"]
    assert part["corruptions"]["errors"]["snow"].keys() == {"1"}
    shutil.rmtree(folder / "fog" / "5")
    assert run(monkeypatch, f"{command} --skip-unreadable") == 0
    output = capsys.readouterr().out
    row = next(line for line in output.splitlines() if line.startswith("fog "))
    assert row.split()[5] == "-"
    assert "1 of 3 images left out: " in output


@needs_project
def test_corruptions_in_arrays(tmp_path, monkeypatch, capsys) -> None:
    """CIFAR-C's layout: severities one after the other."""
    folder = tmp_path / "CIFAR-C"
    folder.mkdir()
    labels = torch.arange(15) % 5
    pixels = torch.randint(256, (15, 32, 32, 3), dtype=torch.uint8)
    numpy.save(folder / "labels.npy", labels.numpy())
    numpy.save(folder / "fog.npy", pixels.numpy())
    write_run(tmp_path / "run.pt", crop="whole")
    found = numbers(monkeypatch, tmp_path, f"--corruptions {folder}")["corruptions"]
    sets = data.load_corruptions(folder, None, None)["fog"]
    assert [len(sets[severity]) for severity in range(1, 6)] == [3] * 5
    assert (sets[2].images == pixels[3:6].numpy()).all()
    assert sets[2].targets.tolist() == [3, 4, 0]
    errors = found["errors"]["fog"].values()
    assert found["mean_error"] == pytest.approx(statistics.mean(errors))
    numpy.save(folder / "labels.npy", labels[:3].numpy())  # once for all severities
    sets = data.load_corruptions(folder, None, None)["fog"]
    assert [each.targets.tolist() for each in sets.values()] == [[0, 1, 2]] * 5
    for wrong in (pixels[:14], pixels.float(), pixels[..., :1]):
        numpy.save(folder / "fog.npy", wrong.numpy())
        with pytest.raises(ValueError, match=r"fog\.npy is not uint8"):
            data.load_corruptions(folder, None, None)
    with pytest.raises(ValueError, match="neither"):
        data.load_corruptions(tmp_path, None, None)
    numpy.save(folder / "fog.npy", pixels.numpy())
    command = f"eval --checkpoint {tmp_path}/run.pt --device cpu --corruptions {folder}"
    numpy.save(folder / "labels.npy", labels.numpy())
    assert run(monkeypatch, f"{command} --mce") == 2
    assert "--mce takes the folders of ImageNet-C" in capsys.readouterr().err
    numpy.save(folder / "labels.npy", labels.numpy() + 5)
    assert run(monkeypatch, command) == 2
    assert "has 5 classes" in capsys.readouterr().err
    # With fifty labels for each severity, there would be one of the last class.
    numpy.save(folder / "fog.npy", pixels.repeat(20, 1, 1, 1)[:250].numpy())
    numpy.save(folder / "labels.npy", (torch.arange(250) % 4).numpy())
    assert run(monkeypatch, command) == 2
    assert "has 5 classes" in capsys.readouterr().err


@needs_project
@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_counted(workers, tmp_path, monkeypatch, capsys) -> None:
    write_folder(tmp_path, CLASSES)
    write_run(tmp_path / "run.pt")
    (tmp_path / "val" / "bee" / "1.png").write_text("no image")
    # A header that promises more pixels than any image has: no OSError in Pillow.
    huge = (
        b"BM" + bytes(8) + struct.pack("<4I2H6I", 54, 40, 10**6, 10**6, 1, 24, *[0] * 6)
    )
    (tmp_path / "val" / "dog" / "0.png").write_bytes(huge)
    options = f"--device cpu --checkpoint {tmp_path}/run.pt --workers {workers}"
    assert run(monkeypatch, f"eval {options} --json {tmp_path}/no.json") == 2
    error = capsys.readouterr().err
    assert "2 of 10 images failed: the image " in error
    assert "--skip-unreadable" in error
    assert "val/bee/1.png" in error
    assert "val/dog/0.png" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "no.json").exists()
    options = f"--workers {workers} --skip-unreadable"
    found = numbers(monkeypatch, tmp_path, options)["accuracy"]
    assert (found["images"], found["left_out"]) == (8, 2)
    assert "2 of 10 images left out: the image " in capsys.readouterr().out
    for name in CLASSES:
        for file in (tmp_path / "val" / name).iterdir():
            file.write_text("no image")
    assert run(monkeypatch, f"eval --checkpoint {tmp_path}/run.pt {options}") == 2
    assert "10 of 10 images failed: the image " in capsys.readouterr().err


@needs_project
def test_the_picture_takes_any_image(tmp_path, monkeypatch, capsys) -> None:
    folder = tmp_path / "images"
    write_images(folder, ("a.png", "more/b.jpg"))
    tall = v2.functional.to_pil_image(torch.rand(1, 90, 30))  # grey
    tall.save(folder / "c.png")
    wide = v2.functional.to_pil_image(torch.rand(3, 9, 200)).convert("RGBA")
    wide.save(folder / "d.png")
    (folder / "notes.txt").write_text("no image, and not taken for one")
    write_run(tmp_path / "run.pt")
    write_run(tmp_path / "other.pt", small_model(img_size=32))
    picture = tmp_path / "picture.png"

    def decode(file: Path) -> torch.Tensor:
        return data.AS_TENSOR(data.open_image(file))

    def draw(options: str) -> int:
        command = f"eval --device cpu --checkpoint {tmp_path}/run.pt {options}"
        return run(monkeypatch, f"{command} --attention {picture} --images {folder}")

    assert draw("") == 0
    alone = decode(picture)
    assert draw(f"--compare {tmp_path}/other.pt") == 0
    both = decode(picture)
    assert both.shape[2] > alone.shape[2]
    assert draw("--rows 1") == 0
    assert decode(picture).shape[1] < alone.shape[1]
    capsys.readouterr()
    before = picture.read_bytes()
    (folder / "b.png").write_text("no image")
    assert draw("") == 2
    assert "1 of 5 images failed: the image " in capsys.readouterr().err
    assert picture.read_bytes() == before
    capsys.readouterr()
    assert draw("--skip-unreadable") == 0
    assert "1 of 5 images left out: " in capsys.readouterr().out  # and 4 are drawn
    shutil.rmtree(folder)
    assert draw("") == 2
    folder.mkdir()
    assert draw("") == 2
    error = capsys.readouterr().err
    assert "there is no folder of images at" in error
    assert "there are no images in" in error


@needs_project
def test_pictures_of_data_with_unreadable_images(tmp_path, monkeypatch, capsys) -> None:
    write_folder(tmp_path, CLASSES)
    write_run(tmp_path / "run.pt")
    for name in CLASSES:
        (tmp_path / "val" / name / "0.png").write_text("no image")
    options = f"--attention {tmp_path}/a.png --rows 5"
    command = f"eval --device cpu --checkpoint {tmp_path}/run.pt {options}"
    assert run(monkeypatch, command) == 2
    assert "images failed: " in capsys.readouterr().err
    found = numbers(monkeypatch, tmp_path, f"{options} --skip-unreadable")
    assert len(found["attention"]["images"]) == found["accuracy"]["images"] == 5
    assert len(found["attention"]["entropy"][0][4]) == 2


@needs_project
def test_compared_models_are_checked(tmp_path, monkeypatch, capsys) -> None:
    presets = {"embed_dim": 32, "depth": 3, "num_heads": 2}
    monkeypatch.setitem(vit.MODELS, "vit_tiny", presets)
    write_folder(tmp_path, CLASSES)
    write_run(tmp_path / "run.pt")
    weights = small_model(img_size=32, patch_size=16).state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    command = f"eval --device cpu --attention {tmp_path}/a.png --rows 1"
    both = f"--checkpoint {tmp_path}/run.pt --compare {tmp_path}/run.pt"
    mixed = f"--checkpoint {tmp_path}/run.pt --compare {tmp_path}/weights.pt"
    errors = {
        f"{both} --model vit_base": "is a vit_mini, not a vit_base",
        f"{both} --num-heads 4": "are for weights of others",
        f"{mixed} --model vit_tiny --classes none": "are for weights of others",
        f"{mixed} --model vit_tiny --img-size 24": "patch size 16 does not divide",
        mixed: "do so with --model",
    }
    for options, message in errors.items():
        assert run(monkeypatch, f"{command} {options}") == 2
        output, error = capsys.readouterr()
        assert message in error
        assert output == ""
    assert run(monkeypatch, f"{command} {mixed} --model vit_tiny") == 0
    assert "was trained on" not in capsys.readouterr().out
    write_run(tmp_path / "other.pt", dataset="shapes")
    options = f"--checkpoint {tmp_path}/run.pt --compare {tmp_path}/other.pt"
    assert run(monkeypatch, f"{command} {options}") == 0
    sentence = (
        f"{tmp_path}/run.pt was trained on folder, {tmp_path}/other.pt on shapes\n"
    )
    assert sentence in capsys.readouterr().out


@needs_project
def test_the_picture_is_of_the_models_maps(tmp_path) -> None:
    """At the size of the model, or one of the image's aspect; normalised as in training."""
    mean, std, device = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), torch.device("cpu")
    model = small_model(img_size=24)
    trained = evaluation.Trained(model, tmp_path, [], {}, None, mean, std)
    normalize = data.normalizer(mean, std, device)
    images = [
        torch.randint(256, (3, *size), dtype=torch.uint8)
        for size in ((24, 24), (50, 72), (10, 200), (24, 24))
    ]
    sizes = [(24, 24), (24, 32), (24, 96), (24, 24)]
    for image, size, found in zip(
        images, sizes, evaluation.look_at(images, trained, None, device)
    ):
        resized = v2.functional.resize(image, size, v2.InterpolationMode.BICUBIC)
        with torch.inference_mode():
            _, expected = trained.at(size)(normalize(resized[None]))
        torch.testing.assert_close(found, expected[0])
    for found in evaluation.look_at(images, trained, (16, 32), device):
        assert found.shape == (2, 2, 4)
    assert model.img_size == (24, 24)


@needs_project
def test_the_picture_shows_what_it_says() -> None:
    """Two components of different mass: their colours, and the text below them."""
    similarity = torch.zeros(1, 6, 6)
    similarity[0, 1:3, 1:3], similarity[0, 4, 4] = 9, 5
    image = torch.full((3, 120, 120), 90, dtype=torch.uint8)
    column, entropy = evaluation.draw_head(image, similarity[0], 0.6)
    assert entropy == pytest.approx(spatial_entropy(similarity).item())
    attention, kept, components = (
        column[:, top : top + 120, :120] for top in (0, 126, 252)
    )
    bright = torch.tensor(evaluation.HEAT[-1], dtype=torch.uint8)
    assert attention[:, 30, 30].equal(bright)
    assert attention[:, 110, 110].tolist() == list(evaluation.HEAT[0])
    assert kept[:, 30, 30].equal(image[:, 0, 0])  # holds the mass: as in the image
    assert kept[:, 90, 90].equal(kept[:, 0, 0])  # does not
    assert not kept[:, 90, 90].equal(image[:, 0, 0])
    first, second = components[:, 30, 30].int(), components[:, 90, 90].int()
    for colour, pixel in zip(evaluation.PALETTE, (first, second)):
        distances = (torch.tensor(evaluation.PALETTE) - pixel).abs().sum(1)
        assert evaluation.PALETTE[distances.argmin()] == colour
    text = column[:, 378:].float().mean(0)
    assert (text < 128).any()  # H and K


@needs_project
def test_progress_is_shown_on_long_runs(monkeypatch, capsys) -> None:
    clock = iter(range(0, 10_000, 50))  # seconds
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: next(clock))
    dataset = torch.utils.data.TensorDataset(torch.zeros(8), torch.zeros(8))
    loader = torch.utils.data.DataLoader(dataset, batch_size=2)
    assert len(list(evaluation.progress(loader))) == 4
    assert (
        capsys.readouterr().out
        == "4 of 8 images, 1:40 left\n8 of 8 images, 0:00 left\n"
    )


@needs_project
def test_results_replace_nothing_else(tmp_path, monkeypatch, capsys) -> None:
    write_folder(tmp_path, CLASSES)
    write_run(tmp_path / "run.pt")
    command = f"eval --device cpu --checkpoint {tmp_path}/run.pt"
    before = (tmp_path / "run.pt").read_bytes()
    assert run(monkeypatch, f"{command} --json {tmp_path}/run.pt") == 2
    assert (tmp_path / "run.pt").read_bytes() == before
    assert run(monkeypatch, f"{command} --json /dev/null") == 2
    both = f"--json {tmp_path}/val/../a.png --attention {tmp_path}/a.png"
    assert run(monkeypatch, f"{command} {both}") == 2
    images = f"--images {tmp_path} --attention {tmp_path}/val/cat/0.png"
    assert run(monkeypatch, f"{command} {images}") == 2
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    assert run(monkeypatch, f"{command} --json {tmp_path}/loop.json") == 2
    assert run(monkeypatch, f"{command} --json {tmp_path}/{'x' * 252}.json") == 2
    (tmp_path / "b.json.partial").write_text("of the user")
    assert run(monkeypatch, f"{command} --json {tmp_path}/b.json") == 2
    assert (tmp_path / "b.json.partial").read_text() == "of the user"
    output, error = capsys.readouterr()
    assert output == ""  # nothing was measured
    assert error.count("\n") == 7
    (tmp_path / "target.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    assert run(monkeypatch, f"{command} --json {tmp_path}/link.json") == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "target.json").read_text())["complete"]


@needs_project
def test_json_has_null_for_what_is_not_finite() -> None:
    given = {"a": [1.0, math.nan], "b": {"c": math.inf}, "d": (2, "e")}
    assert evaluation.finite(given) == {
        "a": [1.0, None],
        "b": {"c": None},
        "d": [2, "e"],
    }


@needs_project
def test_evaluation_benchmark(monkeypatch, capsys) -> None:
    monkeypatch.setattr(evaluation, "BENCHMARK_ROUNDS", 1)
    tiny = {"embed_dim": 8, "depth": 1, "num_heads": 2}
    monkeypatch.setitem(vit.MODELS, "vit_small", tiny)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert run(monkeypatch, "eval --benchmark --device cpu --batch-size 1") == 0
    output = capsys.readouterr().out
    assert "evaluate" in output
    assert "Jaccard index" in output


# ------------------------------------------------------------ attention and objects


@needs_project
@pytest.mark.parametrize(
    "masses, share, kept",
    [
        ([0.5, 0.3, 0.1, 0.1], 0.6, [1, 1, 0, 0]),  # 0.5 is too little, 0.8 enough
        ([0.1, 0.6, 0.2, 0.1], 0.6, [0, 1, 0, 0]),  # exactly enough
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


@needs_project
def test_mass_mask_does_not_depend_on_the_order_of_patches() -> None:
    similarity = torch.randint(4, (50, 3, 6, 8)).float()
    order = torch.randperm(48)
    shuffled = similarity.flatten(-2)[..., order].view(50, 3, 6, 8)
    found = evaluation.mass_mask(similarity, 0.6).flatten(-2)[..., order]
    assert found.equal(evaluation.mass_mask(shuffled, 0.6).flatten(-2))
    mass = similarity.flatten(-2).softmax(-1)
    kept = evaluation.mass_mask(similarity, 0.6).flatten(-2)
    held = (mass * kept).sum(-1)
    assert (held >= 0.6 - 1e-5).all()
    least = mass.where(kept, math.inf).amin(-1, keepdim=True)
    assert ((mass * (mass > least)).sum(-1) < 0.6).all()  # and no fewer would do


# Two patches by two, of two pixels by two. The first head keeps the upper two patches,
# the second the left two.
PATCHES = torch.tensor([[[1, 1], [0, 0]], [[1, 0], [1, 0]]], dtype=torch.bool)
BACKGROUND, ONE, TWO, EDGE = 0, 1, 2, 255
OBJECTS = [
    [ONE, ONE, EDGE, BACKGROUND],
    [ONE, ONE, EDGE, BACKGROUND],
    [EDGE, EDGE, EDGE, TWO],
    [BACKGROUND, BACKGROUND, TWO, TWO],
]


@needs_project
@pytest.mark.parametrize(
    "void_counts, expected",
    [
        # Object 1 has 4 pixels, all kept by both heads. Void left out, the first keeps 6
        # pixels, the second 4 + 2; object 2 has 3 pixels, and neither keeps one of them.
        (False, [[4 / 6, 0], [4 / 6, 0]]),
        (True, [[4 / 8, 0], [4 / 8, 0]]),
    ],
)
def test_jaccard_by_hand(void_counts, expected) -> None:
    masks = torch.tensor([OBJECTS])
    index, there = evaluation.jaccard(PATCHES[None], masks, 3, void_counts)
    assert there.tolist() == [[True, True, False]]
    torch.testing.assert_close(index[0, :, :2], torch.tensor(expected).float())
    assert index[0, :, 2].tolist() == [0, 0]  # no such object
    # Turned upside down, the second head keeps 1 of the 3 pixels of object 2, and 8 in
    # all, 4 void; both keep nothing of what was the upper half.
    index, _ = evaluation.jaccard(PATCHES[None], masks.flip(1), 2, void_counts)
    size = 8 if void_counts else 5
    assert index[0, 0].tolist() == pytest.approx([0, 3 / size])


def slow_segment(maps, masks, keep, void_counts) -> tuple[float, int]:
    """The protocol pixel by pixel, image by image."""
    of_images = []
    for similarity, mask in zip(maps, masks):
        scale = mask.shape[0] // similarity.shape[-2]
        kept = keep(similarity).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        of_objects = []
        for number in set(mask.unique().tolist()) - {BACKGROUND, EDGE}:
            counted = torch.ones_like(mask) if void_counts else mask != EDGE
            of_heads = []
            for head in kept:
                both = head & (mask == number)
                either = (head & (counted > 0)) | (mask == number)
                of_heads.append(both.sum().item() / either.sum().item())
            of_objects.append(max(of_heads))
        if of_objects:
            of_images.append(sum(of_objects) / len(of_objects))
    return 100 * sum(of_images) / len(of_images), len(of_images)


class Maps(torch.nn.Module):
    """A model that gives prepared similarity maps; an image is the number of its map."""

    def __init__(self, maps: torch.Tensor) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(images), 2), self.maps[images[:, 0, 0, 0].long()]


def numbered_images(count: int, size: int) -> torch.Tensor:
    images = torch.zeros(count, 3, size, size, dtype=torch.uint8)
    return images + torch.arange(count, dtype=torch.uint8)[:, None, None, None]


@needs_project
@pytest.mark.parametrize("protocol", ["dino", "sar", "ipvit"])
def test_segment_equals_its_slow_twin(protocol) -> None:
    torch.manual_seed(0)
    rule = evaluation.PROTOCOLS[protocol]
    maps = torch.randn(7, 3, 4, 4)
    masks = torch.randint(5, (7, 12, 12))
    masks[masks == 4] = EDGE
    masks[2] = BACKGROUND  # no object: the image is left out
    masks[3] = EDGE
    masks[4] = masks[4].clamp(max=1)  # one object
    device, images = torch.device("cpu"), numbered_images(7, 12)
    results = []
    for size in (7, 2):
        batches = list(zip(images.split(size), masks.to(torch.uint8).split(size)))
        given = (batches, torch.Tensor.float, device, False, rule, 3)
        results.append(evaluation.segment(Maps(maps), *given))
    torch.testing.assert_close(*results)
    (result, _), heads = results, range(3)
    assert (result["images"], result["images_with_objects"]) == (7, 5)
    rules = {
        "mass": partial(evaluation.mass_mask, mass=rule.mass),
        "mean": lambda similarity: similarity > similarity.mean((-2, -1), keepdim=True),
    }
    for key, keep in rules.items():
        slow = partial(slow_segment, masks=masks, void_counts=rule.void_counts)
        best, count = slow(maps, keep=keep)
        assert count == 5
        assert result[f"jaccard_{key}"] == pytest.approx(best, abs=1e-4)
        each = [slow(maps[:, n : n + 1], keep=keep)[0] for n in heads]
        assert result[f"jaccard_{key}_per_head"] == pytest.approx(each, abs=1e-4)
    expected = spatial_entropy(maps, "none").mean(0)
    assert result["entropy_per_head"] == pytest.approx(expected.tolist(), abs=1e-5)


@needs_project
def test_protocols() -> None:
    table = {
        name: tuple(vars(rule).values()) for name, rule in evaluation.PROTOCOLS.items()
    }
    assert table == {
        "dino": (480, 0.6, False),
        "sar": (480, 0.6, True),
        "ipvit": (512, 0.9, True),
    }


@needs_project
def test_non_finite_scores_have_no_jaccard() -> None:
    maps = torch.randn(2, 3, 4, 4)
    maps[1, 2, 0, 0] = math.nan
    batch = [(numbered_images(2, 8), torch.ones(2, 8, 8).long())]
    given = (torch.Tensor.float, torch.device("cpu"), False)
    rule = evaluation.PROTOCOLS["dino"]
    result = evaluation.segment(Maps(maps), batch, *given, rule, 1)
    assert math.isnan(result["jaccard_mass"])
    assert math.isnan(result["jaccard_mean"])
    none = [(numbered_images(1, 8), torch.zeros(1, 8, 8).long())]
    result = evaluation.segment(Maps(maps), none, *given, rule, 1)
    assert (result["images"], result["images_with_objects"]) == (1, 0)
    assert math.isnan(result["jaccard_mass"])


BAD_INPUT = {
    "train --dataset cifar1000": "invalid choice: 'cifar1000'",
    "train --dataset cifar100 --data-dir nowhere": "nowhere/cifar-100-python",
    "train --dataset folder --data-dir nowhere": "nowhere/train",
    "train --img-size 50": "patch size 8 does not divide the image size 50x50",
    "train --epochs 0": "--epochs",
    "train --pos-std 0": "--pos-std: 0 is not",
    "train --pos-std 2": "--pos-std: 2 is not",
    "train --sar-lambda -1": "--sar-lambda",
    "train --output-dir used": "used already holds a run that cannot be continued; another",
    "train --output-dir new --resume": "no run to resume in new",
    "train --output-dir used --resume": "used/checkpoint.pt is damaged",
    "train --lr inf": "--lr: inf is not finite",
    "train --lr nan": "--lr: nan is not finite",
    "train --lr=-1": "--lr: -1 is not at least 0",
    "train --output-dir used/checkpoint.pt": "used/checkpoint.pt",
    "train --finetune none.pt": "no checkpoint at none.pt",
    "train --dataset cifar100 --finetune none.pt": "no checkpoint at none.pt",
    "train --dataset cifar100 --output-dir used/checkpoint.pt/a": "is not a folder",
    "train --train-size 100000": "100000 images",
    "train --accumulate 9": "--accumulate exceeds an epoch's 2 batches",
    "train --device tpu": "tpu",
    "train --dataset cifar100 --device cuda": "device cuda was asked for",
    "eval": "no checkpoint.pt under runs",
    "eval --checkpoint none.pt": "no checkpoint at none.pt",
    "eval --checkpoint used/checkpoint.pt": "used/checkpoint.pt is damaged",
    "eval --rows 0": "--rows",
    "eval --rows 4": "--rows needs --attention",
    "eval --protocol dino": "--protocol needs --segmentation or --attention",
    "eval --benchmark --img-size 384": "--benchmark is of ViT-S/16 at 224 px, without",
    "eval --attention none/picture.png": "none/picture.png",
    "eval --json none/numbers.json": "none/numbers.json",
    "eval --images used": "--images needs --attention",
    "eval --compare used/checkpoint.pt": "--compare needs --attention",
    "eval --mce": "--mce needs --corruptions",
    "eval --img-size 1 2 3": "--img-size takes one number, or height and width",
    "eval --std 0 0 1": "--std must be above 0",
    "eval --segmentation coco": "invalid choice: 'coco'",
    "eval --model resnet50": "invalid choice: 'resnet50'",
}


def no_network(*_, **__) -> NoReturn:
    raise urllib.error.URLError("no network")


@needs_project
@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input(command: str, tmp_path, monkeypatch, capsys) -> None:
    """One sentence on standard error, exit code not 0, and nothing written."""
    used = tmp_path / "used" / "checkpoint.pt"
    used.parent.mkdir()
    used.write_bytes(b"a run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 80, "test": 40})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    assert run(monkeypatch, command) != 0
    error = capsys.readouterr().err
    assert error.startswith(f"{command.split()[0]}.py: error: ")
    assert BAD_INPUT[command] in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    assert used.read_bytes() == b"a run"
