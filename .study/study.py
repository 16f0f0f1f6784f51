# SPDX-License-Identifier: MIT
"""The study of the README: the runs, and the table made of them.

python .study/study.py commands             # one line of shell for each run
python .study/study.py collect runs/study   # what was measured, a line of JSON for each
python .study/study.py table .study/results.jsonl --baseline surgery
python .study/study.py differences .study/results.jsonl
python .study/study.py others runs/study/*/plain-*/checkpoint.pt
python .study/study.py references
python .study/study.py gradients runs/study/fashion-1000/plain-0/checkpoint.pt
python .study/study.py linear

A run is compared with the one of the plain ViT, or of --baseline, that has its seed and
so its training images, in the same order.
"""

import argparse
import itertools
import json
import math
import operator
import signal
import statistics
import sys
from pathlib import Path

# data, entropy, eval and train
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SEEDS = range(5)
STUDENT = 2.7765  # 97.5 % quantile of Student's t for five seeds, rounded up

FASHION = (
    "--model vit_mini --img-size 28 --patch-size {} --crop {} --aa {} --reprob 0"
    " --smoothing 0 --drop-path 0 --no-model-ema"
)
SHIFTED = FASHION.format(4, "padded", "none")
# The patches' places told apart from the first step on; and images not shifted.
PLACED = f"{FASHION} --pos-std 0.5"
TUNED = PLACED.format(4, "whole", "none")
DISTORTED = PLACED.format(4, "whole", "rand-m5")
FINER = PLACED.format(2, "whole", "none")  # 14x14 patches
LARGER = FINER.replace("vit_mini", "vit_small")

# Setting -> dataset, and the options that its arms share, tuned for the plain ViT, but
# for those of the ViT-S.
SETTINGS = {
    "fashion-1000": (
        "fashion-mnist",
        (
            f"{SHIFTED} --mixup 0 --cutmix 0 --train-size 1000 --epochs 100"
            " --warmup-epochs 5 --batch-size 16 --lr 0.0256"
        ),
    ),
    "fashion-1000-long": (
        "fashion-mnist",
        (
            f"{SHIFTED} --mixup 0 --cutmix 0 --train-size 1000 --epochs 200"
            " --warmup-epochs 5 --batch-size 32 --lr 0.0256"
        ),
    ),
    "fashion-1000-longer": (
        "fashion-mnist",
        (
            f"{SHIFTED} --mixup 0.8 --cutmix 1 --train-size 1000 --epochs 400"
            " --warmup-epochs 5 --batch-size 32 --lr 0.0256"
        ),
    ),
    "fashion-1000-tuned": (
        "fashion-mnist",
        (
            f"{TUNED} --mixup 0 --cutmix 1 --train-size 1000 --epochs 60"
            " --warmup-epochs 5 --batch-size 16 --lr 0.0256"
        ),
    ),
    "fashion-1000-tuned-14x14": (
        "fashion-mnist",
        (
            f"{FINER} --mixup 0 --cutmix 1 --train-size 1000 --epochs 60"
            " --warmup-epochs 5 --batch-size 16 --lr 0.0256"
        ),
    ),
    "fashion-1000-tuned-long": (
        "fashion-mnist",
        (
            f"{DISTORTED} --mixup 0 --cutmix 1 --train-size 1000 --epochs 300"
            " --warmup-epochs 5 --batch-size 16 --lr 0.0256"
        ),
    ),
    "fashion-1000-tuned-longer": (
        "fashion-mnist",
        (
            f"{DISTORTED} --mixup 0 --cutmix 1 --train-size 1000 --epochs 800"
            " --warmup-epochs 5 --batch-size 16 --lr 0.0256"
        ),
    ),
    "fashion-5000": (
        "fashion-mnist",
        (
            f"{SHIFTED} --mixup 0 --cutmix 0 --train-size 5000 --epochs 20"
            " --warmup-epochs 1 --batch-size 32 --lr 0.0128"
        ),
    ),
    "fashion-5000-tuned": (
        "fashion-mnist",
        (
            f"{TUNED} --mixup 0 --cutmix 0 --train-size 5000 --epochs 16"
            " --warmup-epochs 1 --batch-size 16 --lr 0.0256"
        ),
    ),
    "fashion-5000-tuned-long": (
        "fashion-mnist",
        (
            f"{TUNED} --mixup 0 --cutmix 1 --train-size 5000 --epochs 48"
            " --warmup-epochs 1 --batch-size 16 --lr 0.0256"
        ),
    ),
    "fashion-5000-tuned-longer": (
        "fashion-mnist",
        (
            f"{DISTORTED} --mixup 0 --cutmix 1 --train-size 5000 --epochs 256"
            " --warmup-epochs 1 --batch-size 16 --lr 0.0256"
        ),
    ),
    "fashion-60000-small-14x14": (
        "fashion-mnist",
        (
            f"{LARGER} --mixup 0 --cutmix 0 --epochs 1 --warmup-epochs 0.1"
            " --batch-size 128 --lr 0.002 --amp"
        ),
    ),
    "shapes-1000": (
        "shapes",
        (
            "--crop padded --train-size 1000 --epochs 100 --warmup-epochs 5"
            " --batch-size 16 --lr 0.0256"
        ),
    ),
    "shapes-1000-long": (
        "shapes",
        (
            "--crop padded --train-size 1000 --epochs 200 --warmup-epochs 5"
            " --batch-size 16 --lr 0.0512"
        ),
    ),
    "shapes-1000-longer": (
        "shapes",
        (
            "--crop padded --train-size 1000 --epochs 400 --warmup-epochs 5"
            " --batch-size 16 --lr 0.0512"
        ),
    ),
    "shapes-10000": (
        "shapes",
        "--crop padded --epochs 10 --warmup-epochs 1 --batch-size 16 --lr 0.0128",
    ),
    "shapes-10000-long": (
        "shapes",
        "--crop padded --epochs 80 --warmup-epochs 1 --batch-size 16 --lr 0.0128",
    ),
}
ON_GPU = {"fashion-60000-small-14x14"}  # settings in bfloat16, on CUDA


