# SPDX-License-Identifier: MIT
"""Train a Vision Transformer with SAR, the spatial-entropy loss of arXiv 2206.04636.

    python train.py                                # shapes: on a CPU, in minutes
    python train.py --dataset cifar100 --sar-lambda 0.01 --device cuda   # the paper's
    python train.py --dataset cifar100 --sar-lambda 0                    # its plain ViT
    torchrun --nproc_per_node=8 train.py --dataset imagenet --data-dir DIR   # 8 GPUs
    python train.py --resume                       # the command of a run: continue it
    python train.py --benchmark                    # time steps of both, and of timm's

A run lies in its --output-dir: checkpoint.pt, written after every epoch, and log.jsonl,
a line of settings, then a line for each epoch. The defaults below are those of the data
set that is named: the paper's protocol, and for shapes something smaller.
"""

import argparse
import contextlib
import copy
import importlib
import io
import itertools
import json
import math
import os
import platform
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.profiler import profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from data import (
    CROPS,
    DATASETS,
    Images,
    Kept,
    balanced_subset,
    decode_once,
    default_crop,
    load_dataset,
    make_loader,
    make_mix,
    normalizer,
    test_transform,
    train_transform,
)
from entropy import spatial_entropy
from eval import (
    Parser,
    autocast,
    choose_device,
    cpu_batch_size,
    duration,
    evaluate,
    grouped,
    hardware,
    number,
    rank,
    replace,
    say,
    torchrun,
)
from model import (
    MODELS,
    VisionTransformer,
    load_run,
    load_weights,
    read_checkpoint,
)

# The authors' recipe for small data sets: DeiT's, for 100 epochs.
RECIPE = {
    "model": "vit_small",
    "img_size": 224,
    "patch_size": 16,
    "crop": None,
    "pos_std": 0.02,
    "drop_path": 0.1,
    "epochs": 100,
    "batch_size": 128,  # on each GPU, in their ImageNet command
    "lr": 5e-4,
    "min_lr": 1e-5,
    "warmup_lr": 1e-6,
    "warmup_epochs": 5.0,
    "weight_decay": 0.05,
    "clip_grad": None,
    "accumulate": 1,
    "smoothing": 0.1,
    "aa": "rand-m9",
    "reprob": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "model_ema": True,
    "model_ema_decay": 0.99996,
}
FINETUNE_WARMUP_EPOCHS = 3.0  # at most, from weights that are trained already
# Where a data set differs. Shapes is a demonstration: two CPU cores, two minutes.
RECIPES = {name: RECIPE for name in DATASETS} | {
    "imagenet": RECIPE | {"epochs": 300},
    "shapes": RECIPE
    | {
        "model": "vit_mini",
        "img_size": 56,
        "patch_size": 8,
        "crop": "whole",
        "drop_path": 0.0,
        "epochs": 10,
        "batch_size": 32,
        "lr": 0.0128,
        "warmup_epochs": 2.0,
        "smoothing": 0.0,
        "aa": "none",
        "reprob": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "model_ema": False,
    },
}
SAR_WARMUP_EPOCHS = 10  # of lambda
OTHERS_SECONDS = 5.0  # that a process waits for another one's complaint
# What may differ when a run is resumed: how it runs, not what it is.
MAY_DIFFER = {"data_dir", "device", "workers", "cache"}
MAY_DIFFER |= {"compile", "finetune", "output_dir"}
# What the settings of older runs do not name, and were.
UNNAMED = {"world_size": 1, "pos_std": 0.02}


def schedule(
    progress: float, warmup: float, start: float, peak: float, end: float
) -> float:
    """Linear warm-up from start to peak, then a cosine to end.

    Args:
        progress: part of the run that is done, 0 to 1.
        warmup: part of the run that is warm-up.
    """
    if progress < warmup:
        return start + (peak - start) * progress / warmup
    progress = (progress - warmup) / (1 - warmup)
    return end + (peak - end) * (1 + math.cos(math.pi * progress)) / 2


def rates(step: int, total: int, args: argparse.Namespace) -> tuple[float, float]:
    """Learning rate and lambda of a step, 0 to total - 1.

    The authors' schedules, step by step instead of epoch by epoch: lambda rises from 0
    for 10 epochs (half of a run shorter than 20) and falls to 0 by a cosine; or it is
    constant. No learning rate is above the peak.
    """
    progress, peak = step / total, peak_lr(args)
    warmup = min(args.warmup_epochs / args.epochs, 1)
    first, last = min(args.warmup_lr, peak), min(args.min_lr, peak)
    lr = schedule(progress, warmup, first, peak, last)
    if args.sar_schedule == "constant":
        return lr, args.sar_lambda
    warmup = min(SAR_WARMUP_EPOCHS / args.epochs, 0.5)
    return lr, schedule(progress, warmup, 0.0, args.sar_lambda, 0.0)


