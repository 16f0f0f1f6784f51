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
import errno
import io
import math
import os
import pickle
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision import datasets
from torchvision.datasets.folder import default_loader, find_classes, is_image_file
from torchvision.datasets.utils import extract_archive
from torchvision.transforms import v2

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Source:
    """What is known of a data set: where it lies, how to get it, its statistics.

    Splits are found in one of three ways: `torchvision` reads them, with these keyword
    arguments; or each is a folder of folders named by class, or a list of files.
    """

    train: dict | str = "train"
    test: dict | str = "val"
    torchvision: type | None = None
    path: str = "train/ and val/"  # where it is looked for, under the data directory
    hint: str = "sort the images as train/<class>/ and val/<class>/"  # how to get it
    # Archive -> what it unpacks to.
    archives: dict[str, str] = field(default_factory=dict)
    # Of the channels, on the scale 0 to 1. As in the authors' recipe, natural images are
    # normalised like ImageNet.
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


def _cifar(reader: type, path: str, archive: str) -> Source:
    hint = f"get {archive} from https://www.cs.toronto.edu/~kriz/cifar.html"
    splits = ({"train": True}, {"train": False})
    return Source(*splits, reader, path, hint, {archive: path})


def _domainnet(domain: str) -> Source:
    """Its official lists, one file a split: a path and a label on each line."""
    train, test = (f"{domain}_{split}.txt" for split in ("train", "test"))
    hint = f"get {domain}.zip and both lists from https://ai.bu.edu/M3SDA/"
    archives = {f"{domain}.zip": domain}
    return Source(train, test, None, f"{train} and {test}", hint, archives)


class SVHN(datasets.SVHN):
    """torchvision's, which needs SciPy to read its files; this does not."""

    def __init__(self, root: Path, split: str, download: bool = False) -> None:
        datasets.VisionDataset.__init__(self, root)
        self.split = split
        self.url, self.filename, self.file_md5 = self.split_list[split]
        if download:
            self.download()
        if not self._check_integrity():
            raise RuntimeError(f"{self.filename} is not there or has another checksum")
        contents = read_mat(Path(root, self.filename))
        self.data = contents["X"].transpose(3, 2, 0, 1)  # (n, 3, 32, 32)
        self.labels = contents["y"].ravel().astype(np.int64) % 10  # 10 is the digit 0
        self.classes = [str(digit) for digit in range(10)]


class Flowers102(datasets.Flowers102):
    """torchvision's, which needs SciPy to read its files; this does not."""

    def __init__(
        self, root: Path, splits: tuple[str, ...], download: bool = False
    ) -> None:
        datasets.VisionDataset.__init__(self, root)
        self._base_folder = Path(root, "flowers-102")
        self._images_folder = self._base_folder / "jpg"
        if download:
            self.download()
        if not self._check_integrity():
            raise RuntimeError("it is not there or has other checksums")
        numbers = read_mat(self._base_folder / "setid.mat")
        labels = read_mat(self._base_folder / "imagelabels.mat")["labels"].ravel()
        numbers = np.concatenate([numbers[split].ravel() for split in splits])
        self._labels = [int(labels[number - 1]) - 1 for number in numbers]
        self._image_files = [
            self._images_folder / f"image_{number:05}.jpg" for number in numbers
        ]


DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
DATASETS = {
    "shapes": Source(mean=(0.283,) * 3, std=(0.225,) * 3),
    "cifar10": _cifar(
        datasets.CIFAR10, "cifar-10-batches-py", "cifar-10-python.tar.gz"
    ),
    "cifar100": _cifar(
        datasets.CIFAR100, "cifar-100-python", "cifar-100-python.tar.gz"
    ),
    "svhn": Source(
        {"split": "train"},
        {"split": "test"},
        SVHN,
        "train_32x32.mat and test_32x32.mat",
        "get both from http://ufldl.stanford.edu/housenumbers",
    ),
    "stl10": Source(
        {"split": "train"},
        {"split": "test"},
        datasets.STL10,
        "stl10_binary",
        "get stl10_binary.tar.gz from https://cs.stanford.edu/~acoates/stl10",
        {"stl10_binary.tar.gz": "stl10_binary"},
    ),
    "fashion-mnist": Source(
        {"train": True},
        {"train": False},
        datasets.FashionMNIST,
        "FashionMNIST/raw",
        "get its four .gz files from https://github.com/zalandoresearch/fashion-mnist, "
        "or from Debian's package dataset-fashion-mnist",
        {
            f"FashionMNIST/raw/{part}-ubyte.gz": f"FashionMNIST/raw/{part}-ubyte"
            for part in (
                "train-images-idx3",
                "train-labels-idx1",
                "t10k-images-idx3",
                "t10k-labels-idx1",
            )
        },
        mean=(0.286,) * 3,
        std=(0.353,) * 3,
    ),
    # Trained on 2,040 images, as usual where small sets are the subject.
    "flowers102": Source(
        {"splits": ("trnid", "valid")},
        {"splits": ("tstid",)},
        Flowers102,
        "flowers-102",
        "get 102flowers.tgz, imagelabels.mat and setid.mat from "
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
        {"flowers-102/102flowers.tgz": "flowers-102/jpg"},
    ),
    "pets": Source(
        {"split": "trainval"},
        {"split": "test"},
        datasets.OxfordIIITPet,
        "oxford-iiit-pet",
        "get images.tar.gz and annotations.tar.gz from "
        "https://www.robots.ox.ac.uk/~vgg/data/pets",
        {
            f"oxford-iiit-pet/{part}.tar.gz": f"oxford-iiit-pet/{part}"
            for part in ("images", "annotations")
        },
    ),
    "food101": Source(
        {"split": "train"},
        {"split": "test"},
        datasets.Food101,
        "food-101",
        "get food-101.tar.gz from "
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
        {"food-101.tar.gz": "food-101"},
    ),
    "imagenet": Source(
        hint="get it from https://image-net.org and sort it as train/<wnid>/ and "
        "val/<wnid>/"
    ),
    "inaturalist": Source(
        "2021_train",
        "2021_valid",
        path="2021_train/ and 2021_valid/",
        hint="get the archives of the 2021 competition from "
        "https://github.com/visipedia/inat_comp, and unpack train as 2021_train/, "
        "val as 2021_valid/",
    ),
    **{f"domainnet-{domain}": _domainnet(domain) for domain in DOMAINS},
    "folder": Source(),
}
VOC2012 = Source(
    {"year": "2012", "image_set": "train"},
    {"year": "2012", "image_set": "val"},
    datasets.VOCSegmentation,
    "VOCdevkit/VOC2012",
    "get VOCtrainval_11-May-2012.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2012",
    {"VOCtrainval_11-May-2012.tar": "VOCdevkit"},
)
VOID = 255  # the mark of pixels that are neither object nor background
# Data set with masks of the objects -> what a number in them means: 0 for background,
# VOID, or the object. VOC's objects are its classes; pets' trimaps have 1 for the pet, 2
# for the rest and 3 for the border.
MASKS = {
    "voc2012": {number: number for number in range(21)} | {255: VOID},
    "pets": {1: 1, 2: 0, 3: VOID},
    "shapes": {0: 0, 1: 1},
    "fashion-mnist": {0: 0, 1: 1},
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


class Images(Dataset):
    """(image, label) pairs, of images in memory or in files.

    Attributes:
        images: by index, uint8 arrays (height, width, 3) or (height, width), uint8
            tensors (3, height, width), or paths of files.
        targets: int64 (n), the index of the class in `classes`.
        classes: names.
        transform: applied to each image as it is read: PIL images, but for tensors.
    """

    def __init__(
        self,
        images: object,
        targets: Sequence[int],
        classes: Iterable[str],
        transform: Callable | None = None,
    ) -> None:
        self.images, self.classes, self.transform = images, list(classes), transform
        self.targets = torch.as_tensor(targets).long()

    def __len__(self) -> int:
        return len(self.targets)

    def listed(self) -> "Images":
        """The same, once its files are listed."""
        return self

    def __getitem__(self, index: int) -> tuple[object, int]:
        image = self.images[index]
        if isinstance(image, np.ndarray):
            image = v2.functional.to_pil_image(image)
        elif not isinstance(image, torch.Tensor):
            image = open_image(image)
        if self.transform is not None:
            image = self.transform(image)
        return image, int(self.targets[index])


def open_image(path: str | os.PathLike) -> object:
    """The image in a file, PIL in RGB.

    Raises:
        OSError: there is none, or it is damaged; the message names the file.
    """
    with _naming(f"the image {path}"):
        return default_loader(path)


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Decoders raise almost anything on a damaged file, and seldom its name."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition(" <_io")[0]
        raise OSError(f"{what} cannot be read ({reason})") from error


class Shapes(Images):
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
        images = torch.empty(count, 3, SHAPES_SIZE, SHAPES_SIZE, dtype=torch.uint8)
        super().__init__(images, torch.arange(count) % len(SHAPES), SHAPES, transform)
        self.masks = torch.empty(count, SHAPES_SIZE, SHAPES_SIZE, dtype=torch.bool)
        for number, inside in enumerate(SHAPES.values()):
            rows = (self.targets == number).nonzero().flatten()
            drawn = draw_shapes(inside, len(rows), generator)
            self.images[rows], self.masks[rows] = drawn


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
    name: str, data_dir: str | os.PathLike, split: str, transform: Callable | None
) -> Images:
    """A split of a data set; downloaded if it is not there and torchvision can.

    Args:
        name: a key of `DATASETS`.
        data_dir: where data sets lie.
        split: "train" or "test".
        transform: applied to each image, PIL or uint8 (C, H, W), as it is read.

    Raises:
        ValueError: the name is unknown, or the files are not what they should be.
        FileNotFoundError: the data set is not there and cannot be downloaded.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(DATASETS)}")
    if name == "shapes":
        return Shapes(split, transform)
    images = _read(name, DATASETS[name], Path(data_dir), split)
    images.transform = transform
    return images


def _read(
    name: str, source: Source, data_dir: Path, split: str, pairs: bool = False
) -> Dataset:
    """What lies in the files of a data set: `Images`, or torchvision's own pairs.

    Raises: as `load_dataset`.
    """
    where = " and ".join(str(data_dir / part) for part in source.path.split(" and "))
    try:
        for archive, unpacked in source.archives.items():
            if (data_dir / archive).is_file() and not (data_dir / unpacked).exists():
                _unpack(data_dir / archive, data_dir / unpacked)
        if source.torchvision:
            found = _torchvision(name, source, data_dir, split)
            return found if pairs else _images(found)
        if source.train.endswith(".txt"):
            return _lists(data_dir, source, split)
        return _folders(data_dir, source, split)
    except MissingError as error:
        packed = ", ".join(str(data_dir / archive) for archive in source.archives)
        where += f", or packed at {packed}" if packed else ""
        raise FileNotFoundError(
            f"data set {name} was looked for at {where}, but {error}; {source.hint}, "
            "or name another place with --data-dir"
        ) from error
    except READING_ERRORS as error:
        message = f"data set {name} at {where} cannot be used: {error}"
        raise ValueError(message) from error


class MissingError(Exception):
    """A data set is not where it was looked for."""


# What readers of archives, pickles and arrays raise on files that are not what they seem.
READING_ERRORS = (OSError, EOFError, KeyError, ValueError, TypeError, IndexError)
READING_ERRORS += (pickle.UnpicklingError, tarfile.TarError, zlib.error, struct.error)
READING_ERRORS += (zipfile.BadZipFile,)
CODEC = ("_codecs", "encode")  # how pickles of Python 3 hold the bytes of Python 2


def _folders(data_dir: Path, source: Source, split: str) -> Images:
    """Splits that are folders, each of a folder for every class.

    To test, one of them is enough, or for `folder` the classes' folders by themselves.
    """
    train, test = (data_dir / part for part in (source.train, source.test))
    parts = [train, test] if split == "train" else [test]
    if split == "test" and source == DATASETS["folder"] and data_dir.is_dir():
        parts = parts if train.is_dir() or test.is_dir() else [data_dir]
    for part in parts:
        if not part.is_dir():
            raise MissingError(f"there is no {part}")
    classes = [set(find_classes(part)[0]) for part in parts]
    if odd := sorted(set.union(*classes) - set.intersection(*classes)):
        both = f"{source.train}/ and {source.test}/"
        raise ValueError(f"{both} differ in classes: {', '.join(odd[:5])}")
    found = datasets.ImageFolder(parts[0])
    return Images([path for path, _ in found.samples], found.targets, found.classes)


def _lists(data_dir: Path, source: Source, split: str) -> Images:
    """Splits that are text files: on each line a path, <domain>/<class>/<file>, a label."""
    splits, names = {}, {}
    for part, file in (("train", source.train), ("test", source.test)):
        if not (data_dir / file).is_file():
            raise MissingError(f"there is no {data_dir / file}")
        lines = (data_dir / file).read_text().splitlines()
        splits[part] = [line.rsplit(" ", 1) for line in lines if line.strip()]
        for path, label in splits[part]:
            name = Path(path).parent.name
            if names.setdefault(int(label), name) != name:
                raise ValueError(f"label {label} is of {names[int(label)]} and {name}")
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"its labels are not 0 to {len(names) - 1}")
    paths, labels = zip(*splits[split])
    if not (data_dir / paths[0]).is_file():
        raise MissingError(f"there is no {data_dir / paths[0]}")
    classes = [names[label] for label in range(len(names))]
    files = [str(data_dir / path) for path in paths]
    return Images(files, [int(label) for label in labels], classes)


def _torchvision(name: str, source: Source, data_dir: Path, split: str) -> Dataset:
    """What a class of torchvision reads, first without, then with a download."""
    options = {"root": data_dir, **getattr(source, split)}
    found = None
    for read in (source.torchvision, partial(_read_unchecked, name, source)):
        if found is None:
            # Not there, or not the original files.
            with contextlib.suppress(RuntimeError, FileNotFoundError):
                found = read(**options)
    if found is None:
        print(f"{name} is not in {data_dir}; trying to download it", flush=True)
        target = data_dir / source.path.split(" and ")[0]
        folders = [target, *target.parents[: len(target.parents) - 1]]
        made = [folder for folder in folders if not folder.exists()]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found = source.torchvision(**options, download=True)
        except (OSError, RuntimeError) as error:
            for folder in made:  # as far as it is empty
                with contextlib.suppress(OSError):
                    folder.rmdir()
            reason = f"is not there and the download failed ({error})"
            raise MissingError(reason) from error
    return found


def _images(found: Dataset) -> Images:
    parts = vars(found)  # which have no common names
    images, targets = (
        next(parts[key] for key in keys if key in parts)
        for keys in (
            ("data", "_image_files", "_images"),
            ("targets", "labels", "_labels"),
        )
    )
    if isinstance(images, torch.Tensor):
        images = images.numpy()
    if isinstance(images, np.ndarray) and images.shape[1] == 3:  # channels first
        images = images.transpose(0, 2, 3, 1)
    if not hasattr(found, "classes"):  # STL10 without its class_names.txt
        raise ValueError("its list of class names is missing")
    return Images(images, targets, found.classes)


def _read_unchecked(
    name: str, source: Source, root: Path, **options: object
) -> Dataset:
    """Read files that fail the checksums: a subset, or a relabelled variant."""
    reader = source.torchvision
    dataset = reader.__new__(reader)
    if isinstance(dataset, datasets.CIFAR10):
        # The checksums guard against pickles that execute code, so this has to instead.
        files = [file for file, _ in reader.train_list + reader.test_list]
        for file in [*files, reader.meta["filename"]]:
            path = root / reader.base_folder / file
            if path.is_file():
                with path.open("rb") as opened:
                    _ArraysOnly(opened, encoding="latin1").load()
        dataset.meta = reader.meta | {"md5": None}
    dataset._check_integrity = lambda: True
    dataset.__init__(root, **options)
    print(f"{name} in {root} lacks the original's checksums; used as it is", flush=True)
    return dataset


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of arrays, lists and strings, and refuses whatever wants to run."""

    def find_class(self, module: str, name: str) -> object:
        arrays = name in ("_reconstruct", "_frombuffer", "ndarray", "dtype")
        if (module.split(".")[0] == "numpy" and arrays) or (module, name) == CODEC:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants to execute {module}.{name}")


