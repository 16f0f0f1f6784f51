# SPDX-License-Identifier: MIT
"""Spatial entropy: a loss that makes attention cluster into few connected regions.

From Peruzzo et al., "Spatial Entropy as an Inductive Bias for Vision Transformers"
(arXiv 2206.04636); what the paper leaves open is as in the authors' code,
https://github.com/helia95/SAR. For one image and one head of the last block:

    (1)  S[x,y] = <q_cls, k[x,y]> / sqrt(head_dim)   similarity map, before any softmax
    (2)  A = ReLU(S - m),  m = mean of S             the foreground is where S > m
    (3)  C_1 .. C_K = connected components of the foreground, 8-connectivity
    (4)  P_n = sum of A over C_n / sum of A          probability of component n
    (5)  H(S) = - sum_n P_n ln P_n                   in nats; one component gives 0
    (6)  L = L_classification + lambda * mean of H over images and heads

    S similarity    A activation    C labels    P probability    H entropy
    lambda is up to the training loop: 0.01 in the paper, warmed up and decayed.

Usage, in anyone's training loop, with the queries and keys (B, heads, N, head_dim) of
the last attention layer:

    from entropy import similarity_maps, spatial_entropy
    similarity = similarity_maps(query, key)  # (B, heads, H, W)
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


def similarity_maps(
    query: torch.Tensor,
    key: torch.Tensor,
    grid: tuple[int, int] | None = None,
    *,
    prefix_tokens: int = 1,
    pool: str = "cls",
) -> torch.Tensor:
    """Equation (1) from the queries and keys of a self-attention layer.

    Args:
        query, key: floating point (B, heads, N, head_dim), N = prefix_tokens + H * W:
            as they enter the product, after any norm or rotation.
        grid: (H, W), in patches; None for a square.
        prefix_tokens: how many tokens stand before the patches: CLS, which is the
            first, distillation, registers.
        pool: "cls", the scores of the CLS query; or "mean", for models that have none:
            the mean of the scores of all patches' queries.

    Returns:
        (B, heads, H, W), float64 for float64 input, else float32, also under autocast.

    Raises:
        TypeError: query or key is not floating point.
        ValueError: the tokens are not prefix_tokens and a grid, the shapes of query and
            key differ, or pool is unknown or asks for a CLS token that is not there.
    """
    if not (query.is_floating_point() and key.is_floating_point()):
        types = f"{query.dtype} and {key.dtype}"
        raise TypeError(f"query and key must be floating point, got {types}")
    if query.dim() != 4 or query.shape != key.shape:
        shapes = f"{tuple(query.shape)} and {tuple(key.shape)}"
        raise ValueError(f"query and key must both be (B, heads, N, d), got {shapes}")
    if pool not in ("cls", "mean"):
        raise ValueError(f'pool must be "cls" or "mean", got {pool!r}')
    if pool == "cls" and prefix_tokens < 1:
        raise ValueError('pool="cls" needs a CLS token; without one use pool="mean"')
    tokens = query.shape[2]
    patches = tokens - prefix_tokens
    side = int(max(patches, 0) ** 0.5)
    height, width = (side, side) if grid is None else grid
    if height < 1 or width < 1 or height * width != patches:
        wanted = "a square, so give the grid" if grid is None else f"{height} x {width}"
        raise ValueError(
            f"{tokens} tokens, {prefix_tokens} of them before the patches, leave "
            f"{patches} patches, which are not {wanted}"
        )
    precise = torch.promote_types(query.dtype, torch.float32)
    key = key[:, :, prefix_tokens:]  # (B, heads, H * W, d)
    if pool == "cls":
        query = query[:, :, :1]
    else:  # the mean of the rows <q_i, k> is <mean of q_i, k>
        query = query[:, :, prefix_tokens:].mean(2, keepdim=True, dtype=precise)
    # No matrix product: autocast and TF32 would take it with 8 or 10 bits, and many scores
    # would fall on the wrong side of their mean.
    query = query.to(precise) * query.shape[-1] ** -0.5
    return (query * key.to(precise)).sum(-1).unflatten(-1, (height, width))


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
    mean = shifted.mean((-2, -1), keepdim=True)
    mean = mean + 0 * mean.detach()  # an infinite mean is NaN, which passes the ReLU
    return shifted.add_(-mean).relu_()  # in place, as memory is what this waits for


def connected_components(mask: torch.Tensor) -> torch.Tensor:
    """Label the 8-connected components of a batch of masks: exactly, any mask, any size.

    Args:
        mask: bool (..., H, W), any leading dimensions.

    Returns:
        int64 (..., H, W): 0 on the background, elsewhere 1 + the raster index of the
        last 2x2 block with a pixel of the component. So numbers tell the components of
        a map apart, have gaps, and are at most ceil(H / 2) * ceil(W / 2).

    Raises:
        TypeError: mask is not bool.
        ValueError: mask has fewer than two dimensions.

    Method: the pixels of a 2x2 block all touch, so blocks are labelled instead, a
    quarter as many. Two blocks are linked where a foreground pixel of one touches one
    of the other. Each block starts with its own label; blocks with the same label are a
    class. A round (a) finds for each block the largest label among itself and the
    blocks linked to it, (b) points each class to the largest label its blocks found
    (hooking: a scatter-max into a table of labels), and (c) follows the pointers to
    their ends by squaring the table (pointer jumping). Thus a class takes a label that
    is at least as large as those of all classes it touches.

    Why the rounds of `_rounds` suffice: labels only grow and never leave their
    component, and two rounds at least halve the classes of an unfinished component:
    let r be a label that survives both. If the pointers of another class ended at r in
    the first round, r now holds two of the old classes or more. If not, each class that
    touches r pointed to a label larger than r, and ended there or above; then r touches
    something larger in the second round and does not survive it, a contradiction. A
    component starts with at most c = ceil(H / 2) * ceil(W / 2) classes, so
    2 * floor(log2(c)) rounds are enough: 10 for 14x14. The pointers of k classes form
    chains of at most k - 1 links, and n squarings reach 2^n links far.

    On the CPU the loops end when a step changes nothing, also inside `torch.compile`.
    Elsewhere they run to these bounds, because to ask would make the host wait for the
    device.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")
    if mask.dim() < 2:
        raise ValueError(f"mask must have shape (..., H, W), got {tuple(mask.shape)}")
    if mask.numel() == 0:
        return torch.zeros_like(mask, dtype=torch.int64)
    maps = mask.reshape(-1, *mask.shape[-2:])  # (M, H, W)
    on_cpu = mask.device.type == "cpu"
    if on_cpu and torch.compiler.is_compiling():
        return _label_as_one_operator(maps).view(mask.shape)
    return _label(maps, stop_early=on_cpu).view(mask.shape)


