"""Text as bytes: which files, which of them are held out, and which windows of them a step reads."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from muon_dist.launch.config import TrainConfig, UsageError
from muon_dist.launch.environment import Environment

VALIDATION_SHARE = 0.05
END_OF_DOCUMENT = b"\0"  # never part of a text file, so the model can tell where one ends


@dataclass(frozen=True)
class Document:
    name: str  # what decides its split: the same on every machine, whatever folder the text lies in
    content: bytes


@dataclass(frozen=True)
class TextData:
    """Both splits, each a single uint8 tensor in host memory."""

    train: torch.Tensor
    validation: torch.Tensor


def load_text(config: TrainConfig) -> TextData:
    if config.hf_dataset:
        documents = hf_documents(config.hf_dataset)
    elif config.data:
        documents = file_documents(config.data)
    else:
        documents = standard_library_documents()
    train, validation = split_documents(documents)
    data = TextData(join(train), join(validation))
    for name, stream in (("training", data.train), ("validation", data.validation)):
        if len(stream) <= config.sequence_length:
            raise UsageError(
                f"the {name} text has {len(stream)} bytes, a window needs {config.sequence_length + 1}; "
                f"give more text or a smaller --sequence-length"
            )
    return data


def standard_library_documents() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not {"site-packages", "dist-packages"}.intersection(relative.parts):
            yield from text_document(path, relative)


def file_documents(paths: Sequence[Path]) -> Iterator[Document]:
    for given in paths:
        if given.is_file():
            yield from text_document(given, Path(given.name))
        elif given.is_dir():
            for path in sorted(p for p in given.rglob("*") if p.is_file()):
                yield from text_document(path, path.relative_to(given))
        else:
            raise UsageError(f"--data {given}: no such file or folder")


def text_document(path: Path, name: Path) -> Iterator[Document]:
    """The file's text, or nothing where it isn't text: the standard library's tests hold such files on purpose."""
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return
    if END_OF_DOCUMENT not in content:
        yield Document(name.as_posix(), content)


def hf_documents(name: str) -> Iterator[Document]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UsageError("--hf-dataset needs the `datasets` package: pip install 'muon_dist[datasets]'") from None
    for index, row in enumerate(load_dataset(name, split="train")):
        if "text" not in row:
            raise UsageError(f"--hf-dataset {name}: no `text` column, only {', '.join(sorted(row))}")
        yield Document(str(index), row["text"].encode())


def split_documents(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """Hold out the documents whose name hashes low: no text in both splits, and new files move no old one."""

    def position(document: Document) -> float:
        digest = hashlib.blake2b(document.name.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    by_position = sorted(documents, key=lambda document: (position(document), document.name))
    if len(by_position) < 2:
        raise UsageError(f"the data has {len(by_position)} text files; one to train on and one to hold out are needed")
    # A handful of files may have none below the share: then the lowest is held out.
    held_out = max(1, sum(position(document) < VALIDATION_SHARE for document in by_position))
    return by_position[held_out:], by_position[:held_out]


def join(documents: Sequence[Document]) -> torch.Tensor:
    text = END_OF_DOCUMENT.join(document.content for document in documents)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Batches:
    """The windows that this rank reads, as token ids [sequences, sequence_length + 1] on its device.

    A step's windows over all ranks are a pure function of seed and step: a resumed run needs no state of the data,
    and every engine and world size trains on the same sequences.
    """

    def __init__(self, config: TrainConfig, environment: Environment, text: TextData) -> None:
        self.config = config
        self.environment = environment
        self.text = text
        self.micro_batch_size = config.micro_batch_size(environment.world_size)

    def training(self, step: int) -> list[torch.Tensor]:
        """The step's micro-batches."""
        starts = training_starts(
            self.text.train, self.config.sequence_length, self.config.batch_size, self.config.seed, step
        )
        mine = starts.view(self.environment.world_size, -1)[self.environment.rank]
        return [self._windows(self.text.train, part) for part in mine.split(self.micro_batch_size)]

    def validation(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches and the weight of each of their sequences.

        FSDP gathers parameters in every forward pass, so all ranks must run equally many: where the sequences don't
        split evenly, the last ones are filled up with sequences of weight 0.
        """
        world_size = self.environment.world_size
        starts = evaluation_starts(self.text.validation, self.config.sequence_length, self.config.eval_sequences)
        filling = -len(starts) % world_size
        weights = F.pad(torch.ones(len(starts)), (0, filling))[self.environment.rank :: world_size]
        starts = F.pad(starts, (0, filling))[self.environment.rank :: world_size]
        for part, weight in zip(starts.split(self.micro_batch_size), weights.split(self.micro_batch_size), strict=True):
            yield self._windows(self.text.validation, part), weight.to(self.environment.device)

    def _windows(self, stream: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        return windows(stream, starts, self.config.sequence_length).to(self.environment.device)


def training_starts(stream: torch.Tensor, sequence_length: int, count: int, seed: int, step: int) -> torch.Tensor:
    """Where the windows of a step begin, over all ranks."""
    generator = np.random.default_rng((seed, step))
    return torch.from_numpy(generator.integers(len(stream) - sequence_length, size=count))


def evaluation_starts(stream: torch.Tensor, sequence_length: int, count: int) -> torch.Tensor:
    """Evenly spaced over the whole split, the same at every evaluation of every run."""
    return torch.arange(count) * (len(stream) - sequence_length - 1) // max(1, count - 1)


def windows(stream: torch.Tensor, starts: torch.Tensor, sequence_length: int) -> torch.Tensor:
    """Token ids [len(starts), sequence_length + 1]: inputs are all but the last column, targets all but the first."""
    return stream[starts[:, None] + torch.arange(sequence_length + 1)].long()
