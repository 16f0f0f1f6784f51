# SPDX-License-Identifier: MIT
"""Data sets, augmentation and loaders: image files or arrays in, uint8 batches out.

The table `DATASETS` is the one place that knows a data set. Loaders give (images,
labels) with images as uint8 (B, 3, H, W): a quarter of the memory traffic of float32.
`normalizer` makes them float on the device, as the first step of training and
evaluation.

`shapes` is made in the process: solid shapes in random colour, place, size and rotation
over textured, cluttered backgrounds, the same images in every run, with the object's
mask.
"""

import contextlib
import io
import math
import pickle
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision import datasets
from torchvision.datasets.folder import default_loader, find_classes
from torchvision.datasets.utils import extract_archive
from torchvision.transforms import v2

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Source:
    """What is known of a data set: its statistics, where it lies and how to get it."""

    mean: tuple[float, float, float]  # of the channels, on the scale 0 to 1
    std: tuple[float, float, float]
    path: str = ""  # where it is looked for, under the data directory
    hint: str = ""  # how a user gets it there
    torchvision: type | None = (
        None  # the class that reads it, by (root, train=, download=)
    )
    archives: dict[str, str] = field(
        default_factory=dict
    )  # archive -> what it unpacks to


# Name -> source. The CIFARs and folders are normalised like ImageNet, as in the
# authors' recipe.
DATASETS = {
    "shapes": Source(mean=(0.283,) * 3, std=(0.225,) * 3),
    "cifar10": Source(
        **IMAGENET,
        path="cifar-10-batches-py",
        hint="get cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
        torchvision=datasets.CIFAR10,
        archives={"cifar-10-python.tar.gz": "cifar-10-batches-py"},
    ),
    "cifar100": Source(
        **IMAGENET,
        path="cifar-100-python",
        hint="get cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
        torchvision=datasets.CIFAR100,
        archives={"cifar-100-python.tar.gz": "cifar-100-python"},
    ),
    "fashion-mnist": Source(
        mean=(0.286,) * 3,
        std=(0.353,) * 3,
        path="FashionMNIST/raw",
        hint="get its four .gz files from https://github.com/zalandoresearch/fashion-mnist, "
        "or from Debian's package dataset-fashion-mnist",
        torchvision=datasets.FashionMNIST,
        archives={
            f"FashionMNIST/raw/{part}-ubyte.gz": f"FashionMNIST/raw/{part}-ubyte"
            for part in (
                "train-images-idx3",
                "train-labels-idx1",
                "t10k-images-idx3",
                "t10k-labels-idx1",
            )
        },
    ),
    "folder": Source(
        **IMAGENET,
        path="train/ and val/",
        hint="sort the images as train/<class>/ and val/<class>/",
    ),
}


# ----------------------------------------------------------------------------- shapes

SHAPES_SIZE = 56  # pixels, height and width
SHAPES_COUNT = {"train": 10_000, "test": 2000}


def _bar(x: torch.Tensor, y: torch.Tensor, width: float, height: float) -> torch.Tensor:
    return (x.abs() < width / 2) & (y.abs() < height / 2)


def _star(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # Fold the plane into one tenth of a turn, where a five-pointed star has a single
    # straight edge from its tip at radius 1 to its notch at radius 0.4.
    tenth = math.pi / 5
    angle = (torch.atan2(x, -y).remainder(2 * tenth) - tenth).abs()  # 0 at the notch
    radius = x.hypot(y)
    along, across = radius * angle.cos(), radius * angle.sin()
    tip = (math.cos(tenth), math.sin(tenth))
    return (along - 0.4) * tip[1] < across * (tip[0] - 0.4)


# Class -> whether the point (x, y) lies in the shape, which fills about the unit disc;
# y points down. Every class stays itself when it is rotated or flipped.
SHAPES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "disc": lambda x, y: x.hypot(y) < 0.85,
    "half disc": lambda x, y: (x.hypot(y + 0.4) < 1) & (y > -0.4),
    "crescent": lambda x, y: (x.hypot(y) < 1) & ((x - 0.5).hypot(y) > 0.8),
    "triangle": lambda x, y: (y < 0.5) & (3**0.5 * x.abs() - y < 1),
    "square": lambda x, y: _bar(x, y, 1.5, 1.5),
    "bar": lambda x, y: _bar(x, y, 2, 0.6),
    "cross": lambda x, y: _bar(x, y, 2, 0.6) | _bar(x, y, 0.6, 2),
    "star": _star,
}


