"""What TensorBoard shows of a run: its metrics and pictures, in TensorBoard's own files."""

import contextlib
import importlib
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

EVENTS = "tensorboard"  # folder of a run
PATTERN = "events.out.tfevents.*"  # what its files are called there
PROTO = "tensorboard.compat.proto.event_pb2"
RECORDS = "tensorboard.summary.writer.record_writer"
SCALARS = ("loss", "images_per_second", "learning_rate")


def check_tensorboard() -> None:
    """Raise ImportError that says what to install, where tensorboard is not there or not whole."""
    try:
        for name in (PROTO, RECORDS):
            importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"--tensorboard needs the package tensorboard, which also shows what is written "
            f"({error}); pip install tensorboard"
        ) from error


class Events:
    """An event file of a run: three curves and the pictures of `--sample-every`."""

    def __init__(self, folder: Path, step: int) -> None:
        """Begin a file that goes on after `step`: TensorBoard drops what it has of later steps.

        Raises OSError.
        """
        self._proto = importlib.import_module(PROTO)
        place = folder / EVENTS
        place.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        path = place / PATTERN.replace("*", f"{time.time():.6f}")
        self.writer = importlib.import_module(RECORDS).RecordWriter(path.open("xb"))
        self._write(file_version="brain.Event:2")
        if step:
            start = self._proto.SessionLog(status=self._proto.SessionLog.START)
            self._write(step=step + 1, session_log=start)

    def _write(self, **content: Any) -> None:
        event = self._proto.Event(wall_time=time.time(), **content)
        self.writer.write(event.SerializeToString())
        self.writer.flush()  # so that TensorBoard shows a step as soon as it is done

    def add(self, record: Mapping[str, Any]) -> None:
        """Write the curves of one step, a line of `metrics.jsonl`. Raises OSError."""
        content = [{"tag": tag, "simple_value": record[tag]} for tag in SCALARS]
        self._write(step=record["step"], summary={"value": content})

    def picture(self, step: int, data: bytes) -> None:
        """Write the picture of a step, the bytes of a PNG file. Raises OSError."""
        width, height = Image.open(io.BytesIO(data)).size
        image = {
            "height": height,
            "width": width,
            "colorspace": 3,  # red, green, blue
            "encoded_image_string": data,
        }
        self._write(step=step, summary={"value": [{"tag": "samples", "image": image}]})

    def close(self) -> None:
        """Close the file, though the disk be full."""
        with contextlib.suppress(OSError):
            self.writer.close()
