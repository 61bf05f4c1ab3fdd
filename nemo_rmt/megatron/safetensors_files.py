"""A Hugging Face folder's safetensors: read a slice at a time, written a tensor at a time.

Nothing here needs room for more than one tensor, and no file is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_rmt.errors import UserError
from nemo_rmt.families import read_object
from nemo_rmt.run_folder import write_json

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth")
FLOATS = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""The dtypes written, as safetensors calls them."""
READABLE = {*FLOATS.values(), "F16", "F64"}

Shapes = list[tuple[str, torch.dtype, tuple[int, ...]]]
"""Name, dtype and shape of tensors, in order."""


class PublishedFiles:
    """A folder's weights. Its files are opened at once, which reads their headers; tensors are read when asked for.

    Raises UserError when files are missing, damaged or pickled.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        index = self.folder / INDEX
        places = self._places(index) if index.is_file() else None
        self.opened = {
            name: self._open(name) for name in sorted({ONE_FILE} if places is None else set(places.values()))
        }
        held = {name: set(file.keys()) for name, file in self.opened.items()}
        self.places = dict.fromkeys(held[ONE_FILE], ONE_FILE) if places is None else places
        for name, place in self.places.items():
            if name not in held[place]:
                raise UserError(f"{index} is damaged: {place} has no tensor {name}; download the model again")

    def require(self, shapes: Shapes, ignored: set[str]) -> None:
        """Raise UserError unless the tensors are these, whatever their precision. ignored: may be there besides."""
        for name, _, shape in shapes:
            if name not in self.places:
                raise UserError(f"{self.folder} has no tensor {name}: its weights do not belong to its config.json")
            found = self._slice(name)
            if tuple(found.get_shape()) != shape:
                raise UserError(
                    f"{self.folder}: the weights of {name} have shape {tuple(found.get_shape())}, config.json makes "
                    f"them {shape}: the weights do not belong to it"
                )
            if found.get_dtype() not in READABLE:
                raise UserError(
                    f"{self.folder}: {name} is of type {found.get_dtype()}: quantised weights cannot be read"
                )
        unused = set(self.places) - {name for name, _, _ in shapes} - ignored
        if unused := sorted(name for name in unused if not name.endswith("rotary_emb.inv_freq")):
            raise UserError(f"{self.folder} has tensors that this architecture does not use: {', '.join(unused[:5])}")

    def read(self, name: str, part: tuple[slice, ...]) -> Tensor:
        """Part of a tensor, in the precision of the file."""
        return self._slice(name)[part]

    def _slice(self, name: str):
        return self.opened[self.places[name]].get_slice(name)

    def _places(self, index: Path) -> dict[str, str]:
        """The file of each tensor."""
        places = read_object(index, "download the model again").get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise UserError(f"{index} is damaged: it has no weight_map of tensors to files; download the model again")
        for name in places.values():
            if Path(name).name != name:
                raise UserError(
                    f"{index} names the file {name}, which is not in the folder itself: do not use this model"
                )
        return places

    def _open(self, name: str) -> safe_open:
        path = self.folder / name
        if not path.is_file():
            pickled = sorted(found.name for pattern in PICKLED for found in self.folder.glob(pattern))
            if pickled:
                raise UserError(
                    f"{self.folder} has no {name} but {', '.join(pickled[:3])}: pickled weights can run code and are "
                    "never read; convert them to safetensors, or download those"
                )
            raise UserError(f"{self.folder} has no {name}: download the model again, with its safetensors files")
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}): download it again") from None


def write_safetensors(folder: Path, shapes: Shapes, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write tensors as they come, in files of at most ``shard_bytes`` (or one tensor), with an index of several files.

    shapes: of what ``tensors`` yields. Once this returns a power cut takes nothing of it.
    """
    shards = _shards(shapes, shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [ONE_FILE]
    for name, shard in zip(names, shards, strict=True):
        with open(folder / name, "wb") as file:
            file.write(_header(shard))
            for expected in shard:
                found, tensor = next(tensors)
                if (found, tensor.dtype, tuple(tensor.shape)) != expected:
                    raise ValueError(f"{expected} was announced, {found} {tensor.dtype} {tuple(tensor.shape)} came")
                file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        places = {each[0]: name for name, shard in zip(names, shards, strict=True) for each in shard}
        total = sum(map(_bytes, shapes))
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _bytes(tensor: tuple[str, torch.dtype, tuple[int, ...]]) -> int:
    return torch.Size(tensor[2]).numel() * tensor[1].itemsize


def _shards(shapes: Shapes, shard_bytes: int) -> list[Shapes]:
    """The tensors of each file."""
    shards: list[Shapes] = [[]]
    room = shard_bytes
    for tensor in shapes:
        if _bytes(tensor) > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= _bytes(tensor)
    return shards


def _header(shard: Shapes) -> bytes:
    """What a safetensors file begins with: the length of a JSON object as 8 bytes, and the object."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in shard:
        name, dtype, shape = tensor
        end = start + _bytes(tensor)
        header[name] = {"dtype": FLOATS[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text
