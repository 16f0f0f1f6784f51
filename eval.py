# SPDX-License-Identifier: MIT
"""Evaluate a model: accuracy, robustness, and how well its attention covers objects.

    python eval.py                                # accuracy of the newest run under runs/
    python eval.py --attention attention.png      # and a picture of its attention
    python eval.py --checkpoint runs/NAME --dataset cifar100 --device cuda
    python eval.py --segmentation shapes          # Jaccard index of attention and objects
    python eval.py --attention both.png --images FOLDER --compare runs/OTHER
    python eval.py --corruptions DIR --mce        # ImageNet-C; CIFAR-C without --mce

Pretrained checkpoints of timm, DeiT and DINO need --model, which the files do not name:

    python eval.py --checkpoint dino_deitsmall16_pretrain.pth --model vit_small \\
        --segmentation voc2012 --protocol dino

With --segmentation, --corruptions or --images, accuracy is only measured if --dataset is
given.
"""

import argparse
import copy
import json
import math
import os
import platform
import re
import shutil
import statistics
import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import data
from entropy import (
    component_masses,
    connected_components,
    entropy_of_masses,
    threshold_at_mean,
)
from model import MODELS, VisionTransformer, load_model, read_checkpoint

# ------------------------------------------------------------- shared with train.py


def choose_device(name: str | None) -> torch.device:
    """Return the requested device, or the first available of CUDA, MPS and CPU."""
    gpus = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    names = ["cuda", *gpus] if gpus else []
    names += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name not in (None, *names):
        raise ValueError(f"device {name} is not available; use {', '.join(names)}")
    return torch.device(name or names[0])


def hardware(device: torch.device) -> str:
    """Return the name of the GPU or CPU, on which the last digits of a run depend."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():  # on Linux, platform.processor() names the architecture only
        found = re.search(r"model name\s*: *(\S.*)", cpuinfo.read_text())
        name = found[1] if found else name
    return f"{device.type} ({name}, threads: {torch.get_num_threads()})"


def say(text: str, stays: bool = True) -> None:
    """Print a line. With stays=False, on a terminal only, the next line replaces it."""
    if sys.stdout.isatty():
        if not stays:
            text = text[: shutil.get_terminal_size().columns - 1]
        print(f"\r\033[K{text}", end="\n" if stays else "", flush=True)
    elif stays:
        print(text, flush=True)


# -------------------------------------------------------------------------- accuracy


@torch.inference_mode()
def predict(
    model: torch.nn.Module,
    loader: Iterable,
    normalize: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    amp: bool,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield logits (B, classes), similarity (B, heads, H, W) and targets, on the device.

    The loader has images, uint8 (B, 3, height, width), and targets, labels or masks;
    `normalize` is from `data.normalizer`; `amp` means autocast to bfloat16.
    """
    model.eval()
    for images, targets in loader:
        images = normalize(images.to(device, non_blocking=True))
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits, similarity = model(images)
        yield logits.float(), similarity, targets.to(device, non_blocking=True)


@torch.inference_mode()
def evaluate(predictions: Iterable, classes: torch.Tensor | None = None) -> dict:
    """Measure accuracy and attention statistics from what `predict` yields with labels.

    `classes`, int64 on the device, is the model's class of each label; other logits are
    dropped.

    Returns:
        images (their number); loss (cross-entropy), acc1, acc5 (percent), entropy (nats)
        and components, means over images; and entropy_per_head, components_per_head.
    """
    batches = []  # results per image; they stay on the device until the end
    for logits, similarity, labels in predictions:
        if classes is not None:
            logits = logits[:, classes]
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        batch = {"loss": F.cross_entropy(logits, labels, reduction="none")}
        batch |= {"acc1": 100.0 * best[:, 0], "acc5": 100.0 * best.any(1)}
        batches.append(batch | _statistics(similarity))
    means, counts = _average(batches)
    return {"images": counts["loss"], **means}


