# SPDX-License-Identifier: MIT
"""Evaluate a run of train.py: accuracy, spatial entropy, a picture of the attention.

python eval.py                                  # the newest run under runs/
python eval.py --attention attention.png        # and draw its attention
python eval.py --checkpoint runs/NAME/checkpoint.pt --dataset cifar100 --device cuda
"""

import argparse
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, save_image

from data import (
    DATASETS,
    balanced_subset,
    load_dataset,
    make_loader,
    normalizer,
    test_transform,
)
from entropy import connected_components, spatial_entropy, threshold_at_mean
from model import VisionTransformer, read_checkpoint


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


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module,
    loader: DataLoader,
    normalize: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    amp: bool,
) -> dict:
    """Accuracy and attention statistics over a loader; every image counts once.

    Args:
        model: returns (logits, similarity).
        loader: of images, uint8 (B, 3, H, W), and labels, int64 (B).
        normalize: from `data.normalizer`.
        device: where the model is.
        amp: whether to run in bfloat16 autocast.

    Returns:
        Plain numbers: images; loss (cross-entropy); acc1, acc5 (percent); entropy
        (nats) and components, means over images and heads; entropy_per_head,
        components_per_head, lists.
    """
    model.eval()
    totals = []  # of each batch, on the device until the end
    for images, labels in loader:
        images = normalize(images.to(device, non_blocking=True))
        labels = labels.to(device, non_blocking=True)
        with autocast(device, amp):
            logits, similarity = model(images)
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
        entropy = spatial_entropy(similarity, "none").sum(0)  # (heads,)
        components = count_components(similarity).sum(0)  # (heads,)
        counts = (cross_entropy, best[:, 0].sum(), best.sum(), *entropy, *components)
        counts = [count.float() for count in counts]
        totals.append(torch.stack([torch.full_like(counts[0], len(images)), *counts]))
    total = torch.stack(totals).cpu().double().sum(0)
    if grouped():  # each has seen its share
        total = total.to(device)
        dist.all_reduce(total)
    images_seen, loss, top1, top5, *heads = total.tolist()
    heads = [total / images_seen for total in heads]
    entropy, components = heads[: len(heads) // 2], heads[len(heads) // 2 :]
    return {
        "images": int(images_seen),
        "loss": loss / images_seen,
        "acc1": 100 * top1 / images_seen,
        "acc5": 100 * top5 / images_seen,
        "entropy": sum(entropy) / len(entropy),
        "components": sum(components) / len(components),
        "entropy_per_head": entropy,
        "components_per_head": components,
    }


def count_components(similarity: torch.Tensor) -> torch.Tensor:
    """Number of connected components of the foreground: (..., H, W) -> int64 (...)."""
    labels = connected_components(threshold_at_mean(similarity) > 0).flatten(-2)
    seen = labels.new_zeros(*labels.shape[:-1], labels.shape[-1] + 1)
    return seen.scatter_(-1, labels, 1)[..., 1:].sum(-1)  # slot 0 is the background


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
    return model, checkpoint


# ------------------------------------------------------------------------ the picture

TILE = 120  # pixels, the longer side of a tile
CAPTION = 26  # pixels, the height of a line of text
GAP = 6  # pixels between tiles
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


def caption(text: str, width: int) -> torch.Tensor:
    """One line of text on white: uint8 (3, CAPTION, width)."""
    canvas = torch.full((3, CAPTION // 2, width // 2), 255, dtype=torch.uint8)
    box = torch.tensor([[0, 0, width // 2 - 1, CAPTION // 2 - 1]])
    canvas = draw_bounding_boxes(
        canvas, box, [text], "white", width=0, label_colors="black"
    )
    canvas = F.interpolate(canvas[None].float(), (CAPTION, width), mode="bicubic")[0]
    return canvas.clamp(0, 255).to(torch.uint8)


def heat(attention: torch.Tensor) -> torch.Tensor:
    """Attention from 0 to 1, (H, W), in the colours of HEAT: uint8 (3, H, W)."""
    anchors = torch.tensor(HEAT, dtype=torch.float32)
    place = attention.clamp(0, 1) * (len(HEAT) - 1)
    low = place.long().clamp(max=len(HEAT) - 2)
    colour = anchors[low].lerp(anchors[low + 1], (place - low)[..., None])  # (H, W, 3)
    return colour.permute(2, 0, 1).round().to(torch.uint8)


def draw_attention(
    images: torch.Tensor, similarity: torch.Tensor, captions: list[str]
) -> torch.Tensor:
    """A row for each image: the image, each head's attention, each head's components.

    Args:
        images: uint8 (n, 3, height, width).
        similarity: (n, heads, H, W), as the model returns it.
        captions: n texts, written below the images.

    Returns:
        uint8 (3, height, width) of the picture. Attention is the softmax over the
        patches, each head on a scale of its own up to its maximum; below each head's
        components stands the spatial entropy of its map in nats.
    """
    count, heads = similarity.shape[:2]
    scale = TILE / max(images.shape[-2:])
    size = [round(side * scale) for side in images.shape[-2:]]
    entropy = spatial_entropy(similarity, "none")
    activation = threshold_at_mean(similarity)
    labels = connected_components(activation > 0)
    attention = similarity.float().flatten(2).softmax(-1).view_as(similarity)
    attention = attention / attention.amax((-2, -1), keepdim=True)

    def enlarge(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x[None, None].float(), size)[0, 0].to(x.dtype)

    def beside(tiles: list[torch.Tensor]) -> torch.Tensor:
        gap = torch.full((3, tiles[0].shape[1], GAP), 255, dtype=torch.uint8)
        return torch.cat([part for tile in tiles for part in (tile, gap)], dim=2)

    def captions_beside(texts: list[str]) -> torch.Tensor:
        return beside([caption(text, size[1]) for text in texts])

    names, blank = [f"head {head + 1}" for head in range(heads)], [""] * (heads - 1)
    rows = [
        captions_beside(["image", "attention", *blank, "components", *blank]),
        captions_beside(["", *names, *names]),
    ]
    for i in range(count):
        image = F.interpolate(
            images[i : i + 1].float(), size, mode="bilinear", antialias=True
        )[0]
        image = image.round().clamp(0, 255).to(torch.uint8)
        grey = image.float().mean(0, keepdim=True).expand(3, -1, -1)
        faded = (0.5 * grey + 0.5 * 255).to(torch.uint8)
        attended, components = [], []
        for head in range(heads):
            attended.append(heat(enlarge(attention[i, head])))
            found = labels[i, head].unique()
            found = found[found > 0]
            mass = [activation[i, head][labels[i, head] == n].sum() for n in found]
            order = found[torch.tensor(mass).argsort(descending=True)]
            masks = enlarge(labels[i, head])[None] == order[:, None, None]
            colours = [PALETTE[n % len(PALETTE)] for n in range(len(masks))]
            tile = faded
            if len(masks):
                tile = draw_segmentation_masks(faded, masks, 0.75, colours)
            components.append(tile)
        rows.append(beside([image, *attended, *components]))
        values = [f"H = {value:.2f}" for value in entropy[i]]
        below = captions_beside([captions[i], *[""] * heads, *values])
        rows.append(F.pad(below, (0, 0, 0, GAP), value=255))
    return F.pad(torch.cat(rows, dim=1), (GAP, 0, GAP, GAP), value=255)


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
    add, whole, count = parser.add_argument, number(1, kind=int), number(0, kind=int)
    add("--checkpoint", metavar="FILE", help="of train.py; the newest, if left out")
    add("--model-ema", action="store_true", help="evaluate its averaged weights")
    add("--dataset", choices=DATASETS, metavar="NAME", help="the run's, if left out")
    add("--data-dir", metavar="DIR", help="where it lies; the run's, if left out")
    add("--batch-size", type=whole, metavar="N", help="the run's, if left out")
    add("--workers", type=count, default=0, metavar="N", help="loading processes")
    device = "cuda, mps or cpu; the first found, if left out"
    add("--device", metavar="NAME", help=device)
    attention = "draw images, attention and components there"
    add("--attention", metavar="FILE.png", help=attention)
    add("--rows", type=whole, default=8, metavar="N", help="images in that picture")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    try:
        evaluate_run(args)
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit(130)


def evaluate_run(args: argparse.Namespace) -> None:
    """Print what is measured, and draw the picture.

    Raises:
        OSError, ValueError: one sentence on what is wrong with arguments, data or files.
    """
    device = choose_device(args.device)
    picture = Path(args.attention or "none.png")
    if picture.suffix != ".png" or picture.is_dir() or not picture.parent.is_dir():
        raise ValueError(
            f"--attention takes a .png in a folder there is, not {picture}"
        )
    path = Path(args.checkpoint) if args.checkpoint else newest_checkpoint()
    model, checkpoint = load_run(path, "model_ema" if args.model_ema else "model")
    settings = checkpoint["settings"]
    name = args.dataset or settings["dataset"]
    transform = test_transform(settings["img_size"], crop=settings["crop"])
    data_dir = args.data_dir or settings["data_dir"]
    dataset = load_dataset(name, data_dir, "test", transform)
    if list(dataset.classes) != checkpoint["classes"]:
        odd = sorted(set(dataset.classes) ^ set(checkpoint["classes"]))[:5]
        raise ValueError(f"{name} and {path} differ in classes: {', '.join(odd)}")
    batch_size = args.batch_size or settings["batch_size"]
    options = {"workers": args.workers, "pin_memory": device.type == "cuda"}
    loader = make_loader(dataset, batch_size, train=False, **options)
    # In the run's precision, if it was on such a device.
    amp = settings["amp"] and device.type == torch.device(settings["device"]).type

    epochs = f"{checkpoint['epoch']} of {settings['epochs']} epochs"
    print(f"{path}: {settings['model']} after {epochs}")
    print(f"{name}, test split, on {device} in {'bfloat16' if amp else 'float32'}")
    model.to(device)
    normalize = normalizer(settings["dataset"], device)  # what the model was trained on
    result = evaluate(model, loader, normalize, device, amp)
    line = "{images} images   top-1 {acc1:.2f} %   top-5 {acc5:.2f} %   loss {loss:.4f}"
    print(line.format(**result))
    columns = [f"head {n + 1}" for n in range(len(result["entropy_per_head"]))]
    print(" " * 24 + "".join(f"{column:>9}" for column in [*columns, "mean"]))
    rows = {"entropy": "spatial entropy (nats)", "components": "connected components"}
    for key, label in rows.items():
        values = [*result[f"{key}_per_head"], result[key]]
        print(f"{label:<24}" + "".join(f"{value:9.3f}" for value in values))
    if args.attention:
        indices = balanced_subset(dataset, min(args.rows, len(dataset)), seed=0).indices
        images, labels = zip(*(dataset[index] for index in indices))
        images = torch.stack(images)
        with autocast(device, amp), torch.inference_mode():
            _, similarity = model(normalize(images.to(device)))
        captions = [dataset.classes[label] for label in labels]
        save_image(draw_attention(images, similarity.cpu(), captions) / 255, picture)
        print(f"wrote {picture}")


if __name__ == "__main__":
    main()