def spatial_entropy(similarity: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Spatial entropy of similarity maps in nats, by equations (2) to (6).

    Args:
        similarity: floating point (..., H, W), such as (B, heads, H, W): scores before
            softmax.
        reduction: "mean" over all maps, or "none".

    Returns:
        A scalar, or (...) with reduction="none"; float64 for float64 input, else
        float32, also under autocast. 0 for a map of one component and for a constant
        map, which has none; NaN for a map with a non-finite score, or with scores whose
        sum is not finite, and for the mean of no maps. Gradients flow through
        everything but the labelling, the mean included.

    Raises:
        TypeError: similarity is not floating point.
        ValueError: similarity has fewer than two dimensions, an empty grid, or an
            unknown reduction.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    activation = threshold_at_mean(similarity)  # (2)
    labels = connected_components(activation.detach() > 0)  # (3)
    height, width = similarity.shape[-2:]
    most = ((height + 1) // 2) * ((width + 1) // 2)  # the largest label there can be
    labels, activation = labels.flatten(-2), activation.flatten(-2)  # (..., H * W)
    # (4) The mass of each component, in the slot of its label. Slot 0 takes the
    # background, which adds 0, or the NaN of a map with a non-finite score.
    mass = activation.new_zeros(*activation.shape[:-1], most + 1)
    mass = mass.scatter_add(-1, labels, activation)
    total = mass.sum(-1, keepdim=True)
    probability = mass / total.where(total != 0, 1)
    # (5) With the smallest normal number for 0 in the logarithm, as 0 ln 0 is 0. The first
    # term is 0, or NaN if the total is infinite.
    log_probability = probability.clamp(min=torch.finfo(mass.dtype).tiny).log()
    entropy = 0 * total.squeeze(-1) - (probability * log_probability).sum(-1)
    return entropy.mean() if reduction == "mean" else entropy  # (6)


# ------------------------------------------------- how the components are labelled

# Pixels that are labelled at a time on the CPU: few enough for its caches.
CPU_PART = 160_000


def _blocks(maps: torch.Tensor) -> tuple[int, int, torch.dtype]:
    """Rows and columns of 2x2 blocks in (M, H, W), and the smallest type that holds
    their labels, as it is the fastest.
    """
    rows, columns = (maps.shape[1] + 1) // 2, (maps.shape[2] + 1) // 2
    return rows, columns, torch.int16 if rows * columns < 2**15 else torch.int32


def _rounds(blocks: int) -> list[int]:
    """For each round of the labelling, the most classes a component can then have."""
    bounds = []
    while blocks > 1:
        bounds += [blocks, blocks]
        blocks = blocks // 2
    return bounds


def _label(maps: torch.Tensor, stop_early: bool) -> torch.Tensor:
    """`connected_components` of bool (M, H, W), with M, H and W at least 1.

    To stop early is to end a loop when a step changes nothing, for which the host must
    see the data. A part of the maps at a time then needs only its own rounds.
    """
    number, height, width = maps.shape
    parts = maps.chunk(-(-maps.numel() // CPU_PART)) if stop_early else [maps]
    labels = torch.cat([_label_blocks(part, stop_early) for part in parts])
    _, columns, _ = _blocks(maps)
    y = torch.arange(height, device=maps.device)[:, None] // 2
    x = torch.arange(width, device=maps.device) // 2
    block = (y * (columns + 1) + x).flatten()  # of each pixel
    labels = labels.gather(1, block.expand(number, -1)) * maps.flatten(1)
    return labels.long().view_as(maps)


def _label_blocks(maps: torch.Tensor, stop_early: bool) -> torch.Tensor:
    """The rounds of `connected_components`, for bool (M, H, W).

    Returns:
        The label of each 2x2 block, (M, (rows + 1) * (columns + 1)): with a row and a
        column of empty blocks, whose label is 0, as in `_links`.
    """
    rows, columns, label_type = _blocks(maps)
    # Older MPS has no maximum of integers in (b); float32 is exact up to 2^24 blocks.
    table_type = torch.float32 if maps.device.type == "mps" else torch.int64
    margin, links = _links(maps)
    labels = torch.arange(1, rows * columns + 1, device=maps.device)
    labels = F.pad(labels.view(rows, columns), (0, 1, 0, 1)).flatten()
    labels = labels.repeat(maps.shape[0], 1)
    for most_classes in _rounds(rows * columns):
        # (a)
        before = largest = labels.flatten().to(label_type)
        around = F.pad(before, (margin, margin))
        for neighbour, linked in links:
            largest = largest.maximum(around[neighbour] * linked)
        if stop_early and torch.equal(largest, before):
            break
        # (b) Old label -> new; 0 -> 0.
        largest = largest.view_as(labels)
        table = labels.new_zeros(maps.shape[0], rows * columns + 1, dtype=table_type)
        table.scatter_reduce_(1, labels, largest.to(table_type), "amax")
        table = table.long()
        reach = 1  # how many pointers one look into the table follows
        while reach < most_classes - 1:  # (c)
            further = table.gather(1, table)
            if stop_early and torch.equal(further, table):
                break
            table, reach = further, 2 * reach
        labels = table.gather(1, labels)
    return labels.to(label_type)


def _links(maps: torch.Tensor) -> tuple[int, list[tuple[slice, torch.Tensor]]]:
    """Which 2x2 blocks of bool (M, H, W) have foreground pixels that touch.

    The blocks of all maps lie in one line, with a row and a column of empty blocks
    after each map: the next block is 1 step ahead, the one below columns + 1 steps.

    Returns:
        The margin to put around a line, so that no step leads out of it; and, for each
        of the 8 directions, the slice of such a line that holds the neighbours of all
        blocks, and 1 where a block and this neighbour are linked, else 0.
    """
    rows, columns, label_type = _blocks(maps)
    number, height, width = maps.shape
    down, margin = columns + 1, columns + 2
    pixels = F.pad(maps, (0, 2 * (columns + 1) - width, 0, 2 * (rows + 1) - height))
    pixels = pixels.view(number, rows + 1, 2, down, 2).permute(2, 4, 0, 1, 3)
    a, b, c, d = pixels.reshape(4, -1)  # of each block: a b above c d

    def seen(step: int) -> slice:
        return slice(margin + step, margin + step + a.shape[0])

    links = []
    sides = (1, b | d, a | c), (down - 1, c, b), (down, c | d, a | b), (down + 1, d, a)
    for step, here, there in sides:
        link = (here[:-step] & there[step:]).to(label_type)
        link = F.pad(link, (margin, margin))
        links += [(seen(step), link[seen(0)]), (seen(-step), link[seen(-step)])]
    return margin, links


# To torch.compile the labelling on the CPU is one node, which it does not look into: how
# many rounds there are depends on the data. Compiled code that is kept on disk knows the
# operator by its name, so the name stands for the promise of `connected_components`.
@torch.library.custom_op("spatial_entropy::connected_components", mutates_args=())
def _label_as_one_operator(maps: torch.Tensor) -> torch.Tensor:
    return _label(maps, stop_early=True)


@_label_as_one_operator.register_fake
def _(maps: torch.Tensor) -> torch.Tensor:
    return maps.new_empty(maps.shape, dtype=torch.int64)


# ------------------------------------------------------------- checks and benchmark


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


def opencv_spatial_entropy(similarity: torch.Tensor) -> torch.Tensor:
    """`spatial_entropy` the authors' way: a Python loop of OpenCV calls on the CPU, and
    one mask tensor for each component; for the benchmark.
    """
    import cv2

    maps = similarity.flatten(0, -3)
    activation = F.relu(maps - maps.mean((-2, -1), keepdim=True))
    owners, masks = [], []
    for owner, mask in enumerate((activation.detach() > 0).byte().cpu().numpy()):
        count, labels = cv2.connectedComponents(mask, connectivity=8)
        for label in range(1, count):
            owners.append(owner)
            masks.append(torch.from_numpy(labels == label))
    owners = torch.tensor(owners, device=maps.device)
    masks = torch.stack(masks).to(maps.device)
    mass = (activation[owners] * masks).sum((-2, -1))
    probability = mass / activation.sum((-2, -1))[owners]
    return (-probability * probability.log()).sum() / maps.shape[0]


def scipy_connected_components(mask: torch.Tensor) -> torch.Tensor:
    """`connected_components` by SciPy, on the CPU in one call; for the benchmark."""
    import scipy.ndimage

    nothing, touching = [[0] * 3] * 3, [[1] * 3] * 3
    maps = mask.flatten(0, -3).cpu().numpy()
    labels, _ = scipy.ndimage.label(maps, [nothing, touching, nothing])
    return torch.from_numpy(labels).to(mask.device).view(mask.shape)


def main() -> None:
    """Check the loss against its slow twin, then print a table of timings."""
    parser = argparse.ArgumentParser(description="Check and time the spatial entropy.")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    name = parser.parse_args().device
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # fails where tensors have no data
    except (RuntimeError, AssertionError):
        parser.exit(2, f"entropy.py: error: PyTorch finds no device {name} here\n")
    device = probe.device

    torch.manual_seed(0)
    grids = ((1, 1), (1, 9), (5, 7), (14, 14), (31, 17))
    for height, width in grids:
        similarity = torch.randn(20, 3, height, width)
        fast = spatial_entropy(similarity.to(device), "none").cpu()
        error = (fast - slow_spatial_entropy(similarity)).abs().max().item()
        if not error < 1e-5:
            sys.exit(f"entropy.py: error: {height}x{width} maps are off by {error}")
    print(f"equal to the slow twin: {60 * len(grids)} maps of {len(grids)} grids")
    benchmark(device)


def benchmark(device: torch.device) -> None:
    """Print how long each way takes, on random maps of several grids."""
    on_cpu = device.type == "cpu"
    images = 128 if on_cpu else 512
    least, most, seconds = 5, 20, 20.0  # calls of each way; when the least are enough
    hardware = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    print(f"{device} ({hardware}), {torch.get_num_threads()} CPU threads, ", end="")
    print(f"torch {torch.__version__}")

    def labels(function: Callable) -> Callable:
        return lambda maps: partial(function, threshold_at_mean(maps) > 0)

    def gradient(loss: Callable) -> Callable:
        return lambda maps: lambda: torch.autograd.grad(loss(maps), maps)

    # Name -> maps -> the call to time.
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    ways = {
        "labels eager": labels(connected_components),
        "labels compiled": labels(compiled(connected_components)),
        "labels SciPy": labels(scipy_connected_components),
        "loss eager": gradient(spatial_entropy),
        "loss compiled": gradient(compiled(spatial_entropy)),
        "loss OpenCV": gradient(opencv_spatial_entropy),
    }
    if device.type == "cuda":
        graph = compiled(spatial_entropy, mode="reduce-overhead")
        ways["loss CUDA-graph"] = gradient(graph)
    for side in (14, 28, 56):
        maps = torch.randn(images, 6, side, side, device=device, requires_grad=True)
        calls = {name: way(maps) for name, way in ways.items()}
        for name, call in list(calls.items()):
            try:
                call()  # not counted; compiles
            except (ImportError, RuntimeError) as error:
                print(f"left out: {name}, as {str(error).splitlines()[0]}")
                del calls[name], ways[name]
        times = {name: [] for name in calls}
        end = time.perf_counter() + seconds
        for turn in range(most):
            if turn >= least and time.perf_counter() > end:
                break
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                if not on_cpu:
                    torch.accelerator.synchronize(device)
                times[name].append(time.perf_counter() - start)
        if side == 14:
            print(
                f"ms for {images} images x 6 heads, "
                f"medians of {least} to {most} calls in turn;"
            )
            print("labels of the connected components, and the loss with its gradient")
            for words in zip(*(name.split() for name in calls)):
                print(f"{'':7}" + "".join(f"{word:>12}" for word in words))
        row = {name: 1e3 * statistics.median(values) for name, values in times.items()}
        print(f"{side:>4}x{side}" + "".join(f"{value:12.2f}" for value in row.values()))


if __name__ == "__main__":
    main()
