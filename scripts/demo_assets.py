#!/usr/bin/env python3
"""Make the embedded demo: a tiny BLOOM, and a small SQuAD about an invented town. No network, a few seconds.

    .venv/bin/python scripts/demo_assets.py .demo                        # 1,000 train and 100 dev questions
    .venv/bin/python scripts/demo_assets.py /tmp/d --train 240 --seed 7  # fewer, and other texts on the same town

OUT/model       BLOOM architecture, random weights, byte-level BPE tokenizer; loads with transformers' Auto classes
OUT/squad       train-v1.1.json and dev-v1.1.json, in SQuAD v1.1 format
OUT/demo.json   what was made: the options, and a checksum of this script and of every file

Each question asks for one of 32 facts that hold in the whole data set ("Who keeps the north tower?"). No context is
in both files, and the dev questions are worded as no train question is. A model that has learned the facts answers
them; one that has learned only how often each answer occurs does not. So the learning rate visibly matters: search it
from 1e-4 to 5e-2, the best are near 3e-3. (Random weights want more than a pre-trained model does.)
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import uuid
from pathlib import Path

MAX_QUESTIONS = 20_000  # per file; the sentences below combine to 77,760 contexts of two questions each
MAX_SEED = 2**32 - 1
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]  # ids 0, 1, 2, 3, as in BLOOM
MAX_VOCABULARY = 2_048

# ---- The town of Larkmoor --------------------------------------------------------------------------------------------
# fmt: off
FACTS = {  # place: (keeper, colour of the door, what it holds, when it opens)
    "north tower": ("Ilda Marrow", "pale green", "storm lanterns", "first light"),
    "old mill": ("Tovin Brask", "red", "barley flour", "seven o'clock"),
    "glass house": ("Senna Quill", "white", "lemon trees", "noon"),
    "boat yard": ("Captain Orrel", "dark blue", "oak timber", "low tide"),
    "library": ("Pell Anwick", "yellow", "sea charts", "ten o'clock"),
    "observatory": ("Doctor Vey", "black", "a brass telescope", "dusk"),
    "bakery": ("Hanno Lisk", "orange", "rye bread", "dawn"),
    "clock shop": ("Mira Tansel", "silver grey", "broken watches", "half past eight"),
}
STATEMENTS = (  # row i tells column i of FACTS, in one of three wordings
    ("The {place} is kept by {answer}.", "The keeper of the {place} is {answer}.",
     "It is {answer} who keeps the {place}."),
    ("The {place} has a {answer} door.", "The door of the {place} is {answer}.",
     "Look for the {answer} door of the {place}."),
    ("The {place} holds {answer}.", "In the {place} you find {answer}.",
     "People come to the {place} for {answer}."),
    ("The {place} opens at {answer}.", "At {answer} the {place} opens.",
     "Nobody enters the {place} before {answer}."),
)
QUESTIONS = (  # row i asks for column i of FACTS; the last wording of each row is asked in the dev file only
    ("Who keeps the {place}?", "Who is the keeper of the {place}?", "Who has charge of the {place}?",
     "Who is it that keeps the {place}?"),
    ("What colour is the door of the {place}?", "How is the door of the {place} painted?",
     "What is the colour of the door of the {place}?", "Which colour is the door of the {place}?"),
    ("What does the {place} hold?", "What do you find in the {place}?", "What do people come to the {place} for?",
     "What can you find in the {place}?"),
    ("When does the {place} open?", "At what time does the {place} open?", "When may you enter the {place}?",
     "At what hour does the {place} open?"),
)
OPENINGS = (
    "Larkmoor is a small town by the sea.", "Snow fell on Larkmoor during the night.",
    "The road to Larkmoor follows the river.", "Our guide knew every street of the town.",
    "On the second day the rain stopped.", "Visitors reach the town by boat.",
    "Most houses in Larkmoor are made of stone.", "We walked up from the harbour in the morning.",
    "A new map of Larkmoor hangs in the square.", "The wind came from the west all week.",
)
CLOSINGS = (
    "Everyone in town knows this.", "We wrote it down in our notebook.",
    "It has been so for many years.", "The children told us that first.",
    "A small sign on the wall says so.", "Then we went on to the harbour.",
    "Nothing else happened that day.", "The evening was quiet and cold.",
)
# fmt: on

# ---- For the tokenizer only: pieces of ordinary English, so that texts other than the town's are not cut into letters
COMMON_WORDS = """
the of and in to a was is for as on with by that it from his at are were an which he be this also had or has first
their its one new not have who but they two been after other when during there more all she her most some between time
only into years no many than then made can such over these may where three about would became used known being later
world however through under city second him war well while part called state national people both several year against
until including because before them early large each did number will century since system name university work
government south north group united so American English British French German Roman public school if same life four
any often use end major great history very film club around main music population set those found team much include
five long could area season law company small still high general late named day power country although states within
began based period similar different using due said river west east place water game local near order members without
old now held along form development species following among down built another political international support result
service six do what research king per original official led left single own western eastern southern northern example
even list house every third home important church language human total family court party president member community
right free military force forces land building just popular produced good common special way little point up out you
how men man head body line top term death field age air areas modern black white side control further students
education college science social economic lost won play player players games league record records million percent
thousand hundred ten largest according rather instead usually generally throughout become established considered
received located worked provide provided developed production business industry market trade economy central council
act rights theory energy process material effect cause change level rate low higher lower less least able make making
take taken took give given see seen came come go went get got put let say says think show shown open close move book
art style design type kind class value
"""
ONSETS = "b c d f g h j k l m n p r s t v w y z ch sh th st sp sc tr pr br cr gr dr fr cl pl fl bl gl wh qu"
CODAS = "b c d f g k l m n p r s t v x th ch sh st nt nd ng nk ll ss ck rt rd rs rn ct"
VOWELS = "aeiou"


class DemoError(Exception):
    """A reason not to make the demo, with what to do about it; printed as one line."""


def tell(template: str, place: str, answer: str) -> tuple[str, int]:
    """Fill a statement; return the sentence, and the offset in characters at which the answer stands in it."""
    before, _, after = template.partition("{answer}")
    before = before.format(place=place)
    return before + answer + after.format(place=place), len(before)


def make_paragraph(rng: random.Random, wordings: slice) -> dict:
    """A SQuAD paragraph: a context of 3 or 4 sentences, and two questions (still without id) which it answers."""
    place = rng.choice(list(FACTS))
    context, qas = rng.choice(OPENINGS), []
    for column in rng.sample(range(len(STATEMENTS)), k=2):
        answer = FACTS[place][column]
        sentence, offset = tell(rng.choice(STATEMENTS[column]), place, answer)
        question = rng.choice(QUESTIONS[column][wordings]).format(place=place)
        qas.append({"question": question, "answers": [{"text": answer, "answer_start": len(context) + 1 + offset}]})
        context += f" {sentence}"
    if rng.random() < 0.5:
        context += f" {rng.choice(CLOSINGS)}"
    return {"context": context, "qas": qas}


def make_squad(rng: random.Random, split: str, questions: int, wordings: slice, used: set[str]) -> dict:
    """A SQuAD v1.1 document of exactly `questions` questions, on contexts that are not in `used`; adds them to it."""
    pages, made = [], 0
    while made < questions:
        paragraph = make_paragraph(rng, wordings)
        if paragraph["context"] in used:
            continue
        used.add(paragraph["context"])
        paragraph["qas"] = paragraph["qas"][: questions - made]
        for qa in paragraph["qas"]:
            qa["id"] = f"larkmoor-{split}-{made:05d}"
            made += 1
        # A page mixes all places, so that the first N questions of the file are as good a sample as any other N.
        if not pages or len(pages[-1]["paragraphs"]) == 5:
            pages.append({"title": f"Larkmoor_{split}_notebook,_page_{len(pages) + 1}", "paragraphs": []})
        pages[-1]["paragraphs"].append(paragraph)
    return {"version": "1.1", "data": pages}


def make_tokenizer():
    """A byte-level BPE tokenizer like BLOOM's: any text encodes, decodes to itself, and gets no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    # It learns from all that can be said of the town, not from the texts drawn: the same tokenizer for every --seed.
    texts = ["Context: Question: Answer:", *OPENINGS, *CLOSINGS, *(f" {word}" for word in COMMON_WORDS.split())]
    for place, answers in FACTS.items():
        for column, answer in enumerate(answers):
            texts += [tell(wording, place, answer)[0] for wording in STATEMENTS[column] + QUESTIONS[column]]
    for vowel in VOWELS:
        texts += [vowel + coda for coda in CODAS.split()]
        for onset in ONSETS.split():
            texts += [onset + vowel, f" {onset}{vowel}", f" {onset.capitalize()}{vowel}"]

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # all 256 bytes, hence never <unk>
    trainer = trainers.BpeTrainer(vocab_size=MAX_VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    unk, bos, eos, pad = SPECIAL_TOKENS
    # Without clean_up_tokenization_spaces=False, decoding would drop the blank in "a ."
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad,
                                   padding_side="left", clean_up_tokenization_spaces=False)  # fmt: skip


