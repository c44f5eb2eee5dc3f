"""A small grammar of sentences and a tiny tokenizer trained on it: text for tests, with no download."""

from __future__ import annotations

import functools
import itertools
import random
from typing import TYPE_CHECKING

from iclgd_helpers.data.tasks import TASKS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 1000  # at most
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>")  # ids 0, 1, 2, as in fairseq

_WHO = "clerk pilot teacher farmer singer doctor painter sailor neighbour student judge baker".split()
_DOES = "finds sells paints opens watches moves keeps draws counts brings loses describes".split()
_WHAT = "door story garden lamp picture engine letter bridge song window table river".split()
_WHERE = ("today", "at night", "in the town", "by the sea", "after lunch", "in winter", "on the hill")


def generate_rows(task: Task, rows: int) -> list[dict[str, str | int]]:
    """``rows`` different rows with the task's own columns; labels take turns, each with the task's cues for it."""
    generator = random.Random(f"{task.name} 0")
    write = _pair if len(task.text_columns) == 2 else _sentence
    seen: set[tuple[str, ...]] = set()
    result: list[dict[str, str | int]] = []
    while len(result) < rows:
        label = len(result) % len(task.verbalizers)
        texts = write(generator, task.cues[label])
        if texts not in seen:
            seen.add(texts)
            result.append({**dict(zip(task.text_columns, texts, strict=True)), task.label_column: label})
    return result


def _statement(generator: random.Random) -> tuple[str, str, str, str]:
    return generator.choice(_WHO), generator.choice(_DOES), generator.choice(_WHAT), generator.choice(_WHERE)


def _sentence(generator: random.Random, cues: str) -> tuple[str, ...]:
    who, does, what, where = _statement(generator)
    return (f"the {who} {does} the {generator.choice(cues.split())} {what} {where} .",)


def _pair(generator: random.Random, cue: str) -> tuple[str, ...]:
    """Premise and hypothesis: the same statement, denied, or only thought possible."""
    who, does, what, where = _statement(generator)
    return f"the {who} {does} the {what} {where} .", " ".join(f"the {who} {cue} {does} the {what}".split())


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained in memory: any text round-trips; every " verbalizer" is one token.

    It adds no special token by itself.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_training_text(), trainer)
    bos, pad, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, pad_token=pad, eos_token=eos, clean_up_tokenization_spaces=False
    )


def _training_text() -> list[str]:
    """Every verbalizer often enough to be merged first, then the sentences in their templates."""
    verbalizers = itertools.chain.from_iterable(task.verbalizers for task in TASKS.values())
    sentences = [task.template.format(**row) for task in TASKS.values() for row in generate_rows(task, 60)]
    return [f" {verbalizer}" * 1000 for verbalizer in sorted(set(verbalizers))] + sentences
