"""The text: split by file, the same way everywhere; windows that depend on nothing but seed and step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from muon_dist.launch.config import TrainConfig, UsageError
from muon_dist.launch.data import (
    Document,
    evaluation_starts,
    file_documents,
    join,
    load_text,
    split_documents,
    standard_library_documents,
    training_starts,
    windows,
)


def names(documents: list[Document]) -> set[str]:
    return {document.name for document in documents}


def test_split_is_by_file_disjoint_and_about_the_share() -> None:
    documents = [Document(f"folder/file{index}.py", b"text") for index in range(2000)]
    train, validation = split_documents(documents)
    assert names(train).isdisjoint(names(validation))
    assert names(train) | names(validation) == names(documents)
    assert 60 < len(validation) < 140  # 5% of 2000, and the hash's own spread


def test_split_depends_on_names_alone() -> None:
    documents = [Document(f"file{index}.py", b"old") for index in range(200)]
    _, validation = split_documents(documents)
    more = [Document(f"more{index}.py", b"") for index in range(200)]
    changed = [Document(document.name, b"new") for document in reversed(documents)]
    train_after, validation_after = split_documents(more + changed)
    assert names(validation) <= names(validation_after)
    assert names(validation_after).isdisjoint(names(train_after))


def test_names_are_relative_so_the_folder_does_not_matter(tmp_path: Path) -> None:
    for root in ("here", "there/below"):
        (tmp_path / root / "package").mkdir(parents=True)
        for index in range(8):
            (tmp_path / root / "package" / f"{index}.txt").write_text(f"text {index}")
    here, there = (split_documents(file_documents([tmp_path / root])) for root in ("here", "there/below"))
    assert here == there


def test_files_that_are_not_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "text.py").write_text("x = 'é'")
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'")
    (tmp_path / "binary.bin").write_bytes(b"a\0b")
    assert names(list(file_documents([tmp_path]))) == {"text.py"}


def test_standard_library_is_large_enough_and_holds_no_packages() -> None:
    documents = list(standard_library_documents())
    assert sum(len(document.content) for document in documents) > 5_000_000
    assert not any("site-packages" in document.name for document in documents)


def test_training_windows_are_a_function_of_seed_and_step() -> None:
    stream = torch.arange(100, dtype=torch.uint8)
    draw = [training_starts(stream, 10, 64, seed=seed, step=step) for seed, step in [(1, 2), (1, 2), (1, 3), (2, 2)]]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert not torch.equal(draw[0], draw[3])


def test_windows_reach_both_ends_and_never_past_them() -> None:
    stream = join([Document("a", b"abcdefgh")])
    starts = evaluation_starts(stream, sequence_length=3, count=3)
    assert windows(stream, starts, 3)[0].tolist() == list(b"abcd")
    assert windows(stream, starts, 3)[-1].tolist() == list(b"efgh")
    drawn = training_starts(stream, 3, 1000, seed=0, step=1)
    assert (int(drawn.min()), int(drawn.max())) == (0, 4)


def test_too_little_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("only one file")
    with pytest.raises(UsageError, match="1 text files; one to train on and one to hold out"):
        load_text(TrainConfig(data=(tmp_path,)))
    (tmp_path / "two.txt").write_text("short")
    with pytest.raises(UsageError, match="a window needs 129"):
        load_text(TrainConfig(data=(tmp_path,)))
    with pytest.raises(UsageError, match="nowhere: no such file"):
        load_text(TrainConfig(data=(tmp_path / "nowhere",)))


def test_a_dataset_is_split_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    lines = [f"line {index} of a text that is long enough for a window" for index in range(400)]
    (tmp_path / "text" / "all.txt").write_text("\n".join(lines))
    data = load_text(TrainConfig(hf_dataset=str(tmp_path / "text"), sequence_length=32))
    assert len(data.train) + len(data.validation) == sum(len(line) + 1 for line in lines) - 2
    assert len(data.validation) < len(data.train) / 4