class Shapes(Dataset):
    """The data set `shapes`: one object of eight classes in each image.

    Args:
        split: "train" or "test"; each is the same in every run.
        transform: applied to the image, uint8 (3, SHAPES_SIZE, SHAPES_SIZE), as it is
            read.

    Attributes:
        images: uint8 (n, 3, SHAPES_SIZE, SHAPES_SIZE).
        classes: the names of the shapes.
        masks: bool (n, SHAPES_SIZE, SHAPES_SIZE), the pixels of the object.
        targets: int64 (n), the index of the class in `classes`; classes take turns.
    """

    def __init__(self, split: str, transform: Callable | None = None) -> None:
        count = SHAPES_COUNT[split]
        generator = torch.Generator().manual_seed(list(SHAPES_COUNT).index(split))
        self.transform = transform
        self.classes = list(SHAPES)
        self.targets = torch.arange(count) % len(SHAPES)
        self.images = torch.empty(count, 3, SHAPES_SIZE, SHAPES_SIZE, dtype=torch.uint8)
        self.masks = torch.empty(count, SHAPES_SIZE, SHAPES_SIZE, dtype=torch.bool)
        for number, inside in enumerate(SHAPES.values()):
            rows = (self.targets == number).nonzero().flatten()
            drawn = draw_shapes(inside, len(rows), generator)
            self.images[rows], self.masks[rows] = drawn

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index]
        if self.transform is not None:
            image = self.transform(image)
        return image, int(self.targets[index])


