"""GLUE's tasks are read as distributed and measured as GLUE defines it; bad files are refused in a sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, ViTConfig

from refiner_ds.errors import ConfigError, DataError
from refiner_ds.text import add_refiner
from refiner_ds.text.glue import main
from refiner_ds.text.glue_data import read_task
from refiner_ds.text.glue_tasks import TASKS, measure, task_of
from refiner_ds.text.pretrain import blocks_of, learn_tokenizer, read_lines
from refiner_ds.text.run_file import read_run
from tests.text.encoders import KEYS, encoder
from tests.text.glue_files import LAYOUTS, WORDS, write_task
from tests.training.launched import ROOT


def spelt(name: str) -> tuple[str, ...]:
    return TASKS[name].labels or ("0", "4")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_task_is_read_from_the_benchmarks_files(name, tmp_path):
    write_task(tmp_path, name, spelt(name))
    found = read_task(tmp_path, task_of(name))
    assert found.keys() == {"train", *TASKS[name].dev}
    samples = found["train"]
    assert {len(one) for one in samples.sentences} == {len(TASKS[name].columns)} and len(samples.labels) == 16
    assert samples.sentences[0][0].startswith('good "') and samples.sentences[1][0].startswith('film "')
    assert samples.labels[:2] == ([0.5, 4.5] if name == "stsb" else [0, 1])


def test_a_data_set_of_the_library_is_the_same(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    write_task(tmp_path, "mnli", TASKS["mnli"].labels)
    wanted = read_task(tmp_path, TASKS["mnli"])
    splits = {}
    for ours, theirs in {"train": "train", **TASKS["mnli"].dev}.items():
        first, second = zip(*wanted[ours].sentences, strict=True)
        splits[theirs] = datasets.Dataset.from_dict(
            {"premise": first, "hypothesis": second, "label": wanted[ours].labels}
        )
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "hub")
    assert read_task(tmp_path / "hub", TASKS["mnli"]) == wanted
    del splits["validation_matched"]
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "less")
    with pytest.raises(
        DataError, match="less: has no split validation_matched; there are train, validation_mismatched"
    ):
        read_task(tmp_path / "less", TASKS["mnli"])


def test_metrics_are_those_of_glue():
    labels = [1, 1, 1, 0, 0, 1, 0, 1]
    found = np.array([1, 1, 0, 0, 1, 1, 0, 1])
    outputs = np.stack([1 - found, found], 1)
    true, false, missed, right = 4, 1, 1, 2  # positives found, found wrongly, missed; negatives found
    mcc = (true * right - false * missed) / (
        (true + false) * (true + missed) * (right + false) * (right + missed)
    ) ** 0.5
    assert measure(TASKS["cola"], outputs, labels) == pytest.approx({"mcc": 100 * mcc, "score": 100 * mcc})
    f1 = 100 * 2 * true / (2 * true + false + missed)
    assert measure(TASKS["mrpc"], outputs, labels) == pytest.approx({"accuracy": 75, "f1": f1, "score": (75 + f1) / 2})
    scores, guesses = [0.0, 1.0, 2.5, 5.0], np.array([[0.1], [0.2], [0.4], [9.0]])
    wanted = {"pearson": 100 * np.corrcoef(scores, guesses[:, 0])[0, 1], "spearman": 100.0}
    correlations = measure(TASKS["stsb"], guesses, scores)
    assert correlations == pytest.approx({**wanted, "score": sum(wanted.values()) / 2})
    assert measure(TASKS["stsb"], np.ones((4, 1)), scores)["score"] == 0
    three = np.eye(3)[[0, 1, 2, 2]]
    assert measure(TASKS["mnli"], three, [0, 1, 2, 0])["accuracy"] == 75


def spoil(folder, line, text):
    file = folder / "train.tsv"
    lines = file.read_text().split("\n")
    lines[line] = text
    file.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("name", "line", "text", "said"),
    [
        (
            "sst2",
            0,
            "text\tlabel",
            r"SST-2/train.tsv: has no column 'sentence' in its first line; SST-2 has 'sentence'",
        ),
        ("sst2", 3, "a good film\t2", r"SST-2/train.tsv: line 4: label is '2'; it must be one of 0, 1"),
        ("sst2", 3, "a good film", r"SST-2/train.tsv: line 4 has 1 columns; it must have 2 or more"),
        ("cola", 3, "gj04\t-1\t\ta film", r"CoLA/train.tsv: line 4: label is '-1'; it must be one of 0, 1"),
        (
            "rte",
            3,
            "0\ta\tb\tneutral",
            r"RTE/train.tsv: line 4: label is 'neutral'; it must be one of entailment, not_",
        ),
        ("stsb", 3, "0\tm\tM\t2\t0\tn\tn\ta\tb\t5.1", r"line 4: label is '5.1'; it must be a number from 0 to 5"),
        ("stsb", 3, "0\tm\tM\t2\t0\tn\tn\ta\tb\tnan", r"line 4: label is 'nan'; it must be a number from 0 to 5"),
    ],
)
def test_task_files_that_cannot_be(name, line, text, said, tmp_path):
    spoil(write_task(tmp_path, name, spelt(name)), line, text)
    with pytest.raises(DataError, match=said):
        read_task(tmp_path, TASKS[name])


def test_a_task_file_as_other_systems_write_it_is_the_same(tmp_path):
    file = write_task(tmp_path, "sst2") / "train.tsv"
    wanted, lines = read_task(tmp_path, TASKS["sst2"]), file.read_text()
    for text in ("\ufeff" + lines, lines.replace("\n", "\r\n"), lines.replace("\n", "\n\n")):
        file.write_bytes(text.encode())
        assert read_task(tmp_path, TASKS["sst2"]) == wanted
    spoil(file.parent, 6, "a film\t2")
    with pytest.raises(DataError, match="line 7: label is '2'"):
        read_task(tmp_path, TASKS["sst2"])
    file.write_text(lines)
    spoil(file.parent, 2, '"quoted\u2028 film" \t1')
    assert read_task(tmp_path, TASKS["sst2"])["train"].sentences[1] == ('"quoted\u2028 film" ',)
    file.write_bytes(lines.encode("utf-16"))
    with pytest.raises(DataError, match=r"train.tsv: cannot be read as UTF-8 text: 'utf-8' codec"):
        read_task(tmp_path, TASKS["sst2"])
    for text, said in (("", "has no column 'sentence'"), ("sentence\tlabel\n", "holds no sample")):
        file.write_text(text)
        with pytest.raises(DataError, match=f"train.tsv: {said}"):
            read_task(tmp_path, TASKS["sst2"])


def test_lines_that_end_early_are_left_out_of_qqp_where_they_are_few(tmp_path):
    folder = write_task(tmp_path, "qqp", lines=1001)
    spoil(folder, 3, "1\t2\t3\tgood film")
    assert len(read_task(tmp_path, TASKS["qqp"])["train"].labels) == 1000
    spoil(folder, 4, "1\t2\t3\tgood film")
    with pytest.raises(DataError, match=r"QQP/train.tsv: line 4 has 4 columns; it must have 6 or more"):
        read_task(tmp_path, TASKS["qqp"])


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("label", [0, None], "train 1: label is None; it must be a whole number from 0 to 1"),
        ("label", [0, 0.5], "train 1: label is 0.5; it must be a whole number from 0 to 1"),
        ("label", [0, -1], "train 1: label is -1; it must be a whole number from 0 to 1"),
        ("sentence", ["a", None], "train 1: sentence is None; it must be text"),
        ("sentence", [], "cannot be read by datasets: list index out of range"),
    ],
)
def test_data_sets_that_cannot_be(column, values, said, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    columns = {"sentence": ["a", "b"][: len(values)], "label": [0, 1][: len(values)], column: values}
    whole = {name: datasets.Dataset.from_dict(columns) for name in ("train", "validation")}
    datasets.DatasetDict(whole).save_to_disk(tmp_path / "hub")
    with pytest.raises(DataError, match=f"hub: {said}"):
        read_task(tmp_path / "hub", TASKS["sst2"])


def test_folders_without_the_task(tmp_path):
    with pytest.raises(DataError, match="holds no SST-2; it must hold SST-2/train.tsv, or what"):
        read_task(tmp_path, TASKS["sst2"])
    (write_task(tmp_path, "sst2") / "dev.tsv").unlink()
    with pytest.raises(DataError, match="dev.tsv: no such file; SST-2 has train.tsv and dev.tsv"):
        read_task(tmp_path, TASKS["sst2"])


@pytest.fixture(scope="module")
def tokenizer():
    return learn_tokenizer([" ".join(WORDS)] * 20, 100)


@pytest.fixture
def command(tmp_path, tokenizer, capsys):
    """Runs the command with a run file of these keys on a small SST-2; returns what it said on standard error."""
    write_task(tmp_path, "sst2")
    tokenizer.save_pretrained(tmp_path / "words")

    def run(model=None, task="sst2", extra=(), **keys):
        file = tmp_path / "mine.json"
        text = {"model": model or {"model_type": "bert", **KEYS}, "tokenizer": str(tmp_path / "words"), **keys}
        file.write_text(json.dumps({"text": text}))
        words = ["--task", task, "--config", str(file), "--data", str(tmp_path), "--output", str(tmp_path / "out")]
        code = main([*words, *extra])
        said = capsys.readouterr()
        assert code == 2 and not (tmp_path / "out").exists()
        return said.err.removeprefix(f"error: {file}: ").removeprefix("error: ").strip()

    return run


def saved(folder, model):
    model.save_pretrained(folder)
    return str(folder)


def test_models_and_checkpoints_that_cannot_be(command, tmp_path):
    refiner = {"kind": "linear", "expansion_ratio": 2}
    bert = encoder("bert", AutoModelForSequenceClassification)
    plain = saved(tmp_path / "plain", bert)
    refined = saved(tmp_path / "refined", add_refiner(bert, expansion_ratio=3))
    assert plain and "its refiners have expansion_ratio 3, and" in command(refined, refiner=refiner)
    assert "asks for 2; take 3, or a plain checkpoint" in command(refined, refiner=refiner)
    assert "has refiners, and" in command(refined) and "asks for a plain model" in command(refined)
    config = json.loads((tmp_path / "refined/config.json").read_text())
    config["refiner"]["expansion_ratio"] = 2  # not what its weights are
    (tmp_path / "refined/config.json").write_text(json.dumps(config))
    assert "refined: its refiners (expansion_ratio 3) are not what the config" in command(refined, refiner=refiner)
    gpt = GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=20, n_positions=10).to_dict()
    assert command(gpt, refiner=refiner).startswith("GPT2Model is causal")
    assert command(gpt).startswith("GPT2ForSequenceClassification is causal")
    assert command(ViTConfig().to_dict()) == "vit is no encoder of text; take one such as BERT, RoBERTa or DistilBERT"
    own = {"model_type": "deberta-v2", **KEYS}
    assert "computes attention in code of its own" in command(own, refiner=refiner)
    assert "text.model cannot be built: Unrecognized model identifier: brt" in command({"model_type": "brt"})
    assert "/none: holds no model of transformers" in command(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"refinr": None}, "text.refinr is not a key; did you mean refiner?"),
        ({"refiner": {"ratio": 2}}, "text.refiner: ratio is not a key; there are kind, expansion_ratio"),
        ({"max_length": 0}, "text.max_length is 0; it must be a whole number of at least 4"),
        ({"masked": 2}, "text.masked is 2; it must be a number between 0 and 1"),
        ({"training": {"learning_rat": 1}}, "text.training.learning_rat is not a key; did you mean learning_rate?"),
        ({"training": {"lr_scheduler_type": "up"}}, "text.training: up is not a valid SchedulerType"),
        ({"model": 3}, "text.model must be a folder, a name on the hub, or a config"),
    ],
)
def test_run_files_that_cannot_be(command, keys, said):
    assert command(**keys).startswith(said)


def test_other_things_that_are_not_there(command, tmp_path):
    assert command(task="sst3").startswith("--task sst3: is not a task; it must be one of cola, sst2")
    with pytest.raises(ConfigError, match="none.json: no such run file"):
        read_run(tmp_path / "none.json")


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs/glue").glob("*.json")), ids=lambda file: file.stem)
def test_run_files_of_the_package_can_be_read(file):
    run = read_run(file)
    assert bool(run.refiner) == file.stem.endswith("_refiner")
    twin = file.with_name(f"{file.stem}_refiner.json")
    if twin.exists():  # they differ in the refiner alone
        other = read_run(twin)
        assert (run.training, run.deepspeed, run.max_length) == (other.training, other.deepspeed, other.max_length)
    if isinstance(run.model, dict):
        assert BertConfig(**{name: value for name, value in run.model.items() if name != "model_type"})


def test_text_is_cut_into_blocks_at_documents(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("good film\nbad plot\n\n\nwarm cast\n")
    lines = read_lines(tmp_path)
    assert lines == ["good film", "bad plot", "", "", "warm cast"]
    blocks = [tokenizer.decode(block["input_ids"]) for block in blocks_of(lines, tokenizer, 5)]
    assert blocks == ["[CLS] good film bad [SEP]", "[CLS] plot [SEP]", "[CLS] warm cast [SEP]"]
    assert tokenizer("good film", "bad")["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    with pytest.raises(DataError, match="holds no text"):
        (tmp_path / "a.txt").write_text("\n")
        read_lines(tmp_path)
