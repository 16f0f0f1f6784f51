# SPDX-License-Identifier: MIT
"""Compare runs: your own, or those of the study in .study/README.md.

    python .study/study.py compare runs/plain-* -- runs/sar-*   # your runs, by seed
    python .study/study.py objects RUN ...          # does attention follow the objects?
    python .study/study.py commands [SETTING ...]   # one shell command per run
    python .study/study.py collect runs/study       # one line of JSON per run
    python .study/study.py table                    # the study's tables

Tables have means ± standard deviations over seeds and, for B - A, the mean difference of
runs with the same seed ± half the width of its 95% confidence interval (Student's t).
The intersection over union (IoU, or Jaccard index) of attention and objects is there if
eval.py measured it, with --segmentation NAME --json RUN/eval.json, and then `objects`.
"""

import itertools
import json
import math
import statistics
import sys
from argparse import Namespace
from pathlib import Path
from string import ascii_uppercase

import torch
from torch.utils.data import Subset

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import data
import eval as evaluation
import train
from entropy import threshold_at_mean

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
COMMON = ("plain", "modified", "entropy-0.3", "sar-0.3")
ADDED = {  # setting -> variants besides those
    "shapes-14x14": ("sar-0.01", "sar-0.1", "sar-1", "sar-3"),
    "fashion-1000-tuned-14x14": ("sar-0.01",),
    "fashion-1000": tuple(VARIANTS.keys() - COMMON - {"sar-1", "sar-3"}),
    "fashion-5000": ("sar-0.01",),
    "shapes-1000": ("entropy-0.01", "sar-0.01", "sar-0.1"),
    "shapes-1000-long": ("sar-0.01",),
}


def options_of(setting: str, variant: str, seed: int | str) -> str:
    shared = f"{SETTINGS[setting]} {VARIANTS[variant]}"
    return f"{shared} --val-interval 1000 --seed {seed}"


def commands(*settings: str) -> None:
    """Print one shell command per run: start or resume it, then evaluate it."""
    for setting in settings or SETTINGS:
        device = "--device cuda" if "cuda" in SETTINGS[setting] else "--device cpu"
        dataset = SETTINGS[setting].split()[1]
        masks = " --masks clipart/masks" if dataset == "folder" else ""
        variants = [*COMMON, *ADDED.get(setting, ())]
        for seed, variant in itertools.product(range(5), variants):
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


def measure(run: str) -> dict[str, float]:
    """Measure how much the attention of a run depends on the image and on the head.

    Attention to the center of every image has a high IoU with centered objects, so this
    measures the IoU with the object of another image. What exceeds it is object-specific.
    The attention has collapsed if the foregrounds of all heads or images are the same.
    """
    report = json.loads(Path(run, "eval.json").read_text())
    where, device = report["segmentation"], report["device"]
    args = Namespace(model=None, workers=0, batch_size=500)
    args.device = evaluation.choose_device("cpu" if device.startswith("cpu") else None)
    args.model_ema = report["weights"] == "model_ema"
    args.amp = report["precision"] == "bfloat16"
    trained = evaluation.load_trained(run, args)
    model = trained.at(tuple(where["img_size"]))
    source = where["dataset"], where["data_dir"], model.img_size, where["masks"]
    images = data.load_masks(*source)
    order = range(len(images))
    if where["dataset"] == "folder":  # sorted by class and name: neighbors are alike
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(images), generator=generator).tolist()
    images = Subset(images, order)
    predictions = list(evaluation.predict_all(model, images, trained, args))
    other = evaluation.segment(
        ((logits, maps, masks.roll(1, 0)) for logits, maps, masks in predictions),
        evaluation.PROTOCOLS[where["protocol"]],
    )
    maps = torch.cat([maps for _, maps, _ in predictions])
    foreground = threshold_at_mean(maps) > 0  # (images, heads, H, W)
    pairs = itertools.combinations(foreground.unbind(1), 2)  # of heads
    return {
        "iou_mass_other": other["jaccard_mass"],
        "iou_mean_other": other["jaccard_mean"],
        "foreground": 100 * foreground.double().mean().item(),
        "heads_iou": statistics.mean(overlap(*pair) for pair in pairs),
        "images_iou": overlap(foreground, foreground.roll(1, 0)),
    }


def objects(*runs: str) -> None:
    """Write what `measure` finds of runs that have an eval.json to RUN/objects.json."""
    for run in runs:
        Path(run, "objects.json").write_text(json.dumps(measure(run)) + "\n")
        print(f"wrote {run}/objects.json, for compare")


