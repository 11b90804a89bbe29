"""`trivium score`: rows as the predictor answers, every input, resume, dead processes, and what is refused."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from numpy.typing import NDArray
from PIL import Image
from tests.commands import called
from tests.conftest import tiny_guarantees

from trivium.runtime.bundle import MANIFEST, digest
from trivium.runtime.errors import ConfigError, InvalidRequest, ManifestError, MissingExtra, ServerError, TriviumError
from trivium.runtime.predictor import Predictor
from trivium.runtime.promises import terms
from trivium.runtime.score import main
from trivium.runtime.scoring.inputs import open_input
from trivium.runtime.scoring.parts import RECORD, Parts, ScoredBundle, chunks
from trivium.runtime.scoring.pool import scored
from trivium.runtime.scoring.work import Chunk, Task

pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'trivium[cpu]'")

COLUMNS = ["path", "label", "class_id", "head", "confidence", "predictive_entropy", "mutual_information", "error"]
PAGE = Path(__file__).parents[2] / "runtime/SCORE.md"
BROKEN = b"\xff\xd8\xff\xe0 nonsense"


def score(*arguments: object) -> None:
    called(main, "score", *arguments)


def rows(out: Path) -> list[dict[str, Any]]:
    """All rows, part by part."""
    parts = sorted(out.glob("part-*.parquet"))
    return [row for part in parts for row in pyarrow.parquet.ParquetFile(part).read().to_pylist()]


def write_pictures(root: Path, images: NDArray[np.uint8]) -> list[str]:
    """Pictures as files, in two folders; their names."""
    names = [f"{'below/' if i % 2 else ''}{i:04d}.png" for i in range(len(images))]
    (root / "below").mkdir(parents=True)
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(root / name)
    return sorted(names)


def noise(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)


def task(bundle: Path) -> Task:
    return Task(str(bundle), digest(bundle / MANIFEST), "blend")


@pytest.fixture
def folder(tmp_path: Path, some_pictures: NDArray[np.uint8]) -> Path:
    """Twelve pictures and one that is none."""
    write_pictures(tmp_path / "pictures", some_pictures)
    (tmp_path / "pictures/broken.jpg").write_bytes(BROKEN)
    return tmp_path / "pictures"


def test_rows_are_the_predictors_answers(
    tiny_bundle: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    score(tiny_bundle, folder, "--out", out, "--part-rows", 5, "--workers", 2)
    found = rows(out)
    predictor = Predictor.load(tiny_bundle)
    assert [row["path"] for row in found] == sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*g"))
    assert sorted(os.listdir(out)) == [RECORD, *(f"part-{i:06d}.parquet" for i in range(3))]
    for row in found:
        assert list(row) == COLUMNS
        if row["path"] == "broken.jpg":
            assert "JPEG" in row.pop("error")
            assert {row.pop("path"), *row.values()} == {"broken.jpg", None}
            continue
        answer = predictor.infer(predictor.decode((folder / row["path"]).read_bytes()))
        own = {"combined": [2], "clean+combined": [0, 2]}[answer.head]
        assert (row["label"], row["class_id"], row["head"]) == (answer.label, answer.class_id, answer.head)
        assert row["confidence"] == answer.probabilities.max()
        assert row["predictive_entropy"] == answer.predictive_entropy[own].mean()
        assert row["mutual_information"] == answer.mutual_information[own].mean()
        assert row["error"] is None
    assert pyarrow.parquet.read_table(out).num_rows == 13  # the record does not disturb readers of the folder
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    exec(code.replace('"scores"', repr(str(out))), {})
    said = capsys.readouterr().out
    assert max((row for row in found if "error" in row), key=lambda row: row["mutual_information"])["path"] in said
    assert "13 pictures, 1 of them without an answer" in said
    assert "CPU-s: " in said
    assert json.loads((out / RECORD).read_text())["finished"] == {"unreadable": 1}


def test_a_table_of_paths(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    wanted = ["0000.png", "below/0001.png", "0000.png", None, "absent.png", str(folder / "0002.png")]
    pyarrow.parquet.write_table(pyarrow.table({"n": range(6), "path": wanted}), tmp_path / "pictures.parquet")
    pyarrow.csv.write_csv(pyarrow.table({"path": wanted, "n": range(6)}), folder / "pictures.csv")
    score(tiny_bundle, tmp_path / "pictures.parquet", "--root", folder, "--out", tmp_path / "a", "--router", "mean")
    score(tiny_bundle, folder / "pictures.csv", "--out", tmp_path / "b", "--router", "mean")
    found = rows(tmp_path / "a")
    assert [row["path"] for row in found] == [name or "" for name in wanted]
    assert [row["error"] for row in found] == [
        None, None, None, "the table has no path here", "No such file or directory", None,
    ]  # fmt: skip
    assert found[0] == found[2]
    assert {row["head"] for row in found if not row["error"]} == {"mean"}
    assert rows(tmp_path / "b") == found
    answer = Predictor.load(tiny_bundle).infer(np.asarray(Image.open(folder / "0000.png")), "mean")
    assert found[0]["mutual_information"] == answer.mutual_information.mean()


def test_what_a_bundle_promises(build_bundle: Callable[..., Path], folder: Path, tmp_path: Path) -> None:
    bundle = build_bundle(tmp_path / "bundle", guarantees=tiny_guarantees())
    score(bundle, folder, "--out", tmp_path / "out", "--coverage", "0.8", "--max-risk", "0.1")
    predictor = Predictor.load(bundle)
    asked = terms(predictor.manifest, None, 0.8, 0.1)
    found = rows(tmp_path / "out")
    assert list(found[0]) == [*COLUMNS[:-1], "set", "abstain", "shift_score", "error"]
    assert [row["path"] for row in found if row["set"] is None] == ["broken.jpg"]
    for row in found:
        if row["error"] is None:
            answer = predictor.infer(predictor.decode((folder / row["path"]).read_bytes()), None, asked)
            assert answer.prediction_set is not None
            members = sorted(np.flatnonzero(answer.prediction_set), key=lambda i: -answer.probabilities[i])
            assert row["set"] == [predictor.manifest.classes[i] for i in members]
            assert (row["abstain"], row["shift_score"]) == (answer.abstain, answer.shift_score)
    with pytest.raises(ConfigError, match=r"was begun with --coverage 0.8 --max-risk 0.1; choose"):
        score(bundle, folder, "--out", tmp_path / "out")


@pytest.mark.parametrize("named", ["shards/{a,b}.tar", "shards/*.tar", "shards"])
def test_webdataset_shards(named: str, tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for shard in "ab":
        with tarfile.open(tmp_path / f"shards/{shard}.tar", "w") as tar:
            for i in range(3):
                for field in ("png", "cls", "seg.png"):
                    content = (folder / f"{2 * i:04d}.png").read_bytes() if field == "png" else b"1"
                    member = tarfile.TarInfo(f"part/{shard}{i}.{field}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    score(tiny_bundle, tmp_path / named, "--out", tmp_path / "out")
    score(tiny_bundle, folder, "--out", tmp_path / "files")
    files = {row["path"]: row for row in rows(tmp_path / "files")}
    found = rows(tmp_path / "out")
    assert [row.pop("key") for row in found] == [f"part/{shard}{i}" for shard in "ab" for i in range(3)]
    assert [row.pop("path") for row in found] == [f"{s}.tar/part/{s}{i}.png" for s in "ab" for i in range(3)]
    wanted = [{name: files[f"{2 * i:04d}.png"][name] for name in COLUMNS[1:]} for i in range(3)]
    assert found == wanted * 2


def kill_and_resume(
    bundle: Path, pictures: Path, directory: Path, *arguments: str, kills: int
) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows of a run that was killed with -9 at random moments and begun again; the parts there at each kill."""
    out = directory / "killed"
    command = [sys.executable, "-m", "trivium", "score", str(bundle), str(pictures), "--out", str(out), *arguments]
    there: list[int] = []
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wanted = len(list(out.glob("part-*"))) + 1
        while len(list(out.glob("part-*"))) < wanted:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        process.wait()
        there.append(len(list(out.glob("part-*"))))
    assert json.loads((out / RECORD).read_text())["finished"] is None
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return rows(out), there


