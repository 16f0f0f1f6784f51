# SPDX-License-Identifier: MIT
"""Train a Vision Transformer with SAR, the spatial-entropy loss of arXiv 2206.04636.

    python train.py                                     # shapes: on a CPU, in minutes
    python train.py --dataset cifar100 --sar-lambda 0.01 --device cuda    # the paper's
    python train.py --dataset cifar100 --sar-lambda 0 --device cuda    # its baseline
    torchrun --nproc_per_node=8 train.py --dataset imagenet --data-dir DIR   # 8 GPUs
    python train.py --resume runs/NAME                  # continue a run
    python train.py --dataset cifar100 --help           # the defaults for a dataset

A run is a folder with checkpoint.pt, written after every epoch, and log.jsonl: a line of
settings, then a line for each epoch.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import multiprocessing
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import data
from entropy import spatial_entropy
from eval import choose_device, evaluate, hardware, predict, say
from model import MODELS, VisionTransformer, load_model, load_weights, read_checkpoint

# The defaults of the options are the authors' recipe for small datasets, which is DeiT's
# for 100 epochs. These datasets have others: shapes takes minutes on a CPU, with a lambda
# that shows what SAR does.
RECIPES = {
    "imagenet": "--epochs 300",
    "shapes": """
        --model vit_mini --img-size 56 --patch-size 8 --crop whole --aa none --reprob 0
        --mixup 0 --cutmix 0 --drop-path 0 --smoothing 0 --no-model-ema --sar-lambda 0.3
        --epochs 10 --batch-size 32 --lr 0.0128 --warmup-epochs 2
    """,
}
SAR_WARMUP_EPOCHS = 10  # of lambda
MAY_CHANGE = {"device", "workers", "data_dir", "compile"}  # when a run is resumed
NO_SETTINGS = {"resume", "rank"}  # not for the log
LIMITS = (
    (1, math.inf, "epochs batch_size img_size patch_size train_size val_interval"),
    (0, math.inf, "sar_lambda lr min_lr warmup_lr warmup_epochs weight_decay"),
    (0, math.inf, "clip_grad mixup cutmix workers"),
    (0, 2**31, "seed"),
    (0, 1, "reprob smoothing drop_path model_ema_decay"),
    (1e-6, 1, "pos_std"),
)


# ----------------------------------------------------------------------- command line


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    switch, path = argparse.BooleanOptionalAction, os.path.expanduser

    def add(option: str, text: str, **options) -> None:
        """Add an option to the group; its help ends with the default or a "[...]"."""
        text += "" if "[" in text else " [%(default)s]"
        group.add_argument(option, help=text, **options)

    group = parser.add_argument_group("data (here and below, defaults are in brackets)")
    names = ", ".join(data.DATASETS)
    add("--dataset", names, choices=data.DATASETS, default="shapes", metavar="NAME")
    add("--data-dir", "folder of the datasets", type=path, default="data")
    add("--train-size", "number of images, balanced over classes [all]", type=int)
    add("--img-size", "side of the images in pixels", type=int, default=224)
    crop = "resized: a random area; padded: shifted by up to an eighth of the side; whole: "
    crop += "unshifted [whole for shapes; padded if --img-size <= 32; else resized]"
    add("--crop", crop, choices=("resized", "padded", "whole"))
    aa = ("none", *(f"rand-m{magnitude}" for magnitude in range(1, 11)))
    aa_text = "RandAugment, M from 1 to 10"
    add("--aa", aa_text, choices=aa, default="rand-m9", metavar="none|rand-mM")
    add("--reprob", "probability of random erasing", type=float, default=0.25)
    add("--mixup", "alpha of mixup, 0 is off", type=float, default=0.8)
    add("--cutmix", "alpha of cutmix, 0 is off", type=float, default=1.0)
    add("--workers", "loader processes [0 on a CPU, else up to 16]", type=int)

    group = parser.add_argument_group("model")
    add("--model", "preset", choices=MODELS, default="vit_small")
    add("--patch-size", "side of the patches in pixels", type=int, default=16)
    pool = "classify the CLS token, or the mean of the patches"
    add("--pool", pool, choices=("cls", "mean"), default="cls")
    pos_std = "standard deviation of the initial position embedding"
    add("--pos-std", pos_std, type=float, default=0.02)
    drop_path = "stochastic depth, rising to this in the last block"
    add("--drop-path", drop_path, type=float, default=0.1)
    finetune = "start from a checkpoint of timm, DeiT, DINO or a run [none]"
    add("--finetune", finetune, type=path, metavar="FILE")

    group = parser.add_argument_group("SAR")
    sar_lambda = "weight of the entropy, 0 is the plain ViT"
    add("--sar-lambda", sar_lambda, type=float, default=0.01)
    shape = "rise for 10 epochs (at most half of the run), then fall to 0; or constant"
    add("--sar-schedule", shape, choices=("cosine", "constant"), default="cosine")
    last_skip = "keep the skip connection around the last attention and the LayerNorm "
    last_skip += "after it [only if lambda is 0, as in the paper]"
    add("--last-skip", last_skip, action=switch)

    group = parser.add_argument_group("optimization")
    add("--epochs", "passes over the training images", type=int, default=100)
    add("--batch-size", "images per step and process", type=int, default=128)
    lr = "peak learning rate for 512 images, scaled with the batch"
    add("--lr", lr, type=float, default=5e-4)
    add("--min-lr", "final learning rate, not scaled", type=float, default=1e-5)
    add("--warmup-lr", "initial learning rate, not scaled", type=float, default=1e-6)
    warmup = "epochs of linear warm-up, at most half of the run"
    add("--warmup-epochs", warmup, type=float, default=5.0)
    add("--weight-decay", "decay of weight matrices", type=float, default=0.05)
    add("--clip-grad", "maximum gradient norm, 0 is off", type=float, default=0.0)
    add("--smoothing", "label smoothing", type=float, default=0.1)
    add("--model-ema", "also evaluate EMA weights", action=switch, default=True)
    add("--model-ema-decay", "EMA decay per step", type=float, default=0.99996)

    group = parser.add_argument_group("run")
    output_dir = "folder of the run [runs/DATASET-MODEL-lambdaL-seedS]"
    add("--output-dir", output_dir, type=path)
    resume = "continue a run with its settings; only --device, --workers, --data-dir "
    resume += "and --compile may be given anew [none]"
    add("--resume", resume, type=path, metavar="RUN_DIR")
    add("--seed", "random seed", type=int, default=0)
    add("--device", "cuda, cuda:N, mps or cpu [the first available]")
    add("--amp", "bfloat16 autocast [on CUDA GPUs that support it]", action=switch)
    interval = "test every N epochs, and after the last"
    add("--val-interval", interval, type=int, default=1, metavar="N")
    add("--compile", "torch.compile model and loss", action=switch, default=False)
    return parser


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse for the dataset or run that decides the defaults, then with these."""
    parser = make_parser()
    args = parser.parse_args([x for x in arguments if x not in ("-h", "--help")])
    if args.resume is not None:
        try:
            with open(os.path.join(args.resume, "log.jsonl")) as log:
                defaults = json.loads(log.readline()) | {"output_dir": args.resume}
            defaults["world_size"]  # which every run has
        except (OSError, ValueError, TypeError, KeyError):
            parser.error(f"{args.resume!r} holds no run to resume")
    else:
        defaults = vars(parser.parse_args(RECIPES.get(args.dataset, "").split()))
        if args.finetune:
            defaults["warmup_epochs"] = min(defaults["warmup_epochs"], 3.0)
            if not os.path.isfile(args.finetune):
                parser.error(f"no checkpoint at {args.finetune}")
    parser.set_defaults(**defaults)
    args = parser.parse_args(arguments)
    if args.resume is not None:
        for name in sorted(defaults.keys() - MAY_CHANGE - NO_SETTINGS):
            if getattr(args, name) != defaults[name]:
                option = f"--{name.replace('_', '-')}"
                parser.error(f"{option} cannot change when a run is resumed")
    for low, high, names in LIMITS:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not (low <= value <= high and value < math.inf):
                upper = f" and at most {high}" if high < math.inf else ""
                option = f"--{name.replace('_', '-')}"
                parser.error(f"{option} must be at least {low}{upper}, not {value}")
    if args.crop is None:  # the authors' rule
        args.crop = "padded" if args.img_size <= 32 else "resized"
    if args.last_skip is None:
        args.last_skip = args.sar_lambda == 0
    if args.output_dir is None:
        name = f"{args.dataset}-{args.model}-lambda{args.sar_lambda:g}-seed{args.seed}"
        args.output_dir = os.path.join("runs", name)
    return args