def arms(alone: list[float], both: list[float]) -> dict[str, str]:
    """Name -> options: the plain ViT, each of the two changes by itself, and SAR.

    The entropy alone is weighted by each lambda of `alone`, SAR's by each of `both`.
    """
    return {
        "plain": "--sar-lambda 0",
        "surgery": "--sar-lambda 0 --no-last-skip",
        **{f"entropy-{value}": f"--sar-lambda {value} --last-skip" for value in alone},
        **{f"sar-{value}": f"--sar-lambda {value}" for value in both},
    }


STUDY = {
    "fashion-1000": arms([0.01, 0.3], [0.003, 0.01, 0.03, 0.1, 0.3])
    | {"constant-0.01": "--sar-lambda 0.01 --sar-schedule constant"},
    "fashion-1000-long": arms([0.3], [0.3]),
    "fashion-1000-longer": arms([0.3], [0.3]),
    "fashion-1000-tuned": arms([0.3], [0.3]),
    "fashion-1000-tuned-14x14": arms([0.3], [0.01, 0.3]),
    "fashion-1000-tuned-long": arms([0.3], [0.3]),
    "fashion-1000-tuned-longer": arms([0.3], [0.3]),
    "fashion-5000": arms([0.3], [0.01, 0.3]),
    "fashion-5000-tuned": arms([0.3], [0.3]),
    "fashion-5000-tuned-long": arms([0.3], [0.3]),
    "fashion-5000-tuned-longer": arms([0.3], [0.3]),
    "fashion-60000-small-14x14": arms([0.3], [0.3]),
    "shapes-1000": arms([0.01, 0.3], [0.01, 0.1, 0.3]),
    "shapes-1000-long": arms([0.3], [0.01, 0.3]),
    "shapes-1000-longer": arms([0.3], [0.3]),
    "shapes-10000": arms([0.3], [0.3]),
    "shapes-10000-long": arms([0.3], [0.3]),
}

# A loader of images as they are, in this process.
WHOLE = {"train": False, "workers": 0, "pin_memory": False}

