"""Whole runs of a tiny model on small pictures: what is written, and how they stop, go on, and share a folder."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import clipfast
from clipfast.engine.config import RunConfig
from clipfast.engine.engines import in_process, local_devices, part_of
from clipfast.engine.folder import RunFolder
from clipfast.engine.run import run
from clipfast.engine.sources import open_source
from clipfast.engine.texts import Prompts
from clipfast.engine.totals import RunError, Totals
from clipfast.engine.watch import Watch
from clipfast.engine.work import Job, Worker
from clipfast.errors import ClipfastError, InputError, OutputError
from clipfast.models.model import Model

TEXTS = ["a dog", "a red car"]
Go = Callable[..., dict[str, Any]]


@pytest.fixture
def model(build_clip: Any, tokenizer: Any) -> Model:
    return Model(build_clip(layers=2), tokenizer, name="tiny")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten JPEGs of noise, in two folders."""
    for i in range(10):
        add(tmp_path / "photos", i)
    return tmp_path / "photos"


def add(folder: Path, number: int) -> Path:
    path = folder / f"{number % 2}" / f"{number:02d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 255, (8, 9 + number, 3), np.uint8)
    Image.fromarray(noise).resize((70 + number, 64)).save(path, quality=90)
    return path


@pytest.fixture
def go(model: Model, photos: Path, tmp_path: Path) -> Go:
    """Runs with the tiny model: four images a shard, into tmp_path/maps if nothing else is said."""

    def call(**options: Any) -> dict[str, Any]:
        usual = {"source": photos, "texts": TEXTS, "out": tmp_path / "maps", "model": model, "shard_size": 4}
        return run(**(usual | options))

    return call


