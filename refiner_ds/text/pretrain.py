"""Pre-trains an encoder, refined or plain, by masked words (Devlin et al., 2019) on plain text.

    python -m refiner_ds.text.pretrain --config ds_configs/glue/masked_words_tiny_refiner.json --text reviews.txt

Text is UTF-8, a file or a folder of .txt files; a line is a paragraph, an empty one parts documents. One block in
twenty is held out, masked the same way for every model. Model, tokenizer and results.json go to <output>/<run file's
name>, which refiner_ds.text.glue takes as --model. Exit codes: 0 done, 2 refused.
"""

from __future__ import annotations

import argparse
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from refiner_ds.errors import ConfigError, DataError, report_errors
from refiner_ds.text.command import run_parser

HELD_OUT = 20  # every so many blocks one is
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = _parser().parse_args(argv)
    from refiner_ds.text.run_file import read_run

    run = read_run(given.config)
    lines = read_lines(given.text)
    name = run.path.stem if given.seed == 0 else f"{run.path.stem}_seed_{given.seed}"
    results = pretrain(run, lines, given.output / name, given.seed)
    if results is not None:
        print(
            f"{name}: held-out loss {results['held_out_loss']:.4f}, training loss {results['train_loss']:.4f},"
            f" {results['blocks']} blocks ({results['train_seconds']:.0f} s of training)",
            flush=True,
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = run_parser(__doc__, "python -m refiner_ds.text.pretrain", "runs/text", "weights, masks and order")
    parser.add_argument("--text", required=True, type=Path, metavar="PLACE", help="a file, or a folder of .txt files")
    return parser


def read_lines(place: Path) -> list[str]:
    """The lines of a text, stripped; files of a folder one after the other, by name.

    Raises:
        DataError: there is no text, or it is not UTF-8.
    """
    files = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
    lines: list[str] = []
    for file in files:
        try:
            lines += [line.strip() for line in file.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read as UTF-8 text: {error}") from None
    if not any(lines):
        raise DataError(f"{place}: holds no text; it must be a file, or a folder of .txt files")
    return lines


def learn_tokenizer(lines: list[str], vocab_size: int) -> Any:
    """WordPieces in lower case (Schuster and Nakajima, 2012), as BERT's uncased models have them."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    found = tokenizers.Tokenizer(models.WordPiece(unk_token=SPECIAL["unk_token"]))
    found.normalizer = normalizers.BertNormalizer(lowercase=True)
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = list(SPECIAL.values())
    found.train_from_iterator(
        lines, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    )
    ends = [(token, found.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=found, model_input_names=names, **SPECIAL)


def blocks_of(lines: list[str], tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    """Documents cut into blocks of so many tokens, with a token before and after each; the last of one is shorter."""
    numbers = tokenizer([line for line in lines if line], add_special_tokens=False)["input_ids"]
    documents: list[list[list[int]]] = [[]]
    following = iter(numbers)
    for line in lines:
        if line:
            documents[-1].append(next(following))
        elif documents[-1]:
            documents.append([])
    blocks = []
    for document in documents:
        tokens = list(chain.from_iterable(document))
        for start in range(0, len(tokens), length - 2):
            piece = [tokenizer.cls_token_id, *tokens[start : start + length - 2], tokenizer.sep_token_id]
            blocks.append({"input_ids": piece, "attention_mask": [1] * len(piece)})
    return blocks


def pretrain(run: Any, lines: list[str], output: Path, seed: int) -> dict[str, Any] | None:
    """Train, measure the loss of held-out masked words, and write model, tokenizer and results.

    Returns:
        What ``results.json`` holds; ``None`` on other ranks than the first.
    Raises:
        RefinerError: run file, model or text cannot be what was asked for.
    """
    from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling, set_seed

    from refiner_ds.text.loading import load_model, load_tokenizer
    from refiner_ds.text.training import make_trainer, quiet, train_timed, training_arguments, write_results

    quiet()
    arguments = training_arguments(run, output, seed)
    tokenizer = learn_tokenizer(lines, _vocabulary(run)) if isinstance(run.tokenizer, dict) else load_tokenizer(run)
    if tokenizer.mask_token is None:
        raise ConfigError(f"{run.path}: the tokenizer has no mask token; take one of an encoder, such as BERT's")
    set_seed(seed)  # a new model's weights
    model = load_model(run, AutoModelForMaskedLM, tokenizer)
    blocks = blocks_of(lines, tokenizer, min(run.max_length, model.config.max_position_embeddings))
    held_out = blocks[HELD_OUT - 1 :: HELD_OUT]
    if not held_out:
        raise DataError(f"the text makes {len(blocks)} blocks of {run.max_length} tokens; it must make {HELD_OUT}")
    train = [block for index, block in enumerate(blocks) if index % HELD_OUT != HELD_OUT - 1]
    trainer = make_trainer(
        model, arguments, tokenizer, DataCollatorForLanguageModeling(tokenizer, mlm_probability=run.masked), train
    )
    loss, seconds = train_timed(trainer)
    trainer.data_collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=run.masked, seed=0)
    measured = trainer.evaluate(held_out)["eval_loss"]
    trainer.save_model(str(output))
    if not trainer.is_world_process_zero():
        return None
    results = {
        "config": str(run.path), "seed": seed, "refiner": None if run.refiner is None else run.refiner.as_keys(),
        "blocks": len(train), "held_out_blocks": len(held_out), "train_loss": loss, "held_out_loss": measured,
        "train_seconds": seconds, "parameters": model.num_parameters(),
    }  # fmt: skip
    write_results(output, results)
    return results


def _vocabulary(run: Any) -> int:
    size = run.tokenizer.get("vocab_size")
    if set(run.tokenizer) != {"vocab_size"} or not isinstance(size, int) or size < 100:
        raise ConfigError(f'{run.path}: text.tokenizer must be {{"vocab_size": …}}, a whole number of at least 100')
    return size


if __name__ == "__main__":
    sys.exit(main())