def _statistics(similarity: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute entropies and numbers of components from maps (B, heads, H, W)."""
    masses = component_masses(similarity)  # (B, heads, labels)
    entropy, components = entropy_of_masses(masses), (masses > 0).sum(-1)  # (B, heads)
    return {"entropy_per_head": entropy, "components_per_head": components}


def _average(batches: list[dict[str, torch.Tensor]]) -> tuple[dict, dict]:
    """Average numbers, (B, ...) by name, over the images of all processes; count these."""
    means, counts = {}, {}
    for name in batches[0]:
        values = torch.cat([batch[name] for batch in batches])
        device, values = values.device, values.cpu().double()
        sums = torch.stack([values, torch.ones_like(values)], 1).sum(0)
        if dist.is_available() and dist.is_initialized():
            sums = sums.to(device)
            dist.all_reduce(sums)
        means[name] = (sums[0] / sums[1]).tolist()
        counts[name] = int(sums[1].max())
    for name in ("entropy", "components"):
        means[name] = statistics.mean(means[f"{name}_per_head"])
    return means, counts


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
# For validation: the paper's means exclude them.
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")


def corruption_means(errors: dict[str, dict[int, float]], mce: bool) -> dict:
    """Average errors, in percent by corruption and severity.

    Return mean_error, over severities, then corruptions, without EXTRA_CORRUPTIONS if
    there are others. With `mce` also ce by name, the error over AlexNet's in percent, and
    mce, its mean over those of ImageNet-C's 15 corruptions that are there (arXiv
    1903.12261, section 4).
    """
    means = {name: statistics.mean(each.values()) for name, each in errors.items()}
    main = [means[name] for name in means if name not in EXTRA_CORRUPTIONS]
    result = {"mean_error": statistics.mean(main or means.values())}
    if mce:
        known = [name for name in ALEXNET_ERRORS if name in errors]
        ce = {name: 100 * means[name] / ALEXNET_ERRORS[name] for name in known}
        result |= {"ce": ce, "mce": statistics.mean(ce.values())}
    return result


# ------------------------------------------------------- attention as segmentation


# Variants of the Jaccard index of attention and objects: the size of the input in pixels,
# the share of the attention that the kept patches hold, and whether void pixels count as
# background or are excluded. DINO: Caron et al. (arXiv 2104.14294), Fig. 4, which does not
# give the input size; 480 is the default of its code for pictures. SAR: the authors' code.
# IPViT: the code of Naseer et al. (arXiv 2105.10497).
PROTOCOLS = {
    "dino": {"size": 480, "mass": 0.6, "void_counts": False},
    "sar": {"size": 480, "mass": 0.6, "void_counts": True},
    "ipvit": {"size": 512, "mass": 0.9, "void_counts": True},
}


def mass_mask(similarity: torch.Tensor, mass: float) -> torch.Tensor:
    """Select the fewest patches that hold a share `mass` of the attention to patches.

    The most attended come first, until they hold the share (to 1e-5, so that rounding
    adds no patch); all patches attended as much as the last one are kept. `similarity`,
    (..., H, W), is before softmax. Return bool (..., H, W), False everywhere if a score
    is NaN or +inf.
    """
    attention = similarity.float().flatten(-2).softmax(-1)
    descending = attention.sort(-1, descending=True).values
    before = descending.cumsum(-1) - descending  # the mass of those that come before
    kept = (before < mass - 1e-5).sum(-1, keepdim=True)
    least = descending.gather(-1, (kept - 1).clamp(min=0))
    return (attention >= least).view_as(similarity)


def jaccard(
    patches: torch.Tensor, masks: torch.Tensor, void_counts: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the Jaccard index, intersection over union, of each head and object.

    `patches`, bool (B, heads, H, W), are what each head keeps. `masks`, uint8 (B, height,
    width), in pixels, multiples of H and W, have 0 for the background, VOID, or the
    object, 1 to OBJECTS. Return float32 (B, heads, OBJECTS), 0 where there is no such
    object, and bool (B, OBJECTS), whether there is.
    """
    # A patch covers its pixels, as by nearest upsampling. So counting the pixels of each
    # object in each patch, once, leaves matrix products over the patches.
    count, _, height, width = patches.shape
    pixels = masks.unflatten(2, (width, -1)).unflatten(1, (height, -1))
    pixels = pixels.transpose(2, 3).flatten(3).flatten(1, 2)  # (B, H * W, of a patch)
    pixels = pixels.where(pixels != data.VOID, data.OBJECTS + 1).long()
    areas = torch.zeros(count, height * width, data.OBJECTS + 2, device=masks.device)
    areas.scatter_add_(2, pixels, torch.ones((), device=areas.device).expand_as(pixels))
    inside, void = areas[..., 1:-1], areas[..., -1:]  # (B, H * W, OBJECTS), (.., 1)
    size = areas.sum(-1, keepdim=True) - (0 if void_counts else void)
    chosen = patches.flatten(2).float()  # (B, heads, H * W)
    intersection = chosen @ inside  # (B, heads, OBJECTS)
    area = inside.sum(1, keepdim=True)  # (B, 1, OBJECTS)
    union = chosen @ size + area - intersection
    return intersection / union.clamp(min=1), area[:, 0] > 0


