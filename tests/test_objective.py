"""The objective: what the model is asked to learn, and what eval_loss measures."""

import inspect
import json
import types

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer(demo):
    return AutoTokenizer.from_pretrained(demo / "model")


@pytest.fixture(scope="module")
def model(demo):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(demo / "model", dtype=torch.float32).eval()


def loss_of(model, batch):
    with torch.no_grad():
        return model(**batch).loss.item()


ROW = ("The old mill stands by the river. Its keeper is Anna Berg.", "Who keeps the mill?", "Anna Berg")


def test_labels_decode_to_the_answer_and_nothing_else(hpo, tokenizer):
    row = hpo.encode(*ROW, tokenizer)
    assert len(row["input_ids"]) == len(row["labels"])
    target = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(target) == " Anna Berg" + tokenizer.eos_token
    assert row["input_ids"][-len(target) :] == target  # the same positions: the answer follows the prompt
    whole = tokenizer.decode(row["input_ids"])
    assert whole.startswith("Context: The old mill")
    assert whole.endswith("Question: Who keeps the mill?\nAnswer: Anna Berg" + tokenizer.eos_token)


def llamas(template=None):
    """A tokenizer of Llama's kind: <s> in front of every text, and a space before its first word."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, special = pre_tokenizers.Metaspace(prepend_scheme="first"), ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=["\n"])
    made.train_from_iterator([*ROW, *ROW, "Context: Question: Answer: [a]"], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **names)


def test_a_row_begins_as_the_tokenizer_s_own_texts_do_and_its_parts_as_they_do_inside(hpo):
    context, question, answer = ROW
    whole = llamas()(f"Context: {context}\nQuestion: {question}\nAnswer: {answer}")["input_ids"]
    row = hpo.encode(*ROW, llamas())
    assert row["input_ids"] == [*whole, 2] and whole.count(1) == 1 == whole[0]
    assert llamas().convert_ids_to_tokens([label for label in row["labels"] if label != -100])[0].startswith("▁A")
    for bos in ("", "{{ bos_token }}"):
        chat = llamas(f"{bos}[{{{{ messages[0].content }}}}]\n")
        for texts in (ROW, (None, question, answer), (90 * context, question, answer)):
            ids = hpo.encode(*texts, chat, chat=True)["input_ids"]
            assert ids[0] == 1 == ids.count(1) and len(ids) <= 512


def test_the_loss_depends_on_the_context_and_the_question(hpo, tokenizer, model):
    context, question, answer = ROW
    others = ("Nothing is known about it.", question), (context, "What is the name of the dog?")
    losses = [
        loss_of(model, hpo.collate([hpo.encode(c, q, answer, tokenizer)]))
        for c, q in ((context, question), *others)
    ]
    assert len({round(loss, 5) for loss in losses}) == 3


@pytest.mark.parametrize("of_context, of_question, of_answer", [
    (0, 5, 2), (5000, 5, 2), (300, 600, 3), (20, 5, 100), (50, 50, 490), (3, 3, 5000)])
def test_the_answer_is_kept_and_the_prompt_gives_way(hpo, tokenizer, of_context, of_question, of_answer):
    words = lambda n, word: " ".join([word] * n)
    context, question, answer = words(of_context, "river"), words(of_question, "where"), words(of_answer, "mill")
    row = hpo.encode(context, question, answer, tokenizer, max_length=512)
    target = [label for label in row["labels"] if label != -100]
    assert len(row["input_ids"]) == len(row["labels"]) <= 512
    assert row["labels"][0] == -100  # at least one prompt token, so each answer token is predicted from something
    whole = tokenizer(" " + answer)["input_ids"]
    assert target == whole[:510] + [tokenizer.eos_token_id]
    if of_question < 100 and of_answer < 100:  # the question stays whole, the context is cut
        assert tokenizer.decode(row["input_ids"]).count("where") == of_question
        assert f"\nAnswer: {answer}" in tokenizer.decode(row["input_ids"])


def test_a_batch_gives_the_loss_of_its_rows_whatever_the_padding_and_trimming(hpo, tokenizer, model):
    two = ("Anna is here.", "Anna"), ("By the river stands the old mill of Jonas Holm.", "Jonas Holm")
    rows = [hpo.encode(context, "Who?", answer, tokenizer) for context, answer in two]
    alone = [loss_of(model, hpo.collate([row])) for row in rows]
    tokens = [sum(label != -100 for label in row["labels"]) for row in rows]
    expected = sum(loss * n for loss, n in zip(alone, tokens, strict=True)) / sum(tokens)
    trimmed = hpo.collate(rows)
    full = hpo.collate(rows, accepted=())
    assert trimmed["labels"].shape[1] == trimmed["logits_to_keep"] == max(tokens) + 1 < full["labels"].shape[1]
    assert loss_of(model, trimmed) == pytest.approx(expected, abs=1e-5)
    assert loss_of(model, full) == pytest.approx(expected, abs=1e-5)


def test_the_loss_is_found_in_whatever_a_model_returns(hpo):
    """Such as Mixtral's losses of its routers, before the logits."""
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[-100, 1, 2], [-100, -100, 4]])
    both = hpo.answer_losses((torch.tensor(0.1), logits, ((logits,),)), labels)
    assert torch.equal(both, hpo.answer_losses(logits, labels)) and both[:, 1].tolist() == [2, 1]


