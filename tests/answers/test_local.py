"""Models in this process: what they answer depends on the tasks alone, not on who lies beside whom or what was done."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

from mergekit_lite.answers.asking import Sampling, Task
from mergekit_lite.answers.local import Local
from mergekit_lite.answers.rows import Answer, Key, Prompt
from mergekit_lite.answers.shrinking import PIECE, can_shrink
from mergekit_lite.errors import CheckpointError, UsageError
from tests.causal import causal_model
from tests.tokenizers import tokenizer

TEXTS = ("one", "two three four five six seven", "What is one and one?", "assistant user", "You are helpful.")
DRAWN = Sampling(temperature=1.0, top_p=0.9, max_tokens=12)
GREEDY = Sampling(temperature=0, max_tokens=12)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """More would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_model(folder: Path, architecture: str = "llama", style: str | None = "chatml", seed: int = 0) -> Path:
    model = causal_model(architecture, seed=seed)
    model.save_pretrained(folder)
    tokenizer(style).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def tasks_of(texts: tuple[str, ...] = TEXTS, samples: int = 3) -> list[Task]:
    return [
        Task(Prompt(text, ({"role": "user", "content": text},)), index, seed=1000 * number + index)
        for number, text in enumerate(texts)
        for index in range(samples)
    ]


def answers(local: Local, tasks: list[Task], wanted: frozenset[Key] | None = None) -> dict[Key, Answer]:
    return {
        answer.key: answer
        for answer in local.answers(tasks, frozenset(task.key for task in tasks) if wanted is None else wanted)
    }


def local(model: Path, sampling: Sampling = DRAWN, **how: object) -> Local:
    return Local("s", str(model), sampling, **({"batch_size": 4, "device": "cpu"} | how))  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there(model: Path, device: str) -> None:
    tasks = tasks_of()
    with pytest.raises(UsageError, match=f"The device '{device}' is not there: .* Known: cpu, cuda"):
        answers(local(model, device=device), tasks)


def test_batches_in_any_order_give_the_same_answers(model: Path) -> None:
    """Workers elsewhere get a model that nobody has loaded, and draw one batch after the other."""
    tasks = tasks_of()
    everything = frozenset(task.key for task in tasks)
    one = pickle.loads(pickle.dumps(local(model)))
    drawn = [answer for number in (3, 0, 4, 2, 1) for answer in one.batch(tasks, everything, number)]
    assert {answer.key: answer for answer in drawn} == answers(local(model), tasks)
    assert one.batch(tasks, everything, 4) == []


def test_a_resumed_run_gives_the_answers_of_an_undisturbed_one(model: Path) -> None:
    tasks = tasks_of()
    whole = answers(local(model), tasks)
    assert whole.keys() == {task.key for task in tasks}
    assert len({answer.text for answer in whole.values()}) > len(TEXTS)
    for first in (0, 1, 7, len(tasks) - 1):
        rest = frozenset(task.key for task in tasks[first:])
        assert answers(local(model), tasks, rest) == {key: whole[key] for key in rest}
    assert answers(local(model), tasks, frozenset()) == {}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_greedy_answers_are_those_of_a_plain_loop(tmp_path: Path, architecture: str) -> None:
    """Padding and batches change nothing: each prompt alone, token by token, says the same."""
    folder = write_model(tmp_path, architecture)
    found = answers(local(folder, GREEDY, batch_size=5), tasks_of(samples=1))
    plain, words = causal_model(architecture), tokenizer()
    for task in tasks_of(samples=1):
        ids = words.apply_chat_template(list(task.prompt.messages), add_generation_prompt=True, return_dict=False)
        made: list[int] = []
        with torch.inference_mode():
            while len(made) < 12 and (not made or made[-1] not in (words.eos_token_id, 0)):
                made.append(int(plain(torch.tensor([ids + made])).logits[0, -1].argmax()))
        ended = made[-1] in (words.eos_token_id, 0)
        answer = found[task.key]
        assert answer.text == words.decode(made, skip_special_tokens=True)
        assert (answer.finish, answer.tokens) == ("stop" if ended else "length", len(made) - ended)