@torch.inference_mode()
def segment(predictions: Iterable, protocol: dict) -> dict:
    """Measure how well the attention covers the objects, from what `predict` yields.

    For each object the head with the best Jaccard index counts; the mean is over the
    objects of an image, then over the images with objects. A head keeps patches by two
    rules: the protocol's share of the mass, and the method's foreground, S > mean. The
    targets are masks of `data.load_masks`, uint8 (B, height, width).

    Returns:
        images, images_with_objects; jaccard_mass and jaccard_mean of the two rules, in
        percent, NaN without objects, also _per_head; attention as in `evaluate`.
    """
    batches = []
    for _, similarity, masks in predictions:
        kept = mass_mask(similarity, protocol["mass"])
        kept = torch.cat((kept, threshold_at_mean(similarity) > 0), 1)  # by both rules
        index, present = jaccard(kept, masks, protocol["void_counts"])
        zero = 0 * similarity.sum((-2, -1))  # or NaN if a score is not finite
        index = index.unflatten(1, (2, -1)) + zero[:, None, :, None]  # by rule
        some = present.any(1)  # images with objects
        index, number = index[some], present[some].sum(1)[:, None]
        best = 100 * index.amax(2).sum(-1) / number  # (images, 2)
        heads = 100 * index.sum(-1) / number[..., None]  # (images, 2, heads)
        batch = {"jaccard_mass": best[:, 0], "jaccard_mass_per_head": heads[:, 0]}
        batch |= {"jaccard_mean": best[:, 1], "jaccard_mean_per_head": heads[:, 1]}
        batches.append(batch | _statistics(similarity))
    means, counts = _average(batches)
    images, with_objects = counts["entropy_per_head"], counts["jaccard_mass"]
    return {"images": images, "images_with_objects": with_objects, **means}


# ------------------------------------------------------------------------ the picture

TILE, GAP, LINE = 128, 6, 20  # pixels: side of a tile, space between, line of text
# Viridis, from little attention to much, and Okabe and Ito's colors, from the heaviest
# component on: color-blind readers can tell both apart.
DARK, MIDDLE, BRIGHT = "#440154", "#21918c", "#fde725"
PALETTE = ["#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#f0e442", "#0072b2"]


def label(text: str, width: int, height: int = LINE, size: int = 16) -> Image.Image:
    """Write text into the middle of a white box, smaller if it would not fit."""
    box = Image.new("RGB", (width, height), "white")
    length = ImageFont.load_default(size).getlength(text)
    font = ImageFont.load_default(max(min(size, int(size * width / (length + 1))), 1))
    ImageDraw.Draw(box).text((width / 2, height / 2), text, "black", font, "mm")
    return box


def stack(images: list[Image.Image], across: bool = False) -> Image.Image:
    """Put images below each other, centered, or side by side."""
    axis = 0 if across else 1
    size = [max(image.size[n] for image in images) for n in (0, 1)]
    size[axis] = sum(image.size[axis] + GAP for image in images)
    picture, place = Image.new("RGB", size, "white"), [0, 0]
    for image in images:
        if not across:
            place[0] = (picture.width - image.width) // 2
        picture.paste(image, tuple(place))
        place[axis] += image.size[axis] + GAP
    return picture


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """Resize to a longer side in pixels; the pixels of a small image become squares."""
    factor, modes = side / max(image.size), Image.Resampling
    size = [max(round(factor * length), LINE) for length in image.size]
    return image.resize(size, modes.NEAREST if factor > 1 else modes.LANCZOS)


