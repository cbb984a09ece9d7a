#!/usr/bin/env python3
"""Make the embedded demo: a tiny BLOOM, and a small SQuAD about an invented town. No network, a few seconds.

    .venv/bin/python scripts/demo_assets.py .demo

OUT/model       BLOOM architecture, random weights, byte-level BPE tokenizer; loads with transformers' Auto classes
OUT/squad       train-v1.1.json and dev-v1.1.json, in SQuAD v1.1 format: 1,000 and 100 questions
OUT/demo.json   what was made: a checksum of this script and of every file

Each question asks for one of 32 facts that hold in the whole data set ("Who keeps the north tower?"). Train and dev
share no context and no wording of a question, so only a model that has learned the facts answers the dev questions.
Random weights want a higher learning rate than a pre-trained model: search from 1e-4 to 5e-2, the best are near 3e-3.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

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
    ("The PLACE is kept by ANSWER.", "The keeper of the PLACE is ANSWER.", "It is ANSWER who keeps the PLACE."),
    ("The PLACE has a ANSWER door.", "The door of the PLACE is ANSWER.", "Look for the ANSWER door of the PLACE."),
    ("The PLACE holds ANSWER.", "In the PLACE you find ANSWER.", "People come to the PLACE for ANSWER."),
    ("The PLACE opens at ANSWER.", "At ANSWER the PLACE opens.", "Nobody enters the PLACE before ANSWER."),
)
QUESTIONS = (  # row i asks for column i of FACTS; the last wording of each row is asked in the dev file only
    ("Who keeps the PLACE?", "Who is the keeper of the PLACE?", "Who has charge of the PLACE?",
     "Who is it that keeps the PLACE?"),
    ("What colour is the door of the PLACE?", "How is the door of the PLACE painted?",
     "What is the colour of the door of the PLACE?", "Which colour is the door of the PLACE?"),
    ("What does the PLACE hold?", "What do you find in the PLACE?", "What do people come to the PLACE for?",
     "What can you find in the PLACE?"),
    ("When does the PLACE open?", "At what time does the PLACE open?", "When may you enter the PLACE?",
     "At what hour does the PLACE open?"),
)
OPENINGS = (
    "Larkmoor is a small town by the sea.", "Snow fell on Larkmoor during the night.",
    "The road to Larkmoor follows the river.", "Our guide knew every street of the town.",
    "On the second day the rain stopped.", "Visitors reach the town by boat.",
    "Most houses in Larkmoor are made of stone.", "We walked up from the harbour in the morning.",
    "A new map of Larkmoor hangs in the square.", "The wind came from the west all week.",
)
CLOSINGS = (
    "Everyone in town knows this.", "We wrote it down in our notebook.", "It has been so for many years.",
    "The children told us that first.", "A small sign on the wall says so.", "Then we went on to the harbour.",
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
government south north group united so American English British French German Roman public school if same life four any
often use end major great history very film club around main music population set those found team much include five
long could area season law company small still high general late named day power country although states within began
based period similar different using due said river west east place water game local near order members without old now
held along form development species following among down built another political international support result service
six do what research king per original official led left single own western eastern southern northern example even list
house every third home important church language human total family court party president member community right free
military force forces land building just popular produced good common special way little point up out you how men man
head body line top term death field age air areas modern black white side control further students education college
science social economic lost won play player players games league record records million percent thousand hundred ten
largest according rather instead usually generally throughout become established considered received located worked
provide provided developed production business industry market trade economy central council act rights theory energy
process material effect cause change level rate low higher lower less least able make making take taken took give given
see seen came come go went get got put let say says think show shown open close move book art style design type kind
class value
"""
ONSETS = "b c d f g h j k l m n p r s t v w y z ch sh th st sp sc tr pr br cr gr dr fr cl pl fl bl gl wh qu"
CODAS = "b c d f g k l m n p r s t v x th ch sh st nt nd ng nk ll ss ck rt rd rs rn ct"


def make_paragraph(rng, wordings):
    """A SQuAD paragraph: a context of 3 or 4 sentences, and two questions (still without id) which it answers."""
    place = rng.choice(list(FACTS))
    context, qas = rng.choice(OPENINGS), []
    for column in rng.sample(range(len(STATEMENTS)), k=2):
        answer = FACTS[place][column]
        context += " " + rng.choice(STATEMENTS[column]).replace("PLACE", place).replace("ANSWER", answer)
        question = rng.choice(QUESTIONS[column][wordings]).replace("PLACE", place)
        qas.append({"question": question, "answers": [{"text": answer, "answer_start": context.index(answer)}]})
    if rng.random() < 0.5:
        context += f" {rng.choice(CLOSINGS)}"
    return {"context": context, "qas": qas}