def peak_lr(args: argparse.Namespace) -> float:
    """The learning rate scaled to the batch, by the linear rule of arXiv 1706.02677."""
    return args.lr * global_batch(args) / 512


def global_batch(args: argparse.Namespace) -> int:
    """How many images make a step."""
    return args.batch_size * args.accumulate * args.world_size


def losses(
    model: Callable,
    images: torch.Tensor,
    target: torch.Tensor,
    *,
    sar_lambda: float | None,
    smoothing: float = 0.0,
    amp: bool = False,
    regularizer: Callable = spatial_entropy,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of equation (6), and its two terms.

    Args:
        model: images -> (logits, similarity).
        images: float (B, 3, H, W).
        target: class indices, int64 (B), or probabilities, float (B, classes).
        sar_lambda: weight of the spatial entropy. None trains the plain ViT: the
            entropy is then measured without a gradient.
        smoothing: label smoothing.
        amp: whether to run the model in bfloat16 autocast.
        regularizer: `spatial_entropy`, or it compiled.

    Returns:
        loss, with a gradient; cross-entropy and spatial entropy, for the log; all
        scalars.
    """
    with autocast(images.device, amp):
        logits, similarity = model(images)
    cross_entropy = F.cross_entropy(logits.float(), target, label_smoothing=smoothing)
    plain = sar_lambda is None
    entropy = regularizer(similarity.detach() if plain else similarity)
    loss = cross_entropy if plain else cross_entropy + sar_lambda * entropy
    return loss, cross_entropy.detach(), entropy.detach()


def compiled(function: Callable, args: argparse.Namespace) -> Callable:
    return torch.compile(function, fullgraph=True) if args.compile else function


def make_optimizer(model: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; biases, norms, the CLS token and the position embedding do not decay."""
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or name in ("cls_token", "pos_embed")
        (keep if plain else decay).append(parameter)
    groups = [{"params": decay}, {"params": keep, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)


# ----------------------------------------------------------------------- command line


def randaugment(text: str) -> int:
    match = re.fullmatch(r"none|rand-m([1-9]|10)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is not none or rand-m1 to rand-m10")
    return int(match[1] or 0)


def make_parser(recipe: dict) -> Parser:
    """The command line, with the defaults of a recipe."""
    parser = Parser(__doc__)
    yes_or_no = argparse.BooleanOptionalAction
    whole, count = number(1, kind=int), number(0, kind=int)
    amount, share = number(0), number(0, 1)

    add = parser.add_argument_group("data").add_argument
    names = ", ".join(DATASETS)
    add("--dataset", choices=DATASETS, default="shapes", metavar="NAME", help=names)
    add("--data-dir", default="data", metavar="DIR", help="where data sets lie or go")
    size = "train on N images, class-balanced"
    add("--train-size", type=whole, metavar="N", help=size)
    add("--img-size", type=whole, metavar="PX", help="side of the images")
    crop = "a random area, as for ImageNet; the whole image, shifted by up to an "
    crop += "eighth; or unshifted. If left out: whole for shapes, else padded up to 32 "
    crop += "px and resized above"
    add("--crop", choices=CROPS, help=crop)
    aa = "RandAugment, M of 10, or none"
    add("--aa", type=randaugment, metavar="rand-mM", help=aa)
    add("--reprob", type=share, metavar="P", help="probability of random erasing")
    add("--mixup", type=amount, metavar="ALPHA", help="mixup; 0 is off")
    add("--cutmix", type=amount, metavar="ALPHA", help="cutmix; 0 is off")
    workers = "processes for training images, and as many for test images; if left out "
    workers += "none on a CPU, else 16 at most"
    add("--workers", type=count, metavar="N", help=workers)
    cache = "keep decoded training images, and test images as the model takes them, in "
    cache += "memory, if these take at most GB each, per process; 0 is never"
    add("--cache", type=amount, default=4.0, metavar="GB", help=cache)

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    add("--patch-size", type=whole, metavar="PX", help="side of a patch")
    pool = "what is classified: the CLS token, or the mean patch of a ViT without one"
    add("--pool", choices=("cls", "mean"), default="cls", help=pool)
    pos_std = "standard deviation of the initial position embedding, 1 at most; of no "
    pos_std += "effect with --finetune"
    add("--pos-std", type=number(1e-6, 1), metavar="STD", help=pos_std)
    add("--drop-path", type=number(0, 0.99), metavar="P", help="stochastic depth")
    finetune = "start from weights of this project, timm, DeiT or DINO; then at most "
    finetune += f"{FINETUNE_WARMUP_EPOCHS:g} warm-up epochs, if these are left out"
    add("--finetune", metavar="FILE", help=finetune)

    add = parser.add_argument_group("SAR").add_argument
    sar_lambda = "weight of the spatial entropy: rises for 10 epochs (half of a run "
    sar_lambda += "shorter than 20), falls to 0 by a cosine; 0 is the plain ViT"
    add("--sar-lambda", type=amount, default=0.01, metavar="L", help=sar_lambda)
    shape = "lambda rises and falls, or is constant from the first step to the last"
    add("--sar-schedule", choices=("cosine", "constant"), default="cosine", help=shape)
    last_skip = "skip connection around the last attention and LayerNorm after it; if "
    last_skip += "left out the paper's pairing, kept only if lambda is 0"
    add("--last-skip", action=yes_or_no, help=last_skip)

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=whole, metavar="N", help="passes over the training set")
    add("--batch-size", type=whole, metavar="N", help="images at a time, per process")
    accumulate = "batches that make a step, per process; a last, incomplete step is "
    accumulate += "left out"
    add("--accumulate", type=whole, metavar="N", help=accumulate)
    add("--lr", type=amount, metavar="LR", help="peak, per 512 images of a step")
    add("--min-lr", type=amount, metavar="LR", help="at the end of the cosine, at most")
    add("--warmup-lr", type=amount, metavar="LR", help="at the start of the warm-up")
    add("--warmup-epochs", type=amount, metavar="N", help="epochs of linear warm-up")
    add("--weight-decay", type=amount, metavar="WD", help="of weight matrices alone")
    add(
        "--clip-grad",
        type=number(1e-12),
        metavar="N",
        help="clip the gradient to this norm; not at all, if left out",
    )
    add("--smoothing", type=share, metavar="EPS", help="label smoothing")
    add("--model-ema", action=yes_or_no, help="also average and evaluate the weights")
    add("--model-ema-decay", type=share, metavar="D", help="of the average, per step")

    add = parser.add_argument_group("run").add_argument
    output_dir = "runs/ and data set, model, lambda, seed, if left out"
    add("--output-dir", metavar="DIR", help=output_dir)
    resume = "continue the run in --output-dir; give the options that started it"
    add("--resume", action="store_true", help=resume)
    seed = "same seed, same run, on a CPU"
    add("--seed", type=number(0, 2**31, int), default=0, metavar="N", help=seed)
    device = "cuda, mps or cpu; the first found, if left out; under torchrun each "
    device += "process takes a GPU of its own"
    add("--device", metavar="NAME", help=device)
    amp = "bfloat16; if left out on CUDA alone, on GPUs that have it (Ampere or later)"
    add("--amp", action=yes_or_no, help=amp)
    interval = "test after every N epochs, and after the last"
    add("--val-interval", type=whole, default=1, metavar="N", help=interval)
    add("--compile", action="store_true", help="torch.compile model and loss")
    benchmark = "time training steps of the paper's model and the loading of images, "
    benchmark += "on random data, and write nothing"
    add("--benchmark", action="store_true", help=benchmark)
    parser.set_defaults(**recipe)
    return parser


def parse_arguments(
    arguments: Sequence[str] | None = None,
) -> tuple[Parser, argparse.Namespace]:
    """Parse twice: the data set decides the defaults of all else.

    Args:
        arguments: the command line's by default.
    """
    first = Parser(None, add_help=False)
    first.add_argument("--dataset", default="shapes")
    first.add_argument("--finetune")
    first.add_argument("--benchmark", action="store_true")
    known, _ = first.parse_known_args(arguments)
    # A benchmark is of the paper's model; an unknown data set is for the full parser to
    # refuse.
    recipe = RECIPES.get(known.dataset, RECIPE)
    if known.benchmark:
        recipe = RECIPE | {"batch_size": None}  # as the device likes it
    if known.finetune:
        warmup = min(recipe["warmup_epochs"], FINETUNE_WARMUP_EPOCHS)
        recipe = recipe | {"warmup_epochs": warmup}
    parser = make_parser(recipe)
    return parser, parser.parse_args(arguments)


# ------------------------------------------------------------------------------- one run


def resolve(args: argparse.Namespace) -> torch.device:
    """Fill in the settings that were left out; returns the device.

    Raises:
        ValueError: there is no such device here.
    """
    device = choose_device(args.device)
    args.device = str(device)
    args.world_size = torchrun("WORLD_SIZE", 1)
    if args.world_size > 1:
        if args.benchmark:
            raise ValueError("--benchmark is of one process, without torchrun")
        if args.device not in ("cuda", "cpu"):
            raise ValueError(f"under torchrun --device is cuda or cpu, not {device}")
        if device.type == "cuda":
            device = choose_device(f"cuda:{torchrun('LOCAL_RANK', 0)}")
    if args.amp is None:  # older GPUs only emulate bfloat16
        args.amp = device.type == "cuda" and has_bfloat16(device)
    if args.workers is None:
        cores = (os.cpu_count() or 1) // torchrun("LOCAL_WORLD_SIZE", 1)
        args.workers = 0 if device.type == "cpu" else min(cores, 16)
    if args.last_skip is None:
        args.last_skip = args.sar_lambda == 0
    args.crop = args.crop or default_crop(args.img_size)
    if args.output_dir is None:
        name = f"{args.dataset}-{args.model}-lambda{args.sar_lambda:g}-seed{args.seed}"
        args.output_dir = str(Path("runs") / name)
    return device


def has_bfloat16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def settings(args: argparse.Namespace) -> dict:
    """What the run is, in plain values; not what was asked of this process alone."""
    asked = {"resume", "benchmark"}
    return {name: value for name, value in vars(args).items() if name not in asked}


def architecture(args: argparse.Namespace, classes: int) -> dict:
    """Keyword arguments of VisionTransformer, plain values, for the checkpoint."""
    names = ("img_size", "patch_size", "pos_std", "drop_path", "last_skip", "pool")
    chosen = {name: getattr(args, name) for name in names}
    return {**MODELS[args.model], **chosen, "num_classes": classes}


def check_output_dir(
    args: argparse.Namespace,
) -> tuple[VisionTransformer | None, dict | None]:
    """Model and checkpoint to resume from, or None and None for a new run.

    Raises:
        FileNotFoundError, ValueError: --resume finds no run, a damaged one, or one with
            other settings; or the directory holds a run and --resume was not given.
    """
    folder = Path(args.output_dir)
    file = folder / "checkpoint.pt"
    if not args.resume:
        if not file.exists() and not (folder / "log.jsonl").exists():
            return None, None
        how = ": --resume continues it"
        try:
            if differ := differing(args, load_run(file)[1]["settings"]):
                how = f" with other settings, {differ}"
        except (OSError, ValueError):
            how = " that cannot be continued"
        raise ValueError(
            f"{folder} already holds a run{how}; another --output-dir starts a new one"
        )
    if not file.exists():
        raise FileNotFoundError(f"there is no run to resume in {folder}")
    model, checkpoint = load_run(file)
    if differ := differing(args, checkpoint["settings"]):
        raise ValueError(
            f"the run in {folder} has other settings: {differ}; "
            "--resume goes with the command that started the run"
        )
    return model, checkpoint


def differing(args: argparse.Namespace, then: Mapping) -> str:
    """What is otherwise than in a run's settings, in words; what may be, left out."""
    then = UNNAMED | then
    return ", ".join(
        f"{name} {then.get(name)} -> {now}"
        for name, now in settings(args).items()
        if name not in MAY_DIFFER and then.get(name) != now
    )


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """While it lasts, no other process trains in the folder: two would mix their files.

    The lock is the system's, so it ends with the process, however that ends. Windows,
    and some file systems over a network, have none.

    Raises:
        OSError: the folder cannot be made or written.
        ValueError: another process trains there.
    """
    if rank() > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another process trains in {folder} now") from None
        except OSError as error:
            say(f"{folder} cannot be locked ({error}): no other run must go there now")
        yield


def check_place(folder: Path) -> None:
    """Refuse early what cannot be an output directory.

    Raises:
        ValueError: one sentence.
    """
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"{folder} cannot hold a run: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot hold a run: {there} is not writable")


