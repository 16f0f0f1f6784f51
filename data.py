# SPDX-License-Identifier: MIT
"""Datasets, augmentation and data loaders.

To add a dataset, add a row to `DATASETS`. Loaders give images as uint8 (B, 3, H, W) and
labels as int64 (B,); `normalizer` makes the images float on the device.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision import datasets
from torchvision.datasets.folder import is_image_file
from torchvision.transforms import v2

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BICUBIC, BILINEAR = v2.InterpolationMode.BICUBIC, v2.InterpolationMode.BILINEAR
NEAREST = v2.InterpolationMode.NEAREST_EXACT


@dataclass(frozen=True)
class Source:
    """A row of DATASETS: where to get a dataset, how to read its splits, its statistics.

    `train` and `test` are split arguments of the `reader`, of torchvision ("+" joins
    several), or else paths in the data directory: of class folders or a list of files.
    """

    url: str
    reader: Callable | None = None
    train: str | bool = "train"
    test: str | bool = "test"
    mean: tuple[float, ...] = IMAGENET_MEAN  # per channel, on the scale 0 to 1
    std: tuple[float, ...] = IMAGENET_STD


CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html"
FASHION = "https://github.com/zalandoresearch/fashion-mnist"
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
DATASETS = {
    "shapes": Source("", mean=(0.283,) * 3, std=(0.225,) * 3),
    "cifar10": Source(CIFAR, datasets.CIFAR10, True, False),
    "cifar100": Source(CIFAR, datasets.CIFAR100, True, False),
    "svhn": Source("http://ufldl.stanford.edu/housenumbers", datasets.SVHN),
    "stl10": Source("https://cs.stanford.edu/~acoates/stl10", datasets.STL10),
    "fashion-mnist": Source(
        FASHION, datasets.FashionMNIST, True, False, (0.286,) * 3, (0.353,) * 3
    ),
    "flowers102": Source(f"{OXFORD}/flowers/102", datasets.Flowers102, "train+val"),
    "pets": Source(f"{OXFORD}/pets", datasets.OxfordIIITPet, "trainval"),
    "food101": Source(
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101", datasets.Food101
    ),
    "imagenet": Source("https://image-net.org", test="val"),
    "inaturalist": Source(
        "https://github.com/visipedia/inat_comp", None, "2021_train", "2021_valid"
    ),
    "folder": Source("", test="val"),  # anyone's own images
}
DATASETS |= {
    f"domainnet-{domain}": Source(
        "https://ai.bu.edu/M3SDA", None, f"{domain}_train.txt", f"{domain}_test.txt"
    )
    for domain in ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
}
VOC2012 = Source(
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012",
    partial(datasets.VOCSegmentation, image_set="val"),
    test="2012",
)


# ----------------------------------------------------------------------------- images


@dataclass(eq=False)
class Images(Dataset):
    """(image, label) pairs. The transform gets a PIL image or a tensor."""

    images: Sequence  # paths, uint8 arrays (h, w) or (h, w, 3), or tensors (3, h, w)
    targets: torch.Tensor  # int64 (n,), indices into classes
    classes: list[str]  # names; empty if they are not known
    transform: Callable | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[object, int]:
        image = self.images[index]
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        elif not isinstance(image, torch.Tensor):
            image = open_image(image)
        if self.transform is not None:
            image = self.transform(image)
        return image, int(self.targets[index])


def open_image(path: str | os.PathLike) -> Image.Image:
    """Read an image as people see it: RGB, upright, transparency on white.

    Raise OSError, which names the file, if it cannot be read or if its pixels have no
    known scale, such as float and 32-bit integers.
    """
    image = _decode(path)
    # 16-bit PGM, and 16-bit PNG in older Pillow, have mode "I".
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise OSError(
            f"{path} cannot be read: its pixels (mode {image.mode}) have no known scale; "
            "save it with 8 or 16 bits"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _decode(path: str | os.PathLike) -> Image.Image:
    """Decode an image file and turn it upright. Decoders may raise any exception."""
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except Exception as error:
        raise OSError(f"{path} cannot be read: {error}") from error


def list_images(folder: str | os.PathLike) -> list[str]:
    """List the image files in a folder and its subfolders, sorted, without hidden ones.

    Raise FileNotFoundError if there are none.
    """

    def refuse(error: OSError) -> None:
        raise error  # os.walk would skip a folder that it may not read

    found = []
    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        names = [name for name in files if name[0] != "." and is_image_file(name)]
        found += [os.path.join(root, name) for name in names]
    if not found:
        raise FileNotFoundError(f"there are no images in {folder}")
    return sorted(found, key=os.path.split)


def list_classes(folder: Path) -> list[str]:
    """List the names of the folders in a folder, sorted, without hidden ones."""
    return sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())


# --------------------------------------------------------------------------- datasets


def load_dataset(
    name: str, data_dir: str | os.PathLike, split: str, transform: Callable | None
) -> Images:
    """Load a split, "train" or "test", of a dataset; torchvision downloads what it can.

    The transform is applied to each image, PIL or uint8 (C, H, W), as it is read. Raise
    FileNotFoundError if the dataset is neither in `data_dir` nor downloaded, or a class
    folder is empty; ValueError if class folders do not fit or SciPy is missing.
    """
    source, data_dir = DATASETS[name], Path(data_dir)
    part = getattr(source, split)
    if name == "shapes":
        images, _ = make_shapes(split)
    elif source.reader:
        images = _read_torchvision(name, source, data_dir, part)
    elif part.endswith(".txt"):
        images = _read_list(name, source, data_dir, part)
    else:
        images = _read_folder(name, source, data_dir, part)
    images.transform = transform
    return images


def _missing(name: str, source: Source, what: str) -> FileNotFoundError:
    where = f"get it from {source.url}, or " if source.url else ""
    return FileNotFoundError(f"{name}: {what}; {where}set --data-dir")


def _open(name: str, source: Source, data_dir: Path, part: str | bool) -> Dataset:
    """Open a dataset of torchvision, which unpacks or downloads it if it has to."""
    try:
        try:
            return source.reader(data_dir, part)
        except (RuntimeError, FileNotFoundError):
            print(f"{name} is not in {data_dir}: downloading it", flush=True)
            return source.reader(data_dir, part, download=True)
    except ImportError as error:
        raise ValueError(f"{name} requires SciPy: pip install scipy") from error
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        failed = f"not in {data_dir}, and the download failed ({reason})"
        raise _missing(name, source, failed) from error


def _read_torchvision(
    name: str, source: Source, data_dir: Path, part: str | bool
) -> Images:
    """Collect images and labels, whose attributes have several names in torchvision."""
    images, labels = [], []
    for each in part.split("+") if isinstance(part, str) else [part]:
        opened = _open(name, source, data_dir, each)
        found = vars(opened)
        pixels = next(
            found[key] for key in ("data", "_image_files", "_images") if key in found
        )
        if not isinstance(pixels, list):  # one array or tensor
            pixels = np.asarray(pixels)
            if pixels.shape[1] == 3:  # channels first
                pixels = pixels.transpose(0, 2, 3, 1)
        images.extend(pixels)
        labels.extend(
            next(found[key] for key in ("targets", "labels", "_labels") if key in found)
        )
    classes = getattr(opened, "classes", range(10))  # SVHN's are the digits
    return Images(images, torch.as_tensor(labels), [str(each) for each in classes])


def _read_list(name: str, source: Source, data_dir: Path, part: str) -> Images:
    """Read a list of DomainNet: on each line <domain>/<class>/<file> and a label."""
    if not (data_dir / part).is_file():
        raise _missing(name, source, f"there is no {data_dir / part}")
    lines = (data_dir / part).read_text().splitlines()
    files, labels = zip(*(line.rsplit(" ", 1) for line in lines if line.strip()))
    labels = [int(label) for label in labels]
    classes = [""] * (max(labels) + 1)  # a list may have no image of a class
    for file, label in zip(files, labels):
        classes[label] = Path(file).parent.name
    return Images([data_dir / file for file in files], torch.tensor(labels), classes)


def _read_folder(name: str, source: Source, data_dir: Path, part: str) -> Images:
    """Read a folder of class folders. The classes are those of train/, if it exists."""
    folder, train = data_dir / part, data_dir / source.train
    if name == "folder" and folder != train and not (folder.is_dir() or train.is_dir()):
        folder = data_dir  # class folders alone, to evaluate
    if not folder.is_dir():
        raise _missing(name, source, f"there is no {folder} with class folders")
    return read_classes(folder, list_classes(train if train.is_dir() else folder))


def read_classes(folder: Path, classes: list[str]) -> Images:
    """Read a folder of class folders, and label its images by their places in `classes`."""
    own = list_classes(folder)
    if unknown := [name for name in own if name not in classes]:
        names = ", ".join(unknown[:5])
        raise ValueError(f"{folder} has classes that train/ does not have: {names}")
    if len(classes) < 2 or not own:
        raise ValueError(f"{folder} must have image folders of two classes or more")
    files, targets = [], []
    for name in own:
        found = list_images(folder / name)
        files += found
        targets += [classes.index(name)] * len(found)
    return Images(files, torch.tensor(targets), classes)


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


# Class -> whether the point (x, y) is in the shape, which fills about the unit disc; y
# points down. No class becomes another when it is rotated or flipped.
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


def make_shapes(split: str) -> tuple[Images, torch.Tensor]:
    """Draw the dataset `shapes`, the same images in every run.

    Solid shapes of random color, place, size and rotation over textured, cluttered
    backgrounds, one in each image, cycling through eight classes. Return the images of
    the split, uint8 (n, 3, S, S) with S = SHAPES_SIZE, and masks, bool (n, S, S).
    """
    generator = torch.Generator().manual_seed(list(SHAPES_COUNT).index(split))
    count = SHAPES_COUNT[split] // len(SHAPES)  # of each class
    drawn = [_draw(inside, count, generator) for inside in SHAPES.values()]
    images, masks = (torch.stack(each, 1).flatten(0, 1) for each in zip(*drawn))
    targets = torch.arange(len(images)) % len(SHAPES)
    return Images(images, targets, list(SHAPES)), masks


def _draw(
    inside: Callable, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one shape n = `count` times: uint8 (n, 3, S, S), and masks, bool (n, S, S)."""

    def uniform(low: float, high: float, channels: int = 1) -> torch.Tensor:
        sample = torch.rand(count, channels, 1, 1, generator=generator)
        return low + (high - low) * sample

    def frame(scale: torch.Tensor, room: float, points: int) -> tuple:
        """Coordinates of a points x points grid, as seen from a randomly placed object."""
        line = (torch.arange(points) + 0.5) * 2 / points - 1  # the image spans -1 to 1
        angle = uniform(0, 2 * math.pi)
        x = line - uniform(-room, room)  # (n, 1, 1, points)
        y = line[:, None] - uniform(-room, room)  # (n, 1, points, 1)
        cos, sin = angle.cos(), angle.sin()
        return (cos * x + sin * y) / scale, (cos * y - sin * x) / scale

    size = SHAPES_SIZE
    color = uniform(0, 0.4, 3)
    image = color
    for _ in range(2):  # texture: two gratings of any direction and wavelength
        x, _ = frame(uniform(0.02, 0.15), 1, size)
        image = image + uniform(-0.12, 0.12, 3) * x.sin()
    for _ in range(6):  # clutter: small bars of any color
        x, y = frame(uniform(0.05, 0.16), 1, size)
        image = torch.where(_bar(x, y, 2.4, 1), uniform(0, 1, 3), image)
    x, y = frame(uniform(0.45, 0.7), 0.3, 2 * size)
    alpha = F.avg_pool2d(inside(x, y).float(), 2)  # drawn at twice the size: smooth
    image = image.lerp(color + uniform(0.3, 0.7, 3), alpha)  # brighter than behind it
    image = image + 0.04 * torch.randn(image.shape, generator=generator)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), alpha[:, 0] > 0.5


