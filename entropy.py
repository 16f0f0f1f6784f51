# SPDX-License-Identifier: MIT
"""Spatial entropy: a loss that makes attention cluster into few connected regions.

From Peruzzo et al., "Spatial Entropy as an Inductive Bias for Vision Transformers"
(arXiv 2206.04636), in the details that the authors' code settles
(https://github.com/helia95/SAR). For one image and one head of the last block:

    (1)  S[x,y] = <q_cls, k[x,y]> / sqrt(head_dim)   similarity map, before any softmax
    (2)  A = ReLU(S - m),  m = mean of S             the foreground is where S > m
    (3)  C_1 .. C_K = connected components of the foreground, 8-connectivity
    (4)  P_n = sum of A over C_n / sum of A          probability of component n
    (5)  H(S) = - sum_n P_n ln P_n                   in nats; one component gives 0
    (6)  L = L_classification + lambda * mean of H over images and heads

    S similarity    A activation    C labels    P probability    H entropy
    lambda is up to the training loop: 0.01 in the paper, warmed up and decayed.

Usage, in anyone's training loop:

    from entropy import spatial_entropy
    similarity = ...  # (B, heads, H, W): CLS query times patch keys over sqrt(head_dim)
    loss = criterion(logits, target) + 0.01 * spatial_entropy(similarity)
    loss.backward()

What differs from the authors' code: any grid instead of 14x14; components are found by
tensor operations where the input lies instead of by a loop of OpenCV calls on the CPU;
a batch of constant maps gives 0 instead of an exception; a non-finite score gives NaN
instead of a term that is left out; no 1e-9 is added to A.

This file needs torch alone. To check and time it: python entropy.py [--device cuda]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F


def connected_components(mask: torch.Tensor) -> torch.Tensor:
    """Label the 8-connected components of a batch of masks: exactly, any mask, any size.

    Args:
        mask: bool (..., H, W), any leading dimensions.

    Returns:
        int64 (..., H, W): 0 on the background, elsewhere 1 + the largest raster index
        y * W + x in the pixel's component; so numbers are positive, tell the components
        of a map apart, and have gaps.

    Raises:
        TypeError: mask is not bool.
        ValueError: mask has fewer than two dimensions.

    Method: every pixel starts with 1 + its raster index as label; the pixels with the
    same label are a class. A round (a) finds for each pixel the largest label in its
    3x3 neighbourhood, (b) points each class to the largest label its pixels found
    (hooking: a scatter-max into a table of labels), and (c) follows the pointers to
    their ends by squaring the table (pointer jumping). Thus a class takes the label of
    a class that is larger than all classes it touches.

    Why the rounds of `_rounds` suffice: labels only grow and never leave their
    component. The labels that survive the first round are those of pixels larger than
    their neighbours. No two of these touch, so a 2x2 block holds at most one, and a
    component has at most c = ceil(H / 2) * ceil(W / 2) classes. From then on, two
    rounds at least halve the classes of an unfinished component. Let r be a label that
    survives both. If the pointers of another class ended at r in the first round, r now
    holds two of the old classes or more. If not, each class s that touches r pointed to
    a label t > r, and ended at t or above; then r touches something larger in the
    second round and does not survive it, a contradiction. That makes 1 + 2 *
    floor(log2(c)) rounds, 11 for 14x14. With at most k classes the pointers form chains
    of at most k - 1 links, which ceil(log2(k - 1)) squarings follow to the end.

    On the CPU the loop ends when a round changes nothing. Elsewhere it runs all rounds,
    because to ask would make the host wait for the device.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")
    if mask.dim() < 2:
        raise ValueError(f"mask must have shape (..., H, W), got {tuple(mask.shape)}")
    if mask.numel() == 0:
        return torch.zeros_like(mask, dtype=torch.int64)
    shape = mask.shape
    height, width = shape[-2:]
    pixels = height * width
    stop_early = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    # Older MPS has no maximum of integers here; float32 is exact up to 2^24 pixels.
    table_type = torch.float32 if mask.device.type == "mps" else torch.int64

    mask = mask.reshape(-1, height, width)  # (M, H, W)
    labels = torch.arange(1, pixels + 1, device=mask.device).view(height, width) * mask
    for classes in _rounds(height, width):
        largest = _largest_neighbour(labels) * mask  # (a)
        if stop_early and torch.equal(largest, labels):
            break
        # (b) Old label -> new; 0 -> 0.
        table = torch.zeros(len(mask), pixels + 1, device=mask.device, dtype=table_type)
        largest = largest.flatten(1).to(table_type)
        table = table.scatter_reduce(1, labels.flatten(1), largest, "amax").long()
        for _ in range((classes - 2).bit_length()):  # (c)
            table = table.gather(1, table)
        labels = table.gather(1, labels.flatten(1)).view_as(mask)
    return labels.view(shape)


