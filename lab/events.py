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
SCALARS = ("loss", "images_per_second", "learning_rate")


def check_tensorboard() -> None:
    """Raise ImportError that says what to install, where tensorboard is not there."""
    try:
        importlib.import_module("tensorboard")
    except ImportError as error:
        raise ImportError(
            "--tensorboard needs the package tensorboard, which also shows what is written; "
            "pip install tensorboard"
        ) from error


class Events:
    """An event file of a run: three curves and the pictures of `--sample-every`."""

    def __init__(self, folder: Path, step: int) -> None:
        """Begin a file that goes on after `step`: TensorBoard drops what it has of later steps.

        Raises OSError.
        """
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._proto, self._summary = event_pb2, summary_pb2
        place = folder / EVENTS
        place.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        path = place / PATTERN.replace("*", f"{time.time():.6f}")
        self.writer = RecordWriter(path.open("xb"))
        self._write(file_version="brain.Event:2")
        if step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=step + 1, session_log=start)

    def _write(self, **content: Any) -> None:
        event = self._proto.Event(wall_time=time.time(), **content)
        self.writer.write(event.SerializeToString())
        self.writer.flush()  # so that TensorBoard shows a step as soon as it is done

    def add(self, record: Mapping[str, Any]) -> None:
        """Write the curves of one step, a line of `metrics.jsonl`. Raises OSError."""
        value = self._summary.Summary.Value
        values = [value(tag=tag, simple_value=record[tag]) for tag in SCALARS]
        self._write(step=record["step"], summary=self._summary.Summary(value=values))

    def picture(self, step: int, data: bytes) -> None:
        """Write the picture of a step, the bytes of a PNG file. Raises OSError."""
        width, height = Image.open(io.BytesIO(data)).size
        image = self._summary.Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=data
        )
        value = self._summary.Summary.Value(tag="samples", image=image)
        self._write(step=step, summary=self._summary.Summary(value=[value]))

    def close(self) -> None:
        """Close the file, though the disk be full."""
        with contextlib.suppress(OSError):
            self.writer.close()