# What is measured -> its column, and the decimals that are printed.
MEASURES = {
    "acc1": ("test accuracy, %", 2),
    "entropy": ("spatial entropy, nats", 3),
    "components": ("components", 2),
    "mass": ("Jaccard, 60 % of the attention", 1),
    "foreground": ("Jaccard, S > mean", 1),
    "mass_own": ("Jaccard, 60 % of the attention: own - other object", 1),
    "foreground_own": ("Jaccard, S > mean: own - other object", 1),
}

# Arms whose differences are printed: the first less the second.
PAIRS = [
    ("surgery", "plain"),
    ("entropy-0.3", "plain"),
    ("sar-0.3", "plain"),
    ("sar-0.3", "surgery"),
    ("sar-0.01", "surgery"),
]


def train_options(setting: str, arm: str, seed: int) -> str:
    """Those of a run, but for its device and where it is kept."""
    dataset, shared = SETTINGS[setting]
    return (
        f"--dataset {dataset} {shared} {STUDY[setting][arm]}"
        f" --val-interval 1000 --seed {seed}"
    )


def commands() -> None:
    """Print a line for each run: train, or go on, and measure; nothing if that is done."""
    for setting, chosen in STUDY.items():
        dataset, _ = SETTINGS[setting]
        device = f"--device {'cuda' if setting in ON_GPU else 'cpu'}"
        for seed in SEEDS:
            for arm in chosen:
                run = f"runs/study/{setting}/{arm}-{seed}"
                print(
                    f"[ -e {run}/eval.json ] || {{",
                    f"if [ -e {run}/log.jsonl ]; then python train.py --resume {run}; else",
                    f"python train.py {train_options(setting, arm, seed)} {device}",
                    f"--output-dir {run}; fi &&",
                    f"python eval.py --checkpoint {run}/checkpoint.pt {device}",
                    f"--segmentation {dataset} --json {run}/eval.json; }}",
                )


def name(run: Path) -> dict:
    """What the folder of a run says: setting, arm and seed."""
    arm, _, seed = run.absolute().name.rpartition("-")
    if not seed.isdecimal():
        raise ValueError(f"{run} is not named SETTING/ARM-SEED")
    return {"setting": run.absolute().parent.name, "arm": arm, "seed": int(seed)}


