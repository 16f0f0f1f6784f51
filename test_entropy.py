# SPDX-License-Identifier: MIT
"""What must hold. The first part is the specification of entropy.py and needs that file alone, so
the two can be copied together; the rest is about the model and the scripts, where they are.

    python -m pytest
"""

import math
from pathlib import Path

import pytest
import torch

from entropy import (
    connected_components,
    slow_connected_components,
    slow_spatial_entropy,
    spatial_entropy,
    threshold_at_mean,
)

HERE = Path(__file__).resolve().parent

# ------------------------------------------------------------------------ connected components


def mask_of(text: str) -> torch.Tensor:
    return torch.tensor([[cell == "#" for cell in row] for row in text.split()])


def serpentine(height: int, width: int) -> torch.Tensor:
    """Full rows, joined at alternating ends: one component, as long as the grid allows."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[::2] = True
    mask[1::4, -1] = True
    mask[3::4, 0] = True
    return mask


def spiral(side: int) -> torch.Tensor:
    """A path one pixel wide that winds inwards, with gaps of one pixel: one component."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[0, 0] = True
    y, x, dy, dx = 0, 0, 0, 1
    for length in [side - 1, *(n for n in range(side - 1, 0, -2) for _ in range(2))]:
        for _ in range(length):
            y, x = y + dy, x + dx
            mask[y, x] = True
        dy, dx = dx, -dy
    return mask


def comb(height: int, width: int) -> torch.Tensor:
    """Teeth that meet in the last row only."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[:, ::2] = True
    mask[-1] = True
    return mask


def zigzag(height: int, width: int) -> torch.Tensor:
    """A diagonal that bounces between the sides, held together by corners alone."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    bounce = [*range(width), *range(width - 2, 0, -1)] if width > 1 else [0]
    for y in range(height):
        mask[y, bounce[y % len(bounce)]] = True
    return mask


MASKS = {
    "empty": (torch.zeros(5, 7, dtype=torch.bool), 0),
    "full": (torch.ones(5, 7, dtype=torch.bool), 1),
    "one pixel": (torch.ones(1, 1, dtype=torch.bool), 1),
    "row": (mask_of("##.#.###"), 3),
    "column": (mask_of("##.#.###").T, 3),
    "checkerboard": (mask_of("#.#. .#.# #.#."), 1),
    "diagonal touch": (mask_of("##.. ##.. ..## ..##"), 1),
    "knight's move": (mask_of("#... ..#. #... ..#."), 4),
    "border and centre": (mask_of("##### #...# #.#.# #...# #####"), 2),
    "serpentine": (serpentine(14, 14), 1),
    "long serpentine": (serpentine(57, 41), 1),
    "spiral": (spiral(14), 1),
    "long spiral": (spiral(41), 1),
    "comb": (comb(14, 30), 1),
    "zigzag": (zigzag(57, 9), 1),
    "not square": (mask_of("#..#..#..# #..####..# ##.......#"), 3),
}


def assert_same_components(labels: torch.Tensor, mask: torch.Tensor) -> None:
    """The labels name the same components as a flood fill, whatever their numbers."""
    assert labels.shape == mask.shape
    assert labels.dtype == torch.int64
    expected = slow_connected_components(mask)
    height, width = mask.shape[-2:]
    for got, want in zip(
        labels.reshape(-1, height * width), expected.view(-1, height * width)
    ):
        pairs = torch.stack((got, want)).unique(dim=1)
        assert (got > 0).equal(want > 0)
        assert len(pairs[0].unique()) == len(pairs[1].unique()) == pairs.shape[1]


@pytest.mark.parametrize("name", MASKS)
def test_named_masks(name: str) -> None:
    mask, count = MASKS[name]
    labels = connected_components(mask)
    assert_same_components(labels, mask)
    assert len(labels[mask].unique()) == count
    # A label is 1 + the raster index of a pixel of its own component.
    own = torch.arange(1, mask.numel() + 1).view(mask.shape)
    assert labels[mask].unique().equal(own[labels == own])


@pytest.mark.parametrize("height, width", [(4, 4), (3, 5), (2, 8), (1, 12), (12, 1)])
def test_every_mask_of_a_small_grid(height: int, width: int) -> None:
    pixels = height * width
    masks = (torch.arange(2**pixels)[:, None] >> torch.arange(pixels) & 1).bool()
    labels = connected_components(masks.view(-1, height, width)).flatten(1)
    y, x = torch.arange(pixels) // width, torch.arange(pixels) % width
    touch = ((y[:, None] - y).abs() <= 1) & ((x[:, None] - x).abs() <= 1)
    for mask, label in zip(masks.split(8192), labels.split(8192)):
        # Which pixels reach which: adjacency, squared until paths of any length are in it.
        reach = (touch & mask[:, :, None] & mask[:, None, :]).float()
        for _ in range(pixels.bit_length()):
            reach = (reach @ reach > 0).float()
        same = (label[:, :, None] == label[:, None, :]) & mask[:, :, None]
        assert same.equal(reach > 0)
        assert (label > 0).equal(mask)