def draw_head(tile: Image.Image, similarity: torch.Tensor, mass: float) -> Image.Image:
    """Draw what one head attends to in an image, of the size of a tile.

    From top to bottom: the attention, from 0 to its maximum; the patches that hold the
    share `mass` of it; the connected components of the foreground, where the similarity,
    (H, W), is above its mean; their spatial entropy and number.
    """

    def as_pixels(patches: torch.Tensor, value: int) -> Image.Image:
        """Turn (H, W), from 0 to 1, into a gray image with 0 to `value`."""
        pixels = (patches.float() * value).round().to(torch.uint8).numpy()
        return Image.fromarray(pixels).resize(tile.size, Image.Resampling.NEAREST)

    attention = similarity.flatten().softmax(0).view_as(similarity)
    heat = as_pixels(attention / attention.max(), 255)
    heat = ImageOps.colorize(heat, DARK, BRIGHT, MIDDLE)
    gray = Image.new("RGB", tile.size, "darkgray")
    faded = Image.blend(tile.convert("L").convert("RGB"), gray, 0.65)
    kept = Image.composite(tile, faded, as_pixels(mass_mask(similarity, mass), 255))

    activation = threshold_at_mean(similarity)
    labels = connected_components(activation > 0)
    masses = labels.flatten().bincount(activation.flatten())
    count = int((masses > 0).sum())
    for n, component in enumerate(masses.argsort(descending=True)[:count]):
        color = PALETTE[n % len(PALETTE)]
        faded.paste(color, mask=as_pixels(labels == component, 190))
    nats = f"H {entropy_of_masses(masses):.2f} nats"
    number = f"{count} component{'s' * (count != 1)}"
    return stack([heat, kept, faded, label(nats, TILE), label(number, TILE)])


def draw_attention(
    images: list[Image.Image],
    captions: list[str],
    maps: dict[str, list[torch.Tensor]],
    mass: float,
) -> Image.Image:
    """Draw what the heads of one or more models attend to, a row for each image.

    The images have any size and aspect; `maps` are, by the title of the model, the
    similarity maps of the images, float32 (heads, H, W); `mass` as in `draw_head`.
    """
    side, margin = 3 * TILE, 120  # pixels, of the image and the names of the tiles
    names = "attention", f"{mass:.0%} of it", "components"
    blocks = []
    for title, (first, *_) in maps.items():
        heads = [label(f"head {n}", TILE) for n in range(1, 1 + len(first))]
        heads = stack(heads, across=True)
        blocks.append(stack([label(title, heads.width, 30, 24), heads]))
    rows = [stack([label("", side), label("", margin), *blocks], across=True)]
    for n, image in enumerate(images):
        tile = enlarge(image, TILE)
        text = [label(line, side) for line in textwrap.wrap(captions[n], 40)]
        columns = [stack([enlarge(image, side), *text])]
        columns.append(stack([label(name, margin, tile.height) for name in names]))
        for each in maps.values():
            heads = [draw_head(tile, similarity, mass) for similarity in each[n]]
            columns.append(stack(heads, across=True))
        rows.append(stack(columns, across=True))
    return ImageOps.expand(stack(rows), GAP, "white")


# -------------------------------------------------------------------- trained models

# For pretrained checkpoints: the evaluation protocol of DeiT and DINO.
PRETRAINED = {"dataset": None, "data_dir": "data", "crop": "resized", "batch_size": 64}
PRETRAINED |= {"amp": False, "device": "cpu"}


@dataclass
class Trained:
    """A loaded model, and what is known of its training."""

    model: VisionTransformer  # on the device, at the size of its training
    path: str
    settings: dict  # of the run, or PRETRAINED
    classes: list[str] | None  # names, None if they are not known
    mean: tuple[float, ...]  # its images are normalized with these
    std: tuple[float, ...]

    def at(self, img_size: int | tuple[int, int] | None) -> VisionTransformer:
        """Copy the model for images of another size; None is its own."""
        model = copy.deepcopy(self.model)
        if img_size is not None:
            model.resize(img_size)
        return model


