"""Images as one picture, enlarged so that a person sees the pixels: a grid, a strip, a film."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

TILE = 64  # pixels that the longer side of a small image is enlarged to, at least
GAP = 2  # pixels between images
FRAME_MS, LAST_FRAME_MS = 60, 2000  # how long a frame of a film stands


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


def strip(moments: np.ndarray) -> np.ndarray:
    """[S, N, H, W, C] in [-1, 1] -> one picture: a row an image, its moments from left to right.

    Raises ValueError as `grid` does.
    """
    if moments.ndim != 5 or not len(moments):
        raise ValueError(
            f"moments have shape {list(moments.shape)}; give [S, N, H, W, C], S at least 1"
        )
    rows = moments.swapaxes(0, 1)
    return grid(rows.reshape(-1, *moments.shape[2:]), len(moments))


def png(picture: np.ndarray) -> bytes:
    """[H, W, 3] in 0..255 -> the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def gif(pictures: Sequence[np.ndarray]) -> bytes:
    """Pictures [H, W, 3] in 0..255 -> the bytes of a GIF that shows them one after another.

    Grey is kept exactly; colours are brought to 256 a frame. The last stands longer, then it
    begins again. Raises ValueError where there is no picture.
    """
    if not pictures:
        raise ValueError("a film needs at least one picture")
    frames = []
    for picture in pictures:
        image = Image.fromarray(picture)
        grey = (picture == picture[..., :1]).all()
        # No dithering: its dots would dance from frame to frame.
        frames.append(image.convert("L") if grey else image.quantize(dither=Image.Dither.NONE))
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=[FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS],
        loop=0,
    )
    return buffer.getvalue()