def test_a_killed_run_goes_on(slow_bundle: Path, tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "pictures", noise(24))
    score(slow_bundle, tmp_path / "pictures", "--out", tmp_path / "whole")
    found, there = kill_and_resume(slow_bundle, tmp_path / "pictures", tmp_path, "--part-rows", "2", kills=1)
    assert 0 < there[0] < 12
    assert [row["path"] for row in found] == names
    assert found == rows(tmp_path / "whole")


@pytest.fixture(scope="module")
def two_thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of 192 x 192, which take milliseconds to decode."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(2000):
        Image.fromarray(rng.integers(0, 256, (192, 192, 3), np.uint8)).save(root / f"{i:04d}.jpg")
    return root


@pytest.mark.slow
def test_two_thousand_pictures_and_kills(tiny_bundle: Path, two_thousand: Path, tmp_path: Path) -> None:
    score(tiny_bundle, two_thousand, "--out", tmp_path / "whole")
    found, there = kill_and_resume(tiny_bundle, two_thousand, tmp_path, "--part-rows", "50", kills=3)
    assert there[-1] < 40
    assert [row["path"] for row in found] == sorted(os.listdir(two_thousand))
    assert found == rows(tmp_path / "whole")


def test_chunks_lie_in_one_part_each_and_become_smaller() -> None:
    found = list(chunks([range(100), range(100, 110), range(200, 340)], 16, 4))
    assert [number for rows in found for number in rows] == [*range(110), *range(200, 340)]
    assert not any(rows.start < 100 < rows.stop for rows in found)
    sizes = list(map(len, found))
    assert sizes[:6] == [16] * 6
    assert sizes[-20:] == sorted(sizes[-20:], reverse=True)
    # what the last four of eight pictures a chunk would be are one each
    assert sizes[-8:] == [1] * 8
    assert [len(rows) for rows in chunks([range(3)], 16, 4)] == [1, 1, 1]


