"""`--engine deepspeed` trains like the other engines at every ZeRO stage, however it is started; the JSON file and the
options agree or nothing runs."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from muon_dist.launch.cli import main
from muon_dist.launch.config import TrainConfig, UsageError
from muon_dist.launch.ds_config import reconcile
from tests.launch.conftest import STEPS, Launch
from tests.launch.records import losses, result, series

CONFIGS = Path(__file__).parents[2] / "launch" / "configs"
MEASURES = [("train", "loss"), ("train", "grad_norm"), ("train", "lr"), ("eval", "loss")]

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install '.[deepspeed]'"
)


@pytest.fixture(scope="session")
def whole_zero3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """zero3.json, but small parameters are partitioned too: all of the test's are small."""
    content = json.loads((CONFIGS / "zero3.json").read_text())
    content["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return written(content, tmp_path_factory.mktemp("configs"))


def written(content: dict[str, Any], folder: Path) -> Path:
    path = folder / "ds_config.json"
    path.write_text(json.dumps(content))
    return path


def train(launch: Launch, out: Path, file: Path, *options: str, **how: Any) -> None:
    fixed = f"--engine deepspeed --ds-config {file} --steps {STEPS} --checkpoint-every 2 --eval-every 3"
    launch(out, *fixed.split(), *options, **{"ranks": 2, **how})


def require_alike(run: Path, other: Path) -> None:
    for kind, value in MEASURES:
        assert series(run, kind, value) == pytest.approx(series(other, kind, value), rel=1e-3)


def require_resumed_alike(launch: Launch, run: Path, file: Path, resumed: Path, *options: str, **how: Any) -> None:
    """As if killed while step 6's checkpoint was written."""
    shutil.copytree(run, resumed)
    (resumed / "checkpoints" / "step-00000006").rename(resumed / "checkpoints" / "step-00000006.unfinished")
    train(launch, resumed, file, *options, "--resume", **how)
    assert result(resumed)["first_step"] == 5
    for kind, value in MEASURES:
        assert series(resumed, kind, value) == series(run, kind, value)


@needs_deepspeed
def test_stage_0_fills_in_all_that_the_file_leaves_out(launch: Launch, fsdp2_run: Path, tmp_path: Path) -> None:
    train(launch, tmp_path / "run", written({}, tmp_path), ranks=2)
    require_alike(tmp_path / "run", fsdp2_run)


@needs_deepspeed
def test_stage_1_with_accumulation(launch: Launch, fsdp2_run: Path, tmp_path: Path) -> None:
    train(launch, tmp_path / "run", CONFIGS / "zero1.json", "--accumulation-steps", "2")
    require_alike(tmp_path / "run", fsdp2_run)


@needs_deepspeed
def test_stage_2_and_its_resume_under_the_deepspeed_launcher(launch: Launch, fsdp2_run: Path, tmp_path: Path) -> None:
    run, file = tmp_path / "run", CONFIGS / "zero2.json"
    train(launch, run, file)
    require_alike(run, fsdp2_run)
    measured = result(run)["state_bytes_per_rank"]["measured"]
    assert measured == pytest.approx(result(fsdp2_run)["state_bytes_per_rank"]["measured"], rel=0.02)
    require_resumed_alike(launch, run, file, tmp_path / "resumed", launcher="deepspeed")


@needs_deepspeed
def test_stage_3_with_accumulation_and_its_resume(
    launch: Launch, fsdp2_run: Path, whole_zero3: Path, tmp_path: Path
) -> None:
    run, accumulation = tmp_path / "run", ("--accumulation-steps", "2")
    train(launch, run, whole_zero3, *accumulation)
    require_alike(run, fsdp2_run)
    require_resumed_alike(launch, run, whole_zero3, tmp_path / "resumed", *accumulation)


@needs_deepspeed
def test_offload(launch: Launch, fsdp2_run: Path, tmp_path: Path) -> None:
    train(launch, tmp_path / "run", CONFIGS / "zero3_offload.json", ranks=1)
    require_alike(tmp_path / "run", fsdp2_run)


@needs_deepspeed
def test_an_optimizer_of_deepspeeds(launch: Launch, tmp_path: Path) -> None:
    params = {"lr": "auto", "weight_decay": "auto", "torch_adam": True}  # its fused one would be compiled first
    file = written({"optimizer": {"type": "AdamW", "params": params}, "zero_optimization": {"stage": 2}}, tmp_path)
    train(launch, tmp_path / "run", file, "--adamw-lr", "0.01", ranks=1)
    curve = losses(tmp_path / "run", "train")
    assert curve[STEPS] < curve[1]
    assert result(tmp_path / "run")["ds_config"]["optimizer"]["params"]["lr"] == 0.01


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_ready_files_take_everything_from_the_command(name: str) -> None:
    config = TrainConfig(engine="deepspeed", ds_config=CONFIGS / f"{name}.json", accumulation_steps=2, dtype="bf16")
    settled, ds = reconcile(config, CONFIGS / f"{name}.json", (), world_size=4)
    assert settled == config
    assert (ds["train_batch_size"], ds["train_micro_batch_size_per_gpu"], ds["gradient_accumulation_steps"]) == (
        16,
        2,
        2,
    )
    assert ds["bf16"] == {"enabled": True}
    assert ds["optimizer"]["params"]["adamw_lr"] == config.adamw_lr


def settle(content: dict[str, Any], tmp_path: Path, **given: Any) -> tuple[TrainConfig, dict[str, Any]]:
    """As the command does on two ranks with the options `given`."""
    file = written(content, tmp_path)
    return reconcile(TrainConfig(engine="deepspeed", ds_config=file, **given), file, given, world_size=2)


def test_options_that_are_not_given_take_the_files_values(tmp_path: Path) -> None:
    content = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "DistMuon", "params": {"lr": 0.5, "wire": "fp32", "adamw_betas": "auto"}},
    }
    config, ds = settle(content, tmp_path, momentum=0.5)
    assert (config.batch_size, config.accumulation_steps) == (24, 4)
    assert (config.clip_norm, config.dtype, config.lr, config.wire) == (float("inf"), "bf16", 0.5, "fp32")
    assert ds["optimizer"]["params"]["momentum"] == 0.5
    assert ds["optimizer"]["params"]["lr"] == 0.5


