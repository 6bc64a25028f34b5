"""The forward pass on a CPU: a checkpoint exported once to OpenVINO, in 32 bits, for frames of any size.

A network compiled for any frame serves the rare ones; a frame that comes often gets a network of its own, which is
faster and takes a fifth of a second to compile. Both do the same arithmetic.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.errors import ArtifactDamaged

log = logging.getLogger(__name__)

WORTH_COMPILING = 32  # passes of one frame: where what its own network saves (about 8 %) equals what compiling costs
FRAMES_COMPILED = 8  # networks kept; each holds its weights and activations, some 50 MB for the smallest detectors
EXPORTS_KEPT = 8  # files in the cache: committees and the rounds just before this one
_FORMAT = 2

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]


class OpenVinoForward:
    """One pass after the other, from one thread at a time."""

    def __init__(self, graph: Any, threads: int) -> None:
        """
        Args:
            graph: an openvino.Model of one input (1, h, w, 3) uint8, h and w open.
            threads: for one pass.
        """
        import openvino

        self._core = openvino.Core()
        self._graph = graph
        self._settings = {
            "INFERENCE_PRECISION_HINT": "f32",  # or processors with bfloat16 use that, and boxes differ
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # two workers would be pinned to the same core
        }
        self._any_frame = self._core.compile_model(graph, "CPU", self._settings)
        self._compiled: OrderedDict[tuple[int, ...], Any] = OrderedDict()  # the last used is last
        self._passes: Counter[tuple[int, ...]] = Counter()

    def __call__(self, pixels: Pixels) -> list[Floats]:
        """(1, h, w, 3) RGB -> the graph's outputs."""
        request = self._network(pixels.shape).create_infer_request()  # its own outputs: the last ones stay valid
        request.infer([pixels], share_inputs=True)
        return [tensor.data for tensor in request.output_tensors]

    def _network(self, shape: tuple[int, ...]) -> Any:
        if shape in self._compiled:
            self._compiled.move_to_end(shape)
            return self._compiled[shape]
        self._passes[shape] += 1
        if self._passes[shape] < WORTH_COMPILING:
            return self._any_frame
        del self._passes[shape]  # once evicted, it has to earn its place anew
        graph = self._graph.clone()
        graph.reshape(list(shape))
        self._compiled[shape] = self._core.compile_model(graph, "CPU", self._settings)
        if len(self._compiled) > FRAMES_COMPILED:
            self._compiled.popitem(last=False)
        return self._compiled[shape]


def cached_graph(cache: Path, sha256: str, export: Callable[[], Any]) -> Any:
    """The graph exported from the checkpoint of this hash, from the file in `cache`, or exported and written there.

    Args:
        cache: a folder of our own; it is made, and the exports not used for longest are removed.
        sha256: of the checkpoint.
        export: makes the openvino.Model, in seconds. Its errors escape.
    """
    file = cache / f"{sha256}-{_versions()}.graph"
    try:
        graph = _read(file)
        os.utime(file)
        return graph
    except FileNotFoundError:
        pass
    except (ArtifactDamaged, OSError, RuntimeError) as error:
        log.warning("The export %s cannot be used and is made again: %s", file, error)
    graph = export()
    try:
        _write(graph, file)
    except OSError as error:  # a full or read-only disk: the next process exports again
        log.warning("The export %s cannot be kept: %s", file, error)
    return graph


def _versions() -> str:
    """Of everything an export depends on beside the checkpoint."""
    from importlib.metadata import version

    parts = [str(_FORMAT), *(version(name) for name in ("openvino", "torch", "ultralytics"))]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


def _read(file: Path) -> Any:
    import openvino

    content = file.read_bytes()
    digest, size, body = content[:32], int.from_bytes(content[32:40], "little"), content[40:]
    if hashlib.sha256(body).digest() != digest:
        raise ArtifactDamaged(f"{len(content)} bytes that are not what was written")
    return openvino.Core().read_model(model=body[:size], weights=body[size:])


def _write(graph: Any, file: Path) -> None:
    """One file, which appears whole or not at all: SHA-256 of the rest, size of the XML, the XML, the weights."""
    import openvino

    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".export-") as folder:
        openvino.save_model(graph, Path(folder) / "graph.xml", compress_to_fp16=False)
        xml, weights = ((Path(folder) / f"graph.{suffix}").read_bytes() for suffix in ("xml", "bin"))
        body = xml + weights
        temporary = Path(folder) / "whole"
        with temporary.open("wb") as out:
            out.write(hashlib.sha256(body).digest() + len(xml).to_bytes(8, "little") + body)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    for old in _by_last_use(file.parent)[:-EXPORTS_KEPT]:
        old.unlink(missing_ok=True)


def _by_last_use(cache: Path) -> list[Path]:
    used: list[tuple[float, Path]] = []
    for file in cache.glob("*.graph"):
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            used.append((file.stat().st_mtime, file))
    return [file for _, file in sorted(used)]
