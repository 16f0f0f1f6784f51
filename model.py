# SPDX-License-Identifier: MIT
"""Vision Transformer: images -> logits, and the similarity map of the last block.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929), in the shape and
with the parameter names of DeiT (arXiv 2012.12877), timm and DINO. SAR (Peruzzo et al.,
arXiv 2206.04636) concerns the last block:

- It returns the similarity map: the scores of the CLS query against the patch keys before
  softmax.
- With `last_skip=False` its attention has no skip connection, so no drop-path there, and
  no LayerNorm after it. The MLP keeps its skip.

Only the CLS token of the last block reaches the classifier, so that block computes its
query, attention, projection and MLP for the CLS token alone, from the keys and values
of all tokens: the logits of the full block, for about a sixth of its operations.

Letters in the shape comments:
    B images      C channels     H, W patches along height and width
    D embedding   h heads        d = D / h
    N tokens: 1 + H * W with pool="cls", H * W with pool="mean"
"""

import argparse
import math
import os
import re
from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import stochastic_depth

# Preset name -> keyword arguments of VisionTransformer. vit_mini is this project's own,
# to train on a CPU in minutes; the others are DeiT's.
MODELS = {
    "vit_mini": {"embed_dim": 96, "depth": 4, "num_heads": 3, "init_std": 0.08},
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        """Split (B, N, parts * D) into `parts` tensors (B, h, N, d)."""
        x = x.unflatten(-1, (parts, self.num_heads, -1))  # (B, N, parts, h, d)
        return x.permute(2, 0, 3, 1, 4).unbind(0)

    def merge_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Merge the heads and project: (B, h, N, d) -> (B, N, D)."""
        return self.proj(x.transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split_heads(self.qkv(x), 3)  # (B, h, N, d) each
        return self.merge_heads(F.scaled_dot_product_attention(q, k, v))


class Block(nn.Module):
    """Pre-norm transformer block: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        layers = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU()}
        layers["fc2"] = nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.drop_path = drop_path

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """Drop-path: while training, zero a residual branch for whole images."""
        return stochastic_depth(x, self.drop_path, "row", self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class LastBlock(Block):
    """The last block: (B, N, D) -> the tokens to pool, and scores before softmax.

    With pool="cls" the tokens are (B, 1, D), the CLS token alone, and the scores those
    of its query, (B, h, 1, N). With pool="mean" the tokens are (B, N, D) and the scores
    the mean over all queries. `last_skip=False` is the authors' change: no skip
    connection and no drop-path around the attention, no second LayerNorm.
    """

    def __init__(self, *args, last_skip: bool, pool: str) -> None:
        super().__init__(*args)
        self.last_skip = last_skip
        self.pool = pool
        if not last_skip:
            self.norm2 = nn.Identity()

    def attend(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output (B, 1 or N, D) and the scores (B, h, 1, N) of the attention."""
        attn, parts = self.attn, (x.shape[-1], 2 * x.shape[-1])
        if self.pool == "cls":
            q_weight, kv_weight = attn.qkv.weight.split(parts)
            q_bias, kv_bias = attn.qkv.bias.split(parts)
            (q,) = attn.split_heads(F.linear(x[:, :1], q_weight, q_bias), 1)
            k, v = attn.split_heads(F.linear(x, kv_weight, kv_bias), 2)  # (B, h, N, d)
        else:
            q, k, v = attn.split_heads(attn.qkv(x), 3)  # (B, h, N, d) each
            attended = F.scaled_dot_product_attention(q, k, v)
            # The mean of <q_i, k> over i is <mean of q_i, k>: no N x N matrix is made.
            q = q.mean(-2, keepdim=True)  # (B, h, 1, d)
        # In bfloat16, of 8 significant bits, many scores would be on the wrong side of
        # their mean.
        dtype = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            scores = (q.to(dtype) * q.shape[-1] ** -0.5) @ k.to(dtype).transpose(-2, -1)
        if self.pool == "cls":
            attended = scores.softmax(-1).to(v.dtype) @ v  # (B, h, 1, d)
        return attn.merge_heads(attended), scores

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        attended, scores = self.attend(self.norm1(x))
        if self.last_skip:
            attended = x[:, : attended.shape[1]] + self.drop(attended)
        return attended + self.drop(self.mlp(self.norm2(attended))), scores


class VisionTransformer(nn.Module):
    """Vision Transformer: images -> (logits, similarity).

    Args:
        img_size: height and width of the images in pixels, or one number for both.
        patch_size: side of a patch in pixels; must divide height and width.
        num_classes: size of the logits; 0 returns the pooled token instead.
        embed_dim, depth, num_heads: D, number of blocks, h; `MODELS` has presets.
        drop_path: stochastic depth, rising linearly from 0 in the first block to this.
        last_skip: whether the last attention has a skip connection, and a LayerNorm
            after it; SAR removes both.
        pool: "cls" classifies the CLS token. "mean" has no CLS token and classifies the
            mean of the patch tokens; its map is the mean of the patch queries' maps.
        init_std, pos_std: standard deviations of the initial weights of linear layers
            and of the position embedding. DeiT's 0.02 suits widths of several hundred;
            width 96 learns several times faster from 0.08. Patch embeddings start with
            about 0.5, so with a pos_std of 0.02 positions are hard to tell apart at first.

    Raises:
        ValueError: patch_size does not divide img_size, or pool is unknown.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int,
        depth: int,
        num_heads: int,
        drop_path: float = 0.0,
        last_skip: bool = True,
        pool: str = "cls",
        init_std: float = 0.02,
        pos_std: float = 0.02,
    ) -> None:
        super().__init__()
        if pool not in ("cls", "mean"):
            raise ValueError(f'pool must be "cls" or "mean", got {pool!r}')
        self.img_size, self.grid = sizes(img_size, patch_size)
        self.patch_size = patch_size
        self.prefix_tokens = 1 if pool == "cls" else 0

        projection = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=projection))
        self.cls_token = None
        if pool == "cls":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        tokens = self.prefix_tokens + math.prod(self.grid)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        shape = (embed_dim, num_heads)
        self.blocks = nn.ModuleList([Block(*shape, rate) for rate in rates[:-1]])
        self.blocks.append(LastBlock(*shape, rates[-1], last_skip=last_skip, pool=pool))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._init_weights(init_std, pos_std)

    def _init_weights(self, init_std: float, pos_std: float) -> None:
        """Initialize as DeiT does; the patch projection keeps PyTorch's default."""
        nn.init.trunc_normal_(self.pos_embed, std=pos_std)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=init_std)
                nn.init.zeros_(module.bias)

    @torch.no_grad()
    def resize(self, img_size: int | tuple[int, int]) -> None:
        """Change the input size by resizing the position embedding."""
        old = self.grid
        self.img_size, self.grid = sizes(img_size, self.patch_size)
        first, patches = self.pos_embed.tensor_split((self.prefix_tokens,), dim=1)
        patches = resize_pos_embed(patches, old, self.grid)
        self.pos_embed = nn.Parameter(torch.cat((first, patches), dim=1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, height, width) -> logits (B, classes), similarity (B, h, H, W).

        The similarity holds the scores of the last block before softmax, in float32 at
        least.
        """
        x = self.patch_embed(images)  # (B, D, H, W)
        x = x.flatten(2).transpose(1, 2)  # (B, H * W, D)
        if self.cls_token is not None:
            cls = self.cls_token.expand(len(x), -1, -1)  # (B, 1, D)
            x = torch.cat((cls, x), dim=1)  # (B, N, D)
        x = x + self.pos_embed
        for block in self.blocks[:-1]:
            x = block(x)
        x, scores = self.blocks[-1](x)  # (B, 1 or N, D), (B, h, 1, N)
        logits = self.head(self.norm(x).mean(1))  # the mean of one token is that token
        similarity = scores[:, :, 0, self.prefix_tokens :]  # (B, h, H * W)
        return logits, similarity.unflatten(-1, self.grid)


def sizes(img_size: int | tuple[int, int], patch_size: int) -> tuple:
    """Return (height, width) in pixels and the grid (H, W), or raise ValueError."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if min(height, width) < patch_size or height % patch_size or width % patch_size:
        raise ValueError(
            f"patch size {patch_size} does not divide the image size {height}x{width}"
        )
    return (height, width), (height // patch_size, width // patch_size)


def resize_pos_embed(
    patches: torch.Tensor, old: tuple[int, int], new: tuple[int, int]
) -> torch.Tensor:
    """Resize (1, H * W, D) bicubically from one grid (H, W) to another, as DeiT does."""
    grid = patches.unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, H, W)
    grid = F.interpolate(grid.float(), size=new, mode="bicubic")
    return grid.flatten(2).transpose(1, 2).to(patches.dtype)


# ------------------------------------------------------------------------- checkpoints

# Where checkpoints keep the weights of a model, and its EMA weights.
WRAPPERS = ("model", "state_dict", "teacher", "module")
EMA = ("model_ema", "state_dict_ema", "ema")


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Read a file written by torch.save onto the CPU, without executing code from it.

    Besides tensors and plain values it may hold argparse.Namespace, as DeiT's and DINO's
    do. Raise FileNotFoundError, or ValueError if it is damaged or holds anything else.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # garbage makes the unpickler raise anything
        reason = "is damaged or not a checkpoint"
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"contains {refused[1]}, which is not loaded as it could run code"
        raise ValueError(f"{path} {reason}") from error


def find_weights(checkpoint: Mapping, source: str, ema: bool = False) -> dict:
    """Find the weights of a Vision Transformer in a checkpoint; with `ema`, EMA weights.

    Return tensors by their names in `VisionTransformer`, or raise ValueError.
    """
    weights = checkpoint
    if ema:
        found = [n for n in EMA if isinstance(checkpoint.get(n), Mapping)]
        if not found:
            raise ValueError(f"{source} has no EMA weights")
        weights = checkpoint[found[0]]
    while inner := [n for n in WRAPPERS if isinstance(weights.get(n), Mapping)]:
        weights = weights[inner[0]]
    first = "patch_embed.proj.weight"
    found = [str(name) for name in weights if str(name).endswith(first)]
    prefix = found[0].removesuffix(first) if found else ""  # such as "module.backbone."
    if f"{prefix}pos_embed" not in weights:
        raise ValueError(f"{source} holds no Vision Transformer")
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if str(name).startswith(prefix) and isinstance(value, torch.Tensor)
    }


