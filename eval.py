# SPDX-License-Identifier: MIT
"""Measure a model: accuracy, robustness, and what its attention makes of objects.

python eval.py                                  # accuracy of the newest run under runs/
python eval.py --attention attention.png        # and a picture of its attention
python eval.py --checkpoint runs/NAME/checkpoint.pt --dataset cifar100 --device cuda
python eval.py --segmentation shapes            # Jaccard index of attention and objects
python eval.py --attention both.png --images FOLDER --compare runs/OTHER/checkpoint.pt
python eval.py --corruptions DIR --mce          # ImageNet-C, or CIFAR-C without --mce

Weights of timm, DeiT and DINO need --model, as the files do not name it:

python eval.py --checkpoint dino_deitsmall16_pretrain.pth --model vit_small \\
    --segmentation voc2012 --protocol dino

Without --dataset, accuracy is measured unless something else is asked for.
"""

import argparse
import contextlib
import copy
import importlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, save_image

from data import (
    AS_TENSOR,
    DATASETS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MASKS,
    VOID,
    Images,
    balanced_subset,
    list_images,
    load_corruptions,
    load_dataset,
    load_masks,
    make_loader,
    normalizer,
    test_transform,
    unreadable,
)
from entropy import connected_components, spatial_entropy, threshold_at_mean
from model import MODELS, VisionTransformer, load_weights, read_checkpoint, unwrap