def test_padding_brings_no_token_that_a_repetition_penalty_would_see(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's answer doesn't hang on how long its neighbours' prompts are."""
    asked = local(model, Sampling(temperature=0, repetition_penalty=3.0, max_tokens=12), batch_size=2)
    tasks = tasks_of(("two " * 30, "one"), samples=1)
    alone = [answers(asked, [task]) for task in tasks]
    seen: list[torch.Tensor] = []
    generate = asked.loaded.model.generate
    monkeypatch.setattr(asked.loaded.model, "generate", lambda ids, **how: seen.append(ids) or generate(ids, **how))
    assert answers(asked, tasks) == alone[0] | alone[1]
    for task, row in zip(tasks, seen[0].tolist(), strict=True):
        assert set(row) == set(asked.template.prompt(task.prompt.messages))


def test_sampling_has_nothing_of_the_models_own_settings(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    own = {"do_sample": True, "temperature": 0.01, "top_k": 1, "min_p": 0.9, "eos_token_id": 0, "max_length": 20}
    (folder / "generation_config.json").write_text(json.dumps(own))
    assert answers(local(folder), tasks_of()) == answers(local(write_model(tmp_path / "plain")), tasks_of())


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"min_p": 1.0}])
def test_draws_from_the_most_probable_token_alone_are_greedy(model: Path, narrow: dict[str, float]) -> None:
    drawn = Sampling(temperature=1.5, top_p=1, max_tokens=12, **narrow)  # type: ignore[arg-type]
    assert answers(local(model, drawn), tasks_of()) == answers(local(model, GREEDY), tasks_of())


def test_an_answer_ends_before_the_first_of_its_stops(model: Path) -> None:
    """The draws of others in the batch are the same."""
    tasks = tasks_of()
    whole = answers(local(model), tasks)
    texts = sorted((answer.text for answer in whole.values()), key=len)
    stops = (texts[-1][5:7], texts[-2][3:4])
    found = answers(local(model, DRAWN.model_copy(update={"stop": stops})), tasks)
    assert sum(found[key] != whole[key] for key in whole) >= 2
    for key, answer in whole.items():
        places = [place for stop in stops if (place := answer.text.find(stop)) >= 0]
        assert found[key].text == answer.text[: min(places, default=None)]
        if places:
            assert found[key].finish == "stop" and 0 < (found[key].tokens or 0) <= (answer.tokens or 0)
        else:
            assert found[key] == answer


def test_what_ends_an_answer_is_the_tokenizers_or_special(tmp_path: Path) -> None:
    """Configurations that say nothing have their family's default, here any word of this vocabulary."""
    folder = write_model(tmp_path)
    for told, ends in ((300, {1}), ([300, 4], {1, 4}), (None, {1})):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": told}))
        assert local(folder).loaded.ends == ends


def test_prompts_that_do_not_fit_are_told_and_long_ones_leave_less_room(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    asked = local(folder, Sampling(temperature=0, max_tokens=500))
    tasks = tasks_of(("one", "two " * 60), samples=2)
    found = answers(asked, tasks)
    assert {key.prompt for key in found} == {"one"}
    assert all(answer.finish == "stop" or answer.tokens < 40 for answer in found.values())
    assert asked.failures.lost.keys() == {task.key for task in tasks[2:]}
    assert all("the model takes 40" in why for why in asked.failures.lost.values())


def test_a_system_prompt_is_put_before_the_messages_or_folded(model: Path, tmp_path: Path) -> None:
    tasks = tasks_of(samples=1)
    briefed = answers(local(model, GREEDY, system="Be brief."), tasks)
    assert briefed != answers(local(model, GREEDY), tasks)
    gemma = write_model(tmp_path, style="gemma")  # its template refuses system prompts
    own = Prompt("own", ({"role": "system", "content": "x"}, {"role": "user", "content": "y"}))
    folded = Prompt("folded", ({"role": "user", "content": "x\n\ny"},))
    texts = [
        [answer.text for answer in answers(local(gemma, GREEDY), [Task(prompt, 0, 0)]).values()]
        for prompt in (own, folded)
    ]
    assert texts[0] == texts[1]
    twice = Prompt("twice", (*folded.messages, *folded.messages))
    asked = local(gemma, GREEDY)
    assert answers(asked, [*tasks, Task(twice, 0, 0)]).keys() == {task.key for task in tasks}
    assert "must alternate" in asked.failures.lost[Key("twice", 0)]


def test_an_answer_whose_thoughts_the_template_opens_begins_with_the_mark(tmp_path: Path) -> None:
    """Else a thought that never ends would be taken for the answer."""
    (answer,) = answers(local(write_model(tmp_path, style="thinking"), GREEDY), tasks_of(("one",), samples=1)).values()
    assert answer.text.startswith("<think>\n")


def test_what_is_no_model_is_told_in_a_sentence(tmp_path: Path, model: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "a.A", "AutoModelForCausalLM": "a.B"}})
    )
    tokenizer().save_pretrained(tmp_path)
    part = write_model(tmp_path / "part")
    weights = load_file(part / "model.safetensors")
    save_file({name: weights[name] for name in sorted(weights)[1:]}, part / "model.safetensors", {"format": "pt"})
    damaged = tmp_path / "damaged"
    tokenizer().save_pretrained(damaged)
    (damaged / "tokenizer.json").write_text("[]")
    wrong = {
        damaged: r"Can't load the model .*Expected is a folder with a tokenizer",
        tmp_path / "none": r"Can't load the model .*Expected is a folder with a tokenizer",
        tmp_path: r"Can't load the model .*It comes with code of its own, .* give the source a `server`\.",
        part: rf"is no causal language model.*\n.*no {sorted(weights)[0]}",
    }
    for path, told in wrong.items():
        with pytest.raises(CheckpointError, match=told):
            answers(local(path), tasks_of())