def draw_shapes(
    inside: Callable, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one shape n = `count` times: uint8 (n, 3, S, S), and masks, bool (n, S, S)."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        sample = torch.rand(count, *(shape or (1,)), 1, 1, generator=generator)
        return low + (high - low) * sample

    def frame(
        scale: torch.Tensor, room: float, points: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Coordinates of a points x points grid, seen from a randomly placed object."""
        line = (torch.arange(points) + 0.5) * 2 / points - 1  # the image spans -1 to 1
        angle = uniform(0, 2 * math.pi)
        x = line - uniform(-room, room)  # (count, 1, 1, points)
        y = line[:, None] - uniform(-room, room)  # (count, 1, points, 1)
        cos, sin = angle.cos(), angle.sin()
        return (cos * x + sin * y) / scale, (cos * y - sin * x) / scale

    size = SHAPES_SIZE
    colour = uniform(0, 0.4, 3)
    image = colour
    for _ in range(2):  # texture: two gratings of any direction and wavelength
        x, _ = frame(uniform(0.02, 0.15), 1, size)
        image = image + uniform(-0.12, 0.12, 3) * x.sin()
    for _ in range(6):  # clutter: small bars of any colour
        x, y = frame(uniform(0.05, 0.16), 1, size)
        image = torch.where(_bar(x, y, 2.4, 1), uniform(0, 1, 3), image)
    x, y = frame(uniform(0.45, 0.7), 0.3, 2 * size)
    alpha = F.avg_pool2d(inside(x, y).float(), 2)  # drawn at twice the size, smooth
    image = image.lerp(colour + uniform(0.3, 0.7, 3), alpha)  # brighter than behind it
    image = image + 0.04 * torch.randn(image.shape, generator=generator)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), alpha[:, 0] > 0.5


# -------------------------------------------------------------------- other data sets


def load_dataset(
    name: str, data_dir: str, split: str, transform: Callable | None
) -> Dataset:
    """A split of a data set, as (image, label) pairs; downloaded if it is not there.

    Args:
        name: a key of `DATASETS`.
        data_dir: where data sets lie.
        split: "train" or "test".
        transform: applied to each image, a PIL image or uint8 (C, H, W), as it is read.

    Returns:
        A Dataset with the attributes `classes` (names) and `targets` (a label for each
        image).

    Raises:
        ValueError: the name is unknown, or the files are not what they should be.
        FileNotFoundError: the data set is not there and cannot be downloaded.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(DATASETS)}")
    if name == "shapes":
        return Shapes(split, transform)
    if name == "folder":
        return _folder(Path(data_dir), split, transform)
    return _torchvision(name, Path(data_dir), split, transform)


def _missing(name: str, data_dir: Path, reason: str) -> FileNotFoundError:
    source = DATASETS[name]
    where = " and ".join(str(data_dir / part) for part in source.path.split(" and "))
    return FileNotFoundError(
        f"data set {name} was looked for at {where}, but {reason}; "
        f"{source.hint}, or name another place with --data-dir"
    )


def _folder(data_dir: Path, split: str, transform: Callable | None) -> Dataset:
    parts = {"train": data_dir / "train", "test": data_dir / "val"}
    for part in parts.values():
        if not part.is_dir():
            raise _missing("folder", data_dir, f"there is no {part}")
    try:
        train, val = (set(find_classes(part)[0]) for part in parts.values())
        if train != val:
            odd = ", ".join(sorted(train ^ val)[:5])
            raise ValueError(f"train/ and val/ in {data_dir} differ in classes: {odd}")
        return datasets.ImageFolder(parts[split], transform, loader=_open_image)
    except FileNotFoundError as error:  # a class without images, or no class at all
        raise ValueError(f"data set folder in {data_dir}: {error}") from error


def _open_image(path: str) -> object:
    try:
        return default_loader(path)
    except OSError as error:
        raise OSError(f"the image {path} cannot be read ({error})") from error


def _torchvision(
    name: str, data_dir: Path, split: str, transform: Callable | None
) -> Dataset:
    source = DATASETS[name]
    options = {"root": data_dir, "train": split == "train", "transform": transform}
    try:
        for archive, unpacked in source.archives.items():
            if (data_dir / archive).is_file() and not (data_dir / unpacked).exists():
                _unpack(data_dir / archive, data_dir / unpacked)
        with contextlib.suppress(RuntimeError):  # not there, or not the original files
            return source.torchvision(**options)
        if issubclass(source.torchvision, datasets.CIFAR10):
            with contextlib.suppress(RuntimeError):  # not there
                return _read_unchecked(name, data_dir, options)
    except READING_ERRORS as error:
        where = data_dir / source.path
        raise ValueError(f"data set {name} at {where} is damaged: {error}") from error
    try:
        print(f"{name} is not in {data_dir}; trying to download it", flush=True)
        with contextlib.redirect_stdout(io.StringIO()):
            return source.torchvision(**options, download=True)
    except (OSError, RuntimeError) as error:
        reason = f"is not there and the download failed ({error})"
        raise _missing(name, data_dir, reason) from error


# What readers of archives, pickles and arrays raise on files that are not what they seem.
READING_ERRORS = (OSError, EOFError, KeyError, ValueError, TypeError)
READING_ERRORS += (pickle.UnpicklingError, tarfile.TarError, zlib.error)
CODEC = ("_codecs", "encode")  # how pickles of Python 3 hold the bytes of Python 2


def _unpack(archive: Path, target: Path) -> None:
    """Unpack whole or not at all: elsewhere first, then moved."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        extract_archive(str(archive), scratch)
        (Path(scratch) / target.name).rename(target)


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of arrays, lists and strings, and refuses whatever wants to run."""

    def find_class(self, module: str, name: str) -> object:
        arrays = name in ("_reconstruct", "_frombuffer", "ndarray", "dtype")
        if (module.split(".")[0] == "numpy" and arrays) or (module, name) == CODEC:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants to execute {module}.{name}")


def _read_unchecked(name: str, data_dir: Path, options: dict) -> Dataset:
    """Read a CIFAR that fails its checksums: a subset, or a relabelled variant."""
    reader = DATASETS[name].torchvision
    # The checksums guard against pickles that execute code, so this has to instead.
    files = [file for file, _ in reader.train_list + reader.test_list]
    for file in [*files, reader.meta["filename"]]:
        path = data_dir / reader.base_folder / file
        if path.is_file():
            with path.open("rb") as opened:
                _ArraysOnly(opened, encoding="latin1").load()
    dataset = reader.__new__(reader)
    dataset.train_list = [(file, None) for file, _ in reader.train_list]
    dataset.test_list = [(file, None) for file, _ in reader.test_list]
    dataset.meta = reader.meta | {"md5": None}
    dataset.__init__(**options)
    where = data_dir / DATASETS[name].path
    print(f"{name}: {where} lacks the original's checksums; used as it is", flush=True)
    return dataset


def balanced_subset(dataset: Dataset, size: int, seed: int) -> Subset:
    """A random subset whose classes differ by one image at most, where images suffice.

    Args:
        dataset: with the attribute `targets`.
        size: number of images, from 1 to len(dataset).
        seed: the same seed chooses the same images.

    Raises:
        ValueError: size is out of range.
    """
    count = len(dataset)
    if not 1 <= size <= count:
        raise ValueError(
            f"a subset of {size} images was asked for, of a data set of {count}"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    targets = torch.as_tensor(dataset.targets)[order]
    # Rank of each image within its class, in random order; then all first images of the
    # classes, all second ones, and so on.
    by_class = targets.argsort(stable=True)
    counts = targets.bincount()
    rank = torch.empty_like(order)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    rank[by_class] = torch.arange(count) - first
    chosen = order[rank.argsort(stable=True)[:size]]
    return Subset(dataset, chosen.sort().values.tolist())


# ------------------------------------------------------------------ images to batches

CROPS = ("resized", "padded", "whole")


def default_crop(img_size: int) -> str:
    """The authors' rule: images of up to 32 px are not enlarged, only shifted."""
    return "padded" if img_size <= 32 else "resized"


class PixelErasing(v2.RandomErasing):
    """Random erasing with noise (arXiv 1708.04896) on uint8 images.

    The noise is standard normal after normalisation, as in the authors' recipe, but for
    what is clipped to the range of uint8.
    """

    def __init__(
        self, p: float, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__(p=p, value="random")
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std)[:, None, None]

    def transform(self, inpt: torch.Tensor, params: dict) -> torch.Tensor:
        if params["v"] is not None:
            noise = (self.mean + self.std * params["v"]) * 255
            params = params | {"v": noise.clamp(0, 255).to(torch.uint8)}
        return super().transform(inpt, params)


def train_transform(
    name: str, img_size: int, *, crop: str, rand_augment: int, reprob: float
) -> v2.Compose:
    """Augmentation: an image, PIL or uint8 (C, H, W), to uint8 (3, img_size, img_size).

    Args:
        name: key of `DATASETS`, for the mean colour that fills what a crop or rotation
            uncovers.
        img_size: side in pixels.
        crop: "resized" takes a random area of 8 to 100 % and resizes it; "padded"
            shifts the whole image by up to an eighth of its side; "whole" does not.
        rand_augment: magnitude of RandAugment (arXiv 1909.13719), of 10; 0 is off.
        reprob: probability of random erasing.
    """
    source = DATASETS[name]
    fill = [round(255 * channel) for channel in source.mean]
    steps: list[Callable] = [v2.RGB()]
    if crop == "resized":
        steps.append(
            v2.RandomResizedCrop(img_size, interpolation=v2.InterpolationMode.BICUBIC)
        )
    else:
        steps.append(v2.Resize((img_size, img_size), v2.InterpolationMode.BICUBIC))
    if crop == "padded":
        steps.append(v2.RandomCrop(img_size, padding=img_size // 8, fill=fill))
    steps.append(v2.RandomHorizontalFlip())
    if rand_augment:
        # As in timm, each of two operations is left out at even odds, and 9 means 9 of
        # 10: torchvision's own scale has 31 bins.
        bilinear = v2.InterpolationMode.BILINEAR
        operation = v2.RandAugment(1, rand_augment, 11, bilinear, fill)
        steps += [v2.RandomApply([operation], p=0.5) for _ in range(2)]
    steps.append(v2.ToImage())
    if reprob:
        steps.append(PixelErasing(reprob, source.mean, source.std))
    return v2.Compose([*steps, v2.ToPureTensor()])


def test_transform(img_size: int, *, crop: str) -> v2.Compose:
    """For testing: PIL or uint8 (C, H, W) to uint8 (3, img_size, img_size), no chance.

    Args:
        img_size: side in pixels.
        crop: "resized" resizes the shorter side to 256/224 of img_size and takes the
            centre, the ImageNet protocol; the others resize the whole image.
    """
    steps: list[Callable] = [v2.RGB()]
    if crop == "resized":
        steps.append(v2.Resize(img_size * 256 // 224, v2.InterpolationMode.BICUBIC))
        steps.append(v2.CenterCrop(img_size))
    else:
        steps.append(v2.Resize((img_size, img_size), v2.InterpolationMode.BICUBIC))
    return v2.Compose([*steps, v2.ToImage(), v2.ToPureTensor()])


def make_mix(mixup: float, cutmix: float, classes: int) -> Callable:
    """(images, labels) -> the same, mixed by mixup or cutmix, at even odds if both."""
    mixes = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
    mixes += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
    return v2.RandomChoice(mixes) if mixes else lambda *batch: batch


class SeededItems(Dataset):
    """Items by (index, seed): all chance in an item follows from its own seed.

    So augmentation does not depend on which process loads an item, nor after which.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        index, seed = key
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(seed)
        try:
            return self.dataset[index]
        finally:
            torch.default_generator.set_state(state)


class EpochSampler(Sampler):
    """(index, seed) of all items, in an order that follows from the epoch's seed."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch_seed = count, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.epoch_seed)
        order = torch.randperm(self.count, generator=generator).tolist()
        seeds = torch.randint(2**62, (self.count,), generator=generator).tolist()
        return zip(order, seeds)


def make_loader(
    dataset: Dataset, batch_size: int, *, train: bool, workers: int, pin_memory: bool
) -> DataLoader:
    """Batches of images, uint8 (B, 3, H, W), and labels, int64 (B).

    A training loader shuffles and drops the incomplete last batch. Set
    `loader.sampler.epoch_seed` before an epoch: it fixes all that loading leaves to
    chance, for any number of workers. These persist from epoch to epoch.

    Raises:
        ValueError: a training set smaller than one batch.
    """
    if train and len(dataset) < batch_size:
        raise ValueError(
            f"batch size {batch_size} exceeds the {len(dataset)} training images"
        )
    return DataLoader(
        SeededItems(dataset) if train else dataset,
        batch_size,
        sampler=EpochSampler(len(dataset)) if train else None,
        drop_last=train,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # and not the one that the model draws from
    )


def normalizer(
    name: str, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The first step on the device: uint8 (B, 3, H, W) -> float32, standardized."""
    source = DATASETS[name]
    mean = 255 * torch.tensor(source.mean, device=device)[:, None, None]
    std = 255 * torch.tensor(source.std, device=device)[:, None, None]
    return lambda images: (images.float() - mean) / std
