from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import set_model_preprocess_cfg
from safetensors import safe_open
from torch import Tensor

import clipfast
from clipfast.errors import InputError, ModelError, OutputError
from clipfast.finetune.checkpoint import agree, finish, load_state, replacing, save_model, save_state
from clipfast.finetune.log import Log, read_log
from clipfast.models.model import Model

sys.path.insert(0, str(Path(__file__).parent))
from tiny import At, finetune, tiny, tokens


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = save_state(tmp_path, {"step": 1})

    class Unwritable:
        def __reduce__(self) -> Any:
            raise RuntimeError("the disk is full")

    with pytest.raises(OutputError, match=r"state\.pt cannot be written: the disk is full"):
        save_state(tmp_path, {"tensor": torch.zeros(1000), "more": Unwritable()})
    assert load_state(tmp_path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]
    full = replacing(path)
    full.__enter__().write_bytes(b"half")
    with pytest.raises(OutputError, match="No space"):
        full.__exit__(OSError, OSError(28, "No space left on device"), None)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_of_one_run(tmp_path: Path) -> None:
    config = {"model": "tiny", "settings": {"lr": 1e-3, "betas": (0.9, 0.95)}, "steps": 5}
    agree(tmp_path, config, first=False)
    assert not (tmp_path / "config.json").exists()
    other = {**config, "settings": {"lr": 1e-4, "betas": (0.9, 0.95)}}
    # Nothing was trained yet: settings may still change.
    agree(tmp_path, other, first=True)
    agree(tmp_path, config, first=True)
    save_state(tmp_path, {})
    agree(tmp_path, config, first=True)
    with pytest.raises(InputError, match=r"settings\.lr was 0\.001 and is 0\.0001 now\): repeat its settings"):
        agree(tmp_path, other, first=True)
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["lr"] == 1e-3
    # A complete run whose state was thrown away is still that run.
    finish(tmp_path, {})
    (tmp_path / "state.pt").unlink()
    with pytest.raises(InputError, match=r"settings\.lr was"):
        agree(tmp_path, other, first=True)
    for damage in ("{", None):
        (tmp_path / "config.json").unlink() if damage is None else (tmp_path / "config.json").write_text(damage)
        with pytest.raises(InputError, match=r"no config\.json that can be read"):
            agree(tmp_path, config, first=True)


def test_runs_that_differ_in_what_matters(photos: Path, tmp_path: Path) -> None:
    finetune(photos, tmp_path / "run", steps=2)
    state = (tmp_path / "run" / "state.pt").read_bytes()
    other = tiny(head_width=16)
    for given, words in (
        ({"lr": 2e-3}, r"settings\.lr was 0\.001 and is 0\.002 now"),
        ({"batch": 5}, r"settings\.batch was 4 and is 5 now"),
        ({"steps": 3}, r"settings\.steps was 2 and is 3 now"),
    ):
        with pytest.raises(InputError, match=words):
            finetune(photos, tmp_path / "run", **{"steps": 2, **given})
    with torch.no_grad():
        other.module.visual.proj.mul_(2)
    with pytest.raises(InputError, match="weights was"):
        finetune(photos, tmp_path / "run", steps=2, model=other)
    (photos / "1.png").unlink()
    with pytest.raises(InputError, match=r"images\.listing was"):
        finetune(photos, tmp_path / "run", steps=2)
    assert (tmp_path / "run" / "state.pt").read_bytes() == state


def test_how_it_runs_may_change_in_between(photos: Path, tmp_path: Path) -> None:
    finetune(photos, tmp_path / "run", steps=4, follow=At(1, 15))
    done = finetune(photos, tmp_path / "run", steps=4, workers=1, save_every=1, log_every=3, checkpointing=True)
    assert done.summary["complete"]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not whole", None])
def test_a_damaged_state_is_named(photos: Path, tmp_path: Path, damage: bytes | None) -> None:
    finetune(photos, tmp_path / "run", follow=At(1, 15))
    path = tmp_path / "run" / "state.pt"
    path.write_bytes(path.read_bytes()[:-3000] if damage is None else damage)
    with pytest.raises(InputError, match=r"state\.pt is damaged: remove it to begin anew"):
        finetune(photos, tmp_path / "run")