def load_weights(
    model: VisionTransformer,
    weights: str | os.PathLike | Mapping,
    source: str = "the state dict",
) -> str:
    """Load weights of this project, timm, DeiT or DINO into a model, in place.

    `weights` is a file, what `read_checkpoint` returned, or a state dict; `source` names
    the latter two in messages. The position embedding is resized to the model's grid from
    a square one. A head with a different number of classes is skipped.

    Return a sentence: what was loaded, resized, left at initial values, not used. Raise
    ValueError if the weights cannot be read or do not fit; the model may then be partly
    loaded.
    """
    if not isinstance(weights, Mapping):
        source, weights = str(weights), read_checkpoint(weights)
    given, own = find_weights(weights, source), model.state_dict()
    report = []
    tokens = ("cls_token" in given) + ("dist_token" in given)
    first, patches = given["pos_embed"].tensor_split((tokens,), dim=1)
    side = math.isqrt(patches.shape[1])
    if side * side == patches.shape[1] != math.prod(model.grid):
        patches = resize_pos_embed(patches, (side, side), model.grid)
        change = "{0}x{0} -> {1}x{2}".format(side, *model.grid)
        report.append(f"position embedding resized {change}")
    given["pos_embed"] = torch.cat((first[:, : model.prefix_tokens], patches), dim=1)
    misfits = [n for n in own if n in given and given[n].shape != own[n].shape]
    for name in misfits:
        if not name.startswith("head."):
            shapes = f"{tuple(given[name].shape)}, not {tuple(own[name].shape)}"
            raise ValueError(f"{source} does not fit the model: its {name} is {shapes}")
        del given[name]
    missing, unused = model.load_state_dict(given, strict=False)
    for name in missing:
        if not name.startswith("head."):
            raise ValueError(f"{source} does not fit the model: it has no {name}")
    # Leftovers that this model can ignore; any other means a different architecture.
    spare = rf"head.*|(cls|dist)_token|blocks\.{len(model.blocks) - 1}\.norm2\..*"
    for name in unused:
        if not re.fullmatch(spare, name):
            raise ValueError(f"{source} does not fit the model, which has no {name}")
    if missing:
        report.append(f"left at initial values: {', '.join(missing)}")
    if unused:
        report.append(f"not used: {', '.join(unused)}")
    loaded = f"loaded {len(own) - len(missing)} of {len(own)} tensors from {source}"
    return "; ".join([loaded, *report])


