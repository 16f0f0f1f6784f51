# SPDX-License-Identifier: MIT
"""Time the loss, training steps and evaluation, and compare with other packages.

    python .study/benchmark.py loss [--device cuda]   # labels; the loss with its gradient
    python .study/benchmark.py step [--device cuda]   # training steps of ViT-S/16
    python .study/benchmark.py eval [--device cuda]   # evaluation of ViT-S/16

Each round runs all calls of a table, and medians are printed. Packages that are not
installed are skipped: pip install scipy opencv-python-headless timm
"""

import argparse
import random
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import train
from entropy import connected_components, spatial_entropy, threshold_at_mean
from eval import choose_device, evaluate, hardware, predict
from model import MODELS, VisionTransformer

ROUNDS, WARMUP = 30, 3


def time_in_turn(
    calls: dict[str, Callable], images: int, device: torch.device, repeats: int = 1
) -> None:
    """Print the median time of each call, which processes `images` images.

    Each round runs all calls, in random order. On a GPU, `repeats` calls are timed
    together, so that the host can run ahead.
    """
    times = {}
    for name, call in calls.items():
        try:
            call()  # compiles
            times[name] = []
        except (ImportError, RuntimeError) as error:
            print(f"{name} is skipped: {error}")
    for _ in range(WARMUP + ROUNDS):
        for name in random.sample(list(times), len(times)):
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats):
                calls[name]()
            synchronize(device)
            times[name].append((time.perf_counter() - start) / repeats)
    for name in times:
        seconds = statistics.median(times[name][WARMUP:])
        print(f"{name:<24}{1e3 * seconds:10.2f} ms{images / seconds:12.1f} images/s")


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# ------------------------------------------------------------------------------ the loss


def scipy_labels(mask: torch.Tensor) -> torch.Tensor:
    """Label all maps by one call of SciPy, on the CPU."""
    import scipy.ndimage

    apart, touching = [[0] * 3] * 3, [[1] * 3] * 3  # between maps, and within a map
    maps = mask.flatten(0, -3).cpu().numpy()
    labels, _ = scipy.ndimage.label(maps, [apart, touching, apart])
    return torch.from_numpy(labels).to(mask.device).view(mask.shape)


def opencv_entropy(similarity: torch.Tensor) -> torch.Tensor:
    """Compute the loss as the authors do: an OpenCV call per map, a mask per component."""
    import cv2

    maps = similarity.flatten(0, -3)
    activation = F.relu(maps - maps.mean((-2, -1), keepdim=True))
    owners, masks = [], []  # of each component: the index of its map, and its pixels
    for owner, mask in enumerate((activation.detach() > 0).byte().cpu().numpy()):
        count, labels = cv2.connectedComponents(mask, connectivity=8)
        for label in range(1, count):
            owners.append(owner)
            masks.append(torch.from_numpy(labels == label))
    owners = torch.tensor(owners, device=maps.device)
    masks = torch.stack(masks).to(maps.device)
    mass = (activation[owners] * masks).sum((-2, -1))
    probability = mass / activation.sum((-2, -1))[owners]
    return -(probability * probability.log()).sum() / len(maps)


def time_loss(args: Namespace) -> None:
    """Time labels, and the loss with its gradient, of random maps of 14, 28 and 56."""
    device = args.device
    images = args.batch_size or (512 if device.type == "cuda" else 128)
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    labelings = {
        "eager": connected_components,
        "compiled": compiled(connected_components),
        "SciPy": scipy_labels,
    }
    entropies = {"eager": spatial_entropy, "compiled": compiled(spatial_entropy)}
    if device.type == "cuda":
        entropies["CUDA graph"] = compiled(spatial_entropy, mode="reduce-overhead")
    entropies["OpenCV"] = opencv_entropy

    print(f"{images} images x 6 heads")
    for side in (14, 28, 56):
        maps = torch.randn(images, 6, side, side, device=device, requires_grad=True)
        mask = threshold_at_mean(maps) > 0
        calls = {f"labels, {name}": partial(f, mask) for name, f in labelings.items()}
        for name, loss in entropies.items():
            calls[f"loss, {name}"] = lambda f=loss, x=maps: torch.autograd.grad(f(x), x)
        print(f"{side}x{side}")
        time_in_turn(calls, images, device)


# ----------------------------------------------------------------- a step and evaluation