def balanced_subset(dataset: Images, size: int, seed: int) -> Subset:
    """Return a random subset with as many images of each class, as far as possible."""
    count = len(dataset)
    if size > count:
        raise ValueError(f"--train-size {size} exceeds the {count} training images")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator).tolist()
    # The first image of each class, in random order, then the second ones, and so on.
    seen, rank = Counter(), {}
    for index, label in zip(order, dataset.targets[order].tolist()):
        rank[index] = seen[label]
        seen[label] += 1
    return Subset(dataset, sorted(sorted(order, key=rank.get)[:size]))


# ------------------------------------------------- for evaluation: masks, corruptions

VOID = 255  # in a mask, pixels that are neither object nor background
OBJECTS = 20  # kinds of objects in VOC 2012; in others all objects are of kind 1
MASKS = ("voc2012", "pets", "shapes", "fashion-mnist", "folder")
AS_TENSOR = v2.Compose([v2.RGB(), v2.ToImage(), v2.ToPureTensor()])


@dataclass(eq=False)
class Masked(Dataset):
    """(image, mask) pairs of one size, uint8: (3, height, width) and (height, width).

    Both are resized without keeping the aspect ratio, as in the authors' code. A mask has
    0 for the background, 1 to OBJECTS for the kinds of objects, or VOID.
    """

    images: Sequence  # by index: paths, or uint8 tensors (C, h, w)
    masks: Sequence  # paths, or tensors (h, w)
    size: tuple[int, int]  # height and width
    meaning: torch.Tensor  # uint8, by the value in a mask
    own: bool  # a user's own masks, whose sizes may be wrong

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = self.images[index], self.masks[index]
        if not isinstance(image, torch.Tensor):
            image, mask = open_image(image), _decode(mask)
            if self.own and mask.size != image.size:
                name = self.masks[index]
                raise ValueError(f"{name} and its image differ in size, once upright")
            mask = mask if mask.mode == "P" else mask.convert("RGB")  # without alpha
            mask = v2.functional.pil_to_tensor(mask).amax(0)
        mask = self.meaning[mask.long()]
        image = v2.functional.resize(image, list(self.size), BILINEAR)
        mask = v2.functional.resize(mask[None], list(self.size), NEAREST)
        return AS_TENSOR(image), mask[0]