def prepare(args: argparse.Namespace, device: torch.device) -> tuple:
    """Model, loaders and checkpoint for `train`, all checked; nothing is written.

    Raises:
        OSError, ValueError: one sentence on what is wrong with settings, data or files.
    """
    check_place(Path(args.output_dir))
    model, checkpoint = check_output_dir(args)
    # Before a data set is downloaded or listed.
    weights = read_checkpoint(args.finetune) if args.finetune and not model else None
    options = {"crop": args.crop, "rand_augment": args.aa, "reprob": args.reprob}
    augment = train_transform(args.dataset, args.img_size, **options)
    plain = test_transform(args.img_size, crop=args.crop)
    with rank_0_first():
        train_set = load_dataset(args.dataset, args.data_dir, "train", augment)
        test_set = load_dataset(args.dataset, args.data_dir, "test", plain)
    classes = list(train_set.classes)
    if args.train_size:
        train_set = balanced_subset(train_set, args.train_size, args.seed)
    options = {"workers": args.workers, "pin_memory": device.type == "cuda"}
    options |= {"rank": rank(), "world_size": args.world_size}
    train_loader = make_loader(train_set, args.batch_size, train=True, **options)
    if len(train_loader) < args.accumulate:
        raise ValueError(f"--accumulate exceeds an epoch's {len(train_loader)} batches")
    if checkpoint and checkpoint["classes"] != classes:
        raise ValueError(f"the run in {args.output_dir} has other classes")
    if model is None:
        torch.manual_seed(args.seed)
        model = VisionTransformer(**architecture(args, len(classes)))
        if weights is not None:
            say(load_weights(model, weights, args.finetune))
    size = cpu_batch_size(model) if device.type == "cpu" else args.batch_size
    test_loader = make_loader(test_set, size, train=False, **options)
    if len(test_set) * 3 * args.img_size**2 <= args.cache * 1e9:
        test_loader = Kept(test_loader)
    versions = {
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "python": platform.python_version(),
        "hardware": machine(args, device),
    }
    derived = {"global_batch": global_batch(args), "peak_lr": peak_lr(args)}
    new = {
        "epoch": 0,  # how many are done
        "settings": settings(args),
        "architecture": architecture(args, len(classes)),
        "classes": classes,
        "log": [settings(args) | derived | versions],
    }

    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    grid, skip = "x".join(map(str, model.grid)), "kept" if args.last_skip else "removed"
    say(f"{args.model}: {millions:.2f} M parameters, {grid} patches, last skip {skip}")
    sizes = f"{len(train_set)} training and {len(test_set)} test images"
    say(f"{args.dataset}: {sizes}, {len(classes)} classes")
    say(f"{machine(args, device)}, {'bfloat16' if args.amp else 'float32'}")
    scaled = f"{args.lr:g} * {global_batch(args)} / 512 = {peak_lr(args):.3g}"
    say(f"learning rate {scaled}, lambda {args.sar_lambda:g}")
    if args.warmup_epochs >= args.epochs:
        say(f"the run ends in its warm-up of {args.warmup_epochs:g} epochs")
    if checkpoint:
        done = checkpoint["epoch"]
        complete = ": it is complete" if done == args.epochs else ""
        say(f"resuming after {done} of {args.epochs} epochs{complete}")
    return model, train_loader, test_loader, checkpoint or new