def vit_small(device: torch.device) -> dict[str, torch.nn.Module]:
    """Make a ViT-S/16 with SAR, a plain one and, where it is installed, timm's."""
    models = {
        "SAR": VisionTransformer(**MODELS["vit_small"], last_skip=False),
        "plain ViT": VisionTransformer(**MODELS["vit_small"], last_skip=True),
    }
    try:
        import timm

        peer = timm.create_model("vit_small_patch16_224")
        models[f"timm {timm.__version__}"] = peer
    except ImportError:
        print("timm is skipped: it is not installed")
    return {name: model.to(device) for name, model in models.items()}


def time_loading() -> float:
    """Return the milliseconds to load an image by CIFAR-100's recipe, in one process."""
    recipe = train.parse_args(["--dataset", "cifar100"])
    options = {"crop": recipe.crop, "rand_augment": 9, "reprob": recipe.reprob}
    augment = data.train_transform("cifar100", recipe.img_size, **options)
    images = torch.randint(256, (512, 32, 32, 3), dtype=torch.uint8).numpy()
    dataset = data.Images(images, torch.zeros(512, dtype=torch.int64), [], augment)
    loader = data.make_loader(dataset, 64, train=True, workers=0, pin_memory=False)
    start = time.perf_counter()
    for _ in loader:
        pass
    return 1e3 * (time.perf_counter() - start) / len(images)


def time_step(args: Namespace) -> None:
    """Time forward, backward and AdamW, eager and compiled; only SAR has the entropy."""
    count = args.batch_size or (256 if args.amp else 4)
    images = torch.randn(count, 3, 224, 224, device=args.device)
    target = torch.randint(1000, (count,), device=args.device)

    def step(model: Callable, entropy: Callable | None, optimizer: object) -> None:
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            output = model(images)
        logits, similarity = output if isinstance(output, tuple) else (output, None)
        loss = F.cross_entropy(logits.float(), target)
        if entropy is not None:
            loss = loss + 0.01 * entropy(similarity)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    print(f"{count} images of 224x224; loading one: {time_loading():.2f} ms")
    for mode in "eager", "compiled":
        compiled = partial(torch.compile, disable=mode == "eager")
        models, steps = vit_small(args.device), {}
        for name, model in models.items():
            optimizer = train.make_optimizer(model, weight_decay=0.05)
            entropy = compiled(spatial_entropy) if name == "SAR" else None
            steps[name] = partial(step, compiled(model), entropy, optimizer)
        print(mode)
        time_in_turn(steps, count, args.device, repeats=10 if args.amp else 1)
        for name in steps if args.amp else ():
            torch.cuda.reset_peak_memory_stats(args.device)
            before = torch.cuda.memory_allocated(args.device)  # by all three models
            steps[name]()
            peak = torch.cuda.max_memory_allocated(args.device) - before
            kept = 3 * sum(w.nbytes for w in models[name].parameters())  # AdamW's too
            print(f"{name:<24}{(peak + kept) / 1e6:8.0f} MB at the peak")


@torch.inference_mode()
def time_eval(args: Namespace) -> None:
    """Time `evaluate`, with normalization and statistics, and forward passes alone."""
    count, batches = (256, 10) if args.amp else (8, 1)
    count = args.batch_size or count
    shape = count, 3, 224, 224
    images = torch.randint(256, shape, dtype=torch.uint8, device=args.device)
    loader = [(images, torch.randint(1000, (count,), device=args.device))] * batches
    normalize = data.normalizer(data.IMAGENET_MEAN, data.IMAGENET_STD, args.device)
    inputs = normalize(images)

    def forward(model: Callable) -> None:
        for _ in range(batches):
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
                model(inputs)

    models = {name: model.eval() for name, model in vit_small(args.device).items()}
    how = normalize, args.device, args.amp
    calls = {"evaluate": lambda: evaluate(predict(models["SAR"], loader, *how))}
    for name, model in models.items():
        calls[f"forward, {name}"] = partial(forward, model)
    print(f"{batches} x {count} images of 224x224; evaluate is of SAR, with entropies")
    time_in_turn(calls, count * batches, args.device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    benchmarks = {"loss": time_loss, "step": time_step, "eval": time_eval}
    parser.add_argument("what", choices=benchmarks)
    parser.add_argument("--device", default="cpu", help="cuda or cpu [%(default)s]")
    parser.add_argument("--batch-size", type=int, help="images at a time")
    args = parser.parse_args()
    try:
        args.device = choose_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    args.amp = args.device.type == "cuda"
    precision = "bfloat16" if args.amp else "float32"
    print(f"{hardware(args.device)}, {precision}, PyTorch {torch.__version__}")
    benchmarks[args.what](args)


if __name__ == "__main__":
    main()
