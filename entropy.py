# SPDX-License-Identifier: MIT
"""Spatial entropy: a loss that makes attention cluster into few connected regions.

From Peruzzo et al., "Spatial Entropy as an Inductive Bias for Vision Transformers"
(arXiv 2206.04636). For one image and one head of the last block:

    (1)  S[x,y] = <q_cls, k[x,y]> / sqrt(head_dim)   similarity map, before softmax
    (2)  A = ReLU(S - m),  m = mean of S             the foreground is where S > m
    (3)  C_1 .. C_K = connected components of the foreground, 8-connectivity
    (4)  P_n = sum of A over C_n / sum of A          probability of component n
    (5)  H(S) = - sum_n P_n ln P_n                   in nats; one component gives 0
    (6)  L = L_classification + lambda * mean of H over images and heads

In the code S is `similarity`, A `activation`, C `labels`, P `probability`, H `entropy`.

Usage, with the queries and keys (B, heads, N, head_dim) of the last attention layer:

    from entropy import similarity_maps, spatial_entropy

    similarity = similarity_maps(query, key)  # (B, heads, H, W)
    loss = criterion(logits, target) + 0.01 * spatial_entropy(similarity)
    loss.backward()

0.01 is the paper's lambda, which its training loop warms up and decays. Small models may
need more, such as 0.3.

Compiling is optional. On a GPU it makes loss and gradient 2 to 5 times faster, on a CPU
no faster. The host never waits for the GPU, so mode="reduce-overhead" works too:

    spatial_entropy = torch.compile(spatial_entropy, fullgraph=True)

Differences from the authors' code, https://github.com/helia95/SAR, which settles what
the paper leaves open: any grid, not only 14x14; components are labeled by tensor
operations on the input's device, not by a loop of OpenCV calls on the CPU; a batch of
constant maps gives 0 instead of raising; a non-finite score gives NaN instead of being
skipped; A has no 1e-9 added.

This file requires PyTorch alone, 2.4 or newer. torch.compile requires 2.9: for a CPU,
older releases generate code that corrupts memory.
"""

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
    """Compute equation (1) from the queries and keys of a self-attention layer.

    Args:
        query, key: (B, heads, N, head_dim) with N = prefix_tokens + H * W, as they enter
            the product: after any normalization or rotation.
        grid: (H, W) in patches; None means a square.
        prefix_tokens: number of tokens before the patches: the CLS token, which must be
            first, distillation and register tokens.
        pool: "cls" takes the scores of the CLS query; "mean", for models without a CLS
            token, the mean of the scores of all patch queries.

    Returns:
        (B, heads, H, W) in float64 for float64 input, else in float32, also under
        autocast.

    Raises:
        ValueError: the shapes, the grid, prefix_tokens and pool do not fit together.
    """
    if query.dim() != 4 or query.shape != key.shape:
        shapes = f"{tuple(query.shape)} and {tuple(key.shape)}"
        raise ValueError(f"query and key must both be (B, heads, N, d), got {shapes}")
    if pool not in ("cls", "mean"):
        raise ValueError(f'pool must be "cls" or "mean", got {pool!r}')
    if pool == "cls" and prefix_tokens < 1:
        raise ValueError('pool="cls" needs a CLS token; without one use pool="mean"')
    patches = query.shape[2] - prefix_tokens
    side = int(max(patches, 0) ** 0.5)
    height, width = grid or (side, side)
    if min(height, width) < 1 or height * width != patches:
        wanted = f"{height}x{width}" if grid else "a square; pass the grid"
        raise ValueError(
            f"{query.shape[2]} tokens minus prefix_tokens={prefix_tokens} are "
            f"{patches} patches, not {wanted}"
        )
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = key[:, :, prefix_tokens:]  # (B, heads, H * W, d)
    if pool == "cls":
        query = query[:, :, :1]  # (B, heads, 1, d)
    else:  # the mean of <q_i, k> over i is <mean of q_i, k>
        query = query[:, :, prefix_tokens:].mean(2, keepdim=True, dtype=dtype)
    # Not a matrix product, which autocast and TF32 round: many scores would then fall on
    # the wrong side of their mean.
    query = query.to(dtype) * query.shape[-1] ** -0.5
    return (query * key.to(dtype)).sum(-1).unflatten(-1, (height, width))


