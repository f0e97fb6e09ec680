"""Thoughts: taken from answers as servers send them, and written as each family's chat template has them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mergekit_lite.answers.template import ChatTemplate, TemplateError
from mergekit_lite.answers.thoughts import MARKS, as_trained, is_cut, parted, parts_of, together
from tests.tokenizers import TEMPLATES, tokenizer

USER = {"role": "user", "content": "one and one?"}
SYSTEM = {"role": "system", "content": "Be helpful."}
THOUGHT = "<think>\none two\n</think>\n\ntwo."

# In the manner of the families: what opens, empties, moves or removes thoughts.
SPLIT = (
    "{% set t = m.reasoning_content or '' %}{% set c = m.content %}"
    "{% if '</think>' in c %}{% set t = c.split('</think>')[0].split('<think>')[-1] %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last and m.role == 'assistant' %}"
)
SHOWN = SPLIT + "{{ '<think>\n' + t.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ c }}"


def turns(content: str, header: str, end: str = "\n") -> str:
    """A template in the manner of ChatML: what it writes of each turn, and what follows the header when it asks."""
    return (
        f"{{% for m in messages %}}{{{{ '<|im_start|>' + m.role + '{end}' }}}}{content}{{{{ '<|im_end|>\n' }}}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant{end}{header}' }}}}{{% endif %}}"
    )


FAMILIES = {
    "empty": turns(SHOWN, ""),  # Qwen3: the last answer always has thoughts, empty ones too
    "opened": turns(SHOWN, "<think>\n"),  # Qwen3.5: the same, and the prompt opens them
    "closed": turns(SHOWN, "<think>\n\n</think>\n\n"),  # Qwen3.5 when it isn't to think
    "removed": turns("{{ m.content.split('</think>')[-1] }}", "<think>\n"),  # DeepSeek-R1: never shown again
    "as they are": turns("{{ m.content }}", "<think>\n"),
    "always": turns("{{ '<think>\n' if m.role == 'assistant' else '' }}{{ m.content }}", "<think>\n"),
    # GLM-4.5: on one line, an empty pair where there are none
    "one line": turns(SPLIT + "{{ '\n<think>' + t.strip() + '</think>' }}{% endif %}{{ '\n' + c }}", "", end=""),
    # gpt-oss: a channel of their own, from a field
    "channel": (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% if m.thinking %}<|im_start|>assistant<|analysis|>{{ m.thinking }}<|end|>{% endif %}"
        "<|im_start|>assistant<|final|>{{ m.content }}<|im_end|>{% else %}"
        "<|im_start|>{{ m.role }} {{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    ),
    "none": TEMPLATES["chatml"],
}
# family: the end of the prompt, the response without thoughts, and with them
WRITTEN = {
    "empty": ("assistant\n", "<think>\n\n</think>\n\ntwo.", THOUGHT),
    "opened": ("assistant\n<think>\n", "\n</think>\n\ntwo.", THOUGHT.removeprefix("<think>\n")),
    "closed": ("assistant\n<think>\n\n</think>\n\n", "two.", "two."),
    "removed": ("assistant\n<think>\n", "\n</think>\n\ntwo.", THOUGHT.removeprefix("<think>\n")),
    "as they are": ("assistant\n<think>\n", "\n</think>\n\ntwo.", THOUGHT.removeprefix("<think>\n")),
    "always": ("assistant\n<think>\n", "\n</think>\n\ntwo.", THOUGHT.removeprefix("<think>\n")),
    "one line": ("assistant", "\n<think></think>\ntwo.", "\n<think>one two</think>\ntwo."),
    "channel": ("assistant", "<|final|>two.", "<|analysis|>one two<|end|><|im_start|>assistant<|final|>two."),
    "none": ("assistant\n", "two.", THOUGHT),
}


def of(family: str):
    made = tokenizer("chatml")
    made.chat_template = FAMILIES[family]
    return made


@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER]], ids=["user", "system"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, messages):
    made = of(family)
    prompt, plain, thinking = WRITTEN[family]
    for answer, written in (("two.", plain), (THOUGHT, thinking), ("<think>\n\n</think>\n\ntwo.", plain)):
        template = ChatTemplate(made)
        tokens = template.tokens(messages, answer)
        assert made.decode(tokens.prompt).endswith(prompt)
        assert made.decode(tokens.response) == written + "<|im_end|>"
        assert tokens.prompt == template.prompt(messages)
        remark = f"The chat template of {template.name} closes thoughts before each answer: answers are taken without"
        left_out = family == "closed" and answer == THOUGHT
        assert template.notes == ([f"{remark} theirs (1×)."] if left_out else [])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "closed"])
def test_an_answer_that_was_cut_has_no_end(family):
    made = of(family)
    template = ChatTemplate(made)
    for answer in ("two", "<think>\none two\n</think>\n\ntwo"):
        whole, cut = template.tokens([USER], answer), template.tokens([USER], answer, cut=True)
        assert whole.response == (*cut.response, made.eos_token_id)
    thinking = made.decode(template.prompt([USER]) + template.tokens([USER], "<think>\none tw").response)
    assert thinking.endswith("<think>\none tw")  # though nobody has said that it was cut
    assert thinking.count("<think>") == 1


def test_a_thought_has_to_have_a_place():
    with pytest.raises(TemplateError, match="has no place for"):
        ChatTemplate(of("closed")).tokens([USER], "<think>\none tw")


def test_a_system_prompt_that_a_template_refuses_is_folded():
    for style in ("gemma", "thinking"):  # one refuses, the other leaves out
        made = tokenizer(style)
        template = ChatTemplate(made)
        folded = {"role": "user", "content": "Be helpful.\n\none and one?"}
        if style == "thinking":
            made.chat_template = made.chat_template.replace("{% else %}", "{% elif m.role == 'assistant' %}")
        assert template.tokens([SYSTEM, USER], "two.") == ChatTemplate(made).tokens([folded], "two.")
        assert template.whole([SYSTEM, USER]) == ChatTemplate(made).whole([folded])
        assert "before the first turn of the user (2×)" in template.notes[0]


def test_a_system_prompt_that_moves_leaves_the_answer_alone():
    """Mistral's templates of 2407 write it into the user's last turn, and none once an answer follows."""
    made = tokenizer("mistral")
    made.chat_template = (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m.role == 'user' %}[INST] {{ s if loop.last else '' }}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    for messages in ([USER], [SYSTEM, USER]):
        tokens = ChatTemplate(made).tokens(messages, "two.")
        assert made.decode(tokens.response) == " two.<eos>"
        assert ("Be helpful." in made.decode(tokens.prompt)) == (len(messages) == 2)


@pytest.mark.parametrize("opening", MARKS)
def test_parts(opening):
    closing = MARKS[opening]
    inside = parted(f"{opening}\none two\n{closing}\n\ntwo.")
    assert (inside.thoughts.strip(), inside.answer, inside.open) == ("one two", "two.", False)
    assert inside.whole == THOUGHT  # by the mark that most have
    assert parted(f"one two\n{closing}\n\ntwo.").whole == THOUGHT  # the template has opened them
    assert together("one two", "two.").whole == THOUGHT  # the server took them out
    cut = parted(f"{opening}\none tw")
    assert (cut.open, cut.answer, cut.whole) == (True, "", "<think>\none tw")
    assert parted(f"{opening}\n\n{closing}\n\ntwo.").whole == "two."


@pytest.mark.parametrize("text", ["two.", " \n two\n", "", "say <think> or </think>", "1 < 2 </thinking>", "<thin>two"])
def test_what_are_no_thoughts(text):
    parts = parted(text)
    assert (parts.answer, parts.whole, parts.has_thoughts, parts.open) == (text, text, False, False)


def test_rows():
    row = {"text": "two.", "thoughts": "one two", "finish": "stop"}
    assert as_trained(row, "keep") == as_trained(row, "only") == THOUGHT
    assert as_trained(row, "strip") == parts_of(row).answer == "two."
    assert not is_cut(row)
    assert is_cut({"text": "two", "finish": "length"})
    assert is_cut({"text": "<think>\none", "finish": "stop"})
    spent = {"text": "", "thoughts": "one two", "finish": "length"}
    assert is_cut(spent)
    assert (parts_of(spent).answer, as_trained(spent, "keep")) == ("", "<think>\none two")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL has copies of the hub's templates")
def test_real_templates():
    """No family doubles a mark, or trains an answer inside thoughts that are open."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "chat_templates"
    texts = {path.stem: path.read_text() for path in folder.glob("*.jinja") if not path.stem.endswith("_training")}
    assert len(texts) > 30
    for name in ("idefics3", "llava_next", "smolvlm"):  # they take lists of parts, images among them, and no text
        texts.pop(name, None)
    for name, text in texts.items():
        made = tokenizer("llama-3")  # some templates need a first token
        made.chat_template = text
        for messages in ([USER], [SYSTEM, USER]):
            for answer in ("two.", THOUGHT):
                tokens = ChatTemplate(made).tokens(messages, answer)
                prompt, response = made.decode(tokens.prompt), made.decode(tokens.response)
                turn = prompt[prompt.rindex("one and one?") :] + response
                assert turn.count("<think>") == turn.count("</think>") <= 1, (name, turn)
                assert response.count("two.") == 1, (name, turn)
                assert ("Be helpful." in prompt) == (len(messages) == 2), (name, prompt)