def _rounds(height: int, width: int) -> list[int]:
    """For each round of the labelling, the most classes a component can then have."""
    classes = ((height + 1) // 2) * ((width + 1) // 2)
    bounds = [height * width]
    while classes > 1:
        bounds += [classes, classes]
        classes //= 2
    return bounds


def _largest_neighbour(labels: torch.Tensor) -> torch.Tensor:
    """Maximum over 3x3 neighbourhoods, itself included: (M, H, W) -> (M, H, W)."""
    x = F.pad(labels, (1, 1, 1, 1))
    x = x[:, :, :-2].maximum(x[:, :, 1:-1]).maximum(x[:, :, 2:])
    return x[:, :-2].maximum(x[:, 1:-1]).maximum(x[:, 2:])


def threshold_at_mean(similarity: torch.Tensor) -> torch.Tensor:
    """Equation (2), A = ReLU(S - m). The foreground is `threshold_at_mean(S) > 0`.

    Args:
        similarity: floating point (..., H, W), scores before softmax.

    Returns:
        (..., H, W), float64 for float64 input and float32 for every other;
        non-negative.

    Raises:
        TypeError: similarity is not floating point.
        ValueError: similarity has fewer than two dimensions, or H or W is 0.
    """
    if not similarity.is_floating_point():
        raise TypeError(f"similarity must be floating point, got {similarity.dtype}")
    if similarity.dim() < 2 or 0 in similarity.shape[-2:]:
        raise ValueError(
            f"similarity must be (..., H, W), got {tuple(similarity.shape)}"
        )
    if similarity.dtype != torch.float64:
        similarity = similarity.float()
    # One of the map's own scores is subtracted first, which cancels in S - m. It makes
    # the mean of a constant map exact: rounding cannot lift such a map above its own
    # mean.
    shifted = similarity - similarity[..., :1, :1].detach()
    excess = shifted - shifted.mean((-2, -1), keepdim=True)
    return excess * (excess > 0)  # ReLU, but for -inf, which must not pass for 0


def spatial_entropy(similarity: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Spatial entropy of similarity maps in nats, by equations (2) to (6).

    Args:
        similarity: floating point (..., H, W), such as (B, heads, H, W): scores before
            softmax.
        reduction: "mean" over all maps, or "none".

    Returns:
        A scalar, or (...) with reduction="none"; float64 for float64 input, else
        float32, also under autocast. 0 for a map of one component and for a constant
        map, which has none; NaN for a map with a non-finite score. Gradients flow
        through everything but the labelling, the mean included.

    Raises:
        TypeError: similarity is not floating point.
        ValueError: similarity has fewer than two dimensions, an empty grid, or an
            unknown reduction.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    activation = threshold_at_mean(similarity)  # (2)
    labels = connected_components(activation.detach() > 0)  # (3)
    labels, activation = labels.flatten(-2), activation.flatten(-2)  # (..., H * W)
    # (4) The mass of each component, in the slot of its label. Slot 0 takes the
    # background, which adds 0, or the NaN of a map with a non-finite score.
    mass = activation.new_zeros(*activation.shape[:-1], activation.shape[-1] + 1)
    mass = mass.scatter_add(-1, labels, activation)
    total = mass.sum(-1, keepdim=True)
    probability = mass / total.where(total != 0, 1)
    # (5) with ln 1 for the ln 0 of empty slots, and 0 - x, as -x would make 0 into -0.
    surprise = 0 - probability.where(probability > 0, 1).log()
    entropy = (probability * surprise).sum(-1) + 0 * total.squeeze(-1)  # inf gives NaN
    return entropy.mean() if reduction == "mean" else entropy  # (6)


def slow_connected_components(mask: torch.Tensor) -> torch.Tensor:
    """`connected_components` by flood fill, pixel by pixel; for tests."""
    labels = torch.zeros(mask.shape, dtype=torch.int64)
    *_, height, width = mask.shape
    for one, out in zip(
        mask.reshape(-1, height, width), labels.view(-1, height, width)
    ):
        for y, x in one.nonzero().tolist():
            stack = [(y, x)] if out[y, x] == 0 else []
            number = 1 + y * width + x
            while stack:
                y, x = stack.pop()
                if 0 <= y < height and 0 <= x < width and one[y, x] and out[y, x] == 0:
                    out[y, x] = number
                    stack += [
                        (y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)
                    ]
    return labels


def slow_spatial_entropy(similarity: torch.Tensor) -> torch.Tensor:
    """`spatial_entropy(reduction="none")`, map by map, as the equations stand."""
    *leading, height, width = similarity.shape
    entropies = []
    for S in similarity.reshape(-1, height, width):
        A = F.relu(S - S.mean())
        C = slow_connected_components(S > S.mean())
        P = [A[C == n].sum() / A.sum() for n in C[C > 0].unique()]
        entropies.append(sum((-p * p.log() for p in P), start=S.sum() * 0))
    return torch.stack(entropies).view(leading)


def main() -> None:
    """Check the loss against its slow twin, then print a table of timings."""
    parser = argparse.ArgumentParser(description="Check and time the spatial entropy.")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    name = parser.parse_args().device
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        parser.exit(2, f"entropy.py: error: PyTorch finds no device {name} here\n")

    torch.manual_seed(0)
    grids = ((1, 1), (1, 9), (5, 7), (14, 14), (31, 17))
    for height, width in grids:
        similarity = torch.randn(20, 3, height, width)
        fast = spatial_entropy(similarity.to(device), "none").cpu()
        error = (fast - slow_spatial_entropy(similarity)).abs().max().item()
        if not error < 1e-5:
            sys.exit(f"entropy.py: error: {height}x{width} maps are off by {error}")
    print(f"equal to the slow twin: {60 * len(grids)} maps of {len(grids)} grids")

    hardware = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    print(f"{device} ({hardware}), {torch.get_num_threads()} CPU threads, ", end="")
    print(f"torch {torch.__version__}; 768 maps (128 images, 6 heads), median of 20")
    print(f"{'grid':>8}{'labelling':>14}{'loss':>14}{'with gradient':>16}")
    for side in (7, 14, 28, 56):
        similarity = torch.randn(128, 6, side, side, device=device)
        mask = threshold_at_mean(similarity) > 0
        leaf = similarity.clone().requires_grad_()
        columns = (
            partial(connected_components, mask),
            partial(spatial_entropy, similarity),
            lambda leaf=leaf: spatial_entropy(leaf).backward(),
        )
        row = [f"{1e3 * _seconds(column, device):11.2f} ms" for column in columns]
        print(f"{side:>5}x{side:<2}{row[0]}{row[1]}{row[2]:>16}")


def _seconds(function: Callable, device: torch.device, repeats: int = 20) -> float:
    """Median time of a call, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
