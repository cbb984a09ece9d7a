"""Five architectures in miniature, with the tokenizers of their kinds: from the check to answers, on own JSON lines."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import demo_assets
import pytest
import transformers as hf
from conftest import REPO, SCRIPT, best_of, call, load_module, reports_of

MANUAL, ASK = REPO / "scripts/manual_hpo/bloom_hpo_manual.py", load_module(REPO / "scripts/model/ask.py")
CITIES = [("Peru", "Lima"), ("Iceland", "Reykjavík"), ("Ghana", "Accra"), ("Cuba", "La Habana"), ("Iran", "Tehran")]
ASKED = {"train": 5 * ["Name the capital of", "Which city is the capital of", "Who knows the capital of"],
         "dev": ["The capital of", "What is the capital of"]}
ROWS = {key: [{"prompt": f"{ask} {of}?", "answer": city} for ask in ASKED[key] for of, city in CITIES] for key in ASKED}
WORDS = re.findall(r" ?\S+", "\n".join(" ".join(row.values()) for row in ROWS["train"] if row["answer"].isascii()))
COMMON = {"LR_LOWER": "6e-3", "LR_UPPER": "1e-2", "BS_CHOICES": "4", "NUM_SAMPLES": "2", "NUM_EPOCHS": "6",
          "TRAIN_SAMPLES": "75", "EVAL_SAMPLES": "5", "WORKERS_PER_TRIAL": "1", "CPUS_PER_WORKER": "1",
          # What torchrun sets, for one process (port 0: any that is free), and what the jobs set.
          "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
          "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}  # fmt: skip
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
         "intermediate_size": 64, "initializer_range": 0.1}  # fmt: skip
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # Jinja drops a last line end, so it gets two
QWENS = {"extra_special_tokens": ["<|im_start|>"], "chat_template": CHAT.format("{{ messages[0].content }}") + "\n"}
KINDS = {"bloom": demo_assets.make_tokenizer, "gpt2": lambda: hf.GPT2Tokenizer().train_new_from_iterator(WORDS, 400),
         "qwen3": lambda: hf.Qwen2Tokenizer(eos_token="<|im_end|>", **QWENS).train_new_from_iterator(WORDS, 400),
         "llama": lambda: byte_fallback(hf.LlamaTokenizer), "gemma": lambda: byte_fallback(hf.GemmaTokenizer)}


def byte_fallback(kind):
    """BOS begins each text, and letters that it has not learned become bytes: the library's training loses both."""
    learned = json.loads(kind().train_new_from_iterator(WORDS, 400).backend_tokenizer.to_str())["model"]
    vocab = dict.fromkeys([*sorted(kind().get_vocab()), *(f"<0x{i:02X}>" for i in range(256)), *learned["vocab"]])
    return kind({word: i for i, word in enumerate(vocab)}, [*map(tuple, learned["merges"])], add_bos_token=True)


def make(kind, folder):
    """A model with random weights, and questions -> the variables of a search"""
    (tokenizer := KINDS[kind]()).save_pretrained(folder / "base")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    hf.set_seed(0)
    config = hf.AutoConfig.for_model(kind, vocab_size=len(tokenizer), **SHAPE, **ids)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    for split, rows in ROWS.items():
        lines = "\r\n".join(map(json.dumps, rows))  # as Windows writes them
        (folder / f"{split}.jsonl").write_text(f"\ufeff{lines}\n\n", encoding="utf-8", newline="")
    return COMMON | {"MODEL_NAME": f"{folder}/base", "SQUAD_DATA": f"{folder}", "CHAT_TEMPLATE": f"{kind == 'qwen3':d}"}


@pytest.fixture(scope="module")
def runs(private_ray, checks, tmp_path_factory):
    """{kind: (folder, variables, the check, the search, a promise of the training of its best)}"""
    found, options = {}, {"text": True, "capture_output": True, "timeout": 200}
    with ThreadPoolExecutor(1) as pool:  # each trains beside the next one's search
        for kind in KINDS:
            variables = make(kind, folder := tmp_path_factory.mktemp(kind))
            with mock.patch.dict(os.environ, variables | private_ray):
                check, options["env"] = call(checks), dict(os.environ)
            search = subprocess.run([sys.executable, SCRIPT, "--run-dir", folder / "run"], check=False, **options)
            best = [sys.executable, MANUAL, "--best", folder / "run", "--save", folder / "model"]
            found[kind] = folder, variables, check, search, pool.submit(subprocess.run, best, **options)
        yield found


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_each_kind_learns_and_answers(kind, runs, hpo):
    folder, variables, check, search, training = runs[kind]
    for step in (check, search, training := training.result(200)):
        assert step.returncode == 0, step.stdout + step.stderr
    losses = [report["eval_loss"] for trial in reports_of(folder / "run").values() for report in trial]
    best, model = best_of(search.stdout)["eval_loss"], folder / "model"
    assert all(best <= loss < 99 for loss in losses) and best < max(losses) / 4
    assert float(re.search(r"RESULT .* eval_loss=(\S+)", training.stdout)[1]) == pytest.approx(best, rel=0.01)
    kept, tokenizer = hf.AutoModelForCausalLM.from_pretrained(model), hf.AutoTokenizer.from_pretrained(model)
    assert (kept.lm_head.weight is kept.get_input_embeddings().weight) == (kind in ("bloom", "gpt2", "gemma"))
    rows, text = hpo.load_squad(hpo.read_settings(variables))[0], CHAT if kind == "qwen3" else "{}"
    begins = {tuple(row["input_ids"][: row["labels"].count(-100)]) for row in rows}
    assert begins == {tuple(tokenizer(text.format(row["prompt"]))["input_ids"]) for row in ROWS["train"]}
    assert kind not in ("llama", "gemma") or all(ids[0] == tokenizer.bos_token_id not in ids[1:] for ids in begins)
    for row in ROWS["train"][:2]:
        assert call(ASK, model, "--question", row["prompt"]).stdout == f"{row['answer']}\n"
    right, said = (re.findall(f"    {who}: (.*)", call(ASK, model).stdout) for who in ("right", "model"))
    assert right == said and len(said) == 5
    before, after = map(float, re.findall(r"([\d.]+) \+- ", call(ASK, model, "--score").stdout))
    assert after < before / 4
