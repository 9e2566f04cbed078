"""The activation store on disk: sharded safetensors and a manifest; written once, read back in bounded memory.

<store_dir>/<store_id>/
    manifest.json               parameters, identities, shards with their hashes; written last
    train-00000.safetensors     acts (n, d_in), token_ids, positions, prompts (n,) int32; …
    val-00000.safetensors       …
    mean.safetensors            mean of the training rows (d_in,), float32
    timing.json                 seconds; separate, because equal stores take different times
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from saegrid.data.manifest import BUFFER_SHARDS, MEND, read_manifest
from saegrid.errors import StoreError
from saegrid.storage.atomic import write_bytes

META = ("token_ids", "positions", "prompts")
PREFETCH = 4
"""Batches prepared ahead by the background thread."""


class ShardWriter:
    """Writes one split's rows as shards, in order of arrival, and accumulates their statistics.

    Args:
        shard_rows: rows of a full shard.
        dtype: of the stored rows; all statistics refer to stored values.
    """

    def __init__(self, folder: Path, split: str, d_in: int, dtype: torch.dtype, shard_rows: int):
        self.folder, self.split, self.d_in, self.dtype, self.shard_rows = folder, split, d_in, dtype, shard_rows
        self.shards: list[dict[str, Any]] = []
        self.rows = 0
        self._parts: list[dict[str, Tensor]] = []
        self._pending = 0
        self._sum = torch.zeros(d_in, dtype=torch.float64)
        self._sum_squares = 0.0
        self._norms: list[Tensor] = []
        self._first_norms: list[Tensor] = []

    def add(self, acts: Tensor, token_ids: Tensor, positions: Tensor, prompts: Tensor) -> None:
        """Add rows acts (n, d_in) with token ids, positions and prompts, (n,) each; -1: unknown.

        Raises:
            StoreError: values that are not finite, or too large for the stored dtype.
        """
        stored = self.cast(acts)
        meta = (tensor.to(torch.int32) for tensor in (token_ids, positions, prompts))
        self._parts.append({"acts": stored, **dict(zip(META, meta, strict=True))})
        self._pending += len(stored)
        self.rows += len(stored)
        exact = stored.double()
        squares = exact.square().sum(1)
        self._sum += exact.sum(0)
        self._sum_squares += squares.sum().item()
        self._norms.append(squares.sqrt().float())
        self._first_norms.append(self._norms[-1][positions == 0])
        while self._pending >= self.shard_rows:
            self._write(self.shard_rows)

    def cast(self, acts: Tensor) -> Tensor:
        """The rows as they are stored. Raises `StoreError` as `add` does."""
        stored = acts.to("cpu", self.dtype)
        if not stored.isfinite().all():
            self._refuse(acts)
        return stored

    def close(self) -> list[dict[str, Any]]:
        """Write the remaining rows. Returns the shards: file, rows, bytes, sha256."""
        if self._pending:
            self._write(self._pending)
        return self.shards

    @property
    def mean(self) -> Tensor:
        """Mean row (d_in,), float32, summed in float64."""
        return (self._sum / self.rows).float()

    def statistics(self) -> dict[str, float | int | None]:
        """Rows; pooled variance over all elements; mean squared distance to the mean row; norms."""
        elements = self.rows * len(self._sum)
        norms, first = torch.cat(self._norms), torch.cat(self._first_norms)
        return {
            "rows": self.rows,
            "pooled_variance": self._sum_squares / elements - (self._sum.sum().item() / elements) ** 2,
            "sq_norm_centred": self._sum_squares / self.rows - (self._sum / self.rows).square().sum().item(),
            "median_norm": norms.median().item(),
            "max_norm": norms.max().item(),
            "mean_norm_at_position_0": first.mean().item() if len(first) else None,
        }

    def _write(self, rows: int) -> None:
        whole = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        content = save({name: tensor[:rows].contiguous() for name, tensor in whole.items()})
        name = f"{self.split}-{len(self.shards):05d}.safetensors"
        self.shards.append(written(self.folder / name, content, rows=rows))
        self._parts = [{name: tensor[rows:].clone() for name, tensor in whole.items()}]
        self._pending -= rows

    def _refuse(self, acts: Tensor) -> None:
        if not acts.isfinite().all():
            raise StoreError(f"{self.split} activations hold NaN or infinity, so they can't be trained on")
        name, limit = str(self.dtype).removeprefix("torch."), torch.finfo(self.dtype).max
        largest = acts.abs().max().item()
        raise StoreError(f"act_dtype = {name!r}: an activation of {largest:.4g} is above its {limit:g}; take 'float32'")


def written(path: Path, content: bytes, **facts: int) -> dict[str, Any]:
    """Write a file of a store. Returns its entry in the manifest."""
    write_bytes(path, content)
    return {"file": path.name, **facts, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


class Store:
    """An open activation store. Each shard's hash is checked when it is first read.

    Attributes:
        folder: its location.
        manifest: the content of `manifest.json`.
        d_in, n_train, n_val: row width, rows per split.
        mean: mean of the training rows (d_in,), float32.
        data_sha256, model_sha256: hash of all rows; hash of the weights of the language model that the splice loads.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.d_in: int = self.manifest["d_in"]
        self.n_train: int = sum(shard["rows"] for shard in self.manifest["shards"]["train"])
        self.n_val: int = sum(shard["rows"] for shard in self.manifest["shards"]["val"])
        self.data_sha256: str = self.manifest["data_sha256"]
        self.model_sha256: str = self.manifest["model"]["sha256"]
        self._checked: set[str] = set()
        self.mean: Tensor = self._read(self.manifest["mean"])["mean"]

    def batches(
        self,
        split: str,
        batch_size: int,
        seed: int | None = None,
        epoch: int = 0,
        start: int = 0,
        buffer_shards: int = BUFFER_SHARDS,
        device: str = "cpu",
        keep: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Batches of float32 rows (N, d_in) on `device`, each row once; the last batch may be smaller.

        Without a seed: in stored order. With a seed: shards are shuffled, then the rows of `buffer_shards` shards at
        a time; the same seed, epoch and batch size give the same batches.

        Args:
            start: number of batches to skip without reading them.
            buffer_shards: bounds the memory to this many shards plus one that straddles two groups.
            keep: maps float32 rows (N, d_in) on the CPU to a mask (N,) of those to return.
        """
        shards, key = list(self.manifest["shards"][split]), None
        if seed is not None:
            order, key = torch.randperm(len(shards), generator=seeded(seed, epoch, "shards")), (seed, epoch)
            shards = [shards[index] for index in order]
        together = buffer_shards * max(shard["rows"] for shard in shards)
        batches = shuffled(lambda first: self._parts(shards, first), together, batch_size, start, key)
        return received(prefetched(sent(batches, device, keep)))

    @property
    def epoch_rows(self) -> int:
        """Rows that a run trains on in one epoch."""
        return self.n_train

    def epoch(
        self, batch_size: int, seed: int, epoch: int, start: int, device: str, keep: Callable[[Tensor], Tensor] | None
    ) -> Iterator[Tensor]:
        """The shuffled batches of one epoch of training, from batch `start` on; arguments as for `batches`."""
        return self.batches("train", batch_size, seed, epoch, start, device=device, keep=keep)

    def rows(self, split: str) -> Tensor:
        """All rows of a split in the stored order, float32 (n, d_in). For small stores."""
        return torch.cat([self._read(shard)["acts"].float() for shard in self.manifest["shards"][split]])

    def meta(self, split: str) -> dict[str, Tensor]:
        """`token_ids`, `positions` and `prompts` of a split's rows in the stored order, int32 (n,)."""
        shards = [self._read(shard) for shard in self.manifest["shards"][split]]
        return {name: torch.cat([shard[name] for shard in shards]) for name in META}

    def _parts(self, shards: list[dict[str, Any]], first: int) -> Iterator[Tensor]:
        """The rows of some shards from row `first` on, in their stored dtype; shards before it are not read."""
        for shard in shards:
            if first < shard["rows"]:
                yield self._read(shard)["acts"][first:]
            first = max(0, first - shard["rows"])

    def _read(self, entry: dict[str, Any]) -> dict[str, Tensor]:
        """Tensors of one of the store's files, its hash checked on first read."""
        path = self.folder / entry["file"]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}", MEND) from None
        if entry["file"] not in self._checked:
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                raise StoreError(f"{path}: damaged (not the SHA-256 of the manifest)", MEND)
            self._checked.add(entry["file"])
        return self._fitting(entry, content)

    def _fitting(self, entry: dict[str, Any], content: bytes) -> dict[str, Tensor]:
        """The tensors of a file, checked against the dtypes and shapes in the manifest."""
        path = self.folder / entry["file"]
        try:
            tensors = load(content)
        except Exception as error:  # SafetensorError, or torch's error for a dtype that it lacks
            raise StoreError(f"{path}: damaged ({error})", MEND) from None
        stored = getattr(torch, self.manifest["act_dtype"])
        wanted: dict[str, Any] = {"mean": ((self.d_in,), torch.float32)}
        if "rows" in entry:
            wanted = {"acts": ((entry["rows"], self.d_in), stored)}
            wanted |= dict.fromkeys(META, ((entry["rows"],), torch.int32))
        if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} != wanted:
            raise StoreError(f"{path}: damaged (not the tensors that the manifest states)", MEND)
        return tensors