LONGER = 40
RAGGED = tasks_of(tuple(" ".join(["one two three"] * number) for number in range(1, 13)), samples=2)


@pytest.mark.parametrize(
    "drawing",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 7, "min_p": 0.02, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_answers_that_have_ended_leave_their_batch_and_nothing_else_changes(
    model: Path, drawing: dict[str, float]
) -> None:
    """Fewer rows are computed, and each answer is the one of a batch that stays whole."""
    found, rows = {}, {}
    for shrinks in (False, True):
        asked = local(model, Sampling(**drawing, max_tokens=LONGER), batch_size=len(RAGGED))  # type: ignore[arg-type]
        ended_by_many(asked)
        asked.__dict__["_shrinks"] = shrinks
        rows[shrinks] = 0

        def count(module: object, _: object, given: dict[str, torch.Tensor], how: bool = shrinks) -> None:
            rows[how] += given["input_ids"].shape[0]

        asked.loaded.model.register_forward_pre_hook(count, with_kwargs=True)
        found[shrinks] = answers(asked, RAGGED)
    assert found[True] == found[False]
    lengths = {answer.tokens for answer in found[True].values()}
    assert min(lengths) < PIECE < max(lengths), lengths
    assert rows[True] < rows[False]


def test_only_models_whose_cache_is_plain_keys_and_values_shrink(tmp_path: Path) -> None:
    assert can_shrink(causal_model("llama")) and can_shrink(causal_model("gpt2"))
    windows = MistralForCausalLM(
        MistralConfig(
            vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=4,
        )
    )  # fmt: skip
    assert not can_shrink(windows.eval())


def ended_by_many(asked: Local) -> None:
    """Let a tenth of all tokens end answers, so that these have many lengths."""
    ends = frozenset(range(0, len(asked.tokenizer), 10))
    asked.loaded.model.generation_config.eos_token_id = sorted(ends)
    asked.__dict__["loaded"] = asked.loaded._replace(ends=ends)


@pytest.mark.parametrize("style", ["chatml", None])
def test_an_answer_goes_on_from_its_beginning_as_it_did_without(tmp_path: Path, style: str | None) -> None:
    """Greedily, whatever part of the answer is given: where the part's text has the tokens that were drawn."""
    folder = write_model(tmp_path / "model", style=style)
    local = Local("local", str(folder), GREEDY, batch_size=4, device="cpu")
    (asked,) = tasks_of(("What is one and one?",), samples=1)
    (draw,) = local.draws([asked], frozenset([asked.key]), 0)
    tried = 0
    for number in range(1, len(draw.tokens)):
        given = local.tokenizer.decode(draw.tokens[:number], clean_up_tokenization_spaces=False)
        messages = (*asked.prompt.messages, {"role": "assistant", "content": given})
        task = replace(asked, prompt=replace(asked.prompt, messages=messages))
        if not given or local._tokens(task) != (*draw.prompt, *draw.tokens[:number]):
            continue
        tried += 1
        short = Local("local", str(folder), GREEDY.model_copy(update={"max_tokens": 12 - number}), device="cpu")
        (answer,) = short.answers([task], frozenset([task.key]))
        assert answer.text == draw.answer.text and answer.tokens == draw.answer.tokens - number
    assert tried >= 2


def test_beginnings_of_one_prompt_are_told_apart(model: Path) -> None:
    local = Local("local", str(model), GREEDY, device="cpu")
    tasks = [
        replace(
            task, prompt=replace(task.prompt, messages=(*task.prompt.messages, {"role": "assistant", "content": text}))
        )
        for task, text in zip(tasks_of(("one",), samples=2), ("two three", "You are"), strict=True)
    ]
    said = answers(local, tasks)
    assert [said[task.key].text.startswith(task.prompt.messages[-1]["content"]) for task in tasks] == [True, True]
