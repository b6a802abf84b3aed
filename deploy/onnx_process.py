"""The process in which an ONNX file of a stranger is opened and run: `python -m deploy.onnx_process THREADS BYTES`.

It may take so many BYTES of memory above what its libraries take. It talks in messages over its standard input and output,
each of them a line of JSON with the number of bytes that follow, and the bytes: first it is given the file and answers with
what that says, then it is given images (N, 3, H, W) and answers with logits, all of them float32. An answer with `error`
is its last.
"""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any, BinaryIO

ERROR_CHARACTERS, MAX_LINE_BYTES = 400, 64 << 20


def send(stream: BinaryIO, payload: bytes | memoryview = b"", **fields: Any) -> None:
    stream.write(json.dumps({**fields, "bytes": len(payload)}).encode() + b"\n")
    stream.write(payload)
    stream.flush()


def receive(stream: BinaryIO, *, limit: int | None = None) -> tuple[dict[str, Any], bytes]:
    """The next message. Raises EOFError where there is none, and ValueError for what is none or has more than `limit` bytes."""
    line = stream.readline(MAX_LINE_BYTES)
    if not line:
        raise EOFError
    fields = json.loads(line)
    if limit is not None and not 0 <= fields["bytes"] <= limit:
        raise ValueError(f"{fields['bytes']} bytes, at most {limit} were expected")
    return fields, stream.read(fields["bytes"])


def main(threads: int, memory_bytes: int) -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    try:
        _serve(sys.stdin.buffer, answers, threads=threads, memory_bytes=memory_bytes)
    except EOFError:
        pass
    except ImportError:
        send(answers, error="ONNX needs more packages, pip install -r requirements-export.txt")
    except MemoryError:
        send(answers, error="takes more memory than a network of its size needs")
    except Exception as error:  # of protobuf and onnxruntime, which has an exception for each of its states
        send(answers, error=f"is no ONNX file that onnxruntime runs ({str(error)[:ERROR_CHARACTERS]})")


def _serve(requests: BinaryIO, answers: BinaryIO, *, threads: int, memory_bytes: int) -> None:
    import numpy as np
    import onnx
    import onnxruntime  # noqa: F401, what it takes by itself is not the file's

    from deploy.onnx_operations import inference_session, problems

    content = receive(requests)[1]
    _limit_memory(memory_bytes)
    model = onnx.load_from_string(content)
    found = next(problems(model), None)
    inputs = [value for value in model.graph.input if value.name not in {each.name for each in model.graph.initializer}]
    if found is not None or len(inputs) != 1 or len(model.graph.output) != 1:
        return send(answers, error=f"was not written by export.py: it has {found or 'other inputs and outputs'}")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    last = model.graph.output[0].type.tensor_type.shape.dim[-1:]
    fields = {"producer": model.producer_name, "metadata": metadata, "classes": last[0].dim_value if last else 0}
    del model
    session = inference_session(content, threads=threads)
    send(answers, **fields)
    while True:
        fields, pixels = receive(requests)
        images = np.frombuffer(pixels, np.float32).reshape(fields["shape"])
        logits = session.run(None, {inputs[0].name: images})[0]
        if logits.dtype != np.float32:
            return send(answers, error=f"gives numbers of {logits.dtype}, expected float32")
        send(answers, np.ascontiguousarray(logits).data.cast("B") if logits.size else b"", shape=logits.shape)


def _limit_memory(above_bytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + above_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