# ------------------------------------------------------------------ schedules and loss


def schedule(
    progress: float, warmup: float, start: float, peak: float, end: float
) -> float:
    """Linear warm-up from start to peak, then a cosine to end.

    `progress` and `warmup` are shares of the run, 0 to 1. Warm-up takes half of it at
    most, so that a short run is a usable one.
    """
    warmup = min(warmup, 0.5)
    if progress < warmup:
        return start + (peak - start) * progress / warmup
    progress = (progress - warmup) / (1 - warmup)
    return end + (peak - end) * (1 + math.cos(math.pi * progress)) / 2


def rates(step: int, total: int, args: argparse.Namespace) -> tuple[float, float]:
    """Return learning rate and lambda of a step, 0 to total - 1.

    The authors' schedules, but they move with every step instead of every epoch, and no
    learning rate exceeds the peak.
    """
    progress, peak = step / total, args.peak_lr
    warmup = args.warmup_epochs / args.epochs
    first, last = min(args.warmup_lr, peak), min(args.min_lr, peak)
    lr = schedule(progress, warmup, first, peak, last)
    if args.sar_schedule == "constant":
        return lr, args.sar_lambda
    warmup = SAR_WARMUP_EPOCHS / args.epochs
    return lr, schedule(progress, warmup, 0.0, args.sar_lambda, 0.0)


