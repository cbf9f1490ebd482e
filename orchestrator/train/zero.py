"""What DeepSpeed's optimizers hold, as fragments, and the moment before they update: the one place that touches their
private attributes, pinned by tests/engine.

Every kind answers to the same four calls. `fragments()` are views of the live fp32 state; `set_step(n)` tells Adam how
many updates its moments have seen, on which its bias correction depends; `refresh()` makes the working parameters of
all ranks equal to the fp32 fragments after these were written; `guard(accept)` has every update judged. Imports no Ray.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch

from orchestrator.train.fragments import MOMENTS, PARAM, Fragment, fragments_of
from orchestrator.train.stage import Part

Parts = list[tuple[Part, torch.nn.Parameter]]
Accept = Callable[[float], bool]
"""Called on every rank with the norm of the global gradient, infinite if it has none; False drops the update."""
_REFUSED = -1.0
"""What DeepSpeed takes for the norm of a gradient with NaN or Inf: it drops the update and cleans up."""


def attach(backend: str) -> None:
    """Let DeepSpeed use the process group that is there, whoever made it."""
    import deepspeed

    _import_muon()
    deepspeed.init_distributed(backend, verbose=False)


def _import_muon() -> None:
    """Import DeepSpeed's Muon, which none of ours is, without what it does then: it has torch's compiler imported, for
    two seconds, to compile two functions that only Muon calls. DeepSpeed imports it to see that an optimizer is
    something else."""
    with mock.patch.object(torch, "compile", _uncompiled):
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401


def _uncompiled(function: Any = None, **_: Any) -> Any:
    return function or _uncompiled


def initialize(module: torch.nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], grid: Any) -> Any:
    """A DeepSpeed engine.

    Args:
        grid: process groups of the layout (orchestrator.train.pipeline.grid), None where replicas are single ranks.
    """
    import deepspeed
    from deepspeed.utils import groups

    groups.mpu = grid  # it outlives an engine, and the next one may have none
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config, mpu=grid)[0]


def split(layer: torch.nn.Module, config: dict[str, Any], grid: Any) -> None:
    """Split the parameters of a layer over the replicas, for ZeRO-3."""
    import deepspeed

    replicas = grid.get_data_parallel_group() if grid else None
    deepspeed.zero.Init(module=layer, config_dict_or_path=config, data_parallel_group=replicas)


def optimizer_state(engine: Any, parts: Parts, clip_norm: float) -> ZeroState:
    """What a DeepSpeed engine's optimizer holds, of the parameters of this rank."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    kinds: dict[type, Callable[..., ZeroState]] = {
        BF16_Optimizer: Bf16,
        DeepSpeedZeroOptimizer_Stage3: Stage3,
        DeepSpeedZeroOptimizer: Stages1And2,
    }
    make = next((kinds[known] for known in kinds if isinstance(engine.optimizer, known)), Unpartitioned)
    return make(engine, parts, clip_norm)


class ZeroState(abc.ABC):
    def __init__(self, engine: Any, parts: Parts, clip_norm: float) -> None:
        self.zero = engine.optimizer
        self.parts = parts
        self.clip_norm = clip_norm

    def fragments(self) -> list[Fragment]:
        found = []
        for part, parameter in self.parts:
            for start, tensors in self._held(parameter):
                found += fragments_of(part.name, part.shape, part.box, start, tensors)
        return found

    def set_step(self, step: int) -> None:
        for state in self._adam().state.values():
            state["step"].fill_(float(step))

    def set_loss_scale(self, scale: float) -> None:
        """Of training in fp16."""
        self.zero.loss_scaler.cur_scale = scale

    def _adam(self) -> torch.optim.Optimizer:
        adam: torch.optim.Optimizer = self.zero.optimizer
        return adam

    def _make_moments(self, flat: Iterable[torch.Tensor]) -> None:
        """Before the first update they do not exist; zeros are what they would be."""
        adam = self._adam()
        fused = any(group.get("fused") for group in adam.param_groups)
        for tensor in flat:
            state = adam.state[tensor]
            if not state:
                state["step"] = torch.zeros((), device=tensor.device if fused else None)
                state |= {key: torch.zeros_like(tensor, memory_format=torch.preserve_format) for key in MOMENTS}

    def _held(self, parameter: torch.nn.Parameter) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """What this rank owns of a parameter: where it begins in it, and the 1-D tensors of its state."""
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:  # else it is another rank's
            tensors = {PARAM: mapping.get_hp_fragment()} | {key: mapping.get_hp_fragment(key) for key in MOMENTS}
            yield mapping.lp_fragment_address.start, tensors

    @abc.abstractmethod
    def refresh(self) -> None: ...

    @abc.abstractmethod
    def guard(self, accept: Accept) -> None: ...


