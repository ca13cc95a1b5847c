"""Images as one picture: a grid, enlarged so that a person sees the pixels."""

import io

import numpy as np
from PIL import Image

TILE = 64  # pixels that the longer side of a small image is enlarged to, at least
GAP = 2  # pixels between images


def to_bytes(images: np.ndarray) -> np.ndarray:
    """[N, H, W, C] in [-1, 1] -> the same shape in 0..255; what lies outside is clipped."""
    return np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """[N, H, W, C] in [-1, 1] -> one picture [H', W', 3] in 0..255, row by row, on white.

    Raises ValueError where C is neither 1 nor 3, an image holds NaN, or there is no image.
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images have shape {list(images.shape)}; give [N, H, W, C], N at least 1")
    count, height, width, channels = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images have {channels} channels; a picture needs 1 (grey) or 3 (colour)")
    if not np.isfinite(images).all():
        bad = int(np.argmin(np.isfinite(images).reshape(count, -1).all(1)))
        raise ValueError(f"image {bad} holds NaN or infinity; it cannot be shown")
    if columns < 1:
        raise ValueError(f"columns = {columns} is below 1; give at least 1")
    zoom = max(1, TILE // max(height, width))
    tiles = to_bytes(images).repeat(zoom, axis=1).repeat(zoom, axis=2)
    rows, columns = -(-count // columns), min(columns, count)
    high, wide = height * zoom + GAP, width * zoom + GAP
    picture = np.full((rows * high + GAP, columns * wide + GAP, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = (i // columns) * high + GAP, (i % columns) * wide + GAP
        picture[top : top + height * zoom, left : left + width * zoom] = tile
    return picture


def png(picture: np.ndarray) -> bytes:
    """[H, W, 3] in 0..255 -> the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()
