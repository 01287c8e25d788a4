"""DeepSpeed: ``"optimizer": {"type": "DistMuon"}`` in the JSON file, at ZeRO stages 0 to 3.

Importing this module is all there is to do before ``deepspeed.initialize``. DeepSpeed looks up the type of an optimizer
that it does not know in ``torch.optim``, builds it with the model's parameters, then puts flat buffers in their place;
:mod:`muon_dist.integrations.zero` finds the parameters in these again. Nothing of DeepSpeed is patched.

    import muon_dist.integrations.deepspeed
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config="ds_config.json")

``deepspeed.initialize(optimizer=...)`` takes a callable, ``lambda parameters: DistOrthogonal(parameters, lr=2e-2)``, or
an object, ``DistOrthogonal(model.named_parameters(), lr=2e-2)``, as well.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from muon_dist import checkpoint
from muon_dist.agreement import require_none
from muon_dist.binding import Binding, named, tensor_shards
from muon_dist.checkpoint.pieces import pieces_of
from muon_dist.connections import Connections
from muon_dist.integrations.deepspeed_files import DESCRIPTION, StoredPiece, description_of
from muon_dist.integrations.zero import Buffer, Partition, partitions, stage_of
from muon_dist.optimizer import DistMuon
from muon_dist.shards import Shard

OLDEST = (0, 19)

try:
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.moe.utils import is_moe_param
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    from deepspeed.utils import groups
    from deepspeed.utils.debug import debug_param2name
except ImportError as error:
    raise ImportError(f"{error}; the integration needs DeepSpeed: pip install 'muon_dist[deepspeed]'") from error
if tuple(int(part) for part in deepspeed.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"DeepSpeed {deepspeed.__version__} is too old, this needs {'.'.join(map(str, OLDEST))}: "
        f"pip install -U 'muon_dist[deepspeed]'"
    )

JSON_NAME = "DistMuon"
# What the JSON may say: the constructor's options, and two names under which the Hugging Face integration fills in
# "auto" values.
_OPTIONS = tuple(inspect.signature(DistMuon).parameters)[1:]
_SYNONYMS = {"betas": "adamw_betas", "eps": "adamw_eps"}


class DistOrthogonal(DistMuon):
    """DistMuon for parameters that ZeRO keeps in flat buffers; takes the same options, as the JSON file gives them.

    It is not called Muon because DeepSpeed orthogonalises the gradients itself, once more, for every class with "muon"
    in its name whose parameters are tagged ``use_muon``.

    Args:
        params: as DistMuon takes them. The names of bare parameters are looked up in DeepSpeed, which knows them when
            it constructs the optimizer itself (by name, or by calling a callable).
        options: of :class:`muon_dist.DistMuon`. "auto" means the default.

    Raises:
        TypeError: an option that does not exist; the message names it and the ones that do.
    """

    def __init__(self, params: ParamsT, **options: Any) -> None:
        self._model_parameters: dict[str, Tensor] = {}
        self._has_stepped = False
        super().__init__(_with_names(params), **read_options(options))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As DistMuon's; remembers the model's parameters, which DeepSpeed is going to replace."""
        known = len(self.param_groups)
        super().add_param_group(param_group)
        for group in self.param_groups[known:]:
            count = len(self._model_parameters)
            unnamed = [f"parameter {count + i}" for i in range(len(group["params"]))]
            group["members"] = group.get("param_names", unnamed)
            self._model_parameters.update(zip(group["members"], group["params"], strict=True))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of the parameters that DeepSpeed has put in the groups."""
        first, self._has_stepped = not self._has_stepped, True
        if first and self._is_called_by_a_constructor():
            return None
        return super().step(closure)

    def during_backward(self, *, free_gradients: bool = False) -> AbstractContextManager[None]:
        """Raises NotImplementedError: DeepSpeed reduces, scales and clips gradients after the backward pass."""
        raise NotImplementedError(
            "during_backward(): DeepSpeed reduces, scales and clips gradients before it calls step(); leave it out"
        )

    def state_dict(self) -> dict[str, Any]:
        """As DistMuon's, and what :mod:`muon_dist.integrations.deepspeed_files` has to know of it."""
        state = super().state_dict()
        binding = self._bind()
        places = {id(self.state[p]): place for place, (_, p, _) in enumerate(named(self.param_groups))}
        pieces = [
            StoredPiece(piece, places[id(shard.state)], stored.entries if piece.region.numel else {})
            for piece, (shard, stored) in zip(pieces_of(binding), binding.stored(), strict=True)
        ]
        return {**state, DESCRIPTION: description_of(pieces, self.options)}

    def _is_called_by_a_constructor(self) -> bool:
        """FP16_UnfusedOptimizer (stage 0 in low precision) makes a step with zero gradients to have state created; it
        must not decay weights. Gradients are alike on all ranks there, and so is the answer."""
        if stage_of(p for p in self._model_parameters.values() if p.requires_grad) > 0:
            return False
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return not any(bool(gradient.any()) for gradient in gradients)

    def _whole_shape(self, parameter: Tensor) -> tuple[int, ...]:
        return tuple(getattr(parameter, "ds_shape", parameter.shape))  # under zero.Init nothing is left in it

    def _shards(self) -> Iterator[Shard]:
        for group in self.param_groups:
            trainable, params = self._trainable(group), group["params"]
            if params and stage_of(trainable.values()) == 0:
                # The parameters themselves, or fp32 copies of those that are trained.
                names = group["members"] if len(params) == len(group["members"]) else trainable
                replicas: dict[Any, list[tuple[str, Tensor, dict[str, Any]]]] = {}
                for name, p in zip(names, params, strict=True):
                    replicas.setdefault(_data_parallel_group(self._model_parameters[name]), []).append((name, p, group))
                for process_group, entries in replicas.items():
                    # DeepSpeed saves the state of rank 0 for all, so each rank has to keep all of it.
                    yield from tensor_shards(entries, self.state, process_group, share_momentum=False)
        yield from (partition.shard for partition in self._partitions())

    def _partitions(self) -> Iterator[Partition]:
        """What the flat buffers hold that are in the groups; ZeRO-3 puts in one at a time."""
        for group in self.param_groups:
            trainable = self._trainable(group)
            if stage_of(trainable.values()) > 0:
                for flat in group["params"]:
                    yield from partitions(trainable, Buffer(flat, group, self.state[flat], _computed_on(flat)))

    def _trainable(self, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The model's parameters of a group, by name."""
        return {name: p for name in group["members"] if (p := self._model_parameters[name]).requires_grad}

    def _connect(self, binding: Binding) -> Connections:
        if binding.signature not in self._connections:
            self._require_whole_steps(binding)
            problems = [partition.problem for partition in self._partitions() if partition.problem]
            for ranks in binding.domains():
                require_none(problems, self._groups.of(ranks), "the layout of DeepSpeed's buffers is not understood")
        return super()._connect(binding)

    def _require_whole_steps(self, binding: Binding) -> None:
        """Raises ValueError where gradients are to be judged and ZeRO hands them over in parts."""
        nonfinite = self.options.nonfinite
        expected = {name for name, p in self._model_parameters.items() if p.requires_grad}
        if nonfinite != "propagate" and expected != {shard.name for shard in binding.shards}:
            raise ValueError(
                f"nonfinite={nonfinite!r}: ZeRO calls the optimizer once a group, so part of a step could "
                f"be left out. Remove the option: DeepSpeed itself skips steps whose gradients are not finite (in bf16 "
                f'unless "check_grad_overflow" is false), and engine.skipped_steps counts them'
            )

    def _forget_replaced(self) -> None:
        """Nothing: DeepSpeed puts its buffers in the groups by turns."""


def save_state(engine: deepspeed.DeepSpeedEngine, folder: str | Path) -> None:
    """:func:`muon_dist.checkpoint.save_state` of an engine's optimizer."""
    with _all_in_groups(engine) as optimizer:
        checkpoint.save_state(optimizer, folder)


def async_save(engine: deepspeed.DeepSpeedEngine, folder: str | Path) -> Future[None]:
    """:func:`muon_dist.checkpoint.async_save` of an engine's optimizer."""
    with _all_in_groups(engine) as optimizer:
        return checkpoint.async_save(optimizer, folder)


def load_state(engine: deepspeed.DeepSpeedEngine, folder: str | Path, *, strict: bool = True) -> checkpoint.LoadReport:
    """:func:`muon_dist.checkpoint.load_state` into an engine's optimizer."""
    with _all_in_groups(engine) as optimizer:
        return checkpoint.load_state(optimizer, folder, strict=strict)


def describe(engine: deepspeed.DeepSpeedEngine) -> str:
    """:meth:`muon_dist.DistMuon.describe` of an engine's optimizer."""
    with _all_in_groups(engine) as optimizer:
        return optimizer.describe()


@contextmanager
def _all_in_groups(engine: deepspeed.DeepSpeedEngine) -> Iterator[DistOrthogonal]:
    """The optimizer with all buffers in its groups; between steps ZeRO-3 keeps none there."""
    if engine.zero_optimization_stage() < 3:
        yield engine.basic_optimizer
        return
    engine.optimizer._set_fp32_optimizer_param_groups()
    try:
        yield engine.basic_optimizer
    finally:
        engine.optimizer._clear_fp32_optimizer_param_groups()


def register() -> None:
    """Makes ``"type": "DistMuon"`` known to DeepSpeed. Called on import; harmless to repeat."""
    setattr(torch.optim, JSON_NAME, DistOrthogonal)
    if DistOrthogonal not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(DistOrthogonal)


def read_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments from ``optimizer.params`` of a JSON file.

    Raises:
        TypeError: an option that does not exist.
    """
    read: dict[str, Any] = {}
    for key, value in options.items():
        name = _SYNONYMS.get(key, key)
        if name not in _OPTIONS:
            close = difflib.get_close_matches(key, _OPTIONS, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise TypeError(f"DistMuon has no option {key!r}; {hint}It takes {', '.join(_OPTIONS)}")
        if name == "polar_dtype" and isinstance(value, str) and value != "auto":
            value = getattr(torch, value, value)
        if value != "auto":
            read[name] = tuple(value) if isinstance(value, list) else value
    return read


def _with_names(params: ParamsT) -> list[Any]:
    """``params`` with the names that DeepSpeed knows, where they have none."""
    entries: Iterable[Any] = params
    return [{**e, "params": _with_names(e["params"])} if isinstance(e, dict) else _with_name(e) for e in entries]


def _with_name(entry: Any) -> Any:
    if isinstance(entry, Tensor):
        name = debug_param2name(entry)
        return entry if name == "unknown" else (name, entry)
    return entry


def _data_parallel_group(parameter: Tensor) -> dist.ProcessGroup:
    """The ranks that hold a parameter as replicas at stage 0."""
    if is_moe_param(parameter):
        return groups._get_expert_data_parallel_group(parameter.group_name)  # type: ignore[attr-defined]
    return groups._get_data_parallel_group()


def _computed_on(flat: Tensor) -> torch.device:
    """Buffers that are offloaded to the host are computed on the accelerator, where there is one."""
    return flat.device if flat.device.type != "cpu" else torch.device(get_accelerator().current_device_name())


register()
