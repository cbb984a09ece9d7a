#!/usr/bin/env python3
"""How many kernels a training step launches: ours, DeepSpeed's and BLOOM's own, and the documented recipe's.

    .venv/bin/python tests/benchmarks/operations.py        # no GPU is needed; a minute or two

A large GPU computes a step of BLOOM-560M in less time than a CPU takes to launch its kernels. Counted are the calls of
PyTorch's operators that would launch one, so all but views and allocations, in the third step, in BLOOM's structure (24
layers, 293 tensors) with small ones and the demo's vocabulary. Some operators launch two or three.

Each case is trained three times: as DeepSpeed and BLOOM do it; with launch_less() of library_fixes.py, but BLOOM's own
activation (the loss must be the same in all digits); as ours. CPUs compute fp16; DeepSpeed is told that they do.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import REPO, SCRIPT, load_module
from training_step import padded_to_512

NO_KERNEL = {"_unsafe_view", "lift_fresh", "resize_", "set_", "is_same_size", "empty", "empty_like", "empty_strided",
             "new_empty", "new_empty_strided", "_record_function_enter_new"}  # fmt: skip
CASES = [{"precision": p, "stage": stage} for stage in (1, 2, 3) for p in ("fp16", "bf16")]
CASES.append({"precision": "fp16", "stage": 2, "scale": 24, "lr": 1e-3, "samples": "32"})  # whose first steps overflow
VARIANTS = ("recipe", "own", "same", "ours")


def make_model(folder):
    """The demo in FOLDER, with 24 layers in place of its two."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    subprocess.run([sys.executable, REPO / "scripts/demo_assets.py", folder], check=True, stdout=subprocess.DEVNULL)
    torch.manual_seed(42)
    config = AutoConfig.from_pretrained(folder / "model", n_layer=24)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")


def train(hpo, case, folder, shipped, recipe):
    """One training -> {"launches" of a step, "loss", steps "skipped"}."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import TrainerCallback

    steps, found, ours = [], {}, hpo.collate

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if steps and not operator.is_view and operator.__name__.split(".")[0] not in NO_KERNEL:
                steps[-1] += 1
            return operator(*args, **kwargs or {})

    class Measure(TrainerCallback):
        def on_step_begin(self, *_, **__):
            steps.append(0)

        def on_step_end(self, *_, **__):
            found["launches"] = int(statistics.median(steps))

        def on_evaluate(self, args, state, control, metrics, **__):
            found["loss"] = metrics["eval_answer_loss"]

        def on_train_end(self, args, state, control, lr_scheduler, **__):
            found["skipped"] = state.global_step - lr_scheduler.last_epoch

    zero = shipped["zero_optimization"] | {"stage": case["stage"]}
    fp16 = shipped["fp16"] | {"initial_scale_power": case.get("scale", shipped["fp16"]["initial_scale_power"])}
    hpo.DS_CONFIG.write_text(json.dumps(shipped | {"zero_optimization": zero, "fp16": fp16}))
    if recipe:
        hpo.collate = lambda rows, accepted=(): padded_to_512(ours(rows, ()))
    variables = {"MODEL_NAME": f"{folder}/model", "SQUAD_DATA": f"{folder}/squad", "PRECISION": case["precision"],
                 "TRAIN_SAMPLES": case.get("samples", "8"), "EVAL_SAMPLES": "2"}  # fmt: skip
    s = hpo.read_settings(variables | {"NUM_EPOCHS": "1", "GPUS_PER_WORKER": "0"})
    rows = hpo.load_squad(s)
    with Count():
        hpo.fine_tune({"lr": case.get("lr", 2e-5), "per_device_bs": 2, "wd": 0.01}, s, *rows, [Measure()])
    hpo.collate = ours
    return found


def child(folder, cases):
    """In one process of a group: trains all cases, and writes [{variant: found}] to FOLDER/<rank>."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import transformers
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True
    hpo, found = load_module(SCRIPT), [{} for _ in cases]
    fixes, gelu = hpo.neighbour("library_fixes"), transformers.models.bloom.modeling_bloom.BloomGelu
    before_training, launch_less, own = fixes.before_training, fixes.launch_less, gelu.forward
    shipped, hpo.DS_CONFIG = json.loads(hpo.DS_CONFIG.read_text()), folder / f"{os.environ['RANK']}.json"

    def as_on_gpus(gpu, ds_config):
        zero = dict(ds_config["zero_optimization"])
        before_training(gpu, ds_config)
        if os.environ["WORLD_SIZE"] != "1" or fixes.launch_less is not launch_less:
            ds_config["zero_optimization"] = zero

    def same():
        launch_less()
        gelu.forward = own

    fixes.before_training = as_on_gpus
    for stages in ((1, 2), (3,)):  # 3 at last: it changes what follows
        for variant in VARIANTS[stages != (3,) :]:
            gelu.forward = own
            fixes.launch_less = {"same": same, "ours": launch_less}.get(variant, lambda: None)
            for case, each in zip(cases, found, strict=True):
                if case["stage"] in stages:
                    each[variant] = train(hpo, case, folder, shipped, variant == "recipe")
    (folder / f"found-{os.environ['RANK']}").write_text(json.dumps(found))


def run(workers, cases, folder):
    """child() in so many processes -> what the first has found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={workers}", __file__]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command += [folder, json.dumps(cases)]
    done = subprocess.run(command, env=environ, text=True, check=False, capture_output=True, timeout=1800)
    if done.returncode:
        raise SystemExit(f"ERROR: exit status {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads((folder / "found-0").read_text())


def measure(groups):
    """groups: [(workers, cases)] -> [(workers, case, {variant: found})]"""
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        return [(workers, case, each) for workers, cases in groups
                for case, each in zip(cases, run(workers, cases, Path(folder)), strict=True)]  # fmt: skip


def main():
    if len(sys.argv) > 1:
        return child(Path(sys.argv[1]), json.loads(sys.argv[2]))
    print("| workers | precision | ZeRO | recipe | DeepSpeed's and BLOOM's own | ours | ratio | eval loss | ours |")
    print("|---|---|---|---|---|---|---|---|---|")
    for workers, case, found in measure([(1, CASES), (2, CASES)]):
        own, same, ours = (found[variant] for variant in VARIANTS[1:])
        if same | {"launches": own["launches"]} != own:
            raise SystemExit(f"ERROR: {case}: not the same: {own}, {same}")
        print(
            f"| {workers} | {case['precision']}{', overflows' if 'scale' in case else ''} | {case['stage']} "
            f"| {found.get('recipe', {}).get('launches', '')} | {own['launches']} | {ours['launches']} "
            f"| {ours['launches'] / own['launches']:.2f} | {own['loss']:.6f} | {ours['loss']:.6f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
