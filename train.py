# SPDX-License-Identifier: MIT
"""Train a Vision Transformer with SAR, the spatial-entropy loss of arXiv 2206.04636.

    python train.py                                         # shapes, on a CPU, in minutes
    python train.py --dataset cifar100 --sar-lambda 0.01 --device cuda    # the paper's protocol
    python train.py --dataset cifar100 --sar-lambda 0                     # its plain ViT
    python train.py --resume                                # continue the run in --output-dir

The run is written to --output-dir: checkpoint.pt after every epoch, and log.jsonl, whose first line
is the settings and every other an epoch. Defaults depend on the data set: the paper's protocol, but
for shapes; `python train.py --dataset NAME --help` shows those of NAME.
"""

import argparse
import json
import math
import os
import platform
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from data import (
    CROPS,
    DATASETS,
    balanced_subset,
    default_crop,
    load_dataset,
    make_loader,
    normalizer,
    test_transform,
    train_transform,
)
from entropy import spatial_entropy
from eval import Parser, choose_device, evaluate, load_run
from model import MODELS, VisionTransformer, load_weights

# The authors' recipe: DeiT's, with 100 epochs, as for all small data sets of the paper.
RECIPE = {
    "model": "vit_small",
    "img_size": 224,
    "patch_size": 16,
    "crop": None,
    "drop_path": 0.1,
    "epochs": 100,
    "batch_size": 128,
    "lr": 5e-4,
    "min_lr": 1e-5,
    "warmup_lr": 1e-6,
    "warmup_epochs": 5.0,
    "weight_decay": 0.05,
    "smoothing": 0.1,
    "aa": "rand-m9",
    "reprob": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "model_ema": True,
    "model_ema_decay": 0.99996,
}
# What a data set does otherwise. Shapes is a demonstration that two CPU cores finish in minutes.
RECIPES = {name: RECIPE for name in DATASETS} | {
    "shapes": RECIPE
    | {
        "model": "vit_mini",
        "img_size": 48,
        "patch_size": 8,
        "crop": "padded",
        "drop_path": 0.0,
        "epochs": 16,
        "batch_size": 32,
        "lr": 0.0128,
        "warmup_epochs": 2.0,
        "smoothing": 0.0,
        "aa": "none",
        "reprob": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "model_ema": False,
    }
}
SAR_WARMUP_EPOCHS = 10  # of lambda
BENCHMARK_STEPS = 20


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
    for 10 epochs (half of a run shorter than 20) and falls to 0 by a cosine.
    """
    progress = step / total
    peak = args.lr * args.batch_size / 512
    warmup = min(args.warmup_epochs / args.epochs, 1)
    lr = schedule(progress, warmup, args.warmup_lr, peak, args.min_lr)
    warmup = min(SAR_WARMUP_EPOCHS / args.epochs, 0.5)
    return lr, schedule(progress, warmup, 0.0, args.sar_lambda, 0.0)


def losses(
    model: Callable,
    images: torch.Tensor,
    target: torch.Tensor,
    *,
    sar_lambda: float | None,
    smoothing: float = 0.0,
    amp: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of equation (6), and its two terms.

    Args:
        model: images -> (logits, similarity).
        images: float (B, 3, H, W).
        target: class indices, int64 (B), or probabilities, float (B, classes).
        sar_lambda: weight of the spatial entropy. None trains the plain ViT: the entropy is then
            measured without a gradient.
        smoothing: label smoothing.
        amp: whether to run the model in bfloat16 autocast.

    Returns:
        loss, with a gradient; cross-entropy and spatial entropy, for the log; all scalars.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        logits, similarity = model(images)
    cross_entropy = F.cross_entropy(logits.float(), target, label_smoothing=smoothing)
    if sar_lambda is None:
        return (
            cross_entropy,
            cross_entropy.detach(),
            spatial_entropy(similarity.detach()),
        )
    entropy = spatial_entropy(similarity)
    return (
        cross_entropy + sar_lambda * entropy,
        cross_entropy.detach(),
        entropy.detach(),
    )


def make_optimizer(model: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; biases, norms, the CLS token and the position embedding do not decay."""
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or name in ("cls_token", "pos_embed")
        (keep if plain else decay).append(parameter)
    groups = [{"params": decay}, {"params": keep, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)


def make_mix(mixup: float, cutmix: float, classes: int) -> Callable:
    """Mixup or cutmix of a batch, at even odds if both are on: (images, labels) -> the same."""
    mixes = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
    mixes += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
    return v2.RandomChoice(mixes) if mixes else lambda *batch: batch


# -------------------------------------------------------------------------------- command line


def randaugment(text: str) -> int:
    match = re.fullmatch(r"none|rand-m(\d|10)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is not none or rand-m0 to rand-m10")
    return int(match[1] or 0)


def number(
    low: float, high: float = math.inf, kind: type = float
) -> Callable[[str], float]:
    """An argparse type: a number from low to high."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return value

    parse.__name__ = "number"
    return parse


def make_parser(recipe: dict) -> Parser:
    """The command line, with the defaults of a recipe."""
    parser = Parser(__doc__)
    yes_or_no = argparse.BooleanOptionalAction
    whole, count = number(1, kind=int), number(0, kind=int)
    positive, share = number(0), number(0, 1)

    add = parser.add_argument_group("data").add_argument
    names = ", ".join(DATASETS)
    add("--dataset", choices=DATASETS, default="shapes", metavar="NAME", help=names)
    add("--data-dir", default="data", metavar="DIR", help="where data sets lie or go")
    add(
        "--train-size",
        type=whole,
        metavar="N",
        help="train on N images, class-balanced",
    )
    add("--img-size", type=whole, metavar="PX", help="side of the images")
    crop = "a random area, as for ImageNet, or the whole image, shifted; "
    crop += "padded up to 32 px and resized above, if left out"
    add("--crop", choices=CROPS, help=crop)
    add(
        "--aa",
        type=randaugment,
        metavar="rand-mM",
        help="RandAugment, M of 10; or none",
    )
    add("--reprob", type=share, metavar="P", help="probability of random erasing")
    add("--mixup", type=positive, metavar="ALPHA", help="mixup; 0 is off")
    add("--cutmix", type=positive, metavar="ALPHA", help="cutmix; 0 is off")
    workers = "processes that load images; if left out none on a CPU, else 16 at most"
    add("--workers", type=count, metavar="N", help=workers)

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    add("--patch-size", type=whole, metavar="PX", help="side of a patch")
    pool = "what is classified: the CLS token, or the mean patch of a ViT without one"
    add("--pool", choices=("cls", "mean"), default="cls", help=pool)
    add("--drop-path", type=number(0, 0.99), metavar="P", help="stochastic depth")
    finetune = "start from weights of this project, timm, DeiT or DINO"
    add("--finetune", metavar="FILE", help=finetune)

    add = parser.add_argument_group("SAR").add_argument
    sar_lambda = (
        "weight of the spatial entropy: up for 10 epochs (half of a run shorter "
    )
    sar_lambda += "than 20), down to 0 by a cosine; 0 is the plain ViT"
    add("--sar-lambda", type=positive, default=0.01, metavar="L", help=sar_lambda)
    last_skip = "skip connection around the last attention; if left out the paper's "
    last_skip += "pairing, kept only if lambda is 0"
    add("--last-skip", action=yes_or_no, help=last_skip)

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=whole, metavar="N", help="passes over the training set")
    add("--batch-size", type=whole, metavar="N", help="images a step")
    add("--lr", type=positive, metavar="LR", help="peak, per 512 images of a batch")
    add("--min-lr", type=positive, metavar="LR", help="at the end of the cosine")
    add("--warmup-lr", type=positive, metavar="LR", help="at the start of the warm-up")
    add("--warmup-epochs", type=positive, metavar="N", help="epochs of linear warm-up")
    add("--weight-decay", type=positive, metavar="WD", help="of weight matrices alone")
    add("--smoothing", type=share, metavar="EPS", help="label smoothing")
    add(
        "--model-ema",
        action=yes_or_no,
        help="average the weights too, and evaluate that",
    )
    add("--model-ema-decay", type=share, metavar="D", help="of the average, per step")

    add = parser.add_argument_group("run").add_argument
    output_dir = "runs/ and data set, model, lambda, seed, if left out"
    add("--output-dir", metavar="DIR", help=output_dir)
    add("--resume", action="store_true", help="continue the run in --output-dir")
    add("--seed", type=count, default=0, metavar="N", help="same seed, same run")
    device = "cuda, mps or cpu; the first found, if left out"
    add("--device", metavar="NAME", help=device)
    add("--amp", action=yes_or_no, help="bfloat16; on CUDA alone, if left out")
    add("--compile", action="store_true", help="torch.compile the model")
    benchmark = "time steps of the paper's model, plain and SAR, and write nothing"
    add("--benchmark", action="store_true", help=benchmark)
    parser.set_defaults(**recipe)
    return parser


def parse_arguments() -> tuple[Parser, argparse.Namespace]:
    """Parse twice: the data set decides the defaults of all else."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default="shapes")
    first.add_argument("--benchmark", action="store_true")
    known, _ = first.parse_known_args()
    # A benchmark is of the paper's model; an unknown data set is for the full parser to refuse.
    recipe = RECIPE if known.benchmark else RECIPES.get(known.dataset, RECIPE)
    parser = make_parser(recipe)
    return parser, parser.parse_args()


# ----------------------------------------------------------------------------------- one run


def say(text: str, stays: bool = True) -> None:
    """Print a line. One that does not stay is overwritten, and shown on terminals alone."""
    if sys.stdout.isatty():
        text = text[: shutil.get_terminal_size().columns - 1] if not stays else text
        print(f"\r\033[K{text}", end="\n" if stays else "", flush=True)
    elif stays:
        print(text, flush=True)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def resolve(args: argparse.Namespace) -> torch.device:
    """Fill in the settings that were left to be chosen; returns the device."""
    device = choose_device(args.device)
    args.device = str(device)
    if args.amp is None:
        args.amp = device.type == "cuda"
    if args.workers is None:
        args.workers = 0 if device.type == "cpu" else min(os.cpu_count() or 1, 16)
    if args.last_skip is None:
        args.last_skip = args.sar_lambda == 0
    args.crop = args.crop or default_crop(args.img_size)
    if args.output_dir is None:
        name = f"{args.dataset}-{args.model}-lambda{args.sar_lambda:g}-seed{args.seed}"
        args.output_dir = str(Path("runs") / name)
    return device


def architecture(args: argparse.Namespace, classes: int) -> dict:
    """The keyword arguments of VisionTransformer, plain values, for the checkpoint."""
    return MODELS[args.model] | {
        "img_size": args.img_size,
        "patch_size": args.patch_size,
        "num_classes": classes,
        "drop_path": args.drop_path,
        "last_skip": args.last_skip,
        "pool": args.pool,
    }


# What may differ when a run is resumed: where it runs, not what it computes.
MAY_DIFFER = {"data_dir", "device", "workers", "compile", "finetune", "output_dir"}


def settings(args: argparse.Namespace) -> dict:
    """The settings of a run, plain values, without what is no property of it."""
    return {
        name: value
        for name, value in vars(args).items()
        if name not in ("resume", "benchmark")
    }


def versions(device: torch.device) -> dict:
    return {
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "python": platform.python_version(),
        "hardware": hardware(device),
    }


def check_output_dir(args: argparse.Namespace) -> dict | None:
    """The checkpoint to resume from, or None for a new run.

    Raises:
        FileNotFoundError, ValueError: the directory holds a run and --resume was not given, or the
            reverse, or the settings of the run are others.
    """
    output_dir = Path(args.output_dir)
    path = output_dir / "checkpoint.pt"
    if not args.resume:
        if path.exists() or (output_dir / "log.jsonl").exists():
            raise ValueError(
                f"{output_dir} already holds a run: --resume continues it, "
                "another --output-dir starts a new one"
            )
        return None
    if not path.exists():
        raise FileNotFoundError(f"there is no run to resume at {path}")
    _, checkpoint = load_run(path)
    was, now = checkpoint["settings"], settings(args)
    differ = [
        f"{name} {was.get(name)} -> {now[name]}"
        for name in now
        if name not in MAY_DIFFER and was.get(name) != now[name]
    ]
    if differ:
        raise ValueError(
            f"the run at {output_dir} has other settings: {', '.join(differ)}"
        )
    return checkpoint


def save(output_dir: Path, checkpoint: dict) -> None:
    """Write checkpoint.pt and log.jsonl, each whole and under another name first."""
    partial = output_dir / "checkpoint.pt.partial"
    torch.save(checkpoint, partial)
    partial.replace(output_dir / "checkpoint.pt")
    partial = output_dir / "log.jsonl.partial"
    partial.write_text("".join(json.dumps(line) + "\n" for line in checkpoint["log"]))
    partial.replace(output_dir / "log.jsonl")


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    return f"{device.type}, {cpu}, {torch.get_num_threads()} threads"


def benchmark(args: argparse.Namespace, device: torch.device) -> None:
    """Time training steps on random images, plain ViT and SAR in turn."""
    images = torch.randn(
        args.batch_size, 3, args.img_size, args.img_size, device=device
    )
    target = torch.randint(1000, (args.batch_size,), device=device)
    contestants = {}
    for name, sar_lambda in (("plain ViT", None), ("SAR", args.sar_lambda)):
        torch.manual_seed(args.seed)
        model = VisionTransformer(**architecture(args, classes=1000)).to(device)
        optimizer = make_optimizer(model, args.weight_decay)
        model = torch.compile(model) if args.compile else model
        contestants[name] = (model, optimizer, sar_lambda, [])
    say(
        f"{args.model}, {args.img_size} px, patches of {args.patch_size} px, batch {args.batch_size}, "
        f"{'bfloat16' if args.amp else 'float32'}, {hardware(device)}, torch {torch.__version__}"
    )
    for step in range(BENCHMARK_STEPS + 3):
        for model, optimizer, sar_lambda, seconds in contestants.values():
            start = time.perf_counter()
            loss, *_ = losses(
                model, images, target, sar_lambda=sar_lambda, amp=args.amp
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # waits for the device
            if step >= 3:  # the first steps allocate memory and compile
                seconds.append(time.perf_counter() - start)
        say(f"step {step + 1} of {BENCHMARK_STEPS + 3}", stays=False)
    for name, (_, _, _, seconds) in contestants.items():
        middle = statistics.median(seconds)
        say(
            f"{name:>10}{middle * 1e3:10.1f} ms a step{args.batch_size / middle:10.1f} images/s"
        )
    plain, sar = (seconds for *_, seconds in contestants.values())
    ratio = statistics.median(b / a for a, b in zip(plain, sar))
    say(
        f"SAR takes {ratio:.3f} of the time, the median over {len(plain)} pairs of steps"
    )


def train(
    args: argparse.Namespace,
    device: torch.device,
    model: VisionTransformer,
    train_loader: DataLoader,
    test_loader: DataLoader,
    checkpoint: dict,
) -> None:
    """Train and evaluate, epoch by epoch, from where the checkpoint stands."""
    model.to(device)
    step_model = torch.compile(model) if args.compile else model
    optimizer = make_optimizer(model, args.weight_decay)
    normalize = normalizer(args.dataset, device)
    mix = make_mix(args.mixup, args.cutmix, len(checkpoint["classes"]))
    steps, total = len(train_loader), args.epochs * len(train_loader)
    first = checkpoint["epoch"] * steps
    ema = None
    if args.model_ema:
        ema = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(args.model_ema_decay)
        )
    if first:
        optimizer.load_state_dict(checkpoint["optimizer"])
    if first and ema:
        ema.module.load_state_dict(checkpoint["model_ema"])
        ema.n_averaged.fill_(first)

    start = time.perf_counter()
    for epoch in range(checkpoint["epoch"], args.epochs):
        # All chance in an epoch follows from the seed and the epoch's number, so that a
        # resumed run is the same as one that was never stopped.
        epoch_seed = args.seed + 1_000_003 * (epoch + 1)
        torch.manual_seed(epoch_seed)
        train_loader.generator.manual_seed(epoch_seed)
        model.train()
        sums = torch.zeros(2, device=device)  # of cross-entropy and spatial entropy
        epoch_start = shown = time.perf_counter()
        for step, (images, labels) in enumerate(train_loader, 1):
            done = epoch * steps + step
            lr, sar_lambda = rates(done - 1, total, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            images = normalize(images.to(device, non_blocking=True))
            images, target = mix(images, labels.to(device, non_blocking=True))
            loss, *terms = losses(
                step_model,
                images,
                target,
                sar_lambda=sar_lambda if args.sar_lambda else None,
                smoothing=args.smoothing,
                amp=args.amp,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if ema:
                ema.update_parameters(model)
            sums += torch.stack(terms)

            if step < steps and time.perf_counter() - shown < 0.5:
                continue
            # Only here, twice a second, the host waits for the device.
            train_loss, train_entropy = (sums / step).tolist()
            shown = time.perf_counter()
            speed = step * args.batch_size / (shown - epoch_start)
            left = (shown - start) / (done - first) * (total - done)
            if not math.isfinite(train_loss + train_entropy):
                sys.exit(
                    f"train.py: error: no finite loss by step {step} of epoch {epoch + 1}: "
                    f"cross-entropy {train_loss}, spatial entropy {train_entropy}, learning "
                    f"rate {lr:.3g}; the epochs before are safe in {args.output_dir}"
                )
            say(
                f"epoch {epoch + 1}/{args.epochs} {step / steps:4.0%}  "
                f"loss {train_loss:.3f}  spatial entropy {train_entropy:.3f}  "
                f"{speed:.0f} images/s  {duration(left)} left",
                stays=False,
            )

        test = evaluate(model, test_loader, normalize, device, args.amp)
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
        if ema:
            averaged = evaluate(ema.module, test_loader, normalize, device, args.amp)
            record["test_acc1_ema"] = averaged["acc1"]
            checkpoint["model_ema"] = ema.module.state_dict()
        checkpoint["log"].append(record)
        save(Path(args.output_dir), checkpoint)
        say(
            f"epoch {epoch + 1}/{args.epochs}  "
            f"loss {train_loss:.3f}  spatial entropy {train_entropy:.3f}  |  "
            f"test: top-1 {test['acc1']:.2f} %  loss {test['loss']:.3f}  "
            f"spatial entropy {test['entropy']:.3f}  |  lr {lr:.1e}  "
            f"lambda {sar_lambda:.4f}  {speed:.0f} images/s  {duration(left)} left"
        )


def prepare(args: argparse.Namespace, device: torch.device) -> tuple:
    """Model, loaders and checkpoint for `train`, all checked; nothing is written.

    Raises:
        OSError, ValueError: one sentence on what is wrong with the settings, data or files.
    """
    checkpoint = check_output_dir(args)
    augment = train_transform(
        args.dataset,
        args.img_size,
        crop=args.crop,
        rand_augment=args.aa,
        reprob=args.reprob,
    )
    plain = test_transform(args.img_size, crop=args.crop)
    train_set = load_dataset(args.dataset, args.data_dir, "train", augment)
    test_set = load_dataset(args.dataset, args.data_dir, "test", plain)
    classes = list(train_set.classes)
    if args.train_size:
        train_set = balanced_subset(train_set, args.train_size, args.seed)
    options = {"workers": args.workers, "pin_memory": device.type == "cuda"}
    train_loader = make_loader(train_set, args.batch_size, train=True, **options)
    test_loader = make_loader(test_set, args.batch_size, train=False, **options)
    torch.manual_seed(args.seed)
    model = VisionTransformer(**architecture(args, len(classes)))
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    elif args.finetune:
        say(load_weights(model, args.finetune))
    new = {
        "epoch": 0,
        "settings": settings(args),
        "architecture": architecture(args, len(classes)),
        "classes": classes,
        "log": [settings(args) | versions(device)],
    }

    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    grid, skip = "x".join(map(str, model.grid)), "kept" if args.last_skip else "removed"
    say(f"{args.model}: {millions:.2f} M parameters, {grid} patches, last skip {skip}")
    sizes = f"{len(train_set)} training and {len(test_set)} test images"
    say(f"{args.dataset}: {sizes}, {len(classes)} classes")
    say(f"{hardware(device)}, {'bfloat16' if args.amp else 'float32'}")
    scaled = args.lr * args.batch_size / 512
    say(
        f"lr {args.lr:g} * {args.batch_size} / 512 = {scaled:.2g}, lambda {args.sar_lambda:g}"
    )
    return model, train_loader, test_loader, checkpoint or new


def main() -> None:
    parser, args = parse_arguments()
    try:
        device = resolve(args)
        with torch.device("meta"):  # the sizes are checked before any data is read
            VisionTransformer(**architecture(args, classes=1))
        if args.benchmark:
            return benchmark(args, device)
        parts = prepare(args, device)
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    say(f"writing to {args.output_dir}")
    try:
        train(args, device, *parts)
    except KeyboardInterrupt:
        say(f"stopped; the same command with --resume continues {args.output_dir}")
        sys.exit(130)
    checkpoint = Path(args.output_dir) / "checkpoint.pt"
    say(f"next: python eval.py --checkpoint {checkpoint} --attention attention.png")


if __name__ == "__main__":
    main()