def machine(args: argparse.Namespace, device: torch.device) -> str:
    times = f"{args.world_size} x " if args.world_size > 1 else ""
    return times + hardware(device)


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Under torchrun: the first process alone, as for a download; then all the rest."""
    if not grouped():
        yield
        return
    if rank() > 0:
        dist.barrier()
    try:
        with contextlib.redirect_stdout(sys.stdout if rank() == 0 else io.StringIO()):
            yield
    finally:
        if rank() == 0:
            dist.barrier()


def train(
    args: argparse.Namespace,
    device: torch.device,
    model: VisionTransformer,
    train_loader: DataLoader,
    test_loader: DataLoader,
    checkpoint: dict,
) -> None:
    """Train and evaluate, epoch by epoch, from where the checkpoint stands.

    Raises:
        FloatingPointError: a loss is not finite; the checkpoint on disk is of before.
        OSError: an image cannot be read, or a file not be written.
    """
    folder, world_size = Path(args.output_dir), args.world_size
    if decode_once(train_loader.dataset.dataset, args.cache * 1e9):
        say("the training images are decoded and kept in memory")
    if isinstance(test_loader, Kept):  # an unreadable image is found before it costs
        for _ in test_loader:
            check_signals()
    model.to(device)
    step_model, accumulating = compiled(model, args), contextlib.nullcontext
    if world_size > 1:
        step_model = DistributedDataParallel(step_model)  # gradients: mean of processes
        accumulating = step_model.no_sync
    options = {"smoothing": args.smoothing, "amp": args.amp}
    options["regularizer"] = compiled(spatial_entropy, args)
    optimizer = make_optimizer(model, args.weight_decay)
    ema = copy.deepcopy(model).requires_grad_(False) if args.model_ema else None
    update_ema = get_ema_multi_avg_fn(args.model_ema_decay)
    source = DATASETS[args.dataset]
    normalize = normalizer(source.mean, source.std, device)
    mix = make_mix(args.mixup, args.cutmix, len(checkpoint["classes"]))
    steps = len(train_loader) // args.accumulate
    first, total = checkpoint["epoch"] * steps, args.epochs * steps
    if first:
        optimizer.load_state_dict(checkpoint["optimizer"])
        if ema:
            ema.load_state_dict(checkpoint["model_ema"])
        save_log(folder, checkpoint)  # it may lack the last epoch of a killed run

    start = time.perf_counter()
    for epoch in range(checkpoint["epoch"], args.epochs):
        # All chance in an epoch follows from the seed and the epoch's number, so that a
        # resumed run is the same as one that was never stopped.
        # Every batch has a seed of its own, so that N processes do what one does with
        # N times --accumulate.
        epoch_seed = args.seed + 1_000_003 * (epoch + 1)
        train_loader.sampler.epoch_seed = epoch_seed
        shape = (steps, args.accumulate, world_size)
        generator = torch.Generator().manual_seed(epoch_seed)
        seeds = torch.randint(2**62, shape, generator=generator)[..., rank()].tolist()
        model.train()
        sums = torch.zeros(2, device=device)  # of cross-entropy and spatial entropy
        epoch_start = shown = time.perf_counter()
        batches = iter(train_loader)
        for step in range(1, steps + 1):
            check_signals()
            done = epoch * steps + step
            lr, sar_lambda = rates(done - 1, total, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            for batch, seed in enumerate(seeds[step - 1], start=1):
                images, labels = next(batches)
                torch.manual_seed(seed)
                images = normalize(images.to(device, non_blocking=True))
                images, target = mix(images, labels.to(device, non_blocking=True))
                weight = sar_lambda if args.sar_lambda else None
                last = batch == args.accumulate
                with contextlib.nullcontext() if last else accumulating():
                    loss, *terms = losses(
                        step_model, images, target, sar_lambda=weight, **options
                    )
                    (loss / args.accumulate).backward()
                sums += torch.stack(terms) / args.accumulate
            if args.clip_grad:
                clip_grad_norm_(model.parameters(), args.clip_grad)
            optimizer.step()
            if ema:
                update_ema(list(ema.parameters()), list(model.parameters()), None)

            if step < steps and time.perf_counter() - shown < 0.5:
                continue
            # Only here, twice a second, does the host wait for the device. Processes
            # speak of their own images until the end of the epoch.
            if step == steps and world_size > 1:
                dist.all_reduce(sums)
                sums /= world_size
            train_loss, train_entropy = (sums / step).tolist()
            shown = time.perf_counter()
            speed = step * global_batch(args) / (shown - epoch_start)
            left = duration((shown - start) / (done - first) * (total - done))
            if not math.isfinite(train_loss + train_entropy):
                raise FloatingPointError(
                    f"no finite loss by step {step} of epoch {epoch + 1}: cross-entropy "
                    f"{train_loss}, spatial entropy {train_entropy}, learning rate {lr:g}"
                )
            say(
                f"epoch {epoch + 1}/{args.epochs} {step / steps:4.0%}  "
                f"loss {train_loss:.3f}  spatial entropy {train_entropy:.3f}  "
                f"{speed:.0f} images/s  {left} left",
                stays=False,
            )

        test, tested = {}, ""
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == args.epochs:
            test = evaluate(model, test_loader, normalize, device, args.amp)
            if not math.isfinite(test["loss"] + test["entropy"]):
                raise FloatingPointError(
                    f"the weights of epoch {epoch + 1} are not finite, or not what they "
                    f"give: test cross-entropy {test['loss']}, spatial entropy "
                    f"{test['entropy']}"
                )
        elif not torch.stack([w.isfinite().all() for w in model.parameters()]).all():
            raise FloatingPointError(f"the weights of epoch {epoch + 1} are not finite")
        record = {
            "epoch": epoch + 1,
            "train_loss": train_loss,
            "train_entropy": train_entropy,
            **{f"test_{name}": value for name, value in test.items()},
            "lr": lr,
            "sar_lambda": sar_lambda,
            "images_per_second": speed,
        }
        checkpoint["epoch"] = epoch + 1
        checkpoint["model"] = model.state_dict()
        checkpoint["optimizer"] = optimizer.state_dict()
        averaged = ""
        if ema and test:
            test_ema = evaluate(ema, test_loader, normalize, device, args.amp)
            record |= {f"test_{name}_ema": value for name, value in test_ema.items()}
            averaged = f" (averaged weights {test_ema['acc1']:.2f} %)"
        if ema:
            checkpoint["model_ema"] = ema.state_dict()
        if test:
            tested = f"test accuracy {test['acc1']:.2f} %{averaged}  "
            tested += (
                f"loss {test['loss']:.3f}  spatial entropy {test['entropy']:.3f} | "
            )
        now = time.perf_counter()
        record["seconds"] = now - epoch_start
        left = duration((now - start) / (done - first) * (total - done))
        checkpoint["log"].append(record)
        save(folder, checkpoint)
        say(
            f"epoch {epoch + 1}/{args.epochs}  loss {train_loss:.3f}  "
            f"spatial entropy {train_entropy:.3f} | {tested}"
            f"lr {lr:.1e}  lambda {sar_lambda:.4f}  {speed:.0f} images/s  {left} left"
        )
        check_signals()


def save(folder: Path, checkpoint: dict) -> None:
    """Write checkpoint.pt and log.jsonl: each under another name first, then renamed.

    Raises:
        OSError: the disk is full, or the like; what stood there before still stands.
    """
    if rank() == 0:
        replace(folder / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
    save_log(folder, checkpoint)


def save_log(folder: Path, checkpoint: dict) -> None:
    lines = "".join(json.dumps(line) + "\n" for line in checkpoint["log"])
    if rank() == 0:
        replace(folder / "log.jsonl", lambda file: file.write_text(lines))


BENCHMARK_WARMUP, BENCHMARK_ROUNDS = 3, 30
# Images of a step, if --batch-size is left out, and steps between waits for the device.
BENCHMARK_SIZES = {"cpu": (4, 1), "cuda": (256, 10), "mps": (64, 10)}


def benchmark(args: argparse.Namespace, device: torch.device) -> None:
    """Time training steps of the plain ViT, of SAR and of timm's ViT, and the loader.

    Eager and compiled steps of each take turns; the table has their medians.
    """
    batch_size, count = BENCHMARK_SIZES[device.type]
    shape = (args.batch_size or batch_size, 3, args.img_size, args.img_size)
    say(f"{args.model}, images {shape}, {'bfloat16' if args.amp else 'float32'}")
    say(f"{machine(args, device)}, torch {torch.__version__}")
    matrices = matrix_rate(device, args.amp)
    say(f"matrix products of this type: {matrices / 1e12:.3g} TFLOP/s")
    loading = f"cifar100 at {args.img_size} px: {loading_cost(args):.2f} ms"
    say(f"loading {loading} an image, on one core")

    images = torch.randn(shape, device=device)
    target = torch.randint(1000, shape[:1], device=device)
    steps, flops = {}, {}
    for name, model in peers(args).items():
        model = model.to(device).train()
        operations = training_flops(model, images[:1], target[:1]) * len(images)
        for args.compile in (False, True):
            full_name = f"{name}, compiled" if args.compile else name
            contestant = copy.deepcopy(model)
            steps[full_name] = make_step(name, contestant, images, target, args)
            flops[full_name] = operations
    seconds, memory = {name: [] for name in steps}, {}
    for turn in range(BENCHMARK_WARMUP + BENCHMARK_ROUNDS):
        # In another order each time, so that no place in it is an advantage.
        names, first = list(steps), turn % len(steps)
        for name in names[first:] + names[:first]:
            step, optimizer = steps[name]
            say(f"round {turn + 1}: {name}", stays=False)
            synchronize(device)
            start = time.perf_counter()
            for _ in range(count):
                step()
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / count)
            if turn == BENCHMARK_WARMUP - 1:
                memory[name] = peak_memory(step, optimizer, device)
    medians = {
        name: statistics.median(times[BENCHMARK_WARMUP:])
        for name, times in seconds.items()
    }
    say(f"{'':<24} ms a step  images/s  SAR's time  TFLOP/s  of matrices  peak MB")
    for name, median in medians.items():
        sar = medians["SAR, compiled" if "compiled" in name else "SAR"]
        rate = flops[name] / median
        say(
            f"{name:<24}{1e3 * median:10.1f}{len(images) / median:10.1f}"
            f"{sar / median:12.3f}{rate / 1e12:9.3g}{rate / matrices:13.0%}"
            f"{memory[name] / 1e6:9.0f}"
        )
    for kind in ("", ", compiled"):
        overhead = medians[f"SAR{kind}"] / medians[f"plain ViT{kind}"] - 1
        say(f"overhead of SAR{kind}: {overhead:+.1%}")


def peers(args: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """The models to be timed, by name; timm's where that is installed and has it."""
    options = architecture(args, classes=1000)
    models = {
        "plain ViT": VisionTransformer(**options | {"last_skip": True}),
        "SAR": VisionTransformer(**options | {"last_skip": False}),
    }
    with contextlib.suppress(ImportError, RuntimeError):
        timm = importlib.import_module("timm")
        peer = f"{args.model}_patch{args.patch_size}_224"
        options = {"img_size": args.img_size, "drop_path_rate": args.drop_path}
        models[f"timm {timm.__version__}"] = timm.create_model(peer, **options)
    return models