def load_trained(path: str, args: Namespace) -> Trained:
    """Load a run (its folder or checkpoint) or a pretrained checkpoint; say which."""
    path = os.path.join(path, "checkpoint.pt") if os.path.isdir(path) else path
    checkpoint = read_checkpoint(path)
    model, loaded = load_model(checkpoint, path, args.model, args.model_ema)
    if "settings" in checkpoint:
        settings, classes = checkpoint["settings"], checkpoint["classes"]
        settings["crop"] = settings["crop"].replace("padded", "whole")
        source = data.DATASETS[settings["dataset"]]
        mean, std = source.mean, source.std
        epochs = f"{checkpoint['epoch']} of {settings['epochs']} epochs"
        say(f"{path}: {settings['model']} after {epochs}")
    else:
        settings, classes, mean, std = PRETRAINED, None, args.mean, args.std
        say(f"{loaded}; images are normalized with mean {mean}, std {std}")
    model.to(args.device).eval()
    return Trained(model, path, settings, classes, mean, std)


def newest_checkpoint(runs: str | os.PathLike = "runs") -> str:
    """Return the checkpoint that was written last under `runs`, at any depth."""
    found = sorted(Path(runs).rglob("checkpoint.pt"), key=os.path.getmtime)
    if not found:
        raise FileNotFoundError(
            f"no checkpoint.pt under {runs}: train with python train.py, or use "
            "--checkpoint"
        )
    return str(found[-1])


def read_class_names(path: str, count: int) -> list[str]:
    """Read the names of classes, in order: lines of a file, or folders of a folder.

    Of a line of ImageNet's LOC_synset_mapping.txt, the WordNet id is the name.
    """
    if os.path.isdir(path):
        names = data.list_classes(Path(path))
    else:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows editors write a BOM
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        names = [re.sub(r"^(n\d{8})\b.*", r"\1", line) for line in lines]
    if not len(set(names)) == len(names) == count:
        distinct = f"{len(names)} class names, {len(set(names))} of them distinct"
        raise ValueError(f"{path} lists {distinct}; the model has {count} classes")
    return names


def match_classes(
    args: Namespace, trained: Trained, dataset: data.Images, name: str
) -> torch.Tensor | None:
    """Map the classes of a dataset to those of the model, by name.

    Return int64 (classes,), or None if there are no names, so that the order is used.
    """
    path, known = trained.path, trained.classes
    count = getattr(trained.model.head, "out_features", 0)
    if not count:
        raise ValueError(f"{path} has no head to classify with")
    if known is None and args.classes:
        known = read_class_names(args.classes, count)
    if not known or not dataset.classes:
        there = len(dataset.classes) or int(dataset.targets.max()) + 1
        if there != count:
            hint = "; name the former with --classes" if dataset.classes else ""
            raise ValueError(f"{path} has {count} classes and {name} {there}{hint}")
        say(f"{name}: there are no class names, so classes are matched by their order")
        return None
    if unknown := [each for each in dataset.classes if each not in known]:
        names = ", ".join(unknown[:5])
        raise ValueError(f"{path} lacks {len(unknown)} classes of {name}: {names}")
    indices = [known.index(each) for each in dataset.classes]
    classes = torch.tensor(indices, device=trained.model.pos_embed.device)
    if len(classes) < count:
        say(f"{name}: logits are restricted to {len(classes)} of {count} classes")
    return classes


# ---------------------------------------------------------------------- four reports
#
# Each opens its data, and then measures, prints and adds to the report.


def progress(loader: DataLoader) -> Iterator:
    """Yield the batches; print how far they are, in a file once a minute."""
    stays = not sys.stdout.isatty()
    shown = time.perf_counter()
    for n, batch in enumerate(loader, start=1):
        yield batch
        if time.perf_counter() - shown > (60 if stays else 0.2):
            shown = time.perf_counter()
            say(f"{n} of {len(loader)} batches", stays)


def predict_all(
    model: VisionTransformer, dataset: Dataset, trained: Trained, args: Namespace
) -> Iterator:
    """Yield what `predict` does for a dataset, with the settings of the command line."""
    options = {"workers": args.workers, "pin_memory": args.device.type == "cuda"}
    loader = data.make_loader(dataset, args.batch_size, train=False, **options)
    normalize = data.normalizer(trained.mean, trained.std, args.device)
    return predict(model, progress(loader), normalize, args.device, args.amp)


def test_images(args: Namespace, transform: Callable) -> data.Images:
    if args.dataset not in data.DATASETS:
        raise ValueError("no dataset is known: add --dataset, or --images to draw")
    return data.load_dataset(args.dataset, args.data_dir, "test", transform)