def losses(
    model: Callable,
    regularizer: Callable,
    images: torch.Tensor,
    target: torch.Tensor,
    sar_lambda: float,
    args: argparse.Namespace,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss of equation (6), and its two terms without gradients; scalars.

    `model` maps images, float (B, 3, H, W), to logits and similarity. `regularizer` is
    `spatial_entropy`, maybe compiled. `target` holds class indices, int64 (B,), or
    probabilities, float (B, classes). `sar_lambda` is the weight at this step.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
        logits, similarity = model(images)
    logits = logits.float()
    cross_entropy = F.cross_entropy(logits, target, label_smoothing=args.smoothing)
    if args.sar_lambda == 0:  # the entropy is only measured
        entropy, loss = regularizer(similarity.detach()), cross_entropy
    else:
        entropy = regularizer(similarity)
        loss = cross_entropy + sar_lambda * entropy
    return loss, cross_entropy.detach(), entropy.detach()


def make_optimizer(model: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; biases, norms, the CLS token and the position embedding do not decay."""
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or name in ("cls_token", "pos_embed")
        (keep if plain else decay).append(parameter)
    groups = [{"params": decay}, {"params": keep, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)


# ------------------------------------------------------------------------------- a run


def train_one_epoch(
    epoch: int,
    model: VisionTransformer,
    ema: VisionTransformer | None,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    prepare: Callable,
    losses_of: Callable,
    args: argparse.Namespace,
) -> dict:
    """Train for an epoch, 0 to args.epochs - 1, and return its line of the log.

    `prepare` brings a batch to the device and mixes it; `losses_of` is `losses` with the
    model, maybe compiled. Raise FloatingPointError if the loss is not finite.
    """
    # All randomness follows from the seed and the epoch, so that a resumed run is the
    # same as one that was never stopped. Each batch of each process has its own seed.
    epoch_seed = args.seed + 1_000_003 * (epoch + 1)
    loader.sampler.epoch_seed = epoch_seed
    generator = torch.Generator().manual_seed(epoch_seed)
    seeds = torch.randint(2**62, (len(loader), args.world_size), generator=generator)
    seeds = seeds[:, args.rank].tolist()
    steps, total = len(loader), args.epochs * len(loader)
    update_ema = get_ema_multi_avg_fn(args.model_ema_decay)
    stays = not sys.stdout.isatty()
    interval = 60 if stays else 0.5  # seconds between progress lines
    model.train()
    sums = 0  # of both terms of the loss
    start = shown = time.perf_counter()
    for step, (images, labels) in enumerate(loader):
        lr, sar_lambda = rates(epoch * steps + step, total, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(seeds[step])
        images, target = prepare(images, labels)
        loss, *terms = losses_of(images, target, sar_lambda, args)
        optimizer.zero_grad()
        loss.backward()
        if args.clip_grad:
            clip_grad_norm_(model.parameters(), args.clip_grad)
        optimizer.step()
        if ema:
            update_ema(list(ema.parameters()), list(model.parameters()), None)
        sums = sums + torch.stack(terms)
        now, last = time.perf_counter(), step + 1 == steps
        if not last and now - shown < interval:
            continue
        # The only synchronization of host and device.
        shown = now
        if last and args.world_size > 1:
            dist.all_reduce(sums)
            sums /= args.world_size
        train_loss, train_entropy = (sums / (step + 1)).tolist()
        if not math.isfinite(train_loss + train_entropy):
            raise FloatingPointError(
                f"loss not finite by step {step + 1} of epoch {epoch + 1}: cross-entropy "
                f"{train_loss}, spatial entropy {train_entropy}, learning rate {lr:g}"
            )
        if not last:
            left = (now - start) / (step + 1) * (total - epoch * steps - step - 1)
            share, left = (step + 1) / steps, timedelta(seconds=round(left))
            line = f"{share:4.0%} of epoch {epoch + 1}/{args.epochs}  "
            line += f"loss {train_loss:.3f}  entropy {train_entropy:.3f}  {left} left"
            say(line, stays)
    return {
        "epoch": epoch + 1,
        "train_loss": train_loss,
        "train_entropy": train_entropy,
        "lr": lr,
        "sar_lambda": sar_lambda,
        "images_per_second": steps * args.global_batch / (time.perf_counter() - start),
    }


def summary(line: dict, args: argparse.Namespace) -> str:
    """Format an epoch's line of the log for people."""
    text = f"epoch {line['epoch']}/{args.epochs}  loss {line['train_loss']:.3f}  "
    text += f"entropy {line['train_entropy']:.3f}  "
    if "test_acc1" in line:
        text += f"test {line['test_acc1']:.2f}%  "
    if "test_acc1_ema" in line:
        text += f"EMA {line['test_acc1_ema']:.2f}%  "
    left = round(line["seconds"] * (args.epochs - line["epoch"]))
    return f"{text}{timedelta(seconds=left)} left"


def save(folder: Path, checkpoint: dict) -> None:
    """Write log.jsonl, then checkpoint.pt, from which --resume restores the log.

    Each is written whole or not at all: under another name first, then renamed.
    """
    lines = "".join(json.dumps(line) + "\n" for line in checkpoint["log"])
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    contents = {"log.jsonl": lines.encode(), "checkpoint.pt": buffer.getbuffer()}
    for name, content in contents.items():
        file, partial_file = folder / name, folder / f"{name}.partial"
        try:
            with partial_file.open("wb") as opened:
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
            partial_file.replace(file)
        except OSError as error:
            partial_file.unlink(missing_ok=True)
            raise OSError(f"{file} cannot be written: {error.strerror}") from error


def set_up(args: argparse.Namespace) -> torch.device:
    """Join the processes of torchrun, complete the settings, and return the device."""
    device, args.rank, world_size = choose_device(args.device), 0, 1
    if dist.is_torchelastic_launched():
        options = {"backend": "gloo", "timeout": timedelta(hours=1)}
        if device.type == "cuda":
            device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(device)
            options |= {"backend": "nccl", "device_id": device}
        dist.init_process_group(**options)
        args.rank, world_size = dist.get_rank(), dist.get_world_size()
    if args.rank > 0:
        sys.stdout = io.StringIO()  # print on rank 0 only
    if args.resume is not None and args.world_size != world_size:
        raise ValueError(f"resume with {args.world_size} processes, not {world_size}")
    args.device, args.world_size = args.device or device.type, world_size
    args.global_batch = args.batch_size * world_size
    args.peak_lr = args.lr * args.global_batch / 512  # arXiv 1706.02677
    if args.amp is None:  # older GPUs only emulate bfloat16
        args.amp = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    if args.workers is None:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        args.workers = 0 if device.type == "cpu" else min(cores, 16)
    return device


def make_loaders(
    args: argparse.Namespace, device: torch.device
) -> tuple[DataLoader, DataLoader, list[str]]:
    """Make the loaders of training and test images; return the classes' names too."""
    magnitude = 0 if args.aa == "none" else int(args.aa.removeprefix("rand-m"))
    options = {"crop": args.crop, "rand_augment": magnitude, "reprob": args.reprob}
    augment = data.train_transform(args.dataset, args.img_size, **options)
    plain = data.test_transform(args.img_size, crop=args.crop)
    if args.rank > 0:
        dist.barrier()  # rank 0 is first, as it may download
    train_set = data.load_dataset(args.dataset, args.data_dir, "train", augment)
    test_set = data.load_dataset(args.dataset, args.data_dir, "test", plain)
    if args.rank == 0 and args.world_size > 1:
        dist.barrier()
    classes = train_set.classes
    if args.train_size:
        train_set = data.balanced_subset(train_set, args.train_size, args.seed)
    options = {"workers": args.workers, "pin_memory": device.type == "cuda"}
    options |= {"rank": args.rank, "world_size": args.world_size}
    train_loader = data.make_loader(train_set, args.batch_size, train=True, **options)
    test_loader = data.make_loader(test_set, args.batch_size, train=False, **options)
    counts = f"{len(train_set)} training and {len(test_set)} test images"
    say(f"{args.dataset}: {counts}, {len(classes)} classes")
    return train_loader, test_loader, classes


def open_run(
    args: argparse.Namespace, device: torch.device, classes: list[str]
) -> tuple[VisionTransformer, dict]:
    """Return model and checkpoint: those of the run to resume, or new ones."""
    file = Path(args.output_dir, "checkpoint.pt")
    if args.resume is not None and file.exists():
        checkpoint = read_checkpoint(file)
        model, _ = load_model(checkpoint, str(file))
        if checkpoint["classes"] != classes:
            raise ValueError(f"{args.resume} was trained on other classes")
        return model, checkpoint
    names = ("img_size", "patch_size", "pos_std", "drop_path", "last_skip", "pool")
    architecture = {name: getattr(args, name) for name in names}
    architecture |= MODELS[args.model] | {"num_classes": len(classes)}
    torch.manual_seed(args.seed)
    model = VisionTransformer(**architecture)
    if args.finetune:
        say(load_weights(model, args.finetune))
    settings = {k: v for k, v in vars(args).items() if k not in NO_SETTINGS} | {
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "python": platform.python_version(),
        "hardware": hardware(device),
    }
    if args.resume is None and args.rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        log = file.with_name("log.jsonl")
        with log.open("x") as opened:  # fails if another run has just begun here
            args.new_log = log
            opened.write(json.dumps(settings) + "\n")
    checkpoint = {"epoch": 0, "settings": settings, "log": [settings]}
    return model, checkpoint | {"architecture": architecture, "classes": classes}


def train(args: argparse.Namespace) -> None:
    """Start or continue a run: train, evaluate and save, epoch by epoch.

    Raises:
        OSError, ValueError: settings, data or files cannot be used.
        FloatingPointError: a loss is not finite; the last good checkpoint stays.
    """
    device, folder = set_up(args), Path(args.output_dir)
    used = any((folder / name).exists() for name in ("checkpoint.pt", "log.jsonl"))
    if args.resume is None and used:
        raise ValueError(f"{folder} contains a run: --resume it, or set --output-dir")
    train_loader, test_loader, classes = make_loaders(args, device)
    model, checkpoint = open_run(args, device, classes)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    grid, skip = "x".join(map(str, model.grid)), "kept" if args.last_skip else "removed"
    sizes = f"{millions:.2f} M parameters, {grid} patches"
    say(f"{args.model}: {sizes}, skip in the last block {skip}")
    rule = f"{args.lr:g} * {args.global_batch} / 512 = {args.peak_lr:.3g}"
    say(f"learning rate {rule}, lambda {args.sar_lambda:g}")
    say(f"{hardware(device)}, {'bfloat16' if args.amp else 'float32'}")
    say(f"{checkpoint['epoch']} of {args.epochs} epochs done; writing to {folder}")

    model.to(device)
    compiled = partial(torch.compile, fullgraph=True, disable=not args.compile)
    forward, regularizer = compiled(model), compiled(spatial_entropy)
    if args.world_size > 1:
        forward = DistributedDataParallel(forward)  # averages gradients
    losses_of = partial(losses, forward, regularizer)
    optimizer = make_optimizer(model, args.weight_decay)
    ema = copy.deepcopy(model).requires_grad_(False) if args.model_ema else None
    models = {"model": model, "model_ema": ema} if ema else {"model": model}
    if checkpoint["epoch"]:
        optimizer.load_state_dict(checkpoint["optimizer"])
        if ema:
            ema.load_state_dict(checkpoint["model_ema"])
    source = data.DATASETS[args.dataset]
    normalize = data.normalizer(source.mean, source.std, device)
    mix = data.make_mix(args.mixup, args.cutmix, len(classes))

    def prepare(images: torch.Tensor, labels: torch.Tensor) -> tuple:
        images = normalize(images.to(device, non_blocking=True))
        return mix(images, labels.to(device, non_blocking=True))

    for epoch in range(checkpoint["epoch"], args.epochs):
        start = time.perf_counter()
        line = train_one_epoch(
            epoch, model, ema, optimizer, train_loader, prepare, losses_of, args
        )
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == args.epochs:
            for name, each in models.items():
                test = evaluate(predict(each, test_loader, normalize, device, args.amp))
                suffix = name.removeprefix("model")
                line |= {f"test_{key}{suffix}": value for key, value in test.items()}
        finite = torch.stack([w.isfinite().all() for w in model.parameters()]).all()
        if not finite or not math.isfinite(line.get("test_loss", 0)):
            raise FloatingPointError(
                f"weights or test loss not finite after epoch {epoch + 1}: test "
                f"cross-entropy {line.get('test_loss')}, learning rate {line['lr']:g}"
            )
        line["seconds"] = time.perf_counter() - start
        checkpoint["log"].append(line)
        checkpoint |= {"epoch": epoch + 1, "optimizer": optimizer.state_dict()}
        checkpoint |= {name: each.state_dict() for name, each in models.items()}
        if args.rank == 0:
            save(folder, checkpoint)
        say(summary(line, args))
    if dist.is_initialized():
        dist.destroy_process_group()
    file = shlex.quote(os.path.join(args.output_dir, "checkpoint.pt"))
    say(f"next: python eval.py --checkpoint {file} --attention attention.png")


def stop(args: argparse.Namespace, number: int, _: object) -> None:
    """Exit at once on Ctrl-C or SIGTERM. Files are written atomically, so this is safe.

    An exception raised here could get lost, for example while a worker is forked.
    """
    if multiprocessing.parent_process():
        return  # a worker, which the main process ends
    if hasattr(signal, "SIGCHLD"):  # not on Windows
        # PyTorch's handler raises an error if a worker ends before this process.
        signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        started = os.path.exists(os.path.join(args.output_dir, "log.jsonl"))
        hint = f"; continue: python train.py --resume {shlex.quote(args.output_dir)}"
        say(f"stopped{hint if started else ''}")
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(128 + number)


def main() -> None:
    args = parse_args(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, partial(stop, args))
    try:
        train(args)
    except Exception as error:
        say("", stays=False)
        if "new_log" in args and not Path(args.output_dir, "checkpoint.pt").exists():
            with contextlib.suppress(OSError):
                args.new_log.unlink()  # a run that fails in epoch 1 leaves no log
        if not isinstance(error, (OSError, ValueError, FloatingPointError)):
            raise
        # Of a worker's error, which starts with a traceback, take the last line.
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        make_parser().error(reason.removeprefix("OSError: "))


if __name__ == "__main__":
    main()