def make_step(
    name: str,
    model: torch.nn.Module,
    images: torch.Tensor,
    target: torch.Tensor,
    args: argparse.Namespace,
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """A training step: forward, backward, AdamW; only SAR measures spatial entropy."""
    optimizer = make_optimizer(model, args.weight_decay)
    forward, regularizer = compiled(model, args), compiled(spatial_entropy, args)

    def step() -> None:
        if name == "SAR":
            options = {"sar_lambda": args.sar_lambda, "amp": args.amp}
            loss, *_ = losses(
                forward, images, target, regularizer=regularizer, **options
            )
        else:
            with autocast(images.device, args.amp):
                logits = forward(images)
            logits = logits[0] if isinstance(logits, tuple) else logits
            loss = F.cross_entropy(logits.float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def matrix_rate(device: torch.device, amp: bool) -> float:
    """FLOP/s of a large matrix product in the type of the model."""
    side = 2048 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if amp else torch.float32
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(seconds)


def training_flops(
    model: torch.nn.Module, images: torch.Tensor, target: torch.Tensor
) -> int:
    """Floating-point operations of matrix products, forward and backward."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(images)
        logits = logits[0] if isinstance(logits, tuple) else logits
        F.cross_entropy(logits, target).backward()
    model.zero_grad()
    return counter.get_total_flops()


def loading_cost(args: argparse.Namespace) -> float:
    """Milliseconds of one core for an augmented image of CIFAR-100's size."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (512, 32, 32, 3), dtype=np.uint8)
    options = {"crop": args.crop, "rand_augment": args.aa, "reprob": args.reprob}
    augment = train_transform("cifar100", args.img_size, **options)
    dataset = Images(images, range(len(images)), [], augment)
    loader = make_loader(dataset, 64, train=True, workers=0, pin_memory=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    next(iter(loader))
    start = time.perf_counter()
    for _ in loader:
        pass
    torch.set_num_threads(threads)
    return 1e3 * (time.perf_counter() - start) / len(images)


def peak_memory(
    step: Callable, optimizer: torch.optim.Optimizer, device: torch.device
) -> float:
    """Bytes of tensors at the peak of a step: weights, optimizer state and the rest.

    Not known on MPS.
    """
    resident = sum(
        tensor.nbytes
        for parameter, state in optimizer.state.items()
        for tensor in (parameter, *state.values())
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return resident + torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return math.nan
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its own start and stop
    with profile(profile_memory=True, acc_events=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    events = [event for event in events if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    changes = (event["args"]["Bytes"] for event in events)
    return resident + max(itertools.accumulate(changes))


signals: list[int] = []  # that have ended the run: one at most


def take_signal(number: int, _: object) -> NoReturn:
    """Ctrl-C and SIGTERM end a run once; what follows is no news.

    The exception can be lost where Python calls back, as while a worker is forked:
    so `check_signals` asks again.
    """
    signals.append(number)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    # Workers that the same signal ended. Not SIG_DFL: Python reports a signal that has
    # come, but has lost its handler by the time it is to be handled.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, lambda *_: None)
    raise KeyboardInterrupt


def check_signals() -> None:
    if signals:
        raise KeyboardInterrupt


class Refusal(Exception):
    """What the user is told in one sentence, with exit code 2."""


def start(args: argparse.Namespace) -> None:
    """What the command line asks for.

    Raises:
        Refusal: it cannot be done, or no longer.
    """
    with contextlib.ExitStack() as stack:
        try:
            device = resolve(args)
            with torch.device("meta"):  # sizes are checked before any data is read
                VisionTransformer(**architecture(args, classes=1))
            if args.benchmark:
                benchmark(args, device)
                return
            if args.world_size > 1:
                join_group(device)
            folder = Path(args.output_dir)
            if args.resume and (folder / "checkpoint.pt").exists():
                stack.enter_context(alone_in(folder))
            parts = prepare(args, device)
            if not args.resume:
                stack.enter_context(alone_in(folder))
                check_output_dir(args)  # another one may have ended meanwhile
        except (OSError, ValueError) as error:
            raise Refusal(" ".join(str(error).split())) from error
        say(f"writing to {folder}")
        try:
            train(args, device, *parts)
        except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
            # A worker process puts its traceback first; the last line says what is wrong.
            last = (str(error).strip() or repr(error)).splitlines()[-1]
            raise Refusal(f"{last}; {kept(args)}") from error
        except Exception:
            say(kept(args))
            raise
    checkpoint = folder / "checkpoint.pt"
    say(f"next: python eval.py --checkpoint {checkpoint} --attention attention.png")
    if grouped():
        dist.destroy_process_group()


def join_group(device: torch.device) -> None:
    """Meet the other processes that torchrun started; they wait an hour at most."""
    options = {"backend": "gloo", "timeout": timedelta(hours=1)}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options |= {"backend": "nccl", "device_id": device}
    dist.init_process_group(**options)


def kept(args: argparse.Namespace) -> str:
    """What a run that ends early leaves behind, in words."""
    if args.benchmark or not args.output_dir:
        return "nothing was written"
    checkpoint = Path(args.output_dir) / "checkpoint.pt"
    if checkpoint.exists():
        return (
            f"{checkpoint} holds the last good epoch; "
            "the same command with --resume continues it"
        )
    return "no epoch was finished, so there is none to resume"


def main() -> None:
    parser, args = parse_arguments()
    signals.clear()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, take_signal)
    try:
        try:
            start(args)
        except Exception as error:
            # Where one process fails, the others lose it or fail likewise. The first
            # has the word; the launcher then ends the rest.
            if rank() or (grouped() and not isinstance(error, Refusal)):
                time.sleep(OTHERS_SECONDS)
            raise
    except BaseException as error:
        # A signal may also show as the error of a worker that it ended.
        if signals or isinstance(error, KeyboardInterrupt):
            say(f"stopped; {kept(args)}")
            sys.exit(128 + (signals or [signal.SIGINT])[0])
        if isinstance(error, Refusal):
            parser.error(str(error))
        raise


if __name__ == "__main__":
    main()
