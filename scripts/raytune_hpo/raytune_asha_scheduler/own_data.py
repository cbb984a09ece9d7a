"""Your own questions: JSON lines, and prompts in the chat template of a model. Without this file only SQuAD is read."""

import json


def read_splits(folder):
    """(training, validation) of train.jsonl and dev.jsonl, in the form that the lesson's read_splits() gives.

    A line is {"prompt": ..., "answer": ...}. There is no context: the prompt is the whole question.
    """
    return tuple(read_jsonl(folder / name) for name in ("train.jsonl", "dev.jsonl"))


def read_jsonl(path):
    lines = (json.loads(line) for line in path.read_text("utf-8-sig").split("\n") if line.strip())
    return [{"context": None, "question": row["prompt"], "answers": {"text": [row["answer"]]}} for row in lines]


def in_chat_template(body, ask, tokenizer):
    """The two texts of a prompt as a user's message in the tokenizer's chat template, still in two."""
    message = [{"role": "user", "content": "@@"}]
    before, after = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True).split("@@")
    return before + body, ask + after
