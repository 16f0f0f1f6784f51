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
import itertools
import json
import math
import os
import platform
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, Dataset
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
    Masked,
    balanced_subset,
    list_images,
    load_corruptions,
    load_dataset,
    load_masks,
    make_loader,
    normalizer,
    open_image,
    test_transform,
)
from entropy import (
    component_masses,
    connected_components,
    entropy_of_masses,
    threshold_at_mean,
)
from model import (
    MODELS,
    VisionTransformer,
    find_weights,
    load_run,
    model_of_weights,
    read_checkpoint,
    sizes,
)


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
        if not abs(value) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if not low <= value <= high:
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
    try:  # on Linux, platform.processor() has the architecture, not the name
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpu = ""
    name = re.search(r"^model name\s*: *(\S.*)$", cpu, re.MULTILINE)
    processor = name[1] if name else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{device.type} ({processor}, {threads} thread{'s' * (threads > 1)})"


def say(text: str, stays: bool = True) -> None:
    """Print a line; one that does not stay is for terminals, and is overwritten."""
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

    A link stays one, and what it leads to is written.

    Raises:
        OSError: the disk is full, or the like; what stood there before still stands.
    """
    file = file.resolve()
    if file.exists() and not file.is_file():
        raise OSError(f"{file} is there, and is no file that could be replaced")
    partial = file.with_name(f"{file.name}.partial")
    try:
        write(partial)
        with partial.open("rb+") as written:  # on the disk, before the name is
            os.fsync(written.fileno())
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
    masses = component_masses(similarity)  # (B, heads, labels)
    entropy = entropy_of_masses(masses).sum(0)  # (heads,)
    components = (masses > 0).sum((0, 2))  # (heads,)
    sums = [each.float() for each in (*sums, *entropy, *components)]
    return torch.stack([torch.full_like(sums[0], count), *sums])


def sum_up(totals: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The sum of the batches' totals, of all processes, as float64 on the CPU."""
    total = torch.stack(totals).cpu().double().sum(0)
    if dist.is_available() and dist.is_initialized():  # each process has its share
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


def corruption_means(
    errors: Mapping[tuple[str, int], float], mce: bool, classes: int
) -> dict:
    """The plain mean of the errors, and the mean corruption error if asked for.

    Args:
        errors: percent, by (corruption, severity).
        mce: whether to divide by AlexNet's errors: a corruption's error CE is the sum
            over its severities over AlexNet's sum, and mCE the mean over the 15
            corruptions of ImageNet-C (arXiv 1903.12261, section 4).
        classes: how many there are.

    Returns:
        mean_error (percent), the mean over severities, then corruptions; mean_over,
        the names of these, without EXTRA_CORRUPTIONS where there are others; with
        `mce` also ce (percent, by name) and mce, or partial_mce if some of the 15 or of
        ImageNet's 1000 classes are missing.

    Raises:
        ValueError: mce of none of the 15, or of one without severities 1 to 5.
    """
    by_name = nested(errors)
    means = {name: statistics.mean(each.values()) for name, each in by_name.items()}
    names = [name for name in means if name not in EXTRA_CORRUPTIONS] or list(means)
    mean_error = statistics.mean(means[name] for name in names)
    result = {"mean_error": mean_error, "mean_over": names}
    if not mce:
        return result
    ce = {}
    for name, alexnets in ALEXNET_ERRORS.items():
        severities = sorted(by_name.get(name, {}))
        if severities not in ([], [1, 2, 3, 4, 5]):
            given = ", ".join(map(str, severities))
            raise ValueError(
                f"mCE takes severities 1 to 5 of {name}; there are {given}"
            )
        if severities:
            ce[name] = 100 * means[name] / alexnets
    if not ce:
        known, given = ", ".join(ALEXNET_ERRORS), ", ".join(by_name)
        raise ValueError(f"AlexNet's errors are of {known}; there are {given}")
    whole = len(ce) == len(ALEXNET_ERRORS) and classes == 1000
    mean_ce = statistics.mean(ce.values())
    return result | {"ce": ce, "mce" if whole else "partial_mce": mean_ce}


