"""
Chat templates: what a tokenizer's own template writes around demonstrations as turns, as pieces of text and tokens.

A demonstration is a user's turn (prompt) and the assistant's (label); the question is a user's turn and the text that
asks for an answer. An instruction is the system's turn where the template has one. Else it comes before the first
prompt, with an empty line between them. Texts of turns lose blanks at their ends, as most templates write them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from iclgd_helpers.errors import InputError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pieces = tuple[str | int, ...]  # texts, in which the spelling of a special token is plain letters; and special tokens
_SLOTS = ("SLOT0SLOT", "SLOT1SLOT", "SLOT2SLOT", "SLOT3SLOT", "SLOT4SLOT", "SLOT5SLOT")  # stand for texts


@dataclass(frozen=True)
class Chat:
    """
    One tokenizer's template with one instruction.

    Attributes
    ----------
    head
        the text before the first prompt, with `_SLOTS[0]` where the instruction is.
    answer, after, ask
        between a demonstration's prompt and its label, that label and the next prompt, and the last prompt and the
        predicted label.
    """

    tokenizer: PreTrainedTokenizerBase
    instruction: str | None
    is_system: bool
    head: str = ""
    answer: str = ""
    after: str = ""
    ask: str = ""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, instruction: str | None) -> Chat:
        """
        Read off a template what it writes between texts.

        Raises
        ------
        InputError
            if there is none, it cannot be used, or a question's text would depend on the demonstrations before it.
        """
        if not tokenizer.chat_template:
            raise InputError("the tokenizer has no chat template: pass chat=False, or a model tuned on conversations")
        instruction = instruction and instruction.strip()
        chat = cls(tokenizer, instruction, _has_system_turn(tokenizer))
        shown, prompt = [(_SLOTS[1], _SLOTS[2]), (_SLOTS[3], _SLOTS[4])], _SLOTS[5]
        slot = _SLOTS[0] if instruction else None
        whole, bare = (_rendered(tokenizer, slot, chat.is_system, turns, prompt) for turns in (shown, []))
        parts, alone = (re.split("|".join(_SLOTS[1:]), text) for text in (whole, bare))
        parts += [""] * (6 - len(parts))
        head, answer, after, ask = parts[0], parts[1], parts[2], parts[5]
        text = head + "".join(f"{p}{answer}{label}{after}" for p, label in shown) + prompt + ask
        if whole != text or alone != [head, ask] or head.count(_SLOTS[0]) != bool(instruction):
            raise InputError(
                "the chat template writes a text otherwise where other turns stand before it: pass chat=False"
            )
        return cls(tokenizer, instruction, chat.is_system, head, answer, after, ask)

    @property
    def start(self) -> Pieces:
        """The pieces before the first prompt."""
        before, slot, behind = self.head.partition(_SLOTS[0])
        between = (self.instruction,) if slot and self.instruction else ()
        return (*self.pieces(before), *between, *self.pieces(behind))

    def pieces(self, text: str) -> Pieces:
        """Text of the template itself, in which special tokens are what they spell."""
        decoder = self.tokenizer.added_tokens_decoder
        special: dict[str, int] = {token.content: number for number, token in decoder.items() if token.special}
        spelt = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        parts = re.split(f"({spelt})", text) if spelt else [text]
        return tuple(special.get(part, part) for part in parts if part)

    def demand(self, shown: Sequence[tuple[str, str]], prompt: str) -> None:
        """InputError unless the template writes these prompts and labels as they are."""
        head = self.head.replace(_SLOTS[0], self.instruction or "")
        text = head + "".join(f"{p}{self.answer}{label}{self.after}" for p, label in shown) + prompt + self.ask
        if _rendered(self.tokenizer, self.instruction, self.is_system, shown, prompt) != text:
            raise InputError("the chat template changes a text that it is given: pass chat=False, or change the texts")


def _has_system_turn(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        return _SLOTS[0] in _rendered(tokenizer, _SLOTS[0], True, [], _SLOTS[1])
    except InputError:
        return False


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    instruction: str | None,
    is_system: bool,
    shown: Sequence[tuple[str, str]],
    prompt: str,
) -> str:
    """The conversation as the template writes it, up to where the assistant answers."""
    turns = [("user", prompt)]
    for text, label in reversed(shown):
        turns[:0] = [("user", text), ("assistant", label)]
    if instruction and is_system:
        turns.insert(0, ("system", instruction))
    elif instruction:
        turns[0] = ("user", f"{instruction}\n\n{turns[0][1]}")
    conversation: list[Any] = [{"role": role, "content": content} for role, content in turns]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # of the template's own language, or of what it does
        raise InputError(f"the chat template cannot be used ({reason(error)}): pass chat=False") from None
    return str(text)
