"""Tiny teachers with a tokenizer of their own, and what they say of rows, computed plainly."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergekit_lite.answers.template import ChatTemplate
from mergekit_lite.distillation.alignment.spans import response_ends
from mergekit_lite.distillation.teaching.rows import TaughtRow, row_key
from tests.causal import causal_model
from tests.tokenizers import SPECIAL, TEMPLATES

CORPUS = ["five helpful ones, four assistants and three users: What is twooo", "systemic oneness of a user"]


@cache
def other_tokenizer() -> Any:
    """A byte-level BPE that cuts texts elsewhere than ``tests.tokenizers``' does, with Llama 3's template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL[::-1], show_progress=False
    )
    core.train_from_iterator(CORPUS * 4, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<|eot_id|>", pad_token="<pad>", unk_token=None
    )
    made.chat_template = TEMPLATES["llama-3"]
    return made


def other_teacher(folder: Path, seed: int = 3) -> Path:
    """The folder of a GPT-2 with the other tokenizer."""
    causal_model("gpt2", vocabulary=320, seed=seed).save_pretrained(folder)
    other_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def said(model_folder: Path, rows: Path, top: int) -> list[TaughtRow]:
    """What a model says of the rows of ``pairs/sft.jsonl``: row by row, from all logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    template = ChatTemplate(AutoTokenizer.from_pretrained(model_folder))
    found = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        tokens = template.tokens(row["messages"], row["response"])
        ends = response_ends(template.tokenizer, tokens.response, row["response"])
        assert ends is not None
        logits = model(torch.tensor([[*tokens.prompt, *tokens.response]])).logits[0, len(tokens.prompt) - 1 : -1]
        log_probs = logits.float().log_softmax(1)
        best = log_probs.topk(min(top, log_probs.shape[1]))
        chosen = log_probs.gather(1, torch.tensor(tokens.response)[:, None])[:, 0]
        found.append(
            TaughtRow(
                row_key(row["messages"], row["response"]),
                np.array(tokens.response, np.int32),
                np.array(ends, np.int32),
                chosen.numpy(),
                best.indices.numpy().astype(np.int32),
                best.values.numpy(),
            )
        )
    return found
