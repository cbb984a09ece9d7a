"""Workarounds of libraries. Without this file, training on CPUs compiles an operator of DeepSpeed (a minute, once on
each node) and cannot split a model (ZeRO-3); in fp16 a batch with padding can give NaN, and a trial that diverges
fails instead of ending; the models of a process's trials, which fast_trials.py reuses, fill its memory; and on a GPU a
step of BLOOM-560M launches 7,000 kernels instead of 1,700, for which the GPU waits (tests/benchmarks/operations.py).
Tried with DeepSpeed 0.19.8 and transformers 5.23.0."""

import importlib.metadata
import math
import os

TESTED = ("0.19.8",)  # versions of DeepSpeed in which launch_less() replaces two methods
MASKED = -30_000  # an attention score that counts for nothing, in fp16 too


def before_training(gpu, ds_config):
    """Before DeepSpeed is imported and the model is made. ds_config is changed in place; it may be None."""
    import transformers

    # In fp16 the usual mask of -65,504 and a score of -16 make -inf, and a row of them NaN.
    mask = transformers.masking_utils.eager_mask
    transformers.AttentionMaskInterface.register("eager", lambda *a, **k: mask(*a, **k).clamp(min=MASKED))
    if not gpu:
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")  # neither torch nor DeepSpeed touches a GPU
    import deepspeed
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    ZeROOptimizer.defaults = property(lambda zero: zero.optimizer.defaults)  # lr_scheduler_type="polynomial" asks
    launch_less()
    if ds_config and (not gpu or os.environ.get("WORLD_SIZE", "1") == "1"):
        # One process sends nothing that could be overlapped; on CPUs these are slower.
        ds_config.setdefault("zero_optimization", {}).update(overlap_comm=False, contiguous_gradients=False)
    if ds_config and not gpu:
        ALL_OPS.pop("deepspeed_shm_comm", None)  # the operator that would be compiled; gloo does the same
        deepspeed.init_distributed(dist_backend="gloo")  # on CPUs accelerate does not; ZeRO-3 would see one process


def untried():
    """What another version of DeepSpeed costs, in words; "" if it is one of TESTED."""
    found = importlib.metadata.version("deepspeed")
    return "" if found in TESTED else f"DeepSpeed {found} is not {' or '.join(TESTED)}: on a GPU a step takes longer"


def launch_less():
    """One kernel for what BLOOM and DeepSpeed do in several, or in some for each tensor. Losses stay the same, but for
    BLOOM's activation, whose one kernel rounds once: in fp16 by 6e-5, in bf16 by 1e-3 (operations.py)."""
    import torch
    import transformers

    gelu = torch.nn.functional.gelu
    transformers.models.bloom.modeling_bloom.BloomGelu.forward = lambda _, x: gelu(x, approximate="tanh")
    if untried():
        return
    from deepspeed import comm
    from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.runtime.zero.utils import get_norm_dtype

    def check_overflow(zero, partition_gradients=True):
        if not zero.compute_grad_norm or zero.cpu_offload:  # else step() refuses a norm that is not finite
            zero._check_overflow(partition_gradients)

    def get_grad_norm_direct(zero, gradients, params, norm_type=2):
        gradients = [each.detach() for each in gradients if not getattr(each, "_zero_padding", False)]
        norms = torch._foreach_norm(gradients, norm_type, get_norm_dtype()) if gradients else [torch.zeros(1)]
        total = torch.stack([*norms]).pow(norm_type).sum().float().to(zero.device)
        comm.all_reduce(total, group=zero.dp_process_group)
        mask_nan_or_inf_with_val_inplace(total := total.pow(1 / norm_type), device=zero.device)
        return total

    DeepSpeedZeroOptimizer.check_overflow = check_overflow
    DeepSpeedZeroOptimizer.get_grad_norm_direct = get_grad_norm_direct


def train(trainer, **options):
    """trainer.train(), after which nothing of it stays in memory. fp16 that overflows at any scale: a loss of NaN."""
    try:
        trainer.train(**options)
    except Exception as error:
        if "loss scale" not in str(error):  # DeepSpeed's words for it
            raise
        trainer.state.epoch, diverged = math.floor(trainer.state.epoch) + 1, {"eval_answer_loss": math.nan}
        so_far = trainer.args, trainer.state, trainer.control
        trainer.callback_handler.on_evaluate(*so_far, diverged)
        trainer.callback_handler.on_save(*so_far)  # when raytune_pbt_hpo.py reports
    finally:  # else a DeepSpeed engine, with its model, lives as long as the process
        getattr(trainer.model_wrapped, "destroy", lambda: None)()
        trainer.accelerator.free_memory()
