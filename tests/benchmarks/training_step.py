#!/usr/bin/env python3
"""Our training step against the documented recipe: padded to 512, logits for all positions, ZeRO-3.

    .venv/bin/python tests/benchmarks/training_step.py             # 2 workers on CPU; 3 runs take about 6 minutes
    .venv/bin/python tests/benchmarks/training_step.py --runs 1    # about 2 minutes

Both train with fine_tune of raytune_asha_hpo.py: the same samples in the same order, seed, optimizer and fp32. Each run
is a torchrun of its own, so its peak memory is its own. The model has BLOOM's 250,880 words and random weights in
6 layers of 256 (69 million parameters). The tokenizer is learnt from the texts: SQuAD if it is in ../shared/squad, else
the demo's. Nothing else should run on the machine. For GPUs: gpu.sh.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import REPO, SCRIPT, load_module

VOCABULARY, BATCH, WORKERS, EVAL_SAMPLES = 250_880, 2, 2, 8
SMALL = {"hidden_size": 256, "n_layer": 6, "n_head": 8}


def make_model(hpo, folder, shape):
    """FOLDER/squad, and in FOLDER/model a BLOOM with random weights and a byte-level BPE of these texts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

    make_demo = [sys.executable, REPO / "scripts/demo_assets.py", folder / "demo"]
    subprocess.run(make_demo, check=True, stdout=subprocess.DEVNULL)
    real = REPO.parent / "shared/squad"
    (folder / "squad").symlink_to(real if real.is_dir() else folder / "demo/squad")
    rows = [row for split in hpo.read_splits(folder / "squad") for row in split]
    texts = {text for row in rows for text in (row["context"], row["question"])}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"special_tokens": ["</s>", "<pad>"], "initial_alphabet": letters, "show_progress": False}
    bpe.train_from_iterator(sorted(texts), trainers.BpeTrainer(vocab_size=16384, **options))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(42)
    end = tokenizer.eos_token_id
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
    BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, **shape, **ends)).save_pretrained(folder / "model")


def matmul_flops():
    """FLOP/s of a large matrix product in fp16 on a GPU."""
    import torch

    n, best = 8192, 0.0
    a = torch.randn(n, n, device="cuda", dtype=torch.float16)
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(3):
            a @ a
        torch.cuda.synchronize()
        best = max(best, 3 * 2 * n**3 / (time.perf_counter() - start))
    return best


def padded_to_512(batch):
    """A batch as the recipe pads it."""
    import torch

    more = 512 - batch["input_ids"].shape[1]
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {key: torch.nn.functional.pad(batch[key], (more, 0), value=fill) for key, fill in fills.items()}


def measure(hpo, drawn, folder, recipe=False, **settings):
    """One fine_tune by ours or by the recipe, in this process of a group -> what was measured."""
    import torch
    from transformers import TrainerCallback

    found, steps, computed = {"eval": []}, [], []  # computed: tokens, positions with logits of a batch
    config, ours = hpo.DS_CONFIG, hpo.collate

    def collate(rows, accepted=()):
        batch = padded_to_512(ours(rows, ())) if recipe else ours(rows, accepted)
        computed.append((batch["input_ids"].numel(), batch["labels"].numel()))
        return batch

    class Measure(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            steps.append(time.perf_counter() - self.start)

        def on_evaluate(self, args, state, control, metrics, **__):
            found["eval"].append((metrics["eval_answer_loss"], metrics.get("eval_runtime")))

        def on_train_end(self, args, state, control, model, lr_scheduler, **__):
            words = VOCABULARY * model.config.hidden_size
            body = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()) - words
            tokens, positions = map(statistics.mean, zip(*computed[1 : len(steps)], strict=True))
            found.update(skipped=len(steps) - lr_scheduler.last_epoch, flop=6 * (body * tokens + words * positions))

    if recipe:
        stage_3 = json.loads(config.read_text())
        stage_3["zero_optimization"]["stage"] = 3
        hpo.DS_CONFIG = folder / f"ds_config-{os.environ['RANK']}.json"
        hpo.DS_CONFIG.write_text(json.dumps(stage_3))
        drawn = drawn | {"per_device_eval_batch_size": BATCH}  # 8 rows of 512 x 250,880 logits need 12 GB
    s = hpo.read_settings({"MODEL_NAME": f"{folder}/model", "SQUAD_DATA": f"{folder}/squad"} | settings)
    hpo.collate = collate
    hpo.fine_tune(drawn, s, *hpo.load_squad(s), [Measure()])
    hpo.collate, hpo.DS_CONFIG = ours, config
    return found | {"step": statistics.median(steps[1:])}


def child(variant, folder):
    """One worker of one run; writes what it measured to FOLDER/<rank>.json."""
    drawn = {"lr": 2e-5, "per_device_bs": BATCH, "wd": 0.01}
    found = measure(load_module(SCRIPT), drawn, folder, variant == "recipe", NUM_EPOCHS="1", GPUS_PER_WORKER="0",
                    TRAIN_SAMPLES="16", EVAL_SAMPLES=str(EVAL_SAMPLES))  # fmt: skip
    found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


def run(variant, folder):
    """One run in processes of its own: what child() measured, memory summed over the workers."""
    threads = str(max(1, (os.cpu_count() or 1) // WORKERS))
    environ = os.environ | {"OMP_NUM_THREADS": threads, "TORCHDYNAMO_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if variant == "ours":  # as in a job
        environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORKERS}", __file__]
    command += ["--child", variant, str(folder)]
    done = subprocess.run(command, env=environ, text=True, check=False, capture_output=True)
    if done.returncode:
        raise SystemExit(f"ERROR: {variant} ended with exit status {done.returncode}\n{done.stderr[-3000:]}")
    first, *others = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORKERS)]
    return first | {"memory": sum(each["memory"] for each in (first, *others))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs of each, in turn (default 3)")
    parser.add_argument("--child", nargs=2, metavar=("VARIANT", "FOLDER"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        return child(a.child[0], Path(a.child[1]))
    if a.runs < 1:
        parser.error("--runs wants 1 or more")
    runs = {"recipe": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        make_model(load_module(SCRIPT), Path(folder), SMALL)
        for _ in range(a.runs):
            for variant, found in runs.items():
                found.append(run(variant, Path(folder)))

    print(f"\n{WORKERS} workers, {os.cpu_count()} cores, 69M, fp32, 16 samples, seed 42, {a.runs} run(s)\n")
    print("| | recipe | ours | ratio |\n|---|---|---|---|")

    def row(name, value, form):
        recipe, ours = ([value(result) for result in found] for found in runs.values())
        median = statistics.median(ours) / statistics.median(recipe)
        cells = [f"{statistics.median(v):{form}} ({min(v):{form}} to {max(v):{form}})" for v in (recipe, ours)]
        print(f"| {name} | {' | '.join(cells)} | {median:.2f} |")

    row("samples/s, training", lambda r: BATCH * WORKERS / r["step"], ".2f")
    row("samples/s, evaluation", lambda r: EVAL_SAMPLES / r["eval"][0][1], ".2f")
    row("peak memory of all workers, GB", lambda r: r["memory"] / 1e9, ".2f")
    row("eval loss after the epoch", lambda r: r["eval"][0][0], ".6f")


if __name__ == "__main__":
    main()