def load_masks(
    name: str,
    data_dir: str | os.PathLike,
    size: tuple[int, int],
    masks_dir: str | os.PathLike | None = None,
) -> Masked:
    """Load the test images of a dataset in MASKS, with the masks of their objects.

    An object is, in VOC 2012 val, all pixels of a class; in Pets, the pet of the trimap,
    whose border is void; else all pixels that are not 0. For "folder", the images of
    val/, or else of `data_dir`, have PNG masks of the same names in `masks_dir`.
    """
    meaning = torch.tensor([0] + 255 * [1], dtype=torch.uint8)
    if name == "shapes":
        shapes, masks = make_shapes("test")
        images = shapes.images
    elif name == "folder":
        folder = Path(data_dir, DATASETS[name].test)
        folder = folder if folder.is_dir() else Path(data_dir)
        images = list_images(folder)
        masks = [Path(masks_dir, os.path.relpath(image, folder)) for image in images]
        masks = [mask.with_suffix(".png") for mask in masks]
        if missing := [mask for mask in masks if not mask.is_file()]:
            raise FileNotFoundError(f"there is no mask {missing[0]}")
    else:
        source = VOC2012 if name == "voc2012" else DATASETS[name]
        opened = _open(name, source, Path(data_dir), source.test)
        if name == "fashion-mnist":
            images, masks = opened.data[:, None], opened.data
        elif name == "pets":
            images, masks = opened._images, opened._segs
            meaning = torch.tensor([VOID, 1, 0, VOID], dtype=torch.uint8)
        else:
            images, masks = opened.images, opened.masks
            meaning = torch.arange(256, dtype=torch.uint8)
    return Masked(images, masks, size, meaning, own=name == "folder")