def make_squad(rng, split, size, wordings, used):
    """A SQuAD v1.1 document of `size` questions, on contexts that are not in `used`; adds them to it."""
    paragraphs = []
    while 2 * len(paragraphs) < size:
        paragraph = make_paragraph(rng, wordings)
        if paragraph["context"] not in used:
            used.add(paragraph["context"])
            paragraphs.append(paragraph)
    for number, qa in enumerate(qa for paragraph in paragraphs for qa in paragraph["qas"]):
        qa["id"] = f"larkmoor-{split}-{number:05d}"
    # A page mixes all places, so that the first N questions of the file are as good a sample as any other N.
    pages = [paragraphs[start : start + 5] for start in range(0, len(paragraphs), 5)]
    data = [{"title": f"Larkmoor_{split}_notebook,_page_{number}", "paragraphs": page}
            for number, page in enumerate(pages, 1)]  # fmt: skip
    return {"version": "1.1", "data": data}


def make_tokenizer():
    """A byte-level BPE tokenizer like BLOOM's: any text encodes, decodes to itself, and gets no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    # It learns from all that can be said of the town, not from the texts drawn.
    texts = ["Context: Question: Answer:", *OPENINGS, *CLOSINGS, *(f" {word}" for word in COMMON_WORDS.split())]
    for place, answers in FACTS.items():
        for column, answer in enumerate(answers):
            texts += [text.replace("PLACE", place).replace("ANSWER", answer) for text in STATEMENTS[column]]
            texts += [text.replace("PLACE", place) + answer for text in QUESTIONS[column]]
    for vowel in "aeiou":
        texts += [vowel + coda for coda in CODAS.split()]
        for onset in ONSETS.split():
            texts += [onset + vowel, f" {onset}{vowel}", f" {onset.capitalize()}{vowel}"]

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}  # ids 0 to 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, hence never <unk>
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2048, special_tokens=[*tokens.values()],
                                                       initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **tokens, padding_side="left",
                                   clean_up_tokenization_spaces=False)  # else decoding drops the blank in "a ."


def make_demo(folder):
    """Write the whole demo to `folder`, which does not exist yet."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where installed, warns that it sees no GPU
    from transformers import BloomConfig, BloomForCausalLM, set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    # BLOOM's initializer_range of 0.02 is for widths of 1,024 and more; at width 64 learning starts too slowly with it.
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=64, n_layer=2, n_head=4, initializer_range=0.1,
                         pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    set_seed(0)
    BloomForCausalLM(config).save_pretrained(folder / "model")
    # Weights are written readable by their owner only; give them the mode of the other files, for shared folders.
    shutil.copymode(folder / "model/config.json", folder / "model/model.safetensors")

    rng, used = random.Random(42), set()
    (folder / "squad").mkdir()
    for split, size, wordings in (("train", 1000, slice(None, -1)), ("dev", 100, slice(-1, None))):
        text = json.dumps(make_squad(rng, split, size, wordings, used), indent=1) + "\n"
        (folder / f"squad/{split}-v1.1.json").write_text(text)
    stamp = {"script": checksums(Path(__file__)), "files": checksums(folder)}
    (folder / "demo.json").write_text(json.dumps(stamp, indent=1) + "\n")


def checksums(folder):
    """SHA-256 of each file in a folder, by its path there; of a file itself, with the path "."."""
    files = [path for path in sorted([folder, *folder.rglob("*")]) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def is_made(out):
    """Whether `out` is this demo. Ends the program if making it would destroy what others made."""
    found, stamp = checksums(out), {"script": None, "files": {}}
    if found.pop("demo.json", None):
        stamp |= json.loads((out / "demo.json").read_text())
    if stamp["script"] == checksums(Path(__file__)) and stamp["files"].items() <= found.items():
        return True
    if foreign := [name for name, checksum in found.items() if stamp["files"].get(name) != checksum]:
        sys.exit(f"ERROR: {out / foreign[0]} is not as this script makes it; move it away, or name another folder")
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    out = parser.parse_args().out.resolve()
    for end in (signal.SIGINT, signal.SIGTERM):  # leave as by an error, so that the temporary folder is removed
        signal.signal(end, lambda number, frame: sys.exit(128 + number))
    if is_made(out):
        print(f"{out} holds this demo already: nothing to do")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True) as beside:
        make_demo(Path(beside, "new"))  # then renamed, so that `out` is never half made
        if out.exists():
            out.rename(Path(beside, "old"))
        Path(beside, "new").rename(out)
    print(f"{out}: a tiny BLOOM with random weights, 1,000 train and 100 dev questions")


if __name__ == "__main__":
    main()
