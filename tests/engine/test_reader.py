"""What was committed comes back by image, by prompt and in order, and nothing else does."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import clipfast
from clipfast.engine.base import Explained, Failure
from clipfast.engine.reader import Run, open_run
from clipfast.engine.writer import ShardWriter
from clipfast.errors import InputError
from clipfast.methods.base import combine

Make = Callable[..., Explained]
Store = Callable[..., Path]
TEXTS = ["a dog", "a cat", "a red car"]


def _atol(maps: np.ndarray) -> float:
    return float(np.abs(maps).max()) * 2.0**-12 * 1.001


@pytest.fixture
def batches(explained: Make) -> list[list[Explained]]:
    """Three shards of 3, 0 and 4 images."""
    return [[explained(["a/1.jpg", "a/2.jpg"]), explained(["b.png"])], [], [explained(["ü", "x y", "../z", "-1"])]]


@pytest.fixture
def run(stored: Store, batches: list[list[Explained]]) -> Run:
    return open_run(stored(batches, TEXTS, errors={1: [{"key": "bad.jpg", "reason": "bad.jpg is cut off."}]}))


def test_by_key_by_number_and_in_order(run: Run, batches: list[list[Explained]]) -> None:
    assert clipfast.open_run is open_run
    assert len(run) == 7 and run.prompts == TEXTS
    assert list(run.keys()) == ["a/1.jpg", "a/2.jpg", "b.png", "ü", "x y", "../z", "-1"]
    number = 0
    for batch in (one for shard in batches for one in shard):
        for i, key in enumerate(batch.keys):
            for found in (run[key], run[number], run[number - 7]):
                assert isinstance(found, clipfast.Attribution) and isinstance(found.maps, torch.Tensor)
                assert found.maps.shape == (1, 3, 4, 5) and found.maps.dtype == torch.float32
                np.testing.assert_allclose(found.maps[0].numpy(), batch.maps[i], rtol=0, atol=_atol(batch.maps[i]))
                assert found.scores[0].tolist() == batch.scores[i].tolist()
                assert found.texts == TEXTS and found.geometries == [batch.geometries[i]]
                assert (found.method, found.model) == ("grad_eclip", "tiny")
            number += 1
    assert [each.geometries[0] for each in run] == [run[i].geometries[0] for i in range(7)]


def test_maps_on_the_original_pixels_can_be_drawn(run: Run, batches: list[list[Explained]]) -> None:
    found, batch = run["ü"], batches[2][0]
    known = batch.geometries[0].to_image(torch.from_numpy(batch.maps[0]))
    np.testing.assert_allclose(found.resize(0).numpy(), known.numpy(), rtol=0, atol=_atol(batch.maps[0]))
    heat, palette = found.drawable(0, [0, 2])
    assert heat.shape == (2, batch.geometries[0].height, batch.geometries[0].width) and palette == "heat"
    assert "grad_eclip" in repr(found) and found.to_json()[0]["prompts"][1]["text"] == "a cat"


def test_what_is_not_there(run: Run) -> None:
    assert "b.png" in run and "c.png" not in run and 3 not in run
    with pytest.raises(InputError, match=r"no maps of 'c\.png'"):
        run["c.png"]
    with pytest.raises(InputError, match=r"no maps of 'bad\.jpg': bad\.jpg is cut off\."):
        run["bad.jpg"]
    for number in (7, -8):
        with pytest.raises(IndexError):
            run[number]
    with pytest.raises(InputError, match="did you mean 'a dog'"):
        next(run.maps("a dgo"))
    with pytest.raises(InputError, match="prompt 3 is none of the run's 3"):
        next(run.maps(3))
    with pytest.raises(InputError, match="--features"):
        run.features(["b.png"])


def test_all_maps_of_a_prompt(run: Run, batches: list[list[Explained]]) -> None:
    known = np.concatenate([batch.maps[:, 1] for shard in batches for batch in shard])
    for prompt in (1, "a cat"):
        found = list(run.maps(prompt))
        assert [key for keys, _ in found for key in keys] == list(run.keys())
        np.testing.assert_allclose(np.concatenate([m for _, m in found]), known, rtol=0, atol=_atol(known))


def test_all_rows_as_arrays(run: Run, batches: list[list[Explained]]) -> None:
    parts = list(run.arrays())
    assert sum(map(len, parts)) == 21
    assert [p for part in parts for p in part.prompts.tolist()] == [0, 1, 2] * 7
    known = np.concatenate([batch.scores.ravel() for shard in batches for batch in shard])
    assert np.concatenate([part.scores for part in parts]).tolist() == known.tolist()


def test_errors_and_summary(run: Run) -> None:
    assert run.errors() == [Failure("bad.jpg", "bad.jpg is cut off.")]
    summary = run.summary()
    assert (summary["shards"], summary["images"], summary["maps"], summary["errors"]) == (3, 7, 21, 1)
    assert summary["bytes"] == sum(path.stat().st_size for path in run.folder.glob("shards/*.parquet"))


@pytest.mark.parametrize("codec", ["float32", "uint8"])
def test_texts_fewer_prompts_and_grids_of_their_own(explained: Make, stored: Store, codec: str) -> None:
    first, second = explained(["a", "b"], 2, (4, 5)), explained(["c", "d"], 1, (7, 3))
    first.prompts[0, 1] = -1
    first.texts, second.texts = [["one"], ["two", "three"]], [["two"], ["four"]]
    run = open_run(stored([[first, second], [explained(["e"], 1)]], [], grid=None, maps=codec))
    atol = 0 if codec == "float32" else max(np.ptp(batch.maps) for batch in (first, second)) / 509
    assert run["a"].texts == ["one"] and run["b"].texts == ["two", "three"] and run["d"].texts == ["four"]
    np.testing.assert_allclose(run["a"].maps[0], first.maps[0, :1], rtol=0, atol=atol)
    np.testing.assert_allclose(run["b"].maps[0], first.maps[1], rtol=0, atol=atol)
    np.testing.assert_allclose(run["d"].maps[0], second.maps[1], rtol=0, atol=atol)
    assert [(keys, maps.shape) for keys, maps in run.maps("two")] == [(["b"], (1, 4, 5)), (["c"], (1, 7, 3))]
    assert [part.maps.shape for part in run.arrays()] == [(3, 4, 5), (2, 7, 3), (1, 4, 5)]


def test_chosen_prompts_have_their_names(explained: Make, stored: Store) -> None:
    """With --top, each image has the numbers of its best texts."""
    batch = explained(3, 2)
    batch.prompts[:] = [[2, 0], [1, 2], [0, 1]]
    run = open_run(stored([[batch]], TEXTS))
    assert [run[i].texts for i in range(3)] == [["a red car", "a dog"], ["a cat", "a red car"], ["a dog", "a cat"]]
    assert [keys for keys, _ in run.maps("a dog")] == [[batch.keys[0], batch.keys[2]]]


@pytest.mark.parametrize("shape", [(20, 8), (2, 20, 8)])
@pytest.mark.parametrize(("codec", "bound"), [("float16", 2.0**-12 * 1.001), ("int8", 1 / 253), ("rank:8", 2e-3)])
def test_features_give_the_maps_of_any_text(
    explained: Make, stored: Store, shape: tuple[int, ...], codec: str, bound: float
) -> None:
    batches = [replace(explained(f"{i} {i + 10}".split(), 1, features=shape), relu="sum") for i in range(3)]
    run = open_run(stored([batches[:2], batches[2:]], ["a dog"], features=codec))
    features = run.features(["11", 0, "2"])
    sources = [(batches[1], 1), (batches[0], 0), (batches[2], 0)]
    values, weights, embeddings = (
        np.stack([batch.features[k][i] for batch, i in sources if batch.features]) for k in range(3)
    )
    assert features.relu == "sum" and features.grid == (4, 5)
    assert features.geometries == [batch.geometries[i] for batch, i in sources]
    np.testing.assert_allclose(features.values, values, rtol=0, atol=np.abs(values).max() * bound)
    np.testing.assert_array_equal(features.weights, weights)
    np.testing.assert_array_equal(features.embeddings, embeddings)
    wanted = torch.nn.functional.normalize(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    out = torch.empty(3, 2, 20)
    layered = [torch.from_numpy(a.reshape(3, -1, *a.shape[a.ndim - k :])) for a, k in ((weights, 1), (values, 2))]
    combine(layered[0].unbind(1), layered[1].unbind(1), wanted, "sum", out)
    found = features.maps(wanted)
    assert isinstance(found.maps, torch.Tensor)
    torch.testing.assert_close(found.maps.flatten(2), out, rtol=0, atol=float(out.abs().max()) * 20 * bound)
    assert [key for rows in run.feature_rows() for key in rows.keys] == list(run.keys())
    with pytest.raises(InputError, match="at least one key"):
        run.features([])


def test_a_data_set_for_torch_in_workers(run: Run, batches: list[list[Explained]]) -> None:
    assert pickle.loads(pickle.dumps(run))["ü"].scores.tolist() == run["ü"].scores.tolist()
    data = run.torch_dataset()
    assert len(data) == 7
    loader = DataLoader(data, batch_size=2, num_workers=2)
    found = list(loader)
    assert [key for batch in found for key in batch["key"]] == list(run.keys())
    assert found[0]["maps"].shape == (2, 3, 4, 5) and found[0]["prompts"].tolist() == [[0, 1, 2]] * 2
    sizes = [[g.height, g.width] for shard in batches for batch in shard for g in batch.geometries]
    assert torch.cat([batch["size"] for batch in found]).tolist() == sizes


def test_pickling_keeps_nothing_of_the_process(run: Run) -> None:
    """Open files belong to it, and the index: strings hash otherwise elsewhere."""
    assert "x y" in run and run._files and run._index is not None
    other = pickle.loads(pickle.dumps(run))
    assert not other._files and other._index is None
    assert other["x y"].scores.tolist() == run["x y"].scores.tolist()


def test_more_shards_than_files_may_be_open(explained: Make, stored: Store) -> None:
    run = open_run(stored([[explained([f"{i}"], 1)] for i in range(40)], ["a dog"]))
    for key in [*map(str, range(39, -1, -3)), "0", "39"]:
        assert len(run[key]) == 1
    assert len(run._files) <= 32


def test_uncommitted_and_superseded_shards_are_not_seen(stored: Store, explained: Make) -> None:
    folder = stored([[explained(["a"])]], TEXTS)
    with ShardWriter(folder, "000001-x", grid=(4, 5)) as writer:
        writer.add(explained(["b"]))
        assert list(open_run(folder).keys()) == ["a"]
        writer.commit({"shard": "000001-x", "number": 1, "errors": [], "config": "of another run"})
    assert list(open_run(folder).keys()) == ["a"]
    (folder / "shards/000002-y.parquet").write_bytes(b"no marker")
    (folder / "shards/.000002-y.json.01234567.part").write_bytes(b"{")
    assert len(open_run(folder)) == 1


def test_an_empty_run(stored: Store) -> None:
    run = open_run(stored([], TEXTS))
    assert len(run) == 0 and list(run.keys()) == [] and "a" not in run and list(run.arrays()) == []
    assert run.summary()["images"] == 0 and "0 images" in repr(run)


def test_folders_that_hold_no_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none", Path(__file__)):
        with pytest.raises(InputError, match="holds no run"):
            open_run(folder)
    (tmp_path / "run.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="damaged"):
        open_run(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"shard": "000000-abc"}', '"000000-abc"', "\x00"])
def test_foreign_json_among_the_markers(stored: Store, explained: Make, text: str) -> None:
    folder = stored([[explained(2)]], TEXTS)
    (folder / "shards/000000-abc.json").write_text(text)
    with pytest.raises(InputError, match=r"000000-abc\.json is no marker of a run \(.*\): remove it"):
        open_run(folder)


def test_files_that_are_cut_foreign_or_gone(stored: Store, explained: Make) -> None:
    folder = stored([[explained(200, 5, features=(4, 3))]], TEXTS, features="int8")
    file, whole = folder / "shards/000000-abc.parquet", (folder / "shards/000000-abc.parquet").read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], whole[: len(whole) // 2], b"PAR1" + bytes(50) + b"PAR1"):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"000000-abc\.parquet is damaged or foreign"):
            open_run(folder)[0]
    other = folder / "features/000000-abc.parquet"
    other.rename(file)
    with pytest.raises(InputError, match="damaged or foreign"):
        open_run(folder)[0]
    file.unlink()
    with pytest.raises(InputError, match="is missing, though it was committed"):
        list(open_run(folder).keys())
    with pytest.raises(InputError, match="is missing"):
        open_run(folder).features([0])


def test_counts_that_do_not_fit(stored: Store, explained: Make) -> None:
    folder = stored([[explained(3)]], TEXTS)
    marker = folder / "shards/000000-abc.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "images": 5}))
    with pytest.raises(InputError, match="holds 3 images, its marker says 5"):
        list(open_run(folder).keys())