def files(folder: Path, kind: str = "parquet") -> dict[str, bytes]:
    """The shards' files by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob(f"*/*.{kind}"))}


def keys(folder: Path) -> list[str]:
    return list(clipfast.open_run(folder).keys())


def test_maps_are_what_the_explainer_gives(go: Go, model: Model, photos: Path, tmp_path: Path) -> None:
    summary = go()
    found = clipfast.open_run(tmp_path / "maps")
    paths = sorted(photos.glob("*/*.jpg"))
    assert list(found.keys()) == [str(path.relative_to(photos)) for path in paths]
    expected = clipfast.Explainer(model)([str(path) for path in paths], TEXTS)
    for i in range(10):
        one = found[i]
        largest = float(expected.maps[i].abs().max())
        # One level of a pixel is what torchvision's decoder and Pillow's may differ by.
        np.testing.assert_allclose(one.maps[0].numpy(), expected.maps[i].numpy(), atol=0.02 * largest)
        np.testing.assert_allclose(one.scores[0].numpy(), expected.scores[i].numpy(), atol=2e-3)
        assert one.geometries[0] == expected.geometries[i]
    assert summary["complete"] and (summary["shards"], summary["listed"]) == (3, 3)
    assert (summary["images"], summary["errors"], summary["maps"]) == (10, 0, 20)
    assert summary == json.loads((tmp_path / "maps" / "summary.json").read_text())
    assert summary["bytes"] == sum(map(len, files(tmp_path / "maps").values()))
    assert (tmp_path / "maps" / "errors.jsonl").read_bytes() == b""


def test_the_same_call_does_nothing_twice_and_mends_what_is_damaged(go: Go, tmp_path: Path) -> None:
    go()
    folder = tmp_path / "maps"
    whole, times = files(folder), {p: p.stat().st_mtime_ns for p in folder.glob("shards/*")}
    assert go()["this_run"]["shards"] == 0
    assert {p: p.stat().st_mtime_ns for p in folder.glob("shards/*")} == times
    first, second, third = sorted(folder.glob("shards/*.parquet"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    third.with_suffix(".json").write_text('{"shard": "000')
    (folder / "shards" / f".{third.name}.0123abcd.part").write_bytes(b"of a killed run")
    assert go()["this_run"]["shards"] == 3
    assert files(folder) == whole
    assert not list(folder.rglob("*.part"))


def test_another_configuration_is_refused_by_name_and_value(go: Go, tmp_path: Path) -> None:
    go(features="int8")
    before = files(tmp_path / "maps")
    with pytest.raises(InputError) as caught:
        go(texts=["a dog"], method="mask_clip", shard_size=5)
    words = str(caught.value)
    assert 'method was "grad_eclip" and is "mask_clip" now' in words
    assert "source.shard_size was 4 and is 5 now" in words
    assert 'prompts.texts was ["a dog", "a red car"] and is ["a dog"] now' in words
    assert 'features was "int8" and is not set now' in words
    assert "--overwrite" in words
    assert files(tmp_path / "maps") == before
    go(texts=["a dog"], shard_size=5, overwrite=True)
    assert clipfast.open_run(tmp_path / "maps").prompts == ["a dog"]
    assert [p.name[:6] for p in sorted((tmp_path / "maps").glob("*/*.parquet"))] == ["000000", "000001"]


def test_what_only_makes_it_faster_changes_no_configuration(go: Go, tmp_path: Path) -> None:
    go(workers=1)
    assert go(workers=3, processes=1, device=None, max_error_rate=0.5)["this_run"]["shards"] == 0


def a_config() -> RunConfig:
    return RunConfig({}, {}, "tiny", "0", "grad_eclip", {}, "float32", "crop")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", {"kind": "folder", "place": "/b"}),
        ("prompts", {"texts": ["b", "a"]}),
        ("model", "other"),
        ("weights", "1"),
        ("method", "gem"),
        ("parameters", {"layers": 2, "signed": True}),
        ("dtype", "bfloat16"),
        ("resize", "squash"),
        ("exact", True),
        ("maps", "uint8"),
        ("features", "int8"),
    ],
)
def test_every_field_counts(field: str, value: Any) -> None:
    config = replace(
        a_config(), source={"kind": "folder", "place": "/a"}, prompts={"texts": ["a", "b"]}, parameters={"layers": 1}
    )
    other = replace(config, **{field: value})
    assert other.digest != config.digest
    differences = config.differences(other)
    assert differences and all(name.split(".")[0] == field for name in differences)
    assert config.differences(RunConfig.from_json(json.loads(json.dumps(config.to_json())))) == {}
    assert RunConfig.from_json(config.to_json()).digest == config.digest


def test_a_digest_stays_what_it_is() -> None:
    config = replace(a_config(), prompts={"texts": ["ä"]}, parameters={"b": (1, 2), "a": None})
    assert config.digest == "46d312941cc0a936"


def test_parts_together_are_the_whole(go: Go, tmp_path: Path) -> None:
    go()
    out = tmp_path / "parts"
    for i in (2, 0):
        summary = go(out=out, part=(i, 3))
        assert not summary["complete"]
    assert summary["images"] == 6
    summary = go(out=out, part=(1, 3))
    assert summary["complete"]
    assert (summary["images"], summary["this_run"]["images"]) == (10, 4)
    assert files(out) == files(tmp_path / "maps")
    assert go(out=out)["this_run"]["shards"] == 0


def test_which_part() -> None:
    assert part_of(None, {}) == ((0, 1), None)
    assert part_of("2/5", {"RANK": "0", "WORLD_SIZE": "2"}) == ((2, 5), None)
    assert part_of(None, {"RANK": "1", "WORLD_SIZE": "2"}) == ((1, 2), "RANK and WORLD_SIZE")
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}
    assert part_of(None, slurm) == ((3, 4), "SLURM_PROCID and SLURM_NTASKS")
    assert part_of(None, {**slurm, "RANK": "0", "WORLD_SIZE": "4"})[0] == (0, 4)
    assert part_of(None, {"RANK": "1"}) == ((0, 1), None)
    for wrong in ("3/3", "-1/3", "1", "a/b", "1/2/3", ""):
        with pytest.raises(InputError, match="i from 0 to n - 1"):
            part_of(wrong, {})


def test_two_runs_share_a_folder_only_by_parts(tmp_path: Path) -> None:
    config = a_config()
    with RunFolder(tmp_path / "maps").working((0, 3), config):
        for part in ((0, 3), (0, 1), (1, 2), (3, 6)):
            with pytest.raises(InputError, match=rf"another run \(process {os.getpid()} on .*--shard 0/2"):
                RunFolder(tmp_path / "maps").working(part, config).__enter__()
        with RunFolder(tmp_path / "maps").working((1, 3), config), RunFolder(tmp_path / "maps").working((2, 6), config):
            pass
        with pytest.raises(InputError, match="cannot be overwritten while another run"):
            RunFolder(tmp_path / "maps").working((1, 3), replace(config, method="tclip"), overwrite=True).__enter__()
    with RunFolder(tmp_path / "maps").working((0, 1), config):
        pass
    assert [p.name for p in (tmp_path / "maps" / ".lock").iterdir()] == ["door"]


def test_the_lock_of_a_dead_process_holds_nobody(tmp_path: Path) -> None:
    held, told = os.pipe()
    child = os.fork()
    if child == 0:
        with RunFolder(tmp_path).working((0, 1), a_config()):
            os.write(told, b"x")
            signal.pause()
    try:
        os.read(held, 1)
        with pytest.raises(InputError, match=f"process {child} "), RunFolder(tmp_path).working((0, 1), a_config()):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with RunFolder(tmp_path).working((0, 2), a_config()):
        assert sorted(p.name for p in (tmp_path / ".lock").iterdir()) == ["0-of-2", "door"]


def test_failures_are_recorded_and_done_again_on_demand(go: Go, photos: Path, tmp_path: Path) -> None:
    path = photos / "0" / "02.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    summary = go(max_error_rate=1)
    assert (summary["images"], summary["errors"]) == (9, 1)
    (line,) = (tmp_path / "maps" / "errors.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["key"] == "0/02.jpg" and "02.jpg" in found["reason"] and found["shard"].startswith("000000-")
    assert clipfast.open_run(tmp_path / "maps").errors()[0].key == "0/02.jpg"
    path.write_bytes(whole)
    assert go()["this_run"]["shards"] == 0
    summary = go(retry_errors=True)
    assert (summary["images"], summary["errors"], summary["this_run"]["shards"]) == (10, 0, 1)
    assert (tmp_path / "maps" / "errors.jsonl").read_bytes() == b""


def test_too_many_failures_stop_the_run(go: Go, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in (0, 2):
        (photos / "0" / f"{i:02d}.jpg").write_bytes(b"no picture")
    go(out=tmp_path / "few")
    monkeypatch.setattr("clipfast.engine.totals.CHECKED_FROM", 4)
    with pytest.raises(RunError, match=r"2 of 4 images failed.*--max-error-rate 0\.1.*\(2 times\)"):
        go()
    assert json.loads((tmp_path / "maps" / "summary.json").read_text())["shards"] == 1
    with pytest.raises(RunError):
        go()
    assert go(max_error_rate=0.5)["complete"]


def test_a_run_without_any_map_is_an_error(go: Go, photos: Path, tmp_path: Path) -> None:
    for path in photos.glob("*/*"):
        path.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"none of the 10 images could be explained: the image .*\(10 times\)"):
        go(max_error_rate=1)
    assert len((tmp_path / "maps" / "errors.jsonl").read_text().splitlines()) == 10


def test_a_limit_is_a_beginning(go: Go, tmp_path: Path) -> None:
    assert go(limit=6)["images"] == 6
    first = files(tmp_path / "maps")
    assert go(limit=2)["this_run"]["shards"] == 0 or len(keys(tmp_path / "maps")) >= 6
    summary = go()
    assert (summary["images"], summary["this_run"]["shards"]) == (10, 2)
    assert len(set(keys(tmp_path / "maps"))) == len(keys(tmp_path / "maps")) == 10
    assert len(first.keys() & files(tmp_path / "maps").keys()) == 1
    whole = files(tmp_path / "maps")
    assert go(limit=3)["this_run"]["shards"] == 0
    assert files(tmp_path / "maps") == whole


def test_the_folder_follows_its_source(go: Go, photos: Path, tmp_path: Path) -> None:
    go()
    add(photos, 10)
    assert go()["images"] == 11
    assert sorted(keys(tmp_path / "maps")) == sorted(str(p.relative_to(photos)) for p in photos.glob("*/*"))
    for number in (1, 3, 5, 7):
        (photos / "1" / f"{number:02d}.jpg").unlink()
    assert (go()["images"], go()["shards"]) == (7, 2)
    assert sorted(keys(tmp_path / "maps")) == sorted(str(p.relative_to(photos)) for p in photos.glob("*/*"))


class Interrupts(Watch):
    """Sends signals to the process when images are finished."""

    def __init__(self, *numbers: int):
        self.numbers, self.asked = list(numbers), 0

    def images(self, finished: int) -> None:
        if self.numbers:
            os.kill(os.getpid(), self.numbers.pop(0))

    def stops(self) -> None:
        self.asked += 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_shard_be_finished(go: Go, tmp_path: Path, number: int) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    watch = Interrupts(number)
    with pytest.raises(KeyboardInterrupt):
        go(watch=watch)
    assert watch.asked == 1
    assert json.loads((tmp_path / "maps" / "summary.json").read_text())["images"] == 4
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert go()["this_run"]["images"] == 6


def test_a_second_signal_stops_at_once(go: Go, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(watch=Interrupts(signal.SIGINT, signal.SIGINT), batch=1)
    assert not list((tmp_path / "maps").glob("shards/*"))
    assert not list((tmp_path / "maps").glob(".lock/*-of-*"))
    assert go()["complete"]


def test_a_signal_during_the_last_shard_changes_nothing(go: Go) -> None:
    assert go(shard_size=10, watch=Interrupts(signal.SIGINT))["complete"]


def test_outside_the_main_thread_signals_are_left_alone(go: Go) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(go()))
    thread.start()
    thread.join()
    assert found[0]["complete"]


def test_mistakes_write_nothing(go: Go, tmp_path: Path) -> None:
    for options, words in (
        ({"method": "grad_eclp"}, "did you mean 'grad_eclip'"),
        ({"maps": "float8"}, "cannot be kept as 'float8'"),
        ({"features": "rank"}, "cannot be kept as 'rank'"),
        ({"method": "rollout", "features": True}, "no attribution features"),
        ({"part": (3, 3)}, "i from 0 to n - 1"),
        ({"max_error_rate": 2}, "from 0 to 1"),
        ({"processes": 2}, "model's name or path"),
        ({"source": tmp_path / "nowhere"}, "there is no"),
        ({"out": tmp_path / "photos" / "0" / "00.jpg"}, "is a file"),
    ):
        with pytest.raises(InputError, match=words):
            go(**options)
        assert not (tmp_path / "maps").exists()


def test_a_damaged_run_json_is_not_overwritten_by_chance(go: Go, tmp_path: Path) -> None:
    go()
    (tmp_path / "maps" / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        go()
    (tmp_path / "maps" / "run.json").unlink()
    with pytest.raises(InputError, match=r"holds maps but no run\.json"):
        go()
    assert go(overwrite=True)["this_run"]["shards"] == 0


def test_a_worker_refuses_other_weights(model: Model, photos: Path, tmp_path: Path) -> None:
    job = Job(open_source(photos), Prompts(tuple(TEXTS)), tmp_path / "maps", model=model, digest="0" * 16)
    with pytest.raises(InputError, match="not what the run began with"):
        Worker(job)


def test_features_are_kept(go: Go, model: Model, photos: Path, tmp_path: Path) -> None:
    go(features=True)
    found = clipfast.open_run(tmp_path / "maps").features([0, 9], model)
    paths = sorted(map(str, photos.glob("*/*.jpg")))
    expected = clipfast.Explainer(model)([paths[0], paths[9]], ["something new"]).maps
    maps = found.maps(["something new"]).maps
    np.testing.assert_allclose(maps.numpy(), expected.numpy(), atol=0.02 * float(expected.max()))


def test_a_dry_run_counts_and_writes_nothing(go: Go, tmp_path: Path) -> None:
    found = go(dry=True)
    assert (found["shards"], found["images"], found["exact"], found["done"]) == (3, 10, True, 0)
    assert found["seconds"] > 0 and found["images_per_second"] > 0
    assert found["bytes"] == sum(p.stat().st_size for p in (tmp_path / "photos").glob("*/*"))
    assert not (tmp_path / "maps").exists()
    go()
    found = go(dry=True)
    assert (found["done"], found["seconds"]) == (3, 0)


def test_devices(model: Model, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(open_source(photos), Prompts(("a",)), tmp_path, model="demo")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert local_devices(job, None) == [None]
    assert local_devices(job, 3) == [None, None, None]
    assert local_devices(replace(job, device="cuda:1"), None) == ["cuda:1"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert local_devices(job, None) == ["cuda:0", "cuda:1"]
    assert local_devices(replace(job, device="cuda"), 1) == ["cuda:0"]
    assert local_devices(replace(job, device="cpu"), 2) == ["cpu", "cpu"]
    assert local_devices(replace(job, model=model), None) == [None]
    with pytest.raises(InputError, match="has 2"):
        local_devices(job, 3)


def test_totals_add_up() -> None:
    marker = {
        "images": 3,
        "rows": 6,
        "errors": [{"key": "a/b.jpg", "reason": "b.jpg is empty."}, {"key": "c.jpg", "reason": "c.jpg is empty."}],
        "files": {"shards/x.parquet": 100, "features/x.parquet": 50},
        "seconds": {"total": 4.0, "decode": 1.0},
    }
    totals = Totals.of([marker, marker])
    assert (totals.shards, totals.images, totals.errors, totals.rows, totals.bytes) == (2, 6, 4, 12, 300)
    assert totals.failing == 0.4 and totals.share("decode") == 0.25 and totals.share("model") == 0
    assert totals.why() == "the image is empty (4 times)."


def test_an_error_of_the_disk_says_how_far_it_came(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = in_process

    def failing(*arguments: Any) -> Any:
        found = ordinary(*arguments)
        yield next(found)
        raise OutputError("shard 1 cannot be written to maps: No space left on device.", full=True)

    monkeypatch.setattr("clipfast.engine.run.in_process", failing)
    with pytest.raises(OutputError, match="1 of 3 shards are done and safe; make room, and the same command goes on"):
        go()


def test_a_shard_that_is_lost_costs_no_other(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = in_process

    def losing(*arguments: Any) -> Any:
        for shard, marker in ordinary(*arguments):
            if shard.number == 1:
                (tmp_path / "maps" / "shards" / f"{shard.id}.json").unlink()
                yield shard, ClipfastError("3 processes died of it.")
            else:
                yield shard, marker

    monkeypatch.setattr("clipfast.engine.run.in_process", losing)
    with pytest.raises(RunError, match=r"^1 shard could not be computed.*3 processes died of it"):
        go()
    assert json.loads((tmp_path / "maps" / "summary.json").read_text())["shards"] == 2
    monkeypatch.undo()
    assert go()["this_run"]["shards"] == 1