class Formatter(
    argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
):
    """Shows the defaults, where there is one, and the description's line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, without the list of options."""

    def __init__(self, description: str | None, add_help: bool = True) -> None:
        options = {"formatter_class": Formatter, "allow_abbrev": False}
        super().__init__(description=description, add_help=add_help, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(low: float, high: float = math.inf, kind: type = float) -> Callable:
    """An argparse type: a finite number from low to high."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            upper = "" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is not at least {low:g}{upper}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is when none is: CUDA, MPS, CPU.

    Raises:
        ValueError: the device is unknown, or this machine or build of PyTorch does not
            have it.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name is None:
        name = next(kind for kind, there in available.items() if there)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"unknown device {name!r}; known are {', '.join(available)}"
        ) from error
    if not available.get(device.type, False):
        raise ValueError(
            f"device {name} was asked for, but PyTorch {torch.__version__} finds none; "
            "--device cpu works everywhere"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name} was asked for, but there are {torch.cuda.device_count()}"
        )
    return device


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = platform.processor() or platform.machine()
    return f"{device.type} ({processor}, {torch.get_num_threads()} threads)"


def grouped() -> bool:
    """Whether this process works with others."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process among those that torchrun started, 0 if it is alone."""
    return torchrun("RANK", 0)


def torchrun(name: str, alone: int) -> int:
    """A variable that torchrun sets; schedulers set some of the same names."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone


def say(text: str, stays: bool = True) -> None:
    """Print a line; one that does not stay is for terminals, and is overwritten.

    Of several processes, the first speaks.
    """
    if rank() > 0:
        return
    if not sys.stdout.isatty():
        if stays:
            print(text, flush=True)
        return
    if not stays:
        text = text[: shutil.get_terminal_size().columns - 1]
    print(f"\r\033[K{text}", end="\n" if stays else "", flush=True)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def autocast(device: torch.device, amp: bool) -> torch.autocast:
    """Mixed precision in bfloat16, which needs no loss scaling, where amp is on."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp)


def replace(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, then rename it: whole or not at all.

    Raises:
        OSError: the disk is full, or the like; what stood there before still stands.
    """
    partial = file.with_name(f"{file.name}.partial")
    try:
        write(partial)
        partial.replace(file)
    except RuntimeError as error:  # the zip writer's word for a full disk
        raise OSError(f"{partial.name} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def progress(loader: DataLoader) -> Iterator:
    """The batches of a loader; a line says how far it is, in a file once a minute."""
    start = told = time.perf_counter()
    seen, total = 0, len(loader.dataset)
    terminal = sys.stdout.isatty()
    for batch in loader:
        yield batch
        seen, now = seen + len(batch[0]), time.perf_counter()
        if now - told > (0.2 if terminal else 60):
            told, left = now, duration((now - start) * (total - seen) / seen)
            say(f"{seen} of {total} images, {left} left", stays=not terminal)


# -------------------------------------------------------------------------- accuracy


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module,
    loader: Iterable,
    normalize: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    amp: bool,
    classes: torch.Tensor | None = None,
) -> dict:
    """Accuracy and attention statistics over a loader; every image counts once.

    Args:
        model: returns (logits, similarity).
        loader: of images, uint8 (B, 3, H, W), and labels, int64 (B).
        normalize: from `data.normalizer`.
        device: where the model is.
        amp: whether to run in bfloat16 autocast.
        classes: the model's class of each label, if labels are not its classes; the
            logits of other classes are left out.

    Returns:
        Plain numbers: images; loss (cross-entropy); acc1, acc5 (percent); entropy
        (nats) and components, means over images and heads; entropy_per_head,
        components_per_head, lists.
    """
    model.eval()
    if classes is not None:
        classes = classes.to(device)
    totals = []  # of each batch, on the device until the end
    for images, labels in loader:
        images = normalize(images.to(device, non_blocking=True))
        labels = labels.to(device, non_blocking=True)
        with autocast(device, amp):
            logits, similarity = model(images)
        logits = logits.float() if classes is None else logits.float()[:, classes]
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
        counts = (cross_entropy, best[:, 0].sum(), best.sum())
        totals.append(batch_totals(len(images), counts, similarity))
    total = sum_up(totals, device)
    images_seen, loss, top1, top5 = total[:4].tolist()
    return {
        "images": int(images_seen),
        "loss": loss / images_seen,
        "acc1": 100 * top1 / images_seen,
        "acc5": 100 * top5 / images_seen,
        **attention_means(total[4:] / images_seen),
    }


def batch_totals(
    count: int, sums: Iterable[torch.Tensor], similarity: torch.Tensor
) -> torch.Tensor:
    """One vector: the images of a batch, other sums over it, and those of its maps."""
    entropy = spatial_entropy(similarity, "none").sum(0)  # (heads,)
    components = count_components(similarity).sum(0)  # (heads,)
    sums = [each.float() for each in (*sums, *entropy, *components)]
    return torch.stack([torch.full_like(sums[0], count), *sums])


def sum_up(totals: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The sum of the batches' totals, of all processes, as float64 on the CPU."""
    total = torch.stack(totals).cpu().double().sum(0)
    if grouped():  # each has seen its share
        total = total.to(device)
        dist.all_reduce(total)
    return total.cpu()


def attention_means(means: torch.Tensor) -> dict:
    """Entropies and components of the heads, (2 * heads), as plain numbers by name."""
    entropy, components = means.chunk(2)
    return {
        "entropy": entropy.mean().item(),
        "components": components.mean().item(),
        "entropy_per_head": entropy.tolist(),
        "components_per_head": components.tolist(),
    }


def count_components(similarity: torch.Tensor) -> torch.Tensor:
    """Number of connected components of the foreground: (..., H, W) -> int64 (...)."""
    labels = connected_components(threshold_at_mean(similarity) > 0).flatten(-2)
    seen = labels.new_zeros(*labels.shape[:-1], labels.shape[-1] + 1)
    return seen.scatter_(-1, labels, 1)[..., 1:].sum(-1)  # slot 0 is the background


# ------------------------------------------------------------------------ corruptions

# The errors of AlexNet in percent, means over the severities: Hendrycks and Dietterich,
# "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations"
# (arXiv 1903.12261), with the digits of their spreadsheet at
# https://github.com/hendrycks/robustness.
ALEXNET_ERRORS = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
# Made for validation, and in no mean of theirs.
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")


def corruption_means(errors: Mapping[str, Mapping[int, float]], mce: bool) -> dict:
    """The plain mean of the errors, and the mean corruption error if asked for.

    Args:
        errors: percent, by corruption and severity.
        mce: whether to divide by AlexNet's errors: a corruption's error CE is the sum
            over its severities over AlexNet's sum, and mCE the mean over the 15
            corruptions of ImageNet-C (arXiv 1903.12261, section 4).

    Returns:
        mean_error (percent), the mean over severities, then corruptions; mean_over,
        the names of these, without EXTRA_CORRUPTIONS where there are others; with
        `mce` also ce (percent, by name) and mce, or partial_mce if some of the 15 are
        missing.

    Raises:
        ValueError: mce of none of the 15, or of one without severities 1 to 5.
    """
    means = {name: statistics.mean(errors[name].values()) for name in errors}
    names = [name for name in means if name not in EXTRA_CORRUPTIONS] or list(means)
    result = {"mean_error": statistics.mean(means[name] for name in names)}
    result["mean_over"] = names
    if mce:
        known = [name for name in ALEXNET_ERRORS if name in errors]
        if not known:
            raise ValueError(
                f"AlexNet's errors are known for {', '.join(ALEXNET_ERRORS)}; there are "
                f"{', '.join(errors)}"
            )
        for name in known:
            if sorted(errors[name]) != [1, 2, 3, 4, 5]:
                given = ", ".join(map(str, sorted(errors[name])))
                raise ValueError(
                    f"mCE takes severities 1 to 5 of {name}; there are {given}"
                )
        ce = {name: 100 * means[name] / ALEXNET_ERRORS[name] for name in known}
        key = "mce" if len(known) == len(ALEXNET_ERRORS) else "partial_mce"
        result |= {"ce": ce, key: statistics.mean(ce.values())}
    return result


# ------------------------------------------------------- attention as segmentation


@dataclass(frozen=True)
class Protocol:
    """A dialect of the Jaccard index of attention and objects."""

    size: int  # of the input, in pixels
    mass: float  # share of the attention that the kept patches hold
    void_counts: bool  # whether void pixels under these count as mistakes


# DINO's, Caron et al. (arXiv 2104.14294), Fig. 4; that of the authors of SAR, in their
# code; that of Naseer et al., "Intriguing Properties of Vision Transformers" (arXiv
# 2105.10497), in theirs. DINO does not print its input size: 480 is the default of its
# code for pictures of attention.
PROTOCOLS = {
    "dino": Protocol(size=480, mass=0.6, void_counts=False),
    "sar": Protocol(size=480, mass=0.6, void_counts=True),
    "ipvit": Protocol(size=512, mass=0.9, void_counts=True),
}
# These have photographs, for which the protocols are made; the images of the others are
# small, and the model's own input size is the one that makes sense.
PHOTOGRAPHS = ("voc2012", "pets")


def mass_mask(similarity: torch.Tensor, mass: float) -> torch.Tensor:
    """The patches that hold this share of the attention, the fewest possible.

    The most attended come first, until they hold the share (to 1e-5, so that rounding
    adds no patch). Patches attended as much as the last of them stay too: which of
    equals are kept does not depend on their order.

    Args:
        similarity: floating point (..., H, W), before softmax.
        mass: from 0 to 1, of the attention to patches, without that to the CLS token.

    Returns:
        bool (..., H, W); nothing is kept where a score is not finite.
    """
    attention = similarity.float().flatten(-2).softmax(-1)
    falling = attention.sort(-1, descending=True).values
    before = falling.cumsum(-1) - falling  # the mass of the patches that come before
    kept = (before < mass - 1e-5).sum(-1, keepdim=True)
    least = falling.gather(-1, (kept - 1).clamp(min=0))
    return (attention >= least).view_as(similarity)


def jaccard(
    patches: torch.Tensor, masks: torch.Tensor, objects: int, void_counts: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Jaccard index, intersection over union, of each head with each object.

    Args:
        patches: bool (B, heads, H, W), what each head keeps.
        masks: int64 (B, height, width), in pixels, multiples of H and W: 0 background,
            VOID, else the object, 1 to `objects`.
        objects: the largest number of an object.
        void_counts: whether void pixels count as background; else they leave both
            intersection and union.

    Returns:
        float32 (B, heads, objects), 0 where there is no such object, and bool
        (B, objects), whether there is.

    A patch covers its pixels as by nearest upsampling. So counting the pixels of each
    object in each patch, once, leaves matrix products over the patches.
    """
    count, _, height, width = patches.shape
    pixels = masks.unflatten(2, (width, -1)).unflatten(1, (height, -1))
    pixels = pixels.transpose(2, 3).flatten(3).flatten(1, 2)  # (B, H * W, of a patch)
    pixels = pixels.where(pixels != VOID, objects + 1)
    areas = pixels.new_zeros(count, height * width, objects + 2, dtype=torch.float32)
    areas.scatter_add_(2, pixels, torch.ones((), device=areas.device).expand_as(pixels))
    inside, void = areas[..., 1:-1], areas[..., -1:]  # (B, H * W, objects), (.., 1)
    size = areas.sum(-1, keepdim=True) - (0 if void_counts else void)
    chosen = patches.flatten(2).float()  # (B, heads, H * W)
    intersection = chosen @ inside  # (B, heads, objects)
    area = inside.sum(1, keepdim=True)  # (B, 1, objects)
    union = chosen @ size + area - intersection
    return intersection / union.clamp(min=1), area[:, 0] > 0


@torch.inference_mode()
def segment(
    model: torch.nn.Module,
    loader: Iterable,
    normalize: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    amp: bool,
    protocol: Protocol,
    objects: int,
) -> dict:
    """How well the CLS attention of the last block covers the objects.

    For each object the head with the best Jaccard index counts; the mean is over the
    objects of an image, then over the images. Images without an object are left out.
    Two rules say what a head keeps: the share of the mass of the protocol, and the
    foreground of the method, where the similarity is above its mean.

    Args:
        loader: of images, uint8 (B, 3, height, width), and masks, int64 (B, height,
            width), as from `data.load_masks`.
        objects: the largest number in the masks, VOID apart.
        The others: as in `evaluate`.

    Returns:
        Plain numbers: images; images_with_objects; jaccard_mass and jaccard_mean of
        the two rules, in percent, NaN where no image has an object; the same
        _per_head, lists; and the attention statistics of `evaluate`.
    """
    model.eval()
    totals = []
    for images, masks in loader:
        images = normalize(images.to(device, non_blocking=True))
        masks = masks.to(device, non_blocking=True)
        with autocast(device, amp):
            _, similarity = model(images)
        sums = []
        for patches in (
            mass_mask(similarity, protocol.mass),
            threshold_at_mean(similarity) > 0,
        ):
            index, there = jaccard(patches, masks, objects, protocol.void_counts)
            found = there.sum(1)  # (B,)
            # A score that is not finite is no result of 0.
            index = index + 0 * similarity.sum((-2, -1))[..., None]
            best = index.amax(1, keepdim=True)  # (B, 1, objects)
            means = torch.cat((best, index), 1).sum(-1) / found.clamp(min=1)[:, None]
            sums += [found.count_nonzero(), *means.sum(0)]
        totals.append(batch_totals(len(images), sums, similarity))
    total = sum_up(totals, device)
    heads = (len(total) - 5) // 4
    images_seen, with_objects = int(total[0]), int(total[1])
    by_mass, by_mean = (
        100 * total[first : first + heads + 1] / (with_objects or math.nan)
        for first in (2, 4 + heads)
    )
    return {
        "images": images_seen,
        "images_with_objects": with_objects,
        "jaccard_mass": by_mass[0].item(),
        "jaccard_mass_per_head": by_mass[1:].tolist(),
        "jaccard_mean": by_mean[0].item(),
        "jaccard_mean_per_head": by_mean[1:].tolist(),
        **attention_means(total[5 + 2 * heads :] / images_seen),
    }


# ------------------------------------------------------------------- trained models


@dataclass
class Trained:
    """A model, and what evaluating it takes."""

    model: VisionTransformer
    path: Path
    about: list[str]  # sentences on what was loaded
    settings: dict  # of the run; for other people's weights what OTHERS says
    classes: list[str] | None  # None: they have no names, or there is no head
    num_classes: int  # 0: there is no head
    mean: tuple[float, ...]  # what its images were normalised with
    std: tuple[float, ...]


# What is taken for other people's weights: the evaluation protocol of DeiT and DINO.
OTHERS = {"dataset": None, "data_dir": "data", "crop": "resized", "batch_size": 64}
OTHERS |= {"amp": False, "device": "cpu"}


def load_run(
    path: str | os.PathLike, weights: str = "model"
) -> tuple[VisionTransformer, dict]:
    """The trained model and the whole checkpoint of a run of train.py, on the CPU.

    Args:
        path: a checkpoint.pt.
        weights: "model", or "model_ema" for the averaged weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or was not written by train.py.
    """
    checkpoint = read_checkpoint(path)
    return model_of_run(checkpoint, path, weights), checkpoint


def model_of_run(
    checkpoint: Mapping, path: str | os.PathLike, weights: str
) -> VisionTransformer:
    """The trained model of a run, from its checkpoint. Raises: as `load_run`."""
    if (
        not {"architecture", "settings", "classes", "model", "epoch"}
        <= checkpoint.keys()
    ):
        raise ValueError(
            f"{path} was not written by train.py: it does not name its architecture"
        )
    try:
        model = VisionTransformer(**checkpoint["architecture"])
        model.load_state_dict(checkpoint[weights])
    except KeyError as error:
        raise ValueError(f"{path} has no averaged weights") from error
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the weights in {path} do not fit its architecture"
        ) from error
    return model


def load_trained(path: Path, args: argparse.Namespace) -> Trained:
    """A run's model, or one of other people's weights, for the input size asked for.

    Args:
        path: the checkpoint.
        args: model, model_ema, img_size, classes, mean and std are used.

    Raises:
        OSError, ValueError: one sentence on what is wrong.
    """
    checkpoint = read_checkpoint(path)
    weights = "model_ema" if args.model_ema else "model"
    if "architecture" in checkpoint:
        model = model_of_run(checkpoint, path, weights)
        settings, classes = checkpoint["settings"], list(checkpoint["classes"])
        epochs = f"{checkpoint['epoch']} of {settings['epochs']} epochs"
        about = [f"{path}: {settings['model']} after {epochs}"]
        num_classes = len(classes)
        source = DATASETS[settings["dataset"]]
        mean, std = source.mean, source.std
    else:
        model, loaded, num_classes = model_of_others(checkpoint, path, weights, args)
        classes = read_classes(args.classes, num_classes) if args.classes else None
        about = [f"{path}: {args.model}", loaded]
        settings, mean, std = OTHERS, IMAGENET_MEAN, IMAGENET_STD
    if args.img_size:
        change = model.resize(tuple(args.img_size))
        about += [f"position embedding resized {change}"] if change else []
    mean, std = tuple(args.mean or mean), tuple(args.std or std)
    return Trained(model, path, about, settings, classes, num_classes, mean, std)


def model_of_others(
    checkpoint: Mapping, path: Path, weights: str, args: argparse.Namespace
) -> tuple[VisionTransformer, str, int]:
    """A ViT of timm, DeiT or DINO: what --model does not say is read from the weights.

    Returns:
        The model at the image size of its position embedding, a sentence on what was
        loaded, and the number of its classes, 0 if it has no head.

    Raises:
        ValueError: the weights are not those of such a model.
    """
    if args.model is None:
        names = ", ".join(MODELS)
        raise ValueError(
            f"{path} does not name its model: do so with --model ({names})"
        )
    if weights == "model_ema":
        checkpoint = checkpoint.get(weights)
        if checkpoint is None:
            raise ValueError(f"{path} has no averaged weights")
    given = unwrap(checkpoint)
    projection, pos_embed = given.get("patch_embed.proj.weight"), given.get("pos_embed")
    if projection is None or pos_embed is None or projection.ndim != 4:
        raise ValueError(
            f"{path} holds no Vision Transformer: there is no patch_embed.proj.weight "
            "or no pos_embed in it"
        )
    if "dist_token" in given:
        raise ValueError(f"{path} has a distillation token, which this model has not")
    patch_size, cls_token = projection.shape[-1], "cls_token" in given
    patches = pos_embed.shape[1] - cls_token
    side = math.isqrt(max(patches, 0))
    img_size = (side * patch_size, side * patch_size)
    if side * side != patches and args.img_size:
        img_size = tuple(args.img_size)  # which `load_weights` checks
    last = MODELS[args.model]["depth"] - 1
    num_classes = len(given["head.bias"]) if "head.bias" in given else 0
    options = {
        "img_size": img_size,
        "patch_size": patch_size,
        "num_classes": num_classes or 1,
        "qkv_bias": "blocks.0.attn.qkv.bias" in given,
        "last_skip": f"blocks.{last}.norm2.weight" in given,
        "pool": "cls" if cls_token else "mean",
    }
    model = VisionTransformer(**MODELS[args.model] | options)
    try:
        loaded = load_weights(model, given)
    except ValueError as error:
        reason = str(error).replace("the state dict", str(path), 1)
        raise ValueError(f"not a {args.model}: {reason}") from error
    loaded = loaded.replace(" from the state dict", "", 1)
    if not num_classes:
        loaded = loaded.partition("; head new")[0] + "; there is no head"
    if not options["last_skip"]:
        loaded += "; no skip connection around the last attention, as in SAR"
    return model, loaded, num_classes


def read_classes(path: str, count: int) -> list[str]:
    """Names of classes, in order: a file's lines, or the names of a folder's folders.

    Of a line that starts with a WordNet id, as in ImageNet's LOC_synset_mapping.txt,
    the id is the name.

    Raises:
        OSError, ValueError: there is no such file, or it has not `count` names.
    """
    source = Path(path)
    if source.is_dir():
        names = sorted(folder.name for folder in source.iterdir() if folder.is_dir())
    else:
        lines = [line.strip() for line in source.read_text().splitlines()]
        names = [re.sub(r"^(n\d{8})\b.*", r"\1", line) for line in lines if line]
    if len(names) != count:
        raise ValueError(f"{path} names {len(names)} classes, and the head has {count}")
    return names


def match_classes(
    trained: Trained, dataset: Images, name: str
) -> tuple[torch.Tensor | None, str]:
    """The model's class of each class of a data set, by name, and a sentence on it.

    None stands for the same classes in the same order.

    Raises:
        ValueError: the classes do not fit.
    """
    path, count = trained.path, trained.num_classes
    if trained.classes is None or not dataset.classes:
        fits = count == len(dataset.classes)
        if not dataset.classes:
            fits = dataset.targets.max() < count
        if not fits:
            seen = len(dataset.classes) or int(dataset.targets.max()) + 1
            raise ValueError(
                f"{path} has {count} classes and {name} {seen}, and not both have names"
                + ("" if trained.classes else "; --classes gives those of the weights")
            )
        return None, f"{name}: classes without names, taken in the order they have"
    known = {name: index for index, name in enumerate(trained.classes)}
    unknown = [each for each in dataset.classes if each not in known]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the {len(dataset.classes)} classes of {name} are unknown "
            f"to {path}: {', '.join(unknown)}"
        )
    if list(dataset.classes) == trained.classes:
        return None, ""
    classes = torch.tensor([known[each] for each in dataset.classes])
    if len(classes) == count:
        return classes, ""
    return classes, f"logits restricted to its {len(classes)} of {count} classes"


# ------------------------------------------------------------------------ the picture

TILE = 120  # pixels, the longer side of a tile
LINE = 26  # pixels, the height of a line of text
LETTER = 10  # pixels, about the width of a letter
GAP = 6  # pixels between tiles
LONGEST = 4  # a longer image, in its shorter sides, is squeezed to this
# Viridis: dark is little attention, bright is much; even in lightness, so safe in grey
# and for colour-blind readers.
HEAT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
# Okabe and Ito's colours, which colour-blind readers tell apart; the heaviest component
# comes first.
PALETTE = [
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (240, 228, 66),
    (0, 114, 178),
]


def caption(text: str, width: int, height: int = LINE) -> torch.Tensor:
    """One line of text on white, cut where it is too long: uint8 (3, height, width)."""
    text = text.encode("ascii", "replace").decode()
    letters = (width - 4) // LETTER
    text = text if len(text) <= letters else f"{text[: letters - 2]}.."
    canvas = torch.full((3, height // 2, width // 2), 255, dtype=torch.uint8)
    top = (height - LINE) // 4
    box = torch.tensor([[0, top, width // 2 - 1, height // 2 - 1]])
    canvas = draw_bounding_boxes(
        canvas, box, [text], "white", width=0, label_colors="black"
    )
    canvas = F.interpolate(canvas[None].float(), (height, width), mode="bicubic")[0]
    return canvas.clamp(0, 255).to(torch.uint8)


def heat(attention: torch.Tensor) -> torch.Tensor:
    """Attention from 0 to 1, (H, W), in the colours of HEAT: uint8 (3, H, W)."""
    anchors = torch.tensor(HEAT, dtype=torch.float32)
    place = attention.clamp(0, 1) * (len(HEAT) - 1)
    low = place.long().clamp(max=len(HEAT) - 2)
    colour = anchors[low].lerp(anchors[low + 1], (place - low)[..., None])  # (H, W, 3)
    return colour.permute(2, 0, 1).round().to(torch.uint8)


def join(tiles: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Tiles (3, height, width), below one another (dim 1) or side by side (dim 2)."""
    height, width = (max(tile.shape[d] for tile in tiles) for d in (1, 2))
    padded = []
    for tile in tiles:
        right, below = (0, height - tile.shape[1]) if dim == 2 else (GAP, 0)
        right, below = (GAP, below) if dim == 2 else (width - tile.shape[2], GAP)
        padded.append(F.pad(tile, (0, right, 0, below), value=255))
    joined = torch.cat(padded, dim)
    return joined[:, :, :-GAP] if dim == 2 else joined[:, :-GAP]


def apart(tile: torch.Tensor) -> torch.Tensor:
    """A tile with white on its left: here another model begins."""
    return F.pad(tile, (3 * GAP, 0, 0, 0), value=255)


@torch.inference_mode()
def look_at(
    images: list[torch.Tensor], trained: Trained, device: torch.device
) -> list[torch.Tensor]:
    """The similarity maps of images of any size and aspect, each (heads, H, W).

    Each image is resized so that its shorter side is that of the model's images and
    the longer one keeps the aspect, to whole patches.
    """
    patch, shorter = trained.model.patch_size, min(trained.model.img_size)
    normalize = normalizer(trained.mean, trained.std, device)
    models, maps = {}, []
    for image in images:
        sides = image.shape[-2:]
        scale = shorter / min(sides)
        longest = LONGEST * shorter
        size = tuple(
            round(min(scale * side, longest) / patch) * patch for side in sides
        )
        if size not in models:
            models = {size: copy.deepcopy(trained.model).eval().to(device)}
            models[size].resize(size)
        image = v2.functional.resize(image, size, v2.InterpolationMode.BICUBIC)
        _, similarity = models[size](normalize(image[None].to(device)))
        maps.append(similarity[0].cpu())
    return maps


def draw_attention(
    images: list[torch.Tensor],
    captions: list[str],
    looks: list[tuple[str, list[torch.Tensor]]],
    mass: float,
) -> torch.Tensor:
    """What the heads of one or more models make of images.

    Args:
        images: uint8 (3, height, width) each, of any size and aspect.
        captions: texts, written below the images.
        looks: of each model a title, and the similarity maps of the images, (heads, H,
            W) each.
        mass: the share of the attention that the second row shows.

    Returns:
        uint8 (3, height, width) of the picture. For each image and head there are, from
        top to bottom: the attention, a softmax over the patches, on a scale of its own
        from 0 to its maximum; the image where the patches are that hold this share of
        the attention; the connected components of the foreground, where the similarity
        is above its mean, the heaviest first in the order of PALETTE; the spatial
        entropy H in nats and the number K of components.
    """
    side, label = 3 * TILE + 2 * GAP, 12 * LETTER
    spaces = [caption("", side), caption("", label)]
    titles, heads = [], []
    for title, maps in looks:
        names = [caption(f"head {head + 1}", TILE) for head in range(len(maps[0]))]
        heads.append(apart(join(names, 2)))
        titles.append(apart(caption(title, heads[-1].shape[2] - 3 * GAP)))
    blocks = [join([*spaces, *titles], 2)] if len(looks) > 1 else []
    blocks.append(join([*spaces, *heads], 2))
    for i, image in enumerate(images):
        scale = TILE / max(image.shape[-2:])
        size = [max(round(scale * length), 1) for length in image.shape[-2:]]
        modes = v2.InterpolationMode
        small, large = (  # a small image shows its pixels as they are
            v2.functional.resize(
                image,
                [factor * length for length in size],
                modes.NEAREST_EXACT if factor * scale > 1 else modes.BILINEAR,
            )
            for factor in (1, 3)
        )
        tile_height = max(size[0], LINE)
        texts = ("attention", f"{100 * mass:.0f} % of it", "components")
        columns = [
            join([large, caption(captions[i], side)], 1),
            join([caption(text, label, tile_height) for text in texts], 1),
        ]
        for _, maps in looks:
            tiles = [draw_head(small, similarity, mass) for similarity in maps[i]]
            columns.append(apart(join(tiles, 2)))
        blocks.append(F.pad(join(columns, 2), (0, 0, 0, GAP), value=255))
    return F.pad(join(blocks, 1), (GAP, GAP, GAP, GAP), value=255)


def draw_head(
    image: torch.Tensor, similarity: torch.Tensor, mass: float
) -> torch.Tensor:
    """One head's column in the picture: uint8 (3, height, TILE).

    Args:
        image: uint8 (3, h, w), of the size of a tile.
        similarity: (H, W).
        mass: as in `draw_attention`.
    """

    def enlarge(x: torch.Tensor) -> torch.Tensor:
        size, mode = image.shape[-2:], "nearest-exact"
        return F.interpolate(x[None, None].float(), size, mode=mode)[0, 0].to(x.dtype)

    attention = similarity.float().flatten().softmax(0).view_as(similarity)
    grey = image.float().mean(0, keepdim=True).expand(3, -1, -1)
    faded = (0.35 * grey + 0.65 * 255).to(torch.uint8)
    kept = image.where(enlarge(mass_mask(similarity, mass)), faded)

    activation = threshold_at_mean(similarity)
    labels = connected_components(activation > 0)
    found = labels.unique()
    found = found[found > 0]
    masses = torch.tensor([activation[labels == n].sum() for n in found])
    order = found[masses.argsort(descending=True)]
    masks = enlarge(labels)[None] == order[:, None, None]
    coloured = faded
    if len(masks):
        colours = [PALETTE[n % len(PALETTE)] for n in range(len(masks))]
        coloured = draw_segmentation_masks(faded, masks, 0.75, colours)
    tiles = [heat(enlarge(attention / attention.max())), kept, coloured]
    short = LINE - image.shape[1]
    tiles = [F.pad(tile, (0, 0, 0, max(short, 0)), value=255) for tile in tiles]
    text = f"H {spatial_entropy(similarity):.2f} K {len(order)}"
    return join([*tiles, caption(text, TILE)], 1)


# ----------------------------------------------------------------------- the command


def newest_checkpoint(runs: Path = Path("runs")) -> Path:
    """The checkpoint written last under `runs`.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(runs.glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"no checkpoint at {runs}/*/checkpoint.pt; train one with python train.py, "
            "or name one with --checkpoint"
        )
    return found[-1]


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    whole, count, share = number(1, kind=int), number(0, kind=int), number(0, 1)
    size = {"type": whole, "nargs": "+", "metavar": "PIXELS"}
    add("--checkpoint", metavar="FILE", help="a run's, or weights; the newest run's")
    add("--model-ema", action="store_true", help="evaluate its averaged weights")
    add("--model", choices=MODELS, help="of weights that do not name their model")
    add("--img-size", **size, help="side, or height and width; the model's")
    channels = {"type": share, "nargs": 3, "metavar": "X"}
    add("--mean", **channels, help="of the channels, 0 to 1; the run's, or ImageNet's")
    add("--std", **channels, help="of the channels, 0 to 1; the run's, or ImageNet's")
    classes = (
        "names of the classes of such weights: a file of lines, a folder of folders"
    )
    add("--classes", metavar="PATH", help=classes)
    add("--dataset", choices=DATASETS, metavar="NAME", help="to classify; the run's")
    add("--data-dir", metavar="DIR", help="where data sets lie; the run's, or data")
    crop = "resized, center (resizes nothing) or whole; the run's"
    add("--crop", choices=("resized", "center", "whole"), metavar="KIND", help=crop)
    corruptions = "measure the errors on ImageNet-C's folders or CIFAR-C's arrays"
    add("--corruptions", metavar="DIR", help=corruptions)
    add("--mce", action="store_true", help="and relate them to AlexNet's")
    segmentation = f"measure how attention covers objects: {', '.join(MASKS)}"
    add("--segmentation", choices=MASKS, metavar="NAME", help=segmentation)
    protocol = f"its dialect: {', '.join(PROTOCOLS)}"
    add("--protocol", choices=PROTOCOLS, default="dino", metavar="NAME", help=protocol)
    add("--attention", metavar="FILE.png", help="draw the attention there")
    add("--images", metavar="FOLDER", help="on your images, of any size and aspect")
    add("--compare", metavar="FILE", help="beside that of another checkpoint")
    add("--rows", type=whole, default=4, metavar="N", help="images in that picture")
    add("--json", metavar="FILE", help="write all that is measured there")
    skip = "leave out images that cannot be read, and say which"
    add("--skip-unreadable", action="store_true", help=skip)
    batch_size = "the run's, or 64; on a CPU what its cache holds"
    add("--batch-size", type=whole, metavar="N", help=batch_size)
    add("--workers", type=count, default=0, metavar="N", help="loading processes")
    device = "cuda, mps or cpu; the first found, if left out"
    add("--device", metavar="NAME", help=device)
    yes_or_no = argparse.BooleanOptionalAction
    add("--amp", action=yes_or_no, help="bfloat16; as in the run, on such a device")
    add("--benchmark", action="store_true", help="time evaluation, and timm's ViT")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    try:
        if args.benchmark:
            benchmark(choose_device(args.device), args)
        else:
            run(args)
    except (OSError, ValueError) as error:
        # A worker process puts its traceback first; the last line says what is wrong.
        lines = str(error).strip().splitlines()
        traced = any(line.startswith("Traceback") for line in lines)
        parser.error(" ".join((lines[-1] if traced else str(error)).split()))
    except KeyboardInterrupt:
        sys.exit(130)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other, and files that cannot be written.

    Raises:
        ValueError: one sentence.
    """
    needs = {"images": "attention", "compare": "attention", "mce": "corruptions"}
    for option, other in needs.items():
        if getattr(args, option) and not getattr(args, other):
            raise ValueError(f"--{option} needs --{other}")
    if args.img_size and len(args.img_size) > 2:
        raise ValueError("--img-size takes one number, or height and width")
    if args.img_size and len(args.img_size) == 1:
        args.img_size *= 2
    if args.std and not all(args.std):
        raise ValueError("--std must be above 0")
    for option, kind in (("attention", ".png"), ("json", "")):
        file = Path(getattr(args, option) or f"none{kind}")
        wrong = kind and file.suffix != kind
        if wrong or file.is_dir() or not os.access(file.parent, os.W_OK):
            a = f"a {kind}" if kind else "a file"
            raise ValueError(
                f"--{option} takes {a} in a folder that can be written to, not {file}"
            )


class Evaluation:
    """The model, and what the parts of an evaluation share.

    Each part is a method that reads its data and returns the work that is left to do:
    so bad input is found before any work. The work prints what it measures, and returns
    it by name.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, choose_device(args.device)
        path = Path(args.checkpoint) if args.checkpoint else newest_checkpoint()
        self.trained = load_trained(path, args)
        self.contestants = [self.trained]  # in the picture
        self.model, settings = self.trained.model, self.trained.settings
        name = settings.get("model")
        if name and args.model not in (None, name):
            raise ValueError(f"{path} is a {name}, not a {args.model}")
        if name and args.classes:
            raise ValueError(f"{path} names its classes itself, without --classes")
        self.dataset = args.dataset or settings["dataset"]
        self.data_dir = args.data_dir or settings["data_dir"]
        self.crop = args.crop or settings["crop"].replace("padded", "whole")
        # In the run's precision, if it was on such a device.
        same = self.device.type == torch.device(settings["device"]).type
        self.amp = settings["amp"] and same if args.amp is None else args.amp
        self.where = f"on {self.device} in {'bfloat16' if self.amp else 'float32'}"

    def measure(
        self,
        how: Callable,
        model: VisionTransformer,
        dataset: Dataset,
        *options: object,
    ) -> dict:
        """Call `evaluate` or `segment` on all images of a data set.

        Raises:
            ValueError: images cannot be read; the sentence names and counts them.
        """
        args, device, count = self.args, self.device, len(dataset)
        if args.skip_unreadable:
            dataset = leave_out(unreadable(dataset), dataset, skip=True)
        batch_size = args.batch_size or self.trained.settings["batch_size"]
        if device.type == "cpu" and not args.batch_size:
            batch_size = cpu_batch_size(model)
        loader = make_loader(
            dataset,
            batch_size,
            train=False,
            workers=args.workers,
            pin_memory=device.type == "cuda",
        )
        normalize = normalizer(self.trained.mean, self.trained.std, device)
        given = (progress(loader), normalize, device, self.amp, *options)
        try:
            result = how(model.to(device), *given)
        except OSError:
            leave_out(unreadable(dataset), dataset, skip=False)
            raise
        return result | {"left_out": count - len(dataset)}

    def classifier(self) -> VisionTransformer:
        if not self.trained.num_classes:
            raise ValueError(
                f"{self.trained.path} has no head to classify with; --segmentation and "
                "--attention with --images need none"
            )
        return self.model

    def test_set(self, transform: Callable | None) -> Images:
        if self.dataset is None:
            path = self.trained.path
            raise ValueError(f"{path} knows no data set: name one with --dataset")
        return load_dataset(self.dataset, self.data_dir, "test", transform)

    def accuracy(self) -> Callable[[], dict]:
        """Classify the test images of a data set."""
        name, model = self.dataset, self.classifier()
        dataset = self.test_set(test_transform(model.img_size, crop=self.crop))
        try_first(dataset)
        classes, restricted = match_classes(self.trained, dataset, name)

        def work() -> dict:
            say(f"{name}, test split, {size(model)} ({self.crop}), {self.where}")
            if restricted:
                say(restricted)
            result = self.measure(evaluate, model, dataset, classes)
            line = "{images} images   top-1 {acc1:.2f} %   top-5 {acc5:.2f} %   "
            say((line + "loss {loss:.4f}").format(**result))
            say_attention(result)
            about = {"dataset": name, "split": "test", "img_size": model.img_size}
            about |= {"crop": self.crop, "classes": len(dataset.classes)}
            return {"accuracy": about | result}

        return work

    def corruptions(self) -> Callable[[], dict]:
        """Classify corrupted images: the error of each corruption and severity."""
        folder, model = self.args.corruptions, self.classifier()
        sets = load_corruptions(
            folder,
            test_transform(model.img_size, crop=self.args.crop or "center"),
            test_transform(model.img_size, crop=self.crop),
        )
        matched = {
            (name, severity): match_classes(self.trained, images, folder)
            for name, severities in sets.items()
            for severity, images in severities.items()
        }
        for severities in sets.values():
            for images in severities.values():
                try_first(images)
        # Before any work: whether they can give the mCE.
        corruption_means(
            {name: dict.fromkeys(severities, 0.0) for name, severities in sets.items()},
            self.args.mce,
        )

        def work() -> dict:
            say(f"{folder}, {size(model)}, {self.where}")
            for sentence in dict.fromkeys(sentence for _, sentence in matched.values()):
                if sentence:
                    say(sentence)
            errors, counts = {}, {}
            levels = sorted({level for each in sets.values() for level in each})
            columns = [*map(str, levels), "mean", *(["CE"] if self.args.mce else [])]
            say_row("error (%) at severity", columns)
            order = [*ALEXNET_ERRORS, *sorted(sets.keys() - ALEXNET_ERRORS.keys())]
            for name in (each for each in order if each in sets):
                errors[name], counts[name] = {}, {}
                for severity, images in sets[name].items():
                    classes, _ = matched[name, severity]
                    result = self.measure(evaluate, model, images, classes)
                    errors[name][severity] = 100 - result["acc1"]
                    counts[name][severity] = result["images"]
                row = [errors[name].get(level, math.nan) for level in levels]
                row.append(statistics.mean(errors[name].values()))
                if self.args.mce and name in ALEXNET_ERRORS:
                    row.append(100 * row[-1] / ALEXNET_ERRORS[name])
                say_row(name, [f"{value:.2f}" for value in row])
            means = corruption_means(errors, self.args.mce)
            over = len(means["mean_over"])
            without = [name for name in errors if name not in means["mean_over"]]
            without = f", without {', '.join(without)}" if without else ""
            say(f"mean error {means['mean_error']:.2f} % over {over}{without}")
            if self.args.mce:
                given = len(means["ce"])
                value = means.get("mce", means.get("partial_mce"))
                partly = (
                    "" if given == len(ALEXNET_ERRORS) else f", of only {given} of 15"
                )
                say(
                    f"mCE {value:.2f} %{partly}: errors over AlexNet's on ImageNet-C's 1000 "
                    "classes (arXiv 1903.12261)"
                )
            about = {"folder": folder, "img_size": model.img_size, "images": counts}
            return {"corruptions": about | {"errors": errors} | means}

        return work

    def segmentation(self) -> Callable[[], dict]:
        """Compare the attention with the masks of objects."""
        args, name = self.args, self.args.segmentation
        protocol, model = PROTOCOLS[args.protocol], copy.deepcopy(self.model)
        if name in PHOTOGRAPHS and not args.img_size:
            model.resize(protocol.size)
        masks = load_masks(name, self.data_dir, model.img_size)
        split = "val" if name == "voc2012" else "test"

        def work() -> dict:
            other = model.img_size != (protocol.size, protocol.size)
            other = f" (its own is {protocol.size}x{protocol.size})" if other else ""
            void = "counted as background" if protocol.void_counts else "left out"
            say(f"{name}, {split} split, {self.where}")
            say(
                f"protocol {args.protocol}: input {size(model)}{other}, "
                f"{100 * protocol.mass:.0f} % of the mass, void pixels {void}"
            )
            options = (protocol, masks.objects)
            result = self.measure(segment, model, masks, *options)
            say("{images} images, {images_with_objects} with objects".format(**result))
            heads = len(result["entropy_per_head"])
            columns = ["best", *(f"head {n + 1}" for n in range(heads))]
            say_row("Jaccard index (%)", columns)
            rules = {"mass": f"{100 * protocol.mass:.0f} % of the mass"}
            rules |= {"mean": "similarity > its mean"}
            for key, label in rules.items():
                index = f"jaccard_{key}"
                row = [result[index], *result[f"{index}_per_head"]]
                say_row(label, [f"{value:.2f}" for value in row])
            say_attention(result)
            about = {"dataset": name, "split": split, "protocol": args.protocol}
            about |= asdict(protocol) | {"img_size": model.img_size}
            return {"segmentation": about | result}

        return work

    def picture(self) -> Callable[[], dict]:
        """Draw the attention on images of a folder, or of the data set measured."""
        args = self.args
        if args.images:
            images, captions = read_images(args)
        else:
            images, captions = self.sample_images()
        if args.compare:
            self.contestants.append(load_trained(Path(args.compare), args))
        mass = PROTOCOLS[args.protocol].mass

        def work() -> dict:
            looks = [
                (run_name(trained.path), look_at(images, trained, self.device))
                for trained in self.contestants
            ]
            drawn = draw_attention(images, captions, looks, mass) / 255
            file = Path(args.attention)
            replace(file, lambda partial: save_image(drawn, partial, format="png"))
            say(f"wrote {file}")
            return {"attention": {"file": str(file), "images": captions}}

        return work

    def sample_images(self) -> tuple[list[torch.Tensor], list[str]]:
        """Images for the picture, uint8 (3, height, width), and their captions."""
        rows, name = self.args.rows, self.args.segmentation
        if name and not self.args.dataset:
            masks = load_masks(name, self.data_dir, self.model.img_size)
            order = torch.randperm(
                len(masks), generator=torch.Generator().manual_seed(0)
            )
            chosen = sorted(order[:rows].tolist())
            images = [masks.pair(index)[0] for index in chosen]
            captions = [f"image {index}" for index in chosen]
        else:
            dataset = self.test_set(None)
            subset = balanced_subset(dataset, min(rows, len(dataset)), seed=0)
            images, labels = zip(*(subset[index] for index in range(len(subset))))
            captions = [dataset.classes[label] for label in labels]
        return [AS_TENSOR(image) for image in images], captions


def read_images(args: argparse.Namespace) -> tuple[list[torch.Tensor], list[str]]:
    """The first images of a folder, uint8 (3, height, width), and their names.

    Raises:
        OSError: there are none.
        ValueError: some cannot be read, and it was not asked to leave these out.
    """
    files = list_images(args.images)[: args.rows]
    folder = Images(files, range(len(files)), [file.stem for file in files], AS_TENSOR)
    read = leave_out(unreadable(folder), folder, skip=args.skip_unreadable)
    images, indices = zip(*(read[n] for n in range(len(read))))
    return list(images), [folder.classes[index] for index in indices]


def leave_out(bad: dict[int, str], dataset: Dataset, skip: bool) -> Dataset:
    """A data set without the items that cannot be read, if that was asked for.

    Args:
        bad: from `data.unreadable`.
        dataset: of which these are.
        skip: whether it was asked for.

    Raises:
        ValueError: it was not, or nothing is left; the sentence names and counts them.
    """
    if not bad:
        return dataset
    errors, most = list(bad.values()), 5
    more = [f"and {len(errors) - most} more"] if len(errors) > most else []
    count, which = f"{len(bad)} of {len(dataset)}", "; ".join(errors[:most] + more)
    if not skip:
        hint = "--skip-unreadable leaves such images out"
        raise ValueError(f"{count} images failed: {which} ({hint})")
    if len(bad) == len(dataset):
        raise ValueError(f"{count} images failed: {which}")
    say(f"{count} images left out: {which}")
    return Subset(dataset, [n for n in range(len(dataset)) if n not in bad])


CPU_CACHE = 5e6  # bytes; fastest on two cores with 2 MB each of their own


def cpu_batch_size(model: VisionTransformer) -> int:
    """Images whose widest activation, the hidden layer of an MLP, stays in the cache.

    A ViT-S/16 at 224 px, 4 images at a time, takes 0.92 of its time with 8, and small
    ones down to 0.7 of their time with 128.
    """
    tokens = model.pos_embed.shape[1]
    return max(
        1, round(CPU_CACHE / (4 * tokens * model.blocks[0].mlp.fc1.out_features))
    )


def try_first(dataset: Dataset) -> None:
    """Find out before any work whether the input can be cropped from an image.

    Raises:
        ValueError: it cannot.
    """
    with contextlib.suppress(OSError):  # which is another matter
        dataset[0]


def run_name(path: Path) -> str:
    """Of a run's checkpoint.pt the name of its folder, else that of the file."""
    return path.resolve().parent.name if path.name == "checkpoint.pt" else path.stem


def size(model: VisionTransformer) -> str:
    return "{}x{} pixels".format(*model.img_size)


def say_row(label: str, cells: Iterable[str]) -> None:
    say(f"{label:<24}" + "".join(f"{cell:>9}" for cell in cells))


def say_attention(result: dict) -> None:
    """The attention statistics: their mean, and each head's."""
    heads = range(len(result["entropy_per_head"]))
    say_row("", ["mean", *(f"head {head + 1}" for head in heads)])
    rows = {"entropy": "spatial entropy (nats)", "components": "connected components"}
    for key, label in rows.items():
        values = [result[key], *result[f"{key}_per_head"]]
        say_row(label, [f"{value:.3f}" for value in values])


def run(args: argparse.Namespace) -> None:
    """Measure, print and draw what the command line asks for.

    Raises:
        OSError, ValueError: one sentence on what is wrong with arguments, data or files.
    """
    check_arguments(args)
    evaluation = Evaluation(args)
    else_asked = args.segmentation or args.corruptions or args.images
    wanted = {
        "accuracy": args.dataset or not else_asked,
        "corruptions": args.corruptions,
        "segmentation": args.segmentation,
        "picture": args.attention,
    }
    works = [getattr(evaluation, part)() for part in wanted if wanted[part]]
    for trained in evaluation.contestants:
        say("; ".join(trained.about))
    report = {
        "checkpoint": str(evaluation.trained.path),
        "weights": "model_ema" if args.model_ema else "model",
        "device": hardware(evaluation.device),
        "precision": "bfloat16" if evaluation.amp else "float32",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
        },
    }
    for work in works:
        report |= work()
    if args.json:
        text = json.dumps(finite(report), indent=2, allow_nan=False) + "\n"
        replace(Path(args.json), lambda partial: partial.write_text(text))
        say(f"wrote {args.json}")


def finite(value: object) -> object:
    """For JSON, which has no word for what is not finite: that becomes null."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------- benchmark

BENCHMARK_ROUNDS = 30
BENCHMARK_IMAGES = {"cpu": 4, "cuda": 256, "mps": 64}  # if --batch-size is left out


@torch.inference_mode()
def benchmark(device: torch.device, args: argparse.Namespace) -> None:
    """Time `evaluate` and the forward of timm's ViT-S/16 in turn, and the Jaccard index."""
    count, amp = args.batch_size or BENCHMARK_IMAGES[device.type], bool(args.amp)
    images = torch.randint(256, (count, 3, 224, 224), dtype=torch.uint8, device=device)
    labels = torch.randint(1000, (count,), device=device)
    normalize = normalizer(IMAGENET_MEAN, IMAGENET_STD, device)
    inputs = normalize(images)
    model = VisionTransformer(**MODELS["vit_small"]).to(device).eval()
    batch = [(images, labels)]
    calls = {
        "evaluate": lambda: evaluate(model, batch, normalize, device, amp),
        "its model": lambda: model(inputs),
    }
    with contextlib.suppress(ImportError):
        timm = importlib.import_module("timm")
        peer = timm.create_model("vit_small_patch16_224").to(device).eval()
        calls[f"timm {timm.__version__}"] = lambda: peer(inputs)
    masks = torch.randint(22, (count, 480, 480), device=device)
    masks[masks == 21] = VOID
    similarity = torch.randn(count, 6, 30, 30, device=device)
    calls["Jaccard index"] = lambda: jaccard(
        mass_mask(similarity, 0.6), masks, 20, void_counts=False
    )
    seconds = {name: [] for name in calls}
    for turn in range(BENCHMARK_ROUNDS + 1):
        names = list(calls)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            with autocast(device, amp):
                calls[name]()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - start)
    say(f"ViT-S/16 on {count} images of 224x224, {'bfloat16' if amp else 'float32'}")
    say(f"{hardware(device)}, torch {torch.__version__}")
    say_row("", ["ms", "images/s", "of timm"])
    medians = {name: statistics.median(seconds[name][1:]) for name in calls}
    timms = next((medians[name] for name in medians if "timm" in name), math.nan)
    for name, median in medians.items():
        ratio = "" if "Jaccard" in name else f"{median / timms:.3f}"
        say_row(name, [f"{1e3 * median:.1f}", f"{count / median:.1f}", ratio])
    say("the Jaccard index is that of 6 heads and 20 objects, in 480x480 pixels")


if __name__ == "__main__":
    main()