class Stages1And2(ZeroState):
    """ZeRO-1 and ZeRO-2, with or without offload, also under pipeline parallelism."""

    def fragments(self) -> list[Fragment]:
        self._make_moments(self.zero.single_partition_of_fp32_groups)
        self.zero._lazy_init_hp_params_optimizer_state()
        return super().fragments()

    def refresh(self) -> None:
        self.zero.update_lp_params()
        for group in range(len(self.zero.bit16_groups)):
            self.zero._update_model_bit16_weights(group)

    def guard(self, accept: Accept) -> None:
        norm_of = self.zero.scaled_global_norm

        def judged() -> Any:
            norm = norm_of()
            return norm if _accepted(accept, norm, self.zero.loss_scale) else _refused(norm)

        self.zero.scaled_global_norm = judged


class Stage3(ZeroState):
    """ZeRO-3: parameters are split too, each over all ranks."""

    def fragments(self) -> list[Fragment]:
        self._make_moments(self.zero.fp32_partitioned_groups_flat)
        return super().fragments()

    def _held(self, parameter: torch.nn.Parameter) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        split: Any = parameter
        start = split.ds_tensor.ds_numel * self.zero._get_param_partition_rank(parameter)
        length = min(split.ds_tensor.ds_numel, split.ds_numel - start)
        if length > 0:
            state = functools.partial(self.zero._get_fp32_opt_state_partition, parameter, release_swap_buffers=True)
            yield start, {PARAM: state()[0][:length]} | {key: state(optim_state_key=key)[0][:length] for key in MOMENTS}

    def refresh(self) -> None:
        self.zero._partition_all_parameters()
        for sub_group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        kept_whole = self.zero.persistent_parameters
        if kept_whole:
            kept_whole[0].all_gather(kept_whole)

    def guard(self, accept: Accept) -> None:
        norms_of = self.zero._get_norm_groups

        def judged() -> Any:
            norms = norms_of()
            norm = torch.stack([torch.as_tensor(n, dtype=torch.float32) for n in norms]).norm()
            if any(float(n) == _REFUSED for n in norms):
                norm = torch.tensor(_REFUSED)
            return norms if _accepted(accept, norm, self.zero.loss_scale) else [_refused(norm)]

        self.zero._get_norm_groups = judged


class Bf16(ZeroState):
    """DeepSpeed's optimizer for bf16 with ZeRO-1, which keeps the whole gradient in fp32."""

    def fragments(self) -> list[Fragment]:
        self._make_moments(self.zero.fp32_groups_flat_partition)
        self.zero._lazy_init_hp_params_optimizer_state()
        return super().fragments()

    def refresh(self) -> None:
        self.zero.update_lp_params()

    def guard(self, accept: Accept) -> None:
        from deepspeed.runtime.utils import get_global_norm_of_tensors

        zero, step = self.zero, self.zero.step

        def judged() -> None:
            norm = get_global_norm_of_tensors(zero.get_grads_for_norm()[0], mpu=zero.mpu)
            if _accepted(accept, norm, 1.0):
                step()
            else:
                zero.overflow, zero._global_grad_norm = True, norm
                zero.zero_grad()

        zero.step = judged


class Unpartitioned(ZeroState):
    """ZeRO-0 in fp32: the parameters are the state."""

    def _adam(self) -> torch.optim.Optimizer:
        adam: torch.optim.Optimizer = self.zero
        return adam

    def fragments(self) -> list[Fragment]:
        self._make_moments(parameter for _, parameter in self.parts)
        return super().fragments()

    def _held(self, parameter: torch.nn.Parameter) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        state = self.zero.state[parameter]
        whole = {PARAM: parameter.data} | {key: state[key] for key in MOMENTS}
        yield 0, {kind: tensor.view(-1) for kind, tensor in whole.items()}

    def refresh(self) -> None:
        """Nothing to do: every rank has read all of it."""

    def guard(self, accept: Accept) -> None:
        """Clips too: DeepSpeed does so here without telling the norm, and its configuration must not ask for it."""
        zero, step = self.zero, self.zero.step

        def judged() -> None:
            norm = torch.nn.utils.clip_grad_norm_([parameter for _, parameter in self.parts], self.clip_norm)
            if accept(float(norm)) and norm.isfinite():
                step()

        zero.step = judged


def _accepted(accept: Accept, norm: Any, loss_scale: float) -> bool:
    value = float(norm)
    return accept(float("inf") if value == _REFUSED else value / loss_scale) and value != _REFUSED


def _refused(norm: Any) -> Any:
    return torch.full_like(torch.as_tensor(norm, dtype=torch.float32), _REFUSED)
