"""A trained model as a folder: weights, tokenizer, model card, and how it was trained. Written whole or not at all.

Any from_pretrained and MODEL_NAME take the folder. training.json tells ask.py the settings of the run, so that it
asks questions which the training has not seen.
"""

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
license: {license}
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
"""


class NewModel:
    """A folder being written. As a context manager: complete at its end, or not there and an older one unchanged.

    Each process of the training has one, and all of them call keep(); the first one writes.
    """

    def __init__(self, folder, run=None):
        self.folder, self.run, self.new = Path(os.path.abspath(folder)), run, None
        self.first = os.environ.get("RANK", "0") == "0"

    def __enter__(self):
        """Raises InputError if the folder cannot be written, or holds something other than such a model."""
        if self.folder.exists() and not (self.folder / "training.json").exists():
            why = "is there, and not a model that --save wrote; give a new folder"
            raise InputError(f"--save={str(self.folder)!r}: {why}")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # scancel, time limit: __exit__ runs
        if self.first:
            try:
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                self.new = self.folder.with_name(f".{self.folder.name}.{os.getpid()}")
                self.new.mkdir()
            except OSError as error:
                self.failed(error)
        return self

    def __exit__(self, *error):
        if self.new:
            shutil.rmtree(self.new, ignore_errors=True)

    def keep(self, model):
        """Writes the weights of the model, in place of those kept before."""
        from deepspeed import zero

        with zero.GatheredParameters(list(model.parameters())):  # ZeRO-3 splits them; otherwise this does nothing
            if self.first:
                self.dtype = str(model.dtype).removeprefix("torch.")
                try:
                    model.save_pretrained(self.new, state_dict=model.state_dict())
                except Exception as error:  # noqa: BLE001  on a full disk safetensors and tokenizers raise their own
                    self.failed(error)

    def finish(self, s, training):
        """Adds tokenizer, card and training.json; then puts the folder in its place."""
        from transformers import AutoTokenizer

        drawn = ", ".join(f"{name} {value}" for name, value in training["hyperparameters"].items())
        run = f"a search, {self.run}" if self.run else "hand"
        known = {"base": s.MODEL_NAME, "license": license_of(s.MODEL_NAME), "run": run, "dtype": self.dtype,
                 "epochs": s.NUM_EPOCHS, "date": time.strftime("%Y-%m-%d")}  # fmt: skip
        try:
            AutoTokenizer.from_pretrained(s.MODEL_NAME, trust_remote_code=False).save_pretrained(self.new)
            (self.new / "README.md").write_text(CARD.format(**vars(s) | training | known | {"hyperparameters": drawn}))
            kept = training | {"run": self.run, "settings": vars(s)}
            (self.new / "training.json").write_text(json.dumps(kept, indent=1, default=str))
            for path in self.new.glob("*.safetensors"):  # written for the owner alone
                shutil.copymode(self.new / "README.md", path)
            self.replace()
        except Exception as error:  # noqa: BLE001  as in keep()
            self.failed(error)

    def replace(self):
        """Puts the new folder in the older one's place; if that fails, the older one stays."""
        before = self.folder.with_name(f"{self.folder.name}.before")
        if self.folder.exists():
            shutil.rmtree(before, ignore_errors=True)  # left by a process that was killed at this place
            os.rename(self.folder, before)
        try:
            os.rename(self.new, self.folder)
        except BaseException:  # SIGTERM, too
            if before.exists():
                os.rename(before, self.folder)
            raise
        shutil.rmtree(before, ignore_errors=True)

    def failed(self, error):
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        before = "as it was" if self.folder.exists() else "not written"
        raise InputError(f"--save={str(self.folder)!r}: {why}; the folder is {before}") from None


def license_of(name):
    """The licence that the model card of a hub id or folder names; "unknown" if there is none on this machine."""
    import huggingface_hub as hub

    card = Path(name, "README.md")
    if not card.exists():
        card = hub.try_to_load_from_cache(name, "README.md") if not Path(name).is_dir() else None
    try:
        return hub.ModelCard.load(card, ignore_metadata_errors=True).data.license or "unknown"
    except (OSError, ValueError, TypeError):
        return "unknown"
