"""The sizes of the demo and the files of its folder."""

from dataclasses import dataclass
from pathlib import Path

SOURCES = ("one", "two", "three", "four")  # the released model, in parts, so that all cores sample
ALPHAS = (-1.0, 0.0, 0.5, 1.0, 2.0)  # on the test; -1 is the released model, 0 the trained one
DTYPES = ("bfloat16", "float16", "float32")
ASKED = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0)  # alphas whose effect after rounding is computed
MEASUREMENTS = ("test", "dev", "costs")


@dataclass(frozen=True)
class Size:
    """The size of a run."""

    train: int  # instructions that the model answers for its own training
    dev: int  # that boost chooses by
    report: int  # of the distillation's own report
    test: int
    sums: int
    texts: int
    max_tokens: int  # of an answer
    batch_size: int  # pairs in a step
    learning_rate: str
    epochs: int


# boost measures whole batches: of 288 instructions 256, of the dev's half of 288 128.
FULL = Size(
    train=360, dev=288, report=36, test=288, sums=200, texts=100, max_tokens=96, batch_size=8, learning_rate="2.0e-5",
    epochs=1,
)  # fmt: skip
QUICK = Size(
    train=54, dev=36, report=18, test=36, sums=4, texts=4, max_tokens=24, batch_size=2, learning_rate="2.0e-5",
    epochs=1,
)  # fmt: skip


@dataclass(frozen=True)
class Out:
    """The demo's folder."""

    root: Path

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def released(self) -> Path:
        """The model as it was released."""
        return self.root / "released"

    @property
    def made(self) -> Path:
        """The folder of the distillation."""
        return self.root / "made"

    @property
    def trained(self) -> Path:
        return self.made / "train" / "preference"

    def prompts(self, name: str) -> Path:
        return self.root / "prompts" / f"{name}.jsonl"

    def recipe(self, name: str) -> Path:
        return self.root / "recipes" / f"{name}.yaml"

    def sampled(self, source: str) -> Path:
        """The folder of a recipe by which one source answers, as deep as the others: paths of models are the same."""
        return self.root / f"sampled-{source}"

    def measured(self, name: str) -> Path:
        """What a measurement wrote: ``.boost`` beside it has its figures."""
        return self.root / "measured" / name

    def figures(self, name: str) -> Path:
        return self.root / "measured" / f"{name}.boost" / "boost.json"

    @property
    def rounding(self) -> Path:
        return self.root / "measured" / "rounding.json"

    @property
    def report(self) -> Path:
        return self.root / "report"