@pytest.fixture
def work(tiny_bundle: Path, folder: Path) -> Iterator[Chunk]:
    pictures = open_input(str(folder), None)
    return (Chunk(each.start, pictures.rows(each.start, each.stop)) for each in chunks([range(len(pictures))], 2, 1))


def test_a_dead_process_is_replaced(tiny_bundle: Path, work: Iterator[Chunk]) -> None:
    said: list[str] = []
    answers = scored(work, task(tiny_bundle), 1, said.append)
    found = [next(answers)]
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGKILL)
    found += answers
    numbers = [each.start + row for each in found for row in range(len(each.rows))]
    assert sorted(numbers) == list(range(13))
    assert len({each.process for each in found}) == 2
    assert said == ["a scoring process was killed (signal 9, as for want of memory); another takes its place"]


def test_a_chunk_that_kills_its_processes_ends_the_run(tiny_bundle: Path, work: Iterator[Chunk]) -> None:
    over = threading.Event()

    def murder() -> None:
        while not over.wait(0.002):
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGKILL)

    murderer = threading.Thread(target=murder)
    murderer.start()
    try:
        with pytest.raises(ServerError, match=r"^3 processes .*'0000.png' to '0002.png' did not live .* was killed"):
            list(scored(work, task(tiny_bundle), 1, lambda _: None))
    finally:
        over.set()
        murderer.join()
    assert not multiprocessing.active_children()


def test_a_bundle_that_is_exchanged_ends_the_run(tiny_bundle: Path, work: Iterator[Chunk]) -> None:
    with pytest.raises(TriviumError, match="not the bundle that this run began with"):
        list(scored(work, task(tiny_bundle)._replace(digest="0" * 64), 1, lambda _: None))