@pytest.mark.parametrize(
    "height, width", [(14, 14), (30, 30), (57, 41), (1, 50), (7, 3)]
)
def test_random_masks(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # 0.41 is about where random 8-connected clusters first span the grid.
    for density in (0.2, 0.41, 0.6):
        masks = torch.rand(3, 4, height, width, generator=generator) < density
        assert_same_components(connected_components(masks), masks)


def test_labelling_takes_any_layout() -> None:
    masks = torch.rand(9, 11, 2, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    masks = masks.permute(3, 2, 0, 1)  # not contiguous
    assert connected_components(masks).equal(connected_components(masks.contiguous()))
    for shape in ((0, 4, 4), (2, 0, 3), (2, 3, 0)):
        labels = connected_components(torch.zeros(shape, dtype=torch.bool))
        assert labels.shape == shape


def test_without_early_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixed number of rounds that other devices run suffices, for the worst masks we know."""
    masks = [mask for mask, _ in MASKS.values()]
    masks += list(
        torch.rand(50, 30, 30, generator=torch.Generator().manual_seed(0)) < 0.41
    )
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for mask in masks:
        assert_same_components(connected_components(mask), mask)


def test_labelling_refuses_what_is_no_mask() -> None:
    with pytest.raises(TypeError, match="float32"):
        connected_components(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        connected_components(torch.zeros(3, dtype=torch.bool))


# ------------------------------------------------------------------------------ spatial entropy


def random_maps(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (5, 8), (14, 14), (23, 10)])
def test_equals_the_slow_twin(height: int, width: int) -> None:
    similarity = random_maps(4, 3, height, width).requires_grad_()
    fast = spatial_entropy(similarity, reduction="none")
    slow = slow_spatial_entropy(similarity)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    weights = random_maps(4, 3)
    fast, slow = (
        torch.autograd.grad((weights * entropy).sum(), similarity)[0]
        for entropy in (fast, slow)
    )
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        spatial_entropy(similarity), slow_spatial_entropy(similarity).mean()
    )


@pytest.mark.parametrize("blobs", [1, 2, 3, 8])
def test_equal_blobs(blobs: int) -> None:
    similarity = torch.zeros(4, 3 * blobs)
    similarity[1:3, ::3] = 1.0
    entropy = spatial_entropy(similarity).item()
    assert (
        entropy == 0.0
        if blobs == 1
        else math.isclose(entropy, math.log(blobs), rel_tol=1e-6)
    )


def test_unequal_blobs() -> None:
    similarity = torch.tensor(
        [[8.0, 0.0, 4.0, 0.0, 0.0, 0.0]]
    )  # mean 2: masses 6 and 2
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert math.isclose(spatial_entropy(similarity).item(), expected, rel_tol=1e-6)


def test_threshold_is_the_mean_and_strict() -> None:
    similarity = torch.tensor([[3.0, 1.0, 1.0, 1.0, -1.0]])  # mean 1
    assert threshold_at_mean(similarity).tolist() == [[2.0, 0.0, 0.0, 0.0, 0.0]]


def test_gradient() -> None:
    similarity = random_maps(2, 2, 4, 5, dtype=torch.float64)
    distance = similarity - similarity.mean((-2, -1), keepdim=True)
    assert (
        distance.abs().min() > 1e-3
    )  # so that gradcheck's steps do not cross the threshold
    similarity.requires_grad_()
    assert torch.autograd.gradcheck(spatial_entropy, similarity)
    assert torch.autograd.gradcheck(lambda s: spatial_entropy(s, "none"), similarity)


def test_invariances() -> None:
    similarity = random_maps(3, 4, 6, 9, dtype=torch.float64)
    entropy = spatial_entropy(similarity, "none")
    for same in (
        similarity + 7,
        similarity * 3,
        similarity.flip(-1),
        similarity.flip(-2),
        similarity.transpose(-2, -1),
    ):
        torch.testing.assert_close(spatial_entropy(same, "none"), entropy)
    permuted = spatial_entropy(similarity[[2, 0, 1]][:, [3, 1, 0, 2]], "none")
    torch.testing.assert_close(permuted, entropy[[2, 0, 1]][:, [3, 1, 0, 2]])


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e4, 1e-6])
def test_constant_maps(value: float) -> None:
    similarity = torch.full((2, 3, 14, 14), value, requires_grad=True)
    entropy = spatial_entropy(similarity, "none")
    entropy.sum().backward()
    assert entropy.tolist() == [[0.0] * 3] * 2
    assert similarity.grad.count_nonzero() == 0
    assert threshold_at_mean(similarity).count_nonzero() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_scores_give_nan(value: float) -> None:
    similarity = random_maps(2, 5, 5)
    similarity[0, 2, 2] = value
    entropy = spatial_entropy(similarity, "none")
    assert entropy[0].isnan()
    assert entropy[1].isfinite()
    assert spatial_entropy(similarity).isnan()


@pytest.mark.parametrize("scale", [1e4, 1e-6])
def test_extreme_scales_stay_finite(scale: float) -> None:
    similarity = (random_maps(2, 3, 14, 14) * scale).requires_grad_()
    entropy = spatial_entropy(similarity)
    entropy.backward()
    assert entropy.isfinite()
    assert similarity.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    similarity = random_maps(2, 3, 7, 7).to(dtype)
    expected = spatial_entropy(similarity.float())
    assert spatial_entropy(similarity).equal(expected)
    with torch.autocast("cpu", torch.bfloat16):
        entropy = spatial_entropy(similarity)
    assert entropy.dtype == torch.float32
    assert entropy.equal(expected)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="'sum'"):
        spatial_entropy(torch.zeros(3, 3), "sum")
    with pytest.raises(TypeError, match="int64"):
        spatial_entropy(torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        spatial_entropy(torch.zeros(3))
    with pytest.raises(ValueError, match=r"\(2, 0, 3\)"):
        spatial_entropy(torch.zeros(2, 0, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_equals_cpu_without_waiting_for_the_device() -> None:
    similarity = random_maps(16, 6, 14, 14)
    on_device = similarity.cuda().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        entropy = spatial_entropy(on_device)
        entropy.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(entropy.cpu(), spatial_entropy(similarity))