def say_input(name: str, model: VisionTransformer, args: Namespace) -> None:
    size = "{}x{} pixels, {}x{} patches".format(*model.img_size, *model.grid)
    say(f"{name}, {size}, {args.device}, {'bfloat16' if args.amp else 'float32'}")


def say_row(label: str, numbers: Iterable[float], digits: int = 2) -> None:
    say(f"{label:<24}" + "".join(f"{number:9.{digits}f}" for number in numbers))


def say_heads(result: dict, first: str, digits: int, **labels: str) -> None:
    """Print the value of each key of `result` in `labels`, then that of each head."""
    heads = range(1, 1 + len(result["entropy_per_head"]))
    say(f"{first:>33}" + "".join(f"{f'head {n}':>9}" for n in heads))
    for key, label in labels.items():
        say_row(label, [result[key], *result[f"{key}_per_head"]], digits)


ATTENTION = {"entropy": "spatial entropy, nats", "components": "connected components"}


def report_accuracy(args: Namespace, trained: Trained, report: dict) -> None:
    """Classify the test images of a dataset."""
    model, crop = trained.at(args.img_size), args.crop or trained.settings["crop"]
    dataset = test_images(args, data.test_transform(model.img_size[0], crop=crop))
    classes = match_classes(args, trained, dataset, args.dataset)
    say_input(f"{args.dataset}, test split, crop {crop}", model, args)
    result = evaluate(predict_all(model, dataset, trained, args), classes)
    line = "{images} images   top-1 {acc1:.2f}%   top-5 {acc5:.2f}%   loss {loss:.4f}"
    say(line.format(**result))
    say_heads(result, "mean", 3, **ATTENTION)
    where = {"dataset": args.dataset, "img_size": model.img_size, "crop": crop}
    report["accuracy"] = where | result


def report_corruptions(args: Namespace, trained: Trained, report: dict) -> None:
    """Classify corrupted test images: the error by corruption and severity."""
    folder, model = args.corruptions, trained.at(args.img_size)
    found = data.load_corruptions(folder)
    first = next(load() for loads in found.values() for load in loads.values())
    classes = match_classes(args, trained, first, folder)
    known = [len(found[name]) for name in ALEXNET_ERRORS if name in found]
    if args.mce and not (first.classes and known and min(known) == 5):
        raise ValueError("--mce needs corruptions of ImageNet-C, with five severities")
    # ImageNet-C, which has names of classes, is cropped already.
    crop = args.crop or ("whole" if first.classes else trained.settings["crop"])
    transform = data.test_transform(model.img_size[0], crop=crop)
    errors = {}
    where = {"folder": folder, "img_size": model.img_size, "crop": crop}
    report["corruptions"] = where | {"errors": errors}
    say_input(f"{folder}, crop {crop}", model, args)
    levels = sorted({level for loads in found.values() for level in loads})
    head = "".join(f"{level:>9}" for level in [*levels, "mean"])
    say(f"{'error (%) at severity':<24}{head}")
    for name, loads in found.items():
        errors[name] = {}
        for level, load in loads.items():
            images = load()
            images.transform = transform
            result = evaluate(predict_all(model, images, trained, args), classes)
            errors[name][level] = 100 - result["acc1"]
        row = [errors[name].get(level, math.nan) for level in levels]
        say_row(name, [*row, statistics.mean(errors[name].values())])
    means = corruption_means(errors, args.mce)
    say_row("mean error (%)", [means["mean_error"]])
    if args.mce:
        for name, ce in means["ce"].items():
            say_row(f"CE (%), {name}", [ce])
        over = f"{len(means['ce'])} of 15 corruptions, {len(first.classes)} classes"
        say(f"mCE {means['mce']:.2f}%, by the errors of AlexNet, over {over}")
    report["corruptions"] |= means