SHAPES = ({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
           "intermediate_size": 64, "head_dim": 8},
          {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4})  # fmt: skip
OWN_SHAPES = {"gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_heads": 4},
              "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}}  # fmt: skip


KINDS = ("bloom", "gpt2", "gpt_neo", "gptj", "opt", "llama", "qwen2", "gpt_neox", "gemma2", "mamba")


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_the_losses_and_gradients_of_its_rows_whatever_the_kind_of_model(hpo, kind):
    """Some count positions from the first token of the row, padding included, unless they are told them."""
    shape = SHAPES[kind in ("gpt2", "gptj")] | OWN_SHAPES.get(kind, {})
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=64, **shape, **ends)).eval()
    accepted = tuple(inspect.signature(model.forward).parameters)
    rows = []
    for n, answer in ((9, 3), (31, 5), (17, 4)):
        ids = torch.randint(2, 64, (n,)).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (n - answer) + ids[-answer:]})

    def found(batch, weight):
        model.zero_grad()
        (loss := model(**hpo.collate(batch, accepted)).loss * weight).backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    together, alone = found(rows, 12), [found([row], weight) for row, weight in zip(rows, (3, 5, 4), strict=True)]
    assert together[0] == pytest.approx(sum(loss for loss, _ in alone), rel=1e-5)
    assert torch.allclose(together[1], sum(gradient for _, gradient in alone), atol=1e-4)


def settings(hpo, demo, squad, **changes):
    variables = {"MODEL_NAME": demo / "model", "SQUAD_DATA": squad} | changes
    return hpo.read_settings({name: str(value) for name, value in variables.items()})


def test_load_squad_draws_the_same_subset_for_a_seed_and_another_for_another(hpo, demo, squad):
    draw = lambda seed: hpo.load_squad(settings(hpo, demo, squad, TRAIN_SAMPLES=20, EVAL_SAMPLES=10, SEED=seed))
    train, evaluation = draw(1)
    assert (len(train), len(evaluation)) == (20, 10)
    assert draw(1) == (train, evaluation)
    assert draw(2)[0] != train


@pytest.mark.parametrize("alone", [False, True])  # an answer as a text, not in a list
def test_load_squad_takes_a_data_set_from_the_hub_in_the_same_form(hpo, demo, squad, monkeypatch, alone):
    """The hub cannot be reached in a test: the library's own loader gets the rows it would return from there."""
    import datasets

    files = {"train": "train-v1.1.json", "validation": "dev-v1.1.json"}

    def rows(name, split):
        assert name == "rajpurkar/squad"
        found = [hpo.read_file(squad / files[each]) for each in split]
        for row in [*found[0], *found[1]] if alone else []:
            row["answers"]["text"] = row["answers"]["text"][0]
        return [datasets.Dataset.from_list(each) for each in found]

    from_folder = hpo.load_squad(settings(hpo, demo, squad, TRAIN_SAMPLES=8, EVAL_SAMPLES=4))
    monkeypatch.setattr(datasets, "load_dataset", rows)
    assert hpo.load_squad(settings(hpo, demo, "rajpurkar/squad", TRAIN_SAMPLES=8, EVAL_SAMPLES=4)) == from_folder


def test_a_squad_file_with_a_byte_order_mark_is_read(hpo, tmp_path):
    data = {"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": [{"text": "é"}]}]}]}]}
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(data), encoding="utf-8-sig")
    assert hpo.read_file(tmp_path / "dev-v1.1.json")[0]["answers"]["text"] == ["é"]


def test_the_best_result_is_the_lowest_report_of_any_epoch_of_a_trial_without_error(hpo):
    import pandas

    drawn = lambda lr: {f"config/train_loop_config/{name}": lr for name in ("lr", "a/x", "b/x")}

    def trial(lr, losses, error=None):
        rows = [
            {"eval_loss": loss, "epoch": float(i), "time_total_s": 10.0 * i} | drawn(lr)
            for i, loss in enumerate(losses, 1)
        ]
        return types.SimpleNamespace(error=error, metrics_dataframe=pandas.DataFrame(rows))

    class Results(list):  # what Tuner.fit() returns
        num_errors = property(lambda self: sum(result.error is not None for result in self))

    def best(*results, trials=2):
        return hpo.best_report(Results(results), types.SimpleNamespace(NUM_SAMPLES=trials, TIME_BUDGET=0))

    failed, diverged = trial(3, [0.1], error=RuntimeError()), trial(4, [float("nan")])
    found = best(trial(1, [5.0, 2.0, 4.0]), trial(2, [3.0, 2.5]), failed, diverged, trials=4)
    config = {"train_loop_config": {"lr": 1, "a/x": 1, "b/x": 1}}
    assert found == {"eval_loss": 2.0, "epoch": 2.0, "time_total_s": 20.0, "config": config}
    with pytest.raises(SystemExit, match="2 of 2 trials ran, 1 failed"):
        best(failed, diverged)
    with pytest.raises(SystemExit, match="1 of 2 trials ran, 0 failed"):
        best(trial(1, [5.0]))
