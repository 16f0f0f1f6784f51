# SPDX-License-Identifier: MIT
"""Make a small dataset of clip art, with object masks, from a Debian package.

    apt-get install openclipart-png     # as root: 6,900 drawings, in folders by subject
    python .study/clipart.py DIR        # writes DIR/train, DIR/val and DIR/masks

Drawings are put on white, padded to a square of 64 pixels, and split 80 to 20 by a hash
of their names. A mask is where alpha is above 127. Excluded are drawings that cover less
than 5% or more than 90% of the square, a few of more than 100 megapixels, the folder
"unsorted", and subjects of which fewer than 50 drawings remain.
"""

import hashlib
import sys
from pathlib import Path

from PIL import Image, ImageOps

SOURCE = Path("/usr/share/openclipart/png")
SIZE = 64  # pixels
LARGEST = 100_000_000  # pixels; larger drawings take up to 2.5 GB of memory
Image.MAX_IMAGE_PIXELS = None  # Pillow would warn before this limit is applied


def read(path: Path) -> tuple[Image.Image, Image.Image] | None:
    """Return a drawing on white and its mask, of 0 and 255, or None if it is excluded."""
    with Image.open(path) as image:
        if image.width * image.height > LARGEST:
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
        files = [file for file in folder.rglob("*.png") if not file.is_symlink()]
        drawings = {file.name: both for file in sorted(files) if (both := read(file))}
        if len(drawings) < 50 or folder.name == "unsorted":
            continue
        for name, (drawing, mask) in drawings.items():
            digest = hashlib.md5(name.encode()).digest()
            split = "val" if digest[0] % 5 == 4 else "train"
            for part, image in {split: drawing, "masks": mask}.items():
                path = target / part / folder.name / name
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
        print(f"{folder.name}: {len(drawings)}", flush=True)


if __name__ == "__main__":
    main()