def nested(by_pair: Mapping[tuple[str, int], float]) -> dict[str, dict[int, float]]:
    """{(corruption, severity): value} -> {corruption: {severity: value}}."""
    names = dict.fromkeys(name for name, _ in by_pair)
    return {
        name: {level: value for (each, level), value in by_pair.items() if each == name}
        for name in names
    }


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
        bool (..., H, W); nothing is kept where a score is NaN or +inf.
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
        masks: uint8 (B, height, width), in pixels, multiples of H and W: 0 background,
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
    pixels = pixels.where(pixels != VOID, objects + 1).long()
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
        loader: of images, uint8 (B, 3, height, width), and masks, uint8 (B, height,
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
        rules = mass_mask(similarity, protocol.mass), threshold_at_mean(similarity) > 0
        patches = torch.cat(rules, 1)  # (B, 2 * heads, H, W)
        index, there = jaccard(patches, masks, objects, protocol.void_counts)
        index = index.unflatten(1, (2, -1))  # (B, 2, heads, objects)
        # A score that is not finite is no result of 0.
        index = index + 0 * similarity.sum((-2, -1))[:, None, :, None]
        best = index.amax(2, keepdim=True)  # (B, 2, 1, objects)
        found = there.sum(1)  # (B,)
        means = torch.cat((best, index), 2).sum(-1) / found.clamp(min=1)[:, None, None]
        sums = (found.count_nonzero(), *means.sum(0).flatten())
        totals.append(batch_totals(len(images), sums, similarity))
    total = sum_up(totals, device)
    heads = similarity.shape[1]
    images_seen, with_objects = int(total[0]), int(total[1])
    by_rule, attention = total[2:].split((2 * (1 + heads), 2 * heads))
    by_mass, by_mean = 100 * by_rule.view(2, -1) / (with_objects or math.nan)
    return {
        "images": images_seen,
        "images_with_objects": with_objects,
        "jaccard_mass": by_mass[0].item(),
        "jaccard_mass_per_head": by_mass[1:].tolist(),
        "jaccard_mean": by_mean[0].item(),
        "jaccard_mean_per_head": by_mean[1:].tolist(),
        **attention_means(attention / images_seen),
    }


# ------------------------------------------------------------------- trained models


@dataclass
class Trained:
    """A model, and what evaluating it takes."""

    model: VisionTransformer  # at the size of its training; `at` gives others
    path: Path
    about: list[str]  # lines on what was loaded
    settings: dict  # of the run; for other people's weights what OTHERS says
    classes: list[str] | None  # None: they have no names, or there is no head
    mean: tuple[float, ...]  # what its images were normalized with
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        """0 if there is no head."""
        return getattr(self.model.head, "out_features", 0)

    def at(self, img_size: int | Sequence[int] | None) -> VisionTransformer:
        """The model for images of this size; None is its own.

        Raises:
            ValueError: the patch size does not divide it.
        """
        model = copy.deepcopy(self.model)
        if img_size is not None:
            model.resize(img_size if isinstance(img_size, int) else tuple(img_size))
        return model

    def size(self, model: VisionTransformer) -> str:
        """The input size of a model that `at` gave, in words."""
        height, width = model.img_size
        if model.grid == self.model.grid:
            return f"{height}x{width} pixels"
        change = "{}x{} -> {}x{}".format(*self.model.grid, *model.grid)
        return f"{height}x{width} pixels (position embedding resized {change})"


# What is taken for other people's weights: the evaluation protocol of DeiT and DINO.
OTHERS = {"dataset": None, "data_dir": "data", "crop": "resized", "batch_size": 64}
OTHERS |= {"amp": False, "device": "cpu"}


def load_trained(path: Path, args: argparse.Namespace) -> Trained:
    """A run's model, or one of other people's weights, on the CPU.

    Args:
        path: the checkpoint, or the folder of a run.
        args: model_ema is used; and for other people's weights model, num_heads,
            img_size, mean and std.

    Raises:
        OSError, ValueError: one sentence on what is wrong.
    """
    path = path / "checkpoint.pt" if path.is_dir() else path
    checkpoint = read_checkpoint(path)
    if "architecture" in checkpoint:
        model, checkpoint = load_run(path, args.model_ema)
        settings, classes = checkpoint["settings"], list(checkpoint["classes"])
        epochs = f"{checkpoint['epoch']} of {settings['epochs']} epochs"
        about = [f"{path}: {settings['model']} after {epochs}"]
        source = DATASETS[settings["dataset"]]
        return Trained(model, path, about, settings, classes, source.mean, source.std)
    if args.model is None:
        raise ValueError(
            f"{path} does not name its model: do so with --model ({', '.join(MODELS)})"
        )
    options = dict(MODELS[args.model])
    options |= {"num_heads": args.num_heads} if args.num_heads else {}
    given = find_weights(checkpoint, str(path), args.model_ema)
    try:
        model, loaded = model_of_weights(given, options, str(path))
    except ValueError as error:
        raise ValueError(f"no {args.model}: {error}") from error
    mean, std = tuple(args.mean or IMAGENET_MEAN), tuple(args.std or IMAGENET_STD)
    trained = Trained(model, path, [loaded], OTHERS, None, mean, std)
    last, side, (rows, columns) = model.blocks[-1], model.patch_size, model.grid
    kind = f"{args.model}, {last.attn.num_heads} heads, pool {last.pool}"
    kind += f", {rows}x{columns} patches of {side}x{side} pixels"
    trained.about.append(f"taken for {kind}, {trained.num_classes or 'no'} classes")
    trained.about.append(f"images normalized with mean {mean}, std {std}")
    return trained


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
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path} names {twice[0]} twice")
    return names