def test_a_state_of_another_model_does_not_fit(photos: Path, tmp_path: Path) -> None:
    finetune(photos, tmp_path / "run", follow=At(1, 15))
    state = load_state(tmp_path / "run")
    assert state is not None
    del state["trained"]["proj"]
    save_state(tmp_path / "run", state)
    with pytest.raises(InputError, match="another model"):
        finetune(photos, tmp_path / "run")


def test_the_log_goes_on_from_a_step(tmp_path: Path) -> None:
    with Log(tmp_path, 0) as log:
        for step in range(1, 6):
            log.step({"step": step, "loss": float("inf") if step == 2 else 0.5})
    with (tmp_path / "log.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')
    assert [one["step"] for one in read_log(tmp_path)] == [1, 2, 3, 4, 5]
    with Log(tmp_path, 3) as log:
        log.step({"step": 4, "loss": 0.25})
    assert read_log(tmp_path) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 0.5},
        {"step": 4, "loss": 0.25},
    ]


def test_tensorboard(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    finetune(photos, tmp_path / "run", steps=2, tensorboard=True)
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        finetune(photos, tmp_path / "other", steps=2, tensorboard=True)


def written(model: Model, folder: Path) -> Path:
    """The model as a fine-tuning writes it, its image tower shifted."""
    moved = {f"visual.{k}": v + 0.01 for k, v in model.module.visual.state_dict().items() if v.is_floating_point()}
    return save_model(folder, model, moved, {"step": 3})


def test_the_demo_model_is_read_back(tmp_path: Path) -> None:
    start = clipfast.load("demo")
    path = written(start, tmp_path)
    file = path / "open_clip_model.safetensors"
    expected = start.module.state_dict() | {
        f"visual.{k}": v + 0.01 for k, v in start.module.visual.state_dict().items()
    }
    for found in (clipfast.load(path), clipfast.load(file), clipfast.load("demo", pretrained=file)):
        assert same(dict(found.module.state_dict()), dict(expected))
        assert found.spec == start.spec
        assert found.encode_texts(["a dog"]).equal(start.encode_texts(["a dog"]))
    assert same(dict(open_clip.create_model(f"local-dir:{path}").state_dict()), dict(expected))
    with safe_open(file, "pt") as stored:
        assert json.loads(stored.metadata()["clipfast"]) == {"step": 3}
    with pytest.raises(ModelError, match="no weights of the demo model"):
        clipfast.load("demo", pretrained=Path(__file__))


@pytest.mark.parametrize("quick", [False, True])
def test_a_listed_architecture_keeps_its_activation_and_preprocessing(tmp_path: Path, quick: bool) -> None:
    torch.manual_seed(0)
    module = open_clip.create_model("ViT-S-32-alt", force_quick_gelu=quick, force_image_size=64)
    config = {**module.visual.preprocess_cfg, "mean": (0.5, 0.5, 0.5), "std": (0.4, 0.5, 0.6), "size": 64}
    set_model_preprocess_cfg(module, config)
    start = Model(module.eval(), tokens, name="ViT-S-32-alt:random")
    path = written(start, tmp_path)
    found, theirs = clipfast.load(path), open_clip.create_model(f"local-dir:{path}").eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found.module.encode_image(x), theirs.encode_image(x))
        assert not torch.equal(found.module.encode_image(x), module.encode_image(x))
    assert found.spec == start.spec
    assert any(type(m).__name__ == "QuickGELU" for m in found.module.modules()) == quick
    file = str(path / "open_clip_model.safetensors")
    alone = open_clip.create_model("ViT-S-32-alt", pretrained=file, force_image_size=64)
    assert same(dict(alone.state_dict()), dict(theirs.state_dict()))


def test_an_architecture_without_a_name_is_known_by_its_shapes(tmp_path: Path) -> None:
    module = open_clip.create_model("ViT-S-32-alt").eval()
    path = written(Model(module, tokens), tmp_path / "listed")
    assert json.loads((path / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]["width"] == 384
    path = written(tiny(), tmp_path / "not")
    assert [file.name for file in path.iterdir()] == ["open_clip_model.safetensors"]
