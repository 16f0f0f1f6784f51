# SPDX-License-Identifier: MIT
"""Compare runs: your own, or those of the study in .study/README.md.

    python .study/study.py compare runs/plain-* -- runs/sar-*   # your runs, by seed
    python .study/study.py objects runs/sar-0 ...    # is attention on each image's object?
    python .study/study.py commands shapes-14x14     # a line of shell for each run
    python .study/study.py collect runs/study        # a line of JSON for each run
    python .study/study.py table                     # the study's tables, in Markdown

`compare` prints means and standard deviations, and the mean difference to the first group
between runs of the same seed, with its 95 % interval (Student's t). The intersection over
union (IoU) of attention and objects is compared where it was measured: by eval.py with
--segmentation NAME --json RUN/eval.json, and then by `objects`.
"""

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path

import torch
from torch.utils.data import Subset

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import data
import eval as evaluation
import train
from entropy import threshold_at_mean
from model import model_of_run, read_checkpoint

# Setting -> the options of train.py that its variants share.
SETTINGS = json.loads((HERE / "settings.json").read_text())
VARIANTS = {
    "plain": "--sar-lambda 0",
    "modified": "--sar-lambda 0 --no-last-skip",  # SAR's last block without its loss
    "entropy-0.01": "--sar-lambda 0.01 --last-skip",
    "entropy-0.3": "--sar-lambda 0.3 --last-skip",
    "constant-0.01": "--sar-lambda 0.01 --sar-schedule constant",
}
for value in ("0.003", "0.01", "0.03", "0.1", "0.3", "1", "3"):
    VARIANTS[f"sar-{value}"] = f"--sar-lambda {value}"


def options_of(setting: str, variant: str, seed: int | str) -> str:
    shared = f"{SETTINGS[setting]} {VARIANTS[variant]}"
    return f"{shared} --val-interval 1000 --seed {seed}"


def commands(settings: list[str]) -> None:
    """Print a line of shell for each run, which starts or continues it and measures it."""
    for setting in settings:
        device = "--device cuda" if "cuda" in SETTINGS[setting] else "--device cpu"
        dataset = SETTINGS[setting].split()[1]
        masks = " --masks clipart/masks" if dataset == "folder" else ""
        for seed in range(5):
            for variant in VARIANTS:
                run = f"runs/study/{setting}/{variant}-{seed}"
                options = f"{options_of(setting, variant, seed)} {device}"
                print(
                    f"[ -e {run}/objects.json ] || {{ if [ -e {run}/log.jsonl ];"
                    f" then python train.py --resume {run};"
                    f" else python train.py {options} --output-dir {run}; fi &&"
                    f" python eval.py --checkpoint {run}/checkpoint.pt {device}"
                    f" --segmentation {dataset}{masks} --json {run}/eval.json &&"
                    f" python .study/study.py objects {run}; }}"
                )