def read_run(run: str | Path) -> tuple[dict, dict]:
    """Return the settings of a finished run, and its line of results.jsonl."""
    lines = Path(run, "log.jsonl").read_text().splitlines()
    settings, *epochs = map(json.loads, lines)
    if len(epochs) < settings["epochs"]:
        raise ValueError(f"{run} has only {len(epochs)} of {settings['epochs']} epochs")
    last = epochs[-1]
    found = {name: settings[name] for name in ("seed", "epochs")}
    found["accuracy"] = last["test_acc1"]
    for name in "entropy", "components", "entropy_per_head", "components_per_head":
        found[name] = last[f"test_{name}"]
    if (file := Path(run, "eval.json")).exists():
        iou = json.loads(file.read_text()).get("segmentation", {})
        found |= {k.replace("jaccard", "iou"): iou[k] for k in iou if "jaccard" in k}
    if (file := Path(run, "objects.json")).exists():
        found |= json.loads(file.read_text())
    found["minutes"] = sum(epoch["seconds"] for epoch in epochs) / 60
    names = "torch", "torchvision", "python", "hardware"
    return settings, found | {name: settings[name] for name in names}


def collect(folder: str = "runs/study") -> None:
    """Print one line of JSON for each measured run, FOLDER/SETTING/VARIANT-SEED."""
    may_differ = train.MAY_CHANGE | train.NO_SETTINGS
    may_differ |= {"amp", "output_dir", "val_interval"}
    for run in sorted(file.parent for file in Path(folder).glob("*/*/objects.json")):
        setting, (variant, _, seed) = run.parent.name, run.name.rpartition("-")
        settings, found = read_run(run)
        wanted = vars(train.parse_args(options_of(setting, variant, seed).split()))
        for name in wanted.keys() - may_differ:
            if settings[name] != wanted[name]:
                raise ValueError(f"{run} was trained with {name} {settings[name]}")
        print(json.dumps({"setting": setting, "variant": variant} | found))


# --------------------------------------------------------------------------- comparison

# Measure -> its label, and the decimals to print.
MEASURES = {
    "accuracy": ("accuracy, %", 2),
    "entropy": ("spatial entropy, nats", 3),
    "components": ("components per head", 2),
    "iou_mean": ("IoU of S > mean, best head, %", 1),
    "iou_mean_heads": ("IoU of S > mean, mean of heads, %", 1),
    "iou_mean_object": ("IoU of S > mean, object-specific, %", 1),
    "iou_mass": ("IoU of 60%, best head, %", 1),
    "iou_mass_object": ("IoU of 60%, object-specific, %", 1),
    "foreground": ("S > mean, % of the patches", 1),
    "heads_iou": ("IoU of S > mean between heads, %", 1),
    "images_iou": ("IoU of S > mean between images, %", 1),
}
# 97.5% quantiles of Student's t for 3, 4, ... pairs, rounded up. The last one is used for
# more than ten pairs too, which makes the interval slightly too wide.
STUDENT = [4.3027, 3.1825, 2.7765, 2.5706, 2.4470, 2.3647, 2.3061, 2.2622]
Group = dict[int, dict[str, float]]  # seed -> measure -> value


def measures_of(run: dict) -> dict[str, float]:
    """Return those of MEASURES that a line of results.jsonl has."""
    found = dict(run)
    for rule in "iou_mean", "iou_mass":
        if rule in run:
            found[f"{rule}_heads"] = statistics.mean(run[f"{rule}_per_head"])
        if f"{rule}_other" in run:
            found[f"{rule}_object"] = run[rule] - run[f"{rule}_other"]
    return {name: found[name] for name in MEASURES if name in found}


def spread(values: list, decimals: int, sign: str = "", factor: float = 1) -> str:
    """Format the mean, truncated, and `factor` standard deviations, rounded up."""
    if not values:
        return ""
    mean = round(statistics.mean(values) * 10**decimals, 6)
    text = f"{math.modf(mean)[1] / 10**decimals:{sign}.{decimals}f}"
    if len(values) > 1 and factor:
        width = round(factor * statistics.stdev(values) * 10**decimals, 6)
        text += f" ± {math.ceil(width) / 10**decimals:.{decimals}f}"
    return text


def cell(groups: dict[str, Group], column: str, name: str) -> str:
    """Format a measure of a group, as "A", or the difference of two, as "B - A"."""
    group, _, base = column.partition(" - ")
    decimals = MEASURES[name][1]
    values = {seed: run[name] for seed, run in groups[group].items() if name in run}
    if not base:
        return spread(list(values.values()), decimals)
    others = {seed: run[name] for seed, run in groups[base].items() if name in run}
    pairs = [values[seed] - others[seed] for seed in values if seed in others]
    count = len(pairs)  # fewer than three are too few for an interval
    factor = STUDENT[min(count, 10) - 3] / count**0.5 if count > 2 else 0
    return spread(pairs, decimals, "+", factor)