def load_corruptions(
    folder: str | os.PathLike,
) -> dict[str, dict[int, Callable[[], Images]]]:
    """Find corrupted test images: functions that read them, by corruption and severity.

    The folder is in ImageNet-C's layout, <corruption>/<severity>/<class>/<image>, or in
    CIFAR-C's, without class names: <corruption>.npy, uint8 (5 * n, height, width, 3),
    severity by severity, and labels.npy, (5 * n,) or (n,).
    """
    found, classes = {}, None
    for path in sorted(Path(folder).glob("*/[1-5]")):
        classes = classes or list_classes(path)
        part = partial(read_classes, path, classes)
        found.setdefault(path.parent.name, {})[int(path.name)] = part
    for path in sorted(set(Path(folder).glob("*.npy")) - {Path(folder, "labels.npy")}):
        found[path.stem] = {n: partial(_read_array, path, n) for n in range(1, 6)}
    if not found:
        raise FileNotFoundError(
            f"{folder} has neither <corruption>/<severity>/<class>/, as ImageNet-C, nor "
            "<corruption>.npy and labels.npy, as CIFAR-C"
        )
    return found


def _read_array(path: Path, severity: int) -> Images:
    images = np.load(path, mmap_mode="r")
    labels = np.load(path.with_name("labels.npy"))
    count, rest = divmod(len(images), 5)
    fits = images.dtype == np.uint8 and images.shape[-1] == 3 and not rest
    if not fits or len(labels) not in (count, 5 * count):
        raise ValueError(f"{path} and its labels.npy are not in CIFAR-C's layout")
    part = slice((severity - 1) * count, severity * count)
    return Images(images[part], torch.from_numpy(np.tile(labels, 5)[part]).long(), [])


# ------------------------------------------------------------------ images to batches