def threshold_at_mean(similarity: torch.Tensor) -> torch.Tensor:
    """Compute equation (2), A = ReLU(S - m); the foreground is where A > 0.

    Args:
        similarity: floating point (..., H, W), scores before softmax.

    Returns:
        (..., H, W), float64 for float64 input, else float32; all NaN if a score, or the
        sum of S - S[0,0], is not finite.

    Raises:
        TypeError: similarity is not floating point.
        ValueError: similarity is not (..., H, W) with a grid of one patch or more.
    """
    if not similarity.is_floating_point():
        raise TypeError(f"similarity must be floating point, got {similarity.dtype}")
    if similarity.dim() < 2 or 0 in similarity.shape[-2:]:
        shape = tuple(similarity.shape)
        raise ValueError(f"similarity must be (..., H, W), got {shape}")
    similarity = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    # Shifting by one of the map's scores leaves S - m unchanged and makes the mean of a
    # constant map exact, so rounding cannot lift such a map above its mean.
    shifted = similarity - similarity[..., :1, :1].detach()
    mean = shifted.mean((-2, -1), keepdim=True)
    mean = mean + 0 * mean.detach()  # infinity becomes NaN, which survives the ReLU
    return shifted.add_(-mean).relu_()  # in place: this step is memory-bound


def connected_components(mask: torch.Tensor) -> torch.Tensor:
    """Label the 8-connected components of each mask: exact for any mask of any size.

    Args:
        mask: bool (..., H, W).

    Returns:
        int64 (..., H, W): 0 for the background, else 1 + the raster index of the last
        2x2 block with a pixel of the component. All pixels of a block touch, so labels
        are unique within a mask; they have gaps and are at most ceil(H / 2) * ceil(W / 2).

    Raises:
        TypeError: mask is not bool.
        ValueError: mask has fewer than two dimensions.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if mask.dim() < 2:
        raise ValueError(f"mask must be (..., H, W), got {tuple(mask.shape)}")
    if mask.numel() == 0:
        return torch.zeros_like(mask, dtype=torch.int64)
    masks = mask.reshape(-1, *mask.shape[-2:])  # (M, H, W)
    on_cpu = mask.device.type == "cpu"
    if on_cpu and torch.compiler.is_compiling():
        return _label_as_one_operator(masks).view(mask.shape)
    return _label(masks, stop_early=on_cpu).view(mask.shape)


def component_masses(similarity: torch.Tensor) -> torch.Tensor:
    """Compute the numerators of equation (4): the sum of A over each component.

    The number of components is `(component_masses(similarity) > 0).sum(-1)`.

    Args:
        similarity: floating point (..., H, W), scores before softmax.

    Returns:
        (..., 1 + ceil(H / 2) * ceil(W / 2)): at each index the mass of the component
        with this label, or 0 for an unused label. Index 0 is the background: 0, or NaN
        for a map with non-finite scores. The labels carry no gradient, the masses do.
    """
    activation = threshold_at_mean(similarity)
    labels = connected_components(activation.detach() > 0)
    height, width = similarity.shape[-2:]
    slots = 1 + ((height + 1) // 2) * ((width + 1) // 2)
    masses = activation.new_zeros(*activation.shape[:-2], slots)
    return masses.scatter_add(-1, labels.flatten(-2), activation.flatten(-2))


def entropy_of_masses(masses: torch.Tensor) -> torch.Tensor:
    """Compute equations (4) and (5) from component masses: (..., L) -> nats (...)."""
    total = masses.sum(-1, keepdim=True)
    probability = masses / total.where(total != 0, 1)
    # 0 ln 0 is 0: in the logarithm the smallest normal number stands for 0.
    log_probability = probability.clamp(min=torch.finfo(masses.dtype).tiny).log()
    # The first term is 0, or NaN if the total is not finite; it also turns -0 into 0.
    return 0 * total.squeeze(-1) - (probability * log_probability).sum(-1)


def spatial_entropy(similarity: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Compute the spatial entropy of similarity maps, equations (2) to (5), in nats.

    Args:
        similarity: floating point (..., H, W), such as (B, heads, H, W): scores before
            softmax.
        reduction: "mean" over all maps, or "none".

    Returns:
        A scalar, or (...) with reduction="none"; float64 for float64 input, else
        float32, also under autocast. It is 0 for a constant map and for one component,
        NaN for non-finite scores. The mean over zero maps is NaN.

    Raises:
        TypeError: similarity is not floating point.
        ValueError: similarity is not (..., H, W), or reduction is unknown.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    entropy = entropy_of_masses(component_masses(similarity))
    return entropy.mean() if reduction == "mean" else entropy


def _label(masks: torch.Tensor, stop_early: bool) -> torch.Tensor:
    """Label the components of bool (M, H, W), with no dimension 0, by Boruvka's algorithm.

    The pixels of a 2x2 block all touch, so this labels blocks, which are a quarter as
    many. Two blocks are linked if a foreground pixel of one touches one of the other. A
    group is the set of blocks with the same label, the position of its last block. At
    first each block is a group. In each round, every group l

    (a) finds t(l), the largest label among the other groups it is linked to, and
    (b) points to max(l, t(l), t(t(l))), or to itself if it is linked to no other. The
        blocks follow these pointers to their ends: each time all pointers are replaced
        by the pointers they lead to, they reach twice as far (pointer jumping).

    As group t(l) is linked to group l, t(t(l)) >= l. So pointers never descend, and they
    end at the last block of a group. A linked group points to itself only if t(t(l)) = l
    > t(l); then group t(l) points to it. So every group that remains merges at least
    two, unless it is a whole component, and each round at least halves the number of
    groups of an unfinished component. An unfinished component has at most k =
    ceil(H / 2) * ceil(W / 2) groups at first, so floor(log2(k)) rounds suffice, 5 for
    14x14. Where c groups are left, c pointers lead a block to the end, and n jumps follow
    2^n of them.

    stop_early ends both loops when nothing changes; this check makes the host wait.
    """
    number, height, width = masks.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    # All blocks lie in one line. A padding row and column before each mask separate rows
    # and masks; the right neighbor is at +1, the lower one at +down.
    down = columns + 1
    pixels = F.pad(masks, (2, 2 * columns - width, 2, 2 * rows - height))
    pixels = pixels.view(number, rows + 1, 2, down, 2)
    # The four pixels of each block.
    nw, ne, sw, se = pixels.permute(2, 4, 0, 1, 3).reshape(4, -1)
    links = []
    for step, here, there in (
        (1, ne | se, nw | sw),
        (down - 1, sw, ne),
        (down, sw | se, nw | ne),
        (down + 1, se, nw),
    ):
        links.append((step, here[:-step] & there[step:]))

    labels = torch.arange((rows + 1) * down, device=masks.device).repeat(number, 1)
    # The smaller the type, the faster.
    dtype = torch.int16 if labels.shape[1] < 2**15 else torch.int32
    line = labels.flatten().to(dtype)
    groups = rows * columns  # the most that an unfinished component can have
    while groups > 1:
        largest = torch.zeros_like(line)  # (a) for each block
        for step, link in links:
            largest[:-step].clamp_(min=line[step:] * link)
            largest[step:].clamp_(min=line[:-step] * link)
        if stop_early and largest.max() == 0:
            break
        largest = largest.view_as(labels).int()
        table = torch.zeros_like(largest).scatter_reduce_(1, labels, largest, "amax")
        table = table.long()  # (a) for each group; 0, a padding block, for none
        labels = labels.maximum(table).maximum(table.gather(1, table))  # (b)
        reach = 1  # how many pointers a look into `labels` follows
        while reach < groups:
            further = labels.gather(1, labels)
            if stop_early and further.equal(labels):
                break
            labels, reach = further, 2 * reach
        line = labels.flatten().to(dtype)
        for step, link in links:  # keep those between different groups
            link &= line[:-step] != line[step:]
        groups //= 2

    # From the position of a block to 1 + its raster index, without the padding.
    raster = (line - line // down - columns).view(number, rows + 1, 1, down, 1)
    labels = (raster * pixels).view(number, 2 * (rows + 1), 2 * down)
    return labels[:, 2 : 2 + height, 2 : 2 + width].long()


# One operator to torch.compile, as the number of rounds on a CPU depends on the data.
# Compiled code that is cached on disk calls it by this name.
@torch.library.custom_op("spatial_entropy::connected_components", mutates_args=())
def _label_as_one_operator(masks: torch.Tensor) -> torch.Tensor:
    return _label(masks, stop_early=True)


@_label_as_one_operator.register_fake
def _(masks: torch.Tensor) -> torch.Tensor:
    return masks.new_empty(masks.shape, dtype=torch.int64)