def test_no_clipping_is_no_clipping(tmp_path: Path) -> None:
    assert settle({}, tmp_path, clip_norm=float("inf"))[1]["gradient_clipping"] == 0.0  # its default is 1.0


@pytest.mark.parametrize(
    ("content", "given", "message"),
    [
        ({"train_batch_size": 32}, {"batch_size": 16}, "train_batch_size is 32, --batch-size 16"),
        ({"train_micro_batch_size_per_gpu": 2}, {"batch_size": 16}, "train_micro_batch_size_per_gpu is 2"),
        ({"gradient_accumulation_steps": 2}, {"accumulation_steps": 1}, "is 2, --accumulation-steps 1"),
        ({"gradient_clipping": 0.5}, {"clip_norm": 1.0}, "gradient_clipping is 0.5, --clip-norm 1.0"),
        ({"bf16": {"enabled": False}}, {"dtype": "bf16"}, "bf16.enabled is False, --dtype bf16"),
        ({"fp16": {"enabled": True}}, {}, "fp16.enabled: the command trains in fp32 or bf16"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "scheduler: the command schedules"),
        ({"optimizer": {"type": "AdamW"}}, {"optimizer": "dist_muon"}, "optimizer.type is 'AdamW'"),
        ({"optimizer": {"type": "DistMuon", "params": {"lr": 1}}}, {"lr": 0.02}, "optimizer.params.lr is 1, --lr 0.02"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, {}, "zero_optimization.reduce_bucket_size"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": "auto"}}}, {}, "optimizer.params.betas"),
        ({"optimizer": {"type": "AdamW"}}, {"wire": "fp32"}, "optimizer.params of AdamW has no place for --wire"),
    ],
)
def test_a_conflict_names_the_key(content: dict[str, Any], given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        settle(content, tmp_path, **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--engine deepspeed", "--engine deepspeed needs --ds-config"),
        ("--ds-config x.json", "--ds-config is for --engine deepspeed, not for --engine fsdp2"),
        ("--engine deepspeed --ds-config nowhere.json", "--ds-config nowhere.json: No such file"),
        (f"--engine deepspeed --ds-config {__file__}", "is no JSON"),
        (f"--engine deepspeed --ds-config {CONFIGS}/zero2.json --optimizer adamw", "the file names the optimizer"),
    ],
)
def test_wrong_options(options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--local_rank=0", "train", "--out", str(tmp_path / "run"), *options.split()])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