def summarize(folder: Path, record: dict) -> dict:
    """What was measured of a run that `name` names.

    Raises:
        KeyError: a name is not in its log.jsonl or eval.json.
        OSError: there is no log.jsonl.
        ValueError: its settings are not those above, or its last epoch is missing.
    """
    import train

    options = f"{train_options(**record)} --device cpu"  # which may differ
    asked = vars(train.parse_args(options.split()))
    lines = (folder / "log.jsonl").read_text().splitlines()
    settings, *epochs = map(json.loads, lines)
    differ = ", ".join(
        f"{name} {settings.get(name)} -> {value}"
        for name, value in asked.items()
        if name not in (*train.MAY_CHANGE, *train.NO_SETTINGS, "output_dir")
        and value is not None
        and settings.get(name) != value
    )
    if differ:
        raise ValueError(f"the run in {folder} has not the study's settings: {differ}")
    if len(epochs) < asked["epochs"]:
        raise ValueError(f"the run in {folder} ended after {len(epochs)} epochs")
    last = epochs[-1]
    measured = json.loads((folder / "eval.json").read_text())["segmentation"]
    start = [len(epochs) * i // 10 for i in range(11)]  # of each tenth of the run
    return record | {
        "epochs": last["epoch"],
        "acc1": last["test_acc1"],
        "entropy": last["test_entropy"],
        "components": last["test_components"],
        "mass": measured["jaccard_mass"],
        "foreground": measured["jaccard_mean"],
        "entropy_per_head": last["test_entropy_per_head"],
        "components_per_head": last["test_components_per_head"],
        "mass_per_head": measured["jaccard_mass_per_head"],
        "foreground_per_head": measured["jaccard_mean_per_head"],
        "test_loss": last["test_loss"],
        "train_loss": last["train_loss"],
        "train_entropy_by_tenths": [
            statistics.mean(epoch["train_entropy"] for epoch in epochs[first:end])
            for first, end in itertools.pairwise(start)
            if end > first
        ],
        "minutes": sum(epoch["seconds"] for epoch in epochs) / 60,
        "torch": settings["torch"],
        "torchvision": settings["torchvision"],
        "python": settings["python"],
        "hardware": settings["hardware"],
    }


def collect(path: Path) -> None:
    """Print a line of JSON for each run in PATH/SETTING/ARM-SEED that was measured.

    Nothing is printed if one of them has other settings than those above, or is not
    complete. What is no run of the study is named on standard error.
    """
    folders = [result.parent for result in sorted(path.glob("*/*/eval.json"))]
    if not folders:
        raise FileNotFoundError(f"no SETTING/ARM-SEED/eval.json in {path}")
    records = []
    for folder in folders:
        try:
            record = name(folder)
            train_options(**record)
        except (KeyError, ValueError):
            print(f"left out: {folder}, not of the study", file=sys.stderr)
            continue
        try:
            records.append(summarize(folder, record))
        except KeyError as error:
            raise ValueError(f"the run in {folder} has no {error}") from error
    for record in records:
        print(json.dumps(record))


def cut(value: float, decimals: int, sign: str = "") -> str:
    """The number without its further decimals: nearer to 0."""
    scaled = math.trunc(round(abs(value) * 10**decimals, 6))
    return f"{math.copysign(scaled, value) / 10**decimals:{sign}.{decimals}f}"


def up(value: float, decimals: int) -> str:
    """The number, which is not negative, rounded up."""
    scaled = math.ceil(round(value * 10**decimals, 6))
    return f"{scaled / 10**decimals:.{decimals}f}"


def spread(values: list[float], decimals: int) -> str:
    """Mean and standard deviation."""
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return f"{cut(mean, decimals)} ± {up(deviation, decimals)}"


def interval(values: list[float], decimals: int) -> str:
    """Mean and half the 95 % interval."""
    width = STUDENT * statistics.stdev(values) / len(values) ** 0.5
    return f"{cut(statistics.mean(values), decimals, '+')} ± {up(width, decimals)}"


def read(path: Path) -> tuple[dict[tuple[str, str], dict[int, dict]], set[str]]:
    """(setting, arm) -> seed -> what was measured; and the names that a run has.

    Arms with runs but not all their seeds are left out, and named on standard error.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    found, short = {}, []
    try:
        every = [json.loads(line) for line in path.read_text().splitlines()]
        for run in every:
            found.setdefault((run["setting"], run["arm"]), {})[run["seed"]] = run
    except (KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not a file that collect made: {what}") from error
    if not found:
        raise ValueError(f"{path} is empty")
    if any(run.keys() != every[0].keys() for run in every):
        raise ValueError(f"{path} is of several files: its lines have different names")
    for setting, chosen in STUDY.items():
        for arm in chosen:
            seeds = found.get((setting, arm), {}).keys() & set(SEEDS)
            if len(seeds) < len(SEEDS) and found.pop((setting, arm), None):
                short.append(f"{setting}/{arm} {len(seeds)}")
    if short:
        of = f"left out, with fewer than {len(SEEDS)} seeds"
        print(f"{of}: {', '.join(short)}", file=sys.stderr)
    return found, set(every[0])


def difference(runs: dict, base: dict, measure: str) -> str:
    """Paired by seed."""
    pairs = [runs[seed][measure] - base[seed][measure] for seed in SEEDS]
    return interval(pairs, MEASURES[measure][1])


def table(path: Path, baseline: str) -> None:
    """Print the table of a file that `collect` or `others` made, in Markdown.

    A cell has mean and standard deviation, and below them the difference to the baseline
    with half its 95 % interval.
    """
    found, names = read(path)
    measures = {key: what for key, what in MEASURES.items() if key in names}
    columns = ["arm", "its options", *(column for column, _ in measures.values())]
    columns += ["minutes"] * ("minutes" in names)
    print("|", " | ".join(columns), "|")
    print("|" + " --- |" * len(columns))
    for setting, chosen in STUDY.items():
        base = found.get((setting, baseline))
        for arm, options in chosen.items():
            runs = found.get((setting, arm))
            if not runs:
                continue
            cells = [f"`{setting}/{arm}`", f"`{options}`"]
            for measure, (_, decimals) in measures.items():
                cells.append(spread([runs[seed][measure] for seed in SEEDS], decimals))
                if base and arm != baseline:
                    cells[-1] += f"<br>{difference(runs, base, measure)}"
            if "minutes" in names:
                middle = statistics.median(runs[seed]["minutes"] for seed in SEEDS)
                cells.append(up(middle, 1))
            print("|", " | ".join(cells), "|")


def differences(path: Path) -> None:
    """Print a table for each measure: settings by row, and how two arms differ by column.

    Of those measures that the file of `collect` or `others` has: accuracy and Jaccard
    indices, or the part of these that is the object's own.
    """
    found, names = read(path)
    shown = ("acc1", "mass", "foreground", "mass_own", "foreground_own")
    if not names & set(shown):
        raise ValueError(f"{path} is not a file that collect made: no {shown[0]}")
    arms_of = {
        setting: {arm: found[setting, arm] for arm in chosen if (setting, arm) in found}
        for setting, chosen in STUDY.items()
    }
    arms_of = {setting: of for setting, of in arms_of.items() if of}
    pairs = [
        two for two in PAIRS if any(of.keys() >= {*two} for of in arms_of.values())
    ]
    for measure in shown:
        if measure not in names:
            continue
        title, decimals = MEASURES[measure]
        columns = [f"`{arm}` - `{base}`" for arm, base in pairs]
        print("|", " | ".join([title, "`plain`", *columns]), "|")
        print("|" + " --- |" * (2 + len(pairs)))
        for setting, of in arms_of.items():
            cells = [f"`{setting}`", ""]
            if plain := of.get("plain"):
                values = [plain[seed][measure] for seed in SEEDS]
                cells[1] = spread(values, decimals)
            for arm, base in pairs:
                both = of.keys() >= {arm, base}
                cells.append(difference(of[arm], of[base], measure) if both else "")
            print("|", " | ".join(cells), "|")
        print()


def others(paths: list[Path]) -> None:
    """Print the part of each run's Jaccard indices that is the object's own.

    Attention that stays in the middle of all images fits objects that lie there too. So
    the index with the object of the test image before it is taken off: a line of JSON for
    each checkpoint, whose folder has an eval.json, for `table`. On the kind of device
    that this names, CPU or CUDA, and in its precision.
    """
    import data
    from eval import PROTOCOLS, choose_device, segment
    from model import model_of_run, read_checkpoint

    runs = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no {path}")
        record, file = name(path.parent), path.parent / "eval.json"
        if not file.is_file():
            raise FileNotFoundError(f"no {file}: eval.py --segmentation makes it")
        measured = json.loads(file.read_text())
        for key in ("segmentation", "precision", "device"):
            if key not in measured:
                raise ValueError(f"{file} has no {key!r}")
        on_cpu = measured["device"].startswith("cpu")
        device = choose_device("cpu" if on_cpu else "cuda")
        runs.append((path, record, measured, device))
    for path, record, measured, device in runs:
        saved = read_checkpoint(path)
        model = model_of_run(saved, str(path))
        settings = saved["settings"]
        dataset = settings["dataset"]
        masked = data.load_masks(dataset, settings["data_dir"], model.img_size)
        loader = data.make_loader(masked, 500, **WHOLE)
        exchanged = ((images, masks.roll(1, 0)) for images, masks in loader)
        source = data.DATASETS[dataset]
        normalize = data.normalizer(source.mean, source.std, device)
        result = segment(
            model.to(device),
            exchanged,
            normalize,
            device,
            measured["precision"] == "bfloat16",
            PROTOCOLS["dino"],
            masked.objects,
        )
        own = measured["segmentation"]
        for key, of in {"mass": "jaccard_mass", "foreground": "jaccard_mean"}.items():
            record |= {f"{key}_own": own[of] - result[of], f"{key}_other": result[of]}
        print(json.dumps(record), flush=True)


def gradients(path: Path) -> None:
    """Print the norms of both losses' gradients, at a run's end, on its training images.

    These are not augmented, and pass through the model at once, which takes memory. The
    entropy of a map of one component is 0, and so is its gradient.
    """
    import torch
    from torch.nn.functional import cross_entropy

    import data
    from entropy import spatial_entropy
    from model import model_of_run, read_checkpoint

    saved = read_checkpoint(path)
    model = model_of_run(saved, str(path))
    settings = saved["settings"]
    dataset = settings["dataset"]
    transform = data.test_transform(settings["img_size"], crop=settings["crop"])
    images = data.load_dataset(dataset, settings["data_dir"], "train", transform)
    if settings["train_size"]:
        images = data.balanced_subset(images, settings["train_size"], settings["seed"])
    pixels, labels = next(iter(data.make_loader(images, len(images), **WHOLE)))
    source = data.DATASETS[dataset]
    normalize = data.normalizer(source.mean, source.std, torch.device("cpu"))
    logits, similarity = model.eval()(normalize(pixels))
    entropies = spatial_entropy(similarity, reduction="none")
    losses = [cross_entropy(logits, labels), entropies.mean()]

    def norms(weights: list, rows: slice) -> list[float]:
        """Of the gradients of both losses, by these rows of the weights."""
        options = {"retain_graph": True, "materialize_grads": True}
        return [
            sum(
                gradient[rows].square().sum().item()
                for gradient in torch.autograd.grad(loss, weights, **options)
            )
            ** 0.5
            for loss in losses
        ]

    qkv = model.blocks[-1].attn.qkv
    of_all = norms(list(model.parameters()), slice(None))
    of_scores = norms([qkv.weight, qkv.bias], slice(2 * len(qkv.weight) // 3))
    print(f"cross-entropy {losses[0]:.3f}, spatial entropy H {losses[1]:.3f}")
    share = (entropies == 0).double().mean()
    print(f"maps of one component: {share:.1%}")
    for where, (first, second) in {
        "all weights": of_all,
        "queries and keys of the last block": of_scores,
    }.items():
        print(f"gradient by {where}: cross-entropy {first:.4f}, H {second:.4f}", end="")
        print(f", 0.01 H to cross-entropy {0.01 * second / first:.5f}")


def references(data_dir: str = "data") -> None:
    """Print the Jaccard indices of masks that no model made, to compare with, as a table.

    Of every patch; of one mask for all images; of three, of which the best counts for
    each image, as the best head does; of the patches of the object itself, about the
    best that patches can do; and of its pixels. A patch is kept if the objects cover more
    than a share of it, on average: of 19 shares the one with the best index on these test
    images is taken. In percent, and less the index with the object of the test image
    before, as in `others`: nothing is left of masks that are the same for all images.
    """
    import torch
    from torch.nn.functional import avg_pool2d

    import data
    from eval import jaccard

    def fit(kept: torch.Tensor, objects: torch.Tensor) -> float:
        """Mean over n images of the best of K masks, bool (n, K, H, W), in percent."""
        return 100 * jaccard(kept, objects, 1, False)[0].amax(1).mean().item()

    def three_means(maps: torch.Tensor) -> torch.Tensor:
        """Centers (1, 3, H, W) of three clusters of maps (n, 1, H, W), by k-means."""
        points = maps.flatten(1)
        chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
        centers = points[chosen[:3]]
        for _ in range(50):
            nearest = torch.cdist(points, centers).argmin(1)
            centers = torch.stack(
                [points[nearest == each].mean(0) for each in range(3)]
            )
        return centers.view(1, 3, *maps.shape[2:])

    columns = ["test images", "patches", "every patch", "one mask for all images"]
    columns += ["the best of three", "the object's own patches", "its pixels"]
    print("|", " | ".join(columns), "|")
    print("|" + " --- |" * len(columns))
    for dataset, size, patch in (
        ("fashion-mnist", 28, 4),
        ("fashion-mnist", 28, 2),
        ("shapes", data.SHAPES_SIZE, 8),
    ):
        masked = data.load_masks(dataset, data_dir, (size, size))
        loader = data.make_loader(masked, len(masked), **WHOLE)
        objects = next(iter(loader))[1]  # 0 background, 1 object
        pixels = objects[:, None].float()
        covered = avg_pool2d(pixels, patch)
        cells = [dataset, f"{size // patch}x{size // patch}"]
        for maps in (
            torch.ones_like(covered),
            covered.mean(0, keepdim=True),
            three_means(covered),
            covered,
            pixels,
        ):
            maps = maps.expand(len(objects), -1, -1, -1)
            masks = (maps > share / 20 for share in range(1, 20))
            own, best = max(
                ((fit(mask, objects), mask) for mask in masks),
                key=operator.itemgetter(0),
            )
            less = round(own - fit(best, objects.roll(1, 0)), 3) + 0.0  # no -0.0
            cells.append(f"{cut(own, 1)}, {cut(less, 1, '+')}")
        print("|", " | ".join(cells), "|")


def linear(data_dir: str = "data", sizes: tuple[int, ...] = (1000, 5000)) -> None:
    """Print the test accuracy of logistic regression by the pixels of Fashion-MNIST.

    On the training images of each seed, neither shifted nor flipped. The penalty, half
    its weight times the square of the norm, is the best of four for the test images.
    """
    import torch
    from torch.nn.functional import cross_entropy

    import data

    def pixels(images) -> tuple[torch.Tensor, torch.Tensor]:
        """float (n, 784), 0 to 1, and the labels, int64 (n)."""
        loaded, labels = next(iter(data.make_loader(images, len(images), **WHOLE)))
        return loaded[:, 0].flatten(1) / 255, labels

    def fit(
        inputs: torch.Tensor, labels: torch.Tensor, weight: float
    ) -> torch.nn.Linear:
        """Multinomial logistic regression."""
        layer = torch.nn.Linear(784, 10)
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
        options = {"max_iter": 500, "line_search_fn": "strong_wolfe"}
        optimizer = torch.optim.LBFGS(layer.parameters(), **options)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            penalty = weight / 2 * layer.weight.square().sum()
            loss = cross_entropy(layer(inputs), labels) + penalty
            loss.backward()
            return loss

        optimizer.step(closure)
        return layer

    transform = data.test_transform(28, crop="whole")
    source = ("fashion-mnist", data_dir)
    every = data.load_dataset(*source, "train", transform)
    inputs, labels = pixels(data.load_dataset(*source, "test", transform))
    for size in sizes:
        accuracies = {weight: [] for weight in (0.01, 0.003, 0.001, 0.0003)}
        for weight, seed in itertools.product(accuracies, SEEDS):
            layer = fit(*pixels(data.balanced_subset(every, size, seed)), weight)
            right = (layer(inputs).argmax(1) == labels).double().mean().item()
            accuracies[weight].append(100 * right)
        weight, best = max(accuracies.items(), key=lambda pair: sum(pair[1]))
        print(f"{size} images, penalty {weight}: {spread(best, 2)} %")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    path_of = {
        collect: "folder of the runs, as runs/study",
        table: "what `collect` or `others` printed",
        differences: "what `collect` or `others` printed",
        gradients: "checkpoint.pt of a run",
        others: "checkpoint.pt of a run, next to its eval.json",
    }
    acts = (
        commands,
        collect,
        table,
        differences,
        others,
        references,
        gradients,
        linear,
    )
    for act in acts:
        what = act.__doc__.splitlines()[0]
        action = actions.add_parser(act.__name__, help=what, description=what)
        if act is others:
            action.add_argument("paths", type=Path, nargs="+", help=path_of[act])
        elif act in path_of:
            action.add_argument("path", type=Path, help=path_of[act])
        if act is table:
            choices = ("plain", "surgery", "sar-0.01")
            baseline = "arm that the others are compared with; plain, if left out"
            action.add_argument(
                "--baseline", choices=choices, default="plain", help=baseline
            )
        action.set_defaults(act=act)
    given = vars(parser.parse_args())
    if hasattr(signal, "SIGPIPE"):  # `| head` ends it without a word
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    given.pop("action")
    try:
        given.pop("act")(**given)
    except (OSError, ValueError) as error:
        sentence = " ".join(str(error).split())
        parser.exit(2, f"{parser.prog}: error: {sentence}\n")


if __name__ == "__main__":
    main()
