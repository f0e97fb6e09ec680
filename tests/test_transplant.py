"""A model with another one's tokenizer: rows of shared tokens kept, the others rebuilt from them."""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import mergekit_lite
from mergekit_lite.checkpoint.encodings.pursuit import Atoms, nearest, pursued
from mergekit_lite.checkpoint.encodings.rebuilt import Sharing, rows_at_once
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.commands import main
from mergekit_lite.errors import PlanError, UsageError
from mergekit_lite.planning.token_numbers import with_numbers_of
from mergekit_lite.transplanting.leave_out import leave_out
from mergekit_lite.transplanting.planning import plan_transplant
from tests.models import State, read_folder, same_bytes, state, write_folder
from tests.test_vocabularies import tokenizer

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
SHARED = ["<s>", *(f"w{number}" for number in range(40))]
ONLY_MODEL = ["</s>", "old"]
ONLY_DONOR = ["<|end|>", *(f"new{number}" for number in range(25))]
# The numbers of the released code (mergekit 0.1.5) in float64.
ATOMS = torch.tensor([[1, 0, 0], [0, 2, 0], [1, 1, 0], [0, 1, 3], [2, 0, 1]], dtype=torch.float64)
TARGETS = torch.tensor([[1, 2, 3], [2, 1, 0]], dtype=torch.float64)
OTHERS = torch.tensor([[1, 1], [0, 1], [2, 0], [1, -1], [0, 3]], dtype=torch.float64)


def close(tensor: torch.Tensor, numbers: object, within: float = 1e-12) -> None:
    torch.testing.assert_close(tensor.double(), torch.tensor(numbers, dtype=torch.float64), rtol=0, atol=within)


@pytest.mark.parametrize("fast", [False, True])
def test_pursuit_gives_the_released_numbers(fast: bool) -> None:
    atoms = Atoms(ATOMS, fast)
    one, two, three = (pursued(TARGETS, atoms, k) for k in (1, 2, 3))
    assert one.chosen.tolist() == [[3], [4]]
    close(one.coefficients, [[1.1], [0.8]])
    assert two.chosen.tolist() == [[3, 2], [4, 1]]
    close(two.coefficients, [[1, 1], [0.8, 0.5]])
    close((two.coefficients[:, :, None] * ATOMS[two.chosen]).sum(1), [[1, 2, 3], [1.6, 1, 0.8]])
    close((two.coefficients[:, :, None] * OTHERS[two.chosen]).sum(1), [[3, -1], [0, 2.9]])
    assert three.chosen[1].tolist() == [4, 1, 3]
    close(three.coefficients[1], [1, 2 / 3, -1 / 3])
    close(three.coefficients[0, 2], 0)  # nothing was left


def test_nearest_gives_the_released_numbers() -> None:
    made = nearest(TARGETS, Atoms(ATOMS), 2)
    weights = {0: {3: 0.6796228, 4: 0.3203772}, 1: {2: 0.5857864, 0: 0.4142136}}
    own = made.chosen[0].tolist()
    close(made.coefficients[0], [weights[0][number] for number in own], 1e-7)
    close(made.coefficients[1], [0.5857864, 0.4142136], 1e-7)
    assert own == [3, 4] and made.chosen[1, 0].item() == 2
    assert made.chosen[1, 1].item() in (0, 4)  # both at √2