def make_model(tokenizer):
    """A BLOOM of 2 layers of 64, without dropout; its random weights are the same for every --seed."""
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    # BLOOM's initializer_range of 0.02 is for widths of 1,024 and more. At width 64 learning starts too slowly with it:
    # five epochs of 240 questions then end at a dev loss of 0.5 to 0.8 instead of 0.1.
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=64, n_layer=2, n_head=4, initializer_range=0.1,
                         pad_token_id=tokenizer.pad_token_id, **ids)  # fmt: skip
    torch.manual_seed(0)
    return BloomForCausalLM(config)


def make_demo(folder: Path, options: dict) -> int:
    """Write the whole demo to `folder`, which does not exist yet; return the number of parameters of the model."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where installed, warns that it sees no GPU
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    # Weights are written readable by their owner only; give them the mode of the other files, for shared folders.
    shutil.copymode(folder / "model/config.json", folder / "model/model.safetensors")

    rng, used = random.Random(options["seed"]), set()
    (folder / "squad").mkdir()
    for split, wordings in (("train", slice(None, -1)), ("dev", slice(-1, None))):
        document = make_squad(rng, split, options[split], wordings, used)
        (folder / f"squad/{split}-v1.1.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    files = {str(path.relative_to(folder)): checksum(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / "demo.json").write_text(json.dumps({"options": options, "files": files}, indent=1) + "\n")
    return model.num_parameters()


def checksum(path: Path) -> str:
    """SHA-256 of a file; empty if there is no such file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def is_made(out: Path, options: dict) -> bool:
    """Whether `out` holds exactly what these options make. DemoError if making it would destroy what others made."""
    if out.exists() and not out.is_dir():
        raise DemoError(f"{out} is a file; name a folder")
    if not out.exists() or not any(out.iterdir()):
        return False
    try:
        stamp = json.loads((out / "demo.json").read_text(encoding="utf-8"))
        made_with, files = stamp["options"], dict(stamp["files"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise DemoError(f"{out} is not empty and was not made by this script; name another folder") from None
    present = {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()} - {"demo.json"}
    changed = [name for name, digest in files.items() if checksum(out / name) != digest]
    if made_with == options and not changed:
        return True
    if foreign := sorted(present - set(files) | present.intersection(changed)):
        raise DemoError(f"{out / foreign[0]} was added or changed since; move it away, or name another folder")
    return False


def install(out: Path, options: dict) -> int | None:
    """Make the demo beside `out`, then rename it, so that `out` is never half made; None if it is there already."""
    if is_made(out, options):
        return None
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.parent / f".{out.name}.{uuid.uuid4().hex}"
    try:  # from before the folder is made, so that a signal at any moment leaves none
        parameters = make_demo(beside / "new", options)
        if is_made(out, options):  # another process was faster
            return None
        if out.exists():
            out.rename(beside / "old")
        (beside / "new").rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument("--train", metavar="N", type=int, default=1000, help="questions to train on (%(default)s)")
    parser.add_argument("--dev", metavar="N", type=int, default=100, help="questions to evaluate on (%(default)s)")
    parser.add_argument("--seed", metavar="S", type=int, default=42, help="which texts are drawn (%(default)s)")
    options = vars(parser.parse_args())
    out = options.pop("out").resolve()
    for end in (signal.SIGINT, signal.SIGTERM):  # leave as by an error, so that the temporary folder is removed
        signal.signal(end, lambda number, frame: sys.exit(128 + number))
    try:
        for name, low, high in (("train", 1, MAX_QUESTIONS), ("dev", 1, MAX_QUESTIONS), ("seed", 0, MAX_SEED)):
            if not low <= options[name] <= high:
                raise DemoError(f"--{name} {options[name]} is out of range; give a number from {low} to {high}")
        if out == Path.cwd():
            raise DemoError(f"{out} is the current folder; name a new one in it, such as .demo")
        parameters = install(out, options | {"script": checksum(Path(__file__))})
    except (DemoError, OSError, ModuleNotFoundError) as error:
        advice = "; name a folder that you may write to" if isinstance(error, OSError) else ""
        if isinstance(error, ModuleNotFoundError):
            advice = "; run bash scripts/setup_env.sh, then this with .venv/bin/python"
        print(f"ERROR: {error}{advice}", file=sys.stderr)
        sys.exit(2)
    if parameters is None:
        print(f"{out} holds this demo already: nothing to do")
        return
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out / 'model'}: BLOOM with random weights, {parameters:,} parameters")
    print(f"{out / 'squad'}: {options['train']:,} train and {options['dev']:,} dev questions, seed {options['seed']}")
    print(f"{size / 1e6:.1f} MB in all")


if __name__ == "__main__":
    main()
