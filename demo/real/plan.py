"""The sizes of the demo and the files of its folder."""

from dataclasses import dataclass
from pathlib import Path

ALPHAS = (-1.0, 0.0, 0.5, 1.0, 2.0)  # on the test; -1 is the released model, 0 the trained one
DTYPES = ("bfloat16", "float16", "float32")
ASKED = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0)  # alphas whose effect after rounding is computed
PARTS = ("one", "two", "three", "four")  # of the test, two of them measured at a time
LEFT_OUT = range(12, 22)  # layers that the student doesn't have, of 30


@dataclass(frozen=True)
class Size:
    """The size of a run."""

    train: int  # instructions that the model answers for its own training
    lessons: int  # that the trained model answers for its student; those of train are among them
    dev: int  # that boost chooses by
    report: int  # of the distillation's own report
    test: int
    sums: int
    texts: int
    max_tokens: int  # of an answer
    batch_size: int  # pairs in a step
    learning_rate: str
    epochs: int
    student_epochs: int


# boost measures whole batches of 64, so a part of the test has 256, and a half of dev.
FULL = Size(
    train=360, lessons=720, dev=512, report=36, test=1024, sums=200, texts=100, max_tokens=96, batch_size=8,
    learning_rate="2.0e-5", epochs=1, student_epochs=2,
)  # fmt: skip
QUICK = Size(
    train=54, lessons=72, dev=36, report=18, test=72, sums=4, texts=4, max_tokens=24, batch_size=2,
    learning_rate="2.0e-5", epochs=1, student_epochs=1,
)  # fmt: skip


@dataclass(frozen=True)
class Lesson:
    """A distillation: its recipe beside this file, its folder, and its sources, which sample at the same time."""

    recipe: str
    folder: str
    sources: tuple[str, ...]


OWN = Lesson("own", "made", ("one", "two", "three", "four"))  # the released model learns from its own answers
STUDENT = Lesson("student", "taught", ("first", "second"))  # a smaller one learns from the trained model


@dataclass(frozen=True)
class Out:
    """The demo's folder."""

    root: Path

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def times(self) -> Path:
        """What each stage took: a line for each time that it was run."""
        return self.root / "times.jsonl"

    @property
    def released(self) -> Path:
        """The model as it was released."""
        return self.root / "released"

    @property
    def student(self) -> Path:
        """The released model without some of its layers."""
        return self.root / "student"

    def folder(self, lesson: Lesson) -> Path:
        return self.root / lesson.folder

    @property
    def trained(self) -> Path:
        return self.folder(OWN) / "train" / "preference"

    @property
    def taught(self) -> Path:
        """The student after its lessons."""
        return self.folder(STUDENT) / "train" / "sft"

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