def seeded(*key: Any) -> torch.Generator:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def shuffled(
    parts: Callable[[int], Iterable[Tensor]], together: int, batch_size: int, start: int, key: tuple[Any, ...] | None
) -> Iterator[Tensor]:
    """Batches of rows that are shuffled in groups of about `together` rows, from batch `start` on.

    Args:
        parts: gives the rows from a given row on, in parts of any size.
        key: seed of the shuffle, extended by each group's number; None: keep the order of `parts`.
    """
    per_group = max(1, together // batch_size)  # batches
    group, skip = divmod(start, per_group)
    size = per_group * batch_size
    for n, rows in enumerate(_gathered(parts(group * size), size), group):
        order = torch.arange(len(rows)) if key is None else torch.randperm(len(rows), generator=seeded(*key, n))
        for chosen in order.split(batch_size)[skip:]:
            yield rows[chosen]
        skip = 0


def _gathered(parts: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The rows of `parts`, `size` at a time, in one tensor that is overwritten; the last may have fewer."""
    buffer, have = torch.empty(0), 0
    for part in parts:
        buffer = buffer if len(buffer) else part.new_empty(size, part.shape[1])
        while len(part):
            taken, part = part[: size - have], part[size - have :]
            buffer[have : have + len(taken)] = taken
            have += len(taken)
            if have == size:
                yield buffer
                have = 0
    if have:
        yield buffer[:have]


def prefetched(batches: Iterator[Any], ahead: int = PREFETCH) -> Iterator[Any]:
    """The same batches, prepared ahead on a thread, which ends with the iterator; its errors are raised here."""
    ready: queue.Queue = queue.Queue(maxsize=ahead)
    dropped = threading.Event()

    def put(item: Any) -> None:
        while not dropped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put((batch, None))
                if dropped.is_set():
                    return
            put((None, None))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, daemon=True, name="saegrid-prefetch")
    thread.start()
    try:
        while True:
            batch, error = ready.get()
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        dropped.set()
        thread.join()


Sent = tuple[Tensor, "torch.cuda.Event | None"]


def sent(batches: Iterator[Tensor], device: str, keep: Callable[[Tensor], Tensor] | None = None) -> Iterator[Sent]:
    """Float32 rows on `device`, each batch with the event that marks the end of its copy. For the prefetching thread.

    Rows are copied in their stored precision, from pinned memory on a separate stream, and converted to float32 on the
    GPU. On "cpu" nothing is copied, and there is no event.
    """
    if device == "cpu":
        for batch in batches:
            rows = batch.float()
            yield rows if keep is None else rows[keep(rows)], None
        return
    stream = torch.cuda.Stream()
    for batch in batches:
        batch = batch if keep is None else batch[keep(batch.float())]
        with torch.cuda.stream(stream):
            rows = batch.pin_memory().to(device, non_blocking=True).float()
            yield rows, stream.record_event()


def received(batches: Iterator[Sent]) -> Iterator[Tensor]:
    """The rows, ready for the current stream; it waits for their copy, the host does not."""
    for rows, arrived in batches:
        if arrived is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(arrived)
            rows.record_stream(stream)  # else the copying stream could overwrite rows still in use
        yield rows
