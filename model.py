# SPDX-License-Identifier: MIT
"""Vision Transformer: images -> logits, and the similarity map of the last block.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929), in the shape of
DeiT (arXiv 2012.12877), with two things that SAR (Peruzzo et al., arXiv 2206.04636)
needs in the last block:

- the similarity map: the scores of the CLS query against the patch keys before softmax;
- on demand (`last_skip=False`) no skip connection around the attention, and with it no
  drop-path there and no second LayerNorm; the MLP keeps its skip.

Only the CLS token of the last block reaches the classifier, so that block computes its
query, attention, projection and MLP for the CLS token alone, from the keys and values
of all tokens. The logits are those of the full block; a step costs about half a block
less than that of a plain ViT.

Parameter names are those of timm, DeiT and DINO, so their state dicts load here and the
reverse.

Letters in the shape comments:
    B images      C channels     H, W patches along height and width
    D embedding   h heads        d = D / h
    N tokens: 1 + H * W with pool="cls", H * W with pool="mean"
"""

import argparse
import math
import os
import pickle
import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import stochastic_depth

# Preset name -> the keyword arguments of VisionTransformer that make it. The first is
# this project's own, for a training run on a CPU in minutes; the others are DeiT's.
MODELS = {
    "vit_mini": {"embed_dim": 96, "depth": 4, "num_heads": 3, "init_std": 0.08},
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}


