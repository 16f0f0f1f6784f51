# SPDX-License-Identifier: MIT
"""The study of the README: the runs, and the table made of them.

python .study/study.py commands             # one line of shell for each run
python .study/study.py collect runs/study   # what was measured, a line of JSON for each
python .study/study.py table .study/results.jsonl --baseline surgery
python .study/study.py gradients runs/study/fashion-1000/plain-0/checkpoint.pt

An arm is compared with the plain ViT, or --baseline, of the same seed, which is trained
on the same images in the same order. Means and differences are cut, not rounded;
standard deviations and intervals are rounded up.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

SEEDS = range(5)

FASHION = (
    "--dataset fashion-mnist --model vit_mini --img-size 28 --patch-size 4"
    " --crop padded --aa none --reprob 0 --mixup 0 --cutmix 0 --smoothing 0"
    " --drop-path 0 --no-model-ema"
)
SHORT = "--epochs 100 --warmup-epochs 5 --batch-size 16 --lr 0.0256"

# What is trained on: the options that the arms share, tuned for the plain ViT.
SETTINGS = {
    "fashion-1000": f"{FASHION} --train-size 1000 {SHORT}",
    "fashion-5000": (
        f"{FASHION} --train-size 5000 --epochs 20 --warmup-epochs 1 --lr 0.0128"
        " --batch-size 32"
    ),
    "shapes-1000": f"--dataset shapes --crop padded --train-size 1000 {SHORT}",
}


def arms(*lambdas: float) -> dict[str, str]:
    """Name -> options: the plain ViT, each change by itself, and SAR."""
    return {
        "plain": "--sar-lambda 0",
        "surgery": "--sar-lambda 0 --no-last-skip",
        "entropy": "--sar-lambda 0.01 --last-skip",
        **{f"sar-{value}": f"--sar-lambda {value}" for value in lambdas},
    }


# Setting -> its arms.
STUDY = {
    "fashion-1000": arms(0.003, 0.01, 0.03, 0.1, 0.3),
    "shapes-1000": arms(0.003, 0.01, 0.03, 0.1, 0.3),
    "fashion-5000": arms(0.01, 0.3),
}

# What is measured -> the decimals that are printed.
MEASURES = {"acc1": 2, "entropy": 3, "components": 2, "mass": 1, "foreground": 1}

# 97.5 % quantiles of Student's t, from 1 degree of freedom on.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def options(setting: str, arm: str) -> str:
    """Of train.py, but for the seed and the output directory."""
    return f"{SETTINGS[setting]} {STUDY[setting][arm]}"


def commands() -> None:
    """Print a line for each run: train, then measure; nothing if this was done."""
    for setting, chosen in STUDY.items():
        masks = SETTINGS[setting].split()[1]
        for seed in SEEDS:
            for arm in chosen:
                run = f"runs/study/{setting}/{arm}-{seed}"
                print(
                    f"[ -e {run}/eval.json ] ||",
                    f"{{ python train.py {options(setting, arm)} --val-interval 1000",
                    f"--device cpu --seed {seed} --output-dir {run} &&",
                    f"python eval.py --checkpoint {run}/checkpoint.pt",
                    f"--segmentation {masks} --json {run}/eval.json --device cpu; }}",
                )


def collect(folder: Path) -> None:
    """Print a line of JSON for each run in FOLDER/SETTING/ARM-SEED that was measured."""
    for path in sorted(folder.glob("*/*/eval.json")):
        lines = (path.parent / "log.jsonl").read_text().splitlines()
        settings, *epochs = map(json.loads, lines)
        last, measured = epochs[-1], json.loads(path.read_text())["segmentation"]
        if last["epoch"] != settings["epochs"]:
            sys.exit(f"{path.parent} ended after {last['epoch']} epochs")
        arm, _, seed = path.parent.name.rpartition("-")
        record = {
            "setting": path.parent.parent.name,
            "arm": arm,
            "seed": int(seed),
            "acc1": last["test_acc1"],
            "entropy": last["test_entropy"],
            "components": last["test_components"],
            "mass": measured["jaccard_mass"],
            "foreground": measured["jaccard_mean"],
            "entropy_per_head": last["test_entropy_per_head"],
            "components_per_head": last["test_components_per_head"],
            "mass_per_head": measured["jaccard_mass_per_head"],
            "test_loss": last["test_loss"],
            "train_loss": last["train_loss"],
            "minutes": sum(epoch["seconds"] for epoch in epochs) / 60,
            "torch": settings["torch"],
            "torchvision": settings["torchvision"],
            "python": settings["python"],
            "hardware": settings["hardware"],
        }
        print(json.dumps(record))


def cut(value: float, decimals: int, sign: str = "") -> str:
    """The number without its further decimals."""
    scaled = math.trunc(round(value * 10**decimals, 6))
    return f"{scaled / 10**decimals:{sign}.{decimals}f}"


def up(value: float, decimals: int) -> str:
    """The number, which is not negative, rounded up."""
    scaled = math.ceil(round(value * 10**decimals, 6))
    return f"{scaled / 10**decimals:.{decimals}f}"


def spread(values: list[float], decimals: int) -> str:
    """Mean and standard deviation."""
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return f"{cut(mean, decimals)} ± {up(deviation, decimals)}"


def interval(values: list[float], decimals: int) -> str:
    """Mean and half the 95 % interval of Student's t."""
    width = STUDENT[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return f"{cut(statistics.mean(values), decimals, '+')} ± {up(width, decimals)}"


def table(path: Path, baseline: str) -> None:
    """Print the table of a file that `collect` made, in Markdown: arms run with all seeds.

    A cell has mean and standard deviation, and below them the difference to the baseline
    with half its 95 % interval.
    """
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    found = {setting: {arm: {} for arm in chosen} for setting, chosen in STUDY.items()}
    for run in runs:
        found[run["setting"]][run["arm"]][run["seed"]] = run
    for setting, chosen in STUDY.items():
        for arm, row in chosen.items():
            measured = found[setting][arm]
            if len(measured) < len(SEEDS):
                continue
            cells = [f"`{setting}/{arm}`", f"`{row}`"]
            for measure, decimals in MEASURES.items():
                values = {seed: run[measure] for seed, run in measured.items()}
                cells.append(spread(list(values.values()), decimals))
                if arm != baseline:
                    others = found[setting][baseline]
                    pairs = [values[seed] - others[seed][measure] for seed in values]
                    cells[-1] += f"<br>{interval(pairs, decimals)}"
            minutes = statistics.median(run["minutes"] for run in measured.values())
            print("|", " | ".join([*cells, up(minutes, 1)]), "|")


def gradients(checkpoint: Path) -> None:
    """Print the norms of the gradients of both losses on a run's training images."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch
    from torch.nn.functional import cross_entropy

    from data import (
        DATASETS,
        balanced_subset,
        load_dataset,
        make_loader,
        normalizer,
        test_transform,
    )
    from entropy import spatial_entropy
    from eval import load_run

    model, saved = load_run(checkpoint)
    settings = saved["settings"]
    name, size = settings["dataset"], settings["train_size"]
    transform = test_transform(settings["img_size"], crop=settings["crop"])
    images = load_dataset(name, settings["data_dir"], "train", transform)
    if size:
        images = balanced_subset(images, size, settings["seed"])
    loader = make_loader(images, len(images), train=False, workers=0, pin_memory=False)
    pixels, labels = next(iter(loader))
    source = DATASETS[name]
    normalize = normalizer(source.mean, source.std, torch.device("cpu"))
    logits, similarity = model(normalize(pixels))
    losses = {"cross-entropy": cross_entropy(logits, labels)}
    losses["spatial entropy"] = spatial_entropy(similarity)
    last = model.blocks[-1].attn.qkv.weight
    for what, loss in losses.items():
        weights = list(model.parameters())
        found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        norms = {"all weights": [grad for grad in found if grad is not None]}
        index = next(i for i, weight in enumerate(weights) if weight is last)
        norms["queries and keys of the last block"] = [
            found[index][: 2 * len(last) // 3]
        ]
        for where, grads in norms.items():
            norm = torch.stack([grad.norm() for grad in grads]).norm()
            print(f"{what} {loss:.3f}: norm of the gradient {norm:.4f}, {where}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("commands")
    actions.add_parser("collect").add_argument("folder", type=Path)
    actions.add_parser("gradients").add_argument("checkpoint", type=Path)
    print_table = actions.add_parser("table")
    print_table.add_argument("path", type=Path)
    print_table.add_argument("--baseline", choices=arms(), default="plain")
    args = vars(parser.parse_args())
    {"commands": commands, "collect": collect, "table": table, "gradients": gradients}[
        args.pop("action")
    ](**args)


if __name__ == "__main__":
    main()