def report_segmentation(args: Namespace, trained: Trained, report: dict) -> None:
    """Compare the attention with the masks of objects."""
    name, protocol = args.segmentation, PROTOCOLS[args.protocol]
    # Photographs are resized to the protocol's size, other images to the model's.
    size = protocol["size"] if name in ("voc2012", "pets") else None
    model = trained.at(args.img_size or size)
    masks = data.load_masks(name, args.data_dir, model.img_size, args.masks)
    say_input(f"{name}, {'val' if name == 'voc2012' else 'test'} split", model, args)
    share = f"{protocol['mass']:.0%} of the attention"
    void = "count as background" if protocol["void_counts"] else "are excluded"
    say(f"protocol {args.protocol}: {share}, void pixels {void}")
    result = segment(predict_all(model, masks, trained, args), protocol)
    say("{images} images, {images_with_objects} with objects".format(**result))
    say("Jaccard index, percent")
    say_heads(result, "best", 2, jaccard_mass=share, jaccard_mean="S > mean")
    say_heads(result, "mean", 3, **ATTENTION)
    where = {"dataset": name, "data_dir": args.data_dir, "masks": args.masks}
    where |= {"img_size": model.img_size, "protocol": args.protocol}
    report["segmentation"] = where | result


@torch.inference_mode()
def attention_maps(
    image: Image.Image, trained: Trained, args: Namespace
) -> torch.Tensor:
    """Return the similarity maps, (heads, H, W), of an image of any size and aspect ratio.

    Its shorter side becomes that of the model, and the longer one whole patches.
    """
    patch = trained.model.patch_size
    shorter = args.img_size or trained.model.img_size[0]
    scale = shorter / patch / min(image.size)
    size = [patch * round(scale * side) for side in (image.height, image.width)]
    pixels = v2.functional.resize(data.AS_TENSOR(image), size, data.BICUBIC)
    normalize = data.normalizer(trained.mean, trained.std, args.device)
    _, similarity = trained.at(size)(normalize(pixels[None].to(args.device)))
    return similarity[0].float().cpu()