def print_table(rows: list[list[str]]) -> None:
    """Print Markdown, aligned; the first row has the titles."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    for row in rows:
        print("|", " | ".join(map(str.ljust, row, widths)), "|")
    print()


def print_groups(title: str, groups: dict[str, Group], columns: list[str]) -> None:
    """Print a table with a row for each measure that a group has."""
    rows = [[title, *columns]]
    for name, (label, _) in MEASURES.items():
        cells = [cell(groups, column, name) for column in columns]
        if any(cells):
            rows.append([label, *cells])
    print_table(rows)


def compare(*words: str) -> None:
    """Print a table of groups of runs, separated by "--"; the first is the baseline."""
    parts = itertools.groupby(words, lambda word: word == "--")
    lists = [list(runs) for separator, runs in parts if not separator]
    if not lists or words[0] == "--":
        raise ValueError("name runs, and -- between groups; the first is the baseline")
    groups, columns, datasets = {}, [], set()
    for letter, runs in zip(ascii_uppercase, lists):
        found = [read_run(run) for run in runs]
        datasets |= {settings["dataset"] for settings, _ in found}
        groups[letter] = {run["seed"]: measures_of(run) for _, run in found}
        if len(groups[letter]) < len(runs):
            raise ValueError(f"a group needs runs of different seeds: {' '.join(runs)}")
        columns += [letter] if letter == "A" else [letter, f"{letter} - A"]
        print(f"{letter}: {' '.join(runs)}")
    if len(datasets) > 1:
        raise ValueError(f"the runs are of different datasets: {', '.join(datasets)}")
    print("A: mean ± standard deviation; B - A: mean difference for equal seeds,")
    print("± half the width of its 95% confidence interval, for three pairs or more")
    print_groups("", groups, columns)


# -------------------------------------------------------------------- the study's tables

DETAILED = ("shapes-14x14", "fashion-1000-tuned-14x14", "clipart-14x14")
COMPACT = (  # of the other settings, two tables: measure -> columns
    {
        "accuracy": "plain, modified - plain, sar-0.3 - plain, sar-0.3 - modified",
        "components": "plain, sar-0.3 - plain",
    },
    {
        "iou_mean": "plain, entropy-0.3 - plain, sar-0.3 - plain, sar-0.3 - modified",
        "iou_mean_object": "sar-0.3 - plain",
        "iou_mass": "plain, sar-0.3 - plain, sar-0.3 - modified",
    },
)


def table() -> None:
    """Print the tables of .study/README.md from results.jsonl."""
    found = {setting: {variant: {} for variant in VARIANTS} for setting in SETTINGS}
    for line in (HERE / "results.jsonl").read_text().splitlines():
        run = json.loads(line)
        found[run["setting"]][run["variant"]][run["seed"]] = measures_of(run)
    for setting in DETAILED:
        columns = []
        for variant, runs in found[setting].items():
            if len(runs) > 2:
                columns += [variant] + [f"{variant} - plain"] * (variant != "plain")
        if columns:
            print_groups(setting, found[setting], columns)

    both = {  # seeds of all lambdas
        variant: {seed: runs[seed] for seed in (0, 1)}
        for variant, runs in found["shapes-14x14"].items()
        if {0, 1} <= runs.keys() and "entropy" not in variant
    }
    print_groups("shapes-14x14, seeds 0 and 1", both, list(both))

    for measures in COMPACT:
        columns = []
        for name, several in measures.items():
            columns += [(name, each) for each in several.split(", ")]
        rows = [["", *(f"{MEASURES[name][0]}: {each}" for name, each in columns)]]
        for setting in SETTINGS:
            if setting not in DETAILED:
                groups = found[setting]
                groups = {v: groups[v] if len(groups[v]) > 2 else {} for v in groups}
                cells = [cell(groups, each, name) for name, each in columns]
                rows.append([setting, *cells])
        print_table(rows)


def main() -> None:
    actions = {f.__name__: f for f in (compare, objects, commands, collect, table)}
    action, *words = sys.argv[1:] or [""]
    if action not in actions:
        sys.exit(__doc__)
    try:
        actions[action](*words)
    except (OSError, ValueError) as error:
        sys.exit(f"study.py: error: {error}")


if __name__ == "__main__":
    main()
