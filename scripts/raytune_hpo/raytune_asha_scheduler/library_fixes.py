"""Workarounds of libraries. Without this file, training on CPUs compiles an operator of DeepSpeed (a minute, once on
each node) and cannot split a model (ZeRO-3); in fp16 a batch with padding can give NaN, and a trial that diverges
fails instead of ending; and the models of a process's trials, which fast_trials.py reuses, fill its memory.
Tried with DeepSpeed 0.19.8 and transformers 5.23.0."""

import math
import os

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
    if gpu:
        return
    if ds_config:
        ALL_OPS.pop("deepspeed_shm_comm", None)  # the operator that would be compiled; gloo does the same
        # On CPUs overlapping and contiguous gradients are slower.
        ds_config.setdefault("zero_optimization", {}).update(overlap_comm=False, contiguous_gradients=False)
        deepspeed.init_distributed(dist_backend="gloo")  # on CPUs accelerate does not; ZeRO-3 would see one process


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
