"""What a chat template writes before the user's words, and what a model says there."""

from __future__ import annotations

import random
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from mergekit_lite.answers.asking import Sampling
from mergekit_lite.answers.pre_query import LocalUser, stopped
from mergekit_lite.answers.template import ChatTemplate, TemplateError
from tests.answers.test_local import tasks_of, write_model
from tests.tokenizers import TEMPLATES, tokenizer

STYLES = {  # what the authors' files have for such families, but for the system prompt that a template adds by itself
    "chatml": "<|im_start|>user\n",
    "llama-3": "<bos><|start_header_id|>user<|end_header_id|>\n\n",
    "gemma": "<bos><start_of_turn>user\n",
    "mistral": "<bos>[INST] ",
    "qwen2.5": "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n",
}


@pytest.mark.parametrize("style", STYLES)
def test_the_text(style: str) -> None:
    tokens = tokenizer(style)
    found = ChatTemplate(tokens).pre_query(None)
    assert found.text == STYLES[style] and tokens.decode(found.tokens) == STYLES[style]
    assert found.stop == {"mistral": "[/INST]", "llama-3": "<|eot_id|>", "gemma": "<end_of_turn>"}.get(
        style, "<|im_end|>"
    )
    assert tokens.eos_token_id in found.ends


@pytest.mark.parametrize("system", [None, "Ask about numbers."])
@pytest.mark.parametrize("style", TEMPLATES)
def test_it_is_what_two_conversations_have_in_common(style: str, system: str | None) -> None:
    """A second implementation: the text before unlike words, without a mark."""
    tokens, template = tokenizer(style), ChatTemplate(tokenizer(style))
    before = [] if system is None else [{"role": "system", "content": system}]
    words = ["alpha is it", "Whose words?"]
    if style in ("gemma", "mistral") and system is not None:  # no place for it: Gemma refuses it, Mistral says nothing
        before, words = [], [f"{system}\n\n{text}" for text in words]
    texts = [tokens.apply_chat_template([*before, {"role": "user", "content": text}], tokenize=False) for text in words]
    alike = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False)))
    found = template.pre_query(system)
    assert found.text == alike
    assert found.tokens == tuple(tokens(alike, add_special_tokens=False)["input_ids"])
    assert bool(template.notes) == (style in ("gemma", "mistral") and system is not None)


def test_a_first_token_that_the_tokenizer_puts_itself() -> None:
    """So that a server, which gets the text without it, reads the same tokens as a model in this process."""
    tokens = tokenizer("llama-3")
    assert ChatTemplate(tokens).pre_query(None).put == ("", "")
    tokens.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokens.bos_token_id)]
    )
    found = ChatTemplate(tokens).pre_query(None)
    assert found.put == ("<bos>", "") and found.lacks == ("", "")
    assert tuple(tokens(found.text.removeprefix("<bos>"))["input_ids"]) == found.tokens


@pytest.mark.parametrize("style", ["llama-3", "chatml"])
def test_other_tokens_that_the_tokenizer_puts(style: str) -> None:
    """Several of them, none of them its first one, and an end of text: GLM's, and ``add_eos_token``."""
    tokens = tokenizer(style)
    special = [(name, tokens.convert_tokens_to_ids(name)) for name in ("<|user|>", "<|end|>", "<eos>")]
    tokens.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> <|end|> $A <eos>", special_tokens=special
    )
    tokens.chat_template = "<|user|><|end|>" + (tokens.chat_template if style == "chatml" else "")
    if style == "llama-3":  # nothing but what the tokenizer puts stands before the words
        tokens.chat_template += "{{ messages[0].content }}"
        with pytest.raises(TemplateError, match="behind others"):
            ChatTemplate(tokens).pre_query(None)
        return
    found = ChatTemplate(tokens).pre_query(None)
    assert found.put == ("<|user|><|end|>", "<eos>") and found.lacks == ("", "<eos>")
    assert (*tokens(found.text.removeprefix(found.put[0]))["input_ids"][:-1],) == found.tokens


def test_templates_without_a_place_for_the_words() -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        ChatTemplate(tokenizer(None)).pre_query(None)
    for template in (
        "{{ bos_token }}",
        "{{ messages[0].content }}{{ messages[0].content }}",
        "{{ messages[0].content }}",
        "{{ bos_token }}{{ messages[0].content }}",
        "{{ bos_token }}\n{{ messages[0].content }}",
        "Q: {{ messages[0].content | upper }}",
    ):
        tokens = tokenizer("llama-3")
        tokens.chat_template = template
        with pytest.raises(TemplateError, match="user's words once"):
            ChatTemplate(tokens).pre_query(None)


@pytest.mark.parametrize("style", ["chatml", "llama-3", "mistral"])
@pytest.mark.parametrize("early", [True, False])
def test_a_model_goes_on_up_to_an_end(tmp_path: Path, style: str, early: bool) -> None:
    """Token by token without the library's ``generate``, whose ends are the template's, the line's and the text's."""
    seed = random.randrange(1000)
    print(f"seed {seed}")
    folder = str(write_model(tmp_path, style=style, seed=seed))
    tokens = tokenizer(style)
    before = ChatTemplate(tokens).pre_query(None)
    sampling = stopped(Sampling(temperature=0, max_tokens=24, stop=("zz",)), before, early)
    user = LocalUser("m", folder, sampling, before=before)
    (task, *_) = tasks_of(("never read",), samples=1)
    (draw,) = user.draws([task], frozenset([task.key]), 0)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids, made, finish = [*tokens(STYLES[style], add_special_tokens=False)["input_ids"]], [], "length"
    names = {"chatml": ["<|im_end|>"], "llama-3": ["<|eot_id|>"], "mistral": []}[style]
    ends = {tokens.eos_token_id, model.generation_config.eos_token_id, *tokens.convert_tokens_to_ids(names)}
    ends |= {token for token in ids if token in tokens.added_tokens_decoder}
    stops = ("zz", *(["\n"] if early else []), before.stop)
    text = ""
    while len(made) < 24:
        with torch.no_grad():
            made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
        text = tokens.decode(made, skip_special_tokens=True)
        if made[-1] in ends or any(stop in text for stop in stops):
            finish = "stop"
            break
    for stop in stops:
        text = text.partition(stop)[0]
    assert draw.prompt == tuple(ids) and (draw.answer.text, draw.answer.finish) == (text, finish)