def test_only_what_is_missing_is_scored_again(
    tiny_bundle: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    score(tiny_bundle, folder, "--out", out, "--part-rows", 5)
    before = rows(out)
    times = {part.name: part.stat().st_mtime_ns for part in out.glob("part-*")}
    (out / "part-000001.parquet").unlink()
    (out / ".part-000001.parquet").write_bytes(b"half of one")
    score(tiny_bundle, folder, "--out", out, "--engine", "processes")
    assert rows(out) == before
    assert {p.name for p in out.glob("part-*") if p.stat().st_mtime_ns != times[p.name]} == {"part-000001.parquet"}
    assert "8 of 13 pictures were scored before" in capsys.readouterr().out
    score(tiny_bundle, folder, "--out", out)
    assert rows(out) == before


def test_another_run_is_refused(
    tiny_bundle: Path, single_head_bundle: Path, folder: Path, tmp_path: Path, build_bundle: Callable[..., Path]
) -> None:
    out = tmp_path / "out"
    score(tiny_bundle, folder, "--out", out, "--router", "mean")
    kept = {path: path.read_bytes() for path in out.iterdir()}

    def refused(match: str, bundle: Path, *arguments: object) -> None:
        with pytest.raises(ConfigError, match=match) as error:
            score(bundle, folder, "--out", out, *arguments)
        assert "\n" not in str(error.value)
        assert {path: path.read_bytes() for path in out.iterdir()} == kept

    refused(r"by another bundle \(tiny version 1, sha256", single_head_bundle)
    refused("was begun with --router mean, not blend", tiny_bundle)
    refused("was begun with --part-rows 1000", tiny_bundle, "--router", "mean", "--part-rows", 7)
    (folder / "one-more.png").write_bytes(BROKEN)
    refused("was begun with 13 pictures of .* not the same", tiny_bundle, "--router", "mean")
    (folder / "one-more.png").unlink()
    os.utime(folder / "0000.png", (1, 1))
    refused("was begun with 13 pictures of .* not the same", tiny_bundle, "--router", "mean")


def test_two_runs_at_a_time_are_refused(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    bundle = ScoredBundle(path="", name="", version="", digest="", router="", guarantees=False)
    with (
        closing(Parts(tmp_path / "out", bundle, open_input(str(folder), None), None)),
        pytest.raises(ConfigError, match="another run writes there now"),
    ):
        score(tiny_bundle, folder, "--out", tmp_path / "out")


def test_a_part_that_was_changed_is_refused(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    score(tiny_bundle, folder, "--out", tmp_path / "out", "--part-rows", 10)
    parts = sorted((tmp_path / "out").glob("part-*"))
    shutil.copy(parts[0], parts[1])
    with pytest.raises(ConfigError, match=r"part-000001.parquet: not as it was written; remove it"):
        score(tiny_bundle, folder, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"file": ["0000.png"], "n": [1]}, "no column 'path'; it has: file, n"),
        ({"path": [[1], [2]]}, r"column 'path' holds list<.*>, not text"),
        ({"path": []}, "no picture in it"),
        (b"PAR1 nonsense", "cannot be read: "),
    ],
)
def test_tables_that_are_none(content: Any, match: str, tiny_bundle: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.parquet"
    if isinstance(content, bytes):
        table.write_bytes(content)
    else:
        pyarrow.parquet.write_table(pyarrow.table(content), table)
    with pytest.raises(ConfigError, match=match):
        score(tiny_bundle, table, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_use(tiny_bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.tar").write_bytes(b"nonsense" * 100)
    monkeypatch.setitem(sys.modules, "ray", None)
    out = tmp_path / "out"
    wrong: list[tuple[type[TriviumError], str, list[object]]] = [
        (ManifestError, "absent: no such directory", [tmp_path / "absent", folder]),
        (InvalidRequest, "no .jpg, .* file in this directory", [tiny_bundle, tmp_path / "empty"]),
        (ConfigError, "no such file or folder", [tiny_bundle, tmp_path / "absent"]),
        (ConfigError, "neither a folder nor a .parquet, .csv or .tar file", [tiny_bundle, folder / "0000.png"]),
        (ConfigError, "No such file", [tiny_bundle, tmp_path / "absent.csv"]),
        (ConfigError, "no such shard", [tiny_bundle, tmp_path / "absent-*.tar"]),
        (ConfigError, "no uncompressed tar file", [tiny_bundle, tmp_path / "damaged.tar"]),
        (ConfigError, "--root goes with", [tiny_bundle, folder, "--root", folder]),
        (InvalidRequest, "unknown router 'x'; this model has: clean", [tiny_bundle, folder, "--router", "x"]),
        (InvalidRequest, "'coverage' cannot be used for model 'tiny'", [tiny_bundle, folder, "--coverage", "0.9"]),
        (MissingExtra, r"'ray' is not installed; .*trivium\[ray\]", [tiny_bundle, folder, "--engine", "ray"]),
    ]
    for kind, match, arguments in wrong:
        with pytest.raises(kind, match=match):
            score(*arguments, "--out", out)
        assert not out.exists()
    with pytest.raises(ConfigError, match="holds other files"):
        score(tiny_bundle, folder, "--out", folder)


def test_a_mistake_is_one_line_and_exit_status_2(tiny_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trivium", "score", tiny_bundle, tmp_path, "--out", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("trivium score: ")
    assert done.stderr.count("\n") == 1


def test_exit_status_1_where_no_picture_can_be_read(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.jpg").write_bytes(BROKEN)
    with pytest.raises(SystemExit) as status:
        score(tiny_bundle, tmp_path / "pictures", "--out", tmp_path / "out")
    assert status.value.code == 1
    assert len(rows(tmp_path / "out")) == 1


def actors() -> list[Any]:
    psutil = pytest.importorskip("psutil")
    return [p for p in psutil.Process().children(recursive=True) if "MapWorker" in "".join(p.cmdline())]


@pytest.mark.slow
def test_ray_loses_nothing_with_an_actor(
    tiny_bundle: Path, two_thousand: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray.data", reason="needs Ray: pip install 'trivium[ray]'")
    score(tiny_bundle, two_thousand, "--out", tmp_path / "whole")
    killed: list[int] = []

    def murder() -> None:
        while not list((tmp_path / "ray").glob("part-*")):
            time.sleep(0.01)
        victim = actors()[0]
        killed.append(victim.pid)
        victim.kill()

    murderer = threading.Thread(target=murder, daemon=True)
    murderer.start()
    score(tiny_bundle, two_thousand, "--out", tmp_path / "ray", "--engine", "ray", "--part-rows", 100, "--workers", 1)
    assert killed
    assert "by 2 actors" in capsys.readouterr().out  # the one that was killed, and the one that went on
    found = rows(tmp_path / "ray")
    assert [row["path"] for row in found] == sorted(os.listdir(two_thousand))
    assert found == rows(tmp_path / "whole")


@pytest.mark.slow
def test_evaluation_on_ray_asks_the_same_engine(tiny_bundle: Path) -> None:
    pytest.importorskip("ray.data", reason="needs Ray: pip install 'trivium[ray]'")
    subject = pytest.importorskip(
        "trivium.train.evaluation.subject", reason="needs torch: pip install 'trivium[train]'"
    )
    images = noise(200)
    here, there = (subject.BundleSubject(str(tiny_bundle), engine) for engine in ("local", "ray"))
    for own, found in zip(here.answer(images)[0], there.answer(images)[0], strict=True):
        np.testing.assert_allclose(found, own, atol=1e-5)


@pytest.mark.slow
def test_a_killed_run_on_ray_goes_on(tiny_bundle: Path, two_thousand: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="needs Ray: pip install 'trivium[ray]'")
    score(tiny_bundle, two_thousand, "--out", tmp_path / "whole")
    found, there = kill_and_resume(
        tiny_bundle, two_thousand, tmp_path, "--engine", "ray", "--part-rows", "100", kills=1
    )
    assert there[-1] < 20
    assert [row["path"] for row in found] == sorted(os.listdir(two_thousand))
    assert found == rows(tmp_path / "whole")