def _unpack(archive: Path, target: Path) -> None:
    """Unpack whole or not at all: elsewhere first, then moved.

    Raises:
        OSError: the disk is full, or the like.
        ValueError: the archive is damaged.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        try:
            extract_archive(str(archive), scratch)
            (Path(scratch) / target.name).rename(target)
        except READING_ERRORS as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            raise ValueError(
                f"{archive} is damaged or incomplete, as an interrupted download is: "
                f"delete it and get it again ({error})"
            ) from error


# The element types of a MATLAB file that hold numbers, and what they are in NumPy.
MAT_NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4"}
MAT_NUMBERS |= {9: "<f8", 12: "<i8", 13: "<u8"}
MAT_MATRIX, MAT_COMPRESSED = 14, 15
MAT_NUMERIC = range(6, 16)  # the classes of arrays of numbers


def read_mat(path: Path) -> dict[str, np.ndarray]:
    """The arrays of numbers in a MATLAB 5.0 MAT-file, by name; the rest is left out.

    Source: MathWorks, "MAT-File Format", the chapter on level 5. After a header of 128
    bytes come elements, each a type, a length and data; an array is an element whose
    data are elements: flags, dimensions, name, numbers by columns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError, struct.error, zlib.error: it is not such a file, or damaged.
    """
    contents = path.read_bytes()
    if contents[126:128] != b"IM":  # as a little-endian machine writes MI
        raise ValueError(f"{path.name} is not a MATLAB 5.0 MAT-file")
    arrays = {}
    for kind, data in _mat_elements(memoryview(contents)[128:]):
        if kind == MAT_COMPRESSED:
            ((kind, data),) = _mat_elements(memoryview(zlib.decompress(data)))
        parts = list(_mat_elements(data)) if kind == MAT_MATRIX else []
        # Fewer parts are empty, more are complex; the first byte of the flags is the class.
        if len(parts) == 4 and parts[0][1][0] in MAT_NUMERIC:
            _, (_, shape), (_, name), (numbers, data) = parts
            array = np.frombuffer(data, MAT_NUMBERS[numbers])
            shape = np.frombuffer(shape, "<i4")
            arrays[bytes(name).decode()] = array.reshape(shape, order="F")
    return arrays


def _mat_elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Type and data of each element."""
    while data:
        kind, length = struct.unpack_from("<II", data)
        short = kind >> 16  # the length of up to 4 bytes, in a tag that holds them too
        start, kind, length = 4 if short else 8, kind & 0xFFFF, short or length
        if start + length > len(data):
            raise ValueError("it is truncated")
        yield kind, data[start : start + length]
        # All but compressed elements are padded to 8 bytes.
        end = start + length
        data = data[end if kind == MAT_COMPRESSED else -(-end // 8) * 8 :]


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


# ------------------------------------------------- for evaluation: masks, corruptions


class Masked(Dataset):
    """(image, mask) pairs of one size, uint8: (3, height, width) and (height, width).

    The image is resized bilinearly and the mask to the nearest, both without keeping the
    aspect, as in the authors' code. The mask has 0 for the background, VOID, or the
    number of the object.

    Args:
        pairs: by index, (image, mask), PIL: torchvision's data set; or two tensors, of
            images, uint8 (n, C, h, w), and masks (n, h, w).
        size: height and width.
        meanings: what a number in the masks means, as in MASKS.

    Attributes:
        objects: the largest number of an object.
    """

    def __init__(
        self,
        pairs: Dataset | tuple[torch.Tensor, torch.Tensor],
        size: tuple[int, int],
        meanings: dict[int, int],
    ) -> None:
        self.pairs, self.size, self.meanings = pairs, list(size), meanings
        self.in_memory = isinstance(pairs, tuple)
        self.objects = max(meaning for meaning in meanings.values() if meaning != VOID)

    def __len__(self) -> int:
        return len(self.pairs[0] if self.in_memory else self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = self.pair(index)
        image = v2.functional.resize(image, self.size, v2.InterpolationMode.BILINEAR)
        if not self.in_memory:
            mask = v2.functional.pil_to_tensor(mask)[0]
        known = torch.zeros_like(mask, dtype=torch.uint8)
        seen = torch.zeros_like(mask, dtype=torch.bool)
        for number, meaning in self.meanings.items():
            seen |= mask == number
            known[mask == number] = meaning
        if not seen.all():
            odd = mask[~seen][0].item()
            raise ValueError(
                f"{self.names(index)} has {odd}, which means nothing there"
            )
        mask = v2.functional.resize(
            known[None], self.size, v2.InterpolationMode.NEAREST_EXACT
        )
        return AS_TENSOR(image), mask[0]

    def pair(self, index: int) -> tuple[object, object]:
        """The image and the mask as they are in the data set.

        Raises:
            OSError: a file cannot be read; the message names both.
        """
        if self.in_memory:
            return self.pairs[0][index], self.pairs[1][index]
        with _naming(self.names(index)):
            return self.pairs[index]

    def names(self, index: int) -> str:
        """A pair, in words."""
        if self.in_memory:
            return f"the mask {index}"
        parts = vars(self.pairs)  # which have no common names
        image = parts.get("images", parts.get("_images"))[index]
        mask = parts.get("targets", parts.get("_segs"))[index]
        return f"the image {image} or its mask {mask}"


AS_TENSOR = v2.Compose([v2.RGB(), v2.ToImage(), v2.ToPureTensor()])


def load_masks(name: str, data_dir: str | os.PathLike, size: tuple[int, int]) -> Masked:
    """The test images of a data set with the masks of their objects.

    VOC 2012 is its split val, and an object all pixels of a class (SegmentationClass);
    pets' objects are in its trimaps, whose border is void; fashion-mnist's are the
    pixels that are not 0.

    Args:
        name: a key of MASKS.
        data_dir: where data sets lie.
        size: height and width to resize images and masks to.

    Raises: as `load_dataset`.
    """
    if name == "shapes":
        shapes = Shapes("test")
        pairs = (shapes.images, shapes.masks)
    elif name == "fashion-mnist":
        images = torch.from_numpy(load_dataset(name, data_dir, "test", None).images)
        pairs = (images[:, None], images > 0)
    else:
        source = VOC2012
        if name == "pets":
            source = DATASETS[name]
            trimaps = source.test | {"target_types": "segmentation"}
            source = replace(source, test=trimaps)
        pairs = _read(name, source, Path(data_dir), "test", pairs=True)
    return Masked(pairs, size, MASKS[name])


class Folder(Images):
    """Images in a folder of folders named by class, which are yet to be listed."""

    def __init__(self, path: Path, transform: Callable | None) -> None:
        super().__init__([], [], find_classes(path)[0], transform)
        self.path = path

    def listed(self) -> Images:
        try:
            found = datasets.ImageFolder(self.path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.path}: {error}") from error
        files = [file for file, _ in found.samples]
        return Images(files, found.targets, found.classes, self.transform)


CORRUPTION_SEVERITIES = 5  # of an array of CIFAR-C


def load_corruptions(
    folder: str | os.PathLike, transform: Callable, array_transform: Callable
) -> dict[str, dict[int, Images]]:
    """Corrupted test images, by corruption and severity.

    Args:
        folder: in the layout of ImageNet-C, <corruption>/<severity>/<class>/; or in
            that of CIFAR-C, <corruption>.npy, uint8 (5 * n, height, width, 3), with the
            severities 1 to 5 one after the other, and labels.npy, (5 * n) or (n). Its
            classes have no names.
        transform, array_transform: applied to each image of these layouts.

    Returns:
        Sets to be `listed()` before use: ImageNet-C has 3.75 million files.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has neither layout, or its files are not what they should be.
    """
    folder, found = Path(folder), {}
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of corruptions at {folder}")
    for path in sorted(folder.glob("*.npy")):
        if path.stem != "labels":
            found[path.stem] = _severities(path, array_transform)
    for path in sorted(folder.glob("*/*/")):
        if path.name.isdigit():
            try:
                images = Folder(path, transform)
            except FileNotFoundError as error:
                raise ValueError(f"{path} has no folders of classes") from error
            found.setdefault(path.parent.name, {})[int(path.name)] = images
    if not found:
        raise ValueError(
            f"{folder} has neither <corruption>/<severity>/<class>/, as ImageNet-C, nor "
            "labels.npy and <corruption>.npy, as CIFAR-C"
        )
    return {name: dict(sorted(found[name].items())) for name in found}


def _severities(path: Path, transform: Callable) -> dict[int, Images]:
    """The severities in a file of CIFAR-C."""
    try:
        images = np.load(path, mmap_mode="r")
        labels = np.load(path.with_name("labels.npy"))
    except READING_ERRORS as error:
        raise ValueError(f"{path} or its labels.npy cannot be read: {error}") from error
    count, rest = divmod(len(images) if images.ndim else 0, CORRUPTION_SEVERITIES)
    if len(labels) == count:
        labels = np.tile(labels, CORRUPTION_SEVERITIES)
    right = images.ndim == 4 and images.shape[-1] == 3 and images.dtype == np.uint8
    if not right or rest or not count or len(labels) != len(images):
        raise ValueError(
            f"{path} is not uint8 (5 * n, height, width, 3) with as many labels: it is "
            f"{images.dtype} {images.shape}, and there are {len(labels)} labels"
        )
    parts = (slice(n * count, (n + 1) * count) for n in range(CORRUPTION_SEVERITIES))
    return {
        severity: Images(images[part], labels[part].astype(np.int64), [], transform)
        for severity, part in enumerate(parts, start=1)
    }


def list_images(path: str | os.PathLike) -> list[Path]:
    """An image file, or those in a folder and the folders in it, sorted.

    Raises:
        FileNotFoundError: there is no such file or folder, or no image in it.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder of images at {path}")
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    found = [file for file in files if is_image_file(file.name)]
    if not found:
        raise FileNotFoundError(f"there are no images in {path}")
    return found


def unreadable(dataset: Images | Masked) -> dict[int, str]:
    """Index and error of each item whose file cannot be read.

    Reads all of them, in threads, if they are in files.
    """
    masked = isinstance(dataset, Masked)
    if dataset.in_memory if masked else not isinstance(dataset.images, list):
        return {}

    def attempt(index: int) -> str:
        try:
            dataset[index]
        except OSError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        errors = threads.map(attempt, range(len(dataset)))
        return {index: error for index, error in enumerate(errors) if error}


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


def test_transform(img_size: int | tuple[int, int], *, crop: str) -> v2.Compose:
    """For testing: PIL or uint8 (C, height, width) to uint8 (3, *img_size), no chance.

    Args:
        img_size: height and width in pixels, or one number for both.
        crop: "resized" scales the image to cover 256/224 of img_size, without changing
            its aspect, and takes the centre, the ImageNet protocol; "center" takes the
            centre and resizes nothing; the others resize the whole image.
    """
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    steps: list[Callable] = [v2.RGB()]
    if crop == "resized":
        steps.append(partial(_cover, height * 256 // 224, width * 256 // 224))
    if crop in ("resized", "center"):
        steps.append(partial(_crop_center, height, width))
    else:
        steps.append(v2.Resize((height, width), v2.InterpolationMode.BICUBIC))
    return v2.Compose([*steps, v2.ToImage(), v2.ToPureTensor()])


def _cover(height: int, width: int, image: object) -> object:
    """Resize an image, with its aspect, to the smallest size that covers the given."""
    old_height, old_width = v2.functional.get_size(image)
    if old_width * height >= width * old_height:
        width = height * old_width // old_height
    else:
        height = width * old_height // old_width
    return v2.functional.resize(image, [height, width], v2.InterpolationMode.BICUBIC)


def _crop_center(height: int, width: int, image: object) -> object:
    old_height, old_width = v2.functional.get_size(image)
    if old_height < height or old_width < width:
        raise ValueError(
            f"no {height}x{width} pixels can be cropped from an image of "
            f"{old_height}x{old_width}; --crop whole resizes it"
        )
    return v2.functional.center_crop(image, [height, width])


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
    """(index, seed) of all items, in an order that follows from the epoch's seed.

    Whole batches only. Of W processes, number r takes every W-th batch from r on, so
    that W of them see in a step what one process sees in W batches.
    """

    def __init__(self, count: int, batch_size: int, rank: int, world_size: int) -> None:
        self.count, self.epoch_seed = count, 0
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.rounds = count // (batch_size * world_size)

    def __len__(self) -> int:
        return self.rounds * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.epoch_seed)
        order = torch.randperm(self.count, generator=generator)
        seeds = torch.randint(2**62, (self.count,), generator=generator)
        shape = (self.rounds, self.world_size, self.batch_size)
        mine = (x[: math.prod(shape)].view(shape)[:, self.rank] for x in (order, seeds))
        return zip(*(x.flatten().tolist() for x in mine))


def make_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    train: bool,
    workers: int,
    pin_memory: bool,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Batches of images, uint8 (B, 3, H, W), and labels, int64 (B).

    A training loader shuffles and leaves out what fills no batch. Set
    `loader.sampler.epoch_seed` before an epoch: it fixes all that loading leaves to
    chance, for any number of workers. These persist from epoch to epoch.

    Of `world_size` processes, number `rank` gets its share: of the batches in training,
    of the images in testing, each of them once.

    Raises:
        ValueError: a training set smaller than one batch for each process, or a test set
            smaller than one image for each.
    """
    count = len(dataset)
    if train and count < batch_size * world_size:
        times = f" times {world_size} processes" if world_size > 1 else ""
        raise ValueError(
            f"batch size {batch_size}{times} exceeds the {count} training images"
        )
    if count < world_size:
        raise ValueError(f"{count} test images are fewer than {world_size} processes")
    if train:
        sampler = EpochSampler(count, batch_size, rank, world_size)
        dataset = SeededItems(dataset)
    else:
        sampler = range(rank, count, world_size)
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # and not the one that the model draws from
    )


def decode_once(dataset: Images | Subset, limit: float) -> bool:
    """Decode image files into memory, in threads, if they take at most `limit` bytes.

    Returns:
        Whether it did: a set that is in memory already, or that is too large, by a
        sample of its images, is left as it is.

    Raises:
        OSError: an image cannot be read.
    """
    images = dataset.dataset if isinstance(dataset, Subset) else dataset
    wanted = dataset.indices if isinstance(dataset, Subset) else range(len(dataset))
    if not limit or not isinstance(images.images, list):
        return False

    def decode(index: int) -> np.ndarray:
        return np.asarray(open_image(images.images[index]))

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        sample = list(threads.map(decode, wanted[:: len(wanted) // DECODE_SAMPLE + 1]))
        if sum(each.nbytes for each in sample) / len(sample) * len(wanted) > limit:
            return False
        images.images = Decoded(dict(zip(wanted, threads.map(decode, wanted))))
    return True


DECODE_SAMPLE = 64


class Decoded:
    """Images by index, uint8 (height, width, 3), in one tensor: workers share it."""

    def __init__(self, images: dict[int, np.ndarray]) -> None:
        self.places, end = {}, 0
        for index, image in images.items():
            self.places[index] = (end, image.shape)
            end += image.size
        self.pixels = torch.empty(end, dtype=torch.uint8)
        for index in self.places:  # the arrays go as the tensor fills
            self[index][:] = images.pop(index)

    def __getitem__(self, index: int) -> np.ndarray:
        start, shape = self.places[index]
        return self.pixels.numpy()[start : start + math.prod(shape)].reshape(shape)


class Kept:
    """A loader whose batches stay in memory from its first complete pass on."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader, self.batches = loader, None

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self.batches is not None:
            yield from self.batches
            return
        batches = []
        for batch in self.loader:
            # What workers give lies in shared memory, of which there is little.
            batches.append([x if x.is_pinned() else x.clone() for x in batch])
            yield batch
        self.loader, self.batches = None, batches  # and its workers end


def normalizer(
    mean: Sequence[float], std: Sequence[float], device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The first step on the device: uint8 (B, 3, H, W) -> float32, standardized.

    Args:
        mean, std: of the channels, on the scale 0 to 1.
        device: where the images will be.
    """
    mean = 255 * torch.tensor(mean, device=device)[:, None, None]
    std = 255 * torch.tensor(std, device=device)[:, None, None]
    return lambda images: images.float().sub_(mean).div_(std)
