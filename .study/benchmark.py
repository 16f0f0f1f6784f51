# SPDX-License-Identifier: MIT
"""Time the loss, training steps and evaluation, beside SciPy, OpenCV and timm.

    python .study/benchmark.py loss [--device cuda]   # labels; the loss with its gradient
    python .study/benchmark.py step [--device cuda]   # training steps of ViT-S/16
    python .study/benchmark.py eval [--device cuda]   # evaluation of ViT-S/16

The calls of a table take turns, and medians are printed. Other packages are compared with
where they are installed: pip install scipy opencv-python-headless timm
"""

import argparse
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
from eval import choose_device, evaluate, hardware
from model import MODELS, VisionTransformer

ROUNDS, WARMUP = 30, 3


def time_in_turn(
    calls: dict[str, Callable], device: torch.device, repeats: int = 1
) -> dict[str, float]:
    """Return the median milliseconds of each call; calls that fail are named and left out.

    On a GPU, `repeats` calls are timed together, so that the host can run ahead.
    """
    seconds = {}
    for name, call in calls.items():
        try:
            call()  # compiles
            seconds[name] = []
        except (ImportError, RuntimeError) as error:
            print(f"left out: {name}, {str(error).splitlines()[0]}")
    for turn in range(WARMUP + ROUNDS):
        names, first = list(seconds), turn % len(seconds)
        for name in names[first:] + names[:first]:  # no call always has the best place
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats):
                calls[name]()
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / repeats)
    return {name: 1e3 * statistics.median(s[WARMUP:]) for name, s in seconds.items()}


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# ------------------------------------------------------------------------------ the loss


def scipy_labels(mask: torch.Tensor) -> torch.Tensor:
    """Label components by one call of SciPy, on the CPU."""
    import scipy.ndimage

    nothing, touching = [[0] * 3] * 3, [[1] * 3] * 3
    maps = mask.flatten(0, -3).cpu().numpy()
    labels, _ = scipy.ndimage.label(maps, [nothing, touching, nothing])
    return torch.from_numpy(labels).to(mask.device).view(mask.shape)


def opencv_entropy(similarity: torch.Tensor) -> torch.Tensor:
    """Compute the loss by a loop of OpenCV calls on the CPU and a mask per component."""
    import cv2

    maps = similarity.flatten(0, -3)
    activation = F.relu(maps - maps.mean((-2, -1), keepdim=True))
    owners, masks = [], []
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

    def with_gradient(loss: Callable, maps: torch.Tensor) -> None:
        torch.autograd.grad(loss(maps), maps)

    print(f"{images} images x 6 heads, ms")
    for side in (14, 28, 56):
        maps = torch.randn(images, 6, side, side, device=device, requires_grad=True)
        mask = threshold_at_mean(maps) > 0
        calls = {f"labels, {name}": partial(f, mask) for name, f in labelings.items()}
        for name, loss in entropies.items():
            calls[f"loss, {name}"] = partial(with_gradient, loss, maps)
        for name, median in time_in_turn(calls, device).items():
            print(f"{side}x{side}  {name:<20}{median:10.2f}")


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
        print("left out: timm, which is not installed")
    return {name: model.to(device) for name, model in models.items()}


def print_rates(medians: dict[str, float], images: int) -> None:
    first = next(iter(medians.values()))
    for name, median in medians.items():
        rate = 1e3 * images / median
        print(f"{name:<24}{median:8.1f} ms{rate:10.1f} images/s", end="")
        print(f"{median / first:9.3f} of the first")


def time_loading() -> float:
    """Return how many milliseconds a core takes to load an image by CIFAR's recipe."""
    recipe = train.parse_args(["--dataset", "cifar100"])
    images = torch.randint(256, (512, 32, 32, 3), dtype=torch.uint8).numpy()
    augment = data.train_transform(
        "cifar100", 224, crop=recipe.crop, rand_augment=9, reprob=recipe.reprob
    )
    dataset = data.Images(images, torch.zeros(len(images)).long(), [], augment)
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
    for compiled in False, True:
        steps = {}
        for name, model in vit_small(args.device).items():
            optimizer = train.make_optimizer(model, weight_decay=0.05)
            entropy = spatial_entropy if name == "SAR" else None
            if compiled:
                model = torch.compile(model)
                entropy = entropy and torch.compile(entropy)
            steps[name] = partial(step, model, entropy, optimizer)
        print("compiled" if compiled else "eager")
        print_rates(
            time_in_turn(steps, args.device, repeats=10 if args.amp else 1), count
        )
        if args.device.type == "cuda":
            for name, call in steps.items():
                # All models are there: take the peak above what they keep.
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call()
                peak = torch.cuda.max_memory_allocated() - before
                print(f"{name:<24}{peak / 1e6:8.0f} MB for gradients and activations")


@torch.inference_mode()
def time_eval(args: Namespace) -> None:
    """Time `evaluate`, with its statistics of attention, beside forward passes alone."""
    count = args.batch_size or (256 if args.amp else 8)
    shape = count, 3, 224, 224
    images = torch.randint(256, shape, dtype=torch.uint8, device=args.device)
    batch = [(images, torch.randint(1000, (count,), device=args.device))]
    normalize = data.normalizer(data.IMAGENET_MEAN, data.IMAGENET_STD, args.device)
    inputs = normalize(images)

    def forward(model: Callable) -> None:
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            model(inputs)

    models = {name: model.eval() for name, model in vit_small(args.device).items()}
    how = normalize, args.device, args.amp
    calls = {"evaluate": partial(evaluate, models["SAR"], batch, *how)}
    for name, model in models.items():
        calls[f"forward, {name}"] = partial(forward, model)
    print(f"{count} images of 224x224")
    print_rates(time_in_turn(calls, args.device), count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    parser.add_argument("what", choices=("loss", "step", "eval"))
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
    {"loss": time_loss, "step": time_step, "eval": time_eval}[args.what](args)


if __name__ == "__main__":
    main()