def load_model(
    checkpoint: Mapping, source: str, preset: str | None = None, ema: bool = False
) -> tuple[VisionTransformer, str]:
    """Build the model of a checkpoint, and load its weights, or with `ema` EMA weights.

    Checkpoints of train.py hold the architecture. Others need a `preset` of MODELS; the
    weights tell patch size, grid, classes and variant. Return `load_weights`' sentence
    too. Raise ValueError if the weights are not there or do not fit.
    """
    weights = find_weights(checkpoint, source, ema)
    architecture = checkpoint.get("architecture")
    if architecture is None and preset is None:
        names = ", ".join(MODELS)
        raise ValueError(f"{source} does not name its model: add --model ({names})")
    if architecture is None:
        patch_size = weights["patch_embed.proj.weight"].shape[-1]
        # Of a square grid; one or two tokens more do not change the rounded root.
        side = math.isqrt(weights["pos_embed"].shape[1])
        last_norm = f"blocks.{MODELS[preset]['depth'] - 1}.norm2.weight"
        architecture = MODELS[preset] | {
            "img_size": side * patch_size,
            "patch_size": patch_size,
            "num_classes": len(weights.get("head.weight", ())),
            "last_skip": last_norm in weights,
            "pool": "cls" if "cls_token" in weights else "mean",
        }
    model = VisionTransformer(**architecture)
    return model, load_weights(model, weights, source)