def match_classes(
    trained: Trained, dataset: Images, name: str
) -> tuple[torch.Tensor | None, str]:
    """The model's class of each class of a dataset, by name, and a sentence on it.

    None stands for the same classes in the same order.

    Raises:
        ValueError: the classes do not fit.
    """
    path, count = trained.path, trained.num_classes
    if trained.classes is None or not dataset.classes:
        labels = dataset.targets
        there = len(dataset.classes) or int(labels.max()) + 1
        # Of ten labels or more for each class, one is of the last class.
        few = not dataset.classes and len(labels) < 10 * count and there <= count
        if there != count and not few:
            hint = "" if trained.classes else "; --classes names those of the weights"
            raise ValueError(
                f"{path} has {count} classes and {name} {there}, which cannot be matched "
                f"without names{hint}"
            )
        return None, f"{name}: classes are matched by their order, not by names"
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
# Viridis: dark is little attention, bright is much; even in lightness, so safe in gray
# and for color-blind readers.
HEAT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
# Okabe and Ito's colors, which color-blind readers tell apart; the heaviest component
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
    text, letters = text.encode("ascii", "replace").decode(), (width - 4) // LETTER
    text = text if len(text) <= letters else f"{text[: letters - 2]}.."
    text = text.replace(" ", "  ")  # a space is thin
    canvas = torch.full((3, height // 2, width // 2), 255, dtype=torch.uint8)
    top = (height - LINE) // 4
    box = torch.tensor([[0, top, width // 2 - 1, height // 2 - 1]])
    canvas = draw_bounding_boxes(
        canvas, box, [text], "white", width=0, label_colors="black"
    )
    canvas = F.interpolate(canvas[None].float(), (height, width), mode="bicubic")[0]
    return canvas.clamp(0, 255).to(torch.uint8)


def heat(attention: torch.Tensor) -> torch.Tensor:
    """Attention from 0 to 1, (H, W), in the colors of HEAT: uint8 (3, H, W)."""
    anchors = torch.tensor(HEAT, dtype=torch.float32)
    place = attention.clamp(0, 1) * (len(HEAT) - 1)
    low = place.long().clamp(max=len(HEAT) - 2)
    color = anchors[low].lerp(anchors[low + 1], (place - low)[..., None])  # (H, W, 3)
    return color.permute(2, 0, 1).round().to(torch.uint8)


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
    images: list[torch.Tensor],
    trained: Trained,
    img_size: Sequence[int] | None,
    device: torch.device,
) -> list[torch.Tensor]:
    """The similarity maps of images of any size and aspect, each (heads, H, W).

    Each image is resized so that its shorter side is that of a square `img_size`, and
    the longer one keeps the aspect, to whole patches and LONGEST at most; or to an
    `img_size` that is no square. None is the model's own.
    """
    patch, (height, width) = (
        trained.model.patch_size,
        img_size or trained.model.img_size,
    )
    normalize = normalizer(trained.mean, trained.std, device)
    models, maps = {}, []
    for image in images:
        shorter = height / min(image.shape[-2:])
        sides = [min(shorter * side, LONGEST * height) for side in image.shape[-2:]]
        size = tuple(round(side / patch) * patch for side in sides)
        size = size if height == width else (height, width)
        if size not in models:
            models = {size: trained.at(size).eval().to(device)}
        image = v2.functional.resize(image, size, v2.InterpolationMode.BICUBIC)
        _, similarity = models[size](normalize(image[None].to(device)))
        maps.append(similarity[0].cpu())
    return maps


def draw_attention(
    images: list[torch.Tensor],
    captions: list[str],
    looks: list[tuple[str, list[torch.Tensor]]],
    mass: float,
) -> tuple[torch.Tensor, list[list[list[float]]]]:
    """What the heads of one or more models make of images.

    Args:
        images: uint8 (3, height, width) each, of any size and aspect.
        captions: texts, written below the images.
        looks: of each model a title, and the similarity maps of the images, (heads, H,
            W) each.
        mass: the share of the attention that the second row shows.

    Returns:
        The picture, uint8 (3, height, width), and the entropies in it by model, image
        and head. For each image and head there are, from
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
    entropies = [[] for _ in looks]
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
        for (_, maps), of_model in zip(looks, entropies):
            drawn = [draw_head(small, similarity, mass) for similarity in maps[i]]
            columns.append(apart(join([tile for tile, _ in drawn], 2)))
            of_model.append([entropy for _, entropy in drawn])
        blocks.append(F.pad(join(columns, 2), (0, 0, 0, GAP), value=255))
    return F.pad(join(blocks, 1), (GAP, GAP, GAP, GAP), value=255), entropies


def draw_head(
    image: torch.Tensor, similarity: torch.Tensor, mass: float
) -> tuple[torch.Tensor, float]:
    """One head's column in the picture, uint8 (3, height, TILE), and its entropy.

    Args:
        image: uint8 (3, h, w), of the size of a tile.
        similarity: (H, W).
        mass: as in `draw_attention`.
    """

    def enlarge(x: torch.Tensor) -> torch.Tensor:
        size, mode = image.shape[-2:], "nearest-exact"
        return F.interpolate(x[None, None].float(), size, mode=mode)[0, 0].to(x.dtype)

    attention = similarity.float().flatten().softmax(0).view_as(similarity)
    gray = image.float().mean(0, keepdim=True).expand(3, -1, -1)
    faded = (0.35 * gray + 0.65 * 255).to(torch.uint8)
    kept = image.where(enlarge(mass_mask(similarity, mass)), faded)

    activation = threshold_at_mean(similarity)
    labels = connected_components(activation > 0)
    masses = labels.flatten().bincount(activation.flatten())
    entropy = entropy_of_masses(masses).item()
    order = masses.argsort(descending=True)[: (masses > 0).sum()]
    masks = enlarge(labels)[None] == order[:, None, None]
    colored = faded
    if len(masks):
        colors = [PALETTE[n % len(PALETTE)] for n in range(len(masks))]
        colored = draw_segmentation_masks(faded, masks, 0.75, colors)
    tiles = [heat(enlarge(attention / attention.max())), kept, colored]
    short = LINE - image.shape[1]
    tiles = [F.pad(tile, (0, 0, 0, max(short, 0)), value=255) for tile in tiles]
    text = f"H {entropy:.2f} K {len(order)}"
    return join([*tiles, caption(text, TILE)], 1), entropy


# ----------------------------------------------------------------------- the command


def newest_checkpoint(runs: Path = Path("runs")) -> Path:
    """The checkpoint written last under `runs`, however deep.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(runs.rglob("checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"no checkpoint.pt under {runs}; train one with python train.py, "
            "or name one with --checkpoint"
        )
    return found[-1]


ROWS = 4  # images in a picture


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    whole, count, share = number(1, kind=int), number(0, kind=int), number(0, 1)
    yes_or_no = argparse.BooleanOptionalAction
    checkpoint = "of a run, or weights of others (default: that of the newest run)"
    add("--checkpoint", metavar="FILE", help=checkpoint)
    add("--model-ema", action="store_true", help="evaluate its averaged weights")
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the first found)")
    add("--amp", action=yes_or_no, help="bfloat16 (default: as in the run)")
    batch_size = "(default: the run's, or 64; on a CPU what its cache holds)"
    add("--batch-size", type=whole, metavar="N", help=f"images at a time {batch_size}")
    add("--workers", type=count, default=0, metavar="N", help="loading processes")
    size = {"type": whole, "nargs": "+", "metavar": "PIXELS"}
    add("--img-size", **size, help="side, or height and width (default: the model's)")
    add("--json", metavar="FILE", help="write all that is measured there")

    group = parser.add_argument_group("accuracy")
    add = group.add_argument
    name = "NAME"
    add("--dataset", choices=DATASETS, metavar=name, help="(default: the run's)")
    add(
        "--data-dir", metavar="DIR", help="where data lie (default: the run's, or data)"
    )
    crop = "resized, whole, or center, which resizes nothing (default: the run's)"
    crops = ("resized", "center", "whole")
    add("--crop", choices=crops, metavar="KIND", help=crop)
    corruptions = (
        "errors on ImageNet-C's folders, by default with --crop center, or on "
    )
    add("--corruptions", metavar="DIR", help=f"{corruptions}CIFAR-C's arrays")
    add("--mce", action="store_true", help="and relate them to AlexNet's")

    add = parser.add_argument_group("attention").add_argument
    segmentation = f"how it covers objects; of {', '.join(MASKS)}"
    add("--segmentation", choices=MASKS, metavar=name, help=segmentation)
    protocol = f"the dialect: {', '.join(PROTOCOLS)} (default: dino)"
    add("--protocol", choices=PROTOCOLS, metavar=name, help=protocol)
    add("--attention", metavar="FILE.png", help="draw it")
    images = "on these images, of any size and aspect (default: those measured)"
    add("--images", metavar="FOLDER", help=images)
    add("--compare", metavar="FILE", help="beside that of another checkpoint")
    rows = f"images in that picture (default: {ROWS})"
    add("--rows", type=whole, metavar="N", help=rows)

    add = parser.add_argument_group("weights of others").add_argument
    add("--model", choices=MODELS, metavar=name, help=f"one of {', '.join(MODELS)}")
    add("--num-heads", type=whole, metavar="N", help="(default: the model's)")
    channels = {"type": share, "nargs": 3, "metavar": "X"}
    add("--mean", **channels, help="of the channels, 0 to 1 (default: ImageNet's)")
    add("--std", **channels, help="of the channels, 0 to 1 (default: ImageNet's)")
    classes = "names of their classes: a file of lines, or a folder of folders"
    add("--classes", metavar="PATH", help=classes)
    add = parser.add_argument_group("speed").add_argument
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
    needs = {
        "images": ["attention"],
        "compare": ["attention"],
        "rows": ["attention"],
        "protocol": ["segmentation", "attention"],
        "mce": ["corruptions"],
    }
    for option, others in needs.items():
        if getattr(args, option) and not any(getattr(args, each) for each in others):
            raise ValueError(f"--{option} needs --{' or --'.join(others)}")
    args.rows, args.protocol = args.rows or ROWS, args.protocol or "dino"
    if args.img_size and len(args.img_size) > 2:
        raise ValueError("--img-size takes one number, or height and width")
    if args.img_size and len(args.img_size) == 1:
        args.img_size *= 2
    if args.std and not all(args.std):
        raise ValueError("--std must be above 0")
    files = {
        option: output_file(option, getattr(args, option))
        for option in ("attention", "json")
        if getattr(args, option) is not None
    }
    if "attention" in files:
        if files["attention"].suffix.lower() != ".png":
            raise ValueError(f"--attention takes a .png, not {args.attention}")
        if files["attention"] == files.get("json"):
            raise ValueError(f"--json would replace the picture {args.attention}")
        if args.images:
            images = Path(args.images).resolve()
            if images in (files["attention"], *files["attention"].parents):
                raise ValueError(f"{args.attention} would be among the --images")
    if "json" in files and files["json"].is_file():
        try:
            json.loads(files["json"].read_text() or "{}")
        except ValueError as error:
            raise ValueError(f"{args.json} is there and is no JSON") from error


def output_file(option: str, given: str) -> Path:
    """Where an output goes, once it is sure that it can be written there.

    Raises:
        ValueError: it cannot.
    """
    try:
        file = Path(given).resolve()
        if not file.parent.is_dir():
            raise ValueError(f"--{option} {given}: there is no folder {file.parent}")
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise ValueError(f"--{option} {given}: this is no file")
        partial = file.with_name(f"{file.name}.partial")  # as `replace` will
        if partial.exists():
            raise ValueError(f"--{option} {given}: {partial} is in the way")
        partial.touch()
        partial.unlink()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--{option} {given} cannot be written: {error}") from error
    return file


class Evaluation:
    """The model, what the parts of an evaluation share, and their report.

    Each part is a method that reads its data and returns the work that is left to do:
    so bad input is found before any work. The work prints what it measures and adds it
    to the report.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, choose_device(args.device)
        path = Path(args.checkpoint) if args.checkpoint else newest_checkpoint()
        self.trained = trained = load_trained(path, args)
        self.contestants = [trained]  # in the picture
        if args.compare:
            self.contestants.append(load_trained(Path(args.compare), args))
        name = trained.settings.get("model")  # of a run
        runs = [each.settings.get("model") for each in self.contestants]
        if None not in runs and args.model not in (None, *runs):
            raise ValueError(f"{path} is a {name}, not a {args.model}")
        others = args.mean or args.std or args.num_heads
        if (None not in runs and others) or (name and args.classes):
            raise ValueError(
                f"{path} is a run's, whose classes, mean, std and heads are known: "
                "--classes, --mean, --std and --num-heads are for weights of others"
            )
        if args.classes:
            trained.classes = read_classes(args.classes, trained.num_classes)
        self.model = trained.at(args.img_size)
        self.dataset = args.dataset or trained.settings["dataset"]
        self.data_dir = args.data_dir or trained.settings["data_dir"]
        self.crop = args.crop or trained.settings["crop"].replace("padded", "whole")
        # In the run's precision, if it was on such a device.
        same = self.device.type == torch.device(trained.settings["device"]).type
        self.amp = trained.settings["amp"] and same if args.amp is None else args.amp
        self.where = f"on {self.device} in {'bfloat16' if self.amp else 'float32'}"
        self.report = {
            "checkpoint": str(trained.path),
            "weights": "model_ema" if args.model_ema else "model",
            "model": name or args.model,
            "mean": trained.mean,
            "std": trained.std,
            "device": hardware(self.device),
            "precision": "bfloat16" if self.amp else "float32",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "numpy": np.__version__,
            },
        }

    def save(self, complete: bool) -> None:
        """Write the report; one that is incomplete goes beside, if it has any number."""
        measured = self.report.keys() & {"accuracy", "corruptions", "segmentation"}
        if not self.args.json or not (complete or measured):
            return
        file = Path(self.args.json if complete else f"{self.args.json}.incomplete")
        report = finite(self.report | {"complete": complete})
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        replace(file, lambda partial: partial.write_text(text))
        say(f"wrote {file}")

    def measure(
        self,
        how: Callable,
        model: VisionTransformer,
        dataset: Images | Masked,
        *options: object,
    ) -> dict:
        """Call `evaluate` or `segment` on all images of a dataset."""
        args, device = self.args, self.device
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
        return how(model.to(device), *given)

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
            raise ValueError(
                f"{path} knows no dataset: name one with --dataset, or images to draw "
                "on with --images"
            )
        return load_dataset(self.dataset, self.data_dir, "test", transform)

    def about_data(self, dataset: str, split: str, model: VisionTransformer) -> dict:
        """What the report says of the data of a part."""
        where = {"dataset": dataset, "data_dir": str(self.data_dir), "split": split}
        return where | {"img_size": model.img_size}

    def accuracy(self) -> Callable[[], None]:
        """Classify the test images of a dataset."""
        name, model = self.dataset, self.classifier()
        height, width = model.img_size
        if height != width:
            raise ValueError("accuracy is measured on square images")
        dataset = self.test_set(test_transform(height, crop=self.crop))
        try_first(dataset)
        classes, matched = match_classes(self.trained, dataset, name)

        def work() -> None:
            size = self.trained.size(model)
            say(f"{name}, test split, {size}, crop {self.crop}, {self.where}")
            if matched:
                say(matched)
            result = self.measure(evaluate, model, dataset, classes)
            line = "{images} images   top-1 {acc1:.2f} %   top-5 {acc5:.2f} %   "
            say((line + "loss {loss:.4f}").format(**result))
            say_attention(result)
            about = self.about_data(name, "test", model) | {"crop": self.crop}
            about |= {"classes": len(dataset.classes), "matched": matched}
            self.report["accuracy"] = about | result

        return work

    def corruptions(self) -> Callable[[], None]:
        """Classify corrupted images: the error of each corruption and severity."""
        folder, model, mce = self.args.corruptions, self.classifier(), self.args.mce
        crop = self.args.crop or "center"
        found = load_corruptions(folder)
        order = [*ALEXNET_ERRORS, *sorted({name for name, _ in found})]
        sets = {
            (name, severity): found[name, severity]
            for name in dict.fromkeys(order)
            for severity in range(1, 6)
            if (name, severity) in found
        }

        def read(key: tuple[str, int]) -> tuple[Images, torch.Tensor | None, str]:
            images = sets[key]()
            crop_of = crop if images.classes else self.crop
            images.transform = test_transform(model.img_size[0], crop=crop_of)
            return images, *match_classes(self.trained, images, folder)

        # Before any work: whether the classes match, and the mCE can be given.
        images, _, _ = read(next(iter(sets)))
        classes = len(images.classes)
        if mce and not classes:
            raise ValueError(f"--mce takes the folders of ImageNet-C, not {folder}")
        try_first(images)
        corruption_means(dict.fromkeys(sets, 0.0), mce, classes)

        def work() -> None:
            say(f"{folder}, {self.trained.size(model)}, {self.where}")
            told = set()
            errors, counts = {}, {}
            about = {"folder": folder, "classes": classes}
            about |= {
                "img_size": model.img_size,
                "crop": crop if classes else self.crop,
            }
            levels = sorted({severity for _, severity in sets})
            say_row("error (%) at severity", [*levels, "mean"])
            for name in dict.fromkeys(name for name, _ in sets):
                for key in (key for key in sets if key[0] == name):
                    images, which, sentence = read(key)
                    if sentence and sentence not in told:
                        say(sentence)
                    told.add(sentence)
                    result = self.measure(evaluate, model, images, which)
                    errors[key] = 100 - result["acc1"]
                    counts[key] = result["images"]
                    about |= {"errors": nested(errors), "images": nested(counts)}
                    self.report["corruptions"] = about
                row = [errors.get((name, level)) for level in levels]
                row.append(statistics.mean(each for each in row if each is not None))
                say_row(name, ["-" if each is None else f"{each:.2f}" for each in row])
            about |= (means := corruption_means(errors, mce, classes))
            over = means["mean_over"]
            say(f"mean error {means['mean_error']:.2f} %, over {', '.join(over)}")
            for name, ce in means.get("ce", {}).items():
                say_row(f"CE (%), {name}", [f"{ce:.2f}"])
            if mce:
                what = (
                    "mCE"
                    if "mce" in means
                    else f"no mCE, but the mean CE of {len(means['ce'])} of 15 "
                    f"corruptions and {classes} of 1000 classes:"
                )
                value = means.get("mce", means.get("partial_mce"))
                say(f"{what} {value:.2f} %, over AlexNet's errors (arXiv 1903.12261)")

        return work

    def segmentation(self) -> Callable[[], None]:
        """Compare the attention with the masks of objects."""
        args, name = self.args, self.args.segmentation
        protocol, model = PROTOCOLS[args.protocol], self.model
        if name in PHOTOGRAPHS and not args.img_size:
            model = self.trained.at(protocol.size)
        masks = load_masks(name, self.data_dir, model.img_size)
        try_first(masks)
        split = "val" if name == "voc2012" else "test"

        def work() -> None:
            other = model.img_size != (protocol.size, protocol.size)
            other = f", not its {protocol.size}x{protocol.size}" if other else ""
            void = "counted as background" if protocol.void_counts else "left out"
            share = f"{100 * protocol.mass:.0f} % of the attention"
            say(f"{name}, {split} split, {self.where}")
            say(
                f"protocol {args.protocol}: input {self.trained.size(model)}{other}, "
                f"{share}, void pixels {void}"
            )
            result = self.measure(segment, model, masks, protocol, masks.objects)
            say("{images} images, {images_with_objects} with objects".format(**result))
            heads = range(len(result["entropy_per_head"]))
            columns = ["best", *(f"head {head + 1}" for head in heads)]
            say_row("Jaccard index (%)", columns)
            for key, label in {"mass": share, "mean": "S > mean"}.items():
                row = [result[f"jaccard_{key}"], *result[f"jaccard_{key}_per_head"]]
                say_row(label, [f"{value:.2f}" for value in row])
            say_attention(result)
            about = self.about_data(name, split, model) | {"protocol": args.protocol}
            about |= {"mass": protocol.mass, "void_counts": protocol.void_counts}
            self.report["segmentation"] = about | result

        return work

    def picture(self) -> Callable[[], None]:
        """Draw the attention on images of a folder, or of the dataset measured."""
        args, mass = self.args, PROTOCOLS[self.args.protocol].mass
        if args.images:
            one = Path(args.images).is_file()
            files = [args.images] if one else list_images(args.images)
            if not files:
                raise FileNotFoundError(f"there are no images in {args.images}")
            images, captions = self.first_images(
                (lambda file=file: open_image(file), Path(file).stem) for file in files
            )
        else:
            images, captions = self.sample_images()
        for trained in self.contestants if args.img_size else []:
            sizes(args.img_size, trained.model.patch_size)

        def work() -> None:
            looks = [
                look_at(images, trained, args.img_size, self.device)
                for trained in self.contestants
            ]
            titles = [run_name(trained.path) for trained in self.contestants]
            sets = [trained.settings["dataset"] for trained in self.contestants]
            if len({*sets} - {None}) > 1:
                one, other = (trained.path for trained in self.contestants)
                its, others = sets
                say(f"{one} was trained on {its}, {other} on {others}")
            looks = list(zip(titles, looks))
            drawn, entropies = draw_attention(images, captions, looks, mass)
            file = Path(args.attention)
            replace(
                file, lambda partial: save_image(drawn / 255, partial, format="png")
            )
            say(f"wrote {file}")
            self.report["attention"] = {
                "file": str(file),
                "checkpoints": [str(trained.path) for trained in self.contestants],
                "images": captions,
                "mass": mass,
                "entropy": entropies,
            }

        return work

    def sample_images(self) -> tuple[list[torch.Tensor], list[str]]:
        """Images for the picture, uint8 (3, height, width), and their captions."""
        rows, name = self.args.rows, self.args.segmentation
        generator = torch.Generator().manual_seed(0)
        if name and not self.args.dataset:
            masks = load_masks(name, self.data_dir, self.model.img_size)
            order = torch.randperm(len(masks), generator=generator).tolist()
            chosen = sorted(order[:rows]) + order[rows:]
            return self.first_images(
                (lambda index=index: picture_of(masks.images[index]), f"image {index}")
                for index in chosen
            )
        dataset = self.test_set(None)
        chosen = balanced_subset(dataset, min(rows, len(dataset)), seed=0).indices
        chosen += torch.randperm(len(dataset), generator=generator).tolist()
        return self.first_images(
            (
                lambda index=index: dataset[index][0],
                f"{dataset.classes[dataset.targets[index]]} {index}",
            )
            for index in dict.fromkeys(chosen)
        )

    def first_images(
        self, candidates: Iterable[tuple[Callable, str]]
    ) -> tuple[list[torch.Tensor], list[str]]:
        """The first --rows images, and their captions."""
        images, captions = [], []
        for read, caption in itertools.islice(candidates, self.args.rows):
            images.append(AS_TENSOR(read()))
            captions.append(caption)
        return images, captions


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


def picture_of(image: object) -> object:
    return image if isinstance(image, torch.Tensor) else open_image(image)


def try_first(dataset: Dataset) -> None:
    """Find out before any work whether images are large enough, and masks known.

    Raises:
        ValueError: the first is not, or there is none.
    """
    if not len(dataset):
        raise ValueError("there are no images to evaluate")
    with contextlib.suppress(OSError):  # an image that cannot be read is another matter
        dataset[0]


def run_name(path: Path) -> str:
    """Of a run's checkpoint.pt the name of its folder, else that of the file."""
    return path.resolve().parent.name if path.name == "checkpoint.pt" else path.stem


def say_row(label: str, cells: Iterable[object]) -> None:
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
    classify = args.dataset or not else_asked
    draw_from_it = args.attention and not args.images
    if classify and draw_from_it and not evaluation.trained.num_classes:
        say("there is no head: the dataset is to draw from, not to classify")
        classify = False
    wanted = {
        "accuracy": classify,
        "corruptions": args.corruptions,
        "segmentation": args.segmentation,
        "picture": args.attention,
    }
    works = [getattr(evaluation, part)() for part in wanted if wanted[part]]
    for trained in evaluation.contestants:
        for line in trained.about:
            say(line)
    complete = False
    try:
        for work in works:
            work()
        complete = True
    finally:
        evaluation.save(complete)


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
    """Time `evaluate` and the forward of timm's ViT-S/16 in turn, and the Jaccard index.

    Raises:
        ValueError: an option is given that has no part in it.
    """
    usual = vars(make_parser().parse_args(["--benchmark"]))
    of_it = {"device", "amp", "batch_size"}
    for name, value in vars(args).items():
        if name not in of_it and value != usual[name]:
            option = name.replace("_", "-")
            raise ValueError(
                f"--benchmark is of ViT-S/16 at 224 px, without --{option}"
            )
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
    masks = torch.randint(22, (count, 480, 480), dtype=torch.uint8, device=device)
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
                torch.accelerator.synchronize(device)
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
