"""Scalars for TensorBoard, written at once and by this thread.

tensorboardX's SummaryWriter hands them to a thread of its own; a full disk ends that thread with a traceback, and the
training then waits for it without an end. Here every call ends with the numbers in the file, or with an error.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from utils.errors import UserError


class ScalarWriter:
    """One event file in `folder`, which is made if it is not there. Raises UserError where it cannot be written."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(self.folder / "events"))
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {error.strerror}") from error

    def add(self, values: Mapping[str, float], *, step: int) -> None:
        """Adds one value to each named curve at `step`."""
        try:
            for name, value in values.items():
                event = Event(step=step, summary=scalar(name, value))
                event.wall_time = time.time()
                self._events.write_event(event)
            self._events.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {error.strerror}") from error

    def close(self) -> None:
        self._events.close()
