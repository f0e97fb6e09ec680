"""What a search leaves on the disk for whoever looks: read back as it was, while it goes on and afterwards."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mergekit_lite.boosting import record
from mergekit_lite.boosting.report import write
from mergekit_lite.boosting.search.choice import Result, boost
from mergekit_lite.boosting.search.point import Settings
from mergekit_lite.boosting.search.search import bracket
from mergekit_lite.boosting.search.study import Study
from mergekit_lite.errors import UnreadableError
from tests.boost.search.test_choice import peak
from tests.boost.test_report import Answering


@pytest.mark.parametrize("minimised", [(), ("score",)])
def test_a_search_is_read_back_as_it_stood(tmp_path: Path, minimised: tuple[str, ...]) -> None:
    """After the baseline and each candidate, and at its end: the same figures, those that JSON can't hold included."""
    evaluator = Answering(peak, items=300)
    seen: list[int] = []

    def look(result: Result) -> None:
        record.write_so_far(tmp_path, result, {})
        found = record.read(tmp_path / record.SO_FAR)
        assert record.as_json(found, {}) == record.as_json(result, {})
        assert json.loads((tmp_path / record.SO_FAR).read_text())["verdict"] == []
        seen.append(len(found.points))

    with Study(tmp_path, {}, evaluator.items) as study:
        settings = Settings(score="score", minimised=minimised)
        result = boost(lambda same: bracket(same=same), evaluator, study, settings, so_far=look)
        write(result, study, {}, {})
    assert seen == list(range(len(result.points) + 1)) and len(seen) > 4
    assert not (tmp_path / record.SO_FAR).exists()
    found = record.read(tmp_path / record.ENDED)
    assert record.as_json(found, {}) == record.as_json(result, {})
    assert found.picked == result.picked and found.baseline == result.baseline
    assert found.baseline.params == {"alpha": 0.0}


def test_an_interval_without_items_has_no_ends(tmp_path: Path) -> None:
    evaluator = Answering(peak, items=40)
    with Study(tmp_path, {}, evaluator.items) as study:
        result = boost(lambda same: bracket(same=same), evaluator, study, Settings(score="score"))
        write(result, study, {}, {})
    path = tmp_path / record.ENDED
    content = json.loads(path.read_text())
    content["candidates"][0]["gain"] = {"mean": None, "low": None, "high": None, "items": 0}
    path.write_text(json.dumps(content))
    gain = record.read(path).points[0].gain
    assert math.isnan(gain.mean) and gain.low == -math.inf and gain.high == math.inf


@pytest.mark.parametrize(
    "content", ["{}", '{"settings": 3}', "[]", "no", '{"settings": {"score": "a"}, "candidates": 1}']
)
def test_what_holds_no_search_is_told(tmp_path: Path, content: str) -> None:
    path = tmp_path / record.ENDED
    path.write_text(content)
    with pytest.raises(UnreadableError, match=r"boost\.json"):
        record.read(path)


def test_items_are_kept_in_their_order(tmp_path: Path) -> None:
    record.write_items(tmp_path, ["b", "a"], {"a": "What?"})
    rows = [json.loads(line) for line in (tmp_path / record.ITEMS).read_text().splitlines()]
    assert rows == [{"item": "b"}, {"item": "a", "asked": "What?"}]