def naive(target: torch.Tensor, atoms: torch.Tensor, k: int) -> tuple[list[int], torch.Tensor]:
    """Orthogonal matching pursuit as its definition says: every step solved anew."""
    chosen: list[int] = []
    residual, solution = target.clone(), torch.zeros(0, dtype=torch.float64)
    for _ in range(k):
        products = (atoms @ residual).abs()
        products[chosen] = -1
        chosen.append(int(products.argmax()))
        solution = torch.linalg.lstsq(atoms[chosen].T, target[:, None]).solution[:, 0]
        residual = target - atoms[chosen].T @ solution
    return chosen, solution


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pursuit_is_what_its_definition_says(fast: bool, dtype: torch.dtype) -> None:
    """A second implementation; lengths from 0.1 to 10, two equal atoms and one of zeros among them."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    lengths = 10 ** (2 * torch.rand(70, 1, generator=generator) - 1)
    vectors = (torch.randn(70, 24, generator=generator) * lengths).to(dtype)
    vectors[50], vectors[60] = vectors[10], 0
    targets = torch.randn(9, 24, generator=generator, dtype=torch.float64)
    made = pursued(targets, Atoms(vectors, fast), 12)
    for number, target in enumerate(targets):
        chosen, solution = naive(target, vectors.double(), 12)
        assert made.chosen[number].tolist() == chosen
        torch.testing.assert_close(made.coefficients[number], solution, rtol=1e-6, atol=1e-9)


def model(
    folder: Path, seed: int, tokens: list[str | None], hidden: int, rows: int | None = None, **more: Any
) -> State:
    """Write a model and its tokenizer, of special tokens ``<s>`` and ``eos``."""
    eos = more.pop("eos")
    tensors = state(seed, vocabulary=rows or len(tokens), hidden=hidden)
    config = {"model_type": "llama", "hidden_size": hidden, "vocab_size": rows or len(tokens), **more}
    config |= {"eos_token_id": tokens.index(eos), "bos_token_id": 0}
    write_folder(folder, tensors, config=config)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(tokens)))
    special = {"bos_token": "<s>", "eos_token": eos, "chat_template": f"of {folder.name}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens.index(eos)}))
    return tensors


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[State, State, list[str | None], list[str | None]]:
    """A model of 8 columns, and a donor of 12 with other tokens, in another order, two rows wider."""
    monkeypatch.chdir(tmp_path)
    own: list[str | None] = [*SHARED, *ONLY_MODEL]
    other: list[str | None] = ["<s>", *ONLY_DONOR, *SHARED[:0:-1]]
    one = model(tmp_path / "model", 0, own, 8, eos="</s>", rope_theta=7.0, image_token_id=3, lost_token_id=42)
    two = model(tmp_path / "donor", 1, other, 12, rows=len(other) + 2, eos="<|end|>", pad_token_id=5)
    return one, two, own, other


def expected(tensor: str, pair: tuple[State, State, list[str | None], list[str | None]], k: int) -> torch.Tensor:
    one, two, own, other = pair
    shared = [token for token in other if token in own]
    atoms = two[tensor][[other.index(token) for token in shared]].double()
    rows = one[tensor][[own.index(token) for token in shared]].double()
    made = []
    for token in other:
        if token in own:
            made.append(one[tensor][own.index(token)].double())
        elif token == "<|end|>":  # by its role
            made.append(one[tensor][own.index("</s>")].double())
        else:
            chosen, solution = naive(two[tensor][other.index(token)].double(), atoms, k)
            made.append(solution @ rows[chosen])
    return torch.stack([*made, rows.mean(0), rows.mean(0)])


def test_a_transplant_has_the_donors_tokens_and_the_models_rows(
    pair: tuple[State, State, list[str | None], list[str | None]],
) -> None:
    one, _, own, other = pair
    mergekit_lite.transplant("model", "donor", "out", k=6)
    made = read_folder(Path("out"))
    for name, tensor in made.items():
        if name not in VOCABULARY:
            assert same_bytes(tensor, one[name])
            continue
        torch.testing.assert_close(tensor.double(), expected(name, pair, 6), rtol=2**-8, atol=1e-6)
        for row, token in enumerate(other):
            if token in own:
                assert same_bytes(tensor[row], one[name][own.index(token)])
    config = json.loads(Path("out/config.json").read_text())
    assert config["vocab_size"] == len(other) + 2 and config["rope_theta"] == 7.0 and config["hidden_size"] == 8
    assert config["eos_token_id"] == other.index("<|end|>") and config["pad_token_id"] == 5
    assert config["image_token_id"] == other.index("w2") and config["lost_token_id"] is None
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert Path("out", name).read_bytes() == Path("donor", name).read_bytes()
    assert "transplant" in Path("out/README.md").read_text()
    assert mergekit_lite.verify("out", samples="all").sound
    Path("donor").rename("moved")
    assert mergekit_lite.verify("out", samples="all", inputs={"donor": "moved"}).sound


@pytest.mark.parametrize("method", ["nearest", "mean"])
def test_other_methods_make_the_rows_otherwise(
    pair: tuple[State, State, list[str | None], list[str | None]], method: Any
) -> None:
    one, two, own, other = pair
    mergekit_lite.transplant("model", "donor", "out", method=method, k=3, pad_to_multiple_of=10)
    made = read_folder(Path("out"))
    shared = [token for token in other if token in own]
    for name in VOCABULARY:
        assert len(made[name]) == 70
        rows = one[name][[own.index(token) for token in shared]].double()
        atoms = two[name][[other.index(token) for token in shared]].double()
        for number, token in enumerate(other):
            if token in own or token == "<|end|>":
                continue
            wanted = rows.mean(0)
            if method == "nearest":
                distances = (atoms - two[name][number].double()).norm(dim=1)
                near = distances.argsort()[:3]
                wanted = (rows[near] / distances[near, None]).sum(0) / (1 / distances[near]).sum()
            torch.testing.assert_close(made[name][number].double(), wanted, rtol=2**-8, atol=1e-6)
    assert mergekit_lite.verify("out", samples="all").sound


def test_the_same_bytes_however_it_is_cut_or_interrupted(
    pair: tuple[State, State, list[str | None], list[str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are rebuilt in blocks of their own: reads of any begin and length are the same, and so is a resumed run."""
    monkeypatch.setattr("mergekit_lite.checkpoint.encodings.rebuilt.BASIS_BYTES", 8 * 5 * 12 * 7)
    assert rows_at_once(12, 5) == 7
    plan = plan_transplant("model", "donor", "out", k=5)
    spec = next(job for job in plan.jobs if job.name == VOCABULARY[0]).inputs[0]
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    with Reader() as reader:
        whole = spec.elements(reader, 0, spec.numel)
    for _ in range(20):
        begin = draw.randrange(spec.numel)
        count = draw.randint(1, spec.numel - begin)
        with Reader() as reader:
            assert same_bytes(spec.elements(reader, begin, count), whole[begin : begin + count])

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mergekit_lite.run(plan, threads=1, progress=stop)
    mergekit_lite.run(plan, resume=True)
    mergekit_lite.transplant("model", "donor", "again", k=5, threads=3)
    assert Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def test_workers_have_the_shared_rows_together(
    pair: tuple[State, State, list[str | None], list[str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are threads, for verify too, and read the rows of shared tokens once for each matrix."""
    monkeypatch.setattr("mergekit_lite.checkpoint.encodings.rebuilt.BASIS_BYTES", 8 * 5 * 12 * 7)
    monkeypatch.setattr("mergekit_lite.engine.tiling.TASKS", 1 << 20)  # a task for each span
    read: list[str] = []
    atoms = Sharing.atoms

    def slowly(self: Sharing, reader: Reader) -> Atoms:
        read.append(self.model.name)
        time.sleep(0.2)
        return atoms(self, reader)

    monkeypatch.setattr(Sharing, "atoms", slowly)
    plan = plan_transplant("model", "donor", "out", k=5)
    spec = next(job for job in plan.jobs if job.name == VOCABULARY[0]).inputs[0]
    with Reader() as reader, ThreadPoolExecutor(4) as threads:
        parts = [threads.submit(spec.elements, reader, 8 * row, 8) for row in range(spec.shape[0])]
        assert all(part.exception() is None for part in parts)
    assert read == [VOCABULARY[0]]
    mergekit_lite.run(plan, threads=3, processes=True)
    assert sorted(read[1:]) == sorted(VOCABULARY)
    assert mergekit_lite.verify("out", samples="all", threads=3, processes=True).sound
    assert sorted(read[3:]) == sorted(VOCABULARY)


def test_tied_heads_are_rebuilt_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that repeats the embedding goes on repeating it, whatever the donor's head says; none stays none."""
    monkeypatch.chdir(tmp_path)
    own: list[str | None] = [*SHARED, *ONLY_MODEL]
    other: list[str | None] = ["<s>", *ONLY_DONOR, *SHARED[1:]]
    model(tmp_path / "donor", 1, other, 12, eos="<|end|>")
    for stored in (True, False):
        tensors = model(tmp_path / "model", 0, own, 8, eos="</s>", tie_word_embeddings=True)
        config = json.loads(Path("model/config.json").read_text())
        tensors[VOCABULARY[1]] = tensors[VOCABULARY[0]].clone()
        write_folder(
            tmp_path / "model", {n: t for n, t in tensors.items() if stored or n != VOCABULARY[1]}, config=config
        )
        mergekit_lite.transplant("model", "donor", "out", k=6, force=True)
        made = read_folder(Path("out"))
        assert (VOCABULARY[1] in made) == stored
        assert not stored or same_bytes(made[VOCABULARY[1]], made[VOCABULARY[0]])


def test_what_is_planned_is_told_and_what_is_wrong_refused(
    pair: tuple[State, State, list[str | None], list[str | None]], tmp_path: Path
) -> None:
    notes = "\n".join(plan_transplant("model", "donor", "out", k=6).notes)
    assert "42 tokens of donor are in model, too, and keep its rows; 25 are rebuilt as sums of 6 rows (omp)" in notes
    assert "eos_token '<|end|>' has the row of '</s>'" in notes
    assert "1 token that only model has are left out: 'old'" in notes
    assert "generation_config.json" not in notes
    Path("donor/generation_config.json").rename("elsewhere.json")
    notes = "\n".join(plan_transplant("model", "donor", "out", k=6).notes)
    assert "generation_config.json is the model's, and eos_token_id may be numbers of its own tokens" in notes
    with pytest.raises(PlanError, match="k is 64, and model and donor have only 41 tokens in common"):
        plan_transplant("model", "donor", "out")
    with pytest.raises(UsageError, match="Did you mean 'omp'"):
        plan_transplant("model", "donor", "out", method="opm")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="name a folder"):
        plan_transplant("model", "donor", "out.safetensors")
    for name in ("model", "donor"):
        Path(name, "tokenizer.json").unlink()
    with pytest.raises(PlanError) as error:
        plan_transplant("model", "donor", "out")
    assert [problem.split(":")[0] for problem in error.value.problems] == ["model", "donor"]
    model(tmp_path / "model", 0, ["<s>", "</s>", *"abc"], 8, eos="</s>")
    model(tmp_path / "donor", 1, ["<x>", "<y>", *"def", "123"], 8, eos="<y>")
    with pytest.raises(PlanError, match="have no token in common"):
        plan_transplant("model", "donor", "out", k=1)


def test_digits_that_are_cut_otherwise_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "model", 0, ["<s>", "</s>", *"0123456789"], 8, eos="</s>")
    model(tmp_path / "donor", 1, ["<s>", "</s>", *"0123456789", "123", "Ġ4567"], 8, eos="</s>")
    plan = plan_transplant("model", "donor", "out", k=2)
    assert any("tokens had up to 1 digit, now up to 4" in note for note in plan.notes)
    assert not any("digit" in note for note in plan_transplant("donor", "donor", "out", k=2).notes)


def test_subwords_are_the_models_own_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real tokenizers of the library: tokens in pieces by merges, between two alphabets, and bytes that are no text."""
    monkeypatch.chdir(tmp_path)
    vocabulary = ["<s>", "</s>", "Ġ", *"snowam", "no", "Ġs", "Ã", "©", "Ã©"]
    merges = ["n o", "Ġ s", "Ã ©"]
    one = model(tmp_path / "model", 0, [*vocabulary], 8, eos="</s>")
    content = tokenizer([*vocabulary], added=2) | {"decoder": None, "normalizer": None}
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content["model"]["merges"] = merges
    content["added_tokens"] = [
        {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, **token}
        for token in content["added_tokens"]
    ]
    Path("model/tokenizer.json").write_text(json.dumps(content))
    words: list[str | None] = ["<s>", "</s>", "▁snow", "man", "é", "<0xC3>", "x"]
    model(tmp_path / "donor", 1, words, 12, eos="</s>")
    Path("donor/tokenizer.json").write_text(json.dumps(tokenizer(words, kind="Metaspace")))
    mergekit_lite.transplant("model", "donor", "out", method="subword")
    made = read_folder(Path("out"))
    at = {token: number for number, token in enumerate(vocabulary)}
    for name in VOCABULARY:
        rows = one[name].double()
        shared = rows[[0, 1, at["Ã©"], at["Ã"]]].mean(0)
        for token, pieces in {"▁snow": ["Ġs", "no", "w"], "man": ["m", "a", "n"]}.items():
            wanted = rows[[at[piece] for piece in pieces]].mean(0)
            torch.testing.assert_close(made[name][words.index(token)].double(), wanted, rtol=2**-8, atol=1e-6)
        torch.testing.assert_close(made[name][words.index("x")].double(), shared, rtol=2**-8, atol=1e-6)
        assert same_bytes(made[name][words.index("é")], one[name][at["Ã©"]])
        assert same_bytes(made[name][words.index("<0xC3>")], one[name][at["Ã"]])
    assert mergekit_lite.verify("out", samples="all").sound


def test_known_tokens_tell_which_method_is_good(
    pair: tuple[State, State, list[str | None], list[str | None]], tmp_path: Path
) -> None:
    """Where the model's rows are a linear image of the donor's, matching pursuit finds them and the mean doesn't."""
    _, two, own, other = pair
    image = torch.randn(12, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tensors = read_folder(Path("model"))
    for name in VOCABULARY:
        for number, token in enumerate(own):
            if token in other:
                tensors[name][number] = (two[name][other.index(token)].double() @ image).bfloat16()
    write_folder(tmp_path / "model", tensors, config=json.loads(Path("model/config.json").read_text()))
    plan = plan_transplant("model", "donor", "out", k=12)
    trials = {(trial.tensor, trial.method): trial for trial in leave_out(plan)}
    for name in VOCABULARY:
        assert trials[name, "omp"].cosine > 0.999 and trials[name, "omp"].error < 0.05
        assert trials[name, "mean"].error > 0.8 > trials[name, "nearest"].cosine
        assert trials[name, "omp"].tokens == 20
    told = CliRunner().invoke(
        main, ["tokenizer", "transplant", "model", "donor", "-o", "out", "-k", "12", "--dry-run", "--json"]
    )
    assert told.exit_code == 0, told.output
    assert [each["method"] for each in json.loads(told.stdout)["leave_out"]] == ["omp", "nearest", "mean"] * 2
    done = CliRunner().invoke(main, ["tokenizer", "transplant", "model", "donor", "-o", "out", "-k", "12"])
    assert done.exit_code == 0 and "left out and rebuilt" in done.output, done.output
    figures = [f"| {method} | 20 | {trials[VOCABULARY[0], method].cosine:.3f} |" for method in ("omp", "mean")]
    card = Path("out/README.md").read_text()
    assert all(figure in card for figure in figures)
    mergekit_lite.transplant("model", "donor", "by-python", k=12)
    assert Path("by-python/README.md").read_text() == card.replace("# out", "# by-python")
    assert mergekit_lite.verify("out").sound


@pytest.mark.parametrize(("kind", "within"), [("F32", 0.0), ("Q8_0", 0.05)])
def test_a_gguf_beside_a_tokenizer_may_be_the_donor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, within: float
) -> None:
    gguf = pytest.importorskip("gguf")
    from tests.checkpoint.gguf_files import add, add_values

    monkeypatch.chdir(tmp_path)
    other: list[str | None] = ["<s>", *ONLY_DONOR, *SHARED[:0:-1]]
    model(tmp_path / "model", 0, [*SHARED, *ONLY_MODEL], 8, eos="</s>")
    tensors = model(tmp_path / "donor", 1, other, 32, eos="<|end|>")
    mergekit_lite.transplant("model", "donor", "wanted", k=4)
    for file in (tmp_path / "donor").glob("*.safetensors*"):
        file.unlink()
    writer = gguf.GGUFWriter(tmp_path / "donor/donor.gguf", "llama")
    add_values(writer, "llama", {".block_count": 0, ".embedding_length": 32, ".attention.head_count": 2})
    for ours, theirs in zip(VOCABULARY, ("token_embd.weight", "output.weight"), strict=True):
        add(writer, theirs, tensors[ours].float().numpy(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    mergekit_lite.transplant("model", "donor", "out", k=4)
    wanted, made = read_folder(Path("wanted")), read_folder(Path("out"))
    for name in wanted:
        torch.testing.assert_close(made[name].double(), wanted[name].double(), rtol=0, atol=within)
    assert mergekit_lite.verify("out", samples="all").sound
    with pytest.raises(PlanError, match=r"donor\.gguf: has no tokenizer\.json .* Put it into a folder with that of"):
        plan_transplant("model", "donor/donor.gguf", "other")


def test_numbers_of_tokens_follow_in_nested_configs() -> None:
    config = {
        "text_config": {"vocab_size": 9, "eos_token_id": [1, 2]},
        "image_token_index": 4,
        "stop_token_ids": [4, 8],
    }
    made = with_numbers_of(config, {"eos_token_id": 7, "vocab_size": 20}, 20, {4: 11})
    assert made == {
        "text_config": {"vocab_size": 20, "eos_token_id": 7},
        "image_token_index": 11,
        "stop_token_ids": [11],
    }


def test_a_quantised_vocabulary_leaves_no_quantisation_in_the_config(
    pair: tuple[State, State, list[str | None], list[str | None]], tmp_path: Path
) -> None:
    """The embedding and head alone are in FP8; their rows are written as values."""
    config = json.loads(Path("model/config.json").read_text())
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"all": {"weights": weights, "targets": ["Linear"]}},
    }
    tensors = read_folder(Path("model"))
    for name in VOCABULARY:
        scale = tensors[name].float().abs().max() / 448
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale.reshape(1)
    write_folder(tmp_path / "model", tensors, config=config)
    mergekit_lite.transplant("model", "donor", "out", k=6)
    assert "quantization_config" not in json.loads(Path("out/config.json").read_text())
    assert {tensor.dtype for tensor in read_folder(Path("out")).values()} == {torch.bfloat16}
    assert mergekit_lite.verify("out", samples="all").sound
