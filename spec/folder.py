"""S11: a person's own images, from a folder."""

import os
import warnings
from pathlib import Path

import numpy as np

from spec.archives import Progress

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
# Images too, which are not read: named as such, so that none is left out without a word.
OTHERS = (".avif", ".heic", ".heif", ".jp2", ".jxl", ".tif", ".tiff")
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}
NAMED = 10  # files that one error names


def _images(folder: Path) -> list[Path]:
    """Every image in a folder and below it, by name; hidden files and folders are left out."""

    def stop(error: OSError):
        raise ValueError(f"{error.filename} cannot be opened: {error.strerror}") from error

    found, seen = [], set()
    for place, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(place)) in seen:  # a link back to where the walk has been
            folders.clear()
            continue
        seen.add(real)
        found += [
            Path(place, name)
            for name in files
            if name.lower().endswith(SUFFIXES + OTHERS) and not name.startswith(".")
        ]
    return sorted(found, key=Path.as_posix)


def find_images(folder: Path) -> tuple[list[Path], list[int]]:
    """The images of a folder and their labels: its subfolders by name, 0 where it has none.

    Raises ValueError for a folder that is missing or empty, that has images both beside and in
    subfolders, or whose subfolders are the parts of a split.
    """
    if not folder.is_dir():
        raise ValueError(f"folder {folder} is not there; give the path of one that holds images")
    paths = _images(folder)
    if not paths:
        raise ValueError(
            f"folder {folder} holds no images, nor do its subfolders; read are "
            f"{', '.join(suffix[1:] for suffix in SUFFIXES)}"
        )
    tops = [path.relative_to(folder).parts[:-1][:1] for path in paths]
    classes = sorted(set(tops))
    if () in classes and len(classes) > 1:
        raise ValueError(
            f"folder {folder} holds {tops.count(())} images beside its subfolders "
            f"{_some([top[0] for top in classes if top])}, each of which is a class; move them "
            "into one"
        )
    if all(top and top[0].lower() in SPLITS for top in classes):
        names = [top[0] for top in classes]
        raise ValueError(
            f"folder {folder} has the subfolders {', '.join(names)}, which look like parts of a "
            f"split, not like classes; give one of them, such as folder:{folder / names[0]}"
        )
    return paths, [classes.index(top) for top in tops]


def _some(names: list[str], mark: str = ", ") -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMED
    return mark.join(names[:NAMED]) + (f"{mark}and {more} more" if more > 0 else "")


def read_image(path: Path, image_shape: tuple[int, int, int]) -> np.ndarray:
    """One image [H, W, C] uint8: upright, on white, cropped around its centre, resized.

    The first frame, where there are several. Raises whatever Pillow raises for a broken file.
    """
    from PIL import Image, ImageOps

    height, width, channels = image_shape
    with warnings.catch_warnings():
        # Of a very large image; from twice that size on, Pillow refuses it.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = Image.open(path, formats=FORMATS)
    with opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits, which convert() would cut off at 255
            grey = np.asarray(image).astype(np.int32)
            grey = np.where(grey == image.info.get("transparency", -1), 65535, grey)
            image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("L" if channels == 1 else "RGB")
        fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted).reshape(image_shape)


def _fault(error: Exception) -> str:
    """Why an image cannot be read, without the path that the error may repeat."""
    if type(error).__name__ == "UnidentifiedImageError":
        return f"no {', '.join(FORMATS)} image"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def load_folder(
    path: str, image_shape: tuple[int, int, int] | None, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W, C] uint8 and labels [N] int64 of a folder of images.

    Raises ValueError for a folder as in `find_images`, a wrong shape, and once for all images
    that cannot be read; ImportError that says what to install.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError("images are read with Pillow; pip install pillow") from error
    if not path:
        raise ValueError("dataset 'folder:' names no folder; write folder:PATH")
    if image_shape is None:
        raise ValueError(f"dataset 'folder:{path}' needs an image_shape: height, width, channels")
    if len(image_shape) != 3 or min(image_shape) < 1 or image_shape[2] not in (1, 3):
        raise ValueError(
            f"image_shape = {list(image_shape)} is not height, width and channels of an image; "
            "channels are 1 (grey) or 3 (colour)"
        )
    folder = Path(path).expanduser()
    paths, labels = find_images(folder)
    images = np.empty((len(paths), *image_shape), np.uint8)
    faults = []
    for i, file in enumerate(paths):
        progress(f"reading images of {folder}", i, len(paths))
        try:
            images[i] = read_image(file, image_shape)
        except Exception as error:  # a decoder may raise anything on a broken file
            faults.append(f"{file.relative_to(folder).as_posix()} ({_fault(error)})")
    progress(f"reading images of {folder}", len(paths), len(paths))
    if faults:
        raise ValueError(
            f"folder {folder}: {len(faults)} of {len(paths)} images cannot be read: "
            f"{_some(faults, '; ')}. Mend, convert or remove them"
        )
    return images, np.array(labels, np.int64)
