"""A trained model as a folder: weights, tokenizer, model card, and how it was trained. Written whole or not at all.

Any from_pretrained and MODEL_NAME take the folder. training.json tells ask.py the settings of the run, so that it
asks questions which the training has not seen.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from check_inputs import InputError

CARD = """---
base_model: {base}
library_name: transformers
pipeline_tag: text-generation
---

# {base}, fine-tuned to answer questions

| | |
|---|---|
| eval_loss | {eval_loss:.6f} nats per answer token on {EVAL_SAMPLES} validation questions |
| epoch | {epoch} of {epochs}: the one with the lowest eval_loss |
| hyperparameters | {hyperparameters} |
| data | {SQUAD_DATA}: {TRAIN_SAMPLES} training questions, drawn with seed {SEED} |
| trained in | {PRECISION}, {WORKERS_PER_TRIAL} worker(s), weights kept as {dtype} |
| found by | {run} |
| date | {date} |

The validation questions chose the hyperparameters and the epoch, so the loss above is lower than on new questions.
The licence is that of the base model.
"""


class NewModel:
    """A folder being written. As a context manager: complete at its end, or not there.

    Each process of the training has one, and all of them call keep(); the first one writes.
    """

    def __init__(self, folder, run=None):
        self.folder, self.run = Path(os.path.abspath(folder)), run
        self.new = self.folder.with_name(f".{self.folder.name}.{os.getpid()}")
        self.first = os.environ.get("RANK", "0") == "0"

    def __enter__(self):
        """Raises InputError if the folder is there already, or cannot be written."""
        if self.folder.exists():
            raise InputError(f"--save={str(self.folder)!r}: is there already; remove it, or give a new folder")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # scancel, time limit: __exit__ runs
        if self.first:
            with self.told():
                self.new.mkdir(parents=True)
        return self

    def __exit__(self, *error):
        shutil.rmtree(self.new, ignore_errors=True)

    @contextlib.contextmanager
    def told(self):
        """Whatever goes wrong inside becomes an InputError of one line."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  on a full disk safetensors and tokenizers raise their own
            why = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise InputError(f"--save={str(self.folder)!r}: {why}; the folder is not written") from None

    def keep(self, model):
        """Writes the weights of the model, in place of those kept before."""
        from deepspeed import zero

        with zero.GatheredParameters(list(model.parameters())):  # ZeRO-3 splits them; otherwise this does nothing
            if self.first:
                self.dtype = str(model.dtype).removeprefix("torch.")
                with self.told():
                    model.save_pretrained(self.new, state_dict=model.state_dict())

    def finish(self, s, training):
        """Adds tokenizer, card and training.json; then puts the folder in its place."""
        from transformers import AutoTokenizer

        drawn = ", ".join(f"{name} {value}" for name, value in training["hyperparameters"].items())
        run = f"a search, {self.run}" if self.run else "hand"
        known = {"base": s.MODEL_NAME, "run": run, "dtype": self.dtype, "epochs": s.NUM_EPOCHS,
                 "date": time.strftime("%Y-%m-%d")}  # fmt: skip
        with self.told():
            AutoTokenizer.from_pretrained(s.MODEL_NAME, trust_remote_code=False).save_pretrained(self.new)
            (self.new / "README.md").write_text(CARD.format(**vars(s) | training | known | {"hyperparameters": drawn}))
            kept = training | {"run": self.run, "settings": vars(s)}
            (self.new / "training.json").write_text(json.dumps(kept, indent=1, default=str))
            for path in self.new.glob("*.safetensors"):  # written for the owner alone
                shutil.copymode(self.new / "README.md", path)
            os.rename(self.new, self.folder)
