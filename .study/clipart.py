# SPDX-License-Identifier: MIT
"""Make a small dataset of clip art, with masks of what is drawn, from a Debian package.

    apt-get install openclipart-png     # as root: 8,121 drawings, in folders by subject
    python .study/clipart.py DIR        # writes DIR/train, DIR/val and DIR/masks

Drawings are put on white, padded to a square of 64 pixels, and split 80 to 20 by a hash
of their names. A mask is where a drawing is more opaque than transparent. Excluded are
links to other drawings, drawings that cover less than 5 or more than 90 percent of the
square, the folder "unsorted", and folders of which fewer than 50 drawings remain.
"""

import hashlib
import sys
from pathlib import Path

from PIL import Image, ImageOps

SOURCE = Path("/usr/share/openclipart/png")
SIZE = 64  # pixels
LARGEST = 100_000_000  # pixels; the few larger drawings take up to 2.5 GB of memory
Image.MAX_IMAGE_PIXELS = None  # Pillow would warn before this limit is applied


def read(path: Path) -> tuple[Image.Image, Image.Image] | None:
    """Return a drawing on white and its mask, of 0 and 255, or None if it is excluded."""
    with Image.open(path) as image:
        if path.is_symlink() or image.width * image.height > LARGEST:
            return None
        image = image.convert("RGBA")
    image = ImageOps.pad(image, (SIZE, SIZE), color=(255, 255, 255, 0))
    mask = image.getchannel("A").point(lambda alpha: 255 * (alpha > 127))
    if not 0.05 <= mask.histogram()[255] / SIZE**2 <= 0.9:
        return None
    white = Image.new("RGBA", (SIZE, SIZE), "white")
    return Image.alpha_composite(white, image).convert("RGB"), mask


def main() -> None:
    if len(sys.argv) != 2 or not SOURCE.is_dir():
        sys.exit(__doc__)
    target = Path(sys.argv[1])
    for folder in sorted(SOURCE.iterdir()):
        found = {file.name: read(file) for file in sorted(folder.rglob("*.png"))}
        drawings = {name: both for name, both in found.items() if both}
        if len(drawings) < 50 or folder.name == "unsorted":
            continue
        for name, both in drawings.items():
            last_fifth = hashlib.md5(name.encode()).digest()[0] % 5 == 4
            for part, image in zip(("val" if last_fifth else "train", "masks"), both):
                path = target / part / folder.name / name
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
        print(f"{folder.name}: {len(drawings)}", flush=True)


if __name__ == "__main__":
    main()
