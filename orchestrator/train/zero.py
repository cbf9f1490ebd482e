"""What DeepSpeed's ZeRO optimizers hold, as fragments: the one place that touches their private attributes.

tests/engine pins the behaviour. Imports no Ray.
"""

from __future__ import annotations

from typing import Any

import torch

from orchestrator.train.fragments import MOMENTS, PARAM, Box, Fragment, fragments_of


def engine_fragments(engine: Any) -> list[Fragment]:
    """The fragments that this rank of a DeepSpeed ZeRO-1 or ZeRO-2 engine owns.

    Before the first step the moments do not exist yet; they are made here as zeros, which is what they would be.
    """
    _link_moments(engine.optimizer)
    found = []
    for name, parameter in engine.module.named_parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:  # another rank's
            continue
        tensors = {PARAM: mapping.get_hp_fragment()} | {key: mapping.get_hp_fragment(key) for key in MOMENTS}
        start = mapping.lp_fragment_address.start
        found += fragments_of(name, tuple(parameter.shape), Box.whole(parameter.shape), start, tensors)
    return found


def set_step(engine: Any, step: int) -> None:
    """Tell the optimizer how many steps its moments have seen: Adam's bias correction depends on it."""
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = torch.tensor(float(step))


def refresh_parameters(engine: Any) -> None:
    """Make every rank's working parameters equal to the fp32 fragments, after these were written."""
    from deepspeed.runtime.utils import all_gather_dp_groups

    zero = engine.optimizer
    for parameter in engine.module.parameters():
        if getattr(parameter, "_hp_mapping", None) is not None:
            parameter._hp_mapping.update_lp()
    all_gather_dp_groups(
        groups_flat=zero.bit16_groups_flat,
        partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
        dp_process_group=zero.real_dp_process_group,
        start_alignment_factor=zero.nccl_start_alignment_factor,
        allgather_bucket_size=zero.allgather_bucket_size,
    )
    for group in range(len(zero.bit16_groups)):
        zero._update_model_bit16_weights(group)


def _link_moments(zero: Any) -> None:
    for flat in zero.single_partition_of_fp32_groups:
        state = zero.optimizer.state[flat]
        if not state:
            state["step"] = torch.tensor(0.0)
            state |= {key: torch.zeros_like(flat) for key in MOMENTS}
    zero._lazy_init_hp_params_optimizer_state()
