"""Data sets, each on a small tree of its own shape."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from clipfast.data.datasets import DATASETS, Dataset, open_dataset
from clipfast.data.datasets.base import in_turn, safe_keys
from clipfast.data.datasets.folders import imagenet_names
from clipfast.data.images import read_image
from clipfast.data.scenes import Scenes
from clipfast.errors import ImageError, InputError

DOCS = Path(__file__).parents[2] / "docs" / "datasets.md"


def picture(path: Path, size: tuple[int, int] = (12, 8), colour: tuple[int, int, int] = (200, 10, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def keys(dataset: Dataset) -> list[str]:
    return [sample.key for sample in dataset]


def labels(dataset: Dataset) -> list[int | None]:
    return [target.label for sample in dataset for target in sample.targets]


# One small tree for each data set that has files.


def make_folder(root: Path) -> None:
    for name in ("tabby_cat/b.jpg", "tabby_cat/a.png", "golden_retriever/x y.jpg", "golden_retriever/.hidden.jpg"):
        picture(root / name)
    write(root / "tabby_cat" / "notes.txt", "no picture")
    (root / "empty").mkdir()


def make_imagenet(root: Path) -> None:
    for wnid, numbers in {"n01440764": (293, 2138), "n01443537": (236,), "n15075141": (7,)}.items():
        for number in numbers:
            picture(root / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG")


def make_imagenette(root: Path) -> None:
    for wnid in ("n03888257", "n01440764"):
        for number in (1, 2):
            picture(root / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG")
            picture(root / "train" / wnid / f"{wnid}_{number}.JPEG")


def make_caltech256(root: Path) -> None:
    for name in ("001.ak47", "002.american-flag", "251.airplanes-101", "257.clutter"):
        for number in (1, 2):
            picture(root / "256_ObjectCategories" / name / f"{name[:3]}_{number:04d}.jpg")
    picture(root / "256_ObjectCategories" / "001.ak47" / "greg" / "stray.jpg")


def make_imagenet_s(root: Path) -> None:
    """Three classes, of which one picture shows the second and the third."""
    write(root / "ImageNetS_categories_im50.txt", "n15075141\nn01440764\nn01443537\n")
    for wnid, ids in {"n01440764": [[0, 1, 1], [1000, 0, 1]], "n15075141": [[3, 2, 0], [1000, 1000, 3]]}.items():
        picture(root / "validation" / wnid / "ILSVRC2012_val_00000293.JPEG", (3, 2))
        of = np.asarray(ids)
        path = root / "validation-segmentation" / wnid / "ILSVRC2012_val_00000293.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack((of % 256, of // 256, 0 * of), -1).astype(np.uint8)).save(path)


def make_cub200(root: Path) -> None:
    root = root / "CUB_200_2011"
    birds = ["001.Black_footed_Albatross/Black_0002.jpg", "001.Black_footed_Albatross/Black_0001.jpg", "002.Crow/C.jpg"]
    write(root / "images.txt", "".join(f"{i} {name}\n" for i, name in enumerate(birds, 1)))
    write(root / "classes.txt", "1 001.Black_footed_Albatross\n2 002.Crow\n")
    write(root / "image_class_labels.txt", "1 1\n2 1\n3 2\n")
    write(root / "train_test_split.txt", "1 1\n2 0\n3 0\n")
    write(root / "bounding_boxes.txt", "1 1.0 1.0 2.0 2.0\n2 3.0 1.0 4.0 5.0\n3 0.0 0.0 12.0 8.0\n")
    votes = np.zeros((8, 12), np.uint8)
    votes[:, 6:], votes[:, 9:] = 102, 153
    for name in birds:
        picture(root / "images" / name)
        path = (root / "segmentations" / name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(votes).save(path)


SQUARE = [[1, 1, 5, 1, 5, 5, 1, 5]]


def make_coco(root: Path) -> None:
    crowd = np.zeros((8, 12), np.uint8, order="F")
    crowd[:, 3:9] = 1
    runs = coco_mask.encode(crowd)
    packed = {"size": [8, 12], "counts": runs["counts"].decode()}
    flat, lengths = crowd.ravel(order="F"), []
    turns = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *turns, flat.size]).tolist()
    content = {
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
        "images": [
            {"id": 9, "file_name": "000000000009.jpg", "height": 8, "width": 12},
            {"id": 2, "file_name": "000000000002.jpg", "height": 8, "width": 12},
            {"id": 5, "file_name": "000000000005.jpg", "height": 8, "width": 12},
        ],
        "annotations": [
            # Two dogs, a crowd of dogs, and a crowd of persons alone.
            {"id": 1, "image_id": 9, "category_id": 18, "iscrowd": 0, "segmentation": SQUARE, "bbox": [1, 1, 4, 4]},
            {
                "id": 2,
                "image_id": 9,
                "category_id": 18,
                "iscrowd": 0,
                "segmentation": [[10, 0, 12, 0, 12, 2, 10, 2]],
                "bbox": [10, 0, 2, 2.5],
            },
            {"id": 3, "image_id": 9, "category_id": 18, "iscrowd": 1, "segmentation": packed, "bbox": [3, 0, 6, 8]},
            {
                "id": 4,
                "image_id": 9,
                "category_id": 1,
                "iscrowd": 1,
                "segmentation": {"size": [8, 12], "counts": lengths},
                "bbox": [3, 0, 6, 8],
            },
            {
                "id": 5,
                "image_id": 2,
                "category_id": 1,
                "iscrowd": 0,
                "segmentation": {"size": [8, 12], "counts": lengths},
                "bbox": [3, 0, 6, 8],
            },
        ],
    }
    write(root / "annotations" / "instances_val2017.json", json.dumps(content))
    captions = [
        {"id": 12, "image_id": 2, "caption": "A person. "},
        {"id": 3, "image_id": 2, "caption": "Someone\n"},
        {"id": 4, "image_id": 9, "caption": "Dogs"},
    ]
    write(root / "annotations" / "captions_val2017.json", json.dumps({"annotations": captions}))
    for row in content["images"]:
        picture(root / "val2017" / row["file_name"])


def karpathy(path: Path, rows: list[tuple[str, str, str, list[str]]]) -> None:
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": text} for text in texts]}
        | ({"filepath": folder} if folder else {})
        for name, folder, split, texts in rows
    ]
    write(path, json.dumps({"images": images, "dataset": "small"}))


def make_coco_karpathy(root: Path) -> None:
    rows = [
        ("COCO_val2014_000000000042.jpg", "val2014", "test", ["A shoe rack. ", "Shoes"]),
        ("COCO_val2014_000000000007.jpg", "val2014", "test", ["A dog"]),
        ("COCO_train2014_000000000001.jpg", "train2014", "train", ["A cat"]),
    ]
    karpathy(root / "dataset_coco.json", rows)
    for name, folder, _, _ in rows:
        picture(root / folder / name)


def make_flickr8k(root: Path) -> None:
    for name in ("200.jpg", "100.jpg"):
        picture(root / "Images" / name)
    write(root / "captions.txt", 'image,caption\n200.jpg,"A dog, running ."\n200.jpg,A dog\n100.jpg,A child\n')


def make_flickr30k(root: Path) -> None:
    for name in ("200.jpg", "100.jpg"):
        picture(root / "flickr30k-images" / name)
    karpathy(root / "dataset_flickr30k.json", [("200.jpg", "", "test", ["Two"]), ("100.jpg", "", "test", ["One", "I"])])


def make_conceptual_captions(root: Path) -> None:
    rows = ['a "quoted" dog\thttp://a', "gone\thttp://b", "a cat on a mat\thttp://c"]
    write(root / "Validation_GCC-1.1.0-Validation.tsv", "\n".join(rows) + "\n")
    picture(root / "val" / "00000" / "000000000.jpg")
    picture(root / "val" / "00000" / "000000002.jpg")


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def encoded(colour: tuple[int, int, int], kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 8), colour).save(stream, kind)
    return stream.getvalue()


def make_webdataset(root: Path) -> None:
    write(root / "classnames.txt", "cat\ndog\n")
    shard(
        root / "00001.tar",
        {"000.png": encoded((1, 2, 3)), "000.cls": b"1\n", "000.json": json.dumps({"caption": "A dog"}).encode()},
    )
    shard(
        root / "00000.tar",
        {
            "./000.jpg": encoded((9, 9, 9), "JPEG"),
            "./000.cls": b"0",
            "./000.txt": b" A cat\n",
            "._000.jpg": b"of another system",
            "only.txt": b"without a picture",
            "001.PNG": encoded((50, 60, 70)),
            "001.cls": b"1",
        },
    )


MAKE: dict[str, Callable[[Path], None]] = {
    "folder": make_folder,
    "imagenet": make_imagenet,
    "imagenette": make_imagenette,
    "caltech256": make_caltech256,
    "imagenet_s": make_imagenet_s,
    "cub200": make_cub200,
    "coco": make_coco,
    "coco_karpathy": make_coco_karpathy,
    "flickr8k": make_flickr8k,
    "flickr30k": make_flickr30k,
    "conceptual_captions": make_conceptual_captions,
    "webdataset": make_webdataset,
}


@pytest.fixture(params=sorted(MAKE))
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    MAKE[request.param](tmp_path)
    return request.param, tmp_path


# What holds of all of them.


def test_every_data_set_has_a_tree_here() -> None:
    assert set(MAKE) | {"scenes"} == set(DATASETS)


def test_samples_keep_what_the_data_set_promises(tree: tuple[str, Path]) -> None:
    kind, root = tree
    dataset = open_dataset(f"{kind}:{root}")
    samples = list(dataset)
    assert len(samples) == len(dataset) > 1
    assert dataset.name.split("/")[0] == kind
    assert dataset.offers <= {"labels", "masks", "boxes", "captions"}
    targets = [target for sample in samples for target in sample.targets]
    assert ("labels" in dataset.offers) == (dataset.classes is not None) == bool(targets)
    assert ("masks" in dataset.offers) == any(target.mask is not None for target in targets)
    assert ("boxes" in dataset.offers) == any(target.boxes for target in targets)
    assert ("captions" in dataset.offers) == any(sample.captions for sample in samples)
    for sample in samples:
        width, height = read_image(sample.image).size
        assert len({target.label for target in sample.targets}) == len(sample.targets)
        for target in sample.targets:
            assert dataset.classes is not None and target.label is not None
            assert target.text == dataset.classes[target.label]
            if target.mask is not None:
                assert target.mask.shape == (height, width) and (target.mask > 0).any()
                assert target.mask.dtype in (np.bool_, np.int8)
            for left, top, right, bottom in target.boxes or ():
                assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_keys_are_unique_and_fit_for_file_names(tree: tuple[str, Path]) -> None:
    found = keys(open_dataset(f"{tree[0]}:{tree[1]}"))
    assert len({key.lower() for key in found}) == len(found)
    assert all(re.fullmatch(r"\w[\w.~-]*", key) for key in found)


def test_nothing_is_opened_before_its_turn(tree: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kind, root = tree
    for path in root.rglob("*"):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            path.write_bytes(b"")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a picture was opened")

    monkeypatch.setattr(Image, "open", refuse)
    dataset = open_dataset(f"{kind}:{root}")
    assert len(dataset) > 1


def test_the_order_is_that_of_names_whatever_the_disk_gives(
    tree: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, root = tree
    before = keys(open_dataset(f"{kind}:{root}"))
    shuffle = random.Random(1)

    def shuffled(function: Callable[..., Any]) -> Callable[..., Any]:
        def anyhow(*args: Any, **kwargs: Any) -> Any:
            found = list(function(*args, **kwargs))
            shuffle.shuffle(found)
            return iter(found)

        return anyhow

    class Entries(list[Any]):
        def __enter__(self) -> Entries:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    scandir = os.scandir

    def scan(path: Any = ".") -> Entries:
        with scandir(path) as found:
            entries = Entries(found)
        shuffle.shuffle(entries)
        return entries

    for name in ("iterdir", "glob", "rglob"):
        monkeypatch.setattr(Path, name, shuffled(getattr(Path, name)))
    monkeypatch.setattr("os.scandir", scan)
    assert [keys(open_dataset(f"{kind}:{root}")) for _ in range(3)] == [before] * 3


def test_a_limit_keeps_the_keys_it_takes(tree: tuple[str, Path]) -> None:
    kind, root = tree
    everything = keys(open_dataset(f"{kind}:{root}"))
    assert keys(open_dataset(f"{kind}:{root}", limit=len(everything) + 5)) == everything
    smaller: list[str] = []
    for limit in range(1, len(everything) + 1):
        taken = keys(open_dataset(f"{kind}:{root}", limit=limit))
        assert len(taken) == limit
        assert taken == [key for key in everything if key in taken]
        assert set(smaller) <= set(taken)
        smaller = taken


def test_samples_are_counted_from_both_ends(tree: tuple[str, Path]) -> None:
    dataset = open_dataset(f"{tree[0]}:{tree[1]}")
    assert dataset[-1].key == dataset[len(dataset) - 1].key
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError):
            dataset[index]


@pytest.mark.parametrize("kind", sorted(MAKE))
def test_missing_files_say_where_to_get_them_and_how_they_lie(kind: str, tmp_path: Path) -> None:
    source = DATASETS[kind].source
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError) as raised:
            open_dataset(f"{kind}:{folder}")
        message = str(raised.value)
        assert message.startswith(f"{kind}: there is no {folder}")
        assert source.where in message
        assert all(line in message for line in source.layout.splitlines())


@pytest.mark.parametrize("kind", sorted(MAKE))
def test_a_name_without_a_folder_says_what_it_needs(kind: str) -> None:
    with pytest.raises(InputError, match=f"{kind}:ROOT"):
        open_dataset(kind)


@pytest.mark.parametrize("kind", sorted(set(MAKE) - {"folder", "webdataset"}))
def test_an_unknown_split_is_refused(kind: str, tmp_path: Path) -> None:
    MAKE[kind](tmp_path)
    with pytest.raises(InputError, match=r"split.* 'tset'"):
        open_dataset(f"{kind}:{tmp_path}", split="tset")


def test_the_root_stands_in_for_the_path(tmp_path: Path) -> None:
    make_folder(tmp_path / "mine")
    want = keys(open_dataset(f"folder:{tmp_path / 'mine'}"))
    assert keys(open_dataset("folder", root=tmp_path / "mine")) == want
    assert keys(open_dataset("folder:mine", root=tmp_path)) == want
    assert keys(open_dataset("Folder", root=tmp_path, split="mine")) == want


def test_names_limits_and_seeds_that_cannot_be() -> None:
    with pytest.raises(InputError, match="did you mean 'imagenette'"):
        open_dataset("imagenett:/x")
    with pytest.raises(InputError, match="limit"):
        open_dataset("scenes:1", limit=0)
    for spec in ("scenes", "scenes:a", "scenes:1:2:3", "scenes:1:", "scenes:-1", "scenes:1:0"):
        with pytest.raises(InputError, match="scene"):
            open_dataset(spec)
    with pytest.raises(InputError, match="splits"):
        open_dataset("scenes:1", split="val")


def test_the_page_of_data_sets_names_them_all() -> None:
    page = DOCS.read_text(encoding="utf-8")
    for name, kind in DATASETS.items():
        assert f"`{name}" in page
        for split in kind.source.splits:
            assert f"`{split}`" in page


def test_keys_of_like_names_differ() -> None:
    assert safe_keys(["a/b", "a b", "A b", "..", ".x"]) == ["a_b", "a_b~2", "A_b~3", "_", "x"]


def test_a_limit_takes_classes_in_turn() -> None:
    of = [0, 0, 0, 1, 2, 2]
    assert in_turn(of, None) == in_turn(of, 9) == [0, 1, 2, 3, 4, 5]
    assert in_turn(of, 3) == [0, 3, 4]
    assert in_turn(of, 5) == [0, 1, 3, 4, 5]


# What is particular to each.


def test_scenes_are_what_the_seed_draws() -> None:
    dataset = open_dataset("scenes:3:12")
    assert len(dataset) == 12 and len(open_dataset("scenes:3", limit=7)) == 7 and len(open_dataset("scenes:3")) == 1000
    assert dataset.offers == {"labels", "masks", "boxes", "captions"}
    scenes = Scenes(12, 3)
    several = 0
    for scene, sample in zip(scenes, dataset, strict=True):
        assert np.array_equal(np.asarray(sample.image), scene.image)
        assert (sample.captions, sample.foils) == ([scene.caption], [scene.foil])
        assert {target.text for target in sample.targets} == set(scene.names)
        for target in sample.targets:
            assert np.array_equal(target.mask, scene.mask(target.text))
            assert target.boxes == [thing.box for thing in scene.objects if thing.name == target.text]
            several += len(target.boxes) > 1
    assert dataset[4].key == "scene_3_000004"
    assert len(set(keys(dataset)) | set(keys(open_dataset("scenes:4:12")))) == 24


def test_class_folders_are_named_as_they_are(tmp_path: Path) -> None:
    make_folder(tmp_path)
    picture(tmp_path / "n01440764" / "z.jpg")
    dataset = open_dataset(f"folder:{tmp_path}")
    assert dataset.classes == ["golden retriever", "tench", "tabby cat"]
    assert keys(dataset) == ["golden_retriever_x_y", "n01440764_z", "tabby_cat_a", "tabby_cat_b"]
    assert labels(dataset) == [0, 1, 2, 2]
    assert dataset[2].image == tmp_path / "tabby_cat" / "a.png"


def test_imagenet_counts_all_thousand_classes(tmp_path: Path) -> None:
    make_imagenet(tmp_path)
    dataset = open_dataset(f"imagenet:{tmp_path}")
    assert dataset.classes is not None and len(dataset.classes) == 1000
    assert labels(dataset) == [0, 0, 1, 999]
    assert dataset[3].targets[0].text == "toilet paper"
    assert dataset[0].key == "n01440764_ILSVRC2012_val_00000293"
    # The folder of the pictures itself will do.
    assert keys(open_dataset(f"imagenet:{tmp_path / 'val'}")) == keys(dataset)
    assert labels(open_dataset(f"imagenet:{tmp_path}", limit=3)) == [0, 1, 999]


def test_imagenet_ids_are_in_the_order_of_labels() -> None:
    names = imagenet_names()
    assert list(names) == sorted(names)
    assert (names["n02123045"], names["n04507155"], names["n03445777"]) == ("tabby cat", "umbrella", "golf ball")


FLAT = {1: "n15075141", 2: "n01440764", 3: "n01443537"}
LABELS = [999, 0, 1]


def flat(root: Path) -> None:
    for number in FLAT:
        picture(root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", (40, 30))


def test_flat_imagenet_is_labelled_by_a_solution_with_boxes(tmp_path: Path) -> None:
    flat(tmp_path)
    lines = [f"ILSVRC2012_val_{i:08d},{wnid} 1 2 30 20 {wnid} 5 5 9 9 " for i, wnid in FLAT.items()]
    write(tmp_path / "LOC_val_solution.csv", "\n".join(["ImageId,PredictionString", *lines]) + "\n")
    dataset = open_dataset(f"imagenet:{tmp_path}")
    assert labels(dataset) == LABELS
    assert dataset.offers == {"labels", "boxes"}
    assert dataset[0].targets[0].boxes == [(1, 2, 30, 20), (5, 5, 9, 9)]

    write(tmp_path / "LOC_val_solution.csv", "ImageId,PredictionString\nILSVRC2012_val_00000001,n15075141 1 2 30\n")
    with pytest.raises(InputError, match=r"LOC_val_solution.csv is damaged"):
        open_dataset(f"imagenet:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("val.txt", "".join(f"ILSVRC2012_val_{i:08d}.JPEG {wnid}\n" for i, wnid in FLAT.items())),
        ("val.txt", "".join(f"ILSVRC2012_val_{i:08d}.JPEG {n}\n" for i, n in zip(FLAT, LABELS, strict=True))),
        ("imagenet_2012_validation_synset_labels.txt", "\n".join(FLAT.values())),
    ],
)
def test_flat_imagenet_is_labelled_by_a_list(tmp_path: Path, name: str, text: str) -> None:
    flat(tmp_path)
    write(tmp_path / name, text)
    dataset = open_dataset(f"imagenet:{tmp_path}")
    assert labels(dataset) == LABELS
    assert dataset.offers == {"labels"}
    write(tmp_path / name, text.splitlines()[0])
    with pytest.raises(InputError, match=name):
        open_dataset(f"imagenet:{tmp_path}")


def test_flat_imagenet_without_truth(tmp_path: Path) -> None:
    flat(tmp_path)
    with pytest.raises(InputError, match=r"there is no .*LOC_val_solution\.csv"):
        open_dataset(f"imagenet:{tmp_path}")
    write(tmp_path / "ILSVRC2012_validation_ground_truth.txt", "490\n361\n171\n")
    with pytest.raises(InputError, match="order of its own"):
        open_dataset(f"imagenet:{tmp_path}")
    write(tmp_path / "val.txt", "".join(f"ILSVRC2012_val_{i:08d}.JPEG n00000000\n" for i in FLAT))
    with pytest.raises(InputError, match="'n00000000'"):
        open_dataset(f"imagenet:{tmp_path}")


def test_imagenet_as_kaggle_packs_it(tmp_path: Path) -> None:
    make_imagenet(tmp_path / "ILSVRC" / "Data" / "CLS-LOC")
    assert labels(open_dataset(f"imagenet:{tmp_path}")) == [0, 0, 1, 999]


def test_imagenette_and_its_splits(tmp_path: Path) -> None:
    make_imagenette(tmp_path)
    dataset = open_dataset(f"imagenette:{tmp_path}")
    assert (dataset.classes, dataset.name) == (["tench", "parachute"], "imagenette/val")
    assert keys(open_dataset(f"imagenette:{tmp_path}", split="train"))[0] == "n01440764_n01440764_1"


def test_caltech_without_clutter(tmp_path: Path) -> None:
    make_caltech256(tmp_path)
    dataset = open_dataset(f"caltech256:{tmp_path}")
    assert dataset.classes == ["ak47", "american flag", "airplanes"]
    assert labels(dataset) == [0, 0, 1, 1, 2, 2]
    assert keys(open_dataset(f"caltech256:{tmp_path / '256_ObjectCategories'}")) == keys(dataset)


def test_imagenet_s_masks(tmp_path: Path) -> None:
    make_imagenet_s(tmp_path)
    dataset = open_dataset(f"imagenet_s:{tmp_path}")
    assert dataset.classes == ["tench", "goldfish", "toilet paper"]
    (tench,) = dataset[0].targets
    assert tench.mask is not None and tench.mask.tolist() == [[0, 1, 1], [-1, 0, 1]]
    goldfish, paper = dataset[1].targets
    assert goldfish.mask is not None and goldfish.mask.tolist() == [[0, 1, 0], [-1, -1, 0]]
    assert paper.mask is not None and paper.mask.tolist() == [[1, 0, 0], [-1, -1, 1]]


def test_imagenet_s_reads_ids_above_255(tmp_path: Path) -> None:
    names = sorted(imagenet_names())[:919]
    for wnid in names:
        (tmp_path / "validation-segmentation" / wnid).mkdir(parents=True)
    picture(tmp_path / "validation" / names[700] / "a.JPEG", (2, 1))
    mask = tmp_path / "validation-segmentation" / names[700] / "a.png"
    Image.fromarray(np.asarray([[[701 % 256, 701 // 256, 0], [1000 % 256, 1000 // 256, 0]]], np.uint8)).save(mask)
    (target,) = open_dataset(f"imagenet_s:{tmp_path}")[0].targets
    assert target.label == 700 and target.mask is not None and target.mask.tolist() == [[1, -1]]


def test_imagenet_s_wants_to_know_its_classes(tmp_path: Path) -> None:
    make_imagenet_s(tmp_path)
    (tmp_path / "ImageNetS_categories_im50.txt").unlink()
    with pytest.raises(InputError, match=r"2 class folders.*ImageNetS_categories_im919\.txt"):
        open_dataset(f"imagenet_s:{tmp_path}")


def test_imagenet_s_with_damaged_masks(tmp_path: Path) -> None:
    make_imagenet_s(tmp_path)
    dataset = open_dataset(f"imagenet_s:{tmp_path}")
    mask = tmp_path / "validation-segmentation" / "n01440764" / "ILSVRC2012_val_00000293.png"
    Image.new("RGB", (3, 2), (4, 0, 0)).save(mask)
    with pytest.raises(ImageError, match="class id 4 of 3"):
        dataset[0]
    Image.new("RGB", (3, 2), (255, 255, 0)).save(mask)
    with pytest.raises(ImageError, match="class id 65535"):
        dataset[0]
    mask.write_bytes(mask.read_bytes()[:50])
    with pytest.raises(ImageError, match=r"00000293\.png"):
        dataset[0]
    mask.unlink()
    with pytest.raises(ImageError, match="does not exist"):
        dataset[0]
    assert dataset[1].targets


def test_cub_boxes_votes_and_splits(tmp_path: Path) -> None:
    make_cub200(tmp_path)
    dataset = open_dataset(f"cub200:{tmp_path}")
    assert dataset.classes == ["Black footed Albatross", "Crow"]
    assert dataset.offers == {"labels", "boxes", "masks"}
    (target,) = dataset[0].targets
    assert target.boxes == [(3, 1, 7, 6)]
    # Three of five annotators are enough, two are not.
    assert target.mask is not None and np.flatnonzero(target.mask.all(0)).tolist() == [9, 10, 11]
    assert target.mask.sum() == 24
    assert keys(open_dataset(f"cub200:{tmp_path}", split="train")) == ["001.Black_footed_Albatross_Black_0002"]


def test_cub_with_damaged_tables(tmp_path: Path) -> None:
    make_cub200(tmp_path)
    root = tmp_path / "CUB_200_2011"
    boxes = (root / "bounding_boxes.txt").read_text()
    write(root / "bounding_boxes.txt", boxes.replace("3.0 1.0 4.0 5.0", "3.0 1.0 4.0"))
    with pytest.raises(InputError, match=r"bounding_boxes.txt is damaged: line 2 has 4 of 5 columns"):
        open_dataset(f"cub200:{tmp_path}")
    write(root / "bounding_boxes.txt", boxes.replace("3.0 1.0 4.0 5.0", "3.0 1.0 4.0 five"))
    with pytest.raises(InputError, match="five"):
        open_dataset(f"cub200:{tmp_path}")
    write(root / "bounding_boxes.txt", boxes)
    write(root / "image_class_labels.txt", "1 1\n2 7\n3 2\n")
    with pytest.raises(InputError, match="do not fit together"):
        open_dataset(f"cub200:{tmp_path}")


def test_cub_without_segmentations(tmp_path: Path) -> None:
    make_cub200(tmp_path)
    root = tmp_path / "CUB_200_2011"
    (root / "segmentations").rename(tmp_path / "segmentations")
    assert "masks" in open_dataset(f"cub200:{root}").offers
    (tmp_path / "segmentations").rename(tmp_path / "elsewhere")
    dataset = open_dataset(f"cub200:{root}")
    assert dataset.offers == {"labels", "boxes"} and dataset[0].targets[0].mask is None


def test_coco_masks_crowds_and_boxes(tmp_path: Path) -> None:
    make_coco(tmp_path)
    dataset = open_dataset(f"coco:{tmp_path}")
    assert dataset.classes == ["person", "dog", "toothbrush"]
    assert keys(dataset) == ["000000000002", "000000000005", "000000000009"]
    first, bare, last = dataset
    assert bare.targets == [] and bare.captions == []
    assert first.captions == ["Someone", "A person."]

    (person,) = first.targets
    assert person.mask is not None and person.mask.dtype == bool
    assert np.flatnonzero(person.mask.all(0)).tolist() == [3, 4, 5, 6, 7, 8] and person.mask.sum() == 48
    # The crowd of persons alone is no target; the crowd of dogs is ignored where no dog is.
    (dog,) = last.targets
    assert dog.boxes == [(1, 1, 5, 5), (10, 0, 12, 2.5)]
    want = np.zeros((8, 12), np.int8)
    want[:, 3:9] = -1
    want[1:5, 1:5] = 1
    want[0:2, 10:12] = 1
    assert dog.mask is not None and np.array_equal(dog.mask, want)


def test_coco_masks_are_those_of_pycocotools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pycocotools.coco import COCO

    make_coco(tmp_path)
    api = COCO(tmp_path / "annotations" / "instances_val2017.json")
    for sample in open_dataset(f"coco:{tmp_path}"):
        rows = [api.anns[i] for i in api.getAnnIds(imgIds=[int(sample.key)], iscrowd=False)]
        for target in sample.targets:
            (category,) = api.getCatIds(catNms=[target.text])
            masks = [api.annToMask(row) for row in rows if row["category_id"] == category]
            assert target.mask is not None
            assert np.array_equal(target.mask > 0, np.logical_or.reduce(masks))


def test_coco_without_captions_or_with_damage(tmp_path: Path) -> None:
    make_coco(tmp_path)
    (tmp_path / "annotations" / "captions_val2017.json").unlink()
    assert open_dataset(f"coco:{tmp_path}").offers == {"labels", "masks", "boxes"}

    path = tmp_path / "annotations" / "instances_val2017.json"
    text = path.read_text()
    content = json.loads(text)
    content["annotations"][0]["segmentation"] = {"size": [3, 3], "counts": "52"}
    write(path, json.dumps(content))
    dataset = open_dataset(f"coco:{tmp_path}")
    with pytest.raises(ImageError, match="annotations of image 9"):
        dataset[2]
    assert dataset[0].targets
    write(path, text[: len(text) // 2])
    with pytest.raises(InputError, match=r"instances_val2017.json is damaged: no JSON from line 1"):
        open_dataset(f"coco:{tmp_path}")
    write(path, json.dumps({"images": []}))
    with pytest.raises(InputError, match="lacks 'categories'"):
        open_dataset(f"coco:{tmp_path}")
    write(path, "[1, 2]")
    with pytest.raises(InputError, match=r"instances_val2017.json is damaged"):
        open_dataset(f"coco:{tmp_path}")


def test_coco_without_pycocotools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_coco(tmp_path)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.delitem(sys.modules, "pycocotools.mask", raising=False)
    with pytest.raises(InputError, match="pip install pycocotools"):
        open_dataset(f"coco:{tmp_path}")


def test_karpathys_coco(tmp_path: Path) -> None:
    make_coco_karpathy(tmp_path)
    dataset = open_dataset(f"coco_karpathy:{tmp_path}")
    assert keys(dataset) == ["COCO_val2014_000000000007", "COCO_val2014_000000000042"]
    assert dataset[1].captions == ["A shoe rack.", "Shoes"]
    assert dataset[1].image == tmp_path / "val2014" / "COCO_val2014_000000000042.jpg"
    assert (dataset[1].targets, dataset.classes, dataset.offers) == ([], None, {"captions"})
    assert len(open_dataset(f"coco_karpathy:{tmp_path}", split="train")) == 1
    with pytest.raises(InputError, match="no pictures of the split 'restval'"):
        open_dataset(f"coco_karpathy:{tmp_path}", split="restval")
    (tmp_path / "val2014").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"there is no .*val2014\b"):
        open_dataset(f"coco_karpathy:{tmp_path}")
    write(tmp_path / "dataset_coco.json", json.dumps({"images": [{"split": "test", "filename": "a.jpg"}]}))
    with pytest.raises(InputError, match="lacks 'sentences'"):
        open_dataset(f"coco_karpathy:{tmp_path}")


@pytest.mark.parametrize(
    ("kind", "table", "text"),
    [
        ("flickr8k", "captions.txt", 'image,caption\n2.jpg,"A dog, running ."\n1.jpg,A child\n2.jpg,Two\n'),
        ("flickr8k", "Flickr8k.token.txt", "2.jpg#0\tA dog, running .\n2.jpg#1\tTwo\n1.jpg#0\tA child\n"),
        ("flickr30k", "results_20130124.token", "2.jpg#0\tA dog, running .\n2.jpg#1\tTwo\n\n1.jpg#0\tA child\n"),
        (
            "flickr30k",
            "results.csv",
            "image_name| comment_number| comment\n2.jpg| 0| A dog, running .\n2.jpg| 1   Two\n1.jpg| 0| A child\n",
        ),
    ],
)
def test_flickrs_tables_of_captions(tmp_path: Path, kind: str, table: str, text: str) -> None:
    picture(tmp_path / "Images" / "1.jpg")
    write(tmp_path / table, text)
    dataset = open_dataset(f"{kind}:{tmp_path}")
    assert [(sample.key, sample.captions) for sample in dataset] == [
        ("1", ["A child"]),
        ("2", ["A dog, running .", "Two"]),
    ]
    with pytest.raises(InputError, match=f"there is no .*dataset_{kind}.json"):
        open_dataset(f"{kind}:{tmp_path}", split="test")
    write(tmp_path / table, "what is this\nno table\n")
    with pytest.raises(InputError, match=f"{re.escape(table)} is damaged"):
        open_dataset(f"{kind}:{tmp_path}")


def test_flickr_in_karpathys_splits(tmp_path: Path) -> None:
    make_flickr30k(tmp_path)
    dataset = open_dataset(f"flickr30k:{tmp_path}")
    assert dataset.name == "flickr30k/test"
    assert [sample.captions for sample in dataset] == [["One", "I"], ["Two"]]
    assert dataset[0].image == tmp_path / "flickr30k-images" / "100.jpg"


def test_conceptual_captions_by_row(tmp_path: Path) -> None:
    make_conceptual_captions(tmp_path)
    dataset = open_dataset(f"conceptual_captions:{tmp_path}")
    assert [(s.key, s.captions) for s in dataset] == [
        ("000000000", ['a "quoted" dog']),
        ("000000002", ["a cat on a mat"]),
    ]
    table = tmp_path / "Validation_GCC-1.1.0-Validation.tsv"
    write(table, "caption\turl\n" + table.read_text())
    assert [sample.captions for sample in open_dataset(f"conceptual_captions:{tmp_path}")] == [
        sample.captions for sample in dataset
    ]
    write(table, "only\thttp://a\n")
    (tmp_path / "val" / "00000" / "000000000.jpg").unlink()
    with pytest.raises(InputError, match="no row whose picture is there"):
        open_dataset(f"conceptual_captions:{tmp_path}")


def test_conceptual_captions_by_file(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", 'title\tfilepath\n"a ""quoted"" dog"\tdata/b.jpg\na cat\tdata/a.jpg\n')
    dataset = open_dataset(f"conceptual_captions:{tmp_path}", split="train")
    assert [(s.image, s.captions) for s in dataset] == [
        (tmp_path / "data" / "a.jpg", ["a cat"]),
        (tmp_path / "data" / "b.jpg", ['a "quoted" dog']),
    ]
    write(tmp_path / "train.tsv", "filepath\tname\ndata/b.jpg\tx\n")
    with pytest.raises(InputError, match="lacks 'title'"):
        open_dataset(f"conceptual_captions:{tmp_path}", split="train")


def test_shards_hold_pictures_classes_and_captions(tmp_path: Path) -> None:
    make_webdataset(tmp_path)
    dataset = open_dataset(f"webdataset:{tmp_path}")
    assert keys(dataset) == ["00000_000", "00000_001", "00001_000"]
    assert labels(dataset) == [0, 1, 1]
    assert [sample.captions for sample in dataset] == [["A cat"], [], ["A dog"]]
    assert [np.asarray(s.image)[0, 0].tolist() for s in dataset] == [[9, 9, 9], [50, 60, 70], [1, 2, 3]]
    assert dataset.offers == {"labels", "captions"} and dataset.classes == ["cat", "dog"]


def test_shards_by_file_and_pattern(tmp_path: Path) -> None:
    make_webdataset(tmp_path / "data")
    everything = keys(open_dataset(f"webdataset:{tmp_path}", split="data"))
    assert len(everything) == 3
    for pattern in ("data/{00000..00001}.tar", "data/*.tar", "data/{00001,00000}.tar"):
        assert keys(open_dataset(f"webdataset:{tmp_path}/{pattern}")) == everything
    assert keys(open_dataset(f"webdataset:{tmp_path}/data/00001.tar")) == ["00001_000"]
    with pytest.raises(InputError, match=r"there is no .*00002\.tar"):
        open_dataset(f"webdataset:{tmp_path}/data/{{00000..00002}}.tar")


def test_shards_of_classes_without_names(tmp_path: Path) -> None:
    make_webdataset(tmp_path)
    (tmp_path / "classnames.txt").unlink()
    dataset = open_dataset(f"webdataset:{tmp_path}")
    assert dataset.offers == {"captions"} and labels(dataset) == []
    shard(tmp_path / "00000.tar", {"0.jpg": encoded((1, 1, 1), "JPEG"), "0.cls": b"0"})
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(InputError, match=r"classnames\.txt"):
        open_dataset(f"webdataset:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("0.jpg", b"\xff\xd8 not a jpeg", "0 in .*00000.tar"),
        ("0.jpg", b"", "0 in .*00000.tar is empty"),
        ("0.cls", b"two", "damaged"),
        ("0.cls", b"2", "class 2 of 2"),
        ("0.cls", b"-1", "class -1 of 2"),
        ("0.json", b'{"caption": ', "damaged"),
    ],
)
def test_a_damaged_sample_of_a_shard_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    write(tmp_path / "classnames.txt", "cat\ndog\n")
    members = {"0.jpg": encoded((1, 1, 1), "JPEG"), "0.cls": b"0", "0.json": b'{"caption": ["x", "y"]}'}
    shard(tmp_path / "00000.tar", members | {"1.jpg": members["0.jpg"], "1.json": b'{"url": "z"}'})
    assert open_dataset(f"webdataset:{tmp_path}")[0].captions == ["x", "y"]
    shard(tmp_path / "00000.tar", members | {name: content, "1.jpg": members["0.jpg"], "1.json": b'{"url": "z"}'})
    dataset = open_dataset(f"webdataset:{tmp_path}")
    with pytest.raises(ImageError, match=said):
        dataset[0]
    assert dataset[1].captions == []


def test_shards_that_are_no_tar_files(tmp_path: Path) -> None:
    make_webdataset(tmp_path)
    whole = (tmp_path / "00001.tar").read_bytes()
    for content in (whole[:700], b"<html>not found</html>" * 40, gzip.compress(whole)):
        (tmp_path / "00001.tar").write_bytes(content)
        with pytest.raises(InputError, match=r"00001.tar cannot be read as an uncompressed tar"):
            open_dataset(f"webdataset:{tmp_path}")
        # What a limit does not reach is not looked at.
        assert len(open_dataset(f"webdataset:{tmp_path}", limit=2)) == 2
    shard(tmp_path / "00000.tar", {"a.txt": b"words"})
    shard(tmp_path / "00001.tar", {})
    with pytest.raises(InputError, match="hold no pictures"):
        open_dataset(f"webdataset:{tmp_path}")