class PixelErasing(v2.RandomErasing):
    """Random erasing with noise (arXiv 1708.04896), on uint8 images.

    The noise is standard normal after normalization, as in the authors' recipe, except
    that it is clipped to the range of uint8.
    """

    def __init__(self, p: float, mean: tuple, std: tuple) -> None:
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
    """Augment: an image, PIL or uint8 (C, H, W), to uint8 (3, img_size, img_size).

    `crop` is "resized" (a random area of 8 to 100%, resized), "padded" (a random shift by
    up to an eighth of the side) or "whole". `rand_augment` is the magnitude of RandAugment
    (arXiv 1909.13719), from 1 to 10, or 0 for none. The mean color of dataset `name` fills
    what is uncovered.
    """
    source = DATASETS[name]
    fill = [round(255 * channel) for channel in source.mean]
    steps: list[Callable] = [v2.RGB()]
    if crop == "resized":
        steps.append(v2.RandomResizedCrop(img_size, interpolation=BICUBIC))
    else:
        steps.append(v2.Resize((img_size, img_size), BICUBIC))
    if crop == "padded":
        steps.append(v2.RandomCrop(img_size, padding=img_size // 8, fill=fill))
    steps.append(v2.RandomHorizontalFlip())
    if rand_augment:
        # As in timm, each of two operations is skipped at even odds, and magnitudes go up
        # to 10; torchvision's go up to 30.
        operation = v2.RandAugment(1, rand_augment, 11, BILINEAR, fill)
        steps += [v2.RandomApply([operation], p=0.5) for _ in range(2)]
    steps.append(v2.ToImage())
    if reprob:
        steps.append(PixelErasing(reprob, source.mean, source.std))
    return v2.Compose([*steps, v2.ToPureTensor()])


def test_transform(img_size: int, *, crop: str) -> v2.Compose:
    """Prepare for testing: PIL or uint8 (C, H, W) to uint8 (3, img_size, img_size).

    `crop` is "resized" (the center, after resizing to 256/224, the ImageNet protocol),
    or else the whole image is resized.
    """
    if crop == "resized":
        steps = [v2.Resize(img_size * 256 // 224, BICUBIC), v2.CenterCrop(img_size)]
    else:
        steps = [v2.Resize((img_size, img_size), BICUBIC)]
    return v2.Compose([v2.RGB(), *steps, v2.ToImage(), v2.ToPureTensor()])


def make_mix(mixup: float, cutmix: float, classes: int) -> Callable:
    """Return a function of (images, labels) that mixes both, by mixup or cutmix.

    Of both, each batch gets one at even odds; mixed labels are float (B, classes).
    """
    mixes = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
    mixes += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
    return v2.RandomChoice(mixes) if mixes else lambda *batch: batch


@dataclass(eq=False)
class SeededItems(Dataset):
    """Items by (index, seed): the seed makes augmentation independent of the workers."""

    dataset: Dataset

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        index, seed = key
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            return self.dataset[index]


@dataclass(eq=False)
class EpochSampler(Sampler):
    """(index, seed) of all items, in an order seeded by `epoch_seed`.

    Whole batches only. Rank r of W takes every W-th batch, from batch r on, so W processes
    see in a step what one process sees in W batches.
    """

    count: int
    batch_size: int
    rank: int
    world_size: int
    epoch_seed: int = 0

    def __len__(self) -> int:
        step = self.batch_size * self.world_size
        return self.count // step * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.epoch_seed)
        order = torch.randperm(self.count, generator=generator)
        seeds = torch.randint(2**62, (self.count,), generator=generator)
        shape = (-1, self.world_size, self.batch_size)
        whole = len(self) * self.world_size
        mine = (x[:whole].view(shape)[:, self.rank].flatten() for x in (order, seeds))
        return zip(*(x.tolist() for x in mine))


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
    """Make a loader of images, uint8 (B, 3, H, W), and labels, int64 (B,).

    A training loader shuffles, and drops the last images if they do not fill a batch. Set
    `loader.sampler.epoch_seed` before each epoch: all randomness follows from it, for any
    number of workers. Each of `world_size` processes gets its share, of the batches in
    training, else of the images. Raise ValueError if there is none for one of them.
    """
    if len(dataset) < (batch_size if train else 1) * world_size:
        kind = f"--batch-size {batch_size}" if train else "one image"
        times = f" for each of {world_size} processes" if world_size > 1 else ""
        split = "training" if train else "test"
        raise ValueError(f"{kind}{times} exceeds the {len(dataset)} {split} images")
    if train:
        sampler = EpochSampler(len(dataset), batch_size, rank, world_size)
        dataset = SeededItems(dataset)
    else:
        sampler = range(rank, len(dataset), world_size)
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # leaves the global one untouched
    )


def normalizer(
    mean: Sequence[float], std: Sequence[float], device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that normalizes images on the device, uint8 to float32.

    `mean` and `std` are per channel, on the scale 0 to 1.
    """
    mean = 255 * torch.tensor(mean, device=device)[:, None, None]
    std = 255 * torch.tensor(std, device=device)[:, None, None]
    return lambda images: images.float().sub_(mean).div_(std)