class MLP(nn.Module):
    """Two linear layers with a GELU between them: (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        """(B, N, parts * D) -> parts times (B, h, N, d)."""
        x = x.unflatten(-1, (parts, self.num_heads, -1))  # (B, N, parts, h, d)
        return x.permute(2, 0, 3, 1, 4).unbind(0)

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """<q, k> / sqrt(d), in float32 at least: (B, h, 1, d), (B, h, N, d) -> (B, h, 1, N).

        In bfloat16, with 8 bits, many scores would fall on the wrong side of their mean.
        """
        precise = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            q = q.to(precise) * q.shape[-1] ** -0.5
            return q @ k.to(precise).transpose(-2, -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split_heads(self.qkv(x), 3)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, h, N, d)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)

    def cls_only(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The CLS row of `forward`, and its scores before softmax.

        Args:
            x: (B, N, D), the CLS token first.

        Returns:
            (B, 1, D), and the scores of the CLS query against all keys, (B, h, 1, N).
        """
        dim = x.shape[-1]
        q_weight, kv_weight = self.qkv.weight.split((dim, 2 * dim))
        q_bias, kv_bias = (None, None)
        if self.qkv.bias is not None:
            q_bias, kv_bias = self.qkv.bias.split((dim, 2 * dim))
        (q,) = self.split_heads(F.linear(x[:, :1], q_weight, q_bias), 1)  # (B, h, 1, d)
        k, v = self.split_heads(F.linear(x, kv_weight, kv_bias), 2)  # (B, h, N, d)
        scores = self.scores(q, k)
        x = scores.softmax(-1).to(v.dtype) @ v  # (B, h, 1, d)
        return self.proj(x.transpose(1, 2).flatten(2)), scores

    def all_tokens(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, and the mean over the queries of the scores before softmax.

        The mean of the rows <q_i, k> is <mean of q_i, k>: no N x N matrix is made.

        Returns:
            (B, N, D), and the mean scores against all keys, (B, h, 1, N).
        """
        q, k, v = self.split_heads(self.qkv(x), 3)
        scores = self.scores(q.mean(-2, keepdim=True), k)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, h, N, d)
        return self.proj(x.transpose(1, 2).flatten(2)), scores


class Block(nn.Module):
    """Pre-norm transformer block: (B, N, D) -> (B, N, D)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """Drop-path: a residual branch is left out for whole images while training."""
        return stochastic_depth(x, self.drop_path, "row", self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class LastBlock(Block):
    """The last block: (B, N, D) -> tokens that are pooled, and scores before softmax.

    With pool="cls" the tokens are (B, 1, D), the CLS token alone; with pool="mean" all,
    (B, N, D). The scores are (B, h, 1, N). `last_skip=False` is the authors' change: no
    skip connection and no drop-path around the attention, no second LayerNorm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: float,
        last_skip: bool,
        pool: str,
    ) -> None:
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias, drop_path)
        self.last_skip = last_skip
        self.pool = pool
        if not last_skip:
            self.norm2 = nn.Identity()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        attend = self.attn.cls_only if self.pool == "cls" else self.attn.all_tokens
        attended, scores = attend(self.norm1(x))
        if self.last_skip:
            attended = x[:, : attended.shape[1]] + self.drop(attended)
        return attended + self.drop(self.mlp(self.norm2(attended))), scores


class PatchEmbed(nn.Module):
    """Embed the patches: (B, C, H * patch_size, W * patch_size) -> (B, H * W, D)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Vision Transformer: images -> (logits, similarity).

    Args:
        img_size: height and width of the images in pixels, or one number for both.
        patch_size: side of a patch in pixels; must divide height and width.
        in_chans: channels of the images.
        num_classes: size of the logits; 0 for no head: the pooled token itself.
        embed_dim, depth, num_heads: D, number of blocks, h; `MODELS` has presets.
        mlp_ratio: hidden dimension of the MLPs over embed_dim.
        qkv_bias: whether the query, key and value projection has a bias.
        drop_path: stochastic depth, rising linearly from 0 in the first block to this
            in the last.
        last_skip: whether the last attention has a skip connection, and a LayerNorm
            after it; not so in SAR.
        pool: "cls" classifies the CLS token. "mean" has no CLS token and classifies the
            mean of the patch tokens; its map is the mean of the patch queries' maps.
        init_std: of the linear layers' initial weights. DeiT's 0.02 is for widths of
            some hundreds; a ViT of width 96 learns several times faster from 0.08.
        pos_std: of the initial position embedding, a normal distribution cut at 2 and
            -2; at most 1. That of the embedded patches is near 0.5: from DeiT's 0.02 a
            ViT hardly tells places apart at first.

    Raises:
        ValueError: an image size that patch_size does not divide, an embed_dim that
            num_heads does not divide, an unknown pool, or a number that is out of
            range.
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
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        last_skip: bool = True,
        pool: str = "cls",
        init_std: float = 0.02,
        pos_std: float = 0.02,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        positive = {"img_size": min(height, width), "patch_size": patch_size}
        positive |= {"in_chans": in_chans, "num_classes": num_classes or 1}
        positive |= {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
        for name, number in positive.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        grid = check_grid((height, width), patch_size)
        if embed_dim % num_heads:
            raise ValueError(
                f"num_heads {num_heads} does not divide embed_dim {embed_dim}"
            )
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {drop_path}")
        if not 0 < pos_std <= 1:
            raise ValueError(f"pos_std must be above 0 and at most 1, got {pos_std}")
        if pool not in ("cls", "mean"):
            raise ValueError(f'pool must be "cls" or "mean", got {pool!r}')
        self.img_size, self.patch_size = (height, width), patch_size
        self.grid = grid
        self.prefix_tokens = 1 if pool == "cls" else 0

        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.cls_token = (
            nn.Parameter(torch.zeros(1, 1, embed_dim)) if pool == "cls" else None
        )
        tokens = self.prefix_tokens + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        shape = (embed_dim, num_heads, mlp_ratio, qkv_bias)
        self.blocks = nn.ModuleList([Block(*shape, rate) for rate in rates[:-1]])
        self.blocks.append(LastBlock(*shape, rates[-1], last_skip, pool))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(embed_dim, num_classes)
        self._init_weights(init_std, pos_std)

    def _init_weights(self, init_std: float, pos_std: float) -> None:
        """DeiT's initialisation; the patch projection keeps PyTorch's own."""
        nn.init.trunc_normal_(self.pos_embed, std=pos_std)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.no_grad()
    def resize(self, img_size: int | tuple[int, int]) -> None:
        """Take images of another size from now on: the position embedding is resized.

        Args:
            img_size: height and width in pixels, or one number for both.

        Raises:
            ValueError: the patch size does not divide the image size.
        """
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        old_grid = self.grid
        self.grid = check_grid((height, width), self.patch_size)
        self.img_size = (height, width)
        given = (self.pos_embed, self.prefix_tokens, old_grid)
        self.pos_embed = nn.Parameter(resize_pos_embed(*given, self)[0])

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, height, width) -> logits (B, classes), similarity (B, h, H, W).

        The similarity is the paper's: scores of the last block before softmax.

        Raises:
            ValueError: the images do not have the size the model was made for.
        """
        if images.shape[-2:] != self.img_size:
            raise ValueError(
                "the model takes images of {}x{}, got {}x{}".format(
                    *self.img_size, *images.shape[-2:]
                )
            )
        x = self.patch_embed(images)  # (B, H * W, D)
        if self.cls_token is not None:
            cls = self.cls_token.expand(len(x), -1, -1)  # (B, 1, D)
            x = torch.cat((cls, x), dim=1)  # (B, N, D)
        x = x + self.pos_embed
        for block in self.blocks[:-1]:
            x = block(x)
        x, scores = self.blocks[-1](x)  # (B, 1 or N, D), (B, h, 1, N)
        logits = self.head(self.norm(x).mean(1))  # with one token, that token
        similarity = scores[:, :, 0, self.prefix_tokens :]  # (B, h, H * W)
        return logits, similarity.unflatten(-1, self.grid)


def check_grid(img_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Patches along height and width.

    Raises:
        ValueError: the patch size does not divide the image size.
    """
    height, width = img_size
    if min(height, width) < patch_size or height % patch_size or width % patch_size:
        raise ValueError(
            f"patch size {patch_size} does not divide the image size {height}x{width}"
        )
    return height // patch_size, width // patch_size


def read_checkpoint(path: str | os.PathLike) -> Mapping:
    """Read a file written by torch.save, tensors and plain values only, onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ValueError: it is damaged, is no checkpoint, or holds a pickle that wants to
            execute code.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        # DINO and DeiT keep their parsed arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, is not a checkpoint, "
            "or holds more than tensors and plain values"
        ) from error
    except Exception as error:  # garbage makes the unpickler raise anything
        raise ValueError(f"{path} is damaged or not a checkpoint") from error
    if not hasattr(checkpoint, "keys"):
        raise ValueError(
            f"{path} is not a checkpoint: it holds a {type(checkpoint).__name__}"
        )
    return checkpoint


def unwrap(checkpoint: Mapping) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of this project, timm, DeiT or DINO, by plain name.

    Unwraps "model", "state_dict" or "teacher"; strips "module.", "backbone." and
    "_orig_mod.".
    """
    for wrapper in ("model", "state_dict", "teacher"):
        if isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
    return {
        re.sub(r"^((module|_orig_mod|backbone)\.)+", "", name): tensor
        for name, tensor in checkpoint.items()
        if isinstance(tensor, torch.Tensor)
    }


def load_weights(
    model: VisionTransformer,
    weights: str | os.PathLike | Mapping,
    source: str = "the state dict",
) -> str:
    """Start a model from a checkpoint of this project, timm, DeiT or DINO.

    Resizes the position embedding to the model's grid (bicubic), and leaves the head at
    its initial values where the number of classes differs or the file has none.

    Args:
        model: changed in place, and only if everything fits.
        weights: a file, or a state dict.
        source: what sentences and errors call a state dict.

    Returns:
        One sentence: what was loaded, resized, left at its initial values, left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or its weights do not fit the model.
    """
    grid = None
    if not isinstance(weights, Mapping):
        source, weights = str(weights), read_checkpoint(weights)
    if "architecture" in weights:  # a checkpoint of train.py knows its grid
        with torch.device("meta"):
            grid = VisionTransformer(**weights["architecture"]).grid
    given, own = unwrap(weights), model.state_dict()
    head = {name: tensor for name, tensor in own.items() if name.startswith("head.")}
    report, loaded = [], len(own)

    if "pos_embed" in given:
        prefix = sum(name in given for name in ("cls_token", "dist_token"))
        resized, change = resize_pos_embed(given["pos_embed"], prefix, grid, model)
        given["pos_embed"] = resized
        report += [f"position embedding resized {change}"] if change else []
    if any(name not in given or given[name].shape != head[name].shape for name in head):
        had = len(given["head.bias"]) if "head.bias" in given else 0
        new = f"head new, for {len(head['head.bias'])} classes "
        report.append(
            new + (f"(the file's has {had})" if had else "(the file has none)")
        )
        given |= head
        loaded -= len(head)
    for name, tensor in own.items():
        if name not in given:
            raise ValueError(f"{source} does not fit the model: it has no {name}")
        if given[name].shape != tensor.shape:
            shapes = f"{tuple(given[name].shape)}, not {tuple(tensor.shape)}"
            raise ValueError(f"{source} does not fit the model: its {name} is {shapes}")
    # What a model of this kind can do without; other leftovers mean another architecture.
    spare = rf"head.*|(cls|dist|mask)_token|blocks\.{len(model.blocks) - 1}\.norm2\..*"
    unused = sorted(given.keys() - own.keys())
    for name in unused:
        if not re.fullmatch(spare, name):
            raise ValueError(f"{source} does not fit the model, which has no {name}")
    if unused:
        report.append(f"left out {', '.join(unused)}")
    model.load_state_dict({name: given[name] for name in own})
    return "; ".join([f"loaded {loaded} tensors from {source}", *report])


def model_of_weights(
    given: dict[str, torch.Tensor],
    options: Mapping,
    img_size: Sequence[int] | None,
    source: str,
) -> tuple[VisionTransformer, str]:
    """A model for weights of timm, DeiT or DINO: what they tell is read from them.

    Args:
        given: the weights, as from `unwrap`.
        options: embed_dim, depth and num_heads, which they do not all tell.
        img_size: height and width in training, needed where the patches are no square.
        source: what errors call the weights.

    Returns:
        The model at the image size of its position embedding, without a head if the
        weights have none; and a sentence on what was loaded.

    Raises:
        ValueError: the weights are not those of such a model.
    """
    projection, pos_embed = given.get("patch_embed.proj.weight"), given.get("pos_embed")
    if projection is None or pos_embed is None or projection.ndim != 4:
        raise ValueError(
            f"{source} holds no Vision Transformer: there is no patch_embed.proj.weight "
            "or no pos_embed in it"
        )
    for name in ("dist_token", "reg_token"):
        if name in given:
            raise ValueError(f"{source} has a {name}, for which there is no place here")
    if "head.weight" in given and "head.bias" not in given:
        raise ValueError(f"{source} has a head without a bias, which this model has")
    patch, cls_token = projection.shape[-1], "cls_token" in given
    patches = pos_embed.shape[1] - cls_token
    side = math.isqrt(max(patches, 0))
    if side * side == patches:
        img_size = (side * patch, side * patch)
    elif not img_size or math.prod(img_size) != patches * patch**2:
        raise ValueError(
            f"{source} has {patches} positions of patches, which are no square; the "
            "image size tells their grid, if the CLS token has a position of its own"
        )
    options = options | {
        "img_size": tuple(img_size),
        "patch_size": patch,
        "num_classes": len(given.get("head.bias", ())),
        "qkv_bias": "blocks.0.attn.qkv.bias" in given,
        "last_skip": f"blocks.{options['depth'] - 1}.norm2.weight" in given,
        "pool": "cls" if cls_token else "mean",
    }
    model = VisionTransformer(**options)
    loaded = load_weights(model, {"architecture": options, "model": given}, source)
    if not options["last_skip"]:
        loaded += "; no skip connection around the last attention, as in SAR"
    return model, loaded


def resize_pos_embed(
    pos_embed: torch.Tensor,
    prefix: int,
    grid: tuple[int, int] | None,
    model: VisionTransformer,
) -> tuple[torch.Tensor, str]:
    """Resize a position embedding to the grid of a model, bicubically.

    Args:
        pos_embed: (1, prefix + H * W, D), CLS token first.
        prefix: how many tokens precede the patches.
        grid: (H, W). None: a square if it can be one, else the model's own grid.
        model: has the grid to resize to, and a CLS token or none.

    Returns:
        (1, N, D) for the model, and the change in words, such as "14x14 -> 12x16", or ""
        if there was none.

    Raises:
        ValueError: the number of patches is not that of the grid.
    """
    cls, patches = pos_embed[:, : model.prefix_tokens], pos_embed[:, prefix:]
    count = patches.shape[1]
    side = math.isqrt(count)
    if grid is None:
        grid = (side, side) if side * side == count else model.grid
    if count == 0 or grid[0] * grid[1] != count:
        raise ValueError(f"a position embedding of {count} patches has no known grid")
    change = ""
    if grid != model.grid:
        change = "{}x{} -> {}x{}".format(*grid, *model.grid)
        patches = patches.unflatten(1, grid).permute(0, 3, 1, 2)  # (1, D, H, W)
        patches = F.interpolate(patches.float(), size=model.grid, mode="bicubic")
        patches = patches.flatten(2).transpose(1, 2).to(cls.dtype)
    return torch.cat((cls, patches), dim=1), change