def report_picture(args: Namespace, trained: Trained, report: dict) -> None:
    """Draw the attention on one's own images, or on those of the dataset."""
    models = [trained]
    if args.compare:
        models.append(load_trained(args.compare, args))
    if args.images:
        one = os.path.isfile(args.images)
        files = [args.images] if one else data.list_images(args.images)
        count = min(args.rows, len(files))
        files = [files[n * len(files) // count] for n in range(count)]
        images = [data.open_image(file) for file in files]
        captions = ["/".join(Path(file).parts[-2:]) for file in files]
    else:
        dataset = test_images(args, v2.ToPILImage())
        count = min(args.rows, len(dataset))
        chosen = data.balanced_subset(dataset, count, seed=0).indices
        images = [dataset[n][0].convert("RGB") for n in chosen]
        captions = [f"{dataset.classes[dataset.targets[n]]}, image {n}" for n in chosen]
    maps = {}
    for each in models:
        each.at(args.img_size)  # raises if the patches do not fit
        title = each.path.removesuffix("/checkpoint.pt")
        maps[title] = [attention_maps(image, each, args) for image in images]
    mass = PROTOCOLS[args.protocol]["mass"]
    draw_attention(images, captions, maps, mass).save(args.attention)
    say(f"wrote {args.attention}, images: {len(images)}")
    report["attention"] = {"file": args.attention, "images": captions, "mass": mass}


# ----------------------------------------------------------------------- command line


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    path = os.path.expanduser

    add = parser.add_argument_group("what and how (defaults in brackets)").add_argument
    add("--checkpoint", type=path, help="a run or pretrained checkpoint [newest run]")
    add("--model-ema", action="store_true", help="evaluate the EMA weights [off]")
    add("--device", help="cuda, cuda:N, mps or cpu [the first available]")
    amp = "bfloat16 [as in training, on a device of the same kind]"
    add("--amp", action=argparse.BooleanOptionalAction, help=amp)
    add("--batch-size", type=int, help="images at a time [as in training, or 64]")
    add("--workers", type=int, default=0, help="loader processes [%(default)s]")
    size = "side in pixels [as in training, or the protocol's]"
    add("--img-size", type=int, help=size)
    add("--json", type=path, metavar="FILE.json", help="write all measurements there")

    add = parser.add_argument_group("accuracy").add_argument
    names = f"{', '.join(data.DATASETS)} [as in training]"
    add("--dataset", choices=data.DATASETS, metavar="NAME", help=names)
    add("--data-dir", type=path, help="folder of datasets [as in training, or data]")
    crop = "resized: resize, then crop the center; whole: only resize [as in training]"
    add("--crop", choices=("resized", "whole"), help=crop)
    corruptions = "folder of ImageNet-C (by default with --crop whole) or CIFAR-C"
    add("--corruptions", type=path, help=corruptions)
    add("--mce", action="store_true", help="also errors relative to AlexNet's [off]")

    add = parser.add_argument_group("attention").add_argument
    names = f"Jaccard index of attention and objects: {', '.join(data.MASKS)}"
    add("--segmentation", choices=data.MASKS, metavar="NAME", help=names)
    masks = "for --segmentation folder: of cat/a.jpg the mask is DIR/cat/a.png"
    add("--masks", type=path, metavar="DIR", help=masks)
    protocol = "with sar and ipvit void pixels count; ipvit keeps 90%% [%(default)s]"
    add("--protocol", choices=PROTOCOLS, default="dino", help=protocol)
    add("--attention", type=path, metavar="FILE.png", help="draw the attention")
    add("--images", type=path, help="image or folder to draw it for [the dataset's]")
    add("--compare", type=path, help="a second checkpoint, drawn beside the first")
    add("--rows", type=int, default=4, help="images in the picture [%(default)s]")

    group = "pretrained checkpoints (a run has its own)"
    add = parser.add_argument_group(group).add_argument
    add("--model", choices=MODELS, help="its architecture")
    floats = {"type": float, "nargs": 3, "metavar": "X"}
    floats["help"] = "of each channel, on the scale 0 to 1 [ImageNet's]"
    add("--mean", default=data.IMAGENET_MEAN, **floats)
    add("--std", default=data.IMAGENET_STD, **floats)
    classes = "names of its classes: a file of lines, or a folder of class folders"
    add("--classes", type=path, metavar="PATH", help=classes)
    return parser


def parse_args() -> Namespace:
    parser = make_parser()
    args = parser.parse_args()
    partners = {"images": "attention", "compare": "attention", "mce": "corruptions"}
    for option, partner in partners.items():
        if getattr(args, option) and not getattr(args, partner):
            parser.error(f"--{option} needs --{partner}")
    if (args.segmentation == "folder") != bool(args.masks):
        parser.error("--segmentation folder needs --masks DIR, and no other takes it")
    for name in ("rows", "batch_size", "img_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for file, suffix in ((args.attention, ".png"), (args.json, ".json")):
        if file and not (file.endswith(suffix) and Path(file).parent.is_dir()):
            parser.error(f"{file} is not a {suffix} file in a folder that exists")
    if min(args.mean) < 0 or min(args.std) <= 0 or max(*args.mean, *args.std) > 1:
        parser.error("--mean and --std must be on the scale of 0 to 1")
    return args


def run(args: Namespace) -> None:
    """Measure, print and draw what the command line asks for."""
    args.device = choose_device(args.device)
    path = newest_checkpoint() if args.checkpoint is None else args.checkpoint
    trained = load_trained(path, args)
    other = args.segmentation or args.corruptions or args.images
    only_draw = args.attention and isinstance(trained.model.head, torch.nn.Identity)
    parts = {
        report_accuracy: (args.dataset or not other) and not only_draw,
        report_corruptions: args.corruptions,
        report_segmentation: args.segmentation,
        report_picture: args.attention,
    }
    settings = trained.settings
    args.dataset = args.dataset or args.segmentation or settings["dataset"]
    args.data_dir = args.data_dir or settings["data_dir"]
    args.batch_size = args.batch_size or settings["batch_size"]
    if args.amp is None:
        same = args.device.type == torch.device(settings["device"]).type
        args.amp = settings["amp"] and same
    report = {
        "checkpoint": trained.path,
        "weights": "model_ema" if args.model_ema else "model",
        "mean": trained.mean,
        "std": trained.std,
        "device": hardware(args.device),
        "precision": "bfloat16" if args.amp else "float32",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    for part, asked in parts.items():
        try:
            if asked:
                part(args, trained, report)
        finally:
            if args.json:
                # JSON has no NaN or infinity: write null.
                plain = json.loads(json.dumps(report), parse_constant=lambda _: None)
                Path(args.json).write_text(json.dumps(plain, indent=2) + "\n")


def main() -> None:
    args = parse_args()
    try:
        run(args)
    except (OSError, ValueError) as error:
        say("", stays=False)
        # A worker's error message is a traceback: take the last line.
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        make_parser().error(reason.removeprefix("OSError: "))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