# ------------------------------------------------------------------------- measurements


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the mean IoU, in percent, of masks (..., H, W)."""
    both, either = (first & second).sum((-2, -1)), (first | second).sum((-2, -1))
    return 100 * (both / either.clamp(min=1)).mean().item()


def objects(run: str) -> None:
    """Measure whether attention follows the object of each image: RUN/objects.json.

    Attention that stays in the middle fits all objects that lie there, so the IoU with
    the object of another image is measured; the rest of the IoU is object-specific. If
    attention collapses, S > mean is the same for all heads or all images.
    """
    report = json.loads(Path(run, "eval.json").read_text())
    dataset, masks = (report["segmentation"].get(key) for key in ("dataset", "masks"))
    device = "cpu" if report["device"].startswith("cpu") else "cuda"
    device = evaluation.choose_device(device)
    checkpoint = read_checkpoint(f"{run}/checkpoint.pt")
    model, settings = model_of_run(checkpoint, run), checkpoint["settings"]
    maps = []
    model.register_forward_hook(lambda _, __, output: maps.append(output[1].float()))
    images = data.load_masks(dataset, settings["data_dir"], model.img_size, masks)
    objects = images.objects
    if dataset == "folder":  # neighbors are of the same class
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(images), generator=generator).tolist()
        images = Subset(images, order)
    loader = data.make_loader(images, 500, train=False, workers=0, pin_memory=False)
    others = ((images, masks.roll(1, 0)) for images, masks in loader)
    source = data.DATASETS[settings["dataset"]]
    normalize = data.normalizer(source.mean, source.std, device)
    amp, protocol = report["precision"] == "bfloat16", evaluation.PROTOCOLS["dino"]
    how = normalize, device, amp, protocol, objects
    other = evaluation.segment(model.to(device), others, *how)
    kept = threshold_at_mean(torch.cat(maps)) > 0  # (images, heads, H, W)
    heads = range(kept.shape[1])
    pairs = [(kept[:, a], kept[:, b]) for a in heads for b in heads if a < b]
    found = {
        "iou_mass_other": other["jaccard_mass"],
        "iou_mean_other": other["jaccard_mean"],
        "foreground": 100 * kept.double().mean().item(),
        "heads_iou": statistics.mean(overlap(*pair) for pair in pairs),
        "images_iou": overlap(kept, kept.roll(1, 0)),
    }
    Path(run, "objects.json").write_text(json.dumps(found) + "\n")
    print(f"{run}: {json.dumps(found)}", flush=True)


def read_run(run: str) -> dict:
    """Return the seed, measurements, minutes, versions and settings of a complete run."""
    lines = Path(run, "log.jsonl").read_text().splitlines()
    settings, *epochs = map(json.loads, lines)
    if len(epochs) < settings["epochs"]:
        raise ValueError(f"{run} has only {len(epochs)} of {settings['epochs']} epochs")
    last = epochs[-1]
    found = {"seed": settings["seed"], "epochs": last["epoch"]}
    found["accuracy"] = last["test_acc1"]
    for name in "entropy", "components", "entropy_per_head", "components_per_head":
        found[name] = last[f"test_{name}"]
    if (file := Path(run, "eval.json")).exists():
        for name, value in json.loads(file.read_text()).get("segmentation", {}).items():
            if name.startswith("jaccard"):
                found[name.replace("jaccard", "iou")] = value
    if (file := Path(run, "objects.json")).exists():
        found |= json.loads(file.read_text())
    found["minutes"] = sum(epoch["seconds"] for epoch in epochs) / 60
    for name in "torch", "torchvision", "python", "hardware":
        found[name] = settings[name]
    return found | {"settings": settings}


def collect(folders: list[str]) -> None:
    """Print a line of JSON for each measured run in FOLDER/SETTING/VARIANT-SEED."""
    may_differ = train.MAY_CHANGE | train.NO_SETTINGS | {"output_dir", "val_interval"}
    files = [file for each in folders for file in Path(each).glob("*/*/objects.json")]
    for file in sorted(files):
        setting, name = file.parts[-3:-1]
        variant, _, seed = name.rpartition("-")
        found = read_run(file.parent)
        settings = found.pop("settings")
        for name, value in vars(
            train.parse_args(options_of(setting, variant, seed).split())
        ).items():
            if name not in may_differ and value not in (None, settings[name]):
                raise ValueError(f"{file.parent} has another {name}: {settings[name]}")
        print(json.dumps({"setting": setting, "variant": variant} | found))


# --------------------------------------------------------------------------- comparison

# Measure -> its name, and the decimals to print.
MEASURES = {
    "accuracy": ("accuracy, %", 2),
    "entropy": ("spatial entropy, nats", 3),
    "components": ("components per head", 2),
    "mean": ("IoU of S > mean, best head, %", 1),
    "mean_heads": ("IoU of S > mean, mean over heads, %", 1),
    "mean_object": ("IoU of S > mean, object-specific, %", 1),
    "mass": ("IoU of 60 % of the attention, best head, %", 1),
    "mass_object": ("IoU of 60 % of the attention, object-specific, %", 1),
    "foreground": ("S > mean, % of the patches", 1),
    "heads_iou": ("IoU of S > mean in two heads, %", 1),
    "images_iou": ("IoU of S > mean in two images, %", 1),
}
# 97.5 % quantiles of Student's t for two pairs, three, and so on, rounded up. The last is
# used for more than ten pairs too, which makes the interval a little too wide.
STUDENT = [12.7063, 4.3027, 3.1825, 2.7765, 2.5706, 2.4470, 2.3647, 2.3061, 2.2622]


def measures_of(run: dict) -> dict[str, float]:
    """Return those of MEASURES that a run has."""
    found = {name: run[name] for name in MEASURES if name in run}
    for rule in "mean", "mass":
        if f"iou_{rule}" in run:
            found[rule] = run[f"iou_{rule}"]
            found[f"{rule}_heads"] = statistics.mean(run[f"iou_{rule}_per_head"])
        if f"iou_{rule}_other" in run:
            found[f"{rule}_object"] = found[rule] - run[f"iou_{rule}_other"]
    return found


def cut(value: float, decimals: int, sign: str = "") -> str:
    """Format a number without its further decimals."""
    scaled = math.trunc(round(abs(value) * 10**decimals, 6))
    return f"{math.copysign(scaled, value) / 10**decimals:{sign}.{decimals}f}"


def spread(group: dict[int, dict], name: str, sign: str = "", factor: float = 1) -> str:
    """Format the mean of a measure, and `factor` standard deviations, rounded up."""
    decimals = MEASURES[name][1]
    values = [run[name] for run in group.values() if name in run]
    if not values:
        return ""
    mean = cut(statistics.mean(values), decimals, sign)
    if len(values) == 1:
        return mean
    scaled = math.ceil(round(factor * statistics.stdev(values) * 10**decimals, 6))
    return f"{mean} ± {scaled / 10**decimals:.{decimals}f}"


def difference(group: dict[int, dict], base: dict[int, dict], name: str) -> str:
    """Format the mean difference of runs of the same seed, and half its 95 % interval."""
    pairs = {
        seed: {name: group[seed][name] - base[seed][name]}
        for seed in sorted(group.keys() & base.keys())
        if name in group[seed] and name in base[seed]
    }
    if len(pairs) < 2:
        return ""
    student = STUDENT[min(len(pairs), 10) - 2]
    return spread(pairs, name, "+", student / len(pairs) ** 0.5)


def compare(groups: list[list[str]]) -> None:
    """Print a table of groups of runs, the first of which is the baseline."""
    columns = {}
    for group in groups:
        runs = {run["seed"]: measures_of(run) for run in map(read_run, group)}
        if len(runs) < len(group) or not runs:
            raise ValueError(
                f"a group needs runs of different seeds: {' '.join(group)}"
            )
        title = os.path.commonprefix([Path(run).name for run in group]).rstrip("-")
        columns[f"{title} ({len(runs)})"] = runs
    base, *others = columns.values()
    first, *titles = columns
    print(f"{'means (number of runs)':<48}{first:>20}", end="")
    print("".join(f"{title:>20}{f'- {first}':>20}" for title in titles))
    for name, (label, _) in MEASURES.items():
        if all(name in run for runs in columns.values() for run in runs.values()):
            cells = [spread(base, name)]
            for runs in others:
                cells += [spread(runs, name), difference(runs, base, name)]
            print(f"{label:<48}" + "".join(f"{cell:>20}" for cell in cells))


# -------------------------------------------------------------------- the study's tables

DETAILED = ("shapes-14x14", "fashion-1000-tuned-14x14", "clipart-14x14")
COMPACT = {  # measure -> columns: a variant, or the difference of two
    "accuracy": ("plain", "modified - plain", "sar-0.3 - plain", "sar-0.3 - modified"),
    "components": ("plain", "sar-0.3 - plain"),
    "mean": ("plain", "entropy-0.3 - plain", "sar-0.3 - plain", "sar-0.3 - modified"),
    "mean_object": ("sar-0.3 - plain",),
    "mass": ("plain", "sar-0.3 - plain", "sar-0.3 - modified"),
}


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    for cells in (columns, ["---"] * len(columns), *rows):
        print("|", " | ".join(cells), "|")
    print()


def table() -> None:
    """Print the tables of .study/README.md, made of results.jsonl."""
    found = {setting: {variant: {} for variant in VARIANTS} for setting in SETTINGS}
    for line in (HERE / "results.jsonl").read_text().splitlines():
        run = json.loads(line)
        found[run["setting"]][run["variant"]][run["seed"]] = measures_of(run)

    names = list(MEASURES)[:8]
    for setting in DETAILED:
        rows = []
        for variant, runs in found[setting].items():
            if len(runs) > 2:
                cells = [f"`{variant}`", str(len(runs))]
                for name in names:
                    change = difference(runs, found[setting]["plain"], name)
                    change = f"<br>{change}" if variant != "plain" else ""
                    cells.append(spread(runs, name) + change)
                rows.append(cells)
        titles = [MEASURES[name][0] for name in names]
        print_table([f"`{setting}`", "runs", *titles], rows)

    names = [name for name in MEASURES if name not in ("entropy", "mean_heads")]
    rows = []
    for variant, runs in found[DETAILED[0]].items():
        if {0, 1} <= runs.keys():
            both = [
                [runs[seed].get(name, math.nan) for seed in (0, 1)] for name in names
            ]
            cells = zip(names, both)
            cells = [", ".join(cut(v, MEASURES[n][1]) for v in vs) for n, vs in cells]
            rows.append([f"`{variant}`", *cells])
    print_table(["seeds 0, 1", *(MEASURES[name][0] for name in names)], rows)

    columns = [(name, column) for name in COMPACT for column in COMPACT[name]]
    rows = []
    for setting, variants in found.items():
        if setting not in DETAILED:
            cells = [f"`{setting}`"]
            for name, column in columns:
                variant, _, base = column.partition(" - ")
                if base:
                    cells.append(difference(variants[variant], variants[base], name))
                else:
                    cells.append(spread(variants[variant], name))
            rows.append(cells)
    titles = [f"{MEASURES[name][0]}: {column}" for name, column in columns]
    print_table(["setting", *titles], rows)


def main() -> None:
    groups = [[]]
    for word in sys.argv[1:]:
        if word == "--":
            groups.append([])
        else:
            groups[-1].append(word)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    actions = "compare", "objects", "commands", "collect", "table"
    parser.add_argument("action", choices=actions)
    parser.add_argument("names", nargs="*", help="of runs, folders or settings")
    args = parser.parse_args(groups[0])
    try:
        if args.action == "compare":
            compare([args.names, *groups[1:]])
        elif args.action == "objects":
            for run in args.names:
                objects(run)
        elif args.action == "commands":
            commands(args.names or list(SETTINGS))
        elif args.action == "collect":
            collect(args.names)
        else:
            table()
    except KeyError as error:
        parser.error(f"there is no {error}")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
