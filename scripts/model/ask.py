#!/usr/bin/env python3
"""Asks a model that --save has kept. Works offline, and on CPUs.

    python ask.py MODEL_FOLDER                                   # ten questions that its training has not seen
    python ask.py MODEL_FOLDER --question "Who ...?" --context "..."
    python ask.py MODEL_FOLDER --score                           # how many it answers correctly, beside its base model

--score asks TEST_SAMPLES questions (a variable; at most 100, if not set): drawn with the run's SEED from the
validation split without those that the run has trained or validated on. It prints, for the model and for the
one that it was trained from, exact match and F1 in per cent, as SQuAD defines them, and the loss with its
standard error over questions. More folders can be given.
"""

import argparse
import inspect
import json
import math
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import rooms  # noqa: F401  # isort: skip

import check_inputs
import raytune_asha_hpo as hpo
from check_inputs import InputError

MAX_LENGTH = 512  # tokens of prompt and answer, as in the training
NEW_TOKENS = 48  # of an answer, at most, if no right one is longer
AT_ONCE = 8  # questions in a batch


class Model:
    """A causal language model and its tokenizer, in fp32, so that no answer depends on the batch."""

    def __init__(self, name, chat=False):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        safe = {"trust_remote_code": False}  # no code that comes with a model is run
        self.tokenizer = AutoTokenizer.from_pretrained(name, **safe)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True, **safe)
        gpu = torch.cuda.is_available() and os.environ.get("GPUS_PER_WORKER") != "0"
        self.model, self.chat = model.eval().requires_grad_(False).to("cuda" if gpu else "cpu"), chat

    def answers(self, rows):
        """The model's answer to each row {context, question}, by greedy decoding: a list of texts."""
        prompts, right = [], [text for row in rows if "answers" in row for text in hpo.answers(row)]
        longest = max((len(self.tokenizer(text)["input_ids"]) for text in right), default=0)
        room = min(max(NEW_TOKENS, longest + 8), MAX_LENGTH // 2)
        for row in rows:
            coded = hpo.encode(row["context"], row["question"], "", self.tokenizer, MAX_LENGTH - room, self.chat)
            prompt = [token for token, label in zip(coded["input_ids"], coded["labels"], strict=True) if label == -100]
            prompts.append({"input_ids": prompt, "labels": [-100] * len(prompt)})
        end, found = self.tokenizer.eos_token_id, []
        for made in self.batches(prompts, accepted=()):  # padded on the left
            inputs = {name: made[name] for name in ("input_ids", "attention_mask")}
            greedy = {"do_sample": False, "num_beams": 1, "eos_token_id": end, "pad_token_id": end,
                      "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}  # fmt: skip
            tokens = self.model.generate(**inputs, **greedy, max_new_tokens=room)
            new = tokens[:, inputs["input_ids"].shape[1] :]
            found += [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        return found

    def losses(self, rows):
        """For each row {context, question, answers}: its loss, summed over its answer tokens; their number."""
        first = [(row["context"], row["question"], hpo.answers(row)[0]) for row in rows]
        coded, found = [hpo.encode(*row, self.tokenizer, MAX_LENGTH, self.chat) for row in first], []
        accepted = tuple(inspect.signature(self.model.forward).parameters)
        for made in self.batches(coded, accepted):
            labels = made.pop("labels")
            found += hpo.answer_losses(self.model(**made).logits, labels).tolist()
        return found

    def batches(self, rows, accepted):
        for start in range(0, len(rows), AT_ONCE):
            made = hpo.collate(rows[start : start + AT_ONCE], accepted)
            yield {name: x.to(self.model.device) if hasattr(x, "to") else x for name, x in made.items()}


# ---- Questions and scores --------------------------------------------------------------------------------
def settings_of(folder):
    """The settings that a kept model was trained with. Raises InputError if it was not kept by --save."""
    try:
        return SimpleNamespace(**json.loads(Path(folder, "training.json").read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, LookupError, TypeError):
        why = "no training.json in this folder; give one that bloom_hpo_manual.py --save wrote"
        raise InputError(f"MODEL_FOLDER={str(folder)!r}: {why}") from None


def wanted(text):
    """TEST_SAMPLES as a number; None if it is not set."""
    try:
        return check_inputs.read_number("TEST_SAMPLES", text) if text else None
    except InputError as error:
        raise InputError(f"TEST_SAMPLES={text!r:.500}: {error}") from None


def unseen(s, count):
    """Rows of the validation split that the run has neither trained nor validated on, drawn with its seed.

    count: how many; None: at most 100. Raises InputError if there are fewer. A text that occurs twice counts once.
    """
    text = lambda row: (row["context"], row["question"])
    train_rows, eval_rows = hpo.read_splits(s.SQUAD_DATA)
    seen = {text(row) for row in hpo.draw(train_rows, s.TRAIN_SAMPLES, s.SEED)}
    seen.update(text(row) for row in hpo.draw(eval_rows, s.EVAL_SAMPLES, s.SEED))
    rest = list({text(row): row for row in eval_rows if text(row) not in seen}.values())
    if not rest or (count or 1) > len(rest):
        fix = f"ask for at most {len(rest)}" if rest else "add some to its validation file"
        why = f"{s.SQUAD_DATA} has only {len(rest)} questions beside those of the run; {fix}"
        raise InputError(f"TEST_SAMPLES={str(count or 100)!r}: {why}")
    return random.Random(s.SEED).sample(rest, count or min(100, len(rest)))


def score(model, rows):
    """{exact_match, f1: per cent; eval_loss: nats per answer token; standard_error; questions}.

    Exact match and F1 are SQuAD's (Rajpurkar et al. 2016), against the nearest of a question's answers. The
    standard error is that of a ratio of means (Cochran, Sampling Techniques, section 6.4): questions have
    answers of different lengths.
    """
    from torchmetrics.functional.text import squad

    told = [{"id": str(i), "prediction_text": text} for i, text in enumerate(model.answers(rows))]
    right = [{"id": str(i), "answers": {"text": list(hpo.answers(row)), "answer_start": [0]}}
             for i, row in enumerate(rows)]  # fmt: skip
    match, losses = squad(told, right), model.losses(rows)
    n, tokens = len(rows), sum(count for _, count in losses)
    loss = sum(summed for summed, _ in losses) / tokens
    spread = sum((summed - loss * count) ** 2 for summed, count in losses) / max(1, n - 1)
    return {"exact_match": float(match["exact_match"]), "f1": float(match["f1"]), "eval_loss": loss,
            "standard_error": math.sqrt(spread / n) / (tokens / n), "questions": n}  # fmt: skip


def table(scores):
    width = max(34, *map(len, scores))
    n = next(iter(scores.values()))["questions"]
    yield f"{f'{n} questions that no trial has seen':<{width}}  exact match     F1  loss and its standard error"
    for name, found in scores.items():
        loss = f"{found['eval_loss']:.3f} +- {found['standard_error']:.3f}"
        yield f"{name:<{width}}  {found['exact_match']:>9.1f} %  {found['f1']:>4.1f} %  {loss}"


# ---- Command line ----------------------------------------------------------------------------------------
def main():
    """Returns the exit status: 0 success, 2 bad input (one line)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="MODEL_FOLDER", help="one that --save has written")
    parser.add_argument("--question", help="your own")
    parser.add_argument("--context", help="the text that has its answer")
    parser.add_argument("--score", action="store_true", help="exact match, F1 and loss on questions not seen")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --score: write the scores here, too")
    a = parser.parse_args()
    if a.score and a.question is not None:
        parser.error("give --score or --question")
    if a.question is None and a.context is not None:
        parser.error("give --question with --context")
    try:
        s = settings_of(a.folders[0])
        if a.question is not None:
            row = {"context": a.context, "question": a.question}
            print(Model(a.folders[0], s.CHAT_TEMPLATE).answers([row])[0])
            return 0
        rows = unseen(s, wanted(os.environ.get("TEST_SAMPLES")))
        if a.score:
            names = {f"{s.MODEL_NAME} (before training)": s.MODEL_NAME} | {folder: folder for folder in a.folders}
            scores = {text: score(Model(name, s.CHAT_TEMPLATE), rows) for text, name in names.items()}
            print(*table(scores), sep="\n")
            if a.json:
                a.json.write_text(json.dumps(scores, indent=1))
        else:
            rows = list({row["question"]: row for row in rows}.values())[:10]  # the demo asks some of them twice
            print(f"{len(rows)} questions that no trial has seen:")
            for row, answer in zip(rows, Model(a.folders[0], s.CHAT_TEMPLATE).answers(rows), strict=True):
                right = " | ".join(dict.fromkeys(hpo.answers(row)))
                print(f"{row['question']}\n    right: {right}\n    model: {answer or '(nothing)'}")
    except (InputError, OSError) as error:  # OSError: model or data are no longer there, or the disk is full
        print(f"ERROR: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
